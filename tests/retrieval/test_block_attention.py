"""Block attention: equal to the dense mask in value and gradient, blind to the order of documents, exact at its edges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from coloss.retrieval import (
    attention_document_scores,
    attention_logits,
    attention_ranking_loss,
    blockrank_attention,
    blockrank_block_mask,
    blockrank_mask,
    blockrank_position_ids,
)


def ragged(batch: int = 2, blocks: int = 5, length: int = 6, seed: int = 0) -> Tensor:
    """Blocks of different lengths, padded left; the last prompt has an empty document."""
    sizes = torch.randint(1, length + 1, (batch, blocks), generator=torch.Generator().manual_seed(seed))
    if blocks > 2:
        sizes[-1, 2 if blocks > 3 else 1] = 0
    return torch.arange(length) >= length - sizes[..., None]


def vectors(valid: Tensor, heads: int = 2, dim: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(valid), heads, valid[0].numel(), dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def test_the_mask_says_who_sees_whom_one_by_one():
    valid = ragged(blocks=4, length=3)
    mask = blockrank_mask(valid)
    for sample, query, key in np.ndindex(2, 12, 12):
        (block, place), (other, there) = divmod(query, 3), divmod(key, 3)
        if block == other:
            seen = there <= place
        else:
            seen = other == 0 or (block == 3 and other < 3)
        seen = seen and bool(valid[sample, block, place]) and bool(valid[sample, other, there])
        assert mask[sample, 0, query, key] == seen


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_three_dense_problems_equal_the_dense_mask_with_gradients(blocks: int):
    valid = ragged(blocks=blocks)
    inputs = vectors(valid)
    found = blockrank_attention(*inputs, valid)
    dense = F.scaled_dot_product_attention(*inputs, attn_mask=blockrank_mask(valid))
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-10)
    assert not found.transpose(1, 2)[~valid.flatten(1)].any()
    weight = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (found, dense))):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_in_single_precision_they_agree_to_1e_5():
    valid = ragged(blocks=7, length=16)
    inputs = [part.detach().float() for part in vectors(valid)]
    dense = F.scaled_dot_product_attention(*inputs, attn_mask=blockrank_mask(valid))
    torch.testing.assert_close(blockrank_attention(*inputs, valid), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
def test_without_documents_it_is_causal_attention(blocks: int):
    """One block is the instruction alone; of two the last sees the whole instruction."""
    valid = torch.ones(2, blocks, 6, dtype=torch.bool)
    inputs = vectors(valid)
    causal = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(blockrank_attention(*inputs, valid), causal, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_size", [4, 6, 7, 64])
def test_flex_attention_agrees_whatever_the_tiles(block_size: int):
    valid = ragged(blocks=5, length=6)
    inputs = [part.detach().float() for part in vectors(valid)]
    found = flex_attention(*inputs, block_mask=blockrank_block_mask(valid, block_size))
    torch.testing.assert_close(found, blockrank_attention(*inputs, valid), rtol=0, atol=1e-5)


def test_the_tiles_of_the_block_mask_are_those_that_hold_a_pair():
    """Neither a tile left out that is needed, nor one kept that no block pair needs."""
    valid = torch.ones(1, 6, 4, dtype=torch.bool)
    for size in (2, 4, 8):
        tiles = blockrank_block_mask(valid, size).to_dense()[0, 0].bool()
        held = F.max_pool2d(blockrank_mask(valid)[0].float(), size)[0].bool()
        assert torch.equal(tiles, held)


def test_tiles_grow_linearly_with_the_documents():
    counts = [
        int(blockrank_block_mask(torch.ones(1, n + 2, 16, dtype=torch.bool), 16).kv_num_blocks.sum())
        for n in (100, 200, 400)
    ]
    assert counts == [1 + 2 * n + n + 2 for n in (100, 200, 400)]


def test_documents_in_another_order_get_the_same_and_the_rest_does_not_notice():
    valid = ragged(batch=1, blocks=6, length=4)
    inputs = [part.detach().unflatten(2, (6, 4)) for part in vectors(valid)]
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    plain = blockrank_attention(*(part.flatten(2, 3) for part in inputs), valid).unflatten(2, (6, 4))
    moved = blockrank_attention(*(part[:, :, order].flatten(2, 3) for part in inputs), valid[:, order])
    torch.testing.assert_close(moved.unflatten(2, (6, 4)), plain[:, :, order], rtol=0, atol=1e-12)


def test_positions_do_not_depend_on_the_order_of_documents():
    valid = ragged(batch=3, blocks=6, length=4)
    positions = blockrank_position_ids(valid, 50)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    assert torch.equal(blockrank_position_ids(valid[:, order], 50), positions[:, order])
    for sample in range(3):
        starts = [0, *[int(valid[sample, 0].sum())] * 4, 50]
        for block, start in enumerate(starts):
            size = int(valid[sample, block].sum())
            assert positions[sample, block].tolist() == [0] * (4 - size) + list(range(start, start + size))


def test_positions_at_the_edges():
    one = torch.tensor([[[False, True, True]]])
    assert blockrank_position_ids(one).tolist() == [[[0, 0, 1]]]
    two = torch.ones(1, 2, 2, dtype=torch.bool)
    assert blockrank_position_ids(two, 2).flatten().tolist() == [0, 1, 2, 3]
    assert blockrank_position_ids(two)[0, 1, 0] == 16384
    assert not blockrank_position_ids(torch.zeros(2, 4, 3, dtype=torch.bool)).any()


def test_padding_is_never_seen_nor_answered():
    """Keys and values at padding may be anything finite; outputs there are 0, and no NaN reaches a gradient."""
    valid = ragged()
    inputs = vectors(valid)
    found = blockrank_attention(*inputs, valid)
    padding = ~valid.flatten(1)[:, None, :, None]
    changed = [part.detach().masked_fill(padding, 1e6) for part in inputs]
    torch.testing.assert_close(blockrank_attention(*changed, valid), found.detach())
    for slope in torch.autograd.grad(found.square().sum(), inputs):
        assert slope.isfinite().all() and not slope.transpose(1, 2)[~valid.flatten(1)].any()
    nothing = torch.zeros_like(valid)
    empty = blockrank_attention(*inputs, nothing)
    assert not empty.any() and not any(s.any() for s in torch.autograd.grad(empty.sum(), inputs))


def test_grouped_queries_share_their_keys():
    valid = ragged()
    queries = vectors(valid, heads=4)[0]
    _, keys, values = vectors(valid, heads=2)
    found = blockrank_attention(queries, keys, values, valid)
    repeated = [part[:, [0, 0, 1, 1]] for part in (keys, values)]
    torch.testing.assert_close(found, blockrank_attention(queries, *repeated, valid))
    torch.testing.assert_close(attention_logits(queries, keys), attention_logits(queries, repeated[0]))


def test_the_last_logits_are_those_before_the_softmax_and_carry_gradient():
    valid = ragged()
    inputs = vectors(valid)
    outputs, logits = blockrank_attention(*inputs, valid, return_last_scores=3)
    torch.testing.assert_close(outputs, blockrank_attention(*inputs, valid))
    expected = torch.einsum("bhqd,bhkd->bhqk", inputs[0][:, :, -3:], inputs[1]) / math.sqrt(8)
    torch.testing.assert_close(logits, expected)
    # The softmax over what the last token sees gives its output again: the last block sees all that is valid.
    weights = logits[:, :, -1].masked_fill(~valid.flatten(1)[:, None], -math.inf).softmax(-1)
    torch.testing.assert_close(torch.einsum("bhk,bhkd->bhd", weights, inputs[2]), outputs[:, :, -1])
    slopes = torch.autograd.grad(logits.square().sum(), inputs[:2])
    assert slopes[0].transpose(1, 2).unflatten(1, (5, 6))[:, -1, -3:].any() and slopes[1].any()


def test_half_precision_gives_logits_in_single_precision():
    valid = ragged()
    inputs = [part.detach().bfloat16() for part in vectors(valid)]
    outputs, logits = blockrank_attention(*inputs, valid, return_last_scores=2)
    assert outputs.dtype == torch.bfloat16 and outputs.isfinite().all() and logits.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_logits(inputs[0][:, :, -2:], inputs[1]), logits)
    scores = attention_document_scores(logits.bfloat16(), torch.tensor([[0, 1]] * 2), valid)
    assert scores.dtype == torch.float32


def by_hand(logits: Tensor, rows: list[int], valid: Tensor, normalize: str) -> np.ndarray:
    """Document shares of one prompt, loop by loop."""
    blocks, length = valid.shape
    total = np.zeros(blocks - 2)
    for head in range(logits.shape[0]):
        for row in rows:
            mass = np.zeros(blocks - 2)
            for document in range(1, blocks - 1):
                values = [
                    math.exp(logits[head, row, document * length + place])
                    for place in range(length)
                    if valid[document, place]
                ]
                if values:
                    how = {"sum": sum, "max": max, "mean": lambda found: sum(found) / len(found)}[normalize]
                    mass[document - 1] = how(values)
            total += mass / mass.sum()
    return total / (logits.shape[0] * len(rows))


@pytest.mark.parametrize("normalize", ["sum", "mean", "max"])
def test_document_scores_by_hand(normalize: str):
    valid = ragged(blocks=6, length=4)
    logits = torch.randn(2, 3, 5, 24, dtype=torch.float64)
    signals = torch.tensor([[3, 4], [0, 1]])
    found = attention_document_scores(logits, signals, valid, normalize=normalize)
    for sample in range(2):
        expected = by_hand(logits[sample], signals[sample].tolist(), valid[sample], normalize)
        np.testing.assert_allclose(found[sample], expected, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    assert found[1, 1] == 0  # an empty document


def test_at_equal_logits_long_documents_score_higher_unless_normalised():
    """Trap: a document's score sums over its tokens."""
    valid = ragged(batch=3, blocks=6, length=4)
    sizes = valid[:, 1:-1].sum(2).double()
    logits, signals = torch.full((3, 2, 2, 24), 7.0, dtype=torch.float64), torch.tensor([[0, 1]] * 3)
    torch.testing.assert_close(
        attention_document_scores(logits, signals, valid), sizes / sizes.sum(1, keepdim=True)
    )
    for normalize in ("mean", "max"):
        found = attention_document_scores(logits, signals, valid, normalize=normalize)
        expected = (sizes > 0) / (sizes > 0).sum(1, keepdim=True)
        torch.testing.assert_close(found, expected.double())


