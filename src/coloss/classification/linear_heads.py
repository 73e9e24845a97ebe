"""Linear classifiers on frozen features, each as one `nn.Linear`; and how their errors fall with the number of labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.classification.gaussian_head import GaussianNBHead
from coloss.nn import linear_layer
from coloss.ops import RunningMoments, full_precision

HeadMethod = Literal["naive_bayes", "lda", "logistic", "ridge", "prototype"]
Scale = Literal["minmax", "standard", "none"]


def fit_linear_head(
    features: Float[Tensor, "samples features"],
    classes: Int[Tensor, " samples"],
    method: HeadMethod = "naive_bayes",
    *,
    num_classes: int | None = None,
    scale: Scale = "minmax",
    **options: Any,
) -> nn.Linear:
    """A linear head for a frozen encoder, by one of five rules, with the scaling of the features folded into its weights.

    - `naive_bayes`: `GaussianNBHead`; options as there.
    - `lda`: scikit-learn's linear discriminant analysis, with shrinkage chosen by the lemma of Ledoit and Wolf unless said otherwise.
    - `logistic`: scikit-learn's multinomial logistic regression; options such as `C`.
    - `ridge`: scikit-learn's ridge classifier, which regresses on +-1; options such as `alpha`.
    - `prototype`: the nearest class mean.

    Args:
        features: one row for each sample; finite.
        classes: class of each, in [0, num_classes).
        method: which rule.
        num_classes: outputs of the layer; default: the largest class + 1.
        scale: of each feature, by these samples: to [0, 1], to mean 0 and deviation 1, or as it is. A constant one is only shifted.
        options: of the rule.

    Returns:
        A float32 layer on the CPU for unscaled features. A class without samples has weights 0 and bias -inf, unless `naive_bayes` smooths
        its prior. New features beyond the range seen are extrapolated, not clipped.

    Raises:
        ValueError: for an unknown method or scale, features that are not finite or do not match, or fewer than two classes (except for
            `naive_bayes` and `prototype`).

    Examples:
        >>> features = torch.tensor([[0.0, 5.0], [1.0, 3.0], [9.0, 4.0], [10.0, 5.0]])
        >>> for method in ("naive_bayes", "lda", "logistic", "ridge", "prototype"):
        ...     head = fit_linear_head(features, torch.tensor([0, 0, 1, 1]), method)
        ...     print(head(torch.tensor([[2.0, 4.0], [8.0, 4.0]])).argmax(1).tolist())
        [0, 1]
        [0, 1]
        [0, 1]
        [0, 1]
        [0, 1]
    """
    if method not in ("naive_bayes", "lda", "logistic", "ridge", "prototype"):
        raise ValueError(
            f'method must be "naive_bayes", "lda", "logistic", "ridge" or "prototype", got {method!r}'
        )
    if features.ndim != 2 or classes.shape != features.shape[:1] or len(classes) == 0:
        raise ValueError(
            f"features must be (samples, features) and classes (samples), at least one; got {tuple(features.shape)} "
            f"and {tuple(classes.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity")
    classes = classes.detach().cpu()
    count = int(classes.max()) + 1 if num_classes is None else num_classes
    if int(classes.min()) < 0 or int(classes.max()) >= count:
        raise ValueError(f"classes must be in [0, {count}), got {int(classes.min())} to {int(classes.max())}")
    wide = full_precision(features.detach()).cpu().double()
    shift, factor = _scaling(wide, scale)
    scaled = (wide - shift) / factor
    if method == "naive_bayes":
        head = GaussianNBHead(scaled.shape[1], count, **options)
        head.update(scaled, classes)
        weight, bias = head.weights()
    elif method == "prototype":
        if options:
            raise ValueError(f"the nearest class mean has no options, got {', '.join(options)}")
        moments = RunningMoments.of(scaled, classes, count)
        weight = moments.mean
        bias = -0.5 * weight.square().sum(1).masked_fill(moments.count == 0, torch.inf)
    else:
        weight, bias = _by_scikit_learn(scaled, classes, method, count, options)
    weight = weight / factor
    return linear_layer(weight, bias - weight @ shift, torch.float32)


def _by_scikit_learn(
    features: Tensor, classes: Tensor, method: HeadMethod, count: int, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    # scikit-learn takes a second to import, which the other rules need not spend.
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression, RidgeClassifier

    present = classes.unique()
    if len(present) < 2:
        raise ValueError(f"classes must be two at least for {method!r}, got {len(present)}")
    estimator: Any
    if method == "lda":
        estimator = LinearDiscriminantAnalysis(**({"solver": "lsqr", "shrinkage": "auto"} | dict(options)))
    elif method == "logistic":
        estimator = LogisticRegression(**({"max_iter": 1000} | dict(options)))
    else:
        estimator = RidgeClassifier(**options)
    estimator.fit(features.numpy(), classes.numpy())
    rows = torch.from_numpy(np.atleast_2d(estimator.coef_))
    offsets = torch.from_numpy(np.atleast_1d(estimator.intercept_))
    if len(present) == 2:
        # One row for both classes: halves of it with opposite signs have the same difference.
        rows, offsets = torch.cat([-rows, rows]) / 2, torch.cat([-offsets, offsets]) / 2
    weight = torch.zeros(count, features.shape[1], dtype=torch.float64)
    bias = torch.full((count,), -torch.inf, dtype=torch.float64)
    weight[present], bias[present] = rows.double(), offsets.double()
    return weight, bias


def _scaling(features: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Shift and divisor of each feature; a constant one is divided by 1."""
    if scale == "none":
        return torch.zeros_like(features[0]), torch.ones_like(features[0])
    if scale == "minmax":
        low, high = features.aminmax(dim=0)
        shift, factor = low, high - low
    elif scale == "standard":
        shift, factor = features.mean(0), features.std(0, correction=0)
    else:
        raise ValueError(f'scale must be "minmax", "standard" or "none", got {scale!r}')
    # A constant feature has a deviation of rounding size.
    return shift, torch.where(factor > 1e-12 * features.abs().amax(0), factor, 1.0)


