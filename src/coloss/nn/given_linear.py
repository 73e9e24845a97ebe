"""A linear layer around weights that exist already."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


@torch.no_grad()
def linear_layer(
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """`nn.Linear` with copies of given weights; nothing is initialised, so no random number is drawn.

    Args:
        weight: one row for each output; there may be no row or no column.
        bias: one number for each output, or None for a layer without.
        dtype: of the layer; default: of the weight.

    Returns:
        A trainable layer on the device of the weight.

    Raises:
        ValueError: if the bias has another length than the weight has rows.

    Examples:
        >>> linear_layer(torch.eye(2), torch.ones(2))(torch.tensor([[1.0, 2.0]])).tolist()
        [[2.0, 3.0]]
    """
    if bias is not None and len(bias) != len(weight):
        raise ValueError(f"bias must have {len(weight)} entries, one for each row, got {len(bias)}")
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    dtype = weight.dtype if dtype is None else dtype
    layer.weight = nn.Parameter(weight.detach().to(dtype, copy=True))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.device, dtype, copy=True))
    return layer
