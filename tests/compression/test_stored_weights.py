import pytest
import torch
from torch import Tensor

from coloss.compression import stored_weights
from coloss.compression.stored_weights import (
    CodebookWeight,
    LowRankWeight,
    StoredWeight,
    describe,
    from_description,
    store_exactly,
)
from coloss.errors import InputError
from coloss.ops import nm_mask, top_mask

GAUSSIAN = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
INT4 = (GAUSSIAN / 0.3).round().clamp(-8, 7) * 0.3
ROW_MEANS = GAUSSIAN.abs().mean(1, keepdim=True)


def _inner(stored: StoredWeight) -> str | None:
    values = getattr(stored, "values", None)
    return values.kind if isinstance(values, StoredWeight) else None


@pytest.mark.parametrize(
    ("weight", "kind", "inner", "bits"),
    [
        (GAUSSIAN, "dense", None, 32),
        (GAUSSIAN.bfloat16().float(), "dense", None, 16),
        (GAUSSIAN.bfloat16(), "dense", None, 16),
        (GAUSSIAN * nm_mask(GAUSSIAN), "n:m", "dense", 3 / 4 + 16),
        (GAUSSIAN * nm_mask(GAUSSIAN, 1, 8), "n:m", "dense", 3 / 8 + 4),
        (GAUSSIAN * top_mask(GAUSSIAN.abs(), 400), "sparse", "dense", 1 + 32 * 400 / 8192),
        (INT4 * top_mask(INT4.abs(), 400), "sparse", "codebook", 1 + (2 * 400 + 32 * 3) / 8192),
        (GAUSSIAN.sign(), "codebook", None, 1 + 32 / 8192),
        (GAUSSIAN.sign() * ROW_MEANS, "codebook", None, 1 + 2 * 32 / 128),
        ((INT4 / 0.3).round(), "codebook", None, 4 + 16 * 16 / 8192),
    ],
    ids=[
        "gaussian",
        "bf16-values",
        "bf16",
        "2:4",
        "1:8",
        "5%",
        "5%-int4",
        "sign",
        "sign-per-row",
        "integers",
    ],
)
def test_the_smallest_exact_form_is_found(weight: Tensor, kind: str, inner: str | None, bits: float) -> None:
    stored = store_exactly(weight)
    assert (stored.kind, _inner(stored)) == (kind, inner)
    assert 8 * stored.nbytes / weight.numel() == pytest.approx(bits, rel=0.01)
    restored = stored.restore()
    assert restored.dtype == weight.dtype and torch.equal(restored, weight)
    again = from_description(stored.tensors(), describe(stored))
    assert torch.equal(again.restore(), weight)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 4),
        torch.zeros(0),
        torch.tensor(3.5),
        torch.zeros(10, 16),
        torch.arange(5),
        torch.tensor([True, False]),
        torch.tensor([[torch.nan, 1.0, 0.0, -torch.inf]] * 3),
        torch.tensor([1e-45, -0.0, 1.0]),
        torch.randn(3, 5, dtype=torch.float64),
        torch.randn(6, 4).T,
        torch.ones(3, 4).to(torch.float16),
        (torch.arange(300.0) / 7).repeat(2, 1),
    ],
)
def test_unusual_tensors_come_back_as_they_were(weight: Tensor) -> None:
    restored = store_exactly(weight).restore()
    assert restored.dtype == weight.dtype
    assert torch.equal(torch.nan_to_num(restored.float(), 7.0), torch.nan_to_num(weight.float(), 7.0))


def test_convolutions_are_pruned_along_their_input_channels() -> None:
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    pruned = weight * nm_mask(weight, 2, 4, dim=1)
    stored = store_exactly(pruned)
    assert stored.kind == "n:m" and torch.equal(stored.restore(), pruned)


def test_groups_with_fewer_than_n_values_fill_up_with_zeros() -> None:
    weight = torch.tensor([1.0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]).repeat(50)
    stored = store_exactly(weight)
    assert torch.equal(stored.restore(), weight)


def test_restoring_never_gives_the_stored_memory() -> None:
    stored = store_exactly(GAUSSIAN)
    stored.restore().zero_()
    assert torch.equal(stored.restore(), GAUSSIAN)


def test_storing_leaves_the_weight_alone_when_it_changes_later() -> None:
    weight = GAUSSIAN.clone()
    restored = stored_weights.store_exactly(weight).restore()
    assert restored.data_ptr() != weight.data_ptr()


