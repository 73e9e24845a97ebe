"""The split into shared and private, and the mean: exact limits, the law of total variance, what is refused."""

import pytest
import torch
from torch import nn

from coloss.motion import AdaptiveTopology, fedavg, split_state


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.topology = AdaptiveTopology(torch.eye(2)[None])
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.header = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)


def test_names_are_found_by_whole_steps_of_the_path_and_by_type():
    shared, private = split_state(Net(), ("head", "topology", "norm"))
    assert set(private) == {
        *("head.weight", "head.bias"),
        *(
            f"topology.{n}"
            for n in ("adjacency", "private_matrix", "fixed_scale", "shared_scale", "private_scale")
        ),
        *(f"body.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    assert set(shared) == {
        *("topology.shared_matrix", "body.0.weight", "body.0.bias", "header.weight", "header.bias"),
    }
    assert (shared | private).keys() == Net().state_dict().keys()
    assert set(split_state(Net(), ("head.bias",))[1]) == {"head.bias"}


def test_the_parts_are_copies():
    net = Net()
    shared, _ = split_state(net, ("head",))
    with torch.no_grad():
        net.header.weight.zero_()
    assert shared["header.weight"].abs().sum() > 0


def test_a_name_that_nothing_has():
    with pytest.raises(ValueError, match="got 'heads', which has no tensor"):
        split_state(Net(), ("heads",))
    with pytest.raises(ValueError, match="got 'norm'"):
        split_state(nn.Linear(2, 2), ("norm",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", [[3], [1, 7, 1000], [1, 0]])
def test_identical_states_are_kept_to_the_bit(weights, dtype):
    values = torch.tensor([0.1, -1e6, 3e-39, -torch.inf, torch.inf])
    state = {
        "w": values.to(dtype),
        "bn.running_mean": values,
        "bn.running_var": values.abs(),
        "bn.num_batches_tracked": torch.tensor(2**60 + 1),
        "phase": torch.tensor([1 + 2j, 0.1j]),
        "mask": torch.tensor([True, False]),
    }
    found = fedavg([{n: v.clone() for n, v in state.items()} for _ in weights], weights)
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items()
    )
    assert all(found[name].data_ptr() != value.data_ptr() for name, value in state.items())


def test_infinities_and_complex_numbers_in_a_mean():
    inf = torch.inf
    for weights in ([1, 2], [2, 1]):
        found = fedavg(
            [{"w": torch.tensor([1.0, -inf, inf])}, {"w": torch.tensor([-inf, -inf, -inf])}], weights
        )
        assert found["w"][:2].tolist() == [-inf, -inf]
        assert found["w"][2].isnan()
    assert fedavg([{"w": torch.tensor(2j)}, {"w": torch.tensor(4 + 0j)}], [1, 1])["w"].item() == 2 + 1j


def test_equal_variances_of_clients_with_other_means_are_not_kept():
    states = [{"running_mean": torch.tensor([m]), "running_var": torch.tensor([1.0])} for m in (-2.0, 2.0)]
    assert fedavg(states, [1, 1])["running_var"].item() == 5


def test_a_weight_of_one_selects_a_client_whatever_the_others_hold():
    torch.manual_seed(0)
    states = [{"w": torch.randn(3), "v": torch.randn(2, dtype=torch.float64)} for _ in range(2)]
    states.append({"w": torch.full((3,), torch.nan), "v": torch.full((2,), torch.inf, dtype=torch.float64)})
    for chosen in range(2):
        weights = [float(number == chosen) for number in range(3)]
        assert all(torch.equal(v, states[chosen][n]) for n, v in fedavg(states, weights).items())
    assert fedavg(states, [1, 1, 1])["w"].isnan().all(), "what is not finite shows"


def test_variances_are_those_of_all_samples_as_one_set():
    torch.manual_seed(0)
    groups = [torch.randn(20, 3, dtype=torch.float64) + shift for shift in (0, 5)] + [
        torch.randn(60, 3, dtype=torch.float64) * 3
    ]
    states = [{"n.running_mean": rows.mean(0), "n.running_var": rows.var(0, correction=0)} for rows in groups]
    found, rows = fedavg(states, [20, 20, 60]), torch.cat(groups)
    torch.testing.assert_close(found["n.running_mean"], rows.mean(0))
    torch.testing.assert_close(found["n.running_var"], rows.var(0, correction=0))
    naive = sum(w * s["n.running_var"] for w, s in zip((0.2, 0.2, 0.6), states))
    assert (found["n.running_var"] > naive + 1).all()


def test_what_cannot_be_averaged():
    one = {"w": torch.zeros(2)}
    for states, weights, message in (
        ([], [], "at least, got none"),
        ([one], [1, 1], "weights must be one for each of 1 states, got 2"),
        ([one, one], [0, 0], "not all 0"),
        ([one, one], [1, -1], "weights must be finite, >= 0"),
        ([one, {"v": torch.zeros(2)}], [1, 1], "same names, 'v' is not in both"),
        ([one, {"w": torch.zeros(3)}], [1, 1], r"'w' has \(2,\) in 0 and \(3,\) in 1"),
        ([{"a.running_var": torch.ones(1)}], [1], "running_mean that belongs to 'a.running_var'"),
    ):
        with pytest.raises(ValueError, match=message):
            fedavg(states, weights)


def test_heads_for_other_classes_must_be_private():
    states = [Net(classes).state_dict() for classes in (3, 5)]
    with pytest.raises(ValueError, match="must be private"):
        fedavg(states, [1, 1])
    assert "header.weight" in fedavg([split_state(Net(c), ("head",))[0] for c in (3, 5)], [1, 2])
