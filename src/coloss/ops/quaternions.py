"""Rotations in space as unit quaternions (x, y, z, w): products, inverses, and one sign for the two that mean the same."""

import torch
from jaxtyping import Float
from torch import Tensor

from .precision import full_precision


def quaternion_product(
    first: Float[Tensor, "*#batch 4"], second: Float[Tensor, "*#batch 4"]
) -> Float[Tensor, "*batch 4"]:
    """The rotation that does `second` first, then `first`: R(p q) = R(p) R(q).

        (p q)_w = p_w q_w - p_v . q_v,    (p q)_v = p_w q_v + q_w p_v + p_v x q_v       with v = (x, y, z)

    Args:
        first: p, as (x, y, z, w) like scipy's `Rotation`; leading dimensions broadcast.
        second: q.

    Returns:
        The Hamilton product, at least float32; of unit length if both factors are.

    Examples:
        >>> quarter_about_z = torch.tensor([0.0, 0.0, 0.5**0.5, 0.5**0.5])
        >>> quaternion_product(quarter_about_z, quarter_about_z).round(decimals=4).abs()
        tensor([0., 0., 1., 0.])
    """
    first, second = full_precision(first), full_precision(second)
    p, p_w, q, q_w = first[..., :3], first[..., 3:], second[..., :3], second[..., 3:]
    p, q = torch.broadcast_tensors(p, q)
    vector = p_w * q + q_w * p + torch.linalg.cross(p, q)
    return torch.cat([vector, p_w * q_w - (p * q).sum(-1, keepdim=True)], dim=-1)


def quaternion_inverse(quaternions: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """The rotation back: the conjugate (-x, -y, -z, w) of a unit quaternion.

    Args:
        quaternions: (x, y, z, w) of unit length.

    Examples:
        >>> quaternion_inverse(torch.tensor([0.6, 0.0, 0.0, 0.8]))
        tensor([-0.6000, -0.0000, -0.0000,  0.8000])
    """
    return quaternions * quaternions.new_tensor([-1.0, -1.0, -1.0, 1.0])


def canonical_quaternion(quaternions: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Unit quaternions with one sign for each rotation, so that a regressor can learn them.

    q and -q are the same rotation. The one with w > 0 is taken; where w is 0, with x > 0, then y > 0, then z > 0. Rotations by nearly half a
    turn still jump from one sign to the other: no choice of sign is continuous everywhere.

    Args:
        quaternions: (x, y, z, w) of any length; four zeros, which are no rotation, become the identity (0, 0, 0, 1).

    Returns:
        In the same shape, at least float32.

    Examples:
        >>> canonical_quaternion(torch.tensor([[0.0, 0.0, -0.6, -0.8], [0.0, -2.0, 0.0, 0.0]]))
        tensor([[0.0000, 0.0000, 0.6000, 0.8000],
                [0.0000, 1.0000, 0.0000, 0.0000]])
    """
    values = full_precision(quaternions)
    # Scaled by the largest entry first: squares of very small or large entries leave the range.
    values = values / torch.where((largest := values.abs().amax(-1, keepdim=True)) > 0, largest, 1)
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    identity = values.new_tensor([0.0, 0.0, 0.0, 1.0])
    unit = torch.where(length > 0, values / torch.where(length > 0, length, 1), identity)
    # 8 outweighs 4 + 2 + 1, so the first entry that is not 0 decides.
    rank = unit.new_tensor([4.0, 2.0, 1.0, 8.0])
    sign = (unit.sign() * rank).sum(-1, keepdim=True).sign()
    return unit * sign + 0.0  # no negative zeros


def euler_to_quaternion(angles: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 4"]:
    """The quaternion of turns about the fixed x axis, then the fixed y axis, then the fixed z axis ("xyz" of scipy's `Rotation`).

    Args:
        angles: in radians.

    Returns:
        Canonical quaternions (x, y, z, w), at least float32.

    Examples:
        >>> euler_to_quaternion(torch.tensor([torch.pi / 2, 0.0, 0.0]))
        tensor([0.7071, 0.0000, 0.0000, 0.7071])
    """
    halves = full_precision(angles) / 2
    axes = torch.eye(3, dtype=halves.dtype, device=halves.device)
    turns = torch.cat([halves.sin()[..., None] * axes, halves.cos()[..., None]], dim=-1)
    about_x, about_y, about_z = turns.unbind(-2)
    return canonical_quaternion(quaternion_product(about_z, quaternion_product(about_y, about_x)))
