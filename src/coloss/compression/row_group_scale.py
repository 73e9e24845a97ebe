"""Learned scales of a layer's weights, a few for each output: they give back size that a decay took, and fold away."""

from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from jaxtyping import Float
from torch import Tensor, nn

from coloss.compression.cost import CONVOLUTIONS
from coloss.errors import InputError


class RowGroupScale(nn.Module):
    """One factor for each row and each block of neighbouring inputs, learned as a parametrization of the layer's weight.

    weight[r, c] = scale[r, floor(c * groups / inputs)] * original[r, c], for convolutions at every place of the kernel. All weights of a
    row and block share the factor, so the order of |weight| within a block stays as it is, and zeros stay zero.

    Args:
        layer: linear layer or convolution; the parametrization is put on its `weight` at once.
        groups: blocks of inputs, >= 1.
        multiple: blocks begin at multiples of it, as near to equal as that allows; m keeps each group of m inputs in one block.

    Attributes:
        scale: (outputs, groups) factors, 1 at the start; float32 even where the layer is turned to half precision. An ordinary parameter,
            for the optimizer of the rest.

    Raises:
        InputError: for another kind of layer, one that has such scales already, groups < 1, or fewer multiples than groups.

    Cost: one multiplication for each weight and forward pass; nothing after `fold_`.

    Source: Huang et al. 2025, arXiv 2509.25996; which inputs make a block is a reading of "n contiguous column blocks".

    Examples:
        >>> layer = nn.Linear(8, 3)
        >>> before = layer.weight.detach().clone()
        >>> scale = RowGroupScale(layer, groups=2)
        >>> with torch.no_grad():
        ...     scale.scale[:, 1] = 2.0
        >>> RowGroupScale.fold_(layer)
        Linear(in_features=8, out_features=3, bias=True)
        >>> (
        ...     torch.equal(layer.weight[:, :4], before[:, :4]),
        ...     torch.equal(layer.weight[:, 4:], 2 * before[:, 4:]),
        ... )
        (True, True)
    """

    scale: nn.Parameter
    block: Tensor

    def __init__(self, layer: nn.Module, groups: int = 2, *, multiple: int = 1):
        super().__init__()
        if not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            raise InputError(f"layer must be a linear layer or a convolution, got {type(layer).__name__}")
        if parametrize.is_parametrized(layer, "weight") and any(
            isinstance(part, RowGroupScale)
            for part in layer.parametrizations["weight"]  # type: ignore[union-attr, index, operator]
        ):
            raise InputError("layer must not have scales already: fold them first")
        weight = layer.weight
        rows, inputs = weight.shape[:2]
        units = inputs // multiple
        if not 1 <= groups <= units:
            raise InputError(
                f"groups must be in [1, {units}] for {inputs} inputs in blocks of multiples of {multiple}, got {groups}"
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.scale = nn.Parameter(torch.ones(rows, groups, dtype=wide, device=weight.device))
        unit = (torch.arange(inputs, device=weight.device) // multiple).clamp(max=units - 1)
        # Small, and not part of the state: it follows from the layer.
        self.register_buffer("block", unit * groups // units, persistent=False)
        parametrize.register_parametrization(layer, "weight", self)

    def forward(self, weight: Float[Tensor, "rows inputs *kernel"]) -> Float[Tensor, "rows inputs *kernel"]:
        factors = self.scale[:, self.block].reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        return (weight * factors).to(weight.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "RowGroupScale":
        super()._apply(fn, recurse)
        if self.scale.dtype in (torch.float16, torch.bfloat16):
            # Small steps from 1 are lost in half precision.
            self.scale.data = self.scale.data.float()
        return self

    @staticmethod
    def fold_(layer: nn.Module) -> nn.Module:
        """Multiply the scales into the weight and leave a plain layer, whose outputs are what they were; other parametrizations of the weight
        are folded with them.

        Raises:
            InputError: if the weight has no parametrization.
        """
        if not parametrize.is_parametrized(layer, "weight"):
            raise InputError(f"layer must have scales to fold, got a plain {type(layer).__name__}")
        return parametrize.remove_parametrizations(layer, "weight")
