"""Matching the distribution of similarities to that of identities, in memory that does not grow with the number of pairs.

The loss is a Kullback-Leibler divergence from the softmax of similarities, so it needs the entropy of that softmax, which the streaming
core does not give: `softmax_negative_entropy` walks over the same tiles once more.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from .distributed import is_distributed
from .gradients import first_order_only
from .loss_arguments import Reduction, check_options, joint_groups, over_temperature, reduced, same_type
from .pair_sums import group_sum
from .precision import accumulation_dtype, without_autocast
from .ring import Ring
from .score_tiles import Mask, Tiles
from .streaming import streaming_logsumexp


def sdm_loss(
    queries: Float[Tensor, "pairs dim"],
    keys: Float[Tensor, "pairs dim"],
    ids: Shaped[Tensor, " pairs"],
    temperature: float | Float[Tensor, ""] = 0.02,
    eps: float = 1e-8,
    *,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Divergence of the softmax over cosine similarities from the uniform distribution over the partners of one identity, both ways.

    $\frac1B \sum_i \sum_j p_{ij} [\log p_{ij} - \log(q_{ij} + \epsilon)]$ with $p_{ij}$ the softmax over $j$ of $\cos(x_i, y_j)/\tau$ and
    $q_{ij} = 1/n_i$ for the $n_i$ keys of the identity of query $i$, 0 for others; plus the same with roles exchanged (SDM). This is
    $\mathrm{KL}(p \| q)$, not cross-entropy: probability that leaks to other identities costs $\log 1/\epsilon$ = 18.4 nats times its
    mass, while no cost pulls p to spread over all of q.

    Args:
        queries: $B$ embeddings, of any length.
        keys: $B$ embeddings; key $i$ and query $i$ belong together.
        ids: identity of each pair; keys of equal identity are all partners.
        temperature: $\tau > 0$: a number, or a scalar tensor that may be learned.
        eps: $\epsilon > 0$; in float32, so a small one does not vanish in half precision.
        reduction: over pairs: `"mean"`, `"sum"`, or `"none"` for one value each.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the pairs of all processes of a run; False keeps to this one's.

    Returns:
        A scalar (0 for no pairs) or (pairs,), at least float32; 0 at best up to $2\epsilon$. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        $O(B^2 D)$ time, about 16 matrix products forward and backward; memory of the embeddings, their gradients and two tiles.

    Source:
        Jiang and Ye 2023 (IRRA), arXiv 2303.12501, equations 4 to 6.

    Examples:
        >>> vectors = torch.eye(4)
        >>> round(abs(sdm_loss(vectors, vectors, torch.arange(4)).item()), 4)
        0.0
        >>> round(sdm_loss(vectors, vectors.flip(0), torch.arange(4)).item(), 2)  # all mass at wrong partners
        36.84
    """
    check_options(temperature, reduction, chunk_size, len(queries))
    if isinstance(temperature, Tensor) and temperature.ndim:
        raise ValueError(f"temperature must be one number, got shape {tuple(temperature.shape)}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be > 0 and finite, got {eps}")
    if keys.shape != queries.shape:
        raise ValueError(f"keys must have shape {tuple(queries.shape)}, got {tuple(keys.shape)}")
    if ids.shape != queries.shape[:1]:
        raise ValueError(f"ids must have shape ({len(queries)},), got {tuple(ids.shape)}")
    ring = across_processes and is_distributed()
    x, y = (F.normalize(part, dim=1) for part in same_type(queries, keys))
    own, across = joint_groups(ids, ids, ring)
    mask = Mask(row_groups=own, column_groups=across)
    partners = group_sum(x.new_ones(len(x), 1), ids, ids, ring).squeeze(1)
    inside = torch.log(1 / partners + eps)
    loss = x.new_zeros(len(x))
    for rows, columns in ((x, y), (y, x)):
        rows = over_temperature(rows, temperature)
        logs, _ = streaming_logsumexp(rows, columns, side=chunk_size, ring=ring)
        others, _ = streaming_logsumexp(rows, columns, mask, side=chunk_size, ring=ring)
        leaked = (others - logs).exp()
        order = softmax_negative_entropy(rows, columns, logs, chunk_size, ring)
        loss = loss + order - (1 - leaked) * inside - leaked * math.log(eps)
    return reduced(loss, None, reduction, ring)