def test_scores_permute_with_the_documents():
    valid = ragged(batch=1, blocks=6, length=4)
    logits = torch.randn(1, 2, 2, 6, 4, dtype=torch.float64)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    signals = torch.tensor([[0, 1]])
    plain = attention_document_scores(logits.flatten(3), signals, valid)
    moved = attention_document_scores(logits[:, :, :, order].flatten(3), signals, valid[:, order])
    torch.testing.assert_close(moved, plain[:, order[1:-1] - 1], rtol=0, atol=1e-14)


def test_extreme_and_absent_documents_give_finite_scores_and_gradients():
    valid = ragged()
    logits = (1e30 * torch.randn(2, 2, 2, 30)).requires_grad_()
    signals = torch.tensor([[0, 1]] * 2)
    for normalize in ("sum", "mean", "max"):
        for seen in (valid, torch.zeros_like(valid)):
            scores = attention_document_scores(logits, signals, seen, normalize=normalize)
            assert scores.isfinite().all() and (seen.any() or not scores.any())
            assert torch.autograd.grad(scores.square().sum(), logits)[0].isfinite().all()
    none = attention_document_scores(logits[..., :12], signals, valid[:, :2])
    assert none.shape == (2, 0)


def test_gradients_of_scores_are_exact():
    valid, signals = ragged(blocks=4, length=3), torch.tensor([[0, 1]] * 2)
    logits = torch.randn(2, 2, 2, 12, dtype=torch.float64, requires_grad=True)
    for normalize in ("sum", "mean", "max"):
        assert torch.autograd.gradcheck(
            lambda x, n=normalize: attention_document_scores(x, signals, valid, normalize=n), logits
        )


