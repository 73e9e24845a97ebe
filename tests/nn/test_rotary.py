"""Rotary positions: a product of turned vectors sees the distance alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from coloss.nn import rotary_angles, rotate


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_the_product_depends_on_the_distance_alone(first, second, shift):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 8, dtype=torch.float64, generator=generator)

    def product(p, q):
        turned = [rotate(x, rotary_angles(torch.tensor([place]), 3)) for x, place in ((query, p), (key, q))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(
        product(first, second), product(first + shift, second + shift), atol=1e-3, rtol=0
    )


def test_a_turn_keeps_length_and_leaves_the_other_dimensions():
    vectors = torch.randn(2, 3, 5, 8)
    turned = rotate(vectors, rotary_angles(torch.arange(5), 2))
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))
    torch.testing.assert_close(turned[..., 4:], vectors[..., 4:])
    torch.testing.assert_close(turned[:, :, 0], vectors[:, :, 0])
    assert not torch.allclose(turned[:, :, 1], vectors[:, :, 1])
