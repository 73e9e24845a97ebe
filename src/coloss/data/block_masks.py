"""Contiguous blocks hidden: rectangles of image patches, and spans of a series."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool
from torch import Tensor

from coloss.data.masking import MaskRequest, Masks, check_range
from coloss.ops import indices_to_mask


class MultiBlock2d:
    """Rectangular target blocks on a grid of patches, and one large context block without them.

    One target size and one context size hold for the whole batch: of scale s and aspect a, a block of `rows x columns` patches has
    rows = round(sqrt(s n a)) and columns = round(sqrt(s n / a)) of the n patches, within the grid. Positions are uniform and differ by
    sample; targets of a sample may overlap one another. Where a context keeps fewer than `min_keep` patches, its block is placed anew,
    up to `retries` times; then one target after the other is no longer taken out of it (it sees part of what it must predict). All
    contexts are cut to the size of the smallest by leaving out random patches.

    Args:
        num_targets: M, target blocks of each sample, >= 1.
        target_scale: range of a target's share of all patches, in (0, 1].
        target_aspect: range of rows / columns of a target, > 0.
        context_scale: range of the context block's share of all patches, in (0, 1]; its aspect is 1.
        min_keep: fewest patches of a context, >= 1. None for 10, or an eighth of the patches where that is less.
        retries: positions tried for a context block before a target is let in, >= 1.

    Returns:
        From `masker(request)`: `Masks` with context (1, B, visible) and targets (M, B, rows * columns).

    Raises:
        ValueError: for a value out of range, a grid that is not two-dimensional, or `min_keep` above the context block's size.

    Source:
        Assran et al., 2023 (I-JEPA), arXiv 2301.08243, section 3 and appendix A. There contexts are cut at their end, which leaves out
        the last rows of an image more often than others.

    Examples:
        >>> masks = MultiBlock2d()(MaskRequest(3, (14, 14), torch.Generator().manual_seed(0)))
        >>> masks.targets.shape[:2], masks.context.shape[2] >= 10
        (torch.Size([4, 3]), True)
    """

    def __init__(
        self,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_keep: int | None = None,
        retries: int = 20,
    ) -> None:
        check_range("target_scale", target_scale, 1.0)
        check_range("target_aspect", target_aspect, math.inf)
        check_range("context_scale", context_scale, 1.0)
        for name, value in (("num_targets", num_targets), ("min_keep", min_keep), ("retries", retries)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.num_targets, self.min_keep, self.retries = num_targets, min_keep, retries
        self.target_scale, self.target_aspect = target_scale, target_aspect
        self.context_scale = context_scale

    def __call__(self, request: MaskRequest, /) -> Masks:
        if len(request.grid) != 2:
            raise ValueError(f"grid must be (rows, columns) for blocks of patches, got {request.grid}")
        patches, batch = request.num_tokens, request.batch_size
        target_size = _block_size(request, self.target_scale, self.target_aspect)
        context_size = _block_size(request, self.context_scale, (1.0, 1.0))
        least = self.min_keep if self.min_keep is not None else max(1, min(10, patches // 8))
        if least > math.prod(context_size):
            raise ValueError(
                f"min_keep must be at most the context block's {math.prod(context_size)} patches, got {least}"
            )
        targets = _place(request, (self.num_targets, batch), target_size)
        hidden = indices_to_mask(targets, patches)
        visible = torch.zeros(batch, patches, dtype=torch.bool)
        left = torch.arange(batch)
        for excluded in range(self.num_targets, -1, -1):
            blocks = indices_to_mask(_place(request, (self.retries, len(left)), context_size), patches)
            blocks &= ~hidden[:excluded, left].any(0)
            enough = blocks.sum(-1) >= least
            first = enough.to(torch.uint8).argmax(0)
            found = enough.any(0)
            visible[left] = blocks[first, torch.arange(len(left))]
            left = left[~found]
            if len(left) == 0:
                break
        return Masks(_cut_to_smallest(visible, request.generator)[None], targets)


class BlockMask1d:
    """Contiguous blocks of a series hidden, the rest visible; everything hidden is one set of targets.

    One share of visible tokens, uniform in `keep`, holds for the whole batch; ceil(share * tokens) are visible, at least one.

    Args:
        keep: range of the share of visible tokens, in (0, 1].
        min_block: fewest tokens of a block, >= 1; see `sample_block_mask_1d`.

    Returns:
        From `masker(request)`: `Masks` with context (1, B, visible) and targets (1, B, hidden), together all tokens.

    Raises:
        ValueError: for a value out of range, or a grid of several axes.

    Source:
        Weimann and Conrad, 2024 (ECG-JEPA), arXiv 2410.13867.

    Examples:
        >>> masks = BlockMask1d((0.25, 0.25), 3)(MaskRequest(5, (20,)))
        >>> masks.context.shape, masks.targets.shape
        (torch.Size([1, 5, 5]), torch.Size([1, 5, 15]))
    """

    def __init__(self, keep: tuple[float, float] = (0.15, 0.25), min_block: int = 10) -> None:
        check_range("keep", keep, 1.0)
        if min_block < 1:
            raise ValueError(f"min_block must be >= 1, got {min_block}")
        self.keep, self.min_block = keep, min_block

    def __call__(self, request: MaskRequest, /) -> Masks:
        if len(request.grid) != 1:
            raise ValueError(f"grid must be (tokens,) for blocks of a series, got {request.grid}")
        tokens = request.num_tokens
        keep = request.shared_count(self.keep)
        draws = _uniforms(request.generator)
        hidden = [_hidden_blocks(tokens, keep, self.min_block, draws) for _ in range(request.batch_size)]
        return Masks.partition(torch.tensor(hidden, dtype=torch.bool).reshape(-1, tokens))


def sample_block_mask_1d(
    n: int, n_keep: int, min_block: int = 10, generator: torch.Generator | None = None
) -> Bool[Tensor, " n"]:
    """A series of n tokens with all but `n_keep` hidden in contiguous blocks.

    Until n - n_keep are hidden: an interval of visible tokens is drawn with probability in proportion to its length, and a block size
    uniformly from `min_block` to what is left to hide. The block is placed uniformly inside the interval; an interval that is no longer
    than the block is hidden whole. When less than `min_block` is left, that much is hidden beside a block. So every run of hidden tokens
    has at least min(min_block, n - n_keep).

    Args:
        n: tokens, >= 0.
        n_keep: visible ones, in [0, n].
        min_block: fewest tokens of a block, >= 1.
        generator: decides every choice.

    Returns:
        True for hidden tokens, exactly n - n_keep.

    Raises:
        ValueError: for a value out of range.

    Cost:
        A loop in Python over blocks: each depends on those before it.

    Source:
        Weimann and Conrad, 2024 (ECG-JEPA), arXiv 2410.13867.

    Examples:
        >>> sample_block_mask_1d(20, 6, 4, torch.Generator().manual_seed(0)).sum()
        tensor(14)
    """
    if not 0 <= n_keep <= n:
        raise ValueError(f"n_keep must be in [0, n = {n}], got {n_keep}")
    if min_block < 1:
        raise ValueError(f"min_block must be >= 1, got {min_block}")
    return torch.tensor(_hidden_blocks(n, n_keep, min_block, _uniforms(generator)), dtype=torch.bool)


def _uniforms(generator: torch.Generator | None) -> Iterator[float]:
    while True:
        yield from torch.rand(256, generator=generator, dtype=torch.float64).tolist()


def _hidden_blocks(n: int, n_keep: int, min_block: int, draws: Iterator[float]) -> list[bool]:
    visible = [(0, n)]
    left = n - n_keep
    while left > 0:
        # Laid end to end, the intervals are hit in proportion to their lengths.
        place = next(draws) * sum(end - start for start, end in visible)
        chosen = len(visible) - 1
        for number, (start, end) in enumerate(visible):
            place -= end - start
            if place < 0:
                chosen = number
                break
        start, end = visible.pop(chosen)
        forced = left < min_block
        block = left if forced else min_block + int(next(draws) * (left - min_block + 1))
        if block >= end - start:
            left -= end - start
            continue
        first = start + int(next(draws) * (end - start - block + 1))
        if forced and (start > 0 or end < n):
            # Beside a block, so that no short one arises; where both ends touch one, a fair draw.
            at_start = start > 0 and (end == n or 2 * first < start + end - block + 1)
            first = start if at_start else end - block
        visible[chosen:chosen] = [
            part for part in ((start, first), (first + block, end)) if part[0] < part[1]
        ]
        left -= block
    hidden = [True] * n
    for start, end in visible:
        hidden[start:end] = [False] * (end - start)
    return hidden


def _block_size(
    request: MaskRequest, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int]:
    area = request.shared_uniform(*scale) * request.num_tokens
    ratio = request.shared_uniform(*aspect)
    rows, columns = request.grid
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(max(height, 1), rows), min(max(width, 1), columns)


def _place(request: MaskRequest, shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Indices of a block at a random position for each entry of `shape`, in rising order."""
    (rows, columns), (height, width) = request.grid, size
    top = torch.randint(rows - height + 1, (*shape, 1, 1), generator=request.generator)
    side = torch.randint(columns - width + 1, (*shape, 1, 1), generator=request.generator)
    indices = (top + torch.arange(height)[:, None]) * columns + side + torch.arange(width)
    return indices.flatten(-2)


def _cut_to_smallest(visible: Tensor, generator: torch.Generator | None) -> Tensor:
    """As many true entries of each row as the row with the fewest has, chosen at random, in rising order."""
    smallest = int(visible.sum(-1).min()) if len(visible) else 0
    draws = torch.rand(visible.shape, generator=generator, dtype=torch.float64)
    order = draws.masked_fill(~visible, 2.0).argsort(-1)
    return order[:, :smallest].sort().values
