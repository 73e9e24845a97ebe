"""Curvature against the exact Hessian, allocations against brute force, and the roulette's frequencies."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from coloss.compression import (
    allocate_bits,
    draw_bits,
    hessian_trace,
    make_switchable,
    quantization_errors,
    redraw_probability,
    roulette,
)
from coloss.errors import InputError

NUMEL = {"a": 10, "b": 30, "c": 20, "d": 5}
TRACES = {"a": 3.0, "b": 1.0, "c": 40.0, "d": 0.1}


def test_traces_are_those_of_the_exact_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs, targets = torch.randn(20, 3), torch.randint(2, (20,))
    found = hessian_trace(
        model,
        nn.functional.cross_entropy,
        (inputs, targets),
        200,
        layers=["0", "2"],
        generator=torch.Generator().manual_seed(0),
    )
    for path in ("0", "2"):
        name = f"{path}.weight"

        def loss(weight: torch.Tensor, name: str = name) -> torch.Tensor:
            return nn.functional.cross_entropy(
                torch.func.functional_call(model, {name: weight}, (inputs,)), targets
            )

        weight = model.get_parameter(name).detach()
        hessian = torch.autograd.functional.hessian(loss, weight).view(weight.numel(), -1)
        assert found[path] == pytest.approx(float(hessian.trace()), rel=0.15)


def test_batches_count_by_their_samples():
    layer = nn.Linear(1, 1, bias=False)
    x = torch.ones(257, 1)
    x[-1] = 100
    found = hessian_trace(layer, nn.functional.mse_loss, (x, x), 1, layers="")
    assert found[""] == pytest.approx(2 * (256 + 100**2) / 257)


def test_traces_are_computed_without_autocast():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), torch.randn(8, 3)

    def trace() -> dict[str, float]:
        signs = torch.Generator().manual_seed(0)
        return hessian_trace(model, nn.functional.mse_loss, (x, x[:, :1]), 2, layers=["0"], generator=signs)

    expected = trace()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trace() == expected


def test_batches_of_equal_size_count_alike_and_the_model_is_left_alone():
    layer = nn.Linear(1, 1, bias=False).requires_grad_(False)
    x = torch.tensor([[1.0], [2.0]])
    batches = [(x, x), (3 * x, x)]
    found = hessian_trace(layer, nn.functional.mse_loss, batches, 1, layers="")
    assert found[""] == pytest.approx(2 * (2.5 + 22.5) / 2)
    assert not layer.weight.requires_grad and layer.weight.grad is None
    with pytest.raises(InputError, match="data must give at least one batch"):
        hessian_trace(layer, nn.functional.mse_loss, [], 1, layers="")
    with pytest.raises(InputError, match="probes must be >= 1, got 0"):
        hessian_trace(layer, nn.functional.mse_loss, batches, 0, layers="")


def cost(bits: dict[str, int]) -> float:
    return sum(TRACES[n] / NUMEL[n] * NUMEL[n] * 4.0**-b for n, b in bits.items())


@pytest.mark.parametrize("mean_bits", [2.0, 3.1, 4.0, 5.7, 8.0])
def test_allocations_are_optimal_and_within_the_budget(mean_bits: float):
    names, total = list(NUMEL), sum(NUMEL.values())
    options = [dict(zip(names, row, strict=True)) for row in product((8, 6, 4, 2), repeat=4)]
    fitting = [o for o in options if sum(NUMEL[n] * b for n, b in o.items()) <= mean_bits * total]
    found = allocate_bits(TRACES, NUMEL, mean_bits=mean_bits)
    assert found in fitting
    assert cost(found) == pytest.approx(min(map(cost, fitting)))
    assert found == allocate_bits(TRACES, NUMEL, budget_bytes=mean_bits * total / 8)


@pytest.mark.parametrize("seed", range(4))
def test_allocations_are_optimal_for_traces_of_any_size(seed: int):
    random = np.random.default_rng(seed)
    names, choices = list("abcd"), (8, 6, 4, 2)
    numel = {name: int(random.integers(5, 400)) for name in names}
    traces = {name: numel[name] * 10 ** random.uniform(-4, 4) for name in names}
    total = sum(numel.values())
    rows = np.array(list(product(choices, repeat=4)))
    sizes = rows @ np.array(list(numel.values()))
    costs = (4.0**-rows) @ np.array(list(traces.values()))
    for mean_bits in (2.7, 3.6, 4.4, 5.3, 6.5):
        found = allocate_bits(traces, numel, choices, mean_bits=mean_bits)
        least = costs[sizes <= mean_bits * total].min()
        assert sum(traces[n] * 4.0**-b for n, b in found.items()) == pytest.approx(least, rel=1e-9)


def test_solutions_come_in_order_when_earlier_ones_are_excluded():
    found: list[dict[str, int]] = []
    for _ in range(6):
        found.append(allocate_bits(TRACES, NUMEL, mean_bits=4, exclude=found))
    costs = [cost(bits) for bits in found]
    assert costs == sorted(costs) and len({tuple(bits.values()) for bits in found}) == 6


def test_the_printed_objective_gives_few_bits_to_sensitive_layers():
    numel, traces = {"a": 100, "b": 100}, {"a": 9.0, "b": 1.0}
    assert allocate_bits(traces, numel, mean_bits=5) == {"a": 6, "b": 4}
    assert allocate_bits(traces, numel, mean_bits=5, objective="printed") == {"a": 2, "b": 8}


def test_measured_errors_decide_where_they_are_given():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    make_switchable(model, (8, 4, 2))
    model[2].weight.data.mul_(1e-3)
    errors = quantization_errors(model)
    traces = dict.fromkeys(errors, 1.0)
    assert allocate_bits(traces, dict.fromkeys(errors, 64), (8, 4, 2), mean_bits=5, errors=errors)["1"] == 8
    assert errors["1"][8] < errors["1"][4] < errors["1"][2] and model[1].bits == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one budget"),
        ({"mean_bits": 4, "budget_bytes": 9}, "give one budget"),
        ({"mean_bits": 1.9}, "the budget must allow a solution"),
        ({"mean_bits": 4, "errors": {"a": {8: 0.0}}}, "must name the same layers"),
        ({"mean_bits": 4, "errors": dict.fromkeys(NUMEL, {8: 0.0, 4: 1.0})}, r"got none of a at \[2, 6\]"),
        ({"mean_bits": 2, "exclude": [dict.fromkeys(NUMEL, 2)]}, "1 solutions excluded"),
    ],
)
def test_impossible_budgets_are_named(options, message: str):
    with pytest.raises(InputError, match=message):
        allocate_bits(TRACES, NUMEL, **options)


def test_the_roulette_turns_as_often_as_the_card_says():
    assert roulette((8, 6, 4, 2), True) == [0.4, 0.3, 0.2, 0.1]
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_bits({"a": 5.0, "b": 1.0}, (8, 6, 4, 2), 8, 1.0, generator) for _ in range(1500)]
    for name, shares in (("a", [0.4, 0.3, 0.2, 0.1]), ("b", [0.25] * 4)):
        counts = [np.mean([bits[name] == b for bits in drawn]) for b in (8, 6, 4, 2)]
        np.testing.assert_allclose(counts, shares, atol=0.04)


def test_layers_keep_the_bits_of_the_loop_unless_they_draw():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_bits({"a": 1.0, "b": 2.0}, (8, 2), 4, 0.25, generator)["a"] for _ in range(800)]
    assert np.mean([bits == 4 for bits in drawn]) == pytest.approx(0.75, abs=0.04)
    assert [redraw_probability(share, 0.4) for share in (0.0, 1.0)] == [0.0, 0.4]
    with pytest.raises(ValueError, match="share and sigma must be in"):
        redraw_probability(2.0)
