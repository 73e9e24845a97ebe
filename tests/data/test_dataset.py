import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from coloss.data import IndexedDataset, Standardization, halves, load


def test_ids_number_the_samples_by_default() -> None:
    assert IndexedDataset(torch.zeros(3, 2)).ids.tolist() == [0, 1, 2]


@settings(deadline=None)
@given(st.permutations(range(8)), st.integers(1, 8))
def test_a_sample_keeps_its_id_through_subsets_of_subsets(order: list[int], count: int) -> None:
    dataset = IndexedDataset(torch.arange(8.0), ids=torch.arange(8) * 10)
    chosen = dataset.subset(torch.tensor(order)).subset(torch.arange(count).flip(0))
    assert (chosen.ids == chosen.inputs.long() * 10).all()


def test_take_equals_indexing_for_every_part() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.rand(6, 3, generator=generator), torch.rand(6, 1, 2, 2, generator=generator))
    dataset = IndexedDataset(inputs, torch.arange(6), extras={"weight": torch.rand(6, generator=generator)})
    rows = torch.tensor([4, 4, 0])
    batch = dataset.take(rows)
    assert torch.equal(batch.inputs[0], inputs[0][rows]) and torch.equal(batch.inputs[1], inputs[1][rows])
    assert torch.equal(batch.targets, rows) and batch.ids is not None and torch.equal(batch.ids, rows)
    assert torch.equal(batch.extras["weight"], dataset.extras["weight"][rows])


def test_a_torch_data_loader_collates_it() -> None:
    dataset = IndexedDataset((torch.zeros(5, 2), torch.ones(5, 3)), torch.arange(5))
    (first, second), targets, ids = next(iter(DataLoader(dataset, batch_size=4)))
    assert first.shape == (4, 2) and second.shape == (4, 3)
    assert targets.tolist() == ids.tolist() == [0, 1, 2, 3]


def test_without_targets_and_with_tuple_targets() -> None:
    assert IndexedDataset(torch.zeros(2, 1))[0][1] is None
    dataset = IndexedDataset(torch.zeros(2, 1), (torch.tensor([1, 2]), torch.tensor([3.0, 4.0])))
    assert [part.tolist() for part in dataset.take(torch.tensor([1])).targets] == [[2], [4.0]]
    assert [part.item() for part in dataset[-1][1]] == [2, 4.0]


def test_indexing_out_of_range_ends_an_iteration() -> None:
    dataset = IndexedDataset(torch.zeros(2, 1))
    assert len(list(dataset)) == 2
    with pytest.raises(IndexError, match=r"\[-2, 2\), got 2"):
        dataset[2]


def test_arrays_are_shared_not_copied() -> None:
    array = np.zeros((3, 2), dtype=np.float32)
    dataset = IndexedDataset(array)
    array[0] = 7
    assert dataset.all().inputs[0, 0] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.zeros(3), "targets": torch.zeros(2)}, "targets must have 3 samples"),
        ({"inputs": (torch.zeros(3), torch.zeros(4))}, "inputs must have 3 samples"),
        ({"inputs": torch.zeros(3), "extras": {"w": torch.zeros(1)}}, "w must have 3 samples"),
        ({"inputs": torch.zeros(2), "ids": [1, 1]}, "distinct, got 1 repeats"),
        ({"inputs": torch.zeros(2), "ids": [0.5, 1.0]}, "whole numbers"),
        ({"inputs": torch.zeros(2), "ids": [1, 2, 3]}, "ids must have 2 samples"),
        ({"inputs": torch.tensor(1.0)}, "scalar"),
        ({"inputs": "text"}, "inputs must be a tensor or a tuple of tensors, got str"),
        ({"inputs": ()}, "got tuple"),
    ],
)
def test_refuses_parts_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexedDataset(**arguments)


def test_standardization_restores_what_it_took_off() -> None:
    measured = Standardization(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), 10.0, 5.0)
    assert measured.apply(torch.tensor([[3.0, 2.0]])).tolist() == [[1.0, 0.0]]
    assert measured.restore_targets(torch.tensor([-2.0, 0.0])).tolist() == [0.0, 10.0]
    raw = torch.tensor([[1.0]])
    assert Standardization(None, None).apply(raw) is raw


def test_halves_put_together_are_the_image() -> None:
    splits = load("digits", limit=30)
    cut = halves(splits)
    top, bottom = cut.test.inputs
    assert torch.equal(torch.cat([top, bottom], dim=2), splits.test.all().inputs)
    assert torch.equal(cut.test.ids, splits.test.ids) and cut.input_shape == (1, 4, 8)


def test_halves_refuse_tables() -> None:
    with pytest.raises(ValueError, match=r"even height.*\(4,\)"):
        halves(load("iris"))
