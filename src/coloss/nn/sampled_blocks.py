"""Causal attention over randomly chosen distances between blocks of tokens, merged as FlashAttention merges its blocks.

A project definition of PrFlashAttention (Fu Li 2024, arXiv 2410.18441; the law there is not public). Tokens lie in blocks; query block i and
key block j are D = i - j apart. A pass uses distance D with probability P(D), where P(0) = 1, and the softmax runs over the blocks in use.
Whole distances are drawn, not pairs of blocks: each one in use is one batched product of all query blocks with the key blocks that far back,
and every row of blocks has the same work. A sink uses the first block always.

With the correction, the logits of a drawn block get -log P(D), so that numerator and denominator of the softmax are each right on average
(their quotient is not); an extension of this project.

When it helps: attention that is mostly local, trained with the law it will be used with. When not: evaluating a plainly trained model, whose
loss rises as far blocks go missing; gains of time need long texts. A character model of 128 tokens in blocks of 16, evaluated with P(D) =
share^D and a sink: 2.06 nats with share 1 and 0.9, 2.08 with 0.7, 2.10 with 0.5, 2.11 with 0.3, the same within 0.01 with the correction; trained
with share 0.7 as well 2.07 (one seed, `coloss bench generative`).
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.ops.precision import full_precision, without_autocast


def geometric_law(n_blocks: int, share: float) -> Float[Tensor, " n_blocks"]:
    """P(D) = share^D; all distances with share 1, the block itself alone with 0.

    Examples:
        >>> geometric_law(4, 0.5)
        tensor([1.0000, 0.5000, 0.2500, 0.1250])
    """
    if n_blocks < 1:
        raise ValueError(f"n_blocks must be >= 1, got {n_blocks}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    return torch.tensor(share, dtype=torch.float32) ** torch.arange(n_blocks)


def harmonic_law(n_blocks: int) -> Float[Tensor, " n_blocks"]:
    """P(D) = 1 / (D + 1).

    Examples:
        >>> harmonic_law(4)
        tensor([1.0000, 0.5000, 0.3333, 0.2500])
    """
    if n_blocks < 1:
        raise ValueError(f"n_blocks must be >= 1, got {n_blocks}")
    return 1 / torch.arange(1, n_blocks + 1, dtype=torch.float32)


def sampled_distances(
    law: Float[Tensor, " n_blocks"], generator: torch.Generator | None = None
) -> Bool[Tensor, " n_blocks"]:
    """Which distances a pass uses: distance D with probability `law[D]`.

    Raises:
        ValueError: if the law does not begin with 1, or leaves [0, 1].

    Examples:
        >>> sampled_distances(torch.tensor([1.0, 1.0, 0.0]))
        tensor([ True,  True, False])
    """
    _check_law(law)
    draws = torch.rand(
        law.shape, generator=generator, device="cpu" if generator is None else generator.device
    )
    return draws.to(law.device) < law


def sampled_block_mask(
    n_blocks: int,
    law: Float[Tensor, " n_blocks"],
    generator: torch.Generator | None = None,
    *,
    sink: bool = False,
) -> Bool[Tensor, "n_blocks n_blocks"]:
    """Which key block (column) each query block (row) attends to in one pass.

    Args:
        n_blocks: of tokens.
        law: probability of each distance, the first 1.
        generator: of the draws.
        sink: whether all use the first block.

    Returns:
        True on the sampled diagonals of the lower triangle. `mask.repeat_interleave(b, 0).repeat_interleave(b, 1)` and the causal rule within
        blocks make it one for `scaled_dot_product_attention`; `sampled_block_attention` needs no such mask.

    Raises:
        ValueError: for a law of another length or that is none.

    Examples:
        >>> sampled_block_mask(3, torch.tensor([1.0, 0.0, 1.0])).int()
        tensor([[1, 0, 0],
                [0, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    if law.shape != (n_blocks,):
        raise ValueError(f"law must have n_blocks = {n_blocks} probabilities, got {tuple(law.shape)}")
    return _blocks_in_use(sampled_distances(law, generator), sink)


def _blocks_in_use(used: Tensor, sink: bool) -> Tensor:
    places = torch.arange(len(used), device=used.device)
    gaps = places[:, None] - places
    mask = (gaps >= 0) & used[gaps.clamp(min=0)]
    if sink:
        mask[:, 0] = True
    return mask


def sampled_block_attention(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch key_heads tokens dim"],
    values: Float[Tensor, "batch key_heads tokens value_dim"],
    used: Bool[Tensor, " n_blocks"],
    block: int,
    *,
    sink: bool = False,
    log_correction: Float[Tensor, " n_blocks"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Causal softmax attention over the blocks at the distances in use.

    Args:
        queries: of all tokens.
        keys: likewise; fewer heads than queries are shared by as many neighbours each.
        values: likewise.
        used: which distances between blocks, such as `sampled_distances` gives; the first, True. All True: plain causal attention.
        block: tokens in a block, >= 1; the last block may be shorter.
        sink: whether all tokens attend to the first block.
        log_correction: added to the logits of each distance, `-log P(D)`; the sink, which is always there, gets none.

    Returns:
        What each query gets, of the queries' type; computed in float32 at least.

    Raises:
        ValueError: for a number of distances other than that of blocks, a first one that is not in use, or heads that do not fit.

    Cost: time in proportion to the distances in use; memory O(tokens * block) for each head, also backwards, where scores are computed
        once more. Second derivatives are not available.

    Source: Fu Li 2024, arXiv 2410.18441 (the idea); Dao et al. 2022, arXiv 2205.14135 (merging of blocks).

    Examples:
        >>> q, k, v = torch.rand(3, 1, 2, 10, 4).unbind()
        >>> plain = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(sampled_block_attention(q, k, v, torch.ones(3).bool(), block=4), plain, atol=1e-6)
        True
    """
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    tokens = queries.shape[2]
    blocks = -(-tokens // block)
    if len(used) != blocks or not blocks or not bool(used[0]):
        raise ValueError(
            f"used must hold {blocks} distances for {tokens} tokens, at least one, the first True, got {used.tolist()}"
        )
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(
            f"queries must have a multiple of the {keys.shape[1]} heads of keys, got {queries.shape[1]}"
        )
    if log_correction is not None and log_correction.shape != used.shape:
        raise ValueError(
            f"log_correction must have {blocks} values as used, got {tuple(log_correction.shape)}"
        )
    sharing = queries.shape[1] // keys.shape[1]
    if sharing > 1:
        keys, values = keys.repeat_interleave(sharing, 1), values.repeat_interleave(sharing, 1)
    added = [0.0] * blocks if log_correction is None else log_correction.tolist()
    distances = [(distance, added[distance]) for distance in range(blocks) if bool(used[distance])]
    with without_autocast(queries.device):
        wide = [full_precision(part) for part in (queries, keys, values)]
        padding = blocks * block - tokens
        q, k, v = (nn.functional.pad(part, (0, 0, 0, padding)).unflatten(2, (blocks, block)) for part in wide)
        found = _BlockAttention.apply(q, k, v, distances, sink)
    return found.flatten(2, 3)[:, :, :tokens].to(queries.dtype)


def _products(
    blocks: int, distances: list[tuple[int, float]], sink: bool
) -> Iterator[tuple[slice, slice, float]]:
    """Query blocks, key blocks and what is added to the logits, of each batched product but that of blocks with themselves."""
    for distance, added in distances:
        first = 1 if sink else 0  # key blocks from here on; the sink has a product of its own
        if distance and distance + first < blocks:
            yield slice(distance + first, blocks), slice(first, blocks - distance), added
    if sink and blocks > 1:
        yield slice(1, blocks), slice(0, 1), 0.0


def _scores(q: Tensor, k: Tensor, added: float, within: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + added
    if within:
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


class _BlockAttention(torch.autograd.Function):
    """Queries, keys and values as (batch, heads, blocks, tokens, dim)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, distances: list[tuple[int, float]], sink: bool
    ) -> Tensor:
        scores = _scores(q, k, distances[0][1], True)
        log_sum = scores.logsumexp(-1, keepdim=True)
        mixed = (scores - log_sum).exp() @ v
        for rows, columns, added in _products(q.shape[2], distances, sink):
            scores = _scores(q[:, :, rows], k[:, :, columns], added, False)
            own = scores.logsumexp(-1, keepdim=True)
            before = log_sum[:, :, rows]
            total = torch.logaddexp(before, own)
            fresh = (scores - total).exp() @ v[:, :, columns]
            mixed[:, :, rows] = mixed[:, :, rows] * (before - total).exp() + fresh
            log_sum[:, :, rows] = total
        ctx.save_for_backward(q, k, v, mixed, log_sum)
        ctx.distances, ctx.sink = distances, sink
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mixed, log_sum = ctx.saved_tensors
        # The scores must be those of the forward pass, whose log-sums are kept.
        with without_autocast(q.device):
            grad_q, grad_k, grad_v = (torch.zeros_like(part) for part in (q, k, v))
            mean = (gradient * mixed).sum(-1, keepdim=True)
            whole = slice(0, q.shape[2])
            products = [(whole, whole, ctx.distances[0][1]), *_products(q.shape[2], ctx.distances, ctx.sink)]
            for number, (rows, columns, added) in enumerate(products):
                scores = _scores(q[:, :, rows], k[:, :, columns], added, number == 0)
                weights = (scores - log_sum[:, :, rows]).exp()
                wanted = gradient[:, :, rows]
                slope = weights * (wanted @ v[:, :, columns].transpose(-1, -2) - mean[:, :, rows])
                slope = slope * q.shape[-1] ** -0.5
                grad_q[:, :, rows] += slope @ k[:, :, columns]
                for part, change in (
                    (grad_v, weights.transpose(-1, -2) @ wanted),
                    (grad_k, slope.transpose(-1, -2) @ q[:, :, rows]),
                ):
                    shared = columns.stop - columns.start < rows.stop - rows.start  # the sink
                    part[:, :, columns] += change.sum(2, keepdim=True) if shared else change
        return grad_q, grad_k, grad_v, None, None


class SampledBlockAttention(nn.Module):
    """Draws distances anew for each pass in training; an `attend` for `TransformerBlock`, and a `causal_attention` for `CausalLanguageModel`.

    Args:
        block: tokens in a block.
        share: P(D) = share^D; None: 1 / (D + 1).
        sink: whether all tokens attend to the first block.
        correction: whether the logits of drawn blocks get -log P(D).
        evaluation: `"all"` distances in evaluation mode, or the `"same"` law as in training.
        generator: of the draws; None: torch's own, as for dropout.

    Returns:
        From `forward(queries, keys, values)`: as `sampled_block_attention`.

    Examples:
        >>> from coloss.nn import TransformerBlock
        >>> attend = SampledBlockAttention(block=4, share=0.5)
        >>> TransformerBlock(16, 2)(torch.rand(1, 10, 16), attend=attend).shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        block: int,
        share: float | None = 0.5,
        *,
        sink: bool = True,
        correction: bool = False,
        evaluation: Literal["all", "same"] = "all",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if block < 1:
            raise ValueError(f"block must be >= 1, got {block}")
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        if evaluation not in ("all", "same"):
            raise ValueError(f'evaluation must be "all" or "same", got {evaluation!r}')
        self.block, self.share, self.sink, self.correction = block, share, sink, correction
        self.evaluation, self.generator = evaluation, generator

    def forward(
        self,
        queries: Float[Tensor, "batch heads tokens dim"],
        keys: Float[Tensor, "batch key_heads tokens dim"],
        values: Float[Tensor, "batch key_heads tokens value_dim"],
    ) -> Float[Tensor, "batch heads tokens value_dim"]:
        blocks = -(-queries.shape[2] // self.block)
        law = harmonic_law(blocks) if self.share is None else geometric_law(blocks, self.share)
        if not self.training and self.evaluation == "all":
            law = torch.ones(blocks)
        return sampled_block_attention(
            queries,
            keys,
            values,
            sampled_distances(law, self.generator),
            self.block,
            sink=self.sink,
            log_correction=-law.log() if self.correction else None,
        )


def _check_law(law: Tensor) -> None:
    if not len(law) or float(law[0]) != 1.0 or not bool(((law >= 0) & (law <= 1)).all()):
        raise ValueError(f"law must begin with 1 and stay in [0, 1], got {law.tolist()[:8]}")