sdm_loss.batch_statistic = True  # type: ignore[attr-defined]


def softmax_negative_entropy(
    x: Tensor, y: Tensor, logs: Tensor, side: int | None = None, ring: bool = False
) -> Tensor:
    r"""Mean log-probability of each row's softmax, $\sum_j p_{ij} \log p_{ij}$ with $\log p_{ij} = x_i \cdot y_j - l_i$.

    Args:
        x: (rows, dim), float32 or float64.
        y: (columns, dim) in the same type.
        logs: (rows,), l, the log-sum-exp of each row as `streaming_logsumexp` gives it; its gradient flows on.
        side: of a square tile, >= 1; by default chosen for the device.
        ring: the columns are those of all processes.

    Returns:
        (rows,).

    Cost:
        $O(N M D)$ time, four matrix products; $O((N + M) D)$ memory and two tiles.

    Examples:
        >>> x, y = torch.zeros(1, 1), torch.ones(4, 1)
        >>> order = softmax_negative_entropy(x, y, (x @ y.T).logsumexp(1))
        >>> round(order.item() / math.log(4), 4)
        -1.0
    """
    return _negative_entropy(x, y, logs, side, ring)


@torch.library.custom_op("coloss::softmax_negative_entropy", mutates_args=())
def _negative_entropy(x: Tensor, y: Tensor, logs: Tensor, side: int | None, ring: bool) -> Tensor:
    total = torch.zeros(len(x), dtype=accumulation_dtype(x.device), device=x.device)
    journey, block = Ring(y) if ring else None, y
    for _ in range(1 if journey is None else len(journey)):
        for rows, _columns, tile, spare in Tiles(x, block, side=side).scores():
            torch.exp(tile.sub_(logs[rows].unsqueeze(1)), out=spare)
            total[rows] += spare.mul_(tile).sum(1)
        if journey is not None:
            (block,) = journey.pass_on(block)
    return total.to(x.dtype)


@_negative_entropy.register_fake
def _(x, y, logs, side, ring):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0])


@torch.library.custom_op("coloss::softmax_negative_entropy_backward", mutates_args=())
def _negative_entropy_backward(
    x: Tensor, y: Tensor, logs: Tensor, side: int | None, ring: bool, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    for_x, for_y = (torch.zeros_like(part, memory_format=torch.contiguous_format) for part in (x, y))
    journey, block = Ring(y) if ring else None, y
    for _ in range(1 if journey is None else len(journey)):
        for rows, columns, tile, spare in Tiles(x, block, side=side).scores():
            torch.exp(tile.sub_(logs[rows].unsqueeze(1)), out=spare)
            spare.mul_(tile.add_(1.0)).mul_(gradient[rows].unsqueeze(1))
            with without_autocast(x.device):
                for_x[rows].addmm_(spare, block[columns])
                for_y[columns].addmm_(spare.T, x[rows])
        if journey is not None:
            block, for_y = journey.pass_on(block, for_y)
    return for_x, for_y


@_negative_entropy_backward.register_fake
def _(x, y, logs, side, ring, gradient):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, logs, *ctx.settings = inputs
    ctx.save_for_backward(x, y, logs, output)


@first_order_only("this loss on pairs of embeddings")
def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, y, logs, order = ctx.saved_tensors
    for_x, for_y = _negative_entropy_backward(x, y, logs, *ctx.settings, gradient)
    return for_x, for_y, -gradient * (order + 1), None, None


_negative_entropy.register_autograd(_differentiate, setup_context=_remember)
