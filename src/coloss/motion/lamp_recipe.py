"""From clips with sentences to a LaMP that generates, finds and describes motion, in one call: stage by stage, to be stopped and taken up again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from coloss.data import Skeleton
from coloss.errors import InputError
from coloss.motion.lamp_evaluation import evaluate_lamp
from coloss.motion.lamp_model import LAMP_SIZES, Lamp, LampSize, load_lamp, skeleton_record
from coloss.motion.lamp_stages import STAGES, LampTraining
from coloss.motion.text_motion_data import MotionSplit, TextMotion, load_text_motion
from coloss.train import Budget, save_model
from coloss.train.run_folder import claim_folder, source_name, write_metrics

_SENTENCES = 2000
"""Most sentences that are kept for `coloss retrieve CLIP`."""


def train_lamp(
    data: str | Path = "bandai",
    folder: str | Path = "runs/lamp-bandai",
    *,
    size: LampSize = "small",
    split: MotionSplit = "compositional",
    parts: Sequence[int] = (1, 2),
    fps: float | None = None,
    skeleton: Skeleton | None = None,
    budget: Budget | None = None,
    compare: bool = True,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains tokenizer, evaluator, language-motion model, generator and captioner; this is behind `coloss run lamp`.

    The stages, each with checkpoints of its own: the motion tokenizer; the evaluator; a language model of the training sentences; pretraining by
    four losses; the generator of motion tokens; lengths; the captioner. Then, to compare with, a generator told by the language model's
    features, and one whose tokens attend to all. A run that was stopped goes on in its folder, in the stage where it was.

    The sentences of "bandai" are composed from the names of action and style (`compose_captions`), and those of its test clips by other
    templates than those trained on: every number on it is about that grammar.

    Args:
        data: "bandai", or path of a folder in the format of HumanML3D; see `load_text_motion`.
        folder: for `model.safetensors`, `run.json`, `metrics.json` and checkpoints; `load_lamp` reads it.
        size: "small" for about a thousand clips and a CPU, "paper" for the authors' sizes and GPUs.
        split: of "bandai".
        parts: of "bandai".
        fps: of a folder of other bodies than HumanML3D's and KIT's.
        skeleton: likewise; without it the model can be trained and measured, but neither gives nor takes joints.
        budget: of all stages together; default: as `STAGES` says.
        compare: also train and measure the two generators to compare with.
        limit: at most so many clips of each part.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        What `evaluate_lamp` measures on the test clips; those of the rivals with `generic_text_` and `bidirectional_` in front.

    Raises:
        InputError: for an unknown size, data that cannot be read or hold no test clips, or a folder that holds another run.

    Source:
        Li et al. 2024, arXiv 2410.07093.

    Examples:
        >>> import tempfile
        >>> metrics = train_lamp(
        ...     "bandai", tempfile.mkdtemp(), budget=Budget(steps=90), limit=40
        ... )  # doctest: +SKIP
        >>> metrics["fid"] < metrics["generic_text_fid"]  # doctest: +SKIP
        True
    """
    if size not in get_args(LampSize):
        raise InputError(f'size must be "small" or "paper", got {size!r}')
    folder = Path(folder)
    motion = load_text_motion(str(data), split=split, parts=parts, fps=fps, skeleton=skeleton, limit=limit)
    test = motion.part(2)
    if len(test) < 2:
        raise InputError(f"{data} must hold at least two test clips, got {len(test)}")
    steps = sum(stage.steps for stage in STAGES[size].values())
    run: dict[str, Any] = {
        "data": source_name(str(data)),
        "seed": seed,
        "size": size,
        "split": split,
        "parts": list(parts),
        "limit": limit,
        "compare": compare,
        "budget": (budget or Budget(steps=steps)).as_dict(),
        "sizes": {part: dict(values) for part, values in LAMP_SIZES[size].items()},
        "motion": {
            "numbers": motion.features[0].shape[1],
            "num_joints": motion.num_joints,
            "rotations": motion.rotations,
            "fps": motion.fps,
            "contact_step": motion.contact_step,
            "max_frames": int(motion.lengths.max()),
            "composed": motion.composed,
            "skeleton": None if motion.skeleton is None else skeleton_record(motion.skeleton),
        },
        "words": list(motion.vocabulary.words[3:]),
        "max_words": motion.vocabulary.max_words,
        "sentences": _one_of_each(motion.part(0)),
    }
    claim_folder(folder, run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lamp = Lamp(run)
    training = LampTraining(lamp, motion, run, folder, Budget(**run["budget"]), progress)
    training.tokenizer()
    training.evaluator()
    training.text()
    training.pretraining()
    training.generator()
    training.length()
    training.captioner()
    save_model(lamp, folder / "model.safetensors")  # whole before the comparison, which takes as long again
    rivals = training.rivals() if compare else {}
    metrics = evaluate_lamp(load_lamp(folder), test, rivals, seed=seed)
    write_metrics(folder, metrics)
    return metrics


def _one_of_each(train: TextMotion) -> list[str]:
    """The first sentence of each group of clips, at most `_SENTENCES`."""
    first = dict(zip(reversed(train.groups.tolist()), reversed([captions[0] for captions in train.captions])))
    return sorted(set(first.values()))[:_SENTENCES]
