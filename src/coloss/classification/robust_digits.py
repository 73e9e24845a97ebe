"""Digits with wrong training labels, and digits under attack: on which one compares objectives that should stand either.

A perceptron (64-128-10) learns 1,076 images by SGD with momentum. With wrong labels, each arm takes the learning rate that is best on
validation data, whose labels are as wrong as those it learns from; the test labels are clean. Attacks move every pixel, in [0, 1],
by at most 0.1.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.classification.adversarial import projected_gradient_attack, robust_accuracy
from coloss.data import IndexedDataset, Splits, load, with_label_noise
from coloss.metrics import evaluate_classifier, evaluation_mode
from coloss.nn import MLP
from coloss.ops import distillation_kl_loss
from coloss.train import Budget, Fit, Method, Setting, State, fit

LEARNING_RATES = (0.005, 0.02, 0.08)
NOISE = 0.4
RADIUS = 0.1

EPOCH = 17
"""Steps in which every training image is seen once."""

Arms = Mapping[str, Callable[[], Sequence[Method]]]
"""Name -> fresh methods; none for plain cross-entropy."""


class TradesRegularizer(Method):
    """The rival in robustness: KL from the predictions for clean inputs to those for attacked ones (TRADES), as term `kl_under_attack`.

    Source: Zhang et al., 2019, arXiv 1901.08573.

    Examples:
        >>> TradesRegularizer(3.0).term_weights
        {'kl_under_attack': 3.0}
    """

    def __init__(self, weight: float, eps: float = RADIUS, steps: int = 5) -> None:
        super().__init__()
        self.attack = partial(projected_gradient_attack, eps=eps, steps=steps)
        self.term_weights = {"kl_under_attack": weight}

    def terms(self, state: State) -> dict[str, Tensor]:
        inputs = state.batch.inputs
        with evaluation_mode(state.model):
            reference = state.model(inputs)
        changed = self.attack(
            state.model,
            inputs,
            lambda outputs: distillation_kl_loss(outputs, reference, temperature=1.0),
            generator=state.local_generator,
        )
        return {"kl_under_attack": distillation_kl_loss(state.model(changed), state.outputs, temperature=1.0)}


def compare_under_noise(setting: Setting, arms: Arms) -> dict[str, dict[str, float]]:
    """Test accuracy of every arm after learning 40% wrong labels, and after learning right ones.

    Adds "cross-entropy, stopped early": the epoch of the run of the arm "cross-entropy" with the best validation accuracy, over all
    learning rates.

    Args:
        setting: its seed draws split, noise and initial weights.
        arms: among them "cross-entropy".

    Returns:
        Arm -> `accuracy` (wrong training labels, best learning rate), `learning_rate`, `accuracy_right_labels` (at 0.02).
    """
    splits = _digits(setting.seed)
    generator = torch.Generator().manual_seed(setting.seed)
    noisy = with_label_noise(splits, NOISE, generator=generator)
    budget = Budget(steps=3) if setting.smoke else Budget(epochs=40)
    rates = LEARNING_RATES[:1] if setting.smoke else LEARNING_RATES
    found: dict[str, dict[str, float]] = {}
    for name, methods in arms.items():
        every = EPOCH if name == "cross-entropy" else None
        runs = [_train(noisy, methods(), rate, budget, setting.seed, every) for rate in rates]
        ends = [run.metrics for run in runs]
        best = max(range(len(runs)), key=lambda run: ends[run]["validation"])
        clean = _train(splits, methods(), 0.02, budget, setting.seed)
        found[name] = {
            "accuracy": ends[best]["test"],
            "learning_rate": rates[best],
            "accuracy_right_labels": clean.metrics["test"],
        }
        if name == "cross-entropy":
            moments = [point.metrics for run in runs for point in run.history if point.metrics]
            stopped = max(moments, key=lambda metrics: metrics["validation"])
            found["cross-entropy, stopped early"] = {"accuracy": stopped["test"]}
    return found


def compare_under_attack(setting: Setting, arms: Arms) -> dict[str, dict[str, float]]:
    """Accuracy of every arm on right labels, on test images as they are and under attack (20 steps).

    Returns:
        Arm -> `accuracy_unattacked` and `accuracy_attacked`.
    """
    splits = _digits(setting.seed)
    budget = Budget(steps=3) if setting.smoke else Budget(epochs=15)
    test = splits.test.all()
    attack = partial(projected_gradient_attack, eps=RADIUS, steps=20, bounds=(0.0, 1.0))
    found = {}
    for name, methods in arms.items():
        model = _train(splits, methods(), 0.02, budget, setting.seed).model
        found[name] = {
            "accuracy_unattacked": evaluate_classifier(model, splits.test)["accuracy"],
            "accuracy_attacked": float(robust_accuracy(model, test.inputs, test.targets, attack)),
        }
    return found


def _digits(seed: int) -> Splits:
    splits = load("digits", seed=seed)
    assert isinstance(splits, Splits)
    return splits


def _train(
    splits: Splits,
    methods: Sequence[Method],
    rate: float,
    budget: Budget,
    seed: int,
    evaluate_every: int | None = None,
) -> Fit:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = MLP(64, (128,), 10, norm=None)

    def accuracy(model: nn.Module, part: IndexedDataset) -> float:
        return evaluate_classifier(model, part)["accuracy"]

    return fit(
        model,
        splits.train,
        F.cross_entropy,
        methods,
        budget=budget,
        batch_size=64,
        optimizer=partial(torch.optim.SGD, lr=rate, momentum=0.9),
        evaluate=lambda model: {
            "validation": accuracy(model, splits.validation),
            "test": accuracy(model, splits.test),
        },
        evaluate_every=evaluate_every or 10**6,
        log_every=1000,
        seed=seed,
    )
