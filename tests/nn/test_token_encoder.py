import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.nn import ImagePatches, SignalPatches, TableColumns, TokenEncoder, Words

EXACT = {"rtol": 0, "atol": 1e-11}


def signal_encoder(positions=None, **options) -> TokenEncoder:
    torch.manual_seed(0)
    tokenizer = SignalPatches(24, 4, 2, dim=8, positions=positions)
    encoder = TokenEncoder(tokenizer, 8, 2, 2, **options).double()
    # Larger weights, so that attention is far from uniform.
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return encoder


def word_encoder(**options) -> TokenEncoder:
    torch.manual_seed(0)
    encoder = TokenEncoder(Words(20, 8, max_length=6), 8, 2, 2, **options).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return encoder


SERIES = torch.randn(3, 2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("tokenizer", "inputs"),
    [
        (ImagePatches(8, 2, 1, dim=8), torch.rand(3, 1, 8, 8)),
        (SignalPatches(24, 4, 2, dim=8), torch.rand(3, 2, 24)),
        (TableColumns(3, [4], dim=8), torch.ones(3, 4)),
        (Words(20, 8, max_length=6), torch.ones(3, 6, dtype=torch.long)),
    ],
)
@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
def test_shapes(tokenizer, inputs, pool):
    encoder = TokenEncoder(tokenizer, 8, 1, 2, registers=2, pool=pool)
    tokens = tokenizer.num_tokens
    assert encoder(inputs).shape == ((3, tokens, 8) if pool == "none" else (3, 8))
    assert encoder.encode(inputs).shape == (3, tokens, 8)
    assert encoder.num_prefix == (3 if pool == "cls" else 2)
    assert encoder.encode(inputs, with_prefix=True).shape == (3, tokens + encoder.num_prefix, 8)


@given(order=st.permutations(range(6)))
@settings(max_examples=10, deadline=None)
def test_permuting_tokens_permutes_results_without_positions(order):
    encoder = signal_encoder(registers=1)
    series = SERIES.unflatten(2, (6, 4))[:, :, order].flatten(2)
    assert torch.allclose(encoder.encode(series), encoder.encode(SERIES)[:, order], **EXACT)
    assert torch.allclose(encoder(series), encoder(SERIES), **EXACT)


def test_positions_break_the_symmetry():
    encoder = signal_encoder("sinusoidal")
    assert not torch.allclose(encoder(SERIES.flip(2)), encoder(SERIES), atol=1e-3)


@pytest.mark.parametrize("registers", [0, 2])
def test_causal_results_ignore_later_tokens(registers):
    encoder = signal_encoder("learned", causal=True, registers=registers)
    changed = SERIES.clone()
    changed[:, :, 16:] += 1
    before, after = encoder.encode(SERIES, with_prefix=True), encoder.encode(changed, with_prefix=True)
    assert torch.allclose(before[:, : registers + 4], after[:, : registers + 4], **EXACT)
    assert not torch.allclose(before[:, registers + 4 :], after[:, registers + 4 :], atol=1e-3)


@given(keep=st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True), causal=st.booleans())
@settings(max_examples=15, deadline=None)
def test_keeping_some_tokens_equals_masking_the_others(keep, causal):
    encoder = signal_encoder("learned", registers=1, causal=causal)
    tokens = encoder.tokenizer(SERIES)
    index = torch.tensor(keep)
    hidden = torch.ones(3, 6, dtype=torch.bool)
    hidden[:, index] = False
    masked = encoder.forward_tokens(tokens, padding=hidden, with_prefix=True)
    kept = encoder.forward_tokens(tokens, index, with_prefix=True)
    assert torch.allclose(kept, torch.cat([masked[:, :1], masked[:, 1 + index]], dim=1), **EXACT)


