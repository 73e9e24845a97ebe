"""A weight that acts pruned while all of it goes on training: the parametrization behind straight-through estimators."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.ops import straight_through


class MaskedWeight(nn.Module):
    """A parametrization that lets a weight act with zeros in some places.

    Args:
        mask: True where a weight stays; may be written to between steps.
        passes: give the whole gradient to the weight, to masked places too (straight-through); False stops it there.

    Examples:
        >>> import torch
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from coloss.ops import nm_mask
        >>> layer = nn.Linear(4, 2)
        >>> part = MaskedWeight(nm_mask(layer.weight), passes=True)
        >>> _ = register_parametrization(layer, "weight", part)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> int((layer.weight != 0).sum()), layer.parametrizations.weight.original.grad.unique().tolist()
        (4, [1.0])
    """

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "*shape"], *, passes: bool):
        super().__init__()
        self.passes = passes
        self.register_buffer("mask", mask)

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        masked = weight.masked_fill(~self.mask, 0.0)
        return straight_through(masked, weight) if self.passes else masked
