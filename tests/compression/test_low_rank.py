"""Facts about layers turned into two thinner ones, their cost, and refreshed batch statistics."""

import copy
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from coloss.compression import (
    decompose,
    decompose_model,
    matricize,
    multiply_adds,
    multiply_adds_per_position,
    refresh_batch_norm,
    select_layers,
    truncated_svd,
)
from coloss.data import IndexedDataset, Loader
from coloss.errors import InputError
from coloss.nn import MLP, Classifier, ConvNet, ResNet
from coloss.train import load_model, save_model

SCHEMES = ("channel", "spatial", "decoupled")
CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "stride 2 and padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "all settings differ by axis": {
        "kernel_size": (3, 2),
        "stride": (2, 3),
        "padding": (2, 1),
        "dilation": (1, 2),
    },
    "same": {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflected border": {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"},
    "circular border, stride": {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "circular"},
    "no bias": {"kernel_size": 3, "bias": False},
    "pointwise": {"kernel_size": 1},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def seeded(build, *args, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **options)


def full_rank(layer, scheme):
    return min(matricize(layer.weight.detach(), scheme)[0].shape[-2:])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_full_rank_reproduces_the_convolution(scheme, settings):
    layer = seeded(nn.Conv2d, 5, 6, **settings).double()
    x = torch.randn(2, 5, 11, 13, dtype=torch.float64)
    thin = decompose(layer, scheme, rank=full_rank(layer, scheme), only_if_smaller=False)
    assert isinstance(thin, nn.Sequential)
    torch.testing.assert_close(thin(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", ["channel", "decoupled"])
@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (9,)), (nn.Conv3d, (5, 6, 7))])
def test_convolutions_of_one_and_three_dimensions(scheme, kind, shape):
    layer = seeded(kind, 4, 6, 3, stride=2, padding=1)
    x = torch.randn(2, 4, *shape)
    thin = decompose(layer, scheme, rank=full_rank(layer, scheme), only_if_smaller=False)
    torch.testing.assert_close(thin(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias):
    layer = seeded(nn.Linear, 7, 5, bias=bias)
    x = torch.randn(3, 4, 7)
    torch.testing.assert_close(
        decompose(layer, rank=5, only_if_smaller=False)(x), layer(x), rtol=0, atol=1e-5
    )


@given(st.sampled_from(SCHEMES), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_pair_is_the_layer_with_the_closest_weight_of_that_rank(scheme, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    matrix, restore = matricize(layer.weight.detach(), scheme)
    U, S, Vh, _ = truncated_svd(matrix, rank=rank)
    twin.weight.data = restore(U * S.unsqueeze(-2) @ Vh)
    torch.testing.assert_close(decompose(layer, scheme, rank=rank, only_if_smaller=False)(x), twin(x))


@pytest.mark.parametrize(
    ("scheme", "first", "second"),
    [
        ("channel", (2, 8, 3, 5), (16, 2, 1, 1)),
        ("spatial", (2, 8, 3, 1), (16, 2, 1, 5)),
        ("decoupled", (32, 8, 1, 1), (16, 2, 3, 5)),
    ],
)
def test_shapes_biases_and_formulas_of_the_paper(scheme, first, second):
    dense, rank = nn.Conv2d(8, 16, (3, 5)), 2
    thin = decompose(dense, scheme, rank=rank)
    assert (thin[0].weight.shape, thin[1].weight.shape) == (first, second)
    assert thin[0].bias is None
    assert torch.equal(thin[1].bias, dense.bias)
    expected = {
        "channel": rank * (8 * 15 + 16),
        "spatial": rank * (8 * 3 + 16 * 5),
        "decoupled": rank * 16 * (8 + 15),
    }
    assert multiply_adds_per_position(thin) == expected[scheme]
    assert multiply_adds_per_position(dense) == 16 * 8 * 15


def test_factors_are_of_equal_size():
    """Each factor holds half of every singular value, so its squared norm is the nuclear norm."""
    layer = seeded(nn.Linear, 12, 9)
    thin = decompose(layer, rank=9, only_if_smaller=False)
    values = torch.linalg.svdvals(layer.weight.detach())
    for part in thin:
        torch.testing.assert_close(part.weight.detach().square().sum(), values.sum())


def test_each_criterion_chooses_the_rank():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.01]))
    # Energies are of squared values: 9 of 10.25 is 0.878; of plain values, 3 of 4.51 would be 0.67.
    for criterion, rank in (
        ({"rank": 2}, 2),
        ({"energy": 0.87}, 1),
        ({"energy": 0.88}, 2),
        ({"threshold": 0.05}, 3),
        ({"threshold": 99.0}, 1),
    ):
        assert decompose(layer, **criterion, only_if_smaller=False)[0].out_features == rank


