"""How the claim of sharpness-aware training for free is measured: the data, the costly rival, and the tuning of every arm.

Sharpness-aware minimisation is here as a baseline alone; for training with it take a library that keeps it, such as `pytorch_optimizer`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.classification.loss_sharpness import sharpness
from coloss.data import IndexedDataset, Splits, load
from coloss.metrics import evaluate_classifier
from coloss.train.method import Method
from coloss.train.outcome import Fit
from coloss.train.state import State
from coloss.train.task import Setting


class SharpnessAwareMinimization(Method):
    """SAM (Foret et al. 2021, arXiv 2010.01412), the costly rival: the gradient at the weights after a step of `rho` uphill."""

    def __init__(self, rho: float = 0.05) -> None:
        super().__init__()
        self.rho = rho

    def backward(self, state: State, terms: dict[str, Tensor]) -> None:
        gradients = state.gradients(state.combine(state, terms))
        pairs = [(p, g) for p, g in zip(state.trainable, gradients, strict=True) if g is not None]
        norm = torch.stack([g.norm() for _, g in pairs]).norm().clamp(min=1e-12)
        kept = [p.detach().clone() for p, _ in pairs]
        with torch.no_grad():
            for parameter, gradient in pairs:
                parameter.add_(gradient, alpha=float(self.rho / norm))
        loss = state.objective(state.model(state.batch.inputs), state.batch.targets)
        state.set_gradients(state.gradients(loss))
        with torch.no_grad():
            for (parameter, _), value in zip(pairs, kept, strict=True):
                parameter.copy_(value)


RATES = (0.05, 0.1, 0.2, 0.4)
WATCHED_RATE, MATCHED_LOSS = 0.1, 0.1


def few_digits(seed: int) -> Splits:
    """540 training images; what that leaves of the training part joins the test part."""
    splits = load("digits", seed=seed)
    assert isinstance(splits, Splits)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))
    test, spare = splits.test.all(), splits.train.subset(order[540:]).all()
    joined = IndexedDataset(torch.cat([test.inputs, spare.inputs]), torch.cat([test.targets, spare.targets]))
    return replace(splits, train=splits.train.subset(order[:540]), test=joined)


def _watch(model: nn.Module, splits: Splits) -> dict[str, float]:
    """Training loss and sharpness."""
    train = splits.train.all()
    found = sharpness(model, F.cross_entropy, (train.inputs, train.targets))
    return {
        "train_loss": found.loss,
        "sharpness_gap": found.gap,
        "relative_curvature": found.relative_curvature,
    }


def _at_matched_loss(run: Fit) -> dict[str, float]:
    """Sharpness where the training loss first fell to the same value in every arm."""
    points = [point.metrics for point in run.history if "train_loss" in point.metrics]
    for before, after in zip(points, points[1:]):
        if before["train_loss"] >= MATCHED_LOSS > after["train_loss"]:
            share = (before["train_loss"] - MATCHED_LOSS) / (before["train_loss"] - after["train_loss"])
            return {
                f"{name}_at_equal_loss": before[name] + share * (after[name] - before[name])
                for name in ("sharpness_gap", "relative_curvature")
            }
    return {}


def measure_arms(
    setting: Setting, arms: Mapping[str, Callable[[], Sequence[Method]]]
) -> dict[str, dict[str, float]]:
    """Every arm at every learning rate; validation accuracy chooses the rate, for each arm by itself."""
    splits, found = setting.splits, {}
    for name, methods in arms.items():
        runs, at_equal_loss = {}, {}
        for rate in RATES:
            watched = rate == WATCHED_RATE and not setting.smoke
            runs[rate] = setting.fit(
                setting.new_model(),
                methods=methods(),
                optimizer=partial(torch.optim.SGD, lr=rate, momentum=0.9),
                evaluate=(lambda model: _watch(model, splits)) if watched else None,
                evaluate_every=27,
            )
            if watched:
                at_equal_loss = _at_matched_loss(runs[rate])
        judged = {rate: evaluate_classifier(run.model, splits.validation) for rate, run in runs.items()}
        best = max(RATES, key=lambda rate: (judged[rate]["accuracy"], -judged[rate]["nll"]))
        run = runs[best]
        found[name] = (
            evaluate_classifier(run.model, splits.test)
            | {
                f"accuracy_at_rate_{rate}": evaluate_classifier(runs[rate].model, splits.test)["accuracy"]
                for rate in RATES
            }
            | {"learning_rate": best, "milliseconds_per_step": 1000 * run.seconds / run.steps}
            | {f"final_{key}": value for key, value in _watch(run.model, splits).items()}
            | at_equal_loss
        )
    return found
