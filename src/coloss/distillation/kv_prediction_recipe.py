"""From a text to a large language model whose prompts a small one reads, in one call: base, auxiliary model and maps, stage by stage."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from coloss.data import CharacterText, character_windows, load_characters
from coloss.data.characters import spaced_windows
from coloss.distillation.cache_predictor import kept_layers, pruned_copy
from coloss.distillation.kv_prediction import (
    KVPredictedLM,
    continuation_loss,
    first_token_logits,
    first_token_operations,
    kv_prediction_terms,
)
from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.nn import CausalLanguageModel, next_token_loss
from coloss.train import Budget, cosine, fit, load_model, save_model
from coloss.train.run_folder import claim_folder, read_run, source_name, write_metrics

AuxiliaryKind = Literal["pruned", "sibling"]

_LENGTH, _PROMPT, _CONTINUATION, _JUDGED = 128, 64, 16, 512
_SIZES: dict[str, Any] = {"dim": 128, "depth": 8, "heads": 4, "key_value_heads": 2, "context": 1024}
_STEPS = 4000
_OPTIMIZER = partial(torch.optim.AdamW, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
_STAGES: dict[str, dict[str, float]] = {
    "pruned": {"base": 0.6, "prediction": 0.4},
    "sibling": {"base": 0.5, "sibling": 0.15, "prediction": 0.35},
}


def train_kv_prediction(
    data: str | Path = "tiny-shakespeare",
    folder: str | Path = "runs/kv-prediction",
    *,
    auxiliary: AuxiliaryKind = "pruned",
    share: float = 0.25,
    sizes: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains a character language model, and a small one that fills its cache; this is behind `coloss run kv-prediction`.

    First the base by itself; for `"sibling"` then a model of its width with fewer layers; then the auxiliary model and the maps together,
    with the base frozen. A run that was stopped goes on in its folder, in the stage where it was.

    Args:
        data: name of a running text of `coloss.data`, or path of a text file (`.txt`, `.txt.gz`).
        folder: for `model.safetensors`, `run.json`, `metrics.json` and checkpoints; `load_kv_prediction` reads it.
        auxiliary: `"pruned"` begins with some of the base's layers, `"sibling"` with a small model trained by itself.
        share: of the base's layers that the auxiliary model has, in (0, 1].
        sizes: of the base, arguments of `CausalLanguageModel` that replace the recipe's own: 8 layers of width 128, 4 heads, 2 of keys
            and values.
        budget: of all stages together; default: 4,000 steps.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        On the text's last stretch, of 16 characters after a prompt of 64, nats per character as deployed: `base_loss`,
        `predicted_loss` (base with predicted cache), `auxiliary_loss` (the auxiliary model alone) and `no_prompt_loss` (base after the
        prompt's last character only; where it is hardly above `base_loss`, the losses say nothing about prompts); `first_token_mflop_*`
        and `first_token_ms_*` (median of 5, one prompt of 512 characters) of base, predicted and auxiliary.

    Raises:
        InputError: for an unknown kind, sizes or a share out of range, a text that cannot be read or is too short, or a folder that holds
            another run.

    Examples:
        >>> import tempfile
        >>> metrics = train_kv_prediction(
        ...     "tiny-shakespeare",
        ...     tempfile.mkdtemp(),
        ...     sizes={"dim": 16, "depth": 2},
        ...     share=0.5,
        ...     budget=Budget(steps=4),
        ... )  # doctest: +SKIP
        >>> metrics["first_token_mflop_predicted"] < metrics["first_token_mflop_base"]  # doctest: +SKIP
        True
    """
    if auxiliary not in get_args(AuxiliaryKind):
        raise InputError(f'auxiliary must be "pruned" or "sibling", got {auxiliary!r}')
    text, folder = load_characters(str(data)), Path(folder)
    if len(text.train) <= _LENGTH or len(text.test) <= _PROMPT + _CONTINUATION:
        raise InputError(
            f"data must be a text of some thousand characters, got {len(text.train)} to train and {len(text.test)} to test on"
        )
    run: dict[str, Any] = {
        "data": source_name(str(data)),
        "seed": seed,
        "auxiliary": auxiliary,
        "share": share,
        "sizes": _SIZES | dict(sizes or {}),
        "characters": text.characters,
        "budget": (budget or Budget(steps=_STEPS)).as_dict(),
    }
    base = _new_base(run)
    _kept(base, run)
    if base.positions is not None and base.context < _LENGTH:
        raise InputError(
            f"sizes must have a context of at least {_LENGTH} characters with learned positions, got {base.context}"
        )
    claim_folder(folder, run)
    windows = character_windows(text.train, _LENGTH, stride=_LENGTH // 2)
    stages, done = _STAGES[auxiliary], 0.0

    def train(stage: str, model: nn.Module, objective: Callable[..., Any]) -> None:
        nonlocal done
        start, part = done, stages[stage]
        done += part
        fit(
            model,
            windows,
            objective,
            budget=Budget(**run["budget"]).part(part),
            batch_size=32,
            optimizer=_OPTIMIZER,
            learning_rate_schedule=cosine(warmup=0.05),
            clip_norm=1.0,
            checkpoint_dir=folder / "checkpoints" / stage,
            checkpoint_every=100,
            resume=True,
            progress=None if progress is None else lambda share, terms: progress(start + part * share),
            seed=seed,
        )

    train("base", base, next_token_loss)
    small = _new_auxiliary(base.cpu(), run)
    if auxiliary == "sibling":
        train("sibling", small, next_token_loss)
    model = _assembled(base.cpu(), small.cpu(), run)
    train("prediction", model, kv_prediction_terms)
    save_model(model, folder / "model.safetensors")
    metrics = _judge(load_kv_prediction(folder)[0], text)
    write_metrics(folder, metrics)
    return metrics


def load_kv_prediction(folder: str | Path) -> tuple[KVPredictedLM, CharacterText]:
    """The model that `train_kv_prediction` stored, in evaluation mode, and the characters it knows (with empty stretches of text).

    Args:
        folder: of the run.

    Raises:
        InputError: if there is no such run, or it is damaged.

    Examples:
        >>> model, text = load_kv_prediction("runs/kv-prediction-tiny-shakespeare")  # doctest: +SKIP
        >>> text.decode(model.generate(text.encode("ROMEO: ")[None], 20)[0])  # doctest: +SKIP
        'I will be the streng'
    """
    folder = Path(folder)
    run = read_run(folder)
    try:
        base = _new_base(run)
        model = _assembled(base, _new_auxiliary(base, run), run)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no KV prediction ({error!r} in run.json)") from error
    load_model(model, folder / "model.safetensors")
    nothing = torch.zeros(0, dtype=torch.int64)
    return model.eval(), CharacterText(run["characters"], nothing, nothing, nothing)


def _new_base(run: Mapping[str, Any]) -> CausalLanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        try:
            return CausalLanguageModel(len(run["characters"]), **run["sizes"])
        except (TypeError, ValueError) as error:
            raise InputError(f"sizes must be those of a CausalLanguageModel: {error}") from error


def _kept(base: CausalLanguageModel, run: Mapping[str, Any]) -> list[int]:
    try:
        return kept_layers(base.depth, run["share"])
    except ValueError as error:
        raise InputError(str(error)) from error


def _new_auxiliary(base: CausalLanguageModel, run: Mapping[str, Any]) -> CausalLanguageModel:
    keep = _kept(base, run)
    if run["auxiliary"] == "pruned":
        return pruned_copy(base, keep)
    return _new_base({**run, "sizes": run["sizes"] | {"depth": len(keep)}})


def _assembled(
    base: CausalLanguageModel, small: CausalLanguageModel, run: Mapping[str, Any]
) -> KVPredictedLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"] + 1)
        return KVPredictedLM(base, small)


def _judge(model: KVPredictedLM, text: CharacterText) -> dict[str, float]:
    ids = spaced_windows(text.test, _PROMPT + _CONTINUATION, _JUDGED)
    metrics = {
        "base_loss": continuation_loss(model.base, ids, _PROMPT).mean().item(),
        "predicted_loss": continuation_loss(model, ids, _PROMPT).mean().item(),
        "auxiliary_loss": continuation_loss(model.auxiliary, ids, _PROMPT).mean().item(),
        "no_prompt_loss": continuation_loss(model.base, ids[:, _PROMPT - 1 :], 1).mean().item(),
    }
    prompt = torch.zeros(1, min(512, model.base.context, model.auxiliary.context), dtype=torch.int64)
    for name, part in (("base", model.base), ("predicted", model), ("auxiliary", model.auxiliary)):
        metrics[f"first_token_mflop_{name}"] = first_token_operations(part, prompt.shape[1]) / 1e6
        metrics[f"first_token_ms_{name}"] = first_token_milliseconds(part, prompt)
    return metrics


def first_token_milliseconds(
    model: CausalLanguageModel | KVPredictedLM, prompt: Tensor, repeats: int = 5
) -> float:
    """Median wall time from a prompt to the logits of the token after it, after one pass that does not count.

    The model runs in evaluation mode and has its own mode back afterwards; on a GPU the clock waits for it.

    Args:
        model: to be timed, on the prompt's device.
        prompt: int64 (batch, tokens).
        repeats: passes that count, >= 1.

    Raises:
        ValueError: for `repeats` < 1.

    Examples:
        >>> first_token_milliseconds(
        ...     CausalLanguageModel(10, 8, 1, heads=2), torch.zeros(1, 5, dtype=torch.int64)
        ... ) > 0
        True
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    taken = []
    with evaluation_mode(model):
        for _ in range(repeats + 1):
            start = _now(prompt.device)
            first_token_logits(model, prompt)
            taken.append(_now(prompt.device) - start)
    return sorted(taken[1:])[repeats // 2] * 1000


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