def test_the_ranking_loss_by_hand():
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    relevance = torch.tensor([[1, 0, 0], [2, 0, 1]])
    powers = np.exp(scores.detach().numpy() / 0.05)
    expected = [
        -math.log(powers[0, 0] / powers[0].sum()),
        -math.log((powers[1, 0] + powers[1, 2]) / powers[1].sum()),
    ]
    assert attention_ranking_loss(scores, relevance).item() == pytest.approx(np.mean(expected))
    assert torch.autograd.gradcheck(lambda x: attention_ranking_loss(x, relevance, 0.3), scores)


def test_the_loss_is_zero_when_every_document_is_relevant():
    scores = torch.rand(4, 5, requires_grad=True)
    loss = attention_ranking_loss(scores, torch.ones(4, 5))
    assert loss == 0 and not torch.autograd.grad(loss, scores)[0].any()


def test_the_loss_cannot_go_below_its_floor():
    """Trap: the temperature acts on shares, not on logits."""
    perfect = torch.eye(10, dtype=torch.float64)
    for temperature in (0.05, 0.1, 1.0):
        floor = math.log1p(9 * math.exp(-1 / temperature))
        assert attention_ranking_loss(perfect, torch.eye(10), temperature).item() == pytest.approx(floor)


def test_queries_without_a_relevant_document_add_nothing():
    """Trap: an empty set of positives is the logarithm of zero."""
    scores = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    relevance = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    loss = attention_ranking_loss(scores, relevance)
    torch.testing.assert_close(loss, attention_ranking_loss(scores[[0, 2]], relevance[[0, 2]]))
    assert not torch.autograd.grad(loss, scores)[0][1].any()
    for empty in (
        attention_ranking_loss(scores, 0 * relevance),
        attention_ranking_loss(scores[:0], relevance[:0]),
    ):
        assert empty == 0 and not torch.autograd.grad(empty, scores)[0].any()


