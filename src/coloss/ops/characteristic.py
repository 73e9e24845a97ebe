"""The work behind `epps_pulley` and `sliced_statistic`, as two PyTorch operators.

`torch.compile` takes an operator whole, and another kernel may serve it on another device (`register_kernel`). How sums and
slopes are found is told in `coloss.ops.frequencies`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import is_distributed
from .frequencies import parts
from .gradients import first_order_only
from .kernels import frequency_walk
from .precision import without_autocast

# Angles that are held between projection and gradient: 4 MiB in float32, which stay in the last cache.
_CHUNK_ENTRIES = 2**20


def default_chunk_size(slices: int, samples: int, dim: int) -> int:
    """Slices projected at once: angles of 2^20 entries (4 MiB), or an eighth of the embeddings where that is more.

    Args:
        slices: of all directions, >= 1.
        samples: rows of the embeddings, over all sets.
        dim: columns of the embeddings.

    Returns:
        A number in [1, slices]; all chunks are about equal.

    Examples:
        >>> (
        ...     default_chunk_size(1024, 2048, 512),
        ...     default_chunk_size(1024, 128, 16),
        ...     default_chunk_size(1000, 10**6, 64),
        ... )
        (512, 1024, 8)
    """
    most = max(_CHUNK_ENTRIES // max(samples, 1), dim // 8, 1)
    return math.ceil(slices / math.ceil(slices / most))


@torch.library.custom_op("coloss::epps_pulley", mutates_args=())
def column_statistic(x: Tensor, step: float, steps: int, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Epps-Pulley statistic of every column (*batch, samples, slices), and its slope at every sample.

    Args:
        x: float32 or float64.
        step: distance $h$ of the knots, > 0.
        steps: knots after the one at 0, >= 1.
        with_gradient: whether slopes are wanted.

    Returns:
        Values (*batch, slices), and slopes (*batch, slices, samples) or an empty tensor.
    """
    *batch, samples, slices = x.shape
    sets, joined = math.prod(batch), is_distributed()
    most = max(_CHUNK_ENTRIES // max(samples, 1), 1)
    with without_autocast(x.device):
        columns = x.reshape(sets, samples, slices).transpose(1, 2)
        walk = frequency_walk(x, samples, step, steps)
        sums = walk.new_sums(sets * slices)
        # Without slopes to keep, every chunk of angles takes the place of the one before.
        slopes = x.new_empty(sets if with_gradient else 0, slices, samples)
        spare = x.new_empty(0 if with_gradient else min(most, sets * slices), samples)
        for some_sets in parts(sets, max(most // max(slices, 1), 1)):
            for some in parts(slices, most):
                part = columns[some_sets, some]
                length = part.shape[0] * part.shape[1]
                angles = slopes[some_sets, some] if with_gradient else spare[:length].view(part.shape)
                torch.mul(part, step, out=angles)
                start = some_sets.start * slices + some.start
                walk.visit(
                    angles.view(length, samples),
                    sums[start : start + length],
                    slopes=with_gradient and not joined,
                )
        deviations, count = walk.deviations_of_all(sums)
        if with_gradient and joined:
            walk.put_slopes(slopes.view(sets * slices, samples), deviations)
        values = walk.values(deviations, count).reshape(*batch, slices)
    return values, slopes.view(*batch, slices, samples) if with_gradient else x.new_empty(0)


@torch.library.custom_op("coloss::sliced_epps_pulley", mutates_args=())
def sliced_total(
    points: Tensor,
    directions: Tensor,
    step: float,
    steps: int,
    chunk_size: int,
    for_points: bool,
    for_directions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Epps-Pulley statistic summed over the projections (*batch, samples, dim) @ (dim, slices), and its gradients.

    Over several processes all projections are made twice, with one exchange between: sums first, then gradients.

    Args:
        points: float32 or float64.
        directions: of the same type.
        step: distance $h$ of the knots, > 0.
        steps: knots after the one at 0, >= 1.
        chunk_size: slices projected at once, >= 1.
        for_points: whether the gradient with respect to `points` is wanted.
        for_directions: likewise for `directions`.

    Returns:
        The sum, and the two gradients, each an empty tensor where not wanted.
    """
    *batch, samples, dim = points.shape
    sets, slices = math.prod(batch), directions.shape[1]
    wanted, joined = for_points or for_directions, is_distributed()
    with without_autocast(points.device):
        rows = points.reshape(sets * samples, dim)
        walk = frequency_walk(points, samples, step, steps)
        sums = walk.new_sums(slices * sets)
        gradient = points.new_empty(rows.shape if for_points else 0)
        turned = directions.new_empty(directions.shape if for_directions else 0)
        spare = points.new_empty(min(chunk_size, slices), sets * samples)

        def project(some: slice) -> tuple[Tensor, Tensor, slice]:
            angles = torch.mm(directions[:, some].T * step, rows.T, out=spare[: some.stop - some.start])
            return (
                angles,
                angles.view(len(angles) * sets, samples),
                slice(some.start * sets, some.stop * sets),
            )

        def collect(some: slice, angles: Tensor) -> None:
            if for_points:
                # The first chunk overwrites.
                gradient.addmm_(angles.T, directions[:, some].T, beta=min(some.start, 1))
            if for_directions:
                turned[:, some] = (angles @ rows).T

        for some in parts(slices, chunk_size):
            angles, its_rows, here = project(some)
            walk.visit(its_rows, sums[here], slopes=wanted and not joined)
            if wanted and not joined:
                collect(some, angles)
        deviations, count = walk.deviations_of_all(sums)
        for some in parts(slices, chunk_size) if wanted and joined else ():
            angles, its_rows, here = project(some)
            walk.put_slopes(its_rows, deviations[here])
            collect(some, angles)
        total = walk.values(deviations, count).sum()
    return total, gradient.view(points.shape if for_points else 0), turned


@torch.library.custom_op("coloss::sum_over_processes", mutates_args=())
def _sum_over_processes(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@_sum_over_processes.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@column_statistic.register_fake
def _(x: Tensor, step: float, steps: int, with_gradient: bool) -> tuple[Tensor, Tensor]:
    *batch, samples, slices = x.shape
    slopes = x.new_empty(*batch, slices, samples) if with_gradient else x.new_empty(0)
    return x.new_empty(*batch, slices), slopes


@sliced_total.register_fake
def _(
    points: Tensor,
    directions: Tensor,
    step: float,
    steps: int,
    chunk_size: int,
    for_points: bool,
    for_directions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        points.new_empty(()),
        points.new_empty(points.shape if for_points else 0),
        directions.new_empty(directions.shape if for_directions else 0),
    )


def _weight_of_all(gradient: Tensor) -> Tensor:
    """What all processes together weigh the statistic they share with: see `coloss.ops.distributed`."""
    return _sum_over_processes(gradient) if is_distributed() else gradient


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


@first_order_only("epps_pulley")
def _scale_slopes(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (slopes,) = ctx.saved_tensors
    return (_weight_of_all(gradient).unsqueeze(-1) * slopes).transpose(-1, -2), None, None, None


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, for_points, for_directions = inputs
    ctx.save_for_backward(output[1] if for_points else None, output[2] if for_directions else None)
    ctx.set_materialize_grads(False)


@first_order_only("sliced_statistic")
def _scale_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight = _weight_of_all(gradient)
    for_points, for_directions = (None if g is None else weight * g for g in ctx.saved_tensors)
    return for_points, for_directions, None, None, None, None, None


def _through_first(backward: Callable[[Any, Tensor], Any], inputs: int) -> Callable[..., Any]:
    """Outputs after the first are gradients already, and pass none on; nor does a first that nobody used."""

    def from_first(ctx: Any, gradient: Tensor | None, *_: None) -> Any:
        return (None,) * inputs if gradient is None else backward(ctx, gradient)

    return from_first


column_statistic.register_autograd(_through_first(_scale_slopes, 4), setup_context=_keep_slopes)
sliced_total.register_autograd(_through_first(_scale_gradients, 7), setup_context=_keep_gradients)
