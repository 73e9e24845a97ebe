"""Clips of motion with sentences, ready for training: Bandai-Namco's set with composed sentences, or a folder in the format of HumanML3D."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.data import (
    IndexedDataset,
    MotionClips,
    Skeleton,
    WordVocabulary,
    held_out_pairs,
    load_motion,
    resample_frames,
)
from coloss.data.splitting import split_rows
from coloss.errors import InputError
from coloss.motion.motion_captions import compose_captions
from coloss.motion.motion_representation import FeatureNormalizer, feature_groups, motion_features
from coloss.motion.text_motion_folder import TextMotionFolder, evenly, read_text_motion_folder

MotionSplit = Literal["compositional", "compositional-validation", "given"]

_FRAMES_PER_TOKEN = 4
_CONTACT_SPEED = 0.45  # metres per second: 3 cm a frame at 15 frames a second


@dataclass(frozen=True)
class TextMotion:
    """Clips as features, each with its sentences; made by `load_text_motion`.

    Attributes:
        features: of each clip float32 (frames, numbers) as `motion_features` gives them, not normalised; frames are a multiple of 4.
        captions: of each clip, at least one sentence.
        references: of each clip, all sentences that are right for it: `captions`, and of composed ones the other templates' too.
        groups: int64 (clips); clips of one group mean the same, so a sentence of one is right for all of them.
        split: uint8 (clips); 0 train, 1 validation, 2 test.
        names: of the clips.
        num_joints: J.
        rotations: whether features hold rotations of bones.
        skeleton: of the clips; None where the folder's joints are not known.
        fps: frames per second; of clips brought to one length the mean.
        vocabulary: of the training sentences' words.
        normalizer: from the training clips, or the folder's own `Mean.npy` and `Std.npy`; for a tokenizer make one with a bias.
        contact_step: metres a frame below which a foot counts as standing; None: the published default.
        composed: whether the sentences were composed by a grammar and not written by people about these clips.
        skipped: "name: reason" of each clip that was left out.
        source: name of the data set, or path.

    Examples:
        >>> motion = load_text_motion("bandai", frames=64)  # doctest: +SKIP
        >>> len(motion.part(2)), motion.part(2).captions[0][0]  # doctest: +SKIP
        (397, 'actively, a person raises the left hand')
    """

    features: tuple[Tensor, ...]
    captions: tuple[tuple[str, ...], ...]
    references: tuple[tuple[str, ...], ...]
    groups: Tensor
    split: np.ndarray
    names: tuple[str, ...]
    num_joints: int
    rotations: bool
    skeleton: Skeleton | None
    fps: float
    vocabulary: WordVocabulary
    normalizer: FeatureNormalizer
    contact_step: float | None
    composed: bool
    skipped: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.features)

    @property
    def feature_groups(self) -> dict[str, slice]:
        """Which numbers of a frame are what."""
        return feature_groups(self.num_joints, rotations=self.rotations)

    @property
    def lengths(self) -> Int[Tensor, " clips"]:
        """Frames of each clip."""
        return torch.tensor([len(clip) for clip in self.features], dtype=torch.int64)

    @property
    def root(self) -> int:
        """Number of the root joint."""
        return 0 if self.skeleton is None else self.skeleton.root

    def select(self, chosen: Any) -> "TextMotion":
        """Some of the clips, by a mask or by numbers; vocabulary and normalizer stay."""
        picked = np.arange(len(self))[np.asarray(chosen)]
        return replace(
            self,
            features=tuple(self.features[index] for index in picked),
            captions=tuple(self.captions[index] for index in picked),
            references=tuple(self.references[index] for index in picked),
            groups=self.groups[torch.from_numpy(picked)],
            split=self.split[picked],
            names=tuple(self.names[index] for index in picked),
        )

    def part(self, split: int) -> "TextMotion":
        """The clips of one part: 0 train, 1 validation, 2 test."""
        return self.select(self.split == split)

    def padded(
        self, normalizer: FeatureNormalizer | None = None
    ) -> tuple[Float[Tensor, "clips frames numbers"], Int[Tensor, " clips"]]:
        """All clips in one tensor, normalised and only then filled up with zeros, and how many frames of each are its own.

        Args:
            normalizer: instead of `self.normalizer`.

        Raises:
            InputError: if there are no clips.
        """
        if not len(self):
            raise InputError("padded needs at least one clip, got none")
        normalizer = normalizer or self.normalizer
        lengths = self.lengths
        filled = torch.zeros(len(self), int(lengths.max()), self.features[0].shape[1])
        for row, clip in enumerate(self.features):
            filled[row, : len(clip)] = normalizer(clip)
        return filled, lengths

    def caption_words(self) -> tuple[Int[Tensor, "clips captions words"], Int[Tensor, " clips"]]:
        """Word ids of all sentences, filled up with padding, and how many sentences each clip has."""
        counts = torch.tensor([len(sentences) for sentences in self.captions], dtype=torch.int64)
        most = int(counts.max()) if len(counts) else 0
        ids = torch.full((len(self), most, self.vocabulary.max_words), self.vocabulary.padding_id)
        for row, sentences in enumerate(self.captions):
            ids[row, : len(sentences)] = self.vocabulary.encode(sentences)
        return ids, counts

    def dataset(self, normalizer: FeatureNormalizer | None = None) -> IndexedDataset:
        """For `fit`: inputs are (features, lengths) as `padded` gives them; no targets.

        Further tensors of a batch, in `extras`: `words` (clips, captions, words), `caption_counts` and `groups` (clips). Which sentence of a
        clip a step uses is drawn in the step.

        Args:
            normalizer: instead of `self.normalizer`.

        Raises:
            InputError: if there are no clips.
        """
        words, counts = self.caption_words()
        extras = {"words": words, "caption_counts": counts, "groups": self.groups}
        return IndexedDataset(self.padded(normalizer), extras=extras)


def load_text_motion(
    source: str | Path = "bandai",
    *,
    split: MotionSplit = "compositional",
    parts: Sequence[int] = (1, 2),
    frames: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    fps: float | None = None,
    skeleton: Skeleton | None = None,
    max_words: int | None = None,
    vocabulary_size: int = 5000,
    limit: int | None = None,
    seed: int = 0,
) -> TextMotion:
    """Clips with sentences, of Bandai-Namco's set or of a folder in the format of HumanML3D.

    "bandai": features without rotations (131 numbers) and sentences of `compose_captions`: one set of templates for the train and validation
    parts, another for the test part. A group is an (action, style) pair. Splits:

    - "compositional": 20 of the 70 pairs of part 2 are the test part (397 clips) and never trained on; validation are the set's own
      validation clips of the other pairs.
    - "compositional-validation": for choosing settings without a look at the test. Its 20 pairs are left out altogether; of the other 50 the
      first pair of each action (10 pairs) is the test part.
    - "given": the set's own; every pair of the test part is also in the train part.

    A folder holds `new_joint_vecs/NAME.npy` (frames, 263 or 251 or as `motion_features` gives for other skeletons), `texts/NAME.txt` with lines
    `sentence#tokens#from#to` (seconds; 0 and 0: the whole clip, else a clip of its own), `train.txt`, and perhaps `val.txt`, `test.txt`,
    `Mean.npy` and `Std.npy`. Clips with NaN, without a file, too short or too long are left out and named in `skipped`. A group is the clips
    whose first sentence has the same words.

    Args:
        source: "bandai", or path of a folder.
        split: of Bandai's set; a folder has its own.
        parts: of Bandai's set: 1 (15 actions in 15 styles and a few more, one clip or two of each, always to train with), 2 (10 actions in 7
            styles, about 20 clips of each), or both.
        frames: brings every clip of Bandai's set to so many frames, a multiple of 4, which takes its tempo away; None keeps 15 frames per second.
        min_frames: shorter clips are left out; default: 8 of Bandai's set, 24 of clips with 251 numbers, else 40.
        max_frames: longer clips are left out; of Bandai's set they are cut to their middle. Default: 128 of Bandai's set, else 199.
        fps: of a folder; default: 20 with 263 numbers, 12.5 with 251.
        skeleton: of a folder; default: HumanML3D's with 263 numbers, KIT's with 251, else unknown.
        max_words: of a sentence in word ids, longer ones are cut; default: 16 of Bandai's set, whose sentences are shorter, else 32.
        vocabulary_size: ids in all; rarer words are unknown.
        limit: at most so many clips of each part, evenly spaced among them.
        seed: of the division, where a folder names no validation or test clips.

    Raises:
        InputError: for a source that is neither, a folder without clips that can be used, or an option that does not fit.
        DataNotFoundError: if Bandai's file is not there.

    Cost:
        `padded` needs clips x longest clip x numbers x 4 bytes: 6 GB for the whole of HumanML3D.

    Source:
        Guo et al., CVPR 2022 (format); Kobayashi et al., arXiv 2306.08861 (Bandai-Namco's set).

    Examples:
        >>> motion = load_text_motion("bandai", frames=64)  # doctest: +SKIP
        >>> [len(motion.part(part)) for part in range(3)], motion.num_joints  # doctest: +SKIP
        ([1074, 100, 397], 21)
    """
    for name, value in (("frames", frames), ("max_frames", max_frames)):
        if value is not None and (
            value < _FRAMES_PER_TOKEN or value % _FRAMES_PER_TOKEN and name == "frames"
        ):
            raise InputError(f"{name} must be a multiple of {_FRAMES_PER_TOKEN}, at least one, got {value}")
    if str(source) != "bandai":
        if frames is not None:
            raise InputError(f"frames must be None for a folder, got {frames}")
        path = Path(source).expanduser()
        found = read_text_motion_folder(
            path, min_frames=min_frames, max_frames=max_frames or 199, fps=fps, skeleton=skeleton, limit=limit
        )
        return _of_folder(path, found, 32 if max_words is None else max_words, vocabulary_size, seed)
    if split not in get_args(MotionSplit):
        raise InputError(f"split must be one of {', '.join(get_args(MotionSplit))}, got {split!r}")
    if not parts or not set(parts) <= {1, 2}:
        raise InputError(f"parts must be 1, 2 or both, got {tuple(parts)}")
    if fps is not None or skeleton is not None:
        raise InputError("fps and skeleton are those of the data set for 'bandai': leave them out")
    clips = load_motion("bandai")
    clips = clips.select(np.isin(clips.labels["part"], list(parts)))
    clips = _divided(clips, split)
    if limit is not None:
        if limit < 1:
            raise InputError(f"limit must be >= 1, got {limit}")
        rows = [np.flatnonzero(clips.split == part) for part in range(3)]
        clips = clips.select(np.concatenate([evenly(part, limit) for part in rows]))
    return _of_clips(
        clips,
        frames,
        8 if min_frames is None else min_frames,
        max_frames or 128,
        16 if max_words is None else max_words,
        vocabulary_size,
    )


def _divided(clips: MotionClips, split: MotionSplit) -> MotionClips:
    """The clips with the parts of a split, those that belong to none left out."""
    if split == "given":
        return clips
    second = clips.labels["part"] == 2
    held = held_out_pairs(clips) & second
    if split == "compositional":
        return replace(clips, split=np.where(held, 2, clips.split % 2).astype(np.uint8))
    pairs = _third_pairs(clips)
    inner = held_out_pairs(clips, held=pairs) & second
    kept = replace(clips, split=np.where(inner, 2, clips.split % 2).astype(np.uint8))
    return kept.select(~held)


def _third_pairs(clips: MotionClips) -> list[tuple[int, int]]:
    """Of each action of part 2 the style after its two held-out ones."""
    second = clips.labels["part"] == 2
    actions = np.unique(clips.labels["action"][second])
    styles = np.unique(clips.labels["style"][second])
    return [
        (int(action), int(styles[(2 * number + 2) % len(styles)])) for number, action in enumerate(actions)
    ]


def _of_clips(
    clips: MotionClips,
    frames: int | None,
    min_frames: int,
    max_frames: int,
    max_words: int,
    vocabulary_size: int,
) -> TextMotion:
    features, captions, references, groups, kept, skipped, rates = [], [], [], [], [], [], []
    actions, styles = clips.label_names["action"], clips.label_names["style"]
    for index in range(len(clips)):
        joints, rate = torch.from_numpy(clips.clip(index).copy()), clips.fps
        if len(joints) <= min_frames:
            skipped.append(f"{clips.names[index]}: {len(joints) - 1} frames, fewer than {min_frames}")
            continue
        if frames is not None:
            rate = clips.fps * frames / (len(joints) - 1)
            joints = resample_frames(joints.permute(2, 0, 1)[None], frames + 1)[0].permute(1, 2, 0)
        try:
            found = motion_features(joints, clips.skeleton, fps=rate, contact_step=_CONTACT_SPEED / rate)
        except InputError as error:
            skipped.append(f"{clips.names[index]}: {error}")
            continue
        usable = min(len(found), max_frames) // _FRAMES_PER_TOKEN * _FRAMES_PER_TOKEN
        start = (len(found) - usable) // 2
        features.append(found[start : start + usable])
        action, style = clips.labels["action"][index], clips.labels["style"][index]
        both = [compose_captions(actions[action], styles[style], held_out=held) for held in (False, True)]
        captions.append(both[int(clips.split[index] == 2)])
        references.append(both[0] + both[1])
        groups.append(int(action) * len(styles) + int(style))
        kept.append(index)
        rates.append(rate)
    return _assembled(
        features,
        captions,
        groups,
        clips.split[kept],
        [clips.names[index] for index in kept],
        num_joints=clips.skeleton.num_joints,
        rotations=False,
        skeleton=clips.skeleton,
        fps=float(np.mean(rates)) if rates else clips.fps,
        references=tuple(references),
        contact_step=_CONTACT_SPEED / (float(np.mean(rates)) if rates else clips.fps),
        max_words=max_words,
        vocabulary_size=vocabulary_size,
        composed=True,
        skipped=skipped,
        source=clips.source,
    )


def _of_folder(
    folder: Path, found: TextMotionFolder, max_words: int, vocabulary_size: int, seed: int
) -> TextMotion:
    sizes = [len(clip) // _FRAMES_PER_TOKEN * _FRAMES_PER_TOKEN for clip in found.features]
    parts = np.array(found.parts, np.int64)
    split = np.zeros(len(parts), np.uint8)
    for number, rows in enumerate(split_rows(None, parts, len(parts), seed)):
        split[rows] = number
    first = [" ".join(words) for words in found.first_words]
    numbers = {words: number for number, words in enumerate(dict.fromkeys(first))}
    return _assembled(
        [torch.from_numpy(clip[:size]) for clip, size in zip(found.features, sizes)],
        found.captions,
        [numbers[words] for words in first],
        split,
        found.names,
        num_joints=found.num_joints,
        rotations=found.rotations,
        skeleton=found.skeleton,
        fps=found.fps,
        references=found.captions,
        contact_step=None,
        max_words=max_words,
        vocabulary_size=vocabulary_size,
        composed=False,
        skipped=found.skipped,
        source=str(folder),
        normalizer=found.normalizer,
    )


def _assembled(
    features: list[Tensor],
    captions: Sequence[tuple[str, ...]],
    groups: list[int],
    split: np.ndarray,
    names: Sequence[str],
    *,
    max_words: int,
    vocabulary_size: int,
    skipped: Sequence[str],
    num_joints: int,
    rotations: bool,
    normalizer: FeatureNormalizer | None = None,
    **others: Any,
) -> TextMotion:
    train = np.flatnonzero(split == 0).tolist()
    if not len(train):
        left_out = f" ({skipped[0]})" if skipped else ""
        raise InputError(f"{others['source']} holds no clips to train with{left_out}")
    layout = feature_groups(num_joints, rotations=rotations)
    sentences = (sentence for index in train for sentence in captions[index])
    if normalizer is None:
        normalizer = FeatureNormalizer.of([features[index] for index in train], layout)
    return TextMotion(
        features=tuple(features),
        captions=tuple(captions),
        groups=torch.tensor(groups, dtype=torch.int64),
        split=split,
        names=tuple(names),
        num_joints=num_joints,
        rotations=rotations,
        vocabulary=WordVocabulary.of_texts(sentences, vocabulary_size, max_words),
        normalizer=normalizer,
        skipped=tuple(skipped),
        **others,
    )
