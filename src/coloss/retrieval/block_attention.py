r"""Attention for prompts that hold an instruction, many documents and a query, at a cost that is linear in the number of documents.

Block-sparse in-context ranking after BlockRank: Gupta et al. 2025, "Scalable In-context Ranking with Generative Models", arXiv 2510.05396.

A prompt is M blocks of H tokens, each padded at its left: block 0 the instruction, blocks 1 .. M - 2 the documents, block M - 1 the query
and the answer. With b(t) the block of token t, query token q sees key token k where

    k <= q,  k is no padding,  and  b(k) = 0  or  b(k) = b(q)  or  b(q) = M - 1

so documents do not see each other, and the last block sees everything before it: H^2 + (M - 2) 2 H^2 + M H^2 pairs in place of
(M H)^2 / 2. Documents share their position ids, so their order means nothing. `blockrank_attention` computes it as three dense problems;
`blockrank_mask` is the same as a dense mask, for reference, and `blockrank_block_mask` the same for PyTorch's flex attention.

A document's score is the attention that it gets from a few signal tokens of the last block (`attention_document_scores`), trained by
`attention_ranking_loss`. The score sums over tokens, so at equal logits a longer document scores higher: `normalize="mean"` or `"max"`
take that out.
"""

import math
from typing import Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from coloss.ops import full_precision, masked_logsumexp, without_autocast

Normalize: TypeAlias = Literal["sum", "mean", "max"]


