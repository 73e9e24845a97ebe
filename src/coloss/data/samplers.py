"""Which samples make a batch: balanced over classes, a few samples of each of a few classes, few-shot episodes, one task at a time.

A sampler is anything with `batches(generator)`, an iterator over int64 tensors of positions, and `__len__`, the number of batches in an
epoch; `Loader(sampler=...)` takes it.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@runtime_checkable
class Sampler(Protocol):
    """Draws the positions of each batch of an epoch, from a generator alone."""

    def batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Positions of each batch."""
        ...

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        ...


class ClassBalancedSampler:
    """Batches in which each class appears equally often, however rare it is in the data.

    Each batch holds every class floor(batch_size / classes) times and a random choice of classes once more. The samples of a class
    come in random order without repeats until all were seen, then in a new order: rare classes repeat within an epoch, of frequent
    ones a part is left out.

    Args:
        targets: class of each sample; any integers.
        batch_size: >= 1.

    Raises:
        ValueError: if there are no targets, or `batch_size` < 1.

    Examples:
        >>> sampler = ClassBalancedSampler(torch.tensor([0] * 9 + [1]), batch_size=4)
        >>> batches = list(sampler.batches(torch.Generator().manual_seed(0)))
        >>> len(batches), [int((batch == 9).sum()) for batch in batches]
        (3, [2, 2, 2])
    """

    def __init__(self, targets: Int[Tensor, " samples"], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self._members = _members(targets)
        self.batch_size = batch_size
        self._count = -(-targets.numel() // batch_size)

    def __len__(self) -> int:
        return self._count

    def batches(self, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
        """Positions of each batch of one epoch."""
        classes = len(self._members)
        repeats = -(-self.batch_size // classes)
        shuffled_classes = torch.rand(self._count, classes, generator=generator).argsort(dim=1)
        drawn_classes = shuffled_classes.repeat(1, repeats)[:, : self.batch_size]
        positions = torch.empty_like(drawn_classes)
        for number, members in enumerate(self._members):
            wanted = drawn_classes == number
            count = int(wanted.sum())
            rounds = [_shuffled(members, generator) for _ in range(-(-count // len(members)))]
            if rounds:
                positions[wanted] = torch.cat(rounds)[:count]
        return iter(positions.unbind(0))


class MPerClassSampler:
    """Batches of a few classes with the same number of samples of each, as pair and triplet losses want.

    Samples of one class stand next to each other. They are distinct unless the class has fewer than `samples_per_class`, which then
    repeat.

    Args:
        targets: class of each sample; any integers.
        classes_per_batch: distinct classes in a batch, >= 1 and at most the number of classes.
        samples_per_class: >= 1.

    Raises:
        ValueError: for values out of range.

    Examples:
        >>> targets = torch.arange(5).repeat_interleave(4)
        >>> sampler = MPerClassSampler(targets, classes_per_batch=2, samples_per_class=3)
        >>> batch = next(sampler.batches(torch.Generator().manual_seed(0)))
        >>> targets[batch].unique(return_counts=True)[1]
        tensor([3, 3])
    """

    def __init__(
        self, targets: Int[Tensor, " samples"], classes_per_batch: int, samples_per_class: int
    ) -> None:
        self._members = _members(targets)
        if not 1 <= classes_per_batch <= len(self._members):
            raise ValueError(
                f"classes_per_batch must be in [1, {len(self._members)} classes], got {classes_per_batch}"
            )
        if samples_per_class < 1:
            raise ValueError(f"samples_per_class must be >= 1, got {samples_per_class}")
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self._count = max(1, targets.numel() // (classes_per_batch * samples_per_class))

    def __len__(self) -> int:
        return self._count

    def batches(self, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
        """Positions of each batch of one epoch, class by class."""
        drawn = torch.rand(self._count, len(self._members), generator=generator).argsort(dim=1)[
            :, : self.classes_per_batch
        ]
        positions = torch.empty(*drawn.shape, self.samples_per_class, dtype=torch.int64)
        for number, members in enumerate(self._members):
            wanted = drawn == number
            positions[wanted] = self._groups(members, int(wanted.sum()), generator)
        return iter(positions.flatten(1).unbind(0))

    def _groups(self, members: Tensor, count: int, generator: torch.Generator) -> Tensor:
        size = self.samples_per_class
        groups_in_round = max(1, len(members) // size)
        repeats = -(-size // len(members))
        rounds = [
            _shuffled(members, generator).repeat(repeats)[: groups_in_round * size].view(-1, size)
            for _ in range(-(-count // groups_in_round))
        ]
        return torch.cat(rounds)[:count] if rounds else members.new_empty(0, size)


class EpisodeSampler:
    """Few-shot episodes: for each of a few random classes, support samples to learn from and queries to be scored on.

    A batch lists the samples class by class, the support samples of a class before its queries; `parts` tells them apart.

    Args:
        targets: class of each sample; any integers. Classes with fewer than `shots + queries` samples are never drawn.
        ways: classes in an episode, >= 1.
        shots: support samples of each class, >= 1.
        queries: query samples of each class, >= 0.
        episodes: batches in an epoch, >= 1.

    Raises:
        ValueError: for values out of range, or if fewer than `ways` classes have enough samples.

    Examples:
        >>> targets = torch.arange(6).repeat_interleave(5)
        >>> sampler = EpisodeSampler(targets, ways=3, shots=1, queries=2, episodes=10)
        >>> batch = next(sampler.batches(torch.Generator().manual_seed(0)))
        >>> support, query_set = sampler.parts(targets[batch])
        >>> len(support), bool((query_set == support.repeat_interleave(2)).all())
        (3, True)
    """

    def __init__(
        self, targets: Int[Tensor, " samples"], ways: int, shots: int, queries: int, episodes: int
    ) -> None:
        for name, value, least in [
            ("ways", ways, 1),
            ("shots", shots, 1),
            ("queries", queries, 0),
            ("episodes", episodes, 1),
        ]:
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self._members = [members for members in _members(targets) if len(members) >= shots + queries]
        if len(self._members) < ways:
            raise ValueError(
                f"ways must be at most the number of classes with {shots + queries} samples or more, which is "
                f"{len(self._members)}, got {ways}"
            )
        self.ways, self.shots, self.queries, self.episodes = ways, shots, queries, episodes

    def __len__(self) -> int:
        return self.episodes

    def batches(self, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
        """Positions of each episode."""
        size = self.shots + self.queries
        for _ in range(self.episodes):
            drawn = torch.randperm(len(self._members), generator=generator)[: self.ways]
            yield torch.cat([_shuffled(self._members[number], generator)[:size] for number in drawn.tolist()])

    def parts(
        self, values: Shaped[Tensor, "batch ..."]
    ) -> tuple[Shaped[Tensor, "support ..."], Shaped[Tensor, "query ..."]]:
        """Support and query rows of anything that has one row for each sample of an episode.

        Returns:
            (ways * shots, ...) and (ways * queries, ...), class by class; the class within the episode is
            `torch.arange(ways).repeat_interleave(shots)` and `torch.arange(ways).repeat_interleave(queries)`.
        """
        if values.shape[0] != self.ways * (self.shots + self.queries):
            raise ValueError(
                f"values must have ways * (shots + queries) = {self.ways * (self.shots + self.queries)} rows, "
                f"got {values.shape[0]}"
            )
        rows = values.unflatten(0, (self.ways, self.shots + self.queries))
        return rows[:, : self.shots].flatten(0, 1), rows[:, self.shots :].flatten(0, 1)


class SingleTaskSampler:
    """Batches that each come from one of several sets laid end to end, all in random order: one task at a time, in proportion to its size.

    Positions 0 .. lengths[0] - 1 are the first set, the next lengths[1] the second, and so on. What does not fill a batch of its set is
    left out of an epoch.

    Args:
        lengths: samples of each set, each at least its batch size.
        batch_sizes: of each set, or one for all; >= 1.

    Raises:
        ValueError: for values out of range, or a set smaller than its batch: it would never be seen.

    Source: CoDiEmb, 2025, arXiv 2508.11442.

    Examples:
        >>> sampler = SingleTaskSampler([6, 4], batch_sizes=[3, 2])
        >>> batches = list(sampler.batches(torch.Generator().manual_seed(0)))
        >>> sorted((len(batch), bool((batch < 6).all())) for batch in batches)
        [(2, False), (2, False), (3, True), (3, True)]
    """

    def __init__(self, lengths: Sequence[int], batch_sizes: int | Sequence[int]) -> None:
        sizes = [batch_sizes] * len(lengths) if isinstance(batch_sizes, int) else list(batch_sizes)
        if not lengths or len(sizes) != len(lengths):
            raise ValueError(
                f"batch_sizes must be one for each of at least one set, got {len(sizes)} for {len(lengths)}"
            )
        for number, (length, size) in enumerate(zip(lengths, sizes)):
            if not 1 <= size <= length:
                raise ValueError(f"batch_sizes must be in [1, {length}] for set {number}, got {size}")
        self.lengths, self.batch_sizes = tuple(lengths), tuple(sizes)

    def __len__(self) -> int:
        return sum(length // size for length, size in zip(self.lengths, self.batch_sizes))

    def batches(self, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
        """Positions of each batch of one epoch."""
        found: list[Tensor] = []
        start = 0
        for length, size in zip(self.lengths, self.batch_sizes):
            order = torch.randperm(length, generator=generator) + start
            found += order[: length - length % size].split(size)
            start += length
        return iter([found[i] for i in torch.randperm(len(found), generator=generator).tolist()])


def _members(targets: Tensor) -> list[Tensor]:
    if targets.ndim != 1 or targets.numel() == 0:
        raise ValueError(f"targets must be one-dimensional and not empty, got shape {tuple(targets.shape)}")
    counts = targets.cpu().unique(return_counts=True)[1]
    return list(targets.cpu().argsort(stable=True).split(counts.tolist()))


def _shuffled(members: Tensor, generator: torch.Generator) -> Tensor:
    return members[torch.randperm(len(members), generator=generator)]