@dataclass(frozen=True)
class ProbeCurve:
    """Test errors of several linear heads by number of training labels.

    Attributes:
        sizes: numbers of labels, rising.
        errors: by method, error rates of shape (sizes, repeats).
    """

    sizes: tuple[int, ...]
    errors: Mapping[str, np.ndarray]

    def table(self) -> pd.DataFrame:
        """One row for each size and method: `size`, `method`, `error`, and `deviation` over the repeats."""
        rows = [
            (size, method, float(errors[row].mean()), float(errors[row].std()))
            for row, size in enumerate(self.sizes)
            for method, errors in self.errors.items()
        ]
        return pd.DataFrame(rows, columns=["size", "method", "error", "deviation"])

    def crossover(self, first: str, second: str) -> int | None:
        """Smallest size from which on the second method's mean error is the lower one at every size; None if it never is.

        Examples:
            >>> curve = ProbeCurve((10, 20), {"a": np.array([[0.2], [0.2]]), "b": np.array([[0.3], [0.1]])})
            >>> curve.crossover("a", "b"), curve.crossover("b", "a")
            (20, None)
        """
        lower = self._mean(second) < self._mean(first)
        above = np.flatnonzero(~lower)
        start = 0 if len(above) == 0 else int(above[-1]) + 1
        return self.sizes[start] if start < len(self.sizes) else None

    def size_within(self, method: str, error: float) -> int | None:
        """Smallest size from which on a method's mean error is at most `error`; None if it never is.

        Examples:
            >>> curve = ProbeCurve((10, 20), {"a": np.array([[0.2], [0.1]])})
            >>> curve.size_within("a", 0.1), curve.size_within("a", 0.05)
            (20, None)
        """
        above = np.flatnonzero(self._mean(method) > error)
        start = 0 if len(above) == 0 else int(above[-1]) + 1
        return self.sizes[start] if start < len(self.sizes) else None

    def excess(self, method: str) -> np.ndarray:
        """Mean error at each size beyond that at the largest: how far a method is from the error it tends to.

        Examples:
            >>> ProbeCurve((10, 20), {"a": np.array([[0.25], [0.125]])}).excess("a").tolist()
            [0.125, 0.0]
        """
        mean = self._mean(method)
        return mean - mean[-1]

    def _mean(self, method: str) -> np.ndarray:
        if method not in self.errors:
            raise ValueError(f"method must be one of {', '.join(self.errors)}, got {method!r}")
        return self.errors[method].mean(axis=1)


