"""A transformer of learned queries and words: the queries look at a memory (a motion, an image), the words at each other or at the queries.

One set of attention weights serves queries and words; each of the two has its own feed-forward networks, and only queries have
cross-attention, in every second layer. Three masks on one network give four readings:

    mode              queries attend to        words attend to
    unimodal          queries                  all words
    multimodal        queries and all words    queries and all words
    prefix-causal     queries                  queries, and words up to their own place

Layers are pre-norm, unlike the post-norm ones of BERT from which the published network starts: small ones train without pretraining.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn.key_value_cache import KeyValues
from coloss.nn.transformer import SelfAttention

Mode = Literal["unimodal", "multimodal", "prefix-causal"]


class QueryReading(NamedTuple):
    """What the queries made of a memory: their vectors (batch, queries, dim), and the keys and values of each layer, for text to continue."""

    queries: Tensor
    key_values: list[KeyValues]


class JointReading(NamedTuple):
    """Vectors of queries (batch, queries, dim) and of text tokens (batch, 1 + words, dim), the first one being the special token in front."""

    queries: Tensor
    text: Tensor


def query_text_mask(
    valid: Bool[Tensor, "batch text"], num_queries: int, mode: Mode
) -> Bool[Tensor, "batch 1 tokens tokens"]:
    """Who may attend to whom in a sequence of queries followed by text tokens.

    Args:
        valid: False for text tokens that are padding: nothing but themselves attends to them.
        num_queries: number of queries in front, >= 0.
        mode: see the module's table.

    Returns:
        True where the token of the third dimension may attend to that of the fourth; no row is empty.

    Raises:
        ValueError: for an unknown mode or a negative number of queries.

    Examples:
        >>> query_text_mask(torch.ones(1, 2, dtype=torch.bool), 1, "prefix-causal")[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if num_queries < 0:
        raise ValueError(f"num_queries must be >= 0, got {num_queries}")
    words = valid.shape[1]
    total = num_queries + words
    is_text = torch.arange(total, device=valid.device) >= num_queries
    if mode == "multimodal":
        allowed = torch.ones(total, total, dtype=torch.bool, device=valid.device)
    elif mode == "unimodal":
        allowed = is_text[:, None] == is_text
    else:
        # Queries are the first block: they see all queries; words see all before them and themselves.
        allowed = torch.ones(total, total, dtype=torch.bool, device=valid.device).tril()
        allowed |= ~is_text[:, None] & ~is_text
    visible = F.pad(valid, (num_queries, 0), value=True)[:, None]
    itself = torch.eye(total, dtype=torch.bool, device=valid.device)
    return ((allowed & visible) | itself)[:, None]


class MemoryAttention(nn.Module):
    """Cross-attention of queries to a memory of another width, added to the queries: `q + out(attention(norm(q), norm(m), norm(m)))`.

    Args:
        dim: of a query.
        memory_dim: of a memory token.
        heads: of attention; divides `dim`.

    Returns:
        From `forward(queries, memory, valid=None)`: the queries; unchanged but for a bias where no memory token is valid.

    Raises:
        ValueError: if `heads` does not divide `dim`.

    Examples:
        >>> MemoryAttention(8, 5, heads=2)(torch.rand(3, 4, 8), torch.rand(3, 7, 5)).shape
        torch.Size([3, 4, 8])
    """

    def __init__(self, dim: int, memory_dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        self.heads = heads
        self.query_norm, self.memory_norm = nn.LayerNorm(dim), nn.LayerNorm(memory_dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(memory_dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"],
        memory: Float[Tensor, "batch tokens memory_dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        if valid is not None:
            # Chosen, not only masked: padding must not reach the result as 0 * NaN.
            memory = torch.where(valid[..., None], memory, 0.0)
        asked = self.query(self.query_norm(queries)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        told = self.key_value(self.memory_norm(memory)).unflatten(2, (2, self.heads, -1))
        keys, values = told.permute(2, 0, 3, 1, 4)
        if valid is None:
            mixed = F.scaled_dot_product_attention(asked, keys, values)
        else:
            something = valid.any(1)[:, None, None, None]
            mask = valid[:, None, None] | ~something
            mixed = F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask)
            mixed = mixed.masked_fill(~something, 0.0)
        return queries + self.output(mixed.transpose(1, 2).flatten(2))


class QueryTextLayer(nn.Module):
    """One layer: shared self-attention, cross-attention of the queries if it has any, and a feed-forward network for each kind of token.

    Args:
        dim, heads, memory_dim: sizes.
        feed_forward: hidden width of the two networks.
        crossing: whether queries look at the memory here.
        dropout: probability in [0, 1) after attention and feed-forward networks.

    Examples:
        >>> layer = QueryTextLayer(8, 2, 5, feed_forward=16, crossing=True)
        >>> queries, text, kept = layer(torch.rand(3, 4, 8), None, torch.rand(3, 7, 5))
        >>> queries.shape, text, kept.keys.shape
        (torch.Size([3, 4, 8]), None, torch.Size([3, 2, 4, 4]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        memory_dim: int,
        *,
        feed_forward: int,
        crossing: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), SelfAttention(dim, heads)
        self.cross = MemoryAttention(dim, memory_dim, heads) if crossing else None
        self.query_network, self.text_network = (
            nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, feed_forward),
                nn.GELU(),
                nn.Linear(feed_forward, dim),
                nn.Dropout(dropout),
            )
            for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"] | None,
        text: Float[Tensor, "batch text dim"] | None,
        memory: Float[Tensor, "batch tokens memory_dim"] | None = None,
        memory_valid: Bool[Tensor, "batch tokens"] | None = None,
        allowed: Bool[Tensor, "#batch 1 #own seen"] | None = None,
        before: KeyValues | None = None,
    ) -> tuple[Tensor | None, Tensor | None, KeyValues]:
        """Queries, text (each None where none was given), and the keys and values of these tokens; `before` stands in front of them."""
        given = [tokens for tokens in (queries, text) if tokens is not None]
        tokens = torch.cat(given, 1) if len(given) > 1 else given[0]
        asked, keys, values = self.attention.project(self.attention_norm(tokens))
        own = KeyValues(keys, values)
        if before is not None:
            keys, values = torch.cat([before.keys, keys], 2), torch.cat([before.values, values], 2)
        mixed = F.scaled_dot_product_attention(asked, keys, values, attn_mask=allowed)
        tokens = tokens + self.dropout(self.attention.output(mixed.transpose(1, 2).flatten(2)))
        if queries is not None:
            count = queries.shape[1]
            queries = tokens[:, :count]
            if self.cross is not None and memory is not None:
                queries = self.cross(queries, memory, memory_valid)
            queries = queries + self.query_network(queries)
            tokens = tokens[:, count:]
        if text is not None:
            text = tokens + self.text_network(tokens)
        return queries, text, own


class QueryTransformer(nn.Module):
    """Learned queries that read a memory, a text encoder, and both together, in one set of weights.

    Args:
        vocabulary_size: number of word ids. Three more tokens are the network's own: one in front of a text to be understood, one in front
            of a text to be written, and the end of a text.
        memory_dim: width of a memory token.
        dim: width of a query and of a word.
        layers: number of layers, >= 1.
        heads: of attention; divides `dim`.
        num_queries: number of learned queries, >= 1.
        max_words: longest text, without special tokens.
        cross_every: queries look at the memory in layers 0, `cross_every`, 2 `cross_every`, ...
        feed_forward: hidden width of the feed-forward networks; None: twice `dim`.
        padding_id: of the word ids that fill up a shorter text; None if there are none.
        dropout: probability in [0, 1).

    Attributes:
        queries: the learned queries (queries, dim).
        class_id, begin_id, end_id: ids of the three special tokens, behind the word ids.

    Raises:
        ValueError: for sizes that do not fit one another; when called, for word ids out of range or too long a text.

    Cost:
        Per layer O(batch * (queries + words)^2 * dim) for attention and O(batch * (queries + words) * dim * feed_forward).

    Source: Li et al. 2023 (BLIP-2), arXiv 2301.12597; for motions Li et al. 2024 (LaMP), arXiv 2410.07093.

    Examples:
        >>> network = QueryTransformer(
        ...     30, memory_dim=12, dim=16, layers=2, heads=4, num_queries=5, max_words=8
        ... )
        >>> words = torch.tensor([[4, 9, 2, 0], [7, 0, 0, 0]])
        >>> reading = network.read_memory(torch.randn(2, 6, 12))
        >>> reading.queries.shape, network.read_text(words).shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 16]))
        >>> network.word_logits(network.continue_text(words, reading.key_values)).shape
        torch.Size([2, 5, 33])
    """

    def __init__(
        self,
        vocabulary_size: int,
        memory_dim: int,
        *,
        dim: int = 96,
        layers: int = 4,
        heads: int = 4,
        num_queries: int = 16,
        max_words: int = 32,
        cross_every: int = 2,
        feed_forward: int | None = None,
        padding_id: int | None = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("vocabulary_size", vocabulary_size),
            ("memory_dim", memory_dim),
            ("layers", layers),
            ("num_queries", num_queries),
            ("max_words", max_words),
            ("cross_every", cross_every),
        ):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if padding_id is not None and not 0 <= padding_id < vocabulary_size:
            raise ValueError(f"padding_id must be in 0 .. {vocabulary_size - 1} or None, got {padding_id}")
        self.vocabulary_size, self.memory_dim, self.dim = vocabulary_size, memory_dim, dim
        self.num_queries, self.max_words, self.padding_id = num_queries, max_words, padding_id
        self.class_id, self.begin_id, self.end_id = (vocabulary_size + place for place in range(3))
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.embedding = nn.Embedding(vocabulary_size + 3, dim)
        self.positions = nn.Embedding(max_words + 1, dim)
        self.layers = nn.ModuleList(
            QueryTextLayer(
                dim,
                heads,
                memory_dim,
                feed_forward=2 * dim if feed_forward is None else feed_forward,
                crossing=number % cross_every == 0,
                dropout=dropout,
            )
            for number in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self._draw_weights()

    def read_memory(
        self,
        memory: Float[Tensor, "batch tokens memory_dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> QueryReading:
        """What the queries find in a memory, without any text.

        Args:
            memory: tokens of a motion, an image, or a text.
            valid: False for memory tokens that are padding, at which no query looks.
        """
        if memory.shape[2] != self.memory_dim:
            raise ValueError(f"memory must have tokens of width {self.memory_dim}, got {memory.shape[2]}")
        queries: Tensor | None = self._queries(memory)
        kept: list[KeyValues] = []
        for layer in self.layers:
            queries, _, own = layer(queries, None, memory, valid)
            kept.append(own)
        return QueryReading(self.norm(queries), kept)

    def read_text(self, words: Int[Tensor, "batch words"]) -> Float[Tensor, "batch text dim"]:
        """Vectors of a text that is read both ways, the class token's first; those of padding mean nothing."""
        text: Tensor | None = self.embed(words)
        allowed = query_text_mask(self.text_valid(words), 0, "unimodal")
        for layer in self.layers:
            _, text, _ = layer(None, text, allowed=allowed)
        return self.norm(text)

    def continue_text(
        self, words: Int[Tensor, "batch words"], key_values: list[KeyValues]
    ) -> Float[Tensor, "batch text dim"]:
        """Vectors of a text to be written after what the queries read: each word sees the queries and the words before it.

        The first vector is that of the begin token; vector j predicts word j (from 0). Equal to the prefix-causal mode of `forward`, at
        the cost of the text alone.

        Args:
            words: ids.
            key_values: from `read_memory` for the same samples.
        """
        text: Tensor | None = self.embed(words, self.begin_id)
        mask = query_text_mask(self.text_valid(words), self.num_queries, "prefix-causal")
        allowed = mask[:, :, self.num_queries :]
        for layer, before in zip(self.layers, key_values, strict=True):
            _, text, _ = layer(None, text, allowed=allowed, before=before)
        return self.norm(text)

    def forward(
        self,
        words: Int[Tensor, "batch words"],
        memory: Float[Tensor, "batch tokens memory_dim"],
        memory_valid: Bool[Tensor, "batch tokens"] | None = None,
        mode: Mode = "multimodal",
    ) -> JointReading:
        """Queries and text in one pass, under the mask of a mode.

        Args:
            words: ids.
            memory: what the queries look at.
            memory_valid: False for its padding.
            mode: see the module's table. `read_memory`, `read_text` and `continue_text` give the parts of the other two modes for less.
        """
        if memory.shape[2] != self.memory_dim:
            raise ValueError(f"memory must have tokens of width {self.memory_dim}, got {memory.shape[2]}")
        allowed = query_text_mask(self.text_valid(words), self.num_queries, mode)
        queries: Tensor | None = self._queries(memory)
        text: Tensor | None = self.embed(words, self.begin_id if mode == "prefix-causal" else self.class_id)
        for layer in self.layers:
            queries, text, _ = layer(queries, text, memory, memory_valid, allowed)
        return JointReading(self.norm(queries), self.norm(text))

    def embed(
        self, words: Int[Tensor, "batch words"], first: int | None = None
    ) -> Float[Tensor, "batch text dim"]:
        """Embeddings with positions of a special token (default: the class token) and the words behind it.

        Raises:
            ValueError: for too long a text or an id out of range.
        """
        if words.shape[1] > self.max_words:
            raise ValueError(f"words must be at most {self.max_words} to a text, got {words.shape[1]}")
        if words.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in words.aminmax())
            if low < 0 or high >= self.vocabulary_size:
                raise ValueError(
                    f"words must be ids in 0 .. {self.vocabulary_size - 1}, got {low if low < 0 else high}"
                )
        ids = F.pad(words, (1, 0), value=self.class_id if first is None else first)
        return self.embedding(ids) + self.positions.weight[: ids.shape[1]]

    def word_logits(self, text: Float[Tensor, "batch text dim"]) -> Float[Tensor, "batch text vocabulary"]:
        """Logits over words and special tokens, by the embedding's own table."""
        return text @ self.embedding.weight.T

    def text_valid(self, words: Int[Tensor, "batch words"]) -> Bool[Tensor, "batch text"]:
        """True for the special token in front and for words that are no padding: which rows of `read_text` and `embed` count."""
        valid = (
            torch.ones_like(words, dtype=torch.bool) if self.padding_id is None else words != self.padding_id
        )
        return F.pad(valid, (1, 0), value=True)

    def _queries(self, memory: Tensor) -> Tensor:
        return self.queries.to(memory.dtype).expand(len(memory), -1, -1)

    def _draw_weights(self) -> None:
        """Variance 1 / inputs; the last layer of each added branch is divided by the root of their number, as in `coloss.nn.Transformer`."""
        nn.init.normal_(self.queries, std=self.dim**-0.5)
        nn.init.normal_(self.embedding.weight, std=self.dim**-0.5)
        nn.init.normal_(self.positions.weight, std=0.1 * self.dim**-0.5)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_branch = name.endswith(("output", "network.3"))
                branches = 3 * len(self.layers) if ends_branch else 1
                nn.init.trunc_normal_(module.weight, std=(module.in_features * branches) ** -0.5)
                nn.init.zeros_(module.bias)
