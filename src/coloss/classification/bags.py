"""Bags of samples whose labels are known as averages only: forming them, training on them, releasing them privately."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.ops import full_precision, segment_mean, segment_sizes


def random_bags(
    samples: int, bag_size: int, generator: torch.Generator | None = None
) -> Int[Tensor, " samples"]:
    """Bag of each sample: a random division into disjoint bags of equal size.

    What does not divide by `bag_size` goes to the first bags, one sample each, so that no bag is smaller. Bags drawn this
    way know nothing of inputs and labels, which the formulas and the privacy proof of this family assume.

    Args:
        samples: number of samples, >= `bag_size`.
        bag_size: samples in a bag, >= 1.
        generator: of the division.

    Returns:
        int64, a number in [0, samples // bag_size) for each sample.

    Raises:
        ValueError: if `bag_size` < 1 or there are fewer samples than one bag holds.

    Examples:
        >>> random_bags(7, 3, torch.Generator().manual_seed(0)).bincount()
        tensor([4, 3])
    """
    if bag_size < 1:
        raise ValueError(f"bag_size must be >= 1, got {bag_size}")
    if samples < bag_size:
        raise ValueError(f"samples must be at least one bag of {bag_size}, got {samples}")
    bags = torch.arange(samples) % (samples // bag_size)
    return bags[torch.randperm(samples, generator=generator)]


def bag_dataset(
    inputs: Any,
    bag_targets: Float[Tensor, "bags *outputs"],
    bag_index: Int[Tensor, " samples"],
    ids: Int[Tensor, " samples"] | None = None,
) -> IndexedDataset:
    """Data set whose samples carry their bag: what `AggregateSupervision` trains on.

    Args:
        inputs: tensor (samples, ...) or a tuple of such.
        bag_targets: average label of each bag; for classes, their proportions (bags, classes).
        bag_index: bag of each sample.
        ids: stable number of each sample; 0, 1, 2 ... by default.

    Returns:
        Samples whose target is the average of their bag, with the extras "bag" and "bag_size".

    Raises:
        ValueError: if the lengths differ, or an index names no bag.

    Examples:
        >>> data = bag_dataset(torch.zeros(4, 2), torch.tensor([0.5, 2.0]), torch.tensor([0, 1, 1, 0]))
        >>> data.targets, data.extras["bag_size"]
        (tensor([0.5000, 2.0000, 2.0000, 0.5000]), tensor([2, 2, 2, 2]))
    """
    sizes = segment_sizes(bag_index, len(bag_targets))
    extras = {"bag": bag_index, "bag_size": sizes[bag_index]}
    return IndexedDataset(inputs, bag_targets[bag_index], ids, extras)


class BagSampler:
    """Batches of whole bags, in a new order each epoch: a bag that is cut in two has no known average.

    Args:
        bag_index: bag of each sample.
        bags_per_batch: >= 1.
        drop_last: leave out the last batch if it has fewer bags.

    Raises:
        ValueError: if there is no sample, `bags_per_batch` < 1, or there are too few bags for one batch with `drop_last`.

    Examples:
        >>> bags = torch.tensor([2, 0, 2, 0, 1])
        >>> batches = list(BagSampler(bags, 2).batches(torch.Generator().manual_seed(0)))
        >>> [sorted(bags[rows].tolist()) for rows in batches]
        [[0, 0, 2, 2], [1]]
    """

    def __init__(
        self, bag_index: Int[Tensor, " samples"], bags_per_batch: int, drop_last: bool = False
    ) -> None:
        if bags_per_batch < 1:
            raise ValueError(f"bags_per_batch must be >= 1, got {bags_per_batch}")
        self.members = bag_members(bag_index)
        if drop_last and len(self.members) < bags_per_batch:
            raise ValueError(
                f"bags_per_batch must be <= {len(self.members)} bags with drop_last, got {bags_per_batch}"
            )
        self.bags_per_batch, self.drop_last = bags_per_batch, drop_last

    def __len__(self) -> int:
        full, rest = divmod(len(self.members), self.bags_per_batch)
        return full + (rest > 0 and not self.drop_last)

    def batches(self, generator: torch.Generator) -> Iterator[Int[Tensor, " rows"]]:
        """Positions of each batch of one epoch, bag by bag."""
        order = torch.randperm(len(self.members), generator=generator)
        for bags in order.split(self.bags_per_batch)[: len(self)]:
            yield torch.cat([self.members[bag] for bag in bags.tolist()])


def bag_members(bag_index: Int[Tensor, " samples"]) -> list[Tensor]:
    """Positions of the samples of each bag that has any, in the order of bags.

    Raises:
        ValueError: if there is no sample.

    Examples:
        >>> bag_members(torch.tensor([7, 3, 7]))
        [tensor([1]), tensor([0, 2])]
    """
    if bag_index.numel() == 0:
        raise ValueError("bag_index must name the bag of at least one sample, got none")
    counts = bag_index.cpu().unique(return_counts=True)[1]
    return list(bag_index.cpu().argsort(stable=True).split(counts.tolist()))


class LaplaceBagRelease:
    r"""Releases averages over random bags under label differential privacy, and keeps count of what that spends.

    Labels are clipped to $[-C, C]$, divided into disjoint random bags, averaged, and Laplace noise of scale $2C/(k\epsilon)$
    is added to the average of a bag of $k$. Replacing one label moves one average by at most $2C/k$, and bags are disjoint,
    so the release is $\epsilon$-label-DP; whatever is trained on it is post-processing. Class labels are released as
    proportions: one changed label moves two of them by $1/k$, so each gets noise of scale $2/(k\epsilon)$.

    The guarantee is for replacing the label of one person with one row; features and bags count as public. Each call draws
    new bags and spends $\epsilon$ again (basic composition), so a second call is refused unless `total_epsilon` allows it:
    bag once, not in every epoch. This sampler is for research: noise in floating point can be attacked through its last
    digits, and a deployment should take a hardened mechanism.

    Args:
        epsilon: $\epsilon > 0$, spent by one release.
        bag_size: $k \ge 1$; leftover samples make some bags one larger, with less noise.
        clip: $C > 0$, for numeric labels; must not be chosen by looking at the labels.
        num_classes: >= 2, for class labels, in place of `clip`.
        total_epsilon: what all releases of this object may spend together; default: one release.
        project: move noisy proportions to the nearest ones that are >= 0 and sum to 1.
        generator: of bags and noise.

    Attributes:
        spent_epsilon: what the releases so far have spent.

    Raises:
        InputError: for values out of range, if not exactly one of `clip` and `num_classes` is given, for labels that do not
            fit, and for a release beyond `total_epsilon`.

    Source:
        Javanmard et al. 2024, arXiv 2401.11081; the constants are derived here from the standard Laplace mechanism.

    Examples:
        >>> release = LaplaceBagRelease(1.0, 50, clip=2.0, generator=torch.Generator().manual_seed(0))
        >>> bag_targets, bag_index = release(torch.ones(1000))
        >>> bag_targets.shape, bool((bag_targets - 1).abs().mean() < 0.2), release.spent_epsilon
        (torch.Size([20]), True, 1.0)
    """

    def __init__(
        self,
        epsilon: float,
        bag_size: int,
        *,
        clip: float | None = None,
        num_classes: int | None = None,
        total_epsilon: float | None = None,
        project: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < epsilon < math.inf:
            raise InputError(f"epsilon must be > 0 and finite, got {epsilon}")
        if bag_size < 1:
            raise InputError(f"bag_size must be >= 1, got {bag_size}")
        if (clip is None) == (num_classes is None):
            raise InputError(f"give either clip or num_classes, got {clip} and {num_classes}")
        if clip is not None and not 0 < clip < math.inf:
            raise InputError(f"clip must be > 0 and finite, got {clip}")
        if num_classes is not None and num_classes < 2:
            raise InputError(f"num_classes must be >= 2, got {num_classes}")
        self.epsilon, self.bag_size, self.clip, self.num_classes = epsilon, bag_size, clip, num_classes
        self.total_epsilon = epsilon if total_epsilon is None else total_epsilon
        if not epsilon <= self.total_epsilon < math.inf:
            raise InputError(f"total_epsilon must be >= epsilon ({epsilon}), got {total_epsilon}")
        self.project, self.generator = project, generator
        self.spent_epsilon = 0.0

    def noise_scale(self, bag_size: int | None = None) -> float:
        """Scale $2C/(k\\epsilon)$ of the Laplace noise on the average of a bag; its variance is twice the square."""
        size = self.bag_size if bag_size is None else bag_size
        return 2 * (1.0 if self.clip is None else self.clip) / (size * self.epsilon)

    def __call__(
        self, labels: Shaped[Tensor, " samples"]
    ) -> tuple[Float[Tensor, "bags *classes"], Int[Tensor, " samples"]]:
        """Noisy averages (proportions, for classes) and the bag of each sample."""
        # A share of an epsilon is forgiven, so that ten tenths make a whole.
        if self.spent_epsilon + self.epsilon > self.total_epsilon * (1 + 1e-9):
            raise InputError(
                f"total_epsilon is {self.total_epsilon}, {self.spent_epsilon} of it is spent, and a release costs "
                f"{self.epsilon}: use what was released, or raise total_epsilon knowingly"
            )
        values = self._values(labels)
        bags = random_bags(len(values), self.bag_size, self.generator).to(values.device)
        means = segment_mean(values, bags)
        sizes = segment_sizes(bags).to(means.dtype).view(-1, *[1] * (means.ndim - 1))
        scale = self.noise_scale(1) / sizes
        # The difference of two exponential variables is a Laplace variable.
        draws = torch.empty(2, *means.shape, dtype=torch.float64).exponential_(generator=self.generator)
        released = means + (draws[0] - draws[1]).to(means) * scale
        self.spent_epsilon += self.epsilon
        if self.num_classes is not None and self.project:
            released = nearest_proportions(released)
        return released, bags

    def _values(self, labels: Tensor) -> Tensor:
        if self.num_classes is None:
            if not labels.isfinite().all():
                raise InputError("labels must be finite, got NaN or infinity")
            assert self.clip is not None
            numbers = labels if labels.is_floating_point() else labels.to(torch.get_default_dtype())
            return full_precision(numbers).clamp(-self.clip, self.clip)
        if labels.is_floating_point() or (
            labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
        ):
            raise InputError(f"labels must be whole numbers in [0, {self.num_classes}) classes")
        one_hot = torch.nn.functional.one_hot(labels.long(), self.num_classes)
        return one_hot.to(torch.get_default_dtype())


def nearest_proportions(values: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    r"""Closest point, in squared distance, whose entries are >= 0 and sum to 1.

    $\max(v - \tau, 0)$ with the one $\tau$ that makes it sum to 1, found by sorting.

    Args:
        values: any finite numbers, classes in the last dimension.

    Returns:
        Proportions, in the same shape, at least float32.

    Source:
        Held, Wolfe, Crowder 1974, Validation of subgradient optimization.

    Examples:
        >>> nearest_proportions(torch.tensor([[0.5, 0.5, -1.0], [2.0, 0.0, 0.0]]))
        tensor([[0.5000, 0.5000, 0.0000],
                [1.0000, 0.0000, 0.0000]])
    """
    values = full_precision(values)
    ordered = values.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    counts = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype)
    last = (ordered * counts > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, last - 1) / last
    return (values - threshold).clamp(min=0)
