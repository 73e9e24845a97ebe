"""A small causal language model whose keys and values can be taken out, put in from outside, and kept in a cache."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn.harmonic_positions import Distance, harmonic_slopes, rotary_alibi_bias
from coloss.nn.key_value_cache import KeyValueCache as KeyValueCache
from coloss.nn.key_value_cache import KeyValues as KeyValues
from coloss.nn.rotary import rotary_angles, rotate
from coloss.nn.transformer import Attend, Transformer, TransformerBlock
from coloss.ops.precision import full_precision

Positions = Literal["rotary", "learned", "rotary-harmonic", "rotary-harmonic-log"]

_DISTANCES: dict[str, Distance] = {"rotary-harmonic": "linear", "rotary-harmonic-log": "harmonic"}


class CausalLanguageModel(nn.Module):
    """Predicts each next token from those before it: pre-norm transformer blocks between an embedding and an output layer.

    Args:
        vocabulary_size: number of token ids.
        dim: size of a token's vector.
        depth: number of transformer blocks, >= 1.
        heads: attention heads; divides `dim`.
        context: longest sequence; with rotary positions only a note to users.
        key_value_heads: heads of keys and values, which divides `heads` (grouped queries); None: as many as `heads`.
        positions: `"rotary"` turns queries and keys, `"learned"` adds a vector for each position to the tokens; `"rotary-harmonic"` and
            `"rotary-harmonic-log"` turn them too, and lower the logits with the distance to a key or its harmonic number, times 1 / h for
            head h (`coloss.nn.rotary_alibi_bias`).
        normalize_keys: RMS norms for each head's queries and keys, before they are turned.
        tied: the output layer is the embedding's table.
        mlp_ratio: width of each block's two-layer network in multiples of `dim`.
        dropout: probability in [0, 1) inside the blocks.
        causal_attention: stands in for plain causal attention of a whole text to itself, `(queries, keys, values) -> mixed`, such as
            `SampledBlockAttention`: of a text read at once, also into an empty cache. With padding, or tokens before it in a cache,
            attention stays what it is. `dropout` does not reach the weights of what stands in. Not with harmonic positions.

    Returns:
        From `forward(ids)`: logits (batch, tokens, vocabulary_size).

    Raises:
        ValueError: for sizes that do not fit one another; from `forward`, for more tokens than learned positions, or a `causal_attention`
            that a model with harmonic positions was given later.

    Source: Radford et al. 2019 (GPT-2); Su et al. 2021, arXiv 2104.09864 (rotary positions); Ainslie et al. 2023, arXiv 2305.13245 (grouped
        queries).

    Examples:
        >>> model = CausalLanguageModel(50, dim=16, depth=2, heads=4, key_value_heads=2)
        >>> ids = torch.randint(50, (3, 7))
        >>> layers, _ = model.key_values(ids)
        >>> model(ids).shape, layers[0].keys.shape
        (torch.Size([3, 7, 50]), torch.Size([3, 2, 7, 4]))
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        *,
        context: int = 256,
        key_value_heads: int | None = None,
        positions: Positions = "rotary",
        normalize_keys: bool = False,
        tied: bool = True,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        causal_attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary_size", vocabulary_size), ("depth", depth), ("context", context)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {positions!r}")
        if causal_attention is not None and positions in _DISTANCES:
            raise ValueError(f"causal_attention must be None with positions {positions!r}, got one")
        self.embedding = nn.Embedding(vocabulary_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.positions = None
        if positions == "learned":
            self.positions = nn.Embedding(context, dim)
            nn.init.normal_(self.positions.weight, std=0.1 * dim**-0.5)
        self.transformer = Transformer(
            dim, depth, heads, key_value_heads=key_value_heads, mlp_ratio=mlp_ratio, dropout=dropout
        )
        head_dim = dim // heads
        if positions != "learned" and head_dim % 2:
            raise ValueError(f"dim / heads must be even for rotary positions, got {dim} / {heads}")
        self.query_norms = self.key_norms = None
        if normalize_keys:
            self.query_norms = nn.ModuleList(nn.RMSNorm(head_dim) for _ in range(depth))
            self.key_norms = nn.ModuleList(nn.RMSNorm(head_dim) for _ in range(depth))
        self.output = None if tied else nn.Linear(dim, vocabulary_size, bias=False)
        self.context, self.dropout = context, dropout
        self.causal_attention = causal_attention
        self.distance: Distance | None = _DISTANCES.get(positions)
        slopes = None if self.distance is None else harmonic_slopes(heads)
        self.distance_slopes: Tensor | None
        self.register_buffer("distance_slopes", slopes, persistent=False)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.transformer.blocks)

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        *,
        cache: KeyValueCache | None = None,
        given: Sequence[KeyValues] | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch predicted vocabulary"]:
        """Next-token logits.

        Args:
            ids: of the tokens.
            valid: False for padding, which nothing attends to; positions count valid tokens only.
            cache: what came before, which the tokens attend to as well, and to which they are added.
            given: keys and values of each layer for these tokens, which take the place of the layer's own: a token attends to the given
                ones up to its own place. Not together with a cache.
            last_only: logits of the last token alone, (batch, 1, vocabulary); the last layer then computes keys and values of the others,
                and nothing else of them, unless `causal_attention` takes part, which needs all queries.

        Raises:
            ValueError: for another number of layers in `given`, `given` with a cache, or too many tokens for learned positions.
        """
        return self.logits(self.features(ids, valid, cache=cache, given=given, last_only=last_only))

    def logits(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens vocabulary"]:
        """Next-token logits of the last layer's vectors."""
        tokens = self.transformer.norm(tokens)
        return tokens @ self.embedding.weight.T if self.output is None else self.output(tokens)

    def features(
        self,
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        *,
        cache: KeyValueCache | None = None,
        given: Sequence[KeyValues] | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch predicted dim"]:
        """Vectors after the last layer, before the final norm; arguments as for `forward`."""
        if given is not None and (cache is not None or len(given) != self.depth):
            what = "a cache beside them" if cache is not None else f"{len(given)} of them"
            raise ValueError(
                f"given must hold keys and values for {self.depth} layers and no cache, got {what}"
            )
        positions, allowed, seen = self._places(ids, valid, cache)
        tokens = self._embed(ids, positions)
        if cache is not None:
            cache.valid = (
                seen  # not before the positions are found to fit: a refused call leaves the cache alone
            )
        for number, block in enumerate(self.transformer.blocks):
            attend = self._attention(
                number, positions, allowed, cache, None if given is None else given[number]
            )
            # What stands in for causal attention needs the queries of all tokens.
            if (
                last_only
                and number == self.depth - 1
                and (self.causal_attention is None or allowed is not None)
            ):
                return _last_token(block, tokens, attend)  # type: ignore[arg-type]
            tokens = block(tokens, attend=attend)
        return tokens[:, -1:] if last_only else tokens

    def key_values(
        self,
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        *,
        with_features: bool = False,
    ) -> tuple[list[KeyValues], Float[Tensor, "batch tokens dim"] | None]:
        """Keys and values of every layer, as the layers' weights give them, before norms and positions.

        Args:
            ids: of the tokens.
            valid: False for padding.
            with_features: whether the vectors after the last layer are wanted too, at the cost of its attention and network.

        Returns:
            Keys and values of each layer, and those vectors or None.
        """
        positions, allowed, _ = self._places(ids, valid, None)
        tokens = self._embed(ids, positions)
        found: list[KeyValues] = []
        for number, block in enumerate(self.transformer.blocks):
            if number == self.depth - 1 and not with_features:
                keys, values = block.attention.keys_and_values(block.attention_norm(tokens))  # type: ignore[union-attr, operator]
                return [*found, KeyValues(keys, values)], None
            attend = self._attention(number, positions, allowed, None, None)

            def keep(queries: Tensor, keys: Tensor, values: Tensor, attend: Attend = attend) -> Tensor:
                found.append(KeyValues(keys, values))
                return attend(queries, keys, values)

            tokens = block(tokens, attend=keep)
        return found, tokens

    def used_keys(
        self,
        layer: int,
        keys: Float[Tensor, "batch heads tokens dim"],
        positions: Int[Tensor, "#batch tokens"],
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Keys as attention uses them: normalised and turned by their positions."""
        return self._turn(self.normalized_keys(layer, keys), positions)

    def normalized_keys(
        self, layer: int, keys: Float[Tensor, "batch heads tokens dim"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Keys after the layer's norm of them, before they are turned; the keys themselves where there is no norm."""
        return keys if self.key_norms is None else self.key_norms[layer](keys)

    def fill(
        self,
        cache: KeyValueCache,
        key_values: Sequence[KeyValues],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> None:
        """Put keys and values into an empty cache, as if this model had read the tokens they stand for.

        Raises:
            ValueError: if the cache is not empty, or for another number of layers.
        """
        if len(cache) or len(key_values) != self.depth:
            what = f"{len(cache)} tokens in the cache" if len(cache) else f"{len(key_values)} layers"
            raise ValueError(f"an empty cache takes keys and values of {self.depth} layers, got {what}")
        batch, _, tokens, _ = key_values[0].keys.shape
        if valid is None:
            valid = key_values[0].keys.new_ones(batch, tokens, dtype=torch.bool)
        positions = _positions(valid)
        cache.valid = valid
        for layer, (keys, values) in enumerate(key_values):
            cache.update(layer, self.used_keys(layer, keys, positions), values)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "batch tokens"],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        cache: KeyValueCache | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch max_tokens"]:
        """Continue a prompt token by token; keys and values are kept from one to the next.

        Args:
            ids: the prompt, or with a cache what follows the tokens in it; at least one token.
            max_tokens: how many to write, >= 1.
            temperature: 0 takes the likeliest token, above 0 draws.
            cache: of the tokens before; it grows.
            generator: of the draws.

        Raises:
            ValueError: for an empty prompt, `max_tokens` < 1 or a temperature below 0.

        Examples:
            >>> CausalLanguageModel(10, dim=8, depth=1, heads=2).generate(torch.tensor([[1, 2]]), 3).shape
            torch.Size([1, 3])
        """
        if ids.shape[1] < 1:
            raise ValueError(f"ids must have at least one token, got shape {tuple(ids.shape)}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        cache = KeyValueCache() if cache is None else cache
        written: list[Tensor] = []
        while len(written) < max_tokens:
            logits = self(ids, cache=cache, last_only=True)[:, -1]
            if temperature == 0:
                ids = logits.argmax(1, keepdim=True)
            else:
                ids = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
            written.append(ids)
        return torch.cat(written, dim=1)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        tokens = self.embedding(ids)
        if self.positions is None:
            return tokens
        if positions.numel() and int(positions.max()) >= self.context:
            raise ValueError(
                f"ids must fit the context of {self.context} tokens, got position {int(positions.max())}"
            )
        return tokens + self.positions(positions)

    def _places(
        self, ids: Tensor, valid: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Positions of the tokens, what they may attend to or what is added to their logits (None: plain causal), and what is valid so far."""
        if self.distance is not None and self.causal_attention is not None:
            raise ValueError("causal_attention must be None with harmonic positions, got one")
        before = 0 if cache is None else len(cache)
        padded = valid is not None or (
            cache is not None and cache.valid is not None and not bool(cache.valid.all())
        )
        own = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        seen = own if cache is None or cache.valid is None else torch.cat([cache.valid, own], dim=1)
        total = seen.shape[1]
        if padded:
            all_positions = _positions(seen)
        else:
            all_positions = torch.arange(total, device=ids.device)[None]
            if self.distance is None and (not before or ids.shape[1] == 1):
                return all_positions[:, before:], None, seen
        positions = all_positions[:, before:]
        causal = torch.ones(ids.shape[1], total, dtype=torch.bool, device=ids.device).tril(before)
        # A token of padding attends to itself, or its softmax over nothing would be NaN.
        own_place = torch.eye(total, dtype=torch.bool, device=ids.device)[before:]
        allowed = (causal & (seen[:, None] | own_place))[:, None]
        if self.distance is not None and self.distance_slopes is not None:
            allowed = rotary_alibi_bias(
                positions, all_positions, self.distance_slopes, distance=self.distance, allowed=allowed
            )
        return positions, allowed, seen

    def _attention(
        self,
        layer: int,
        positions: Tensor,
        allowed: Tensor | None,
        cache: KeyValueCache | None,
        given: KeyValues | None,
    ) -> Attend:
        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if self.query_norms is not None:
                queries = self.query_norms[layer](queries)
            count = queries.shape[2]
            queries = self._turn(queries, positions[:, -count:])
            if given is not None:
                keys, values = given
            keys = self.used_keys(layer, keys, positions)
            if cache is not None:
                keys, values = cache.update(layer, keys, values)
            # torch aligns its causal mask to the first key: it fits only where every key has its query.
            causal = allowed is None and count == keys.shape[2]
            if causal and self.causal_attention is not None:
                return self.causal_attention(queries, keys, values)
            mask = None if allowed is None else allowed[:, :, -count:]
            if mask is not None and mask.is_floating_point():
                mask = mask.to(queries.dtype)
            return F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal,
                enable_gqa=keys.shape[1] != queries.shape[1],
            )

        return attend

    def _turn(self, vectors: Tensor, positions: Tensor) -> Tensor:
        if self.positions is not None:
            return vectors
        return rotate(vectors, rotary_angles(positions[:, None], vectors.shape[-1] // 2))


def _last_token(block: TransformerBlock, tokens: Tensor, attend: Attend) -> Tensor:
    """What the last layer makes of the last token, (batch, 1, dim); of the others only keys and values are needed."""
    normed = block.attention_norm(tokens)
    mixed = attend(block.attention.queries(normed[:, -1:]), *block.attention.keys_and_values(normed))
    attended = block.attention.output(mixed.transpose(1, 2).flatten(2))
    last = tokens[:, -1:] + block.attention_dropout(attended)
    return last + block.mlp(block.mlp_norm(last))


def _positions(valid: Tensor) -> Tensor:
    return (valid.cumsum(1) - 1).clamp(min=0)


def next_token_loss(
    logits: Float[Tensor, "batch tokens vocabulary"], targets: Int[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token in nats, over all tokens but those whose target is -100.

    Examples:
        >>> next_token_loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))  # log 4
        tensor(1.3863)
    """
    return F.cross_entropy(full_precision(logits).flatten(0, 1), targets.flatten())
