from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from coloss.classification import LogitHistory, NumberedDataset


def softmax_of(history: LogitHistory, ids: Tensor, epoch: int) -> Tensor:
    return history.read(ids, epoch)[0].softmax(1)


def test_a_ring_gives_back_what_was_written_lag_epochs_ago_in_every_epoch() -> None:
    lag, history = 3, LogitHistory(depth=4, dtype=torch.float32)
    written = torch.randn(12, 20, 5)
    for epoch in range(12):
        order = torch.randperm(20)
        history.write(order, epoch, written[epoch, order])
        past, seen = history.read(order, epoch - lag)
        assert bool(seen.all()) == (epoch >= lag)
        if epoch >= lag:
            torch.testing.assert_close(past.softmax(1), written[epoch - lag, order].softmax(1))


def test_rows_come_back_with_their_largest_logit_at_zero() -> None:
    history = LogitHistory(1)
    history.write(torch.tensor([0]), 0, torch.tensor([[70000.0, 69999.0]]))  # more than float16 holds
    assert history.read(torch.tensor([0]), 0)[0].tolist() == [[0.0, -1.0]]


def test_an_entry_of_another_epoch_is_missing_not_a_uniform_prediction() -> None:
    history = LogitHistory(depth=2)
    history.write(torch.tensor([0, 1]), 0, torch.ones(2, 3))
    history.write(torch.tensor([1]), 2, torch.ones(1, 3))  # takes slot 0; sample 0 was dropped in this epoch
    assert history.read(torch.tensor([0, 1]), 2)[1].tolist() == [False, True]
    assert history.read(torch.tensor([0, 1]), 0)[1].tolist() == [True, False]
    assert history.read(torch.tensor([0, 1]), -1)[1].tolist() == [False, False]
    assert history.read(torch.tensor([900, 1]), 2)[1].tolist() == [False, True]


def test_of_a_sample_that_occurs_twice_the_last_time_counts() -> None:
    history, ids = LogitHistory(1), torch.arange(50).repeat(2)
    logits = torch.zeros(100, 2)
    logits[50:, 1] = -torch.arange(50.0)
    history.write(ids, 0, logits)
    assert torch.equal(history.read(torch.arange(50), 0)[0], logits[50:])


def test_nothing_in_the_table_has_a_gradient() -> None:
    history, logits = LogitHistory(1), torch.randn(2, 3, requires_grad=True)
    history.write(torch.arange(2), 0, logits)
    assert not history.read(torch.arange(2), 0)[0].requires_grad
    assert list(history.parameters()) == list(history.buffers()) == []


def test_memory_is_what_the_documentation_says() -> None:
    history = LogitHistory(depth=4, num_samples=50, num_classes=100)
    history.write(torch.tensor([0]), 0, torch.zeros(1, 100))
    assert history.memory_bytes == 50 * 4 * (100 * 2 + 4)


def test_the_table_grows_with_the_ids() -> None:
    history = LogitHistory(1)
    for number in (3, 40, 7):
        history.write(torch.tensor([number]), 0, torch.tensor([[0.0, -float(number)]]))
    past, seen = history.read(torch.tensor([7, 3, 40, 5]), 0)
    assert past[:3, 1].tolist() == [-7.0, -3.0, -40.0]
    assert seen.tolist() == [True, True, True, False]


@given(st.integers(1, 7), st.integers(2, 7))
def test_truncated_rows_keep_the_largest_and_the_mean_of_the_rest(kept: int, classes: int) -> None:
    logits = torch.randn(6, classes)
    history = LogitHistory(1, dtype=torch.float64, top_k=kept)
    history.write(torch.arange(6), 0, logits)
    past, _ = history.read(torch.arange(6), 0)
    shifted = (logits - logits.amax(1, keepdim=True)).double()
    if kept >= classes:
        torch.testing.assert_close(past.double(), shifted)
        return
    ordered, expected = past.double().sort(1, descending=True).values, shifted.sort(1, descending=True).values
    torch.testing.assert_close(ordered[:, :kept], expected[:, :kept])
    mean = expected[:, kept:].mean(1, keepdim=True).expand(-1, classes - kept)
    torch.testing.assert_close(ordered[:, kept:], mean, atol=1e-6, rtol=1e-6)


def test_a_truncated_table_is_smaller() -> None:
    whole, short = LogitHistory(2, 10), LogitHistory(2, 10, top_k=10)
    for history in (whole, short):
        history.write(torch.tensor([0]), 0, torch.randn(1, 1000))
    assert short.memory_bytes * 30 < whole.memory_bytes


