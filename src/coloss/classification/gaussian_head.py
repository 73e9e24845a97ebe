r"""A linear classifier from counts, means and variances alone: one pass over the features, no gradient.

Naive Bayes with Gaussian features of one variance for all classes. With N_k samples of class k, means mu_kj, the variance v_j of
feature j around the means of its classes, and pi_k = N_k / N:

    s_k(x) = log pi_k - 1/2 sum_j (x_j - mu_kj)^2 / v_j
    logits = W x + b        W_kj = (mu_kj - c_j) / v_j        b_k = log pi_k - 1/2 sum_j (mu_kj - c_j) (mu_kj + c_j) / v_j

The logits differ from s_k by what all classes share; so softmax(W x + b) is the model's posterior. c is the mean of all samples, taken
off so that large means do not cancel.

Zheng et al. 2023, arXiv 2302.02334.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data import IndexedDataset, Loader
from coloss.data.batch import Batch
from coloss.metrics import evaluation_mode
from coloss.nn import Taps, linear_layer
from coloss.ops import RunningMoments, accumulation_dtype

Prior = Literal["empirical", "uniform"]


class GaussianNBHead(nn.Module):
    """Classifier head that learns by counting: update it with batches, merge it with others, export it as a linear layer.

    Its state is in buffers (counts, means and squared deviations of each class, in float64), so it is stored with a model and any
    cut of the data into batches gives the same head. It has no parameters to train; `to_linear` has.

    Args:
        num_features: of a sample, >= 1.
        num_classes: >= 1.
        smoothing: >= 0; the mean variance of all features, times this, is added to each variance. Features that happen to be constant
            in a small sample would otherwise decide alone.
        shrinkage: in [0, 1]; share of the mean variance in each feature's own. 1 gives all features one variance.
        prior: "empirical" takes the classes' shares, "uniform" none.
        prior_smoothing: >= 0; samples that each class is taken to have beyond its own. With 0 a class without samples is impossible
            (logit -inf); otherwise it lies at the mean of all.
        unbiased: divide by samples minus classes, in place of samples: right where a class has few samples.

    Attributes:
        count, mean, squares: see `coloss.ops.RunningMoments`.

    Returns:
        From `forward`: logits (batch, num_classes), at least float32. Sure of themselves far beyond truth where features depend on each
        other: report no likelihood without fitting a temperature.

    Raises:
        ValueError: for a value out of range.

    Cost:
        O(samples * features) in all, memory O(classes * features).

    Source:
        Zheng et al. 2023, arXiv 2302.02334, section 4.

    Examples:
        >>> head = GaussianNBHead(num_features=2, num_classes=2)
        >>> head.update(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([0, 0]))
        >>> head.update(torch.tensor([[4.0, 0.0], [5.0, 2.0]]), torch.tensor([1, 1]))
        >>> head(torch.tensor([[1.0, 5.0], [4.0, 5.0]])).argmax(1)
        tensor([0, 1])
        >>> head.to_linear()
        Linear(in_features=2, out_features=2, bias=True)
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        smoothing: float = 0.1,
        shrinkage: float = 0.0,
        prior: Prior = "empirical",
        prior_smoothing: float = 0.0,
        unbiased: bool = True,
    ) -> None:
        super().__init__()
        check_gaussian_options(smoothing, shrinkage, prior, prior_smoothing)
        empty = RunningMoments.empty(num_classes, num_features)
        for name in ("count", "mean", "squares"):
            self.register_buffer(name, getattr(empty, name))
        self.smoothing, self.shrinkage, self.unbiased = smoothing, shrinkage, unbiased
        self.prior, self.prior_smoothing = prior, prior_smoothing

    @property
    def moments(self) -> RunningMoments:
        """What it has seen."""
        return RunningMoments(self.count, self.mean, self.squares)

    def update(self, features: Float[Tensor, "samples features"], classes: Int[Tensor, " samples"]) -> None:
        """Learn from a batch.

        Raises:
            ValueError: for a class out of range, or rows that do not match.
        """
        self._take(self.moments.update(features.to(self.mean.device), classes.to(self.mean.device)))

    def merge(self, other: "GaussianNBHead | RunningMoments") -> None:
        """Learn what another head has seen.

        Raises:
            ValueError: if the two differ in classes or features.
        """
        self._take(self.moments.merge(other.moments if isinstance(other, GaussianNBHead) else other))

    def all_reduce(self) -> None:
        """Learn what the heads of all processes have seen; each has the same state afterwards."""
        self._take(self.moments.all_reduce())

    def feature_variance(self) -> Float[Tensor, " features"]:
        """v: the pooled variance after shrinkage and smoothing; ones where no feature varies within a class.

        Raises:
            ValueError: if no sample was seen.
        """
        pooled = self.moments.pooled_variance(self.unbiased)
        mean = pooled.mean()
        if not bool(mean > 0):
            return torch.ones_like(pooled)
        found = (1 - self.shrinkage) * pooled + (self.shrinkage + self.smoothing) * mean
        # Without smoothing a constant feature gets the least variance that still gives finite weights.
        return found.clamp(min=1e-12 * float(mean))

    def log_prior(self) -> Float[Tensor, " classes"]:
        """log pi; -inf for a class that cannot be."""
        share = self.count + self.prior_smoothing
        if self.prior == "uniform":
            share = (share > 0).to(self.mean.dtype)
        return (share / share.sum()).to(self.mean.dtype).log()

    @torch.no_grad()
    def weights(self) -> tuple[Float[Tensor, "classes features"], Float[Tensor, " classes"]]:
        """W and b in float64.

        Raises:
            ValueError: if no sample was seen.
        """
        variance, centre = self.feature_variance(), self.moments.overall().mean[0]
        seen = (self.count > 0)[:, None]
        gap = torch.where(seen, self.mean - centre, 0.0)
        bias = self.log_prior() - 0.5 * (gap * (gap + 2 * centre) / variance).sum(1)
        return gap / variance, bias

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        weight, bias = self.weights()
        logits = F.linear(features.to(weight), weight, bias)
        return logits.to(torch.promote_types(features.dtype, torch.float32))

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The same classifier as a layer: to ship, or to train on from here.

        A class that cannot be has weights 0 and bias -inf; give `prior_smoothing` where training is to go on.

        Args:
            dtype: of the layer.

        Raises:
            ValueError: if no sample was seen.
        """
        return linear_layer(*self.weights(), dtype=dtype)

    def extra_repr(self) -> str:
        return f"num_features={self.mean.shape[1]}, num_classes={len(self.count)}, samples={int(self.count.sum())}"

    def _take(self, moments: RunningMoments) -> None:
        # Copied, so that the buffers stay the same tensors for whoever holds them.
        for name in ("count", "mean", "squares"):
            getattr(self, name).copy_(getattr(moments, name))

    def _apply(self, fn: Any, recurse: bool = True) -> "GaussianNBHead":
        kept = {name: getattr(self, name) for name in ("mean", "squares")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = getattr(self, name)
            wide = accumulation_dtype(moved.device)
            if moved.dtype != wide:
                # `.half()` and `.float()` are meant for weights; sums stay as they were counted.
                setattr(self, name, value.to(moved.device, wide))
        return self


def class_moments(
    data: Any,
    num_classes: int,
    encoder: nn.Module | None = None,
    module_path: str | None = None,
    batch_size: int = 512,
) -> RunningMoments:
    """Moments of features by class, streamed from a loader: no feature is kept.

    Args:
        data: an iterable of batches (a DataLoader; tuples `(inputs, targets)`, dicts or `Batch`es), an `IndexedDataset`, or a pair of tensors
            `(inputs, targets)`.
        num_classes: number of classes.
        encoder: makes features from inputs, in eval mode and without gradients; None takes the inputs as features.
        module_path: submodule of the encoder whose output is the feature (`"head:input"` for its input), see `coloss.nn.Taps`.
        batch_size: of a data set or of tensors; an iterable of batches keeps its own.

    Returns:
        Moments on the CPU, of this process' samples; `all_reduce` joins those of all processes.

    Raises:
        ValueError: if there is no batch, batches have no targets, or a class is out of range.

    Examples:
        >>> batches = [(torch.ones(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([0]))]
        >>> class_moments(batches, num_classes=2).mean.tolist()
        [[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        data = IndexedDataset(*data)
    batches = Loader(data, batch_size, shuffle=False) if isinstance(data, IndexedDataset) else data
    network = encoder if encoder is not None else nn.Identity()
    parameter = next(network.parameters(), None)
    found: RunningMoments | None = None
    paths: Mapping[str, str] = {} if module_path is None else {"features": module_path}
    with Taps(network, paths) as taps, evaluation_mode(network):
        for item in batches:
            batch = Batch.of(item)
            if not isinstance(batch.targets, Tensor):
                raise ValueError("data must give batches with targets, the class of each sample; got none")
            inputs: Any = batch.inputs
            if parameter is not None:
                inputs = batch.to(parameter.device).inputs
            outputs = network(inputs)
            features = (outputs if module_path is None else taps["features"]).flatten(1).cpu()
            new = RunningMoments.of(features, batch.targets.cpu(), num_classes)
            found = new if found is None else found.merge(new)
    if found is None:
        raise ValueError("data must give at least one batch, got none")
    return found


def check_gaussian_options(smoothing: float, shrinkage: float, prior: str, prior_smoothing: float) -> None:
    """Refuse options that `GaussianNBHead` cannot have.

    Raises:
        ValueError: naming the option, the rule and the value.

    Examples:
        >>> check_gaussian_options(-1.0, 0.0, "uniform", 0.0)
        Traceback (most recent call last):
        ...
        ValueError: smoothing must be >= 0 and finite, got -1.0
    """
    for name, value in (("smoothing", smoothing), ("prior_smoothing", prior_smoothing)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
    if prior not in ("empirical", "uniform"):
        raise ValueError(f'prior must be "empirical" or "uniform", got {prior!r}')
