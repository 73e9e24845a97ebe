"""Quantisers: positive scales that leave two bits alive, and steps of inputs that the first batch sets."""

import pytest
import torch
from torch import nn

from coloss.compression import (
    ActivationQuantizer,
    MultiBitQuantizer,
    ScaleAdam,
    SwitchableLinear,
    make_switchable,
)
from coloss.errors import InputError


@pytest.mark.parametrize("value", [-60.0, 5.0])
def test_scales_stay_positive_whatever_an_optimizer_does(value: float):
    quantizer = MultiBitQuantizer(8, (8, 2)).initialise(torch.ones(3))
    quantizer.log_scale.data.fill_(value)
    assert quantizer.scale.item() > 0
    assert bool(quantizer(torch.linspace(-1, 1, 7)).isfinite().all())


@pytest.mark.parametrize(
    "quantizer",
    [
        MultiBitQuantizer(8, (8, 2)),
        MultiBitQuantizer(2, (2,)),
        MultiBitQuantizer(8, (8, 2), independent=True),
    ],
)
def test_first_grids_are_the_same_however_scales_are_kept_and_leave_two_bits_alive(quantizer):
    weight = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    quantizer.initialise(weight).current = 2
    values = quantizer(weight)
    assert float((values != 0).float().mean()) > 0.3
    step = 64 * 3 * float(weight.square().mean().sqrt()) / 127
    assert values.unique().tolist() == pytest.approx([-2 * step, -step, 0, step], rel=1e-5)


def test_a_precision_added_to_independent_scales_spans_what_the_others_span():
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0))
    quantizer = MultiBitQuantizer(8, (8, 4), independent=True).initialise(weight)
    quantizer.add_precision(3)
    assert (quantizer.log_scale_at(3) - quantizer.log_scale_at(4)).exp().item() == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_weight_that_starts_at_zero_learns(per_channel: bool):
    layer = SwitchableLinear(16, 3, bias=False, bits=(8, 4))
    layer.weight.data.zero_()
    layer.add_quantizers((8, 4), per_channel=per_channel)
    x, target = torch.randn(32, 16), torch.ones(32, 3)
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        assert bool((layer.weight.grad != 0).all())
        optimizer.step()
    assert layer.quantized_weight().abs().max().item() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_stay_in_float32_where_the_model_is_turned_to_half_precision(dtype: torch.dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    make_switchable(model, (8, 2), activations=True)
    scales = ScaleAdam(model)
    before = model[1].weight_quantizer.log_scale.item()
    model.to(dtype), scales.to(dtype)
    assert model[1].weight.dtype == dtype
    assert {p.dtype for n, p in model.named_parameters() if "log_scale" in n} == {torch.float32}
    assert {b.dtype for b in scales.buffers()} == {torch.float32}
    scales.step({id(p): torch.ones(()) for p in scales.in_use()[8]}, {8: 5e-3})
    assert model[1].weight_quantizer.log_scale.item() == pytest.approx(before - 5e-3, rel=1e-5)
    assert model.double()[1].weight_quantizer.log_scale.dtype == torch.float64


@pytest.mark.parametrize("first", [torch.full((2, 3), torch.nan), torch.zeros(2, 3), torch.zeros(0, 3)])
def test_a_batch_that_tells_nothing_does_not_set_the_step(first: torch.Tensor):
    quantizer = ActivationQuantizer((8, 2))
    quantizer(first)
    assert not quantizer.ready and quantizer.signed is None
    x = torch.tensor([[-1.0, 2.0]])
    quantizer(x)
    assert quantizer.ready == {8} and quantizer.signed is True
    assert quantizer.scale.item() == pytest.approx(3 / 127**0.5, rel=1e-5)


def test_an_unknown_rounding_is_named_at_once(as_users_call):
    with pytest.raises(ValueError, match="rounding must be"):
        MultiBitQuantizer(rounding="up")


def test_a_weight_of_zeros_and_scales_for_channels():
    assert torch.equal(MultiBitQuantizer().initialise(torch.zeros(4))(torch.zeros(4)), torch.zeros(4))
    weight = torch.tensor([[1.0, -1.0], [100.0, -100.0]])
    quantizer = MultiBitQuantizer(8, (8,), per_channel=True).initialise(weight)
    assert (quantizer.scale[1] / quantizer.scale[0]).item() == pytest.approx(100)


def test_independent_scales_round_once():
    torch.manual_seed(0)
    weight = torch.randn(500)
    quantizer = MultiBitQuantizer(8, (8, 4), independent=True).initialise(weight)
    quantizer.current = 4
    scale = quantizer.scale
    assert torch.equal(quantizer(weight), (weight / scale).round().clamp(-8, 7) * scale)
    with pytest.raises(InputError, match="independent scales share no integers"):
        quantizer.codes(weight)


def test_inputs_have_a_sign_only_where_the_first_batch_has():
    for shift, signed in ((0.0, False), (-0.5, True)):
        quantizer = ActivationQuantizer((4, 2))
        x = torch.rand(8, 5) + shift
        quantizer.eval()(x - 9)
        assert quantizer.signed is None
        quantizer.train()(x)
        assert quantizer.signed is signed and quantizer.ready == {4}
        scale = 2 * x.abs().mean() / (7 if signed else 15) ** 0.5
        assert quantizer.scale.item() == pytest.approx(float(scale), rel=1e-5)
        quantizer(10 * x)
        assert quantizer.scale.item() == pytest.approx(float(scale), rel=1e-5)