def test_a_threshold_finds_the_gap_of_an_exactly_low_rank_layer():
    layer = seeded(nn.Conv2d, 16, 16, 3, padding=1)
    matrix, restore = matricize(layer.weight.detach(), "spatial")
    U, S, Vh, _ = truncated_svd(matrix, rank=3)
    layer.weight.data = restore(U * S @ Vh)
    thin = decompose(layer, "spatial", threshold=0.05)
    x = torch.randn(2, 16, 6, 6)
    assert thin[0].out_channels == 3
    torch.testing.assert_close(thin(x), layer(x), rtol=0, atol=1e-5)


def test_a_layer_is_kept_where_two_would_cost_as_much():
    layer = nn.Linear(6, 3)  # 18 multiply-adds; rank k takes 9 k
    assert decompose(layer, rank=2) is layer
    assert isinstance(decompose(layer, rank=1), nn.Sequential)


def test_a_stride_makes_the_first_layer_dearer():
    # Rank 5 of 3 x 3, 8 -> 8: 5 (24 + 24) = 240 < 576, but 1 x 1 before a stride of 2 runs at four times the positions.
    assert multiply_adds_per_position(decompose(nn.Conv2d(8, 8, 3), "decoupled", rank=4)) == 4 * 8 * (8 + 9)
    layer = nn.Conv2d(8, 8, 3, stride=2)
    thin = decompose(layer, "decoupled", rank=2, only_if_smaller=False)
    assert multiply_adds_per_position(thin) == 4 * (2 * 8 * 8) + 2 * 8 * 9 == 656
    assert decompose(layer, "decoupled", rank=2) is layer


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
def test_the_formula_is_what_is_counted_while_running(scheme, stride):
    """Circular borders and an input that the stride divides leave no border effects."""
    layer = nn.Conv2d(4, 6, 3, stride=stride, padding=1, padding_mode="circular")
    x = torch.rand(1, 4, 12, 12)
    for module in (layer, decompose(layer, scheme, rank=2, only_if_smaller=False)):
        positions = prod(module(x).shape[2:])
        padding_free = multiply_adds(module, x) / positions
        assert padding_free == multiply_adds_per_position(module)


def test_counting_a_network_by_hand_and_leaving_it_as_it_was():
    model = Classifier(ConvNet(1, (4, 8), kernel_size=3), 10).train()
    statistics = model.backbone.stages[0][1].running_mean.clone()
    expected = 64 * (1 * 4 * 9) + 16 * (4 * 8 * 9) + 8 * 10
    assert multiply_adds(model, torch.rand(1, 1, 8, 8)) == expected
    assert multiply_adds(model, torch.rand(5, 1, 8, 8)) == 5 * expected
    assert model.training
    assert torch.equal(model.backbone.stages[0][1].running_mean, statistics)


