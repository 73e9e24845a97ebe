"""Sliced statistics: a cloud of vectors judged by its one-dimensional shadows."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .distributed import all_reduce_mean, world_size
from .gradients import first_order_only, needs_gradient
from .precision import full_precision, without_autocast


def random_directions(
    dim: int,
    slices: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "dim slices"]:
    """Directions drawn uniformly from the unit sphere, one in each column.

    The processes of a distributed run must draw the same directions: give each a generator with the same
    seed.

    Args:
        dim: length of a direction, >= 1.
        slices: number of directions, >= 1.
        generator: source of randomness; the draw is made on its device and then moved.
        dtype: floating point type of the result.
        device: where the result lives; by default that of `generator`.

    Returns:
        Columns of norm 1, without a gradient.

    Raises:
        ValueError: if `dim` or `slices` is below 1.

    Examples:
        >>> directions = random_directions(3, 5, torch.Generator().manual_seed(0))
        >>> directions.shape, bool(torch.allclose(directions.norm(dim=0), torch.ones(5)))
        (torch.Size([3, 5]), True)
    """
    for name, value in (("dim", dim), ("slices", slices)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    source = generator.device if generator is not None else device
    working = torch.float64 if dtype == torch.float64 else torch.float32
    draw = torch.randn(dim, slices, generator=generator, dtype=working, device=source)
    return (draw / torch.linalg.vector_norm(draw, dim=0)).to(device or draw.device, dtype)


def epps_pulley(
    x: Float[Tensor, "*batch samples slices"], t_max: float = 3.0, knots: int = 17
) -> Float[Tensor, "*batch slices"]:
    r"""How far each column of samples is from a standard normal distribution, by its characteristic function.

    $T = N \int |\hat\varphi(t) - \varphi(t)|^2 w(t) \, dt$ with $\hat\varphi(t) = \frac1N \sum_n e^{i t
    x_n}$, $\varphi(t) = w(t) = e^{-t^2/2}$, over $[-t_{max}, t_{max}]$ by the trapezoid rule on `knots`
    points of the half line (the integrand is even). Value and gradient are bounded for any sample. Under the
    standard normal its mean is 1.0525 for every $N$ with the default grid, so 0 is not what to expect;
    samples collapsed to the origin give $0.402 N$.

    Over several processes $\hat\varphi$ is the mean over all samples of all processes and $N$ their number,
    as if the batch had been joined (see `coloss.ops.distributed` for the scale of the gradient).

    Args:
        x: finite samples of $N$ rows for each column; an angle $t x$ is only as exact as float32 holds it.
        t_max: end of the integration range, > 0.
        knots: points on $[0, t_{max}]$, >= 2.

    Returns:
        One value for each column, at least float32; 0 for no samples. It can be differentiated once.

    Raises:
        ValueError: if `t_max` or `knots` is out of range.

    Cost:
        $O(N S K)$ time for $K$ knots; $O(N S)$ memory: knots are visited one after the other (a loop of 16
        steps), each cosine and sine made from the last by the angle-addition formulas, and the backward pass
        repeats the walk.

    Source:
        Epps, Pulley 1983; Balestriero, LeCun 2025 (LeJEPA), arXiv 2511.08544.

    Examples:
        >>> collapsed = torch.zeros(100, 1)
        >>> epps_pulley(collapsed) / 100
        tensor([0.4020])
    """
    if not 0 < t_max < math.inf:
        raise ValueError(f"t_max must be > 0 and finite, got {t_max}")
    if knots < 2:
        raise ValueError(f"knots must be >= 2, got {knots}")
    samples = full_precision(x)
    step = t_max / (knots - 1)
    sums = all_reduce_mean(_CharacteristicSums.apply(samples, step, knots - 1))
    # Sums and counts, not means, are averaged over processes: unequal batches weigh as they should.
    count = all_reduce_mean(torch.tensor(float(x.shape[-2]), dtype=samples.dtype, device=samples.device))
    cosine, sine = sums / count.clamp(min=torch.finfo(samples.dtype).tiny)
    knot = torch.arange(1, knots, dtype=samples.dtype, device=samples.device).mul(step)
    knot = knot.reshape(-1, *[1] * (x.ndim - 1))
    normal = torch.exp(-(knot**2) / 2)
    # The knot t = 0 is left out: both functions are 1 there. Weights are doubled for the negative half line.
    weight = 2 * step * normal
    weight[-1] /= 2
    distance = (cosine - normal) ** 2 + sine**2
    return count * world_size() * (weight * distance).sum(0)


def sliced_statistic(
    embeddings: Float[Tensor, "*batch samples dim"],
    directions: Float[Tensor, "dim slices"],
    univariate: Callable[[Tensor], Tensor] = epps_pulley,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    r"""Mean of a one-dimensional statistic over the projections of embeddings on many directions.

    $\frac1S \sum_s T(Z a_s)$ with rows of $Z$ the `embeddings` and $a_s$ the columns of `directions`; also
    averaged over leading dimensions, such as views. With `epps_pulley` this is SIGReg.

    Args:
        embeddings: one set of samples, or several in leading dimensions.
        directions: unit columns, see `random_directions`.
        univariate: maps (..., samples, slices) to (..., slices); a fixed function, nothing in it is learned.
        chunk_size: slices projected at once, >= 1; by default all of them.

    Returns:
        A scalar, at least float32. It can be differentiated once.

    Raises:
        ValueError: if the two disagree on `dim`, there are no slices, or `chunk_size` is below 1.

    Cost:
        Time $O(N S (D + K))$. Memory $O(N (D + \text{chunk}))$ for any $S$: the gradient is formed in the same
        pass. A loop over chunks of slices.

    Source:
        Balestriero, LeCun 2025 (LeJEPA), arXiv 2511.08544.

    Examples:
        >>> embeddings = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        >>> directions = random_directions(8, 64, torch.Generator().manual_seed(1))
        >>> near, far = sliced_statistic(embeddings, directions), sliced_statistic(embeddings * 0, directions)
        >>> bool(near < 2 < 100 < far)
        True
    """
    if embeddings.shape[-1] != directions.shape[0]:
        raise ValueError(f"directions must have {embeddings.shape[-1]} rows, got {directions.shape[0]}")
    if directions.shape[1] == 0:
        raise ValueError("directions must have at least one column, got 0")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")

    points = full_precision(embeddings)
    total = _SlicedSum.apply(
        points,
        directions.to(points.dtype),
        univariate,
        chunk_size or directions.shape[1],
        needs_gradient(embeddings, directions),
    )
    sets = math.prod(embeddings.shape[:-2])
    return total / max(sets * directions.shape[1], 1)


class _SlicedSum(torch.autograd.Function):
    """Sum of a univariate statistic over slices, its gradient made chunk by chunk in the same walk."""

    @staticmethod
    def forward(
        ctx: Any,
        points: Tensor,
        directions: Tensor,
        univariate: Callable[[Tensor], Tensor],
        chunk_size: int,
        with_gradient: bool,
    ) -> Tensor:
        total = points.new_zeros(())
        for_points = torch.zeros_like(points) if with_gradient and ctx.needs_input_grad[0] else None
        for_directions: list[Tensor] = []
        with without_autocast(points.device):
            for chunk in directions.split(chunk_size, dim=1):
                projections = points @ chunk
                if not with_gradient:
                    total += univariate(projections).sum()
                    continue
                with torch.enable_grad():
                    value = univariate(projections.requires_grad_()).sum()
                    (slope,) = torch.autograd.grad(value, projections)
                total += value.detach()
                if for_points is not None:
                    for_points += slope @ chunk.T
                if ctx.needs_input_grad[1]:
                    for_directions.append(points.flatten(0, -2).T @ slope.flatten(0, -2))
        ctx.save_for_backward(for_points, torch.cat(for_directions, 1) if for_directions else None)
        return total

    @staticmethod
    @first_order_only("sliced_statistic")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # The walk took the statistic's own weight as 1 on every process; here the processes' weights meet.
        gradient = all_reduce_mean(gradient)
        for_points, for_directions = (None if g is None else gradient * g for g in ctx.saved_tensors)
        return for_points, for_directions, None, None, None


class _CharacteristicSums(torch.autograd.Function):
    """Sums over samples of cos(t x) and sin(t x) at t = step, 2 step, ...: (2, steps, ..., slices).

    Saves its input alone and walks the knots twice, so that no tensor with a dimension for the knots exists.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float, steps: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.step, ctx.steps = step, steps
        sums = x.new_empty(2, steps, *x.shape[:-2], x.shape[-1])
        for knot, (cosine, sine) in enumerate(_walk(x, step, steps)):
            sums[0, knot] = cosine.sum(-2)
            sums[1, knot] = sine.sum(-2)
        return sums

    @staticmethod
    @first_order_only("epps_pulley")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        slopes = gradient.unsqueeze(-2)
        total: Tensor | None = None
        for knot, (cosine, sine) in enumerate(_walk(x, ctx.step, ctx.steps)):
            t = ctx.step * (knot + 1)
            if total is None:
                total = (t * slopes[1, knot]) * cosine
            else:
                total.addcmul_(t * slopes[1, knot], cosine)
            total.addcmul_(-t * slopes[0, knot], sine)
        assert total is not None  # there is at least one knot
        return total, None, None


def _walk(x: Tensor, step: float, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos(t x) and sin(t x) at t = step, 2 step, ...; valid until the next one is asked for."""
    angle = x * step
    cosine, sine = angle.cos(), angle.sin()
    first_cosine, first_sine = cosine.clone(), sine.clone()
    spare = angle
    yield cosine, sine
    for _ in range(steps - 1):
        torch.mul(sine, first_sine, out=spare)
        sine.mul_(first_cosine).addcmul_(cosine, first_sine)
        cosine.mul_(first_cosine).sub_(spare)
        yield cosine, sine
