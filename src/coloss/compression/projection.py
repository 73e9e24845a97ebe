"""Weights cut to low rank, and what a gradient or a momentum means beside one."""

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.ops import TruncatedSVD, matricize, truncated_svd, without_autocast
from coloss.ops.spectral import Scheme


def low_rank_matrix(svd: TruncatedSVD) -> Float[Tensor, "*batch rows columns"]:
    """The matrix that a truncated singular value decomposition stands for, `U diag(S) Vh`.

    Examples:
        >>> low_rank_matrix(truncated_svd(torch.diag(torch.tensor([3.0, 1.0])), rank=1)).abs().tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    with without_autocast(svd.U.device):
        return (svd.U * svd.S.unsqueeze(-2)) @ svd.Vh


def low_rank_weight(
    weight: Float[Tensor, "outputs inputs *kernel"],
    scheme: Scheme = "channel",
    *,
    energy: float | None = None,
    rank: int | None = None,
    threshold: float | None = None,
) -> Float[Tensor, "outputs inputs *kernel"]:
    """The closest weight of low rank: one projection of the method, for a training loop of your own.

    Args:
        weight: of a linear layer or an ungrouped convolution.
        scheme: how it is laid out as a matrix, see `matricize`.
        energy, rank, threshold: exactly one, as in `truncated_svd`.

    Returns:
        A new tensor without gradients, at least float32.

    Raises:
        ValueError: for a scheme that does not fit the weight, or a criterion out of range.

    Examples:
        >>> torch.linalg.matrix_rank(low_rank_weight(torch.randn(8, 4, 3, 3), rank=2).flatten(1)).item()
        2
    """
    matrix, restore = matricize(weight.detach(), scheme)
    return restore(low_rank_matrix(truncated_svd(matrix, energy=energy, rank=rank, threshold=threshold)))


def nuclear_subgradient(svd: TruncatedSVD) -> Float[Tensor, "*batch rows columns"]:
    """Direction in which the nuclear norm of a truncated matrix grows fastest, `U_k V_k^T`.

    Singular values at rounding error count as zero, so that a zero matrix has a zero sub-gradient.

    Examples:
        >>> nuclear_subgradient(truncated_svd(torch.diag(torch.tensor([3.0, 1.0])), rank=1)).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    size = max(svd.U.shape[-2], svd.Vh.shape[-1])
    rounding = torch.finfo(svd.S.dtype).eps * size * svd.S.amax(-1, keepdim=True)
    return low_rank_matrix(svd._replace(S=(rounding < svd.S).to(svd.S.dtype)))


def tangent_component(
    matrix: Float[Tensor, "*batch rows columns"], svd: TruncatedSVD
) -> Float[Tensor, "*batch rows columns"]:
    """The part of a matrix along which a low-rank matrix can move without its rank rising, to first order.

    `M - (I - U U^T) M (I - V V^T)`, with the factors of the low-rank matrix. What is left out has neither its columns
    nor its rows in the spaces that were kept.

    Args:
        matrix: a momentum, or any direction.
        svd: of the low-rank matrix, of the same size.

    Examples:
        >>> svd = truncated_svd(torch.diag(torch.tensor([3.0, 1.0])), rank=1)
        >>> tangent_component(torch.ones(2, 2), svd).tolist()
        [[1.0, 1.0], [1.0, 0.0]]
    """
    kept = (svd.S > 0).to(svd.S.dtype)
    U, Vh = svd.U * kept.unsqueeze(-2), svd.Vh * kept.unsqueeze(-1)
    matrix = matrix.to(svd.S.dtype)
    with without_autocast(matrix.device):
        normal = matrix - U @ (U.mT @ matrix)
        return matrix - (normal - (normal @ Vh.mT) @ Vh)
