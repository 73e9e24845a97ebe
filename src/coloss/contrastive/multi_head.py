"""Several projection heads at once, and temperatures that a small network reads off a pair of embeddings."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coloss.errors import InputError
from coloss.ops import full_precision

# Hidden units of pairs held at once where all pairs are asked for.
_UNITS_AT_ONCE = 2**22


class MultiHeadProjector(nn.Module):
    """Projections of the same features by several heads of one form and own weights: linear, ReLU, linear.

    Args:
        in_features: length of a feature vector.
        hidden: width of each head's hidden layer.
        dim: length of each head's embeddings.
        heads: number of heads.

    Returns:
        From `forward(features)`: (rows, heads, dim).

    Raises:
        InputError: for a size below 1.

    Cost:
        Two batched matrix products, whatever the number of heads.

    Examples:
        >>> MultiHeadProjector(16, 32, 8, heads=3)(torch.randn(5, 16)).shape
        torch.Size([5, 3, 8])
    """

    def __init__(self, in_features: int, hidden: int = 512, dim: int = 128, heads: int = 3) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "hidden": hidden, "dim": dim, "heads": heads}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be >= 1, got {size}")
        self.first = HeadLinear(heads, in_features, hidden)
        self.last = HeadLinear(heads, hidden, dim)

    def forward(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows heads dim"]:
        return self.last(torch.relu(self.first(features.unsqueeze(1))))


class HeadLinear(nn.Module):
    """A linear layer for each of several heads; one layer for all of them where `heads` is 1.

    Args:
        heads: number of layers.
        in_features, out_features: of each.
        bias: add one.

    Examples:
        >>> HeadLinear(3, 4, 2)(torch.zeros(5, 3, 4)).shape, HeadLinear(1, 4, 2)(torch.zeros(5, 3, 4)).shape
        (torch.Size([5, 3, 2]), torch.Size([5, 3, 2]))
    """

    def __init__(self, heads: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # that of nn.Linear
        self.weight = nn.Parameter(torch.empty(heads, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, out_features).uniform_(-bound, bound)) if bias else None

    def forward(self, inputs: Float[Tensor, "... features"]) -> Float[Tensor, "... outputs"]:
        if len(self.weight) == 1:
            found = inputs @ self.weight[0]
        else:
            found = torch.einsum(
                "...hi,hio->...ho", inputs.expand(*inputs.shape[:-2], len(self.weight), -1), self.weight
            )
        return found if self.bias is None else found + self.bias


class PairTemperature(nn.Module):
    r"""A temperature for a pair of embeddings, $\mathrm{low} + (\mathrm{high} - \mathrm{low}) \, \sigma(\phi)$, the same in both orders.

    $\phi$ is a perceptron with one hidden layer on the two embeddings put together, averaged over both orders.

    Args:
        dim: length of an embedding.
        hidden: width of the hidden layer.
        bounds: lowest and highest temperature. Equal ones make it that constant.
        heads: None for one network that all heads share; a number for one each.
        reads_only: no gradient reaches the embeddings through their temperature. With that gradient they are bent to announce whether they belong
            together, which lowers a loss with free temperatures and spoils the features.

    Returns:
        From `forward(first, second)` with two tensors (..., heads, dim): (..., heads), at least float32.

    Raises:
        InputError: for a value out of range.

    Examples:
        >>> temperature = PairTemperature(8)
        >>> first, second = torch.randn(2, 5, 3, 8)
        >>> tau = temperature(first, second)
        >>> (
        ...     tau.shape,
        ...     bool(((tau > 0.05) & (tau < 2)).all()),
        ...     bool(torch.allclose(tau, temperature(second, first))),
        ... )
        (torch.Size([5, 3]), True, True)
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        *,
        bounds: tuple[float, float] = (0.05, 2.0),
        heads: int | None = None,
        reads_only: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), ("heads", heads)):
            if size is not None and size < 1:
                raise InputError(f"{name} must be >= 1, got {size}")
        self.bounds, self.reads_only, count = checked_bounds(bounds), reads_only, heads or 1
        # The layer on two embeddings put together, taken apart: all pairs then cost only sums.
        self.left = HeadLinear(count, dim, hidden)
        self.right = HeadLinear(count, dim, hidden, bias=False)
        self.last = HeadLinear(count, hidden, 1)

    @property
    def is_constant(self) -> bool:
        """Whether the bounds leave only one temperature."""
        return self.bounds[0] == self.bounds[1]

    def forward(
        self, first: Float[Tensor, "*pairs heads dim"], second: Float[Tensor, "*pairs heads dim"]
    ) -> Float[Tensor, "*pairs heads"]:
        return self._of(*self._sides(first), *self._sides(second))

    def pairwise(
        self, first: Float[Tensor, "rows heads dim"], second: Float[Tensor, "columns heads dim"]
    ) -> Float[Tensor, "rows columns heads"]:
        """Temperatures of all pairs.

        Cost:
            $O(N M)$ times heads and hidden units in time; memory of the result and of some rows' hidden units, which the backward pass
            makes again.
        """
        own = [side.unsqueeze(1) for side in self._sides(first)]
        others = [side.unsqueeze(0) for side in self._sides(second)]
        step = max(1, _UNITS_AT_ONCE // max(others[0].numel(), 1))
        parts = [
            checkpoint(self._of, *(side[start : start + step] for side in own), *others, use_reentrant=False)
            for start in range(0, max(len(first), 1), step)
        ]
        return torch.cat(parts)

    def _sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = (rows.detach() if self.reads_only else rows).to(self.left.weight.dtype)
        return self.left(rows), self.right(rows)

    def _of(self, left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
        orders = torch.relu(left + other_right), torch.relu(other_left + right)
        phi = full_precision(self.last((orders[0] + orders[1]) / 2)).squeeze(-1)
        return bounded(phi, self.bounds)


class FeaturePairTemperature(nn.Module):
    """A temperature for each pair of features of each head, a bounded parameter, the same in both orders.

    Args:
        dim: number of features.
        heads: number of heads.
        bounds: lowest and highest temperature; they begin midway.

    Returns:
        From `forward()`: (heads, dim, dim), at least float32.

    Raises:
        InputError: for a value out of range.

    Examples:
        >>> FeaturePairTemperature(4, heads=2, bounds=(0.5, 1.5))()[0, 0]
        tensor([1., 1., 1., 1.], grad_fn=<SelectBackward0>)
    """

    def __init__(self, dim: int, heads: int = 3, *, bounds: tuple[float, float] = (0.05, 2.0)) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads)):
            if size < 1:
                raise InputError(f"{name} must be >= 1, got {size}")
        self.bounds = checked_bounds(bounds)
        self.table = nn.Parameter(torch.zeros(heads, dim, dim))

    def forward(self) -> Float[Tensor, "heads dim dim"]:
        return bounded(full_precision(self.table + self.table.mT) / 2, self.bounds)


def bounded(phi: Float[Tensor, "*shape"], bounds: tuple[float, float]) -> Float[Tensor, "*shape"]:
    """A number in [low, high] from any number, by a sigmoid."""
    low, high = bounds
    return low + (high - low) * torch.sigmoid(phi)


def share_at_bounds(temperatures: Float[Tensor, "*shape"], bounds: tuple[float, float]) -> Float[Tensor, ""]:
    """Share of temperatures within a hundredth of the range from either bound; NaN of none."""
    low, high = bounds
    margin = 0.01 * (high - low)
    return ((temperatures <= low + margin) | (temperatures >= high - margin)).float().mean()


def checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds, or an InputError."""
    low, high = bounds
    if not 0 < low <= high < math.inf:
        raise InputError(f"bounds must be 0 < low <= high and finite, got {bounds}")
    return low, high
