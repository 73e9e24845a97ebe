"""Predicts latent vectors of hidden tokens from the encoded visible ones and the positions of both."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn.positions import PositionKind, PositionTable
from coloss.nn.transformer import Transformer


class MaskTokenPredictor(nn.Module):
    """A narrow transformer over encoded visible tokens and one mask token for each position to predict.

    With z_i the encoded token at position i, e the position vectors and m the learned mask token, all of size `width`:

        sequence    = [ W_in z_i + e_i  for visible i,   m + e_j  for hidden j ]
        prediction  = output(norm(blocks(sequence)))  at the hidden j

    It is a function of sets: the order of visible tokens does not matter, and predictions come in the order of the hidden ones.

    Args:
        dim: size of an encoded token.
        grid: tokens along each axis, as a tokenizer's `grid`.
        width: size of a token inside.
        depth: number of transformer blocks.
        heads: number of attention heads; divides `width`.
        positions: `"sinusoidal"` (fixed; `width` must be a multiple of twice the number of axes), `"learned"`, or `None`, with which
            all hidden tokens get one prediction.
        mlp_ratio: width of each block's two-layer network in multiples of `width`.
        dropout: probability in [0, 1) inside the blocks.
        output: the map from `width` to a prediction; None for a linear layer to `dim`.

    Attributes:
        output: that map; any module in its place must take (..., width).
        mask_token: (width,).

    Raises:
        ValueError: for sizes that do not fit one another.

    Cost:
        O(batch * depth * (visible + hidden)^2 * width).

    Source:
        Assran et al., 2023 (I-JEPA), arXiv 2301.08243, section 3.

    Examples:
        >>> import torch
        >>> predictor = MaskTokenPredictor(32, grid=(4, 4), width=16, depth=1, heads=2)
        >>> context, seen, hidden = torch.rand(5, 3, 32), torch.tensor([[0, 1, 6]]), torch.tensor([[2, 3]])
        >>> predictor(context, seen.expand(5, -1), hidden.expand(5, -1)).shape
        torch.Size([5, 2, 32])
    """

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        *,
        width: int,
        depth: int,
        heads: int,
        positions: PositionKind = "sinusoidal",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        output: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        self.input = _linear(dim, width)
        self.positions = PositionTable(grid, width, positions)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.transformer = Transformer(width, depth, heads, mlp_ratio=mlp_ratio, dropout=dropout)
        self.output = _linear(width, dim) if output is None else output

    def forward(
        self,
        context: Float[Tensor, "batch visible dim"],
        context_indices: Int[Tensor, "batch visible"],
        target_indices: Int[Tensor, "batch hidden"],
        *,
        context_valid: Bool[Tensor, "batch visible"] | None = None,
        target_valid: Bool[Tensor, "batch hidden"] | None = None,
    ) -> Float[Tensor, "batch hidden out"]:
        """Predictions for the hidden tokens.

        Args:
            context: encoded visible tokens.
            context_indices: their positions.
            target_indices: positions to predict.
            context_valid: False for entries that only fill up a row: nothing attends to them.
            target_valid: likewise; the predictions there are finite and mean nothing.
        """
        visible = self.input(context) + self._positions(context_indices)
        hidden = self.mask_token + self._positions(target_indices)
        sequence = torch.cat([visible, hidden.to(visible)], dim=1)
        transformed = self.transformer(
            sequence, _allowed(context_indices, target_indices, context_valid, target_valid)
        )
        return self.output(transformed[:, context.shape[1] :])

    def _positions(self, indices: Int[Tensor, "batch chosen"]) -> Float[Tensor, "batch chosen width"]:
        if self.positions.table is None:
            return self.mask_token.new_zeros(*indices.shape, self.mask_token.shape[0])
        return self.positions.table[indices]


def _allowed(
    context_indices: Tensor, target_indices: Tensor, context_valid: Tensor | None, target_valid: Tensor | None
) -> Tensor | None:
    """Keys that may be attended to; all, in a row that has none, so that no softmax is empty."""
    if context_valid is None and target_valid is None:
        return None
    parts = ((context_indices, context_valid), (target_indices, target_valid))
    keys = torch.cat(
        [torch.ones_like(indices, dtype=torch.bool) if valid is None else valid for indices, valid in parts],
        1,
    )
    return (keys | ~keys.any(1, keepdim=True))[:, None, None, :]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer
