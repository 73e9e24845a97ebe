"""Binary layers: what they compute and ship as, and their training in every loop."""

import copy

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from torch import nn

import coloss
from coloss.compression import (
    Binarization,
    BinaryConv2d,
    BinaryLinear,
    binarize_layers,
    compress_model,
    estimating_error,
    gradient_stability,
    load_compressed,
    power_at,
    ship_binary_layers,
)
from coloss.distillation import LogitDistillation
from coloss.errors import InputError
from coloss.lab import Comparison
from coloss.lab.claims import verify
from coloss.nn import CausalLanguageModel, next_token_loss

BATCHES = [
    (torch.randn(6, 5, generator=torch.Generator().manual_seed(i)), torch.arange(6) % 3) for i in range(3)
]
DATA = (torch.cat([inputs for inputs, _ in BATCHES]), torch.cat([targets for _, targets in BATCHES]))
LOSS = nn.functional.cross_entropy


def new_model():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Linear(5, 8),
            nn.ReLU(),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.ReLU(),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )


def test_the_product_of_signs_and_its_scale_worked_by_hand():
    layer = BinaryLinear(2, 2)
    layer.weight.data = torch.tensor([[0.5, -1.5], [1.0, 1.0]])
    layer.bias.data = torch.tensor([0.0, 10.0])
    inputs = torch.tensor([[3.0, -0.2]])
    assert layer(inputs).tolist() == [[2.0, 10.0]]  # mean |weight| is 1
    layer.weight_scale = "channel"
    layer.weight.data[1] *= 3
    assert layer.binary_weight().tolist() == [[1.0, -1.0], [3.0, 3.0]]
    layer.weight_scale, layer.binarize_input = None, False
    torch.testing.assert_close(layer(inputs), torch.tensor([[3.2, 12.8]]))


def test_the_gradient_goes_through_signs_and_scale():
    layer = BinaryLinear(2, 1, bias=False, binarize_input=False, estimator="ste")
    layer.weight.data = torch.tensor([[0.5, -0.25]])
    layer(torch.tensor([[1.0, 2.0]])).sum().backward()
    # d/dw of mean|w| (sign(w1) x1 + sign(w2) x2): scale * x, and sign(w) / 2 * (x1 - x2)
    expected = 0.375 * torch.tensor([[1.0, 2.0]]) + torch.tensor([[0.5, -0.5]]) * (1.0 - 2.0)
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("binarize_input", [True, False])
@pytest.mark.parametrize("scale", ["layer", "channel", None])
def test_shipped_layers_compute_what_binary_ones_did(binarize_input, scale):
    options = {"binarize_input": binarize_input, "weight_scale": scale}
    convolution = BinaryConv2d(
        4, 6, 3, stride=2, padding=1, groups=2, bias=False, padding_mode="circular", **options
    )
    images = torch.randn(2, 4, 7, 7)
    assert torch.equal(convolution(images), convolution.to_plain()(images))
    linear = BinaryLinear(5, 3, dtype=torch.float64, **options)
    rows = torch.randn(4, 2, 5, dtype=torch.float64)
    assert torch.equal(linear(rows), linear.to_plain()(rows))


def test_a_shipped_model_takes_a_bit_for_each_weight_and_loads_into_the_same_structure(tmp_path):
    model = nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.Linear(64, 64, bias=False), nn.Linear(64, 2))
    binarize_layers(model)
    inputs = torch.randn(3, 4)
    outputs = model.eval()(inputs)
    assert ship_binary_layers(model) == ["2"]
    compressed = compress_model(model)
    assert compressed.weights["2.1.weight"].nbytes == 64 * 64 // 8 + 2 * 4
    path = compressed.save(tmp_path / "binary.coloss")
    fresh = nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.Linear(64, 64, bias=False), nn.Linear(64, 2))
    with pytest.raises(InputError, match="weights do not fit this model"):
        load_compressed(path).load_into(fresh)
    binarize_layers(fresh)
    ship_binary_layers(fresh)
    assert torch.equal(load_compressed(path).load_into(fresh).eval()(inputs), outputs)


def test_layers_keep_the_very_parameters_type_and_mode():
    model = new_model().double().eval()
    weight = model[3].weight
    assert binarize_layers(model) == ["3"]
    assert model[3].weight is weight and not model[3].training and model[3].power.dtype == torch.float32
    assert {"3.weight", "3.bias", "3.power"} <= set(model.state_dict())


def test_the_power_rises_along_a_quarter_of_a_cosine():
    powers = [power_at(step / 10, 3.0) for step in range(11)]
    assert powers[0] == 1.0 and powers[-1] == pytest.approx(3.0) and powers == sorted(powers)
    assert powers[5] == pytest.approx(1 + 2 * (1 - 0.5**0.5))
    model = new_model()
    seen = []

    class Watch(coloss.Method):
        def terms(self, state):
            seen.append(float(state.model[3].power))
            return {}

    coloss.fit(model, BATCHES, LOSS, [Binarization(end_power=5.0), Watch()], budget=coloss.Budget(steps=4))
    assert seen == pytest.approx([power_at(step / 4, 5.0) for step in range(4)])


def test_indicators_fall_and_rise_with_the_power():
    torch.manual_seed(0)
    model = nn.Sequential(BinaryLinear(16, 16), nn.LayerNorm(16), BinaryLinear(16, 4))
    inputs, targets = torch.randn(32, 16), torch.randint(4, (32,))
    errors, stabilities = [], []
    for power in (1.0, 3.0, 20.0, 50.0):
        for layer in (model[0], model[2]):
            layer.power.fill_(power)
        model.zero_grad()
        LOSS(model(inputs), targets).backward()
        errors.append(estimating_error(model))
        stabilities.append(gradient_stability(model))
    assert errors == sorted(errors, reverse=True) and estimating_error(model, power=1e6) < 1e-2 * errors[0]
    assert stabilities == sorted(stabilities) and stabilities[-1] > 20 * stabilities[0]


def test_each_estimator_is_judged_by_its_own_function():
    weight = torch.tensor([[1.0, 0.25]])
    expected = {"ste": 0.75, "reste": 1 - 0.25**0.5, "polynomial": 1 - 0.4375}
    for estimator, error in expected.items():
        layer = BinaryLinear(2, 1, estimator=estimator)
        layer.weight.data = weight.clone()
        layer.power.fill_(2.0)
        assert estimating_error(layer) == pytest.approx(error)
    layer = BinaryLinear(2, 1, estimator="tanh")
    layer.weight.data = weight
    rest = 1 - torch.tensor([3.0, 0.75]).tanh()
    assert estimating_error(layer, power=3.0) == pytest.approx(rest.norm().item())


def test_a_layer_at_two_paths_stays_one_and_layers_that_are_not_called_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model.insert(3, model[2])
    binarize_layers(model, binarize_input=False)
    assert model[2] is model[3] and type(model[2]) is BinaryLinear
    ship_binary_layers(model)
    assert model[2] is model[3] and type(model[2]) is nn.Linear
    with pytest.raises(
        InputError, match="layer 'linear1' cannot be replaced: its TransformerEncoderLayer reads"
    ):
        binarize_layers(nn.TransformerEncoderLayer(8, 2, 8), "linear1")
    with pytest.raises(InputError, match="model must contain its layers, got a BinaryLinear itself"):
        ship_binary_layers(BinaryLinear(2, 2))


def test_building_it_draws_nothing_and_frozen_parameters_ship_frozen():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Binarization()
    assert torch.equal(torch.rand(1), expected)
    layer = BinaryLinear(2, 2, binarize_input=False).requires_grad_(False)
    assert not any(p.requires_grad for p in layer.to_plain().parameters())


def test_the_lab_runs_it_on_its_own_network(tmp_path):
    result = Comparison("iris", ["cross-entropy", "reste"], seeds=1, budget=coloss.Budget(steps=2)).run(
        tmp_path
    )
    plain, binary = (trial.cost.stored_bytes for trial in result.trials)
    assert binary < plain


def test_one_result_in_every_loop_after_a_kill_and_on_two_processes(tmp_path):
    check_loops(new_model, lambda: Binarization(), BATCHES, LOSS)
    check_resume(new_model, lambda: Binarization(end_power=9.0), DATA, tmp_path, LOSS)

    def train(fabric):
        inputs, targets = DATA
        data = (inputs.double(), targets)
        run = coloss.fit(
            new_model().double(),
            data,
            LOSS,
            [Binarization()],
            budget=coloss.Budget(steps=4),
            batch_size=8,
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_it_composes_with_a_teacher_and_runs_on_a_language_model():
    teacher = copy.deepcopy(new_model())
    methods = [Binarization(), LogitDistillation(teacher)]
    run = coloss.fit(new_model(), BATCHES, LOSS, methods, budget=coloss.Budget(steps=3))
    assert {"cross_entropy", "logit_distillation"} <= set(run.history[-1].terms)
    model = CausalLanguageModel(7, dim=8, depth=1, heads=2)
    ids = torch.randint(7, (4, 6))
    method = Binarization(layers="transformer.blocks", binarize_input=False, log_indicators=True)
    run = coloss.fit(model, (ids, ids.roll(-1, 1)), next_token_loss, [method], budget=coloss.Budget(steps=2))
    assert type(run.model.transformer.blocks[0].mlp[0]) is nn.Linear
    assert {"estimating_error", "gradient_stability"} <= set(run.history[-1].metrics)


def test_bad_input_is_named(as_users_call):
    with pytest.raises(ValueError, match="end_power must be >= 1 and finite, got 0.5"):
        Binarization(end_power=0.5)
    with pytest.raises(ValueError, match='weight_scale must be "layer", "channel" or None'):
        BinaryLinear(2, 2, weight_scale="row")
    with pytest.raises(ValueError, match="clip must be > 0"):
        Binarization(clip=-1.0)
    with pytest.raises(ValueError, match="must have both signs, got none below 0"):
        BinaryLinear(2, 2)(torch.rand(3, 2))
    with pytest.raises(ValueError, match="no layer to compress"):
        coloss.fit(nn.Linear(5, 3), BATCHES, LOSS, [Binarization()], budget=coloss.Budget(steps=1))


def test_autocast_keeps_the_values():
    layer = BinaryLinear(6, 4)
    inputs = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(inputs)
    torch.testing.assert_close(narrow.float(), layer(inputs), rtol=0.02, atol=0.02)


def test_the_claim_runs():
    found = verify("reste", smoke=True, seeds=1)
    assert {"straight-through", "reste", "plain"} <= set(found["arms"])
    stored = {name: arm["metrics"]["stored_bytes"]["mean"] for name, arm in found["arms"].items()}
    assert stored["reste"] == pytest.approx(stored["made binary after training"], rel=0.01)
    assert stored["reste"] < 0.4 * stored["plain"]
    assert "gradient_stability" in found["arms"]["reste"]["metrics"]
