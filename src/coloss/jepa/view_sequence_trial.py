"""What single views of turned digits tell about the turn, with and without actions in training: the trial behind a claim."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coloss.jepa.equivariance import evaluate_equivariance, evaluate_invariance
from coloss.jepa.known_transforms import Rotations
from coloss.jepa.sequence_aggregator import ActionConditionedAggregator, SequenceEncoder
from coloss.nn import MLP
from coloss.train import Budget, Setting, Task
from coloss.train.encoder_task import digits_encoder_task

FEATURES, VIEWS = 16, 3
# Without the limit a digit 6 becomes a 9.
TURNS = Rotations(60)


def turned_digits_task(budget: Budget) -> Task:
    """1,200 digits to train on and 597 to test; an encoder 64-256-256-16, so that it cannot keep every pixel.

    Args:
        budget: of each arm.

    Examples:
        >>> turned_digits_task(Budget(steps=1)).budget.steps
        1
    """
    base = digits_encoder_task(budget)
    return Task(
        name="digits-turned-ssl",
        kind=base.kind,
        title="an encoder for turned digits, judged by what it keeps of the turn and of the class",
        load=base.load,
        model=lambda splits: MLP(64, (256, 256), FEATURES),
        objective=None,
        objective_name="untrained",
        validate=base.validate,
        test=base.test,
        metric="action_r2",
        budget=budget,
        batch_size=64,
        evaluate_every=base.evaluate_every,
    )


def compare_halves(
    setting: Setting, arms: Mapping[str, tuple[Callable[[], Any], float]]
) -> dict[str, dict[str, float]]:
    """Train each arm on the same views and steps; measure both halves of each on test images.

    Args:
        setting: on `turned_digits_task`.
        arms: name -> what builds a fresh `SeqJEPA`, and its learning rate.

    Returns:
        For each arm, the untrained encoder and raw pixels what `evaluate_equivariance` and `evaluate_invariance` give; for the trained ones
        also `loss` and `target_std` at the end.
    """
    found = {}
    for name, (new_method, learning_rate) in arms.items():
        method = new_method()
        run = setting.fit(
            setting.new_model(),
            methods=[method],
            optimizer=partial(torch.optim.AdamW, lr=learning_rate),
        )
        found[name] = _measured(setting, method.sequence_encoder) | {
            "loss": run.history[-1].terms["next_view"],
            "target_std": run.history[-1].metrics.get("target_std", math.nan),
        }
    mean = ActionConditionedAggregator(FEATURES, 0, depth=0)
    found["untrained"] = _measured(setting, SequenceEncoder(setting.new_model().eval(), mean))
    found["raw pixels"] = _measured(setting, SequenceEncoder(nn.Flatten(), mean))
    return found


def _measured(setting: Setting, both: SequenceEncoder) -> dict[str, float]:
    train, test = (_whole(part, setting.smoke) for part in (setting.splits.train, setting.splits.test))
    turns = evaluate_equivariance(
        both,
        TURNS,
        train[0],
        test[0],
        pairs=1 if setting.smoke else 2,
        hidden=(128, 128),
        epochs=1 if setting.smoke else 60,
        seed=setting.seed,
    )
    return turns | evaluate_invariance(both, TURNS, train, test, views=VIEWS, seed=setting.seed)


def _whole(data: Any, smoke: bool) -> tuple[Tensor, Tensor]:
    batch = data.all()
    return (batch.inputs[:80], batch.targets[:80]) if smoke else (batch.inputs, batch.targets)
