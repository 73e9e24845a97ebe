"""Facts about weights as codes and tables: exact, in the bytes that are promised, through files and layers that run from codes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coloss.compression import (
    Codebook,
    CodebookConv2d,
    CodebookLinear,
    compress_model,
    group_rows,
    groups_within,
    kmeans_codebook,
    load_compressed,
    permute_neurons,
    run_from_codes,
)
from coloss.errors import InputError


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread_rows(rows=16, columns=64):
    """Every other row ten times as wide."""
    return randn(rows, columns) * torch.where(torch.arange(rows) % 2 == 0, 1.0, 0.1)[:, None]


def test_codewords_enough_for_all_distinct_values_are_exact():
    weight = torch.tensor([-1.5, -0.25, 0.5, 2.0])[torch.randint(4, (6, 3, 2, 2))]
    for groups in (1, 3):
        codebook = kmeans_codebook(weight, 2, groups)
        assert torch.equal(codebook.dequantize(), weight)
        assert codebook.codes.dtype == torch.uint8


def test_tables_are_float16_and_codes_the_nearest_in_them():
    weight = randn(8, 40)
    codebook = kmeans_codebook(weight, 3, 2)
    assert codebook.table.dtype == torch.float16
    tables = codebook.group_tables()[codebook.group_of_row()]
    nearest = (weight[:, :, None] - tables[:, None]).abs().argmin(-1)
    assert torch.equal(codebook.row_codes().long(), nearest)
    assert (codebook.table.diff(dim=1) >= 0).all()


@given(st.integers(1, 8), st.integers(1, 5), st.booleans(), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=10)
def test_the_number_of_bits_is_what_is_stored_and_restored_is_what_is_used(
    bits, groups, scaled, rows, columns
):
    weight = randn(rows, columns, seed=bits)
    codebook = kmeans_codebook(weight, bits, groups, scale_per_group=scaled)
    stored = codebook.stored()
    assert codebook.nbits() == 8 * stored.nbytes
    assert torch.equal(stored.restore(), codebook.dequantize())
    assert codebook.row_group_bounds[-1] == rows


def test_bits_by_hand():
    weight = spread_rows(16, 64)
    one, four = kmeans_codebook(weight, 2), kmeans_codebook(weight, 2, 4)
    assert one.nbits() == 16 * 64 * 2 + 4 * 16
    assert four.nbits() == 16 * 64 * 2 + 4 * 4 * 16 + 16 * 2
    assert four.in_order().nbits() == 16 * 64 * 2 + 4 * 4 * 16
    scaled = kmeans_codebook(weight, 2, 2, scale_per_group=True)
    assert scaled.nbits() == 16 * 64 * 2 + 4 * 16 + 2 * 16 + 16


def test_groups_find_rows_of_alike_spread_and_lower_the_error():
    weight = spread_rows()
    assert group_rows(weight, 2).tolist() == [1, 0] * 8
    for scaled in (False, True):
        one, two = (kmeans_codebook(weight, 2, groups, scale_per_group=scaled) for groups in (1, 2))
        assert two.group_of_row().tolist() == [1, 0] * 8
        assert two.table.shape == (1 if scaled else 2, 4)
        errors = [float((weight - book.dequantize()).square().mean()) for book in (one, two)]
        assert errors[1] < 0.9 * errors[0]


def test_rows_that_are_all_alike_make_one_group():
    assert group_rows(torch.ones(5, 3), 4).unique().tolist() == [0]
    assert kmeans_codebook(torch.zeros(4, 3), 2, 3, scale_per_group=True).dequantize().eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    codebook = kmeans_codebook(randn(6, 10).to(dtype), 3, 2, scale_per_group=True)
    assert codebook.dequantize().dtype == dtype
    assert torch.equal(codebook.stored().restore(), codebook.dequantize())


def test_a_file_gives_back_the_weights(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    given = {}
    for index, scaled in ((0, False), (2, True)):
        codebook = kmeans_codebook(model[index].weight, 2, 3, scale_per_group=scaled)
        model[index].weight.data.copy_(codebook.dequantize())
        given[f"{index}.weight"] = codebook.stored()
    path = compress_model(model, given).save(tmp_path / "model.coloss")
    fresh = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    restored = load_compressed(path).load_into(fresh)
    x = randn(2, 2, 6, 6)
    assert torch.equal(restored(x), model(x))
    tensors = sum(stored.nbytes for stored in given.values()) + 4 * (8 + 5)
    assert tensors == compress_model(model, given).nbytes
    assert 0 < path.stat().st_size - tensors < 2000


def test_how_many_groups_a_size_allows():
    shape = (16, 128)
    groups = groups_within(shape, 2, 2.2)
    weight = spread_rows(*shape) * torch.linspace(1, 3, 16)[:, None]
    assert kmeans_codebook(weight, 2, groups).nbits() <= 2.2 * 16 * 128
    assert groups_within(shape, 2, 2 + 4 * 16 / (16 * 128)) == 1
    with pytest.raises(
        InputError, match=r"bits_per_weight must be >= 2\.031 for 2 bits and one table, got 2\.0"
    ):
        groups_within(shape, 2, 2.0)


# Reordered neurons


def seeded_norm(norm):
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize(
    "chain",
    [
        lambda: [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)],
        lambda: [nn.Linear(4, 6, bias=False), seeded_norm(nn.BatchNorm1d(6)), nn.PReLU(6), nn.Linear(6, 3)],
        lambda: [nn.Linear(4, 6), seeded_norm(nn.LayerNorm(6)), nn.PReLU(), nn.Linear(6, 3)],
        lambda: [nn.Linear(4, 6), seeded_norm(nn.RMSNorm(6)), nn.Dropout(0.5), nn.Linear(6, 3)],
        lambda: [
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 6, 2, padding=1),
            seeded_norm(nn.GroupNorm(1, 6)),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            seeded_norm(nn.BatchNorm2d(6)),
            nn.Conv2d(6, 2, 2),
        ],
        lambda: [
            nn.Unflatten(1, (2, 2)),
            nn.Conv1d(2, 6, 2, padding=1),
            nn.Sequential(seeded_norm(nn.InstanceNorm1d(6, affine=True)), nn.GELU()),
            nn.Flatten(),
            nn.Linear(18, 3),
        ],
    ],
)
def test_reordered_neurons_leave_the_function(chain):
    model = nn.Sequential(*chain()).double().eval()
    x = randn(5, 4, dtype=torch.float64)
    before = model(x)
    first = 1 if isinstance(model[0], nn.Unflatten) else 0
    weight = model[first].weight.clone()
    perm = torch.tensor([3, 1, 5, 0, 2, 4])
    permute_neurons(model[first], model[-1], perm, list(model[first + 1 : -1]))
    assert torch.equal(model[first].weight, weight[perm])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("layers", "between", "perm", "message"),
    [
        ((nn.Linear(2, 4), nn.Linear(4, 2)), (), [0, 0, 1, 2], r"perm must hold each of 0\.\.3 once"),
        (
            (nn.Linear(2, 4), nn.Linear(3, 2)),
            (),
            [0, 1, 2, 3],
            "must read the 4 outputs of layer, got 3 inputs",
        ),
        (
            (nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1, groups=2)),
            (),
            [0, 1, 2, 3],
            "next_layer must have groups=1",
        ),
        ((nn.ReLU(), nn.Linear(4, 2)), (), [0], "layer must be a linear layer or a convolution, got ReLU"),
        ((nn.Linear(2, 4), nn.Linear(4, 2)), (nn.GroupNorm(2, 4),), [1, 0, 2, 3], "reordered, got GroupNorm"),
        ((nn.Linear(2, 4), nn.Linear(4, 2)), (nn.Linear(4, 4),), [1, 0, 2, 3], "reordered, got Linear"),
        ((nn.Linear(2, 4), nn.Linear(2, 2)), (nn.GLU(),), [1, 0, 2, 3], "must read the 4 outputs"),
        # Flattened, a linear layer's columns are ordered by position first.
        (
            (nn.Linear(2, 4), nn.Linear(12, 2)),
            (nn.Flatten(),),
            [1, 0, 2, 3],
            "must read the 4 outputs of layer, got 12 inputs",
        ),
    ],
)
def test_what_cannot_follow_is_refused_and_nothing_changes(layers, between, perm, message):
    kept = [copy.deepcopy(layer).state_dict() for layer in layers]
    with pytest.raises(InputError, match=message):
        permute_neurons(*layers, torch.tensor(perm), between)
    for layer, before in zip(layers, kept, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_of_codes_move_like_rows_of_the_weight(scaled):
    book, perm = kmeans_codebook(spread_rows(), 2, 3, scale_per_group=scaled), torch.randperm(16)
    moved = book.with_rows(perm)
    assert torch.equal(moved.dequantize(), book.dequantize()[perm])
    assert torch.equal(moved.stored().restore(), moved.dequantize())


# Layers that run from codes


def test_layers_run_from_codes_as_the_plain_ones():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(54, 5),
    )
    books = {str(i): kmeans_codebook(model[i].weight, 3, 2) for i in (0, 2)}
    for path, book in books.items():
        model.get_submodule(path).weight.data.copy_(book.dequantize())
    x = randn(3, 2, 6, 6)
    small = run_from_codes(copy.deepcopy(model), books)
    assert torch.equal(small(x), model(x))
    assert torch.equal(small[0].materialize()(x), model[0](x))
    fresh = run_from_codes(
        copy.deepcopy(model), {p: kmeans_codebook(randn(*b.codes.shape), 3, 2) for p, b in books.items()}
    )
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), model(x))
    # Widened, the tables stay what they are, and the codes as small.
    assert small.double()[2].stored().nbytes == books["2"].stored().nbytes
    torch.testing.assert_close(small(x.double()), model(x).double(), rtol=1e-5, atol=1e-5)


def test_a_state_dict_brings_the_bounds_of_groups_that_are_neighbours():
    first, second = (
        CodebookLinear(
            kmeans_codebook(randn(8, 32) * torch.where(torch.arange(8) < narrow, 0.1, 1.0)[:, None], 2, 2)
        )
        for narrow in (2, 5)
    )
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weight, first.weight)
    grouped = CodebookLinear(kmeans_codebook(spread_rows(8, 32), 2, 2))
    with pytest.raises(
        InputError, match=r"codebook weight of shape \[8, 32\], got grouped-codebook of \[8, 32\]"
    ):
        first.set_extra_state(grouped.get_extra_state())
    with pytest.raises(InputError, match=r"of shape \[8, 32\], got codebook of \[4, 64\]"):
        first.set_extra_state(CodebookLinear(kmeans_codebook(randn(4, 64), 2)).get_extra_state())


def test_a_layer_at_two_places_stays_one_and_nothing_changes_where_one_is_refused():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    books = {"0": kmeans_codebook(layer.weight, 2)}
    with pytest.raises(InputError, match="1 must be a linear layer"):
        run_from_codes(model, books | {"1": kmeans_codebook(torch.ones(2, 2), 1)})
    assert model[0] is layer
    run_from_codes(model, books)
    assert model[0] is model[2]
    assert isinstance(model[0], CodebookLinear)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_rows(torch.ones(2, 2), 0), r"groups must be in 1\.\.256, got 0"),
        (lambda: groups_within((4, 4), 0, 3.0), r"bits must be in 1\.\.8, got 0"),
        (
            lambda: run_from_codes(nn.Sequential(nn.ReLU()), {"7": None}),
            "must name layers of the model, got '7'",
        ),
        (
            lambda: run_from_codes(nn.TransformerEncoderLayer(8, 2, 8), {"linear1": None}),
            "'linear1' cannot be replaced",
        ),
        (lambda: kmeans_codebook(torch.ones(2, 2), 0), r"bits must be in 1\.\.8, got 0"),
        (lambda: kmeans_codebook(torch.ones(2, 2), 2, 0), r"groups must be in 1\.\.256, got 0"),
        (lambda: kmeans_codebook(torch.ones(2), 2), "two dimensions or more, and entries"),
        (lambda: kmeans_codebook(torch.ones(0, 2), 2), "two dimensions or more, and entries"),
        (
            lambda: kmeans_codebook(torch.tensor([[torch.nan]]), 2),
            "weight must be finite, got NaN or infinity",
        ),
        (
            lambda: kmeans_codebook(torch.full((2, 2), 1e-6), 2),
            r"largest entry in \[6\.1e-05, 65504\] for float16",
        ),
        (lambda: kmeans_codebook(torch.full((2, 2), 1e6), 2), r"for float16 tables, got 1e\+06"),
        (lambda: CodebookLinear(kmeans_codebook(torch.ones(2, 2, 1, 1), 2)), "codebook must be of a matrix"),
        (lambda: CodebookConv2d(kmeans_codebook(torch.ones(2, 2), 2)), r"codebook must be of a 2-D kernel"),
        (
            lambda: CodebookLinear(kmeans_codebook(torch.ones(2, 2), 2), torch.ones(3)),
            "bias must have 2 entries",
        ),
        (lambda: run_from_codes(nn.Sequential(nn.ReLU()), {"0": None}), "0 must be a linear layer"),
        (
            lambda: run_from_codes(
                nn.Sequential(nn.Linear(3, 3)), {"0": kmeans_codebook(torch.ones(2, 2), 1)}
            ),
            r"the codebook of 0 must have the shape \(3, 3\), got \(2, 2\)",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_groups_that_are_neighbours_need_no_ids():
    weight = torch.cat([0.1 * randn(4, 32), randn(4, 32)])
    codebook = kmeans_codebook(weight, 2, 2)
    assert codebook.perm is None
    assert codebook.row_group_bounds == (0, 4, 8)
    assert codebook.stored().kind == "codebook"
    again = Codebook.of(codebook.row_codes(), codebook.table, codebook.group_of_row())
    assert torch.equal(again.dequantize(), codebook.dequantize())