def test_device_dtype_mode_trainability_and_random_state_are_kept():
    layer = nn.Conv2d(8, 8, 3).double().eval()
    layer.weight.requires_grad_(False)
    before = torch.get_rng_state()
    thin = decompose(layer, rank=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [parameter.dtype for parameter in thin.parameters()] == [torch.float64] * 3
    assert [parameter.requires_grad for parameter in thin.parameters()] == [False, False, True]
    assert not any(part.training for part in thin.modules())
    assert layer.weight.shape == (8, 8, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    layer = seeded(nn.Linear, 16, 16).to(dtype)
    thin = decompose(layer, rank=16, only_if_smaller=False)
    assert thin[0].weight.dtype == dtype
    product = thin[1].weight.float() @ thin[0].weight.float()
    torch.testing.assert_close(product, layer.weight.float(), rtol=0, atol=0.01)


def test_a_zero_weight_becomes_rank_one():
    layer = nn.Conv2d(4, 4, 3)
    nn.init.zeros_(layer.weight)
    thin = decompose(layer, energy=0.9)
    assert thin[0].out_channels == 1
    assert torch.equal(thin(torch.rand(1, 4, 3, 3)).flatten(), layer.bias)


def convolutional():
    return seeded(lambda: Classifier(ConvNet(1, (8, 16, 16)), 10))


def test_a_model_is_factorised_in_place_with_a_report():
    model = convolutional()
    whole = copy.deepcopy(model)
    first, second = decompose_model(model, rank={"backbone.stages.1.0": 3, "backbone.stages.2.0": 15})
    assert (first.path, first.rank, first.full_rank, first.replaced) == ("backbone.stages.1.0", 3, 16, True)
    assert (first.multiply_adds_before, first.multiply_adds_after) == (16 * 72, 3 * (72 + 16))
    assert (first.parameters_before, first.parameters_after) == (16 * 72, 3 * (72 + 16))
    assert (second.path, second.rank, second.replaced) == ("backbone.stages.2.0", 15, False)
    assert second.multiply_adds_after == second.multiply_adds_before == 16 * 144
    assert torch.equal(model.backbone.stages[2][0].weight, whole.backbone.stages[2][0].weight)
    x = torch.rand(1, 1, 8, 8)
    saved = 4 * 4 * (first.multiply_adds_before - first.multiply_adds_after)
    assert multiply_adds(whole, x) - multiply_adds(model, x) == saved


def test_rank_is_capped_at_what_a_layer_has():
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3), nn.Linear(3, 9), nn.Linear(9, 2))
    report = decompose_model(model, rank=8, only_if_smaller=False)
    assert [(layer.path, layer.rank) for layer in report] == [("1", 3), ("2", 3)]


def test_a_factorised_model_is_stored_and_loaded_into_a_fresh_one(tmp_path):
    model = convolutional().eval()
    ranks = {layer.path: layer.rank for layer in decompose_model(model, energy=0.5)}
    fresh = Classifier(ConvNet(1, (8, 16, 16)), 10).eval()
    decompose_model(fresh, rank=ranks)
    load_model(fresh, save_model(model, tmp_path / "model.safetensors"))
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(fresh(x), model(x))


def test_tied_layers_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model.append(model[1])
    model.append(nn.Linear(8, 2))
    decompose_model(model, rank=2, layers="1")
    assert isinstance(model[1], nn.Sequential)
    assert model[4] is model[1]


@pytest.mark.parametrize(
    ("model", "scheme", "expected"),
    [
        (Classifier(ConvNet(1, (4, 4, 4)), 3), "channel", ["backbone.stages.1.0", "backbone.stages.2.0"]),
        (Classifier(ConvNet(2, (4, 4), dims=1), 3), "channel", ["backbone.stages.1.0"]),
        (Classifier(ConvNet(2, (4, 4), dims=1), 3), "decoupled", ["backbone.stages.1.0"]),
        (MLP(4, (8, 8, 8), 3), "channel", ["layers.3", "layers.6"]),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 3))), "spatial", ["2"]),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)),
            "channel",
            ["2"],
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)), "channel", ["1"]),
    ],
)
def test_layers_by_the_rule(model, scheme, expected):
    assert list(select_layers(model, scheme)) == expected


