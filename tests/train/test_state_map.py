"""Linear maps of state dicts: exactness, composition, laziness, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from coloss.errors import InputError
from coloss.train.axis_map import Axis, AxisMap
from coloss.train.state_map import LazyTensors, StateMap, find_rules, interpolate_states


def permuted_groups(sizes: list[int], seed: int) -> list[list[int]]:
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    return [part.tolist() for part in torch.tensor(order).split(sizes)]


GROUPS = st.builds(permuted_groups, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 1000))


@given(GROUPS, st.integers(1, 3))
def test_rows_of_f_and_t_sum_to_1_and_f_undoes_t(groups: list[list[int]], block: int) -> None:
    shrink = AxisMap.averaging(groups, block)
    grow = shrink.reversed()
    for axis in (shrink, grow):
        torch.testing.assert_close(axis.made.sum(1), torch.ones(len(axis.made), dtype=torch.float64))
        torch.testing.assert_close(axis.read.sum(0), torch.ones(axis.read.shape[1], dtype=torch.float64))
    torch.testing.assert_close(shrink.made @ grow.made, torch.eye(len(groups), dtype=torch.float64))
    torch.testing.assert_close(shrink.read @ grow.read, torch.eye(len(groups), dtype=torch.float64))


@given(GROUPS, st.integers(1, 3), st.sampled_from(["made", "read"]), st.integers(0, 2))
def test_gathering_equals_the_matrix_product(
    groups: list[list[int]], block: int, side: str, dim: int
) -> None:
    for axis in (AxisMap.averaging(groups, block), AxisMap.averaging(groups, block).reversed()):
        shape = [2, 3, 2]
        shape[dim] = axis.old
        tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        matrix = torch.kron(getattr(axis, side), torch.eye(block, dtype=torch.float64))
        expected = torch.tensordot(matrix, tensor, dims=([1], [dim])).movedim(0, dim)
        torch.testing.assert_close(axis(tensor, dim, side), expected)


def test_rows_with_many_entries_take_the_matrix_product() -> None:
    matrix = torch.rand(3, 40, dtype=torch.float64)
    tensor = torch.randn(2, 40, dtype=torch.float64)
    torch.testing.assert_close(AxisMap(matrix)(tensor, 1), tensor @ matrix.T)


def test_a_layer_between_copied_widths_computes_the_same() -> None:
    """W' T x = T W x, for any numbers of copies."""
    ins, outs = (AxisMap.averaging(groups).reversed() for groups in ([[0, 2, 3], [1]], [[0], [1, 4], [2, 3]]))
    grow = StateMap({"weight": (Axis((outs,)), Axis((ins,), "read")), "bias": (Axis((outs,)),)})
    small, large = nn.Linear(2, 3).double(), nn.Linear(4, 5).double()
    large.load_state_dict(grow(small.state_dict()))
    inputs = torch.randn(7, 2, dtype=torch.float64)
    torch.testing.assert_close(large(ins(inputs, 1)), outs(small(inputs), 1), rtol=0, atol=1e-15)


def test_maps_compose_to_one() -> None:
    first, second = AxisMap.averaging([[0, 1], [2, 3], [4, 5], [6, 7]]), AxisMap.averaging([[0, 2], [1, 3]])
    stack = AxisMap.averaging([[0, 1]])

    def of(axis: AxisMap, mixing: AxisMap) -> StateMap:
        return StateMap({"{layer}.weight": (Axis((axis,)), Axis((axis,), "read"))}, {"layer": mixing})

    one, two = of(first, stack), of(second, AxisMap.averaging([[0]]))
    state = {f"{layer}.weight": torch.randn(8, 8, dtype=torch.float64) for layer in range(2)}
    together = (two @ one)(state)
    torch.testing.assert_close(together, two(one(state)), rtol=0, atol=1e-15)
    assert together["0.weight"].shape == (2, 2)
    growing = one.reversed() @ two.reversed()
    torch.testing.assert_close((two @ one)(growing(together)), together, rtol=0, atol=1e-15)


@given(GROUPS, GROUPS)
def test_the_map_back_of_gradients_is_that_of_the_map_back(rows: list, columns: list) -> None:
    ins, outs = AxisMap.averaging(columns), AxisMap.averaging(rows)
    shrink = StateMap({"weight": (Axis((outs,)), Axis((ins,), "read"))})
    small = {"weight": torch.randn(outs.new, ins.new, dtype=torch.float64)}
    one, other = shrink.of_gradients().reversed()(small), shrink.reversed().of_gradients()(small)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-15)
    torch.testing.assert_close(shrink.reversed().reversed()(one), shrink(one), rtol=0, atol=1e-15)


