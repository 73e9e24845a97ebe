"""Rates of the scales by hand, and Adam with moments of each precision against torch's own."""

import pytest
import torch
from torch import nn

from coloss.compression import (
    ScaleAdam,
    adaptive_scale_rate,
    make_switchable,
    precision_rate_factor,
    set_bits,
)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_rate_factors_of_even_and_odd_gaps():
    assert [precision_rate_factor(8, b) for b in (8, 6, 4, 2)] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert [precision_rate_factor(8, b) for b in (7, 5, 3)] == pytest.approx([0.5, 0.05, 0.005])


def test_rates_by_hand_and_the_literal_form_is_never_negative():
    gradients = [torch.tensor(0.01), torch.tensor([3.0, 4.0])]
    # The second is clipped to norm 1: (0.6, 0.8).
    mean = (0.01 + 0.8) / 2
    assert adaptive_scale_rate(gradients, 1e-2, 8, 4) == pytest.approx(0.01 * 1e-2 * (1 - mean))
    assert adaptive_scale_rate(gradients, 5e-4, 8, 8, "literal") == 0.0
    assert adaptive_scale_rate(gradients[:1], 0.5, 8, 6, "literal") == pytest.approx(0.1 * 0.49)


def test_scales_are_moved_by_adam_with_moments_of_each_precision():
    model = small()
    make_switchable(model, (8, 2))
    scales = ScaleAdam(model)
    twin = nn.Parameter(model[2].weight_quantizer.log_scale.detach().clone())
    optimizers = {bits: torch.optim.Adam([twin], lr=1.0) for bits in (8, 2)}
    for bits, rate, slope in ((8, 0.1, 3.0), (2, 0.01, -7.0), (8, 0.1, -1.0), (2, 0.02, 5.0)):
        set_bits(model, bits)
        ours = scales.in_use()[bits][0]
        scales.step({id(ours): torch.tensor(slope)}, {bits: rate})
        twin.grad = torch.tensor(slope)
        optimizers[bits].param_groups[0]["lr"] = rate
        optimizers[bits].step()
        torch.testing.assert_close(ours.detach(), twin.detach())


def test_scales_that_the_loss_did_not_reach_stay():
    model = small()
    make_switchable(model, (8, 2), activations=True)
    scales = ScaleAdam(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if "log_scale" in name}
    set_bits(model, 2)
    weight, step = scales.in_use()[2]
    scales.step({id(weight): torch.ones(()), id(step): None}, {2: 0.1})
    moved = [n for n, v in before.items() if not torch.equal(model.state_dict()[n], v)]
    assert moved == ["2.weight_quantizer.log_scales.8"]
    assert scales.count_2.tolist() == [1.0, 0.0] and scales.count_8.tolist() == [0.0, 0.0]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="bits must be <= high_bits 4, got 6"):
        precision_rate_factor(4, 6)
    with pytest.raises(ValueError, match="gradients must hold at least one tensor"):
        adaptive_scale_rate([], 0.1, 8, 4)
