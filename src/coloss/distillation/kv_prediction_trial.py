"""What is measured of KV prediction: what follows a prompt of Shakespeare, told by a base with predicted cache and by the small model alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coloss.data import character_windows, load_characters
from coloss.distillation.cache_predictor import pruned_copy
from coloss.distillation.kv_prediction import (
    KVPredictedLM,
    continuation_loss,
    first_token_operations,
    kv_prediction_terms,
)
from coloss.distillation.kv_prediction_recipe import spaced_windows
from coloss.nn import CausalLanguageModel, next_token_loss
from coloss.train import Budget, Setting, cosine, fit

LENGTH, PROMPT, CONTINUATION = 64, 48, 4
"""Characters of a training window, and of a test prompt and what follows it."""

SHORT_PROMPT = 44
"""What is left of the prompt for the predicted cache, so that it takes no more operations than the small model alone."""

BASE_STEPS, STEPS = 700, 120
STEPS_ALONE = 3 * STEPS
"""A step of KV prediction takes 1,896 million operations, one of the small model alone 655 million: 2.9 times as many."""

BASE_RATE, RATE, RATE_ALONE = 8e-3, 1.6e-2, 8e-3
KEPT = (0, 2)


def predicted_cache_against_alone(setting: Setting) -> dict[str, dict[str, float]]:
    """Losses in nats per character and operations to the first token of every arm, all of them made from one trained base.

    The small model is the base's layers 0 and 2, trained on with predictor and base ("kv prediction") or by itself ("pruned model
    alone"): for as many operations of training, which are three times as many steps, with the same optimizer; as many steps on the same batches
    are an arm beside it.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    text, seed = load_characters(), setting.seed
    steps = [2, 2, 2] if setting.smoke else [BASE_STEPS, STEPS, STEPS_ALONE]
    ids = spaced_windows(text.test, PROMPT + CONTINUATION, 8 if setting.smoke else 1024)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = CausalLanguageModel(len(text.characters), 64, 4, 4, key_value_heads=1, context=LENGTH)
        train = partial(_trained, text.train, seed=seed)
        train(base, next_token_loss, steps[0], BASE_RATE)
        alone = train(pruned_copy(base, KEPT), next_token_loss, steps[2], RATE_ALONE)
        alone_as_many = train(pruned_copy(base, KEPT), next_token_loss, steps[1], RATE_ALONE)
        model = train(KVPredictedLM(base, pruned_copy(base, KEPT)), kv_prediction_terms, steps[1], RATE)
    short = ids[:, PROMPT - SHORT_PROMPT :]
    return {
        "kv prediction": _judged(model, short, SHORT_PROMPT),
        "pruned model alone": _judged(alone, ids, PROMPT),
        "pruned model alone, as many steps": _judged(alone_as_many, ids, PROMPT),
        "kv prediction, whole prompt": _judged(model, ids, PROMPT),
        "base": _judged(base, ids, PROMPT),
        "base without prompt": _judged(base, ids[:, PROMPT - 1 :], 1),
    }


def _trained(
    text: Tensor, model: nn.Module, objective: Callable[..., Any], steps: int, rate: float, *, seed: int
) -> Any:
    windows = character_windows(text, LENGTH, stride=LENGTH // 2)
    return fit(
        model,
        windows,
        objective,
        budget=Budget(steps=steps),
        batch_size=16,
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        seed=seed,
    ).model


def _judged(model: Any, ids: Tensor, prompt: int) -> dict[str, float]:
    device = next(model.parameters()).device
    return {
        "loss": continuation_loss(model.eval(), ids.to(device), prompt).mean().item(),
        "first_token_mflop": first_token_operations(model, prompt) / 1e6,
    }