def test_copies_are_counted_over_all_units() -> None:
    assert AxisMap.averaging([[0, 2], [1, 3]], block=4).reversed().copies == {2}
    assert AxisMap.averaging([[0, 2], [1]]).reversed().copies == {1, 2}


def test_blocks_of_different_size_compose() -> None:
    heads = AxisMap.averaging([[0, 1]], block=4)
    units = AxisMap.averaging([[0, 2], [1, 3]])
    vector = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close((units @ heads)(vector), units(heads(vector)))
    with pytest.raises(ValueError, match="first must give 8 features, got 2"):
        heads @ units


def test_groups_of_one_change_nothing_and_copy_nothing() -> None:
    alone = AxisMap.averaging([[0], [1], [2]])
    same = StateMap({"weight": (Axis((alone,)), Axis((alone,), "read"))}, {"layer": AxisMap.averaging([[0]])})
    state = {"weight": torch.randn(3, 3)}
    assert same(state)["weight"] is state["weight"]
    fused = Axis((alone, alone))
    assert fused(weight := torch.randn(6), 0) is weight


class Counting(dict):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def test_a_view_reads_only_what_is_asked_for_and_keeps_kept_layers_as_they_are() -> None:
    state = Counting({f"h.{layer}.weight": torch.full((2,), float(layer)) for layer in range(4)})
    pruned = StateMap({"h.{layer}.weight": ()}, {"layer": AxisMap.selecting([3, 1], 4)}).view(state)
    assert list(pruned) == ["h.0.weight", "h.1.weight"] and len(pruned) == 2
    assert not state.read
    assert pruned["h.0.weight"] is dict.__getitem__(state, "h.3.weight")
    assert state.read == ["h.3.weight"]


def test_tensors_of_a_file_are_mapped_one_by_one(tmp_path) -> None:
    state = {f"{layer}.weight": torch.randn(2, 2) for layer in range(2)}
    save_file(state, tmp_path / "model.safetensors")
    mean = StateMap({"{layer}.weight": ()}, {"layer": AxisMap.averaging([[0, 1]])})
    lazy = LazyTensors(tmp_path / "model.safetensors")
    assert len(lazy) == 2
    torch.testing.assert_close(mean(lazy), {"0.weight": (state["0.weight"] + state["1.weight"]) / 2})
    with pytest.raises(KeyError):
        lazy["2.weight"]
    with pytest.raises(InputError, match="cannot read the model"):
        LazyTensors(tmp_path / "none.safetensors")


def test_a_map_works_without_data_on_the_meta_device() -> None:
    halve = AxisMap.averaging([[0, 1], [2, 3]])
    found = StateMap({"weight": (Axis((halve,)), None)})({"weight": torch.empty(4, 3, device="meta")})
    assert found["weight"].shape == (2, 3) and found["weight"].device.type == "meta"


def test_half_precision_is_averaged_in_float32() -> None:
    groups = AxisMap.averaging([list(range(12))])
    values = torch.full((12,), 6e4, dtype=torch.float16)
    sums = StateMap({"weight": (Axis((groups,), "read"),)})({"weight": values / 12})
    means = StateMap({"weight": (Axis((groups,)),)})({"weight": values})
    assert sums["weight"].dtype == means["weight"].dtype == torch.float16
    torch.testing.assert_close(means["weight"], values[:1])
    assert sums["weight"].isfinite().all()


def test_nan_stays_nan() -> None:
    halve = AxisMap.averaging([[0, 1], [2, 3]])
    found = StateMap({"bias": (Axis((halve,)),)})({"bias": torch.tensor([torch.nan, 1.0, 2.0, 4.0])})
    assert found["bias"][0].isnan() and found["bias"][1] == 3


def test_buffers_of_whole_numbers_come_from_one_layer_and_are_never_averaged() -> None:
    mean = StateMap({"{layer}.count": ()}, {"layer": AxisMap.averaging([[0, 1]])})
    found = mean({"0.count": torch.tensor([3]), "1.count": torch.tensor([5])})
    assert found["0.count"].dtype == torch.int64 and found["0.count"].item() in (3, 5)
    halve = AxisMap.averaging([[0, 1]])
    with pytest.raises(
        InputError, match="'0.count' must hold floating point numbers to be mapped, got torch.int64"
    ):
        StateMap({"0.count": (Axis((halve,)),)})({"0.count": torch.tensor([3, 5])})