def test_the_rule_in_a_residual_network_spares_shortcuts():
    model = ResNet(3)
    chosen = select_layers(model)
    convolutions = [path for path, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    assert list(chosen) == [
        path for path in convolutions[1:] if model.get_submodule(path).kernel_size != (1, 1)
    ]
    assert len(chosen) < len(convolutions) - 1


def test_layers_whose_weight_is_computed_are_not_chosen():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    parametrizations.weight_norm(model[1])
    assert list(select_layers(model)) == ["2"]
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    assert list(select_layers(nn.Sequential(nn.Linear(8, 8), attention, nn.Linear(8, 8)))) == [
        "1.linear1",
        "1.linear2",
    ]
    with pytest.raises(
        InputError, match=r"layer '1' cannot be factorised: module must be one of .*got ParametrizedConv2d"
    ):
        select_layers(model, layers="1")


def test_a_block_stands_for_the_layers_in_it_that_the_scheme_takes():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Linear(4, 4))
    )  # fmt: skip
    assert list(select_layers(model, layers="1")) == ["1.2", "1.3"]
    assert list(select_layers(model, "spatial", layers=["1", "0"])) == ["1.2", "0"]
    assert list(select_layers(model, "decoupled", layers="")) == ["0", "1.2"]


def test_layers_whose_weight_the_block_around_them_reads_are_refused():
    """In evaluation mode torch's encoder layer reads `linear1.weight`, which a pair of layers does not have."""
    model = nn.Sequential(
        nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 2)
    )
    before = {name: type(part) for name, part in model.named_modules()}
    for layers in (None, "1.linear2"):
        with pytest.raises(InputError, match=r"layer '1.linear.' cannot be replaced.*decompose=False"):
            decompose_model(model, rank=2, layers=layers)
    assert {name: type(part) for name, part in model.named_modules()} == before
    assert model.eval()(torch.rand(2, 3, 8)).shape == (2, 3, 2)


def test_bad_layers_and_models_are_named():
    for model, scheme, message in (
        (
            nn.Linear(3, 3),
            "channel",
            "Linear has no layer to keep low-rank with the scheme 'channel': looked for ungrouped",
        ),
        (
            MLP(4, (8,), 2),
            "channel",
            "nor linear layers between the first and the last of the model; name layers with",
        ),
        (
            MLP(4, (8, 8), 2),
            "spatial",
            "looked for ungrouped 2-D convolutions with a kernel larger than 1 after the first",
        ),
        (Classifier(ConvNet(1, (4,)), 2), "channel", "Classifier has no layer to keep low-rank"),
    ):
        with pytest.raises(InputError, match=message):
            select_layers(model, scheme)
    model = convolutional()
    with pytest.raises(InputError, match=r"got 'backbone.stages.1.9'; did you mean .*'backbone.stages.1.0'"):
        select_layers(model, layers=["backbone.stages.1.9"])
    with pytest.raises(
        InputError, match="layer 'backbone.stages.1.1' cannot be factorised: .* got BatchNorm2d"
    ):
        decompose_model(model, layers="backbone.stages.1.1", rank=1)
    with pytest.raises(InputError, match="layers must name at least one layer, got none"):
        select_layers(model, layers=[])
    with pytest.raises(
        InputError, match="rank must hold a rank for each layer, got none for 'backbone.stages.2.0'"
    ):
        decompose_model(model, rank={"backbone.stages.1.0": 2})
    with pytest.raises(
        InputError, match="layers must lie inside the model, got the model itself: use decompose"
    ):
        decompose_model(nn.Linear(3, 3), layers="", rank=1)


