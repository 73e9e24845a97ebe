"""Puts a layer's output neurons in another order without changing what the network computes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor, nn

from coloss.compression.cost import CONVOLUTIONS
from coloss.errors import InputError


def permute_neurons(
    layer: nn.Module,
    next_layer: nn.Module,
    perm: Integer[Tensor, "neurons"],
    between: Sequence[nn.Module] = (),
) -> None:
    """Reorder a layer's output neurons in place, and what reads them, so that the two compute what they did.

    Args:
        layer: linear layer or convolution without channel groups; output i is what output `perm[i]` was.
        next_layer: linear layer or convolution without channel groups that reads the layer's outputs and nothing else; a linear layer behind
            a convolution's flattened map has its columns moved in blocks of positions. Behind a linear layer there are no such blocks: it must
            have as many columns as that has outputs.
        perm: a permutation of the outputs.
        between: the modules on the way. Those with weights for each channel are reordered too: batch, layer, instance and RMS norms,
            `GroupNorm` of one group, `PReLU`, depthwise convolutions. Others must treat all channels alike.

    Raises:
        InputError: if `perm` is no permutation of the outputs, the layers do not fit, or something between has weights that cannot follow or
            mixes channels by their place. Nothing is changed then.

    Examples:
        >>> first, norm, second = nn.Linear(2, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 1)
        >>> x = torch.ones(4, 2)
        >>> before = second(norm(first(x)))
        >>> permute_neurons(first, second, torch.tensor([2, 0, 1]), between=[norm])
        >>> torch.allclose(second(norm(first(x))), before)
        True
    """
    for name, part in (("layer", layer), ("next_layer", next_layer)):
        if not isinstance(part, (nn.Linear, *CONVOLUTIONS)):
            raise InputError(f"{name} must be a linear layer or a convolution, got {type(part).__name__}")
        if getattr(part, "groups", 1) != 1:
            raise InputError(f"{name} must have groups=1, got {part.groups}")
    weight: Any = layer.weight
    following: Any = next_layer.weight
    rows = len(weight)
    perm = perm.to(weight.device)
    if not torch.equal(perm.sort().values, torch.arange(rows, device=perm.device)):
        raise InputError(f"perm must hold each of 0..{rows - 1} once, got {len(perm)} entries that do not")
    columns = following.shape[1]
    flattened = isinstance(layer, CONVOLUTIONS) and isinstance(next_layer, nn.Linear) and not columns % rows
    if columns != rows and not flattened:
        raise InputError(f"next_layer must read the {rows} outputs of layer, got {columns} inputs")
    moves = [found for part in between for found in _moves(part, rows)]
    with torch.no_grad():
        for tensor in (weight, layer.bias, *moves):
            if isinstance(tensor, Tensor):
                tensor.copy_(tensor[perm])
        blocks = following.reshape(len(following), rows, -1)
        following.copy_(blocks[:, perm].reshape(following.shape))


_BY_PLACE = (nn.GLU, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.LocalResponseNorm, nn.Unfold)


def _moves(part: nn.Module, rows: int) -> list[Tensor]:
    """The tensors of a module between two layers that have one entry for each of the first one's outputs."""
    own = [t for t in (*part.parameters(recurse=False), *part.buffers(recurse=False)) if t.ndim]
    grouped = isinstance(part, nn.GroupNorm) and part.num_groups not in (1, rows)
    depthwise = (
        isinstance(part, CONVOLUTIONS) and part.groups == part.in_channels == part.out_channels == rows
    )
    plain = not isinstance(part, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or depthwise
    shared = isinstance(part, nn.PReLU) and part.num_parameters == 1
    fits = all(t.shape[0] == rows and (t.ndim == 1 or depthwise) for t in own)
    if grouped or isinstance(part, _BY_PLACE) or not plain or not (fits or shared):
        raise InputError(
            f"between must hold modules whose channels can be reordered, got {type(part).__name__}"
        )
    return [] if shared else own + [t for child in part.children() for t in _moves(child, rows)]
