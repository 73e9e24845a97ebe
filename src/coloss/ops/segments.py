r"""Sums, means and log-sum-exps over groups of rows that an index names, of any sizes and in any order.

Row $i$ of `values` belongs to segment `index[i]`, a whole number in [0, `segments`): a bag, an instance's
image, a node's graph. Every function takes rows in the first dimension, treats all other dimensions
separately, and returns one row for each segment, in at least float32. An index outside the range is an error;
on a GPU, where looking at it would make the program wait, it is torch's own device assertion.

On CUDA the order of additions is not fixed, so sums may differ in the last digits from run to run unless
`torch.use_deterministic_algorithms(True)` is set.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .precision import full_precision


def segment_sum(
    values: Float[Tensor, "rows *features"], index: Int[Tensor, " rows"], segments: int | None = None
) -> Float[Tensor, "segments *features"]:
    """Total of the rows of each segment; 0 for a segment without rows.

    Args:
        values: one row for each sample.
        index: segment of each row.
        segments: number of segments, >= 0; None takes the largest index plus one.

    Returns:
        One row for each segment, at least float32.

    Raises:
        ValueError: if an index is outside [0, `segments`), or `segments` < 0.

    Cost:
        Linear in the size of `values`, in time and memory.

    Examples:
        >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]))
        tensor([5., 0., 2.])
    """
    segments = _checked_count(index, segments)
    values = full_precision(values)
    return values.new_zeros(segments, *values.shape[1:]).index_add(0, index, values)


def segment_mean(
    values: Float[Tensor, "rows *features"], index: Int[Tensor, " rows"], segments: int | None = None
) -> Float[Tensor, "segments *features"]:
    """Average of the rows of each segment; 0 for a segment without rows.

    Args:
        values: one row for each sample.
        index: segment of each row.
        segments: number of segments, >= 0; None takes the largest index plus one.

    Returns:
        One row for each segment, at least float32.

    Raises:
        ValueError: if an index is outside [0, `segments`), or `segments` < 0.

    Cost:
        Linear in the size of `values`, in time and memory.

    Examples:
        >>> segment_mean(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([1, 1]))
        tensor([[0., 0.],
                [2., 2.]])
    """
    total = segment_sum(values, index, segments)
    sizes = segment_sizes(index, total.shape[0]).clamp(min=1).to(total.dtype)
    return total / sizes.view(-1, *[1] * (total.ndim - 1))


def segment_logsumexp(
    values: Float[Tensor, "rows *features"], index: Int[Tensor, " rows"], segments: int | None = None
) -> Float[Tensor, "segments *features"]:
    r"""Logarithm of the summed exponentials of each segment, without overflow; $-\infty$ without rows.

    $\log \sum_{i \in s} e^{v_i}$. Its gradient is the softmax over the rows of the segment, and 0 where every
    row is $-\infty$.

    Args:
        values: one row for each sample; $\pm\infty$ is allowed.
        index: segment of each row.
        segments: number of segments, >= 0; None takes the largest index plus one.

    Returns:
        One row for each segment, at least float32.

    Raises:
        ValueError: if an index is outside [0, `segments`), or `segments` < 0.

    Cost:
        Linear in the size of `values`, in time and memory.

    Examples:
        >>> segment_logsumexp(torch.tensor([100.0, 100.0, 3.0]), torch.tensor([0, 0, 1]))
        tensor([100.6931,   3.0000])
    """
    segments = _checked_count(index, segments)
    values = full_precision(values)
    rows = index.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
    empty = values.new_full((segments, *values.shape[1:]), -torch.inf)
    peak = empty.scatter_reduce(0, rows, values.detach(), "amax")
    # An infinite peak is its own answer; shifting by it would give infinity minus infinity.
    shift = torch.where(peak.isfinite(), peak, 0.0)
    bounded = torch.where(peak.isfinite()[index], values - shift[index], -torch.inf)
    total = segment_sum(bounded.exp(), index, segments)
    # Ones stand in where the total is not used, so that no gradient passes through log 0.
    finite = torch.where(peak.isfinite(), total, 1.0).log() + shift
    return torch.where(peak.isfinite(), finite, peak)


def segment_sizes(index: Int[Tensor, " rows"], segments: int | None = None) -> Int[Tensor, " segments"]:
    """Number of rows of each segment.

    Args:
        index: segment of each row.
        segments: number of segments, >= 0; None takes the largest index plus one.

    Returns:
        int64, one count for each segment.

    Raises:
        ValueError: if an index is outside [0, `segments`), or `segments` < 0.

    Examples:
        >>> segment_sizes(torch.tensor([0, 2, 0]), 4)
        tensor([2, 0, 1, 0])
    """
    segments = _checked_count(index, segments)
    return torch.bincount(index, minlength=segments)


def _checked_count(index: Tensor, segments: int | None) -> int:
    if segments is not None and segments < 0:
        raise ValueError(f"segments must be >= 0, got {segments}")
    if index.numel() == 0:
        return segments or 0
    if segments is not None and index.device.type != "cpu":
        return segments
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or (segments is not None and high >= segments):
        limit = "" if segments is None else f" and < {segments} segments"
        raise ValueError(f"index must be >= 0{limit}, got values in [{low}, {high}]")
    return high + 1 if segments is None else segments
