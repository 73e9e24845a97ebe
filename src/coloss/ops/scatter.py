r"""Means by class and the one covariance that all classes share within, gathered in one pass: batch by batch, machine by machine.

Beside the moments of each feature (`RunningMoments`) this keeps the matrix that a linear discriminant and the geometry of classes need:

    W = sum over classes k, samples i of class k: (x_ki - mean_k) (x_ki - mean_k)^T

Two sets a and b join exactly: W = W_a + W_b + sum_k n_ak n_bk / (n_ak + n_bk) d_k d_k^T with d_k the gap between their means of class k.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from .distributed import is_distributed
from .moments import RunningMoments


@dataclass(frozen=True, eq=False)
class RunningScatter:
    """Class means, and the scatter of samples around the mean of their own class; immutable.

    Args:
        moments: count, mean and squared deviations of each feature in each class.
        within: W, float64 (features, features), summed over samples and classes.

    Cost:
        Memory O(classes * features + features^2), time O(features^2) a sample.

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
        >>> scatter = RunningScatter.of(features, torch.tensor([0, 0, 1]), num_classes=2)
        >>> scatter.within.tolist()
        [[2.0, 2.0], [2.0, 2.0]]
        >>> scatter.merge(scatter).within.tolist()
        [[4.0, 4.0], [4.0, 4.0]]
    """

    moments: RunningMoments
    within: Float[Tensor, "features features"]

    @classmethod
    def empty(
        cls, num_classes: int, num_features: int, device: torch.device | str = "cpu"
    ) -> "RunningScatter":
        """Scatter of no sample.

        Raises:
            ValueError: if a number is below 1.

        Examples:
            >>> RunningScatter.empty(2, 3).within.shape
            torch.Size([3, 3])
        """
        moments = RunningMoments.empty(num_classes, num_features, device)
        return cls(moments, moments.mean.new_zeros(num_features, num_features))

    @classmethod
    @torch.no_grad()
    def of(
        cls, features: Float[Tensor, "samples features"], classes: Int[Tensor, " samples"], num_classes: int
    ) -> "RunningScatter":
        """Scatter of a batch.

        Args:
            features: one row for each sample, any float type; may be empty.
            classes: class of each sample, in [0, num_classes).
            num_classes: number of classes.

        Raises:
            ValueError: for a class out of range, or rows that do not match.
        """
        moments = RunningMoments.of(features, classes, num_classes)
        centred = features.to(moments.mean.dtype) - moments.mean[classes]
        return cls(moments, centred.T @ centred)

    @torch.no_grad()
    def merge(self, other: "RunningScatter") -> "RunningScatter":
        """Scatter of the samples of both.

        Raises:
            ValueError: if the two differ in classes or features.
        """
        moments = self.moments.merge(other.moments)
        first, second = (part.moments.count.to(self.within) for part in (self, other))
        gap = other.moments.mean.to(self.within) - self.moments.mean
        share = first * second / (first + second).clamp(min=1)
        return RunningScatter(
            moments, self.within + other.within.to(self.within) + gap.T @ (share[:, None] * gap)
        )

    def update(
        self, features: Float[Tensor, "samples features"], classes: Int[Tensor, " samples"]
    ) -> "RunningScatter":
        """Scatter of these samples and a further batch.

        Examples:
            >>> start = RunningScatter.of(torch.tensor([[0.0]]), torch.tensor([0]), 1)
            >>> start.update(torch.tensor([[2.0]]), torch.tensor([0])).within.item()
            2.0
        """
        return self.merge(RunningScatter.of(features, classes, self.moments.num_classes))

    @torch.no_grad()
    def all_reduce(self) -> "RunningScatter":
        """Scatter of the samples of all processes, the same on each; itself on one process.

        Cost:
            Those of `RunningMoments.all_reduce`, and one collective of (features, features).
        """
        if not is_distributed():
            return self
        moments = self.moments.all_reduce()
        gap = self.moments.mean - moments.mean
        within = self.within + gap.T @ (self.moments.count[:, None] * gap)
        dist.all_reduce(within)
        return RunningScatter(moments, within)