def test_bad_layers_and_criteria_of_one_layer_are_named():
    with pytest.raises(ValueError, match="module must have groups=1, got 4"):
        decompose(nn.Conv2d(4, 4, 3, groups=4), rank=1)
    with pytest.raises(ValueError, match="module must be one of .* got ConvTranspose2d"):
        decompose(nn.ConvTranspose2d(4, 4, 3), rank=1)
    with pytest.raises(ValueError, match="scheme must be \"channel\" for nn.Linear, got 'decoupled'"):
        decompose(nn.Linear(4, 4), "decoupled", rank=1)
    with pytest.raises(
        ValueError, match='scheme must be "channel" or "decoupled" for nn.Conv1d, got "spatial"'
    ):
        decompose(nn.Conv1d(4, 4, 3), "spatial", rank=1)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 4\], got 5"):
        decompose(nn.Conv2d(4, 4, 3), rank=5)
    with pytest.raises(ValueError, match="exactly one of energy, rank and threshold must be given, got none"):
        decompose(nn.Conv2d(4, 4, 3))
    with pytest.raises(
        ValueError, match="layer must be linear, a convolution or an nn.Sequential of these, got ReLU"
    ):
        multiply_adds_per_position(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_refreshed_statistics_are_those_of_the_data():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=0.3)
    )
    data = torch.randn(40, 3)
    weights = [parameter.clone() for parameter in model.parameters()]
    model.train()
    refresh_batch_norm(model, data, batch_size=40)
    hidden = model[0](data).detach()
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[1].running_var, hidden.var(0))
    # The second sees what the shipped network gives it: dropout off, first norm as in this batch.
    normal = nn.functional.batch_norm(
        hidden, None, None, model[1].weight, model[1].bias, training=True
    ).detach()
    torch.testing.assert_close(model[3].running_var, normal.var(0))
    assert (model[1].momentum, model[3].momentum) == (0.1, 0.3)
    assert model[2].training
    assert all(torch.equal(now, before) for now, before in zip(model.parameters(), weights))


def test_refreshing_weighs_batches_by_their_samples():
    model = nn.BatchNorm1d(1)
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[6.0], [6.0], [6.0], [6.0]])]
    refresh_batch_norm(model, batches)
    assert model.running_mean.item() == pytest.approx((1.0 * 2 + 6.0 * 4) / 6)
    assert model.running_var.item() == pytest.approx(2.0 * 2 / 6)


def test_refreshing_takes_every_kind_of_data_and_the_global_randomness_is_left_alone():
    data = torch.randn(33, 2)
    expected = nn.BatchNorm1d(2)
    refresh_batch_norm(expected, data[:32], batch_size=16)
    state = torch.get_rng_state()
    for source in (
        data,
        IndexedDataset(data, torch.zeros(33)),
        Loader(IndexedDataset(data), 16, shuffle=False, drop_last=True),
        [(part, None) for part in data[:32].split(16)],
    ):
        model = nn.BatchNorm1d(2)
        model.running_mean.fill_(7.0)
        refresh_batch_norm(model, source, batch_size=16)
        torch.testing.assert_close(model.running_mean, expected.running_mean)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failed_refresh_puts_momentum_and_mode_back():
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    with pytest.raises(ValueError, match="more than 1 value"):
        refresh_batch_norm(model, [torch.zeros(1, 3)])
    assert (model[0].momentum, model[0].training) == (0.1, False)


def test_bad_input_of_refreshing_is_named():
    norm = nn.BatchNorm1d(2)
    with pytest.raises(InputError, match="Linear has no batch normalisation with running statistics"):
        refresh_batch_norm(nn.Linear(2, 2), torch.zeros(4, 2))
    with pytest.raises(InputError, match="batch_size must be >= 2, got 1"):
        refresh_batch_norm(norm, torch.zeros(4, 2), batch_size=1)
    with pytest.raises(InputError, match="data must give at least one batch, got none"):
        refresh_batch_norm(norm, [])
    with pytest.raises(
        InputError, match="data must be a tensor, an IndexedDataset or an iterable of batches, got int"
    ):
        refresh_batch_norm(norm, 3)
