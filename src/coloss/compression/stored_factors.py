"""Weights of low rank stored by their factors."""

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.compression.stored_weights import LowRankWeight
from coloss.ops import accumulation_dtype, matricize, truncated_svd
from coloss.ops.spectral import Scheme


def store_low_rank(
    weight: Float[Tensor, "outputs inputs *kernel"], rank: int, scheme: Scheme = "channel"
) -> LowRankWeight:
    """A weight as the two factors of its closest approximation of a rank, to be given to `compress_model`.

    Args:
        weight: of a linear layer or an ungrouped convolution, in float32 or float64: rounded to half precision a weight has full rank.
        rank: of the factors; of each filter's, for "decoupled".
        scheme: how the weight is laid out as a matrix, see `matricize`.

    Returns:
        Factors on the CPU, of the weight's type. Restored they give the weight up to rounding if its rank is not higher.

    Cost:
        One SVD in float64 (float32 on a device without it).

    Raises:
        ValueError: for a weight in half precision, a rank out of range, or a scheme that does not fit the weight.

    Examples:
        >>> weight = torch.ones(8, 6)
        >>> stored = store_low_rank(weight, rank=1)
        >>> stored.nbytes, torch.allclose(stored.restore(), weight)
        (56, True)
    """
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weight must be float32 or float64, got {weight.dtype}")
    # In float32 the error grows with the largest singular value, past what `compress_model` allows in a weight of a thousand columns.
    wide = weight.detach().to(accumulation_dtype(weight.device))
    svd = truncated_svd(matricize(wide, scheme)[0], rank=rank)
    left, right = (
        factor.to(weight.dtype).cpu().contiguous() for factor in (svd.U * svd.S.unsqueeze(-2), svd.Vh)
    )
    return LowRankWeight(left, right, scheme, tuple(weight.shape))
