r"""Sums of cosines and sines of samples at evenly spaced frequencies, and trigonometric polynomials in every sample.

With $a_n = h x_n$ the statistic needs $\sum_n \cos k a_n$ and $\sum_n \sin k a_n$ for $k = 1 \dots K$, and its
gradient is a trigonometric polynomial of degree $K$ in every $a_n$. Neither takes $K$ steps. Frequencies are split into
small ones, $i \le B$, and multiples of the largest of these, $jB$, with $B \approx \sqrt K$; by $2 \cos jBa \cos ia =
\cos (jB + i)a + \cos (jB - i)a$ and its like for the sine, all sums are linear in those of the products $\cos jBa
\cdot \{\cos ia, \sin ia\}$, which one small matrix product for each column of samples gives. The gradient is the transpose
of the same map. So an element costs one cosine, one sine, about $3 B$ multiply-adds for the other $3 B$ factors
and two matrix products of $2K$ multiply-adds, for any $K$.

Factors are made from those of half their frequency, $\cos (k + m)a = \cos (k - m)a - 2 \sin ka \sin ma$ with $k - m$ 0 or 1,
each in one multiply-add. An error passes through $\log_2 K$ of these: in float32 and for 16 frequencies factors are off by
less than 2e-6 anywhere and 1e-7 near $a = 0$ and $\pi$, where the recurrence over $2 \cos a$ is off by 7e-6.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import is_distributed

# Angles of a block, whose factors are to stay in cache: for each thread of a processor (PyTorch gives one 2^15 entries or
# none), and on an accelerator.
_BLOCK_ENTRIES = 2**15
_BLOCK_ENTRIES_ON_ACCELERATOR = 2**22
# A block holds several rows, so that its matrix products can be shared among threads.
_LEAST_ROWS = 8


@dataclass(frozen=True)
class FrequencyMaps:
    """Linear maps between products of factors and frequencies, and the quadrature on these.

    Attributes:
        small: $B$, the number of small frequencies.
        large: the number of large ones, with 0.
        to_deviations: from means of products (small, large) to real parts, then imaginary parts, at all knots.
        normal: what is subtracted from these.
        weight: of their squares in the statistic.
        to_coefficients: from deviations to coefficients (large, small) of products in the slope.
    """

    small: int
    large: int
    to_deviations: np.ndarray
    normal: np.ndarray
    weight: np.ndarray
    to_coefficients: np.ndarray

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, step: float, steps: int) -> "FrequencyMaps":
        small = math.ceil(math.sqrt(steps))
        large = max(math.ceil(steps / small), 2)
        cosines = np.zeros((small * large + 1, 2 * small + 1, large))
        sines = np.zeros_like(cosines)
        cosines[0, -1, 1] = 1
        for frequency in range(1, small * large + 1):
            multiple, rest = divmod(frequency - 1, small)
            # Large factors stand in the order of their multiples but for the first two: see `Factors`.
            column = 1 - multiple if multiple < 2 else multiple
            mirror = 2 * multiple * small - frequency
            if multiple:
                cosines[frequency], sines[frequency] = -cosines[mirror], sines[mirror]
            sines[frequency, 2 * rest, column] += 2 if multiple else 1
            cosines[frequency, 2 * rest + 1, column] += 2 if multiple else 1
        cosines, sines = cosines[1 : steps + 1], sines[1 : steps + 1]
        knots = step * np.arange(1, steps + 1)
        normal = np.exp(-(knots**2) / 2)
        # The knot t = 0 is left out: both functions are 1 there. Weights are doubled for the negative half line.
        weight = 2 * step * normal
        weight[-1] /= 2
        slopes = np.concatenate([-sines, cosines]) * np.tile(2 * weight * knots, 2)[:, None, None]
        return cls(
            small,
            large,
            np.concatenate([cosines, sines]).reshape(2 * steps, -1).T,
            np.concatenate([normal, np.zeros(steps)]),
            np.tile(weight, 2),
            slopes.transpose(0, 2, 1).reshape(2 * steps, -1),
        )


class Factors:
    """Buffers for the factors of a block of angles, (rows, columns) at most, used again for every block.

    Of each row: sin a, cos a, ..., sin Ba, cos Ba, 1, cos 2Ba, cos 3Ba, ... The small factors are all up to the 1, the large ones
    all from cos Ba. The sum of the product of 1 and 1 is the number of samples.
    """

    def __init__(self, like: Tensor, rows: int, columns: int, small: int, large: int) -> None:
        self._small, self._large = small, large
        self._matrix = like.new_empty(rows, 2 * small + large - 1, columns)
        self._matrix[:, 2 * small] = 1
        self._spare = like.new_empty(rows * large * columns)
        self._scalars = like.new_zeros(()), like.new_ones(())
        self._prepared: dict[torch.Size, tuple[Any, ...]] = {}

    def fill(self, angles: Tensor) -> None:
        """Make all factors of these angles, each in one pass over the block."""
        if angles.shape not in self._prepared:
            self._prepared[angles.shape] = self._prepare(*angles.shape)
        (sine, cosine), ladder, self._products, self._outer = self._prepared[angles.shape]
        torch.sin(angles, out=sine)
        torch.cos(angles, out=cosine)
        for start, first, second, factor, result in ladder:
            torch.addcmul(start, first, second, value=factor, out=result)

    def add_products(self, sums: Tensor) -> None:
        """Add the sums over samples of all products, to (rows, small, large)."""
        small_ones, large_ones, _ = self._products
        sums.baddbmm_(small_ones, large_ones)

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        """The linear combination of all products with these coefficients, (rows, large, small)."""
        small_ones, _, polynomials = self._products
        torch.bmm(coefficients, small_ones, out=polynomials)
        (constant, first, factor), *others = self._outer
        torch.addcmul(constant, first, factor, out=out)
        for polynomial, factor in others:
            out.addcmul_(polynomial, factor)

    def _prepare(self, rows: int, columns: int) -> tuple[Any, ...]:
        """Views of the buffers for blocks of one shape, and the steps that fill them."""
        matrix = self._matrix[:rows, :, :columns]
        spare = self._spare[: rows * self._large * columns].view(rows, self._large, columns)
        small_ones, large_ones = matrix[:, : 2 * self._small + 1], matrix[:, 2 * self._small - 1 :]
        zero, one = self._scalars
        sines = [zero, *small_ones[:, :-1:2].unbind(1)]
        cosines = [one, *small_ones[:, 1::2].unbind(1)]
        first, _, *others = large_ones.unbind(1)
        # Sines of large frequencies are needed up to half of the largest, and only to climb.
        large_sines = [zero, sines[-1], *spare.unbind(1)][: self._large // 2 + 1]
        ladder = [*_ladder(cosines, sines), *_ladder([one, first, *others], large_sines)]
        inner_first, constant, *inner = spare.unbind(1)
        outer = [(constant, inner_first, first), *zip(inner, others)]
        return (sines[1], cosines[1]), ladder, (small_ones, large_ones.transpose(1, 2), spare), outer


def _ladder(
    cosines: list[Tensor], sines: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, int, Tensor]]:
    """Multiply-adds that make cosines and sines of 2, 3, ... times an angle from those of 0 and 1 times it."""
    for frequency in range(2, len(cosines)):
        low, odd = frequency // 2, frequency % 2
        if frequency < len(sines):
            yield sines[odd], cosines[low + odd], sines[low], 2, sines[frequency]
        yield cosines[odd], sines[low + odd], sines[low], -2, cosines[frequency]


class FrequencyWalk:
    """Sums and slopes of rows of angles, block by block of what stays in cache."""

    def __init__(self, like: Tensor, samples: int, step: float, steps: int) -> None:
        self._like, self._samples, self._maps = like, samples, FrequencyMaps.of(step, steps)
        on_cpu = like.device.type == "cpu"
        entries = _BLOCK_ENTRIES * torch.get_num_threads() if on_cpu else _BLOCK_ENTRIES_ON_ACCELERATOR
        self._most_rows = max(entries // max(samples, 1), _LEAST_ROWS)
        self._most_columns = max(min(samples, entries // self._most_rows), 1)
        self._factors: Factors | None = None
        self._rows = 0
        arrays = (self._maps.to_deviations, self._maps.normal, self._maps.weight, self._maps.to_coefficients)
        tensors = (torch.from_numpy(np.ascontiguousarray(array)).to(like) for array in arrays)
        self._to_deviations, self._normal, self._weight, self._to_coefficients = tensors

    def new_sums(self, rows: int) -> Tensor:
        """Zeros for the sums of products of so many rows: (rows, small, large)."""
        return self._like.new_zeros(rows, 2 * self._maps.small + 1, self._maps.large)

    def visit(self, angles: Tensor, sums: Tensor, slopes: bool) -> None:
        """Add up the products of rows of angles, and put slopes in the place of these where the samples here are all.

        Where a block holds whole rows, sums and slopes share its factors.
        """
        whole = self._samples <= self._most_columns
        for part, its_sums in zip(*self._blocks(angles, sums)):
            for angle in part.split(self._most_columns, 1):
                factors = self._filled(angle)
                factors.add_products(its_sums)
            if slopes and whole:
                factors.combine(self._coefficients(self._deviations(its_sums)), out=part)
        if slopes and not whole:
            self.put_slopes(angles, self._deviations(sums))

    def put_slopes(self, angles: Tensor, deviations: Tensor) -> None:
        """Put the gradient of the statistic in the place of the angles."""
        for part, its_deviations in zip(*self._blocks(angles, deviations)):
            coefficients = self._coefficients(its_deviations)
            for angle in part.split(self._most_columns, 1):
                self._filled(angle).combine(coefficients, out=angle)

    def deviations_of_all(self, sums: Tensor) -> tuple[Tensor, Tensor | int]:
        """Empirical minus normal characteristic function at the knots, and the number of samples, of all processes.

        Sums and counts are exchanged, not means: unequal batches weigh as they should.
        """
        if not is_distributed():
            return self._deviations(sums), self._samples
        dist.all_reduce(sums)
        count = sums[:, -1:, 1:2]
        return self._deviations(sums / count.clamp(min=1), share=1.0), count.flatten()

    def values(self, deviations: Tensor, count: Tensor | int) -> Tensor:
        """The statistic of every row."""
        return deviations.square() @ self._weight * count

    def _deviations(self, sums: Tensor, share: float | None = None) -> Tensor:
        share = 1 / max(self._samples, 1) if share is None else share
        return torch.addmm(self._normal, sums.flatten(1), self._to_deviations, beta=-1, alpha=share)

    def _coefficients(self, deviations: Tensor) -> Tensor:
        maps = self._maps
        return (deviations @ self._to_coefficients).view(len(deviations), maps.large, 2 * maps.small + 1)

    def _filled(self, angles: Tensor) -> Factors:
        if self._factors is None:
            maps = self._maps
            rows, columns = angles.shape
            self._factors = Factors(self._like, rows, columns, maps.small, maps.large)
        self._factors.fill(angles)
        return self._factors

    def _blocks(self, angles: Tensor, others: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # About equal blocks, and as those of the first chunk, for which the buffers were made.
        if self._rows == 0:
            self._rows = math.ceil(len(angles) / math.ceil(max(len(angles), 1) / self._most_rows))
        size = max(self._rows, 1)
        return angles.split(size), others.split(size)


def parts(length: int, most: int) -> Iterator[slice]:
    """Slices of [0, length), about equal and no longer than `most`, the longest first."""
    if length == 0:
        return
    size = math.ceil(length / math.ceil(length / most))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
