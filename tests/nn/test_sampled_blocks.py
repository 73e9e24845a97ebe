"""Attention over sampled distances between blocks: exact with all of them, equal to masked attention with some."""

import pytest
import torch
import torch.nn.functional as F

from coloss.nn import (
    CausalLanguageModel,
    SampledBlockAttention,
    geometric_law,
    harmonic_law,
    sampled_block_attention,
    sampled_block_mask,
    sampled_distances,
)
from coloss.train import SavedActivations

BLOCK = 4


def tensors(tokens=18, heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, tokens, 8, generator=generator, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]


def dense(q, k, v, used, *, sink=False, correction=None):
    """The same by one mask over all tokens."""
    tokens, blocks = q.shape[2], len(used)
    gap = torch.arange(blocks)[:, None] - torch.arange(blocks)
    mask = (gap >= 0) & used[gap.clamp(min=0)]
    added = torch.zeros(blocks, blocks, dtype=q.dtype)
    if correction is not None:
        added = correction.to(q.dtype)[gap.clamp(min=0)].masked_fill(gap < 0, 0.0)
    if sink:
        mask[:, 0], added[1:, 0] = True, 0.0
    added = added.masked_fill(~mask, -torch.inf)
    full = added.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:tokens, :tokens]
    full = full.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=full)


CASES = [
    ([True] * 5, False, None),
    ([True, False, True, False, False], False, None),
    ([True, False, True, False, False], True, None),
    ([True, False, False, False, True], True, torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7])),
    ([True, True, False, True, False], False, torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7])),
]


@pytest.mark.parametrize(("used", "sink", "correction"), CASES)
def test_it_is_masked_attention_with_its_gradients(used, sink, correction):
    q, k, v = tensors()
    used = torch.tensor(used)
    found = sampled_block_attention(q, k, v, used, BLOCK, sink=sink, log_correction=correction)
    wanted = dense(q, k, v, used, sink=sink, correction=correction)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    own = torch.autograd.grad((found * weights).sum(), (q, k, v))
    other = torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    torch.testing.assert_close(own, other)


def test_all_distances_are_plain_causal_attention():
    q, k, v = tensors(dtype=torch.float32)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for block in (1, 4, 18, 64):
        used = torch.ones(-(-18 // block), dtype=torch.bool)
        torch.testing.assert_close(sampled_block_attention(q, k, v, used, block), plain, atol=1e-6, rtol=1e-5)


def test_grouped_heads_and_half_precision():
    q, k, v = tensors(heads=4, dtype=torch.float32)
    used = torch.tensor([True, True, False, True, True])
    shared = sampled_block_attention(q, k[:, :2], v[:, :2], used, BLOCK)
    repeated = [part[:, :2].repeat_interleave(2, 1) for part in (k, v)]
    torch.testing.assert_close(shared, sampled_block_attention(q, *repeated, used, BLOCK))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = sampled_block_attention(*(part.bfloat16() for part in (q, k, v)), used, BLOCK)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.float(), sampled_block_attention(q, k, v, used, BLOCK), atol=0.05, rtol=0.05
    )


def test_backwards_under_autocast_is_backwards():
    q, k, v = tensors(dtype=torch.float32)
    used = torch.tensor([True, False, True, True, False])
    found = []
    for enabled in (True, False):
        total = sampled_block_attention(q, k, v, used, BLOCK, sink=True).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(total, (q, k, v)))
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_laws_and_masks():
    assert geometric_law(3, 0.0).tolist() == [1, 0, 0] and geometric_law(3, 1.0).tolist() == [1, 1, 1]
    assert harmonic_law(2).tolist() == [1, 0.5]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sampled_distances(geometric_law(4, 0.5), generator) for _ in range(1000)])
    assert bool(draws[:, 0].all())
    assert draws.float().mean(0).tolist() == pytest.approx([1, 0.5, 0.25, 0.125], abs=0.05)
    mask = sampled_block_mask(6, harmonic_law(6), torch.Generator().manual_seed(3), sink=True)
    assert bool(mask.diagonal().all()) and bool(mask[:, 0].all()) and not bool(mask.triu(1).any())
    for distance in range(1, 5):  # whole diagonals, but for the sink's column
        diagonal = mask.diagonal(-distance)[1:]
        assert bool((diagonal == diagonal[0]).all())


def test_corrected_sums_are_right_on_average():
    """Numerator and denominator, each averaged over all outcomes by their probabilities, are those of full attention."""
    q, k, v = (part.detach() for part in tensors(tokens=12))
    law = torch.tensor([1.0, 0.5, 0.25])
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(torch.ones(12, 12).bool().triu(1), -torch.inf)
    numerator = denominator = 0.0
    for first in (True, False):
        for second in (True, False):
            used = torch.tensor([True, first, second])
            chance = law[1:][used[1:]].prod() * (1 - law[1:][~used[1:]]).prod()
            gap = (torch.arange(12)[:, None] // BLOCK - torch.arange(12) // BLOCK).clamp(min=0)
            weights = scores.exp() * (used[gap] / law[gap])
            numerator, denominator = (
                numerator + chance * (weights @ v),
                denominator + chance * weights.sum(-1),
            )
            found = sampled_block_attention(q, k, v, used, BLOCK, log_correction=-law.log())
            torch.testing.assert_close(found, weights @ v / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(numerator, scores.exp() @ v)
    torch.testing.assert_close(denominator, scores.exp().sum(-1))


def test_nothing_of_the_size_of_all_pairs_is_kept():
    tokens = 512
    q, k, v = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
    with SavedActivations(torch.nn.Identity()) as held:
        sampled_block_attention(q, k, v, torch.ones(32, dtype=torch.bool), 16).sum().backward()
    assert held.peak < tokens * tokens * 4 / 4


def test_the_module_draws_in_training_and_sees_all_after_it():
    q, k, v = (part.detach() for part in tensors(tokens=40))
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    module = SampledBlockAttention(BLOCK, 0.5, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(module(q, k, v), module(q, k, v))
    torch.testing.assert_close(module.eval()(q, k, v), plain)
    same = SampledBlockAttention(BLOCK, None, evaluation="same", correction=True).eval()
    assert not torch.allclose(same(q, k, v), plain)
    torch.testing.assert_close(SampledBlockAttention(BLOCK, 1.0)(q, k, v), plain)


def test_in_a_language_model():
    torch.manual_seed(0)
    attend = SampledBlockAttention(BLOCK, 0.0, sink=False)
    model = CausalLanguageModel(7, 16, 1, 2, causal_attention=attend)
    plain = CausalLanguageModel(7, 16, 1, 2)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(7, (2, 10))
    torch.testing.assert_close(model.eval()(ids), plain.eval()(ids))
    own_block = model.train()(ids)
    torch.testing.assert_close(own_block[:, :4], plain(ids)[:, :4])
    assert not torch.allclose(own_block[:, 4:], plain(ids)[:, 4:])
    own_block.sum().backward()
    assert model.embedding.weight.grad.isfinite().all()


def test_bad_input_is_refused():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="used must hold 5 distances"):
        sampled_block_attention(q, k, v, torch.ones(4, dtype=torch.bool), BLOCK)
    with pytest.raises(ValueError, match="the first True"):
        sampled_block_attention(q, k, v, torch.zeros(5, dtype=torch.bool), BLOCK)
    with pytest.raises(ValueError, match="law must begin with 1"):
        sampled_distances(torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="n_blocks = 3"):
        sampled_block_mask(3, harmonic_law(2))
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        SampledBlockAttention(4, 1.5)
