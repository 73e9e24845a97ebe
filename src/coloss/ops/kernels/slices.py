r"""Kernels for the sliced Epps-Pulley statistic: sums of cosines and sines of rows of angles, and the slope at every angle.

Each angle costs one cosine and one sine; those of its multiples follow by rotation, $e^{i (k + 1) a} = e^{i k a} e^{i a}$, in
registers, with an error of about $10^{-7} k$. Angles are read twice, and slopes written in their place. Each program writes partial
sums of its own, which PyTorch adds: no atomic operation, so that a result is the same each time,
for the same block size.

Checked in Triton's interpreter only, and compiled; never yet run on a GPU.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import is_distributed
from ..frequencies import FrequencyWalk
from .compiler import kernel, power_of_two, tl

# Samples whose sums one program takes, block by block; a multiple of every block.
_SPAN = 8192


@kernel(
    ["STEPS"],
    ({"BLOCK": 512}, 1, 1),
    ({"BLOCK": 256}, 1, 1),
    ({"BLOCK": 1024}, 4, 1),
    ({"BLOCK": 2048}, 4, 1),
)
@no_type_check
def _sums_kernel(
    angles, sums, samples, SPAN: tl.constexpr, STEPS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of cosines, then of sines, of the first multiples of a span of a row of angles: (rows, spans, 2 STEPS)."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN
    knots = tl.arange(0, PADDED)
    cosines, sines = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
    for start in range(first, tl.minimum(first + SPAN, samples), BLOCK):
        at = start + tl.arange(0, BLOCK)
        angle = tl.load(angles + row * samples + at, at < samples, 0.0)
        cosine, sine = tl.cos(angle), tl.sin(angle)
        # What is not there stays 0 under all rotations.
        real, imaginary = tl.where(at < samples, cosine, 0.0), sine
        for knot in tl.static_range(STEPS):
            cosines += tl.where(knots == knot, tl.sum(real, 0), 0.0)
            sines += tl.where(knots == knot, tl.sum(imaginary, 0), 0.0)
            real, imaginary = real * cosine - imaginary * sine, imaginary * cosine + real * sine
    place = sums + (row * tl.num_programs(1) + tl.program_id(1)) * (2 * STEPS) + knots
    tl.store(place, cosines, knots < STEPS)
    tl.store(place + STEPS, sines, knots < STEPS)


# One choice only: to try others would run them on slopes that have taken the place of the angles.
@kernel([], ({"BLOCK": 512}, 4, 1))
@no_type_check
def _slopes_kernel(
    angles, coefficients, slopes, samples, STEPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Trigonometric polynomials in the angles of a row, with its coefficients (rows, 2 STEPS) of sines, then of cosines."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    angle = tl.load(angles + row * samples + at, at < samples, 0.0)
    cosine, sine = tl.cos(angle), tl.sin(angle)
    real, imaginary = cosine, sine
    slope = tl.zeros([BLOCK], tl.float32)
    its_own = coefficients + row * (2 * STEPS)
    for knot in tl.static_range(STEPS):
        slope += tl.load(its_own + knot) * imaginary + tl.load(its_own + STEPS + knot) * real
        real, imaginary = real * cosine - imaginary * sine, imaginary * cosine + real * sine
    tl.store(slopes + row * samples + at, slope, at < samples)


class KernelWalk(FrequencyWalk):
    """Sums and slopes of rows of angles; sums are those at the knots themselves, and the number of samples after them."""

    def __init__(self, like: Tensor, samples: int, step: float, steps: int) -> None:
        super().__init__(like, samples, step, steps)
        self._steps = steps
        knots = step * torch.arange(1, steps + 1, dtype=torch.float64)
        signs = torch.cat([-knots, knots]).to(like)
        self._slope_weight = 2 * self._weight * signs

    def new_sums(self, rows: int) -> Tensor:
        """Zeros for the sums of so many rows."""
        return self._like.new_zeros(rows, 2 * self._steps + 1)

    def visit(self, angles: Tensor, sums: Tensor, slopes: bool) -> None:
        """Add up cosines and sines of rows of angles, and put slopes in the place of these where the samples here are all."""
        rows, spans = len(angles), math.ceil(self._samples / _SPAN)
        partial = angles.new_empty(rows, spans, 2 * self._steps)
        if partial.numel():
            padded = power_of_two(2, 64, self._steps)
            with torch.cuda.device_of(angles):
                _sums_kernel[(rows, spans)](
                    angles, partial, self._samples, SPAN=_SPAN, STEPS=self._steps, PADDED=padded
                )
        sums[:, :-1] += partial.sum(1)
        sums[:, -1] += self._samples
        if slopes:
            self.put_slopes(angles, self._deviations(sums))

    def put_slopes(self, angles: Tensor, deviations: Tensor) -> None:
        """Put the gradient of the statistic in the place of the angles."""
        if not angles.numel():
            return
        coefficients = deviations * self._slope_weight
        with torch.cuda.device_of(angles):
            _slopes_kernel[lambda sizes: (len(angles), math.ceil(self._samples / sizes["BLOCK"]))](
                angles, coefficients, angles, self._samples, STEPS=self._steps
            )

    def deviations_of_all(self, sums: Tensor) -> tuple[Tensor, Tensor | int]:
        """Empirical minus normal characteristic function at the knots, and the number of samples, of all processes."""
        if not is_distributed():
            return self._deviations(sums), self._samples
        dist.all_reduce(sums)
        count = sums[:, -1:]
        return self._deviations(sums / count.clamp(min=1), share=1.0), count.flatten()

    def _deviations(self, sums: Tensor, share: float | None = None) -> Tensor:
        return sums[:, :-1] * (1 / max(self._samples, 1) if share is None else share) - self._normal