def test_only_every_so_many_epochs_are_recorded() -> None:
    history = LogitHistory(depth=2, every=3)
    for epoch in range(8):
        history.write(torch.tensor([0]), epoch, torch.tensor([[0.0, -float(epoch)]]))
    # Epochs 3 and 6 are there; an epoch between them reads as the last recorded one.
    found = [history.read(torch.tensor([0]), epoch) for epoch in range(8)]
    assert [bool(seen) for _, seen in found] == [False] * 3 + [True] * 5
    assert [float(past[0, 1]) for past, _ in found] == [0, 0, 0, -3, -3, -3, -6, -6]


def test_an_impossible_class_stays_impossible_and_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        history = LogitHistory(1, dtype=dtype)
        history.write(torch.tensor([0]), 0, torch.tensor([[1.0, -torch.inf]]))
        past, _ = history.read(torch.tensor([0]), 0)
        assert past.isfinite().all()
        assert past.softmax(1).tolist() == [[1.0, 0.0]]


def histories() -> Iterator[LogitHistory]:
    yield LogitHistory(2)
    yield LogitHistory(2, 30, 6, top_k=2)
    yield LogitHistory(2, dtype=torch.float32, every=2)


@pytest.mark.parametrize("index", range(3))
def test_a_state_dict_holds_the_table(index: int) -> None:
    first, second = list(histories())[index], list(histories())[index]
    ids = torch.tensor([3, 17, 29])
    first.write(ids, 4, torch.randn(3, 6))
    second.load_state_dict(first.state_dict())
    for found, expected in zip(second.read(ids, 4), first.read(ids, 4), strict=True):
        assert torch.equal(found, expected)
    second.write(ids, 4, torch.zeros(3, 6))
    assert not torch.equal(first.read(ids, 4)[0], second.read(ids, 4)[0])


def test_a_table_that_is_not_saved_starts_empty_again() -> None:
    history = LogitHistory(1, save=False)
    history.write(torch.tensor([0]), 0, torch.zeros(1, 2))
    assert history.state_dict() == {}
    history.load_state_dict({})
    assert history.read(torch.tensor([0]), 0)[1].tolist() == [False]


@pytest.mark.parametrize(
    "other",
    [{"depth": 3}, {"depth": 2, "num_samples": 5}, {"depth": 2, "num_classes": 7}, {"depth": 2, "top_k": 2}],
)
def test_a_table_of_another_form_is_refused(other: dict[str, int]) -> None:
    history = LogitHistory(2)
    history.write(torch.arange(9), 0, torch.zeros(9, 4))
    with pytest.raises(RuntimeError, match="the stored history has shape"):
        LogitHistory(**other).load_state_dict(history.state_dict())


def test_an_empty_batch_changes_nothing() -> None:
    history = LogitHistory(1, 4, 3)
    history.write(torch.zeros(0, dtype=torch.int64), 0, torch.zeros(0, 3))
    past, seen = history.read(torch.zeros(0, dtype=torch.int64), 0)
    assert past.shape == (0, 3) and seen.shape == (0,)


def test_bad_input_is_named() -> None:
    for arguments, message in (
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"depth": 1, "every": 0}, "every must be >= 1, got 0"),
        ({"depth": 1, "num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"depth": 1, "top_k": 0}, "top_k must be >= 1, got 0"),
        ({"depth": 1, "dtype": torch.int64}, "dtype must be a floating point type"),
    ):
        with pytest.raises(ValueError, match=message):
            LogitHistory(**arguments)
    history = LogitHistory(1, num_samples=4)
    with pytest.raises(ValueError, match="must be written to before it is read"):
        history.read(torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="ids must be below num_samples = 4, got 4"):
        history.write(torch.tensor([4]), 0, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="ids must be >= 0, got -1"):
        history.write(torch.tensor([-1]), 0, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="epoch must be >= 0, got -2"):
        history.write(torch.tensor([1]), -2, torch.zeros(1, 2))
    history.write(torch.tensor([0]), 0, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="logits must have 2 classes as before, got 3"):
        history.write(torch.tensor([0]), 0, torch.zeros(1, 3))


def test_samples_of_a_torch_data_set_keep_their_number_when_shuffled() -> None:
    dataset = NumberedDataset(TensorDataset(torch.arange(10.0), torch.arange(10)))
    inputs, targets, ids = next(iter(DataLoader(dataset, batch_size=10, shuffle=True)))
    assert torch.equal(targets, ids) and torch.equal(inputs.long(), ids)
    assert dataset[-1][2] == 9 and len(dataset) == 10
    with pytest.raises(IndexError):
        dataset[10]
    with pytest.raises(ValueError, match="dataset must be a map-style data set with a length, got generator"):
        NumberedDataset(x for x in range(3))
    with pytest.raises(ValueError, match="samples of dataset must be tuples or lists, got int"):
        NumberedDataset([1, 2])[0]
