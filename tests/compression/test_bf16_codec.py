import ast
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from coloss.compression import bf16_codec, compress_model, load_compressed, store_exactly
from coloss.compression.bf16_codec import BLOCK, DFloat11Tensor, code_always, encode_bf16, exponent_stats
from coloss.compression.exponent_coding import code_lengths
from coloss.compression.stored_weights import StoredWeight, describe, from_description
from coloss.errors import InputError
from coloss.ops import nm_mask, top_mask


def _gaussian(*shape: int, seed: int = 0) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def _words(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.astype(np.uint16).view(np.int16).copy()).view(torch.bfloat16)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN equals itself, and zeros of two signs differ."""
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.fixture(params=["codec_kernels", "codec_arrays"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "codec_kernels":
        pytest.importorskip("numba")
    module = __import__(f"coloss.compression.{request.param}", fromlist=["read"])
    monkeypatch.setattr(bf16_codec, "loops", lambda: module)


ALL_WORDS = _words(np.arange(1 << 16))


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(
    "tensor",
    [
        ALL_WORDS,
        ALL_WORDS[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))].view(256, 256).T,
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45]).bfloat16(),
        _words(np.array([0x7F81, 0xFFC3, 0x7FFF, 0x0001, 0x807F, 0x7800, 0x7F00])),
        torch.full((3, BLOCK), 0.5, dtype=torch.bfloat16),
        torch.zeros(0, 4, dtype=torch.bfloat16),
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.ones(1, dtype=torch.bfloat16).expand(5, 7),
        _gaussian(BLOCK - 1),
        _gaussian(BLOCK),
        _gaussian(3 * BLOCK + 1),
        _gaussian(90, 7, 40)[::2, 1:, 3::5],
    ],
    ids=lambda t: f"{tuple(t.shape)}",
)
def test_every_bit_comes_back(tensor: Tensor) -> None:
    for stored in (code_always(tensor), encode_bf16(tensor)):
        assert _equal(stored.decode(), tensor)
        again = from_description(stored.tensors(), describe(stored))
        assert isinstance(again, DFloat11Tensor) and _equal(again.restore(), tensor)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=60),
    st.integers(1, 3 * BLOCK),
    st.integers(0, 2**32 - 1),
)
def test_any_words_come_back_and_both_ways_write_the_same(words: list[int], size: int, seed: int) -> None:
    # A few words, the first ones much more often than the last: short and long codes.
    draws = np.random.default_rng(seed).geometric(0.3, size) - 1
    tensor = _words(np.array(words)[draws % len(words)])
    stored = []
    for module in _ways():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bf16_codec, "loops", lambda module=module: module)
            stored.append(code_always(tensor))
            assert _equal(stored[-1].decode(), tensor)
    for name, part in stored[0].tensors().items():
        assert torch.equal(part, stored[-1].tensors()[name]), name


def _ways() -> list:
    from coloss.compression import codec_arrays

    try:
        from coloss.compression import codec_kernels
    except ImportError:
        return [codec_arrays]
    return [codec_arrays, codec_kernels]


@pytest.mark.usefixtures("loops")
def test_codes_of_32_bits_are_read_where_the_table_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    # Counts that would ask for 39 bits take 2^38 weights; so the code is made for them, and used for others.
    counts = np.zeros(256, dtype=np.int64)
    a, b = 1, 1
    for symbol in range(100, 140):
        counts[symbol] = a
        a, b = b, a + b
    lengths = code_lengths(counts)
    assert lengths.max() == 32
    monkeypatch.setattr(bf16_codec, "code_lengths", lambda counts: lengths)
    exponents = np.random.default_rng(0).integers(100, 140, 2 * BLOCK + 5)
    tensor = _words(exponents << 7 | 5)
    assert _equal(code_always(tensor).decode(), tensor)


@pytest.mark.usefixtures("loops")
def test_size_is_within_a_percent_of_the_bound_from_a_hundred_thousand_weights_on() -> None:
    weight = _gaussian(100_000)
    stored, stats = encode_bf16(weight), exponent_stats(weight)
    ratio = stored.nbytes / weight.nbytes
    assert stored.coded and ratio <= 0.70
    assert ratio <= 1.01 * (8 + stats.entropy) / 16
    assert stats.ratio == pytest.approx(ratio, rel=1e-3)
    assert stats.entropy <= stats.mean_code_length < stats.entropy + 1
    # The reference of a Gaussian, whatever its scale: entropy 2.55, best code 2.59 bits.
    assert (stats.entropy, stats.mean_code_length) == pytest.approx((2.55, 2.59), abs=0.02)


def test_statistics_of_a_known_histogram() -> None:
    stats = exponent_stats([torch.full((9000,), 1.0).bfloat16(), torch.full((9000,), 2.0).bfloat16()])
    assert (stats.entropy, stats.mean_code_length, stats.symbols) == (1.0, 1.0, 2)
    assert exponent_stats(torch.zeros(0).bfloat16()).ratio == 1.0


def test_small_tensors_and_such_that_do_not_pay_stay_raw() -> None:
    small, noise = _gaussian(16_383), ALL_WORDS.repeat(2)
    assert exponent_stats(small).ratio == exponent_stats(noise).ratio == 1.0
    for tensor in (small, noise):
        stored = encode_bf16(tensor)
        assert not stored.coded and stored.nbytes == tensor.nbytes and _equal(stored.decode(), tensor)
        kept = tensor.clone()
        tensor.neg_()
        assert _equal(stored.decode(), kept)
        tensor.neg_()


def test_several_tensors_share_one_code() -> None:
    parts = [_gaussian(300, 100), _gaussian(7, seed=1), _gaussian(20, 30, 3, seed=2).transpose(0, 2)]
    stored = encode_bf16(parts)
    assert stored.shape == (31_807,)
    decoded = stored.decode().split([part.numel() for part in parts])
    assert all(_equal(flat.view(part.shape), part) for flat, part in zip(decoded, parts, strict=True))
    assert encode_bf16([]).decode().shape == (0,)


@pytest.mark.usefixtures("loops")
def test_decoding_fills_the_given_place_and_nothing_beside_it() -> None:
    weight = _gaussian(150, 200)
    stored = encode_bf16(weight)
    place = torch.full((40_000,), 7.0, dtype=torch.bfloat16)
    out = place[5_000:35_000].view(150, 200)
    assert stored.decode(out) is out and _equal(out, weight)
    assert (place[:5_000] == 7).all() and (place[35_000:] == 7).all()
    given = nn.Parameter(torch.zeros_like(weight))
    assert _equal(stored.decode(given), weight) and given.requires_grad


@pytest.mark.usefixtures("loops")
def test_autograd_notices_that_a_place_was_filled_again() -> None:
    first, second = encode_bf16(_gaussian(200, 150)), encode_bf16(_gaussian(200, 150, seed=1))
    inputs = _gaussian(3, 200).requires_grad_()
    place = first.decode(torch.empty(200, 150, dtype=torch.bfloat16))
    outputs = inputs @ place
    second.decode(place)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()
    with torch.inference_mode():
        assert _equal(first.decode(torch.empty(200, 150, dtype=torch.bfloat16)), first.decode())


def test_a_strided_tensor_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, flat = [], bf16_codec._flat
    monkeypatch.setattr(bf16_codec, "_flat", lambda tensor: calls.append(1) or flat(tensor))
    assert encode_bf16(_gaussian(200, 150).T).shape == (150, 200) and len(calls) == 1


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.zeros(150, 200), "got torch.float32"),
        (torch.zeros(200, 150, dtype=torch.bfloat16), "\\(200, 150\\)"),
        (torch.zeros(200, 150, dtype=torch.bfloat16).T, "not contiguous"),
    ],
)
def test_places_that_do_not_fit_are_refused(out: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode_bf16(_gaussian(150, 200)).decode(out)


def test_other_precisions_are_refused() -> None:
    for function in (encode_bf16, code_always, exponent_stats):
        with pytest.raises(ValueError, match="tensor must be bfloat16, got torch.float32"):
            function([_gaussian(3), torch.zeros(3)])


def test_threads_share_the_work_and_may_themselves_run_at_once() -> None:
    weight = _gaussian(600_000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        stored = encode_bf16(weight)
        with ThreadPoolExecutor(2) as pool:
            decoded = list(pool.map(lambda _: stored.decode(), range(2)))
    finally:
        torch.set_num_threads(threads)
    assert all(_equal(d, weight) for d in decoded)
    torch.set_num_threads(1)
    try:
        assert torch.equal(encode_bf16(weight).encoded, stored.encoded)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("seed", range(6))
def test_altered_streams_end_in_an_error_or_in_other_values(seed: int) -> None:
    weight = _gaussian(5 * BLOCK + 77)
    stored = encode_bf16(weight)
    random = np.random.default_rng(seed)
    parts = {name: part.clone() for name, part in stored.tensors().items()}
    name = ("encoded", "block_words", "code_lengths")[seed % 3]
    altered = parts[name].numpy()
    where = random.integers(0, len(altered), 1 + seed)
    if name == "encoded":
        altered[where] = random.integers(-(2**31), 2**31, len(where))
    elif name == "block_words":
        # The sum stays: words move from one block to others.
        altered[:] = random.permutation(altered) if seed % 2 else altered
        altered[0], altered[-1] = altered[0] + altered[-1], 0
    else:
        # Fewer codes than the stream holds, and longer ones.
        altered[np.flatnonzero(altered)[seed % 7 :: 2]] = 0 if seed % 2 else 31
    place = torch.full((weight.numel() + 100,), 7.0, dtype=torch.bfloat16)
    try:
        out = from_description(parts, describe(stored))
        assert isinstance(out, DFloat11Tensor)
        out.decode(place[50:-50])
    except InputError:
        pass
    assert (place[:50] == 7).all() and (place[-50:] == 7).all()
    if name != "encoded":
        with pytest.raises(InputError, match="altered|lengths"):
            replace(stored, **{name: parts[name]}).decode()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("encoded", lambda t: t[:-1], "encoded must have"),
        ("sign_mantissa", lambda t: t[1:], "sign_mantissa must have 30000 bytes"),
        ("block_words", lambda t: t[1:], "block_words must have 8 entries"),
        ("block_words", lambda t: -t, "block_words must be >= 0"),
        ("code_lengths", lambda t: t[:100], "256 entries"),
        ("encoded", lambda t: t.long(), "row of torch.int32"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(name, change, words) -> None:
    stored = encode_bf16(_gaussian(150, 200))
    parts = stored.tensors()
    with pytest.raises(InputError, match=words):
        DFloat11Tensor.from_parts(parts | {name: change(parts[name])}, stored.settings())
    with pytest.raises(InputError, match=f"got no {name}"):
        DFloat11Tensor.from_parts({k: v for k, v in parts.items() if k != name}, stored.settings())


def _inner(stored: StoredWeight) -> str | None:
    values = getattr(stored, "values", None)
    return values.kind if isinstance(values, StoredWeight) else None


WEIGHT = _gaussian(256, 256)


@pytest.mark.parametrize(
    ("weight", "kind", "inner", "most"),
    [
        (WEIGHT, "dfloat11", None, 10.8),
        (WEIGHT.float(), "dfloat11", None, 10.8),
        (WEIGHT.double(), "dfloat11", None, 10.8),
        (WEIGHT * nm_mask(WEIGHT.float()), "n:m", "dfloat11", 3 / 4 + 10.8 / 2),
        ((WEIGHT * top_mask(WEIGHT.float().abs(), 40_000)).float(), "sparse", "dfloat11", 1 + 10.8 * 0.62),
        (WEIGHT.sign(), "codebook", None, 1.1),
        (WEIGHT.half(), "dfloat11", None, 10.8),
        (torch.randn(256, 256).half(), "dense", None, 16),
        (WEIGHT.float() + 1e-9, "dense", None, 32),
    ],
)
def test_exact_storage_codes_exponents_where_that_is_smallest(
    weight: Tensor, kind: str, inner: str | None, most: float
) -> None:
    stored = store_exactly(weight)
    assert (stored.kind, _inner(stored)) == (kind, inner)
    assert 8 * stored.nbytes / weight.numel() <= most
    again = from_description(stored.tensors(), describe(stored)).restore()
    assert again.dtype == weight.dtype and torch.equal(again, weight)


def test_float32_that_holds_bfloat16_comes_back_with_its_zeros_and_nans() -> None:
    words = torch.from_numpy(np.random.default_rng(0).permutation(1 << 16).astype(np.uint32) << 16)
    weight = torch.cat([words.view(torch.float32), _gaussian(200_000).float()])
    stored = store_exactly(weight)
    assert stored.kind == "dfloat11"
    assert torch.equal(stored.restore().view(torch.int32), weight.view(torch.int32))


def test_a_model_in_a_file_takes_as_much_less(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 10)).bfloat16()
    path = compress_model(model).save(tmp_path / "model.coloss")
    loaded = load_compressed(path)
    assert loaded.weights["0.weight"].kind == "dfloat11"
    again = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 10)).bfloat16()
    loaded.load_into(again)
    assert all(_equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert path.stat().st_size < 0.75 * sum(p.nbytes for p in model.parameters()) + 2000


def test_numba_is_imported_where_something_is_coded_only() -> None:
    found = {}
    for path in Path(bf16_codec.__file__).parent.glob("*.py"):
        imports = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        found[path.stem] = " ".join(ast.unparse(node) for node in imports)
    assert "numba" in found.pop("codec_kernels")
    assert not [stem for stem, text in found.items() if "numba" in text or "codec_kernels" in text]
