"""A table by sample id keeps what was written, for any ids, on every process, and through checkpoints."""

from pathlib import Path

import pytest
import torch
from contract import run_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops.distributed import rank
from coloss.train import SampleTable

INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(INT64, st.integers(-8, 8)), max_size=6), max_size=6))
def test_keeps_what_a_dictionary_keeps(batches):
    table, known = SampleTable({"value": -1.0}), {}
    for batch in batches:
        ids = torch.tensor([number for number, _ in batch], dtype=torch.int64)
        table.write(ids, {"value": torch.tensor([float(value) for _, value in batch])})
        for number in {number for number, _ in batch}:
            values = [value for other, value in batch if other == number]
            known[number] = sum(values) / len(values)
    asked = [*known, 5, -5]
    values, seen = table.read(torch.tensor(asked, dtype=torch.int64))
    torch.testing.assert_close(values["value"], torch.tensor([known.get(i, -1.0) for i in asked]).float())
    assert seen.tolist() == [number in known for number in asked]
    assert table.ids.tolist() == sorted(known) and len(table) == len(known)


def test_numbered_samples_and_any_ids_give_the_same_table():
    free = SampleTable({"a": 0.5, "b": torch.zeros(2)})
    numbered = SampleTable({"a": 0.5, "b": torch.zeros(2)}, num_samples=20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.randint(20, (6,), generator=generator)
        values = {"a": torch.rand(6, generator=generator), "b": torch.rand(6, 2, generator=generator)}
        for table in (free, numbered):
            table.write(ids, values)
    assert free.ids.tolist() == numbered.ids.tolist() and len(free) == len(numbered)
    for name in ("a", "b"):
        assert torch.equal(free.column(name), numbered.column(name))
    # Each loads what the other saved.
    numbered.load_state_dict(free.state_dict())
    assert torch.equal(free.column("b"), numbered.column("b"))


def test_columns_that_are_not_written_stay():
    table = SampleTable({"a": 0.0, "b": 3.0})
    table.write(torch.tensor([4]), {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])})
    table.write(torch.tensor([4, 9]), {"a": torch.tensor([5.0, 6.0])})
    values, _ = table.read(torch.tensor([4, 9]))
    assert values["a"].tolist() == [5.0, 6.0] and values["b"].tolist() == [2.0, 3.0]


def test_repeats_of_an_id_do_not_depend_on_their_order():
    tables = []
    for order in ([0, 1, 2], [2, 1, 0]):
        table = SampleTable({"a": 0.0}, dtype=torch.float64)
        table.write(torch.tensor([3, 8, 3])[order], {"a": torch.tensor([0.5, 2.0, 1.0])[order]})
        tables.append(table.column("a").tolist())
    assert tables[0] == tables[1] == [0.75, 2.0]


def test_nothing_stored_has_a_gradient():
    table = SampleTable({"a": 0.0})
    table.write(torch.tensor([1]), {"a": torch.ones(1, requires_grad=True)})
    assert not table.column("a").requires_grad and not table.read(torch.tensor([1]))[0]["a"].requires_grad


def test_the_state_dict_does_not_depend_on_the_order_of_visits():
    states = []
    for order in ([5, -3, 40], [40, 5, -3]):
        table = SampleTable({"a": 0.0})
        for number in order:
            table.write(torch.tensor([number]), {"a": torch.tensor([number / 2])})
        states.append(table.state_dict())
    assert states[0].keys() == states[1].keys() == {"ids", "a"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_module_that_holds_one_is_saved_and_loaded_strictly():
    first, second = (nn.Sequential(nn.Linear(1, 1), SampleTable({"a": 0.0})) for _ in range(2))
    first[1].write(torch.tensor([7, 2**62]), {"a": torch.tensor([1.0, 2.0])})
    second[1].write(torch.tensor([1]), {"a": torch.tensor([9.0])})
    second.load_state_dict(first.state_dict())
    assert second[1].ids.tolist() == [7, 2**62] and second[1].column("a").tolist() == [1.0, 2.0]
    second[1].write(torch.tensor([7]), {"a": torch.tensor([4.0])})
    assert first[1].column("a").tolist() == [1.0, 2.0]
    # An empty one comes back empty.
    second.load_state_dict(nn.Sequential(nn.Linear(1, 1), SampleTable({"a": 0.0})).state_dict())
    assert len(second[1]) == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        first.load_state_dict({name: v for name, v in first.state_dict().items() if name != "1.a"})
    with pytest.raises(RuntimeError, match="the stored table holds id 4611686018427387904"):
        nn.Sequential(nn.Linear(1, 1), SampleTable({"a": 0.0}, num_samples=9)).load_state_dict(
            first.state_dict()
        )


def test_half_precision_of_the_model_does_not_reach_the_table():
    model = nn.Sequential(nn.Linear(1, 1), SampleTable({"a": 0.1}))
    model.to(torch.bfloat16)
    model[1].write(torch.tensor([1]), {"a": torch.tensor([0.123456])})
    assert model[1].column("a").dtype == torch.float32
    assert model[1].column("a").item() == pytest.approx(0.123456, abs=1e-7)


def test_every_process_holds_the_rows_of_all(tmp_path: Path):
    def work(fabric: Fabric) -> dict[str, Tensor]:
        table = SampleTable({"a": 0.0})
        mine = [[10, 11, 12], [12, -1]][rank()]
        table.write(torch.tensor(mine), {"a": torch.tensor(mine).float() + rank()})
        table.write(
            torch.tensor([] if rank() else [99], dtype=torch.int64),
            {"a": torch.tensor([] if rank() else [1.0])},
        )
        return dict(table.state_dict())

    for found in run_processes(work, tmp_path):
        assert found["ids"].tolist() == [-1, 10, 11, 12, 99]
        assert found["a"].tolist() == [0.0, 10.0, 11.0, 12.5, 1.0]


def test_bad_input_is_named():
    for options, message in (
        ({"initial": {}}, "initial must name at least one column"),
        ({"initial": {"ids": 0.0}}, "none of them 'ids'"),
        ({"initial": {"a": 0.0}, "num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"initial": {"a": 0.0}, "dtype": torch.int64}, "dtype must be a floating point type"),
    ):
        with pytest.raises(InputError, match=message):
            SampleTable(**options)
    table = SampleTable({"a": 0.0}, num_samples=5)
    with pytest.raises(InputError, match=r"ids must be in \[0, 5\) as num_samples says, got 5"):
        table.read(torch.tensor([1, 5]))
    with pytest.raises(InputError, match="values must be of the columns a, got 'b'"):
        table.write(torch.tensor([1]), {"b": torch.zeros(1)})
    with pytest.raises(InputError, match=r"values of 'a' must have shape \(2,\), got \(2, 1\)"):
        table.write(torch.tensor([1, 2]), {"a": torch.zeros(2, 1)})
