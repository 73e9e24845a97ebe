"""Facts about the queue: first in, first out for any batch size, and nothing that was not put in."""

from pathlib import Path

import pytest
import torch
from contract import run_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import Tensor

from coloss.nn import FeatureQueue


@settings(max_examples=30)
@given(st.integers(1, 7), st.lists(st.integers(0, 9), max_size=6))
def test_it_holds_the_newest_rows_whatever_the_batch_sizes(size: int, batches: list[int]) -> None:
    queue, put = FeatureQueue(size, 1), 0
    for rows in batches:
        numbers = torch.arange(put, put + rows)
        queue.enqueue(numbers[:, None].float(), numbers)
        put += rows
    newest = list(range(max(put - size, 0), put))
    assert sorted(queue().flatten().tolist()) == newest
    assert queue.row_ids().tolist() == queue().flatten().tolist()
    assert len(queue) == len(newest)


def test_it_begins_empty_and_its_state_is_all_in_buffers() -> None:
    queue = FeatureQueue(4, 2)
    assert queue().shape == (0, 2)
    queue.enqueue(torch.ones(3, 2, requires_grad=True))
    assert not queue().requires_grad
    other = FeatureQueue(4, 2)
    other.load_state_dict(queue.state_dict())
    for one in (queue, other):
        one.enqueue(torch.full((2, 2), 5.0))
    assert torch.equal(queue(), other())
    assert torch.equal(queue.place, other.place)


def test_what_was_read_does_not_change_later() -> None:
    queue = FeatureQueue(2, 1)
    queue.enqueue(torch.tensor([[1.0], [2.0]]))
    read = queue()
    queue.enqueue(torch.tensor([[3.0], [4.0]]))
    assert read.flatten().tolist() == [1.0, 2.0]


def test_half_precision_rows_are_kept_in_its_own() -> None:
    queue = FeatureQueue(2, 1)
    queue.enqueue(torch.ones(1, 1, dtype=torch.bfloat16))
    assert queue().dtype == torch.float32
    assert FeatureQueue(2, 1).double()().dtype == torch.float64


def test_processes_share_what_each_puts_in(tmp_path: Path) -> None:
    def work(fabric: Fabric) -> dict[str, Tensor]:
        queue = FeatureQueue(5, 1)
        rank = fabric.global_rank
        queue.enqueue(torch.full((2 + rank, 1), float(rank)), torch.full((2 + rank,), rank))
        return {"rows": queue(), "ids": queue.row_ids()}

    first, second = run_processes(work, tmp_path)
    assert first["rows"].flatten().tolist() == first["ids"].tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(first["rows"], second["rows"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureQueue(0, 2), "size must be >= 1, got 0"),
        (lambda: FeatureQueue(2, 0), "dim must be >= 1, got 0"),
        (lambda: FeatureQueue(2, 3).enqueue(torch.ones(1, 2)), r"features must be \(rows, 3\), got \(1, 2\)"),
        (
            lambda: FeatureQueue(2, 3).enqueue(torch.ones(2, 3), torch.ones(1).long()),
            r"ids must have shape \(2,\), got \(1,\)",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
