r"""Counts, means and squared deviations by class, gathered in one pass: batch by batch, machine by machine.

Two sets of samples a and b of one class join exactly (Chan, Golub, LeVeque 1979):

    N = N_a + N_b        mean = mean_a + (mean_b - mean_a) N_b / N        M = M_a + M_b + (mean_b - mean_a)^2 N_a N_b / N

with M the sum of squared deviations from the mean. Joining is associative and commutative, so any cut into batches, in any
order, over any number of processes gives the same moments up to rounding. Deviations are taken from the mean before they are
squared, in float64: a large mean costs no digits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from .distributed import is_distributed
from .precision import accumulation_dtype


@dataclass(frozen=True, eq=False)
class RunningMoments:
    """Count, mean and sum of squared deviations of each feature in each class; immutable.

    Args:
        count: samples of each class, int64 (classes).
        mean: of each feature in each class, float64 (classes, features); 0 for a class without samples.
        squares: sums of squared deviations from the mean, like `mean`.

    Examples:
        >>> features, classes = torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([0, 0, 1])
        >>> moments = RunningMoments.of(features, classes, num_classes=3)
        >>> moments.count.tolist(), moments.mean.flatten().tolist(), moments.variance()[0].tolist()
        ([2, 1, 0], [2.0, 10.0, 0.0], [1.0])
        >>> moments.merge(RunningMoments.of(features + 1, classes, 3)).mean.flatten().tolist()
        [2.5, 10.5, 0.0]
    """

    count: Int[Tensor, " classes"]
    mean: Float[Tensor, "classes features"]
    squares: Float[Tensor, "classes features"]

    @classmethod
    def empty(
        cls, num_classes: int, num_features: int, device: torch.device | str = "cpu"
    ) -> "RunningMoments":
        """Moments of no sample.

        Raises:
            ValueError: if a number is below 1.

        Examples:
            >>> RunningMoments.empty(2, 3).count.tolist()
            [0, 0]
        """
        for name, value in (("num_classes", num_classes), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        zeros = torch.zeros(
            num_classes, num_features, dtype=accumulation_dtype(torch.device(device)), device=device
        )
        return cls(torch.zeros(num_classes, dtype=torch.int64, device=device), zeros, zeros.clone())

    @classmethod
    @torch.no_grad()
    def of(
        cls, features: Float[Tensor, "samples features"], classes: Int[Tensor, " samples"], num_classes: int
    ) -> "RunningMoments":
        """Moments of a batch.

        Args:
            features: one row for each sample, any float type; may be empty.
            classes: class of each sample, in [0, num_classes).
            num_classes: number of classes.

        Raises:
            ValueError: for a class out of range, or rows that do not match.
        """
        if features.ndim != 2 or classes.shape != features.shape[:1]:
            raise ValueError(
                f"features must be (samples, features) and classes (samples), got {tuple(features.shape)} and "
                f"{tuple(classes.shape)}"
            )
        found = cls.empty(num_classes, features.shape[1], features.device)
        if len(classes) == 0:
            return found
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"classes must be in [0, {num_classes}), got {low if low < 0 else high}")
        wide = features.to(found.mean.dtype)
        count = torch.bincount(classes, minlength=num_classes)
        mean = found.mean.index_add(0, classes, wide) / count.clamp(min=1)[:, None]
        centred = wide - mean[classes]
        # The rounding of the mean is taken out as well.
        rest = found.mean.index_add(0, classes, centred)
        squares = found.squares.index_add(0, classes, centred.square())
        squares = (squares - rest.square() / count.clamp(min=1)[:, None]).clamp(min=0)
        return cls(count, mean, squares)

    @property
    def num_classes(self) -> int:
        """Number of classes, those without samples included."""
        return len(self.count)

    @property
    def num_features(self) -> int:
        """Number of features."""
        return self.mean.shape[1]

    @torch.no_grad()
    def merge(self, other: "RunningMoments") -> "RunningMoments":
        """Moments of the samples of both.

        Raises:
            ValueError: if the two differ in classes or features.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments must have {tuple(self.mean.shape)} classes and features, got {tuple(other.mean.shape)}"
            )
        count = self.count + other.count
        share = (other.count.to(self.mean.dtype) / count.clamp(min=1))[:, None]
        gap = other.mean.to(self.mean) - self.mean
        between = gap.square() * (share * self.count[:, None])
        return RunningMoments(
            count, self.mean + gap * share, self.squares + other.squares.to(self.squares) + between
        )

    def update(
        self, features: Float[Tensor, "samples features"], classes: Int[Tensor, " samples"]
    ) -> "RunningMoments":
        """Moments of these samples and a further batch.

        Examples:
            >>> start = RunningMoments.empty(2, 1)
            >>> start.update(torch.tensor([[4.0]]), torch.tensor([1])).mean.flatten().tolist()
            [0.0, 4.0]
        """
        return self.merge(RunningMoments.of(features, classes, self.num_classes))

    @torch.no_grad()
    def all_reduce(self) -> "RunningMoments":
        """Moments of the samples of all processes, the same on each; these themselves on one process.

        Cost:
            Two collectives of (classes, features) and one of (classes).
        """
        if not is_distributed():
            return self
        count, total = self.count.clone(), self.mean * self.count[:, None]
        dist.all_reduce(count)
        dist.all_reduce(total)
        mean = total / count.clamp(min=1)[:, None]
        squares = self.squares + (self.mean - mean).square() * self.count[:, None]
        dist.all_reduce(squares)
        return RunningMoments(count, mean, squares)

    def variance(self, correction: int = 0) -> Float[Tensor, "classes features"]:
        """Variance of each feature in each class: squares / (count - correction); 0 where that has no samples.

        Args:
            correction: 0 for the population's variance, 1 for the unbiased one.
        """
        divisor = (self.count - correction)[:, None]
        return torch.where(divisor > 0, self.squares / divisor.clamp(min=1), 0.0)

    def pooled_variance(self, unbiased: bool = False) -> Float[Tensor, " features"]:
        """Variance of each feature around the mean of its own class, over all samples.

        Args:
            unbiased: divide by samples minus classes that have some, in place of samples; then by 1 at least.

        Raises:
            ValueError: if there is no sample.
        """
        samples = int(self.count.sum())
        if samples == 0:
            raise ValueError("moments must hold at least one sample, got none")
        present = int((self.count > 0).sum())
        return self.squares.sum(0) / (max(samples - present, 1) if unbiased else samples)

    def overall(self) -> "RunningMoments":
        """Moments of all samples as one class.

        Examples:
            >>> moments = RunningMoments.of(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), 2)
            >>> moments.overall().variance().item()
            1.0
        """
        found = RunningMoments.empty(1, self.num_features, self.mean.device)
        # One class after the other: their number is small beside that of the samples.
        for number in range(self.num_classes):
            rows = slice(number, number + 1)
            found = found.merge(RunningMoments(self.count[rows], self.mean[rows], self.squares[rows]))
        return found
