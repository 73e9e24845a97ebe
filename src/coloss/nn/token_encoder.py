"""A transformer encoder for anything that a tokenizer turns into tokens, whole or partly hidden."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn.tokenizers import Tokenizer
from coloss.nn.transformer import Transformer


class TokenEncoder(nn.Module):
    """A pre-norm transformer over the tokens of an image, a signal, a table row or a text.

    `forward` gives one vector per sample (or all tokens, with `pool="none"`). `encode` gives one vector per
    token, and `forward_tokens` encodes only the tokens that a mask keeps, at the cost of those alone. Learned
    tokens that stand for no part of the input (`registers`, and the class token of `pool="cls"`) are put in
    front inside and taken away again, so that token `j` of a result is always token `j` of the input;
    `with_prefix=True` leaves them there.

    Args:
        tokenizer: turns a batch into tokens of size `dim` (`ImagePatches`, `SignalPatches`, `TableColumns`,
            `Words`, or another `Tokenizer`).
        dim: size of a token.
        depth: number of transformer blocks.
        heads: number of attention heads; divides `dim`.
        causal: let each token see itself and earlier ones only (registers are earlier than all).
        registers: number of extra learned tokens, a place for what belongs to the whole sample.
        pool: `"mean"` over a sample's tokens without padding and registers (zero for a sample of padding
            alone), `"cls"` for an extra learned token, or `"none"` for all tokens.
        mlp_ratio: width of each block's two-layer network in multiples of `dim`.
        dropout: probability in [0, 1) inside the blocks.

    Attributes:
        tokenizer: the module that was given.
        transformer: the `Transformer`.
        num_prefix: number of learned tokens in front.
        out_features: `dim`.

    Returns:
        From `forward`: (batch, dim), or (batch, tokens, dim) with `pool="none"`.

    Raises:
        ValueError: for sizes that do not fit one another, an unknown `pool`, or `"cls"` in a causal encoder.

    Cost:
        Attention takes O(batch * depth * tokens^2 * dim) for the tokens that are kept.

    Source: Dosovitskiy et al. 2021, arXiv 2010.11929 (class token); Darcet et al. 2024, arXiv 2309.16588
        (registers).

    Examples:
        >>> import torch
        >>> from coloss.nn import ImagePatches, TokenEncoder
        >>> encoder = TokenEncoder(ImagePatches(8, 2, 1, dim=32), dim=32, depth=2, heads=4, registers=1)
        >>> images = torch.rand(5, 1, 8, 8)
        >>> encoder(images).shape, encoder.encode(images).shape
        (torch.Size([5, 32]), torch.Size([5, 16, 32]))
        >>> keep = torch.tensor([0, 3, 9])
        >>> encoder.forward_tokens(encoder.tokenizer(images), keep).shape
        torch.Size([5, 3, 32])
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dim: int,
        depth: int,
        heads: int,
        *,
        causal: bool = False,
        registers: int = 0,
        pool: Literal["mean", "cls", "none"] = "mean",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if tokenizer.dim != dim:
            raise ValueError(f"dim must equal the tokenizer's, {tokenizer.dim}, got {dim}")
        if registers < 0:
            raise ValueError(f"registers must be >= 0, got {registers}")
        if pool not in ("mean", "cls", "none"):
            raise ValueError(f'pool must be "mean", "cls" or "none", got {pool!r}')
        if causal and pool == "cls":
            raise ValueError(
                'pool must be "mean" or "none" when causal: a class token in front sees no input'
            )
        self.tokenizer = tokenizer
        self.num_prefix = registers + (pool == "cls")
        self.prefix = None
        if self.num_prefix:
            self.prefix = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.num_prefix, dim), std=0.02))
        self.transformer = Transformer(dim, depth, heads, mlp_ratio=mlp_ratio, dropout=dropout)
        self.causal = causal
        self.pool = pool
        self.out_features = dim

    def forward_tokens(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        keep: Int[Tensor, "#batch kept"] | Int[Tensor, " kept"] | None = None,
        *,
        padding: Bool[Tensor, "batch tokens"] | None = None,
        valid: Bool[Tensor, "#batch kept"] | None = None,
        with_prefix: bool = False,
    ) -> Float[Tensor, "batch encoded dim"]:
        """Encodes the tokens that `keep` names, as if the others did not exist.

        Args:
            tokens: the output of a tokenizer, positions included.
            keep: indices of the tokens to encode, for each sample or one row for all; `None` for all tokens.
            padding: True for tokens that nothing may attend to.
            valid: False for entries of `keep` that only fill up a shorter row; any index may stand there.
            with_prefix: also return the `num_prefix` learned tokens, in front.

        Returns:
            One vector for each kept token, in the order of `keep`. Those of padding and of invalid entries
            are finite and mean nothing.

        Examples:
            >>> import torch
            >>> from coloss.nn import SignalPatches, TokenEncoder
            >>> encoder = TokenEncoder(SignalPatches(40, 4, 1, dim=8), 8, depth=1, heads=2)
            >>> tokens = encoder.tokenizer(torch.rand(2, 1, 40))
            >>> encoder.forward_tokens(tokens, torch.tensor([[7, 2], [0, 1]])).shape
            torch.Size([2, 2, 8])
        """
        batch = tokens.shape[0]
        order = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if keep is not None:
            order = keep.expand(batch, -1)
            tokens = tokens.take_along_dim(order[:, :, None], dim=1)
            padding = None if padding is None else padding.take_along_dim(order, dim=1)
        if valid is not None:
            if keep is None:
                raise ValueError("valid must come with keep, got keep=None")
            padding = ~valid if padding is None else padding | ~valid
        if padding is not None:
            padding = padding.expand(batch, -1)
        ordered = self.causal and (keep is not None or padding is not None)
        if self.prefix is not None:
            tokens = torch.cat([self.prefix.expand(batch, -1, -1), tokens], dim=1)
        encoded = self.transformer(
            tokens,
            self._allowed(order if ordered else None, padding),
            causal=self.causal and not ordered,
        )
        return encoded if with_prefix else encoded[:, self.num_prefix :]

    def encode(self, inputs: Any, *, with_prefix: bool = False) -> Float[Tensor, "batch encoded dim"]:
        """One vector for each token of the inputs; with the `num_prefix` learned tokens in front on request.

        Examples:
            >>> import torch
            >>> from coloss.nn import TokenEncoder, Words
            >>> encoder = TokenEncoder(Words(50, 8, max_length=20), 8, depth=1, heads=2, registers=3)
            >>> encoder.encode(torch.tensor([[4, 9, 0]]), with_prefix=True).shape
            torch.Size([1, 6, 8])
        """
        padding = self.tokenizer.padding(inputs)
        return self.forward_tokens(self.tokenizer(inputs), padding=padding, with_prefix=with_prefix)

    def forward(self, inputs: Any) -> Float[Tensor, "batch *tokens dim"]:
        encoded = self.encode(inputs, with_prefix=self.pool == "cls")
        if self.pool == "none":
            return encoded
        if self.pool == "cls":
            return encoded[:, 0]
        padding = self.tokenizer.padding(inputs)
        if padding is None:
            return encoded.sum(1) / max(encoded.shape[1], 1)
        total = encoded.masked_fill(padding[:, :, None], 0).sum(1)
        return total / (~padding).sum(1, keepdim=True).clamp(min=1)

    def _allowed(
        self, order: Int[Tensor, "#batch tokens"] | None, padding: Bool[Tensor, "batch tokens"] | None
    ) -> Bool[Tensor, "#batch 1 queries keys"] | None:
        """Which key each query may attend to; every query keeps at least one, so that no softmax is empty."""
        if padding is None and order is None:
            return None
        visible = None if padding is None else nn.functional.pad(~padding, (self.num_prefix, 0), value=True)
        if visible is not None and order is None:
            return (visible | ~visible.any(1, keepdim=True))[:, None, None, :]
        assert order is not None
        prefix = torch.arange(-self.num_prefix, 0, device=order.device).expand(len(order), -1)
        order = torch.cat([prefix, order], dim=1)
        allowed = order[:, :, None] >= order[:, None, :]
        if visible is not None:
            allowed = allowed & visible[:, None, :]
        itself = torch.eye(order.shape[1], dtype=torch.bool, device=order.device)
        return (allowed | itself)[:, None]
