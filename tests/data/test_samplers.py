import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.data import ClassBalancedSampler, EpisodeSampler, MPerClassSampler

labels = st.lists(st.integers(-2, 4), min_size=1, max_size=40).map(torch.tensor)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)
@given(labels, st.integers(1, 12))
def test_balanced_batches_hold_each_class_equally_often(targets: torch.Tensor, size: int) -> None:
    sampler = ClassBalancedSampler(targets, size)
    batches = list(sampler.batches(_generator()))
    classes = targets.unique()
    assert len(batches) == len(sampler) == -(-len(targets) // size)
    for batch in batches:
        counts = (targets[batch].unsqueeze(0) == classes.unsqueeze(1)).sum(1)
        assert len(batch) == size and counts.max() - counts.min() <= 1


def test_balanced_batches_use_a_class_up_before_they_repeat_it() -> None:
    targets = torch.tensor([0] * 6 + [1] * 2)
    drawn = torch.cat(list(ClassBalancedSampler(targets, 4).batches(_generator())))
    assert drawn[targets[drawn] == 0].unique().numel() == 4  # 2 batches of 2: no repeat
    assert drawn[targets[drawn] == 1].sort().values.tolist() == [6, 6, 7, 7]


@settings(deadline=None)
@given(labels, st.integers(1, 4), st.data())
def test_m_per_class_batches(targets: torch.Tensor, samples: int, data: st.DataObject) -> None:
    classes = targets.unique()
    ways = data.draw(st.integers(1, len(classes)))
    sampler = MPerClassSampler(targets, ways, samples)
    batches = list(sampler.batches(_generator()))
    assert len(batches) == len(sampler) == max(1, len(targets) // (ways * samples))
    for batch in batches:
        groups = batch.view(ways, samples)
        found = targets[groups]
        assert (found == found[:, :1]).all() and found[:, 0].unique().numel() == ways
        for group, label in zip(groups, found[:, 0], strict=True):
            assert group.unique().numel() == min(samples, int((targets == label).sum()))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2))
def test_episodes(ways: int, shots: int, queries: int) -> None:
    targets = torch.tensor([0] * 9 + [1] + [2] * 5 + [3] * 4)
    sampler = EpisodeSampler(targets, ways, shots, queries, episodes=6)
    drawn = set()
    batches = list(sampler.batches(_generator()))
    assert len(batches) == len(sampler) == 6
    for batch in batches:
        assert batch.unique().numel() == len(batch) == ways * (shots + queries)
        support, query_set = sampler.parts(targets[batch])
        assert support.unique().numel() == ways
        assert torch.equal(query_set, support[::shots].repeat_interleave(queries))
        drawn |= set(support.tolist())
    if shots + queries > 1:
        assert 1 not in drawn


def test_draws_depend_on_the_generator_alone() -> None:
    targets = torch.arange(30) % 3
    for sampler in (
        ClassBalancedSampler(targets, 6),
        MPerClassSampler(targets, 2, 3),
        EpisodeSampler(targets, 2, 1, 2, 4),
    ):
        before = torch.get_rng_state()
        draws = [torch.stack(list(sampler.batches(_generator(seed)))) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda y: ClassBalancedSampler(y, 0), "batch_size must be >= 1, got 0"),
        (lambda y: ClassBalancedSampler(y[:0], 2), "not empty"),
        (lambda y: MPerClassSampler(y, 4, 1), r"classes_per_batch must be in \[1, 3 classes\], got 4"),
        (lambda y: MPerClassSampler(y, 2, 0), "samples_per_class must be >= 1, got 0"),
        (lambda y: EpisodeSampler(y, 2, 3, 3, 1), "classes with 6 samples or more, which is 0, got 2"),
        (lambda y: EpisodeSampler(y, 2, 0, 3, 1), "shots must be >= 1, got 0"),
        (lambda y: EpisodeSampler(y, 2, 1, -1, 1), "queries must be >= 0, got -1"),
        (lambda y: EpisodeSampler(y, 2, 1, 1, 1).parts(torch.zeros(3)), "= 4 rows, got 3"),
    ],
)
def test_refuses_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(torch.arange(12) % 3)
