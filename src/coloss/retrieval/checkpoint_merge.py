"""One network out of several that were trained from the same start: plain averaging, and averaging by how far each parameter moved."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

How = Literal["delta", "uniform"]
Granularity = Literal["tensor", "row", "element"]


def merge_checkpoints(
    base: Mapping[str, Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    how: How = "delta",
    granularity: Granularity = "tensor",
    gamma: float = 1.0,
) -> dict[str, Tensor]:
    r"""Average checkpoints, each parameter weighted by its distance from where training began.

    $\theta = \theta_0 + \sum_m a_m \Delta_m$ with $\Delta_m = \theta_m - \theta_0$ and $a_m = \|\Delta_m\|^\gamma / \sum_{m'} \|\Delta_{m'}\|^\gamma$: a
    checkpoint that changed a parameter much has the greater say in it. The paper (CoDiEmb, arXiv 2508.11442) describes this fusion without a
    formula; this is the project's reading.

    Args:
        base: state dict at the start, $\theta_0$.
        states: state dicts of the trained networks, at least one, with the names and shapes of `base`.
        how: `"delta"`, or `"uniform"` for the plain mean (a "soup").
        granularity: what a weight belongs to: a whole tensor, each row of its first dimension, or each element.
        gamma: >= 0, how much the distance counts; 0 is the plain mean.

    Returns:
        A new state dict. Integer entries (counters) are those of the last state; parameters that none moved stay as they are.

    Raises:
        ValueError: if there are no states, names or shapes differ, or an option is out of range.

    Cost:
        O(parameters * states) time, no more memory than one further state dict and one tensor of each.

    Examples:
        >>> base, moved = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 0.0])}
        >>> merge_checkpoints(base, [moved, {"w": torch.tensor([0.0, 1.0])}])["w"]
        tensor([2.2500, 0.2500])
    """
    if not states:
        raise ValueError("states must hold at least one state dict, got 0")
    if how not in ("delta", "uniform"):
        raise ValueError(f'how must be "delta" or "uniform", got {how!r}')
    if granularity not in ("tensor", "row", "element"):
        raise ValueError(f'granularity must be "tensor", "row" or "element", got {granularity!r}')
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be >= 0 and finite, got {gamma}")
    for number, state in enumerate(states):
        odd = sorted(base.keys() ^ state.keys())
        odd = odd or [name for name in base if base[name].shape != state[name].shape]
        if odd:
            raise ValueError(
                f"states must have the names and shapes of base, state {number} differs in {odd[0]!r}"
            )
    return {
        name: _merged(start, [state[name] for state in states], how, granularity, gamma)
        if start.is_floating_point()
        else states[-1][name].clone()
        for name, start in base.items()
    }


def _merged(start: Tensor, ends: list[Tensor], how: How, granularity: Granularity, gamma: float) -> Tensor:
    wide = start.double() if start.dtype == torch.float64 else start.float()
    moves = [end.to(wide.dtype) - wide for end in ends]
    if how == "uniform":
        weights = [torch.ones((), dtype=wide.dtype, device=wide.device)] * len(moves)
    else:
        weights = [_distance(move, granularity) ** gamma for move in moves]
    total = torch.stack([weight.expand_as(weights[0]) for weight in weights]).sum(0)
    total = total.masked_fill(total == 0, 1.0)  # nobody moved: every move is 0 there
    merged = wide
    for weight, move in zip(weights, moves, strict=True):
        merged = merged + weight / total * move
    return merged.to(start.dtype)


def _distance(move: Tensor, granularity: Granularity) -> Tensor:
    if granularity == "element" or (granularity == "row" and move.ndim < 2):
        return move.abs()
    if granularity == "row":
        return move.flatten(1).norm(dim=1).reshape(-1, *[1] * (move.ndim - 1))
    return move.norm()
