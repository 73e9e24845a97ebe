"""Names of tokens: as indices, as boolean masks, and as indices padded to one length with a mask of what counts."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def gather_tokens(
    tokens: Float[Tensor, "*#sets tokens dim"], indices: Int[Tensor, "*#sets kept"]
) -> Float[Tensor, "*sets kept dim"]:
    """The named tokens of each sample, in the order of the indices.

    Leading dimensions broadcast: tokens (batch, tokens, dim) and indices (sets, batch, kept) give (sets, batch, kept, dim).

    Args:
        tokens: one vector for each token.
        indices: in [0, tokens); an index may come more than once.

    Returns:
        The chosen vectors; gradients of an index that comes twice add up.

    Raises:
        ValueError: for an index out of range; on a GPU, where looking would make the program wait, torch's device assertion.

    Examples:
        >>> tokens = torch.arange(6.0).reshape(1, 3, 2)
        >>> gather_tokens(tokens, torch.tensor([[[2, 0]], [[1, 1]]])).tolist()
        [[[[4.0, 5.0], [0.0, 1.0]]], [[[2.0, 3.0], [2.0, 3.0]]]]
    """
    # Torch does not look when it gathers whole rows on the CPU.
    if indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= tokens.shape[-2]:
            raise ValueError(f"indices must be in [0, {tokens.shape[-2]}), got {low if low < 0 else high}")
    leading = torch.broadcast_shapes(tokens.shape[:-2], indices.shape[:-1])
    tokens = tokens.expand(*leading, *tokens.shape[-2:])
    return tokens.take_along_dim(indices.expand(*leading, -1)[..., None], dim=-2)


def indices_to_mask(
    indices: Int[Tensor, "*sets kept"],
    num_tokens: int,
    valid: Bool[Tensor, "*sets kept"] | None = None,
) -> Bool[Tensor, "*sets tokens"]:
    """True for each token that an index names.

    Args:
        indices: in [0, num_tokens), in any order, repeated or not.
        num_tokens: length of the mask, >= 0.
        valid: False for entries that do not count; None where all do.

    Returns:
        Boolean mask.

    Raises:
        ValueError: if num_tokens < 0.
        RuntimeError: from torch, for an index out of range.

    Examples:
        >>> indices_to_mask(torch.tensor([3, 1, 0]), 5, torch.tensor([True, True, False]))
        tensor([False,  True, False,  True, False])
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be >= 0, got {num_tokens}")
    counts = indices.new_zeros(*indices.shape[:-1], num_tokens)
    counted = torch.ones_like(indices) if valid is None else valid.to(indices.dtype)
    return counts.scatter_add_(-1, indices, counted) > 0


def mask_to_padded_indices(
    mask: Bool[Tensor, "*sets tokens"], size: int | None = None
) -> tuple[Int[Tensor, "*sets kept"], Bool[Tensor, "*sets kept"]]:
    """Indices of the true entries of each row in rising order, all rows filled up to one length.

    Args:
        mask: True for the tokens to name.
        size: that length; None takes the largest count. Of a row with more true entries the first `size` remain.

    Returns:
        Indices, 0 where a row is filled up, and `valid`, False there. The pair goes as `keep` and `valid` into
        `coloss.nn.TokenEncoder.forward_tokens`.

    Raises:
        ValueError: if size < 0.

    Cost:
        A sort of each row; without `size` the program waits for the device to learn the largest count.

    Examples:
        >>> mask_to_padded_indices(torch.tensor([[False, True, True], [True, False, False]]))
        (tensor([[1, 2],
                [0, 0]]), tensor([[ True,  True],
                [ True, False]]))
    """
    if size is not None and size < 0:
        raise ValueError(f"size must be >= 0, got {size}")
    counts = mask.sum(-1, keepdim=True)
    if size is None:
        size = int(counts.max()) if counts.numel() else 0
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    order = torch.nn.functional.pad(order, (0, max(size - order.shape[-1], 0)))[..., :size]
    valid = torch.arange(size, device=mask.device) < counts
    return order.masked_fill(~valid, 0), valid
