from collections import OrderedDict, namedtuple

import pytest
import torch

from coloss.data import Batch


def test_of_reads_each_form_that_loaders_yield() -> None:
    inputs, targets, ids = torch.zeros(3, 2), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    for value in [
        (inputs, targets, ids),
        [inputs, targets, ids],
        {"inputs": inputs, "targets": targets, "ids": ids},
    ]:
        batch = Batch.of(value)
        assert batch.inputs is inputs and batch.targets is targets and batch.ids is ids and batch.extras == {}
    assert Batch.of(inputs).inputs is inputs
    assert Batch.of((inputs, targets)).ids is None
    assert Batch.of(OrderedDict(inputs=inputs, mask=targets)).extras == {"mask": targets}


def test_of_returns_a_batch_as_it_is() -> None:
    batch = Batch(torch.zeros(1))
    assert Batch.of(batch) is batch


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((), "0 parts"),
        ((1, 2, 3, 4), "4 parts"),
        ({"x": 1}, "must have the key 'inputs', got \\['x'\\]"),
        ("text", "got str"),
        (None, "got NoneType"),
    ],
)
def test_of_refuses_what_is_no_batch(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch.of(value)


def test_to_moves_every_tensor_however_nested_and_keeps_the_rest() -> None:
    pair = namedtuple("pair", "left right")
    batch = Batch(
        {"a": (torch.zeros(2), [torch.ones(2)])},
        pair(torch.zeros(2), "kept"),
        torch.arange(2),
        {"mask": torch.ones(2), "name": "kept", "none": None},
    )
    moved = batch.to("meta")
    assert moved.inputs["a"][0].is_meta and moved.inputs["a"][1][0].is_meta
    assert moved.targets.left.is_meta and moved.targets.right == "kept"
    assert moved.ids is not None and moved.ids.is_meta
    assert moved.extras["mask"].is_meta and moved.extras["name"] == "kept" and moved.extras["none"] is None
    assert not batch.extras["mask"].is_meta


def test_length_is_that_of_the_first_tensor_of_the_inputs() -> None:
    assert len(Batch(torch.zeros(3, 2))) == 3
    assert len(Batch((torch.zeros(4), torch.zeros(9)))) == 4
    assert len(Batch({"skip": None, "a": [torch.zeros(5, 1)]})) == 5
    for empty in (None, torch.tensor(1.0), {}):
        with pytest.raises(TypeError, match="length"):
            len(Batch(empty))


def test_batches_do_not_share_their_extras() -> None:
    one, two = Batch(torch.zeros(1)), Batch(torch.zeros(1))
    one.extras["mask"] = 1
    assert two.extras == {}
