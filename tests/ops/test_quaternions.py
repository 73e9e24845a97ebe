"""Quaternions against scipy's rotations, and one sign for each rotation."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from coloss.ops import (
    canonical_quaternion,
    euler_to_quaternion,
    quaternion_inverse,
    quaternion_product,
)


def turns(count: int, seed: int) -> Rotation:
    return Rotation.random(count, random_state=np.random.RandomState(seed))


def of(rotations: Rotation) -> Tensor:
    return torch.from_numpy(rotations.as_quat())


def test_products_inverses_and_euler_angles_are_scipys() -> None:
    first, second = turns(20, 0), turns(20, 1)
    torch.testing.assert_close(
        canonical_quaternion(quaternion_product(of(first), of(second))),
        canonical_quaternion(of(first * second)),
    )
    torch.testing.assert_close(
        canonical_quaternion(quaternion_inverse(of(first))), canonical_quaternion(of(first.inv()))
    )
    angles = torch.randn(20, 3, dtype=torch.float64) * 2
    expected = canonical_quaternion(of(Rotation.from_euler("xyz", angles.numpy())))
    torch.testing.assert_close(euler_to_quaternion(angles), expected)


def test_a_rotation_and_its_inverse_cancel_and_leading_dimensions_broadcast() -> None:
    rotations = of(turns(6, 2)).reshape(2, 3, 4)
    nothing = quaternion_product(quaternion_inverse(rotations), rotations)
    torch.testing.assert_close(nothing, torch.tensor([0.0, 0, 0, 1]).double().expand(2, 3, 4))
    one = of(turns(1, 3))[0]
    assert quaternion_product(one, rotations).shape == (2, 3, 4)
    torch.testing.assert_close(
        quaternion_product(one, rotations)[1, 2], quaternion_product(one, rotations[1, 2])
    )


def test_both_signs_of_a_rotation_become_one() -> None:
    rotations = of(turns(50, 4))
    found = canonical_quaternion(rotations)
    assert torch.equal(found, canonical_quaternion(-rotations))
    assert (found[:, 3] >= 0).all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(50, dtype=torch.float64))
    half_turns = torch.tensor([[-1.0, 2, 0, 0], [0, -1, 1, 0], [0, 0, -3, 0], [0, 0, 0, -1]])
    expected = torch.tensor([[1.0, -2, 0, 0], [0, 1, -1, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    assert torch.equal(canonical_quaternion(half_turns), canonical_quaternion(expected))
    assert (canonical_quaternion(half_turns) * expected).sum(1).min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_lengths_and_types(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor([[tiny, 0, 0, 0], [0, 0, 0, 0], [6e4, 6e4, 0, 0]], dtype=dtype)
    found = canonical_quaternion(values)
    assert found.dtype == torch.float32
    root = 0.5**0.5
    torch.testing.assert_close(found, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1], [root, root, 0, 0]]))