def blockrank_mask(valid: Bool[Tensor, "batch blocks length"]) -> Bool[Tensor, "batch 1 tokens tokens"]:
    """Which token sees which, as one dense mask: the reference, of (blocks * length)^2 entries.

    Args:
        valid: False for padding.

    Returns:
        True where a query (third dimension) sees a key (fourth). Rows and columns of padding are all False.

    Cost:
        Quadratic in the number of blocks: for tests and short prompts.

    Examples:
        >>> blockrank_mask(torch.ones(1, 4, 1, dtype=torch.bool))[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    blocks, length = valid.shape[1:]
    token = torch.arange(blocks * length, device=valid.device)
    query, key, flat = token[:, None], token[None, :], valid.flatten(1)
    return (_sees(query, key, blocks, length) & flat[:, :, None] & flat[:, None, :])[:, None]


def blockrank_block_mask(valid: Bool[Tensor, "batch blocks length"], block_size: int = 128) -> BlockMask:
    """The same mask for `torch.nn.attention.flex_attention.flex_attention`, which skips the tiles in which nobody sees anybody.

    Args:
        valid: False for padding.
        block_size: side of a tile in tokens, > 0; compiled kernels want a multiple of theirs, such as 128.

    Returns:
        A `BlockMask` for queries and keys of blocks * length tokens. Outputs at padding are 0.

    Raises:
        ValueError: if `block_size` < 1.

    Cost:
        (blocks * length / block_size)^2 small integers; no mask of tokens is made.

    Examples:
        >>> mask = blockrank_block_mask(torch.ones(1, 6, 16, dtype=torch.bool), block_size=16)
        >>> mask.kv_num_blocks[0, 0].tolist()
        [1, 2, 2, 2, 2, 6]
    """
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    batch, blocks, length = valid.shape
    tokens = blocks * length
    first = torch.arange(0, tokens, block_size, device=valid.device)
    low, high = first // length, (first + block_size - 1).clamp(max=tokens - 1) // length
    # A tile counts if any block of its queries sees any block of its keys.
    sees = (low[None, :] == 0) | (high[:, None] == blocks - 1)
    sees |= (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])
    sees = sees.tril().expand(batch, 1, -1, -1)
    flat = valid.flatten(1)

    visible = lambda sample, head, query, key: (
        _sees(query, key, blocks, length) & flat[sample, query] & flat[sample, key]
    )
    return BlockMask.from_kv_blocks(
        sees.sum(3, dtype=torch.int32),
        sees.int().argsort(dim=3, descending=True, stable=True).to(torch.int32),
        BLOCK_SIZE=block_size,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )


def blockrank_position_ids(
    valid: Bool[Tensor, "batch blocks length"], query_offset: int = 16384
) -> Int[Tensor, "batch blocks length"]:
    """Positions that do not depend on the order of documents: each of them begins where the instruction ends.

    Args:
        valid: False for padding.
        query_offset: position of the last block's first token, >= 0; more than any document reaches, and within what the model's
            position encoding covers.

    Returns:
        Instruction 0, 1, ..., n_0 - 1; every document n_0, n_0 + 1, ...; last block `query_offset`, ...; 0 at padding.

    Raises:
        ValueError: if `query_offset` < 0.

    Examples:
        >>> valid = torch.tensor([[[False, True], [True, True], [True, True], [False, True]]])
        >>> blockrank_position_ids(valid, query_offset=100)
        tensor([[[  0,   0],
                 [  1,   2],
                 [  1,   2],
                 [  0, 100]]])
    """
    if query_offset < 0:
        raise ValueError(f"query_offset must be >= 0, got {query_offset}")
    positions = valid.long().cumsum(2) - 1
    start = valid[:, :1].sum(2, keepdim=True).expand(-1, valid.shape[1], -1).clone()
    start[:, 0] = 0
    if valid.shape[1] > 1:
        start[:, -1] = query_offset
    return (positions + start) * valid


@overload
def blockrank_attention(
    queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor, *, return_last_scores: Literal[0] = 0
) -> Tensor: ...


@overload
def blockrank_attention(
    queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor, *, return_last_scores: int
) -> Tensor | tuple[Tensor, Tensor]: ...


def blockrank_attention(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch key_heads tokens dim"],
    values: Float[Tensor, "batch key_heads tokens dim"],
    valid: Bool[Tensor, "batch blocks length"],
    *,
    return_last_scores: int = 0,
) -> (
    Float[Tensor, "batch heads tokens dim"]
    | tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads last tokens"]]
):
    r"""Scaled dot-product attention under `blockrank_mask`, as three dense problems: instruction, all documents, last block.

    Args:
        queries, keys, values: tokens of all blocks one after the other; tokens = blocks * length. With fewer heads of keys than of
            queries (a divisor), each serves several (grouped queries).
        valid: False for padding, which stands left in its block. One block is the instruction alone; of two the second is the last.
        return_last_scores: also return the logits of so many last tokens of the last block, 0 to length.

    Returns:
        What each token gets; 0 at padding. With `return_last_scores` also the logits $q k / \sqrt{\text{dim}}$, before the softmax and
        without a mask, at least float32: fused kernels do not give them.

    Raises:
        ValueError: if shapes or heads do not fit one another, or `return_last_scores` is out of range.

    Cost:
        O(blocks * length^2 * dim) time and O(blocks * length) memory where torch's kernel is fused, and a mask of
        2 * blocks * length^2 entries; keys and values of the instruction are repeated for each document.

    Source:
        Gupta et al. 2025, arXiv 2510.05396.

    Examples:
        >>> queries, keys, values = torch.randn(3, 2, 4, 5 * 8, 16)
        >>> valid = torch.ones(2, 5, 8, dtype=torch.bool)
        >>> found = blockrank_attention(queries, keys, values, valid)
        >>> dense = F.scaled_dot_product_attention(queries, keys, values, attn_mask=blockrank_mask(valid))
        >>> torch.allclose(found, dense, atol=1e-5)
        True
    """
    batch, blocks, length = valid.shape
    _check_attention(queries, keys, values, valid, return_last_scores)
    share = queries.shape[1] // keys.shape[1]
    if share > 1:
        keys, values = (part.repeat_interleave(share, dim=1) for part in (keys, values))
    query, key, value = (part.unflatten(2, (blocks, length)) for part in (queries, keys, values))
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=valid.device)
    # Padding sees itself, so that no softmax is empty; its output is put to zero below.
    own = (causal & valid[:, :, None, :]) | itself
    parts = [_attend(query[:, :, 0], key[:, :, 0], value[:, :, 0], own[:, 0])]
    documents = blocks - 2
    if documents > 0:
        before = valid[:, None, None, 0].expand(-1, documents, length, -1)
        mask = torch.cat([before, own[:, 1:-1]], dim=3).flatten(0, 1)

        def with_instruction(part: Tensor) -> Tensor:
            shared = part[:, :, :1].expand(-1, -1, documents, -1, -1)
            return torch.cat([shared, part[:, :, 1:-1]], dim=3).transpose(1, 2).flatten(0, 1)

        rows = query[:, :, 1:-1].transpose(1, 2).flatten(0, 1)
        found = _attend(rows, with_instruction(key), with_instruction(value), mask)
        parts.append(found.unflatten(0, (batch, documents)).transpose(1, 2).flatten(2, 3))
    if blocks > 1:
        before = valid[:, None, :-1].flatten(2).expand(-1, length, -1)
        mask = torch.cat([before, own[:, -1]], dim=2)
        parts.append(_attend(query[:, :, -1], keys, values, mask))
    outputs = torch.cat(parts, dim=2).masked_fill(~valid.flatten(1)[:, None, :, None], 0.0)
    if not return_last_scores:
        return outputs
    return outputs, attention_logits(queries[:, :, -return_last_scores:], keys)


def attention_logits(
    queries: Float[Tensor, "batch heads rows dim"], keys: Float[Tensor, "batch key_heads tokens dim"]
) -> Float[Tensor, "batch heads rows tokens"]:
    r"""Logits $q k / \sqrt{\text{dim}}$ of a few queries, which fused attention does not give; at least float32, under autocast too.

    Args:
        queries, keys: as for `blockrank_attention`.

    Examples:
        >>> attention_logits(torch.ones(1, 2, 1, 4), torch.ones(1, 1, 3, 4))[0, 0]
        tensor([[2., 2., 2.]])
    """
    share = queries.shape[1] // keys.shape[1]
    rows = full_precision(queries) / math.sqrt(queries.shape[3])
    with without_autocast(queries.device):
        return rows @ full_precision(keys).repeat_interleave(share, dim=1).transpose(2, 3)


def attention_document_scores(
    attn_logits: Float[Tensor, "batch heads rows tokens"],
    token_index: Int[Tensor, "batch signals"],
    valid: Bool[Tensor, "batch blocks length"],
    *,
    normalize: Normalize = "sum",
) -> Float[Tensor, "batch documents"]:
    r"""The share of attention that each document gets from the signal tokens, averaged over them and over heads.

    With a the softmax of a row's logits over the tokens of all documents together, document j gets
    $c_j = \sum_{t \in j} a_t$; instruction, last block and padding are left out.

    Args:
        attn_logits: logits of some tokens of the last block against all blocks * length tokens, not masked.
        token_index: which of those rows are the signal tokens.
        valid: False for padding.
        normalize: `"sum"` as above, in which long documents collect more; `"mean"` over the tokens of a document, or `"max"`, the
            token that gets most, both rescaled to a sum of 1.

    Returns:
        c in [0, 1], blocks - 2 columns with a sum of 1; 0 for a document of padding alone.

    Raises:
        ValueError: if shapes do not fit, there is no signal token or one that is not among the rows, or `normalize` is unknown.

    Source:
        Gupta et al. 2025, arXiv 2510.05396; `"mean"` and `"max"` are additions.

    Examples:
        >>> valid = torch.tensor([[[True, True], [True, True], [False, True], [True, True]]])
        >>> logits, signals = torch.zeros(1, 1, 2, 8), torch.tensor([[0, 1]])
        >>> attention_document_scores(logits, signals, valid)
        tensor([[0.6667, 0.3333]])
        >>> attention_document_scores(logits, signals, valid, normalize="mean")
        tensor([[0.5000, 0.5000]])
    """
    rows, tokens = attn_logits.shape[2:]
    if valid.shape[1] * valid.shape[2] != tokens:
        expected = valid.shape[1] * valid.shape[2]
        raise ValueError(f"attn_logits must have blocks * length = {expected} tokens, got {tokens}")
    if not len(attn_logits) == len(token_index) == len(valid):
        raise ValueError(
            f"token_index and valid must hold as many prompts as attn_logits ({len(attn_logits)}), "
            f"got {len(token_index)} and {len(valid)}"
        )
    if token_index.shape[1] < 1:
        raise ValueError("token_index must name at least one signal token of each prompt, got none")
    if normalize not in ("sum", "mean", "max"):
        raise ValueError(f'normalize must be "sum", "mean" or "max", got {normalize!r}')
    if token_index.numel() and not 0 <= int(token_index.min()) <= int(token_index.max()) < rows:
        raise ValueError(
            f"token_index must be in [0, {rows}), the rows of attn_logits, got {int(token_index.min())} to {int(token_index.max())}"
        )
    index = token_index[:, None, :, None].expand(-1, attn_logits.shape[1], -1, tokens)
    logits = full_precision(attn_logits).gather(2, index).unflatten(3, valid.shape[1:])[:, :, :, 1:-1]
    kept = valid[:, None, None, 1:-1]
    if normalize == "max":
        weight = logits.masked_fill(~kept, -math.inf).amax(-1)
    else:
        weight = masked_logsumexp(logits, kept)
        if normalize == "mean":
            weight = weight - kept.sum(-1).clamp(min=1).log()
    present = kept.any(-1)
    total = masked_logsumexp(weight, present).unsqueeze(-1)
    shares = (weight - total.masked_fill(~present.any(-1, keepdim=True), 0.0)).exp()
    return shares.masked_fill(~present, 0.0).mean((1, 2))


def attention_ranking_loss(
    scores: Float[Tensor, "queries documents"],
    relevance: Shaped[Tensor, "queries documents"],
    temperature: float | int = 0.05,
    *,
    ignore: Bool[Tensor, "queries documents"] | None = None,
) -> Float[Tensor, ""]:
    r"""Softmax cost of finding any relevant document by its share of attention: the sum over positives stands inside the logarithm.

    $-\log \frac{\sum_{j : r_j > 0} e^{c_j / \tau}}{\sum_j e^{c_j / \tau}}$, averaged over queries with a relevant document. Supervises any
    attention map: pointer networks, readout of a memory, grounding.

    Args:
        scores: c, such as those of `attention_document_scores`. As they lie in [0, 1], the loss of a query with one positive among
            n documents is at least $\log(1 + (n - 1) e^{-1/\tau})$.
        relevance: relevant where > 0.
        temperature: tau > 0; the published settings use 0.05.
        ignore: True for documents that do not count, such as those of padding alone.

    Returns:
        A scalar, at least float32; queries without a relevant document add nothing, and 0 comes back if all are such.

    Raises:
        ValueError: if shapes differ, or the temperature is not > 0.

    Source:
        Gupta et al. 2025, arXiv 2510.05396.

    Examples:
        >>> scores = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
        >>> attention_ranking_loss(scores, torch.tensor([[1, 0, 0], [1, 1, 1]]))  # log 2 and 0
        tensor(0.3466)
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    for name, mask in (("relevance", relevance), ("ignore", ignore)):
        if mask is not None and mask.shape != scores.shape:
            raise ValueError(
                f"{name} must have the shape of scores {tuple(scores.shape)}, got {tuple(mask.shape)}"
            )
    counted = torch.ones_like(scores, dtype=torch.bool) if ignore is None else ~ignore
    positive = (relevance > 0) & counted
    found = positive.any(1)
    logits = full_precision(scores) / temperature
    costs = masked_logsumexp(logits, counted) - masked_logsumexp(logits, positive)
    return torch.where(found, costs, 0.0).sum() / found.sum().clamp(min=1)


# Whether a token may see another, padding apart. A lambda, as flex attention traces it and cannot trace checks of types around a function.
_sees = lambda query, key, blocks, length: (
    (key <= query)
    & ((key // length == 0) | (key // length == query // length) | (query // length == blocks - 1))
)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None])


def _check_attention(queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor, last: int) -> None:
    batch, blocks, length = valid.shape
    if blocks < 1 or queries.shape[2] != blocks * length:
        raise ValueError(
            f"queries must have blocks * length = {blocks} * {length} tokens, got {queries.shape[2]}"
        )
    if keys.shape != values.shape:
        raise ValueError(f"values must have the shape of keys {tuple(keys.shape)}, got {tuple(values.shape)}")
    if not len(queries) == len(keys) == batch or queries.shape[2:] != keys.shape[2:]:
        raise ValueError(
            f"queries and keys must be of {batch} prompts, with tokens and dim alike, "
            f"got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if not keys.shape[1] or queries.shape[1] % keys.shape[1]:
        raise ValueError(f"heads of keys must divide the {queries.shape[1]} of queries, got {keys.shape[1]}")
    if not 0 <= last <= length:
        raise ValueError(f"return_last_scores must be in [0, {length}], the length of a block, got {last}")