def test_ignored_documents_do_not_count():
    scores, relevance = torch.rand(2, 5), torch.tensor([[1, 0, 0, 1, 0]] * 2)
    ignore = torch.tensor([[False, False, False, True, True]] * 2)
    expected = attention_ranking_loss(scores[:, :3], relevance[:, :3])
    torch.testing.assert_close(attention_ranking_loss(scores, relevance, ignore=ignore), expected)
    assert attention_ranking_loss(scores, relevance, ignore=torch.ones_like(ignore)) == 0


def test_shapes_that_would_be_broadcast_are_refused(as_users_call: None):
    """Gathering drops prompts and broadcasting puts them back: scores of nobody, without an error."""
    valid = ragged(batch=2)
    logits, signals = torch.randn(2, 2, 2, 30), torch.tensor([[0, 1]] * 2)
    for arguments in (
        (logits, signals[:1], valid),
        (logits, signals, valid[:1]),
        (logits[:1], signals[:1], valid),
    ):
        with pytest.raises(ValueError, match="must hold as many prompts as attn_logits"):
            attention_document_scores(*arguments)
    with pytest.raises(ValueError, match="token_index must name at least one signal token of each prompt"):
        attention_document_scores(logits, signals[:, :0], valid)
    queries, keys, values = (part.detach() for part in vectors(valid))
    for arguments, message in (
        ((queries, keys, values[..., 1:]), r"values must have the shape of keys \(2, 2, 30, 8\)"),
        ((queries, keys[:1], values[:1]), "queries and keys must be of 2 prompts"),
        ((queries[:1], keys[:1], values[:1]), "queries and keys must be of 2 prompts"),
        ((queries[..., 1:], keys, values), "with tokens and dim alike"),
        ((queries, keys[:, :, :12], values[:, :, :12]), "with tokens and dim alike"),
        ((queries, keys[:, :0], values[:, :0]), "heads of keys must divide the 2 of queries, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            blockrank_attention(*arguments, valid)


def test_no_prompts_have_no_scores():
    valid = torch.ones(0, 5, 6, dtype=torch.bool)
    logits, signals = torch.zeros(0, 2, 2, 30), torch.zeros(0, 2, dtype=torch.int64)
    for normalize in ("sum", "mean", "max"):
        assert attention_document_scores(logits, signals, valid, normalize=normalize).shape == (0, 3)


def test_refuses_what_does_not_fit(as_users_call: None):
    valid = ragged()
    queries, keys, values = vectors(valid)
    for arguments, options, message in (
        (
            (queries[:, :, 1:], keys[:, :, 1:], values[:, :, 1:]),
            {},
            r"queries must have .* 5 \* 6 tokens, got 29",
        ),
        ((torch.cat([queries, queries[:, :1]], 1), keys, values), {}, "heads of keys must divide the 3"),
        (
            (queries, keys, values),
            {"return_last_scores": 7},
            r"return_last_scores must be in \[0, 6\].* got 7",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            blockrank_attention(*arguments, valid, **options)
    logits, signals = torch.zeros(2, 2, 2, 30), torch.tensor([[0, 1]] * 2)
    for index in (
        signals + 1,
        signals - 1,
    ):  # the sign stands outside of the last tokens whose logits were kept
        with pytest.raises(ValueError, match=r"token_index must be in \[0, 2\)"):
            attention_document_scores(logits, index, valid)
    with pytest.raises(ValueError, match="attn_logits must have blocks"):
        attention_document_scores(logits[..., 1:], signals, valid)
    with pytest.raises(ValueError, match='normalize must be "sum", "mean" or "max", got \'median\''):
        attention_document_scores(logits, signals, valid, normalize="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        attention_ranking_loss(torch.zeros(1, 2), torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match=r"relevance must have the shape of scores \(1, 2\), got \(1, 3\)"):
        attention_ranking_loss(torch.zeros(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="block_size must be >= 1, got 0"):
        blockrank_block_mask(valid, 0)
    with pytest.raises(ValueError, match="query_offset must be >= 0, got -1"):
        blockrank_position_ids(valid, -1)