def test_tables_are_shared_by_slices_of_rows() -> None:
    codes = torch.tensor([[0, 1], [1, 1], [1, 0]])
    table = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    stored = CodebookWeight.from_codes(codes, table, bounds=(0, 1, 3))
    assert stored.restore().tolist() == [[1.0, 2.0], [20.0, 20.0], [20.0, 10.0]]
    assert stored.nbytes == 1 + 4 * 4


def test_bounds_that_do_not_cut_the_rows_are_refused() -> None:
    codes, table = torch.zeros(3, 2, dtype=torch.long), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"bounds must rise from 0 to 3 in 2 steps.*got \(0, 4, 3\)"):
        CodebookWeight.from_codes(codes, table, bounds=(0, 4, 3))
    with pytest.raises(ValueError, match=r"codes must be in \[0, 5\), got 0 to 7"):
        CodebookWeight.from_codes(torch.tensor([[7], [0]]), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"codes must be in \[0, 5\), got -1 to 0"):
        CodebookWeight.from_codes(torch.tensor([[-1], [0]]), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="table must have 1 to 256 values in a row, got 257"):
        CodebookWeight.from_codes(codes, torch.zeros(257))


@pytest.mark.parametrize(("rows", "groups"), [(6, 6), (6, 3), (7, 3)])
def test_bounds_of_equal_slices_are_not_written_down(rows: int, groups: int) -> None:
    table = torch.arange(2.0 * groups).view(groups, 2)
    stored = CodebookWeight.from_codes(torch.arange(rows * 3).view(rows, 3) % 2, table)
    assert "bounds" not in describe(stored)
    again = from_description(stored.tensors(), describe(stored))
    assert again == stored and torch.equal(again.restore(), stored.restore())
    # As files of the first version have it.
    older = from_description(stored.tensors(), {**describe(stored), "bounds": list(stored.bounds)})
    assert older == stored


def test_other_bounds_are_written_down() -> None:
    stored = CodebookWeight.from_codes(torch.tensor([[0], [1], [1]]), torch.eye(2), bounds=(0, 1, 3))
    again = from_description(stored.tensors(), describe(stored))
    assert describe(stored)["bounds"] == [0, 1, 3] and torch.equal(again.restore(), stored.restore())


@pytest.mark.parametrize("channels", [300, 512, 2048])
def test_a_table_for_each_narrow_row_is_found_however_many_rows_there_are(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, (channels, 1, 3, 3), generator=generator)
    weight = signs * torch.rand(channels, 1, 1, 1, generator=generator)
    stored = store_exactly(weight)
    assert stored.kind == "codebook" and torch.equal(stored.restore(), weight)
    assert 8 * stored.nbytes / weight.numel() == pytest.approx(2 + 3 * 32 / 9, rel=0.01)


def test_one_table_is_found_where_rows_have_hundreds_of_values() -> None:
    weight = (torch.arange(200.0) / 7).repeat(40).view(4, 2000)
    stored = store_exactly(weight)
    assert stored.kind == "codebook" and stored.nbytes == 8000 + 4 * 200


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float_of_eight_bits_stays_as_it_is(dtype: torch.dtype) -> None:
    weight = GAUSSIAN.to(dtype)
    stored = store_exactly(weight)
    again = from_description(stored.tensors(), describe(stored)).restore()
    assert stored.kind == "dense" and stored.nbytes == weight.numel()
    assert again.dtype == dtype and torch.equal(again.view(torch.uint8), weight.view(torch.uint8))


def test_of_all_values_that_could_be_coded_those_of_the_smallest_form_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coded = []
    encode = stored_weights.encode_bf16
    monkeypatch.setattr(stored_weights, "encode_bf16", lambda values: coded.append(values) or encode(values))
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = weight * nm_mask(weight.float())
    stored = store_exactly(weight)
    assert (stored.kind, _inner(stored)) == ("n:m", "dfloat11") and torch.equal(stored.restore(), weight)
    assert [len(values) for values in coded] == [256 * 128]


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
def test_factors_restore_the_convolution(scheme: str) -> None:
    from coloss.ops import matricize

    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    matrix, _ = matricize(weight, scheme)  # type: ignore[arg-type]
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    stored = LowRankWeight(left * values[..., None, :], right, scheme, tuple(weight.shape))
    torch.testing.assert_close(stored.restore(), weight)
    again = from_description(stored.tensors(), describe(stored))
    assert torch.equal(again.restore(), stored.restore())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        InputError, match="kind of a stored weight must be one of .*codebook.*dense.*got 'cubic'"
    ):
        from_description({}, {"kind": "cubic"})