def test_each_sample_keeps_its_own_tokens():
    encoder = signal_encoder("learned")
    tokens = encoder.tokenizer(SERIES)
    keep = torch.tensor([[0, 5], [3, 1], [2, 4]])
    together = encoder.forward_tokens(tokens, keep)
    for sample in range(3):
        alone = encoder.forward_tokens(tokens[sample : sample + 1], keep[sample])
        assert torch.allclose(together[sample], alone[0], **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_invalid_entries_of_keep_count_for_nothing(causal):
    encoder = signal_encoder("learned", causal=causal)
    tokens = encoder.tokenizer(SERIES[:1])
    ragged = torch.tensor([[4, 1, 0, 3]])
    valid = torch.tensor([[True, True, False, False]])
    result = encoder.forward_tokens(tokens, ragged, valid=valid)
    assert torch.allclose(result[:, :2], encoder.forward_tokens(tokens, torch.tensor([4, 1])), **EXACT)
    assert result.isfinite().all()


def test_padding_follows_the_tokens_that_are_kept():
    encoder = signal_encoder("learned")
    tokens = encoder.tokenizer(SERIES)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[:, 3] = True
    result = encoder.forward_tokens(tokens, torch.tensor([5, 3, 0]), padding=padding)
    expected = encoder.forward_tokens(tokens, torch.tensor([5, 0]))
    assert torch.allclose(result[:, [0, 2]], expected, **EXACT)


@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"pool": "cls"}, {"causal": True}])
def test_padding_has_no_influence(options):
    encoder = word_encoder(**options)
    short, padded = torch.tensor([[4, 9, 3]]), torch.tensor([[4, 9, 3, 0, 0]])
    assert torch.allclose(encoder(short), encoder(padded), **EXACT)
    assert torch.allclose(encoder.encode(short), encoder.encode(padded)[:, :3], **EXACT)
    with torch.no_grad():
        encoder.tokenizer.embedding.weight[0] += 5
    assert torch.allclose(encoder(short), encoder(padded), **EXACT)


@pytest.mark.parametrize("options", [{}, {"registers": 1}, {"causal": True}, {"pool": "cls"}])
def test_a_sample_of_padding_alone_is_defined(options):
    encoder = word_encoder(**options)
    result = encoder(torch.tensor([[0, 0, 0], [4, 9, 3]]))
    assert result.isfinite().all()
    if options.get("pool") != "cls":
        assert not result[0].any()
    assert torch.allclose(result[1:], encoder(torch.tensor([[4, 9, 3]])), **EXACT)
    result.sum().backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in encoder.parameters() if parameter.grad is not None
    )


def test_left_padding_of_a_causal_encoder_is_finite_and_without_influence():
    encoder = word_encoder(causal=True, pool="none")
    ids = torch.tensor([[0, 0, 4, 9]])
    result = encoder(ids)
    with torch.no_grad():
        encoder.tokenizer.embedding.weight[0] += 5
    assert result.isfinite().all()
    assert torch.allclose(result[:, 2:], encoder(ids)[:, 2:], **EXACT)


def test_empty_texts_pool_to_zero():
    assert not word_encoder()(torch.zeros(2, 0, dtype=torch.long)).any()


def test_pools_the_mean_of_real_tokens():
    encoder = word_encoder(registers=1)
    encoded = encoder.encode(torch.tensor([[4, 9, 0]]))
    assert torch.allclose(encoder(torch.tensor([[4, 9, 0]])), encoded[:, :2].mean(1), **EXACT)


def test_class_token_is_the_first_in_front():
    encoder = signal_encoder("learned", pool="cls", registers=2)
    assert torch.equal(encoder(SERIES), encoder.encode(SERIES, with_prefix=True)[:, 0])


def test_gradients_are_right_through_masks_and_registers():
    encoder = signal_encoder("learned", causal=True, registers=1)
    keep, valid = torch.tensor([[3, 0, 1]]), torch.tensor([[True, True, False]])
    tokens = encoder.tokenizer(SERIES[:1]).detach().requires_grad_()

    def encode(tokens):
        return encoder.forward_tokens(tokens, keep, valid=valid, with_prefix=True)

    assert torch.autograd.gradcheck(encode, (tokens,))


def test_has_no_parameters_without_a_gradient():
    encoder = TokenEncoder(SignalPatches(24, 4, 2, dim=8), 8, 2, 2, registers=1)
    encoder(SERIES.float()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert TokenEncoder(SignalPatches(24, 4, 2, dim=8), 8, 2, 2).prefix is None


def test_runs_in_half_precision():
    encoder = signal_encoder("learned", registers=1).bfloat16()
    result = encoder(SERIES.bfloat16())
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 16}, "dim must equal the tokenizer's, 8, got 16"),
        ({"heads": 3}, "heads must divide dim 8, got 3"),
        ({"registers": -1}, "registers must be >= 0, got -1"),
        ({"causal": True, "pool": "cls"}, "a class token in front sees no input"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    arguments = {"dim": 8, "depth": 1, "heads": 2, **options}
    with pytest.raises(ValueError, match=message):
        TokenEncoder(SignalPatches(24, 4, 2, dim=8), **arguments)


def test_refuses_valid_without_keep():
    encoder = signal_encoder()
    with pytest.raises(ValueError, match="valid must come with keep"):
        encoder.forward_tokens(encoder.tokenizer(SERIES), valid=torch.ones(3, 6, dtype=torch.bool))
