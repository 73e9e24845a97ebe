"""A small causal language model that reads an instruction, many documents and a query, ranks the documents by attention, and can answer.

The network that `coloss.retrieval.block_ranker` trains: embedding, transformer blocks of `coloss.nn` under the attention of
`coloss.retrieval.block_attention` with rotary positions, and an output tied to the embedding.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn import Transformer, rotary_angles, rotate
from coloss.retrieval.block_attention import (
    Normalize,
    attention_document_scores,
    attention_logits,
    blockrank_attention,
    blockrank_position_ids,
)

Attention: TypeAlias = Literal["block", "causal"]

NO_LABEL = -100
"""Label of a token that nothing is learned from."""


class BlockBatch(NamedTuple):
    """Prompts as blocks of equal length; a tuple of tensors, so that a data set can hold it as its inputs.

    Attributes:
        ids: word ids (batch, blocks, length): instruction, documents, and query with answer, each padded at its left.
        valid: False for padding.
        labels: the answer's ids in their places, -100 everywhere else.
        signals: (batch, 2), places in the last block of the token before the answer and of the answer's first token, whose
            attention ranks the documents.
    """

    ids: Int[Tensor, "batch blocks length"]
    valid: Bool[Tensor, "batch blocks length"]
    labels: Int[Tensor, "batch blocks length"]
    signals: Int[Tensor, "batch 2"]

    @classmethod
    def pack(
        cls,
        instruction: Sequence[Sequence[int]],
        documents: Sequence[Sequence[Sequence[int]]],
        query: Sequence[Sequence[int]],
        answer: Sequence[Sequence[int]],
        max_block_length: int,
        pad_multiple: int = 16,
        padding_id: int = 0,
    ) -> "BlockBatch":
        """Collate prompts of any lengths; every argument holds one entry for each prompt.

        Args:
            instruction: ids of the instruction; it should state the query, so that documents can be read in its light.
            documents: ids of each document. Prompts with fewer get empty blocks, which nothing sees.
            query: ids of the query, at least one.
            answer: ids of the answer, at least the first: an opening sign that ends the prompt when nothing is to be learned. The
                documents' scores are read there, so it must not depend on the answer.
            max_block_length: longest block. Longer documents are cut at their end.
            pad_multiple: the length of the blocks is rounded up to a multiple of this.
            padding_id: id that fills up.

        Raises:
            ValueError: if numbers of prompts differ, an instruction, or a query with its answer, is longer than a block may be, or a
                query or an answer is empty.

        Examples:
            >>> batch = BlockBatch.pack(
            ...     [[5]], [[[6, 7], [8]]], [[5]], [[2, 9]], max_block_length=8, pad_multiple=1
            ... )
            >>> batch.ids.tolist()
            [[[0, 0, 5], [0, 6, 7], [0, 0, 8], [5, 2, 9]]]
            >>> batch.labels[0, -1].tolist(), batch.signals.tolist()
            ([-100, 2, 9], [[0, 1]])
        """
        count = len(instruction)
        for name, part in (("documents", documents), ("query", query), ("answer", answer)):
            if len(part) != count:
                raise ValueError(f"{name} must hold one entry for each of {count} prompts, got {len(part)}")
        if max_block_length < 1 or pad_multiple < 1:
            raise ValueError(
                f"max_block_length and pad_multiple must be >= 1, got {max_block_length} and {pad_multiple}"
            )
        rows: list[list[list[int]]] = []
        most = max((len(found) for found in documents), default=0)
        for number in range(count):
            last = [*query[number], *answer[number]]
            if not query[number] or not answer[number]:
                raise ValueError(
                    f"query and answer must hold at least one id, got {len(query[number])} and {len(answer[number])}"
                )
            for name, size in (("instruction", len(instruction[number])), ("query and answer", len(last))):
                if size > max_block_length:
                    raise ValueError(f"{name} must fit max_block_length = {max_block_length}, got {size} ids")
            middle = [list(found[:max_block_length]) for found in documents[number]]
            middle += [[] for _ in range(most - len(middle))]
            rows.append([list(instruction[number]), *middle, last])
        longest = max((len(block) for row in rows for block in row), default=0)
        length = max(1, math.ceil(longest / pad_multiple)) * pad_multiple
        padded = [[[padding_id] * (length - len(block)) + block for block in row] for row in rows]
        ids = torch.tensor(padded, dtype=torch.int64).view(count, most + 2, length)
        sizes = torch.tensor([[len(block) for block in row] for row in rows]).view(count, most + 2, 1)
        valid = torch.arange(length) >= length - sizes
        answers = torch.tensor([len(part) for part in answer], dtype=torch.int64)
        labels = torch.full_like(ids, NO_LABEL)
        inside = torch.arange(length) >= length - answers[:, None]
        labels[:, -1] = ids[:, -1].where(inside, NO_LABEL)
        first = length - answers
        return cls(ids, valid, labels, torch.stack([first - 1, first], dim=1))


class BlockRankerOutputs(NamedTuple):
    """What a `BlockRanker` gives.

    Attributes:
        document_scores: share of attention of each document, (batch, documents); higher is more relevant.
        present: False for documents of padding alone.
        logits: of the next token, at every place of the last block but the last.
        labels: what that token is, -100 where nothing is learned.
    """

    document_scores: Float[Tensor, "batch documents"]
    present: Bool[Tensor, "batch documents"]
    logits: Float[Tensor, "batch places vocabulary"]
    labels: Int[Tensor, "batch places"]


class BlockRanker(nn.Module):
    """A small causal language model over blocks, which scores documents by the attention of one of its layers.

    `forward` gives scores and next-token logits for training; `rank` the scores alone, and runs the layers before the ranking layer
    only; `decode` writes an answer.

    Args:
        vocabulary_size: number of word ids.
        dim: size of a token.
        depth: number of transformer blocks, >= 1.
        heads: attention heads; divides `dim` into an even head size.
        ranking_layer: the layer (0 is the first) whose attention ranks; negative ones count from the last.
        attention: `"block"`, or `"causal"` for every token seeing all before it, the dense rival of quadratic cost.
        normalize: how a document's attention is summed up, see `attention_document_scores`.
        query_offset: position of the last block, see `blockrank_position_ids`.
        rotary_share: share of each head's dimensions that rotary positions turn, in (0, 1]; the rest sees content alone, from which small
            models learn to match words sooner.

    Returns:
        From `forward(inputs)`: `BlockRankerOutputs`. `inputs` is a `BlockBatch` or a tuple of its tensors.

    Raises:
        ValueError: for values out of range.

    Cost:
        With `"block"` linear in the number of documents, with `"causal"` quadratic.

    Source:
        Gupta et al. 2025, arXiv 2510.05396; Su et al. 2021, arXiv 2104.09864 (rotary positions).

    Examples:
        >>> model = BlockRanker(50, dim=16, depth=2, heads=2)
        >>> batch = BlockBatch.pack([[5]], [[[6, 7], [8], [9]]], [[5]], [[2, 9]], max_block_length=8)
        >>> model(batch).document_scores.sum(1).allclose(torch.ones(1)), model.rank(batch).shape
        (True, torch.Size([1, 3]))
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        *,
        ranking_layer: int = -1,
        attention: Attention = "block",
        normalize: Normalize = "sum",
        query_offset: int = 16384,
        rotary_share: float = 0.5,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        if not -depth <= ranking_layer < depth:
            raise ValueError(f"ranking_layer must be in [{-depth}, {depth}), got {ranking_layer}")
        if attention not in ("block", "causal"):
            raise ValueError(f'attention must be "block" or "causal", got {attention!r}')
        if not 0 < rotary_share <= 1:
            raise ValueError(f"rotary_share must be in (0, 1], got {rotary_share}")
        if heads < 1 or dim % (2 * heads):
            raise ValueError(f"dim must be a multiple of twice the heads ({heads}), got {dim}")
        self.embedding = nn.Embedding(vocabulary_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.transformer = Transformer(dim, depth, heads)
        self.ranking_layer = ranking_layer % depth
        self.attention, self.normalize, self.query_offset = attention, normalize, query_offset
        self.turned = max(1, round(dim // heads * rotary_share / 2))

    def forward(self, inputs: Sequence[Tensor]) -> BlockRankerOutputs:
        batch = BlockBatch(*inputs)
        tokens, projections = self._read(batch, len(self.transformer.blocks))
        queries, keys, _ = projections[self.ranking_layer]
        length = batch.ids.shape[2]
        logits = self._next_token(tokens[:, -length:-1])
        return BlockRankerOutputs(
            self._scores(queries, keys, batch), batch.valid[:, 1:-1].any(2), logits, batch.labels[:, -1, 1:]
        )

    def rank(self, inputs: Sequence[Tensor]) -> Float[Tensor, "batch documents"]:
        """Scores of the documents, from the layers before the ranking layer and its queries and keys: no later layer runs, no output.

        Examples:
            >>> model = BlockRanker(50, dim=16, depth=3, heads=2, ranking_layer=1)
            >>> batch = BlockBatch.pack([[5]], [[[6, 7], [8], [9]]], [[5]], [[2]], max_block_length=8)
            >>> torch.equal(model.rank(batch), model(batch).document_scores)
            True
        """
        batch = BlockBatch(*inputs)
        tokens, _ = self._read(batch, self.ranking_layer)
        block = self.transformer.blocks[self.ranking_layer]
        queries, keys, _ = block.attention.project(block.attention_norm(tokens))  # type: ignore[union-attr, operator]
        angles = self._angles(self._positions(batch.valid))
        return self._scores(rotate(queries, angles), rotate(keys, angles), batch)

    @torch.no_grad()
    def decode(
        self, inputs: Sequence[Tensor], max_tokens: int = 1, *, end_id: int | None = None, padding_id: int = 0
    ) -> Int[Tensor, "batch max_tokens"]:
        """The likeliest continuation of the last block, token by token; keys and values are kept from one to the next.

        Args:
            inputs: prompts, packed with the answer's opening alone.
            max_tokens: length of the answer, >= 1.
            end_id: an answer ends with this id; `padding_id` follows.
            padding_id: see there.

        Raises:
            ValueError: if `max_tokens` < 1.

        Examples:
            >>> model = BlockRanker(50, dim=16, depth=2, heads=2)
            >>> batch = BlockBatch.pack([[5]], [[[6, 7], [8]]], [[5]], [[2]], max_block_length=8)
            >>> model.decode(batch, max_tokens=3).shape
            torch.Size([1, 3])
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
        batch = BlockBatch(*inputs)
        tokens, projections = self._read(batch, len(self.transformer.blocks))
        cache = [(keys, values) for _, keys, values in projections]
        position, seen = self._positions(batch.valid)[:, -1:], batch.valid.flatten(1)
        last, ended = tokens[:, -1:], torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
        answer = []
        while True:
            found = self._next_token(last)[:, 0].argmax(1).masked_fill(ended, padding_id)
            answer.append(found)
            if len(answer) == max_tokens:
                return torch.stack(answer, dim=1)
            if end_id is not None:
                ended = ended | (found == end_id)
            position, seen = position + 1, F.pad(seen, (0, 1), value=True)
            last = self._append(found, self._angles(position), seen, cache)

    def _append(
        self, ids: Tensor, angles: Tensor, seen: Tensor, cache: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """One more token through all layers; it sees whatever is not padding, and joins the cache."""
        tokens = self.embedding(ids)[:, None]
        for number, block in enumerate(self.transformer.blocks):

            def attend(queries: Tensor, keys: Tensor, values: Tensor, number: int = number) -> Tensor:
                before = cache[number]
                keys = torch.cat([before[0], rotate(keys, angles)], dim=2)
                values = torch.cat([before[1], values], dim=2)
                cache[number] = keys, values
                return F.scaled_dot_product_attention(
                    rotate(queries, angles), keys, values, attn_mask=seen[:, None, None]
                )

            tokens = block(tokens, attend=attend)
        return tokens

    def _read(self, batch: BlockBatch, depth: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Tokens after the first layers, and the queries, keys (with positions) and values of each of them."""
        tokens, angles = self.embedding(batch.ids.flatten(1)), self._angles(self._positions(batch.valid))
        flat = batch.valid.flatten(1)
        projections: list[tuple[Tensor, Tensor, Tensor]] = []
        dense = None
        if self.attention == "causal":
            size = flat.shape[1]
            seen = torch.ones(size, size, dtype=torch.bool, device=flat.device).tril() & flat[:, None]
            dense = (seen | torch.eye(size, dtype=torch.bool, device=flat.device))[:, None]

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            queries, keys = rotate(queries, angles), rotate(keys, angles)
            projections.append((queries, keys, values))
            if dense is not None:
                return F.scaled_dot_product_attention(queries, keys, values, attn_mask=dense)
            return blockrank_attention(queries, keys, values, batch.valid)

        for block in self.transformer.blocks[:depth]:
            tokens = block(tokens, attend=attend)
        return tokens, projections

    def _scores(self, queries: Tensor, keys: Tensor, batch: BlockBatch) -> Tensor:
        """Document scores, from the logits of the signal tokens alone, wherever in the last block they stand."""
        length = batch.ids.shape[2]
        index = batch.signals[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        logits = attention_logits(queries[:, :, -length:].gather(2, index), keys)
        rows = torch.arange(2, device=index.device).expand(len(logits), -1)
        return attention_document_scores(logits, rows, batch.valid, normalize=self.normalize)

    def _next_token(self, tokens: Tensor) -> Tensor:
        return self.transformer.norm(tokens) @ self.embedding.weight.T

    def _positions(self, valid: Tensor) -> Tensor:
        if self.attention == "causal":
            return (valid.flatten(1).cumsum(1) - 1).clamp(min=0)
        return blockrank_position_ids(valid, self.query_offset).flatten(1)

    def _angles(self, positions: Tensor) -> Tensor:
        return rotary_angles(positions[:, None], self.turned)

    def extra_repr(self) -> str:
        return (
            f"attention={self.attention!r}, ranking_layer={self.ranking_layer}, normalize={self.normalize!r}"
        )