def test_names_go_by_the_longest_pattern_and_at_dots() -> None:
    patterns = ["norm.weight", "h.{layer}.norm.weight"]
    assert find_rules(["model.h.2.norm.weight", "model.norm.weight"], patterns) == {
        "model.h.2.norm.weight": "h.{layer}.norm.weight",
        "model.norm.weight": "norm.weight",
    }
    with pytest.raises(InputError, match="no rule of the layout fits the tensor 'my_norm.weight'"):
        find_rules(["my_norm.weight"], patterns)


def test_two_stacks_are_mixed_apart() -> None:
    rules = {"encoder.{layer}.bias": (), "decoder.{other}.bias": ()}
    keep = StateMap(rules, {"layer": AxisMap.selecting([1], 2)})
    state = {
        f"{part}.{layer}.bias": torch.tensor(float(layer))
        for part in ("encoder", "decoder")
        for layer in (0, 1)
    }
    found = keep(state)
    assert {name: value.item() for name, value in found.items()} == {
        "decoder.0.bias": 0.0,
        "decoder.1.bias": 1.0,
        "encoder.0.bias": 1.0,
    }


def test_interpolation_is_exact_at_both_ends_and_goes_by_name() -> None:
    before = {"a": torch.randn(5), "b": torch.randn(2), "count": torch.tensor(3)}
    after = {"b": torch.randn(2), "count": torch.tensor(9), "a": torch.randn(5)}
    for alpha, end in ((0.0, before), (1.0, after)):
        found = interpolate_states(before, after, alpha)
        assert torch.equal(found["a"], end["a"]) and torch.equal(found["b"], end["b"])
        assert found["count"] == 3
    middle = interpolate_states(before, after, 0.25)
    torch.testing.assert_close(middle["a"], 0.75 * before["a"] + 0.25 * after["a"])


@pytest.mark.parametrize(
    ("after", "alpha", "message"),
    [
        ({"a": torch.zeros(2)}, 1.5, "alpha must be in"),
        ({"b": torch.zeros(2)}, 0.5, "before and after must have the same names, got 'a'"),
        ({"a": torch.zeros(3)}, 0.5, r"same shapes, got \(2,\) and \(3,\) for 'a'"),
    ],
)
def test_interpolation_refuses(after: dict, alpha: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        interpolate_states({"a": torch.zeros(2)}, after, alpha)


def test_what_does_not_fit_is_refused_by_name() -> None:
    halve = AxisMap.averaging([[0, 1]])
    with pytest.raises(ValueError, match="groups must hold each unit"):
        AxisMap.averaging([[0, 2]])
    with pytest.raises(ValueError, match="groups must hold each unit"):
        AxisMap.averaging([[0], []])
    with pytest.raises(ValueError, match=r"kept must name units in \[0, 2\), got \[2\]"):
        AxisMap.selecting([2], 2)
    with pytest.raises(ValueError, match="made must hold finite entries >= 0"):
        AxisMap(-torch.ones(1, 1))
    with pytest.raises(ValueError, match="block must be >= 1, got 0"):
        AxisMap(torch.ones(1, 1), 0)
    with pytest.raises(ValueError, match="dimension 0 must have 2 features"):
        halve(torch.zeros(3))
    with pytest.raises(ValueError, match="at most one pair of braces"):
        StateMap({"{a}.{b}": ()})
    with pytest.raises(ValueError, match="same patterns and stacks"):
        StateMap({"a": ()}) @ StateMap({"b": ()})
    shrink = StateMap({"{layer}.bias": (Axis((halve,)),)}, {"layer": AxisMap.averaging([[0, 1]])})
    with pytest.raises(InputError, match=r"must have layers 0 to 1 in the state, got \[0\]"):
        shrink({"0.bias": torch.zeros(2)})
    with pytest.raises(InputError, match=r"'0.bias' must have the shape \(2\), got \(3,\)"):
        shrink({"0.bias": torch.zeros(3), "1.bias": torch.zeros(3)})
    with pytest.raises(InputError, match="'0.bias' must be a tensor to be mapped, got str"):
        shrink({"0.bias": "text", "1.bias": "text"})
