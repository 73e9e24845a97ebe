"""Two real problems with rare positives, for which one trains linear classifiers on one loss or another and compares decisions.

The digit 8 against the other nine (10% of the images), and malignant against benign tumours of which so many are left out that
there is one to twenty benign ones. Training data only are thinned; the classifier is judged on all data it was not trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.model_selection import TunedThresholdClassifierCV
from torch import Tensor, nn

from coloss.data import Splits, load, with_imbalance
from coloss.train import Budget, Method, Objective, fit

PROBLEMS = ("digits", "breast-cancer")

RARE = {"digits": 8, "breast-cancer": 0}
"""Which class is the positive one: the digit 8, malignant."""


class LinearClassifier(ClassifierMixin, BaseEstimator):
    """Logistic regression on any loss, all data at each step and from zero weights, as a scikit-learn estimator.

    Args:
        objective: (logits (batch,), 0 / 1 targets) -> scalar; None if a method supplies it.
        methods: makes fresh methods.
        steps: of gradient descent, with learning rate 0.2.

    Examples:
        >>> inputs = np.array([[-1.0], [1.0]], dtype=np.float32)
        >>> LinearClassifier(cross_entropy, steps=5).fit(inputs, np.array([0, 1])).predict(inputs)
        array([0, 1])
    """

    def __init__(
        self,
        objective: Objective | None = None,
        methods: Callable[[], Sequence[Method]] = list,
        steps: int = 500,
    ) -> None:
        self.objective, self.methods, self.steps = objective, methods, steps

    def fit(self, inputs: NDArray, targets: NDArray) -> "LinearClassifier":
        """Train it."""
        self.classes_ = np.unique(targets)
        data = torch.as_tensor(inputs), torch.as_tensor(targets)
        self.model_ = nn.Sequential(nn.Linear(inputs.shape[1], 1), nn.Flatten(0))
        for parameter in self.model_.parameters():
            nn.init.zeros_(parameter)
        fit(
            self.model_,
            data,
            self.objective,
            self.methods(),
            budget=Budget(steps=self.steps),
            batch_size=len(targets),
            optimizer=partial(torch.optim.SGD, lr=0.2),
            log_every=self.steps,
        )
        return self

    @torch.no_grad()
    def predict_proba(self, inputs: NDArray) -> NDArray:
        """Probabilities (samples, 2)."""
        positive = torch.sigmoid(self.model_(torch.as_tensor(inputs)))
        return torch.stack([1 - positive, positive], dim=1).numpy()

    def predict(self, inputs: NDArray) -> NDArray:
        """Classes, by a threshold of 1/2."""
        return self.classes_[(self.predict_proba(inputs)[:, 1] > 0.5).astype(int)]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits against class numbers 0 and 1."""
    return nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def weighted_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same, positives and negatives together weighing as much."""
    applies = targets.to(logits.dtype)
    weight = (1 - applies).sum() / applies.sum()
    return nn.functional.binary_cross_entropy_with_logits(logits, applies, pos_weight=weight)


def rare_positives(name: str, seed: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Training inputs and 0 / 1 targets, and those of all other data, standardised by the training part.

    Examples:
        >>> inputs, targets, _, test_targets = rare_positives("digits", seed=0)
        >>> inputs.shape, int(targets.sum()), int(test_targets.sum())
        ((1076, 64), 104, 70)
    """
    splits = load(name, seed=seed)
    assert isinstance(splits, Splits)
    if name == "breast-cancer":
        generator = torch.Generator().manual_seed(seed)
        splits = with_imbalance(splits, 0.05, parts=["train"], generator=generator)
    batches = [part.all() for part in (splits.train, splits.validation, splits.test)]
    inputs = [batch.inputs.flatten(1).numpy() for batch in batches]
    targets = [(batch.targets == RARE[name]).long().numpy() for batch in batches]
    mean, scale = inputs[0].mean(0), inputs[0].std(0)
    train, *rest = ((part - mean) / np.where(scale > 0, scale, 1) for part in inputs)
    return train, targets[0], np.concatenate(rest), np.concatenate(targets[1:])


def compare_decisions(
    seed: int,
    objectives: Mapping[str, Objective],
    methods: Mapping[str, Callable[[], Sequence[Method]]],
    steps: int = 500,
    folds: int = 5,
) -> dict[str, dict[str, float]]:
    """Scores of the decisions on both problems, and their means, for classifiers trained on each objective or method.

    Adds the arm "cross-entropy, tuned threshold": in place of 1/2 the threshold with the highest balanced accuracy in
    cross-validation on the training data, by scikit-learn's `TunedThresholdClassifierCV`.
    """
    arms: dict[str, LinearClassifier | TunedThresholdClassifierCV] = {
        **{name: LinearClassifier(objective, steps=steps) for name, objective in objectives.items()},
        **{name: LinearClassifier(None, make, steps) for name, make in methods.items()},
        "cross-entropy, tuned threshold": TunedThresholdClassifierCV(
            LinearClassifier(cross_entropy, steps=steps), cv=folds
        ),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in arms}
    for problem in PROBLEMS:
        train, train_targets, test, test_targets = rare_positives(problem, seed)
        for name, classifier in arms.items():
            decisions = classifier.fit(train, train_targets).predict(test)
            found[name][f"balanced_accuracy_{problem}"] = balanced_accuracy_score(test_targets, decisions)
            found[name][f"f1_{problem}"] = f1_score(test_targets, decisions, zero_division=0.0)
    for scores in found.values():
        for metric in ("balanced_accuracy", "f1"):
            scores[metric] = sum(scores[f"{metric}_{problem}"] for problem in PROBLEMS) / len(PROBLEMS)
    return found