def probe_curve(
    features: Float[Tensor, "train features"],
    classes: Int[Tensor, " train"],
    test_features: Float[Tensor, "test features"],
    test_classes: Int[Tensor, " test"],
    sizes: Sequence[int],
    methods: Mapping[str, Mapping[str, Any]] | Sequence[HeadMethod] = ("naive_bayes", "logistic"),
    *,
    repeats: int = 5,
    seed: int = 0,
) -> ProbeCurve:
    """Test error of linear heads on random subsets of the labels; every method sees the same subsets.

    A subset holds a sample of every class, drawn first; the rest is drawn from all others alike. Scaling is measured on the subset
    alone.

    Args:
        features: training features.
        classes: their classes.
        test_features: features to be judged on; touched by nothing else.
        test_classes: their classes.
        sizes: numbers of labels, each at least the number of classes and at most the number of samples.
        methods: names for `fit_linear_head`; or name -> its arguments, where `method` may differ from the name.
        repeats: subsets of each size, >= 1.
        seed: of the subsets.

    Returns:
        Errors by size, method and repeat.

    Raises:
        ValueError: for a size or number of repeats out of range, or as `fit_linear_head`.

    Examples:
        >>> from sklearn.datasets import load_iris
        >>> rows, labels = (torch.from_numpy(part) for part in load_iris(return_X_y=True))
        >>> curve = probe_curve(rows[::2], labels[::2], rows[1::2], labels[1::2], sizes=[6, 60], repeats=3)
        >>> curve.table().columns.tolist(), bool(curve.excess("naive_bayes")[0] >= 0)
        (['size', 'method', 'error', 'deviation'], True)
    """
    chosen = {name: {"method": name} for name in methods} if not isinstance(methods, Mapping) else methods
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    if not chosen:
        raise ValueError("methods must be one at least, got none")
    count = int(classes.unique().numel())
    for size in sizes:
        if not count <= size <= len(classes):
            raise ValueError(f"sizes must be in [{count}, {len(classes)}], classes to samples; got {size}")
    if not sizes:
        raise ValueError("sizes must be one at least, got none")
    rising = tuple(sorted(set(sizes)))
    outputs = max(int(classes.max()), int(test_classes.max())) + 1
    errors = {name: np.zeros((len(rising), repeats)) for name in chosen}
    generator = torch.Generator().manual_seed(seed)
    test = full_precision(test_features)
    for row, size in enumerate(rising):
        for repeat in range(repeats):
            rows = _subset(classes, size, generator)
            for name, given in chosen.items():
                options: dict[str, Any] = {"method": name, "num_classes": outputs} | dict(given)
                head = fit_linear_head(features[rows], classes[rows], **options)
                with torch.no_grad():
                    wrong = head(test.to(head.weight)).argmax(1) != test_classes
                errors[name][row, repeat] = float(wrong.double().mean())
    return ProbeCurve(rising, errors)


def _subset(classes: Tensor, size: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(classes), generator=generator)
    shuffled = classes[order]
    first = [int((shuffled == number).nonzero()[0]) for number in classes.unique()]
    rest = torch.ones(len(order), dtype=torch.bool)
    rest[first] = False
    return torch.cat([order[first], order[rest][: size - len(first)]])
