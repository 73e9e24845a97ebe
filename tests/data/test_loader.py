import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.data import Batch, ClassBalancedSampler, EpisodeSampler, IndexedDataset, Loader, epoch_generator


def _ids(batches) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


def _dataset(count: int) -> IndexedDataset:
    return IndexedDataset(torch.arange(count).float(), torch.arange(count), ids=torch.arange(count) + 100)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_an_epoch_shows_each_sample_once(count: int, size: int, epoch: int, shuffle: bool) -> None:
    loader = Loader(_dataset(count), size, shuffle=shuffle)
    batches = list(loader.batches(epoch))
    seen = [number for batch in _ids(batches) for number in batch]
    assert sorted(seen) == list(range(100, 100 + count))
    assert len(batches) == len(loader)
    assert shuffle or seen == sorted(seen)
    for batch in batches:
        assert isinstance(batch, Batch) and batch.ids is not None
        assert torch.equal(batch.ids - 100, batch.targets) and torch.equal(
            batch.inputs, batch.targets.float()
        )


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 12), st.booleans())
def test_skip_goes_on_where_the_epoch_stopped(count: int, size: int, skip: int, shuffle: bool) -> None:
    loader = Loader(_dataset(count), size, shuffle=shuffle, seed=3)
    assert _ids(loader.batches(2, skip)) == _ids(loader.batches(2))[skip:]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): str(_ids(Loader(_dataset(20), 20, seed=seed).batches(epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    again = Loader(_dataset(20), 20, seed=1)
    torch.manual_seed(99)
    assert str(_ids(again.batches(2))) == orders[1, 2]


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(Loader(_dataset(10), 3))
    assert torch.equal(before, torch.get_rng_state())


def test_iteration_shows_the_epoch_that_was_set() -> None:
    loader = Loader(_dataset(10), 4)
    assert _ids(loader) == _ids(loader) == _ids(loader.batches(0))
    loader.set_epoch(3)
    assert _ids(loader) == _ids(loader.batches(3))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_the_processes_together_see_the_batches_of_one(
    count: int, share: int, world_size: int, drop_last: bool, skip: int
) -> None:
    size = share * world_size
    if drop_last and size > count:
        return
    alone = _ids(Loader(_dataset(count), size, drop_last=drop_last).batches(1, skip))
    loaders = [
        Loader(_dataset(count), size, drop_last=drop_last, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [_ids(loader.batches(1, skip)) for loader in loaders]
    expected = [batch[: len(batch) - len(batch) % world_size] for batch in alone]
    expected = [batch for batch in expected if batch]
    joined = [
        [row[step] for step in range(len(parts[0])) for row in parts] for parts in zip(*shares, strict=True)
    ]
    assert joined == expected
    assert all(len(loader) == len(list(loader.batches(0))) for loader in loaders)


def test_drop_last_leaves_out_the_smaller_batch() -> None:
    loader = Loader(_dataset(10), 4, drop_last=True, shuffle=False)
    assert _ids(loader) == [[100, 101, 102, 103], [104, 105, 106, 107]] and len(loader) == 2


def test_a_sampler_decides_the_batches_and_skip_works_with_it() -> None:
    targets = torch.tensor([0] * 16 + [1] * 4)
    dataset = IndexedDataset(torch.zeros(20, 1), targets)
    loader = Loader(dataset, None, sampler=ClassBalancedSampler(targets, 4), seed=5)
    batches = list(loader.batches(1))
    assert len(batches) == len(loader) == 5
    assert all(batch.targets.sum() == 2 for batch in batches)
    assert _ids(loader.batches(1, 2)) == _ids(batches)[2:]
    assert _ids(loader.batches(2)) != _ids(batches)


def test_a_sampler_is_shared_between_processes() -> None:
    targets = torch.arange(4).repeat_interleave(5)
    dataset = IndexedDataset(torch.zeros(20, 1), targets)
    sampler = EpisodeSampler(targets, ways=2, shots=1, queries=1, episodes=3)
    alone = _ids(Loader(dataset, None, sampler=sampler).batches(0))
    parts = [
        _ids(Loader(dataset, None, sampler=sampler, rank=rank, world_size=2).batches(0)) for rank in range(2)
    ]
    assert [[a, b, c, d] for (a, c), (b, d) in zip(*parts, strict=True)] == alone


def test_ranks_may_be_set_after_construction_and_are_checked_then() -> None:
    loader = Loader(_dataset(9), 3, shuffle=False)
    loader.rank, loader.world_size = 1, 3
    assert _ids(loader) == [[101], [104], [107]]
    loader.world_size = 2
    with pytest.raises(ValueError, match="divisible by world_size"):
        loader.batches(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": None}, "batch_size must be given"),
        ({"batch_size": 3, "world_size": 2}, "divisible by world_size .*got 3 for 2 processes"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank must be in"),
        ({"batch_size": 2, "seed": -1}, "seed must be >= 0, got -1"),
        ({"batch_size": 9, "drop_last": True}, "<= 6 samples with drop_last, got 9"),
    ],
)
def test_refuses_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(_dataset(6), **arguments)


def test_refuses_an_empty_data_set_and_negative_epochs() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Loader(IndexedDataset(torch.zeros(0, 2)), 1)
    loader = Loader(_dataset(3), 1)
    for call in (lambda: loader.set_epoch(-1), lambda: loader.batches(-1), lambda: loader.batches(0, -1)):
        with pytest.raises(ValueError, match="must be >= 0"):
            call()
    with pytest.raises(ValueError, match="seed and epoch must be >= 0, got 0 and -1"):
        epoch_generator(0, -1)
