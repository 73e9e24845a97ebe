"""Tokens hidden at random, one by one: any tokens, and columns of a table."""

import torch
from jaxtyping import Int
from torch import Tensor

from coloss.data.masking import MaskRequest, Masks, check_range
from coloss.ops import indices_to_mask


class RandomTokens:
    """Tokens hidden one by one, each sample's own choice; everything hidden is one set of targets.

    Args:
        keep: range of the share of visible tokens, in (0, 1]; drawn once for the batch as in `BlockMask1d`.

    Returns:
        From `masker(request)`: `Masks` with context (1, B, visible) and targets (1, B, hidden), together all tokens.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> masks = RandomTokens((0.5, 0.5))(MaskRequest(3, (2, 4)))
        >>> torch.cat([masks.context, masks.targets], 2).sort().values[0, 0].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(self, keep: tuple[float, float] = (0.15, 0.25)) -> None:
        check_range("keep", keep, 1.0)
        self.keep = keep

    def __call__(self, request: MaskRequest, /) -> Masks:
        order = _permutations((request.batch_size, request.num_tokens), request.generator)
        return Masks.partition(
            indices_to_mask(order[:, request.shared_count(self.keep) :], request.num_tokens)
        )


class RandomColumns:
    """A random part of a table's columns visible, and several random parts of the others to predict.

    Args:
        context: range of the share of visible columns, in (0, 1].
        target: range of the share of columns in a set of targets, in (0, 1].
        num_targets: M, sets of targets, >= 1; they may overlap one another.

    Returns:
        From `masker(request)`: `Masks` of `sample_column_masks`, with sizes equal on all processes.

    Raises:
        ValueError: for a value out of range, or as `sample_column_masks`.

    Source:
        Thimonier et al., 2025 (T-JEPA), arXiv 2410.05016.

    Examples:
        >>> masks = RandomColumns()(MaskRequest(5, (30,)))
        >>> masks.context.shape[:2], masks.targets.shape[:2]
        (torch.Size([1, 5]), torch.Size([4, 5]))
    """

    def __init__(
        self,
        context: tuple[float, float] = (0.136, 0.368),
        target: tuple[float, float] = (0.156, 0.622),
        num_targets: int = 4,
    ) -> None:
        check_range("context", context, 1.0)
        check_range("target", target, 1.0)
        if num_targets < 1:
            raise ValueError(f"num_targets must be >= 1, got {num_targets}")
        self.context, self.target, self.num_targets = context, target, num_targets

    def __call__(self, request: MaskRequest, /) -> Masks:
        context, targets = sample_column_masks(
            request.batch_size,
            request.num_tokens,
            self.context,
            self.target,
            self.num_targets,
            request.generator,
            request.shared_generator,
        )
        return Masks(context[None], targets)


def sample_column_masks(
    batch_size: int,
    num_columns: int,
    context: tuple[float, float] = (0.136, 0.368),
    target: tuple[float, float] = (0.156, 0.622),
    n_targets: int = 4,
    generator: torch.Generator | None = None,
    shared_generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "sets batch hidden"]]:
    """Visible columns of each row, and M sets of columns to predict from the others.

    Sizes hold for the whole batch: round(u * columns) with u uniform in the range, at least 1, drawn again until both fit into the
    columns. The visible columns are a uniformly random subset; each set of targets is another one, of the columns that are not visible.

    Args:
        batch_size: rows, >= 0.
        num_columns: >= 2.
        context: range of the share of visible columns, in (0, 1].
        target: range of the share of columns in a set of targets, in (0, 1].
        n_targets: M, >= 1.
        generator: of the columns.
        shared_generator: of the sizes, equal on all processes; None for `generator`.

    Returns:
        Indices of visible columns and of target columns, in rising order. Column j is index j.

    Raises:
        ValueError: for a value out of range, or shares whose lower ends do not fit into the columns together.

    Source:
        Thimonier et al., 2025 (T-JEPA), arXiv 2410.05016.

    Examples:
        >>> visible, hidden = sample_column_masks(2, 10, (0.3, 0.3), (0.5, 0.5))
        >>> visible.shape, hidden.shape
        (torch.Size([2, 3]), torch.Size([4, 2, 5]))
    """
    check_range("context", context, 1.0)
    check_range("target", target, 1.0)
    if n_targets < 1:
        raise ValueError(f"n_targets must be >= 1, got {n_targets}")
    request = MaskRequest(batch_size, (num_columns,), generator, shared_generator)
    ranges = (context, target)
    smallest = tuple(max(1, round(low * num_columns)) for low, _ in ranges)
    if sum(smallest) > num_columns:
        raise ValueError(
            f"context and target must leave room for one another in {num_columns} columns, got at least {smallest}"
        )
    for _ in range(100):
        visible, hidden = (max(1, round(request.shared_uniform(*ends) * num_columns)) for ends in ranges)
        if visible + hidden <= num_columns:
            break
    else:
        visible, hidden = smallest
    order = _permutations((batch_size, num_columns), generator)
    others = order[:, visible:]
    # A permutation for each set: parts of one shuffled array that is shuffled again would all name the same columns.
    choice = _permutations((n_targets, *others.shape), generator)[..., :hidden]
    targets = others.expand(n_targets, -1, -1).gather(-1, choice)
    return order[:, :visible].sort().values, targets.sort().values


def _permutations(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """A random order of the last dimension in every row."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1)
