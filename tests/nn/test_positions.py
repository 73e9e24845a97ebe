import numpy as np
import pytest
import torch

from coloss.nn import PositionTable, sinusoidal_positions


def test_sine_cosine_values_equal_a_loop():
    table = sinusoidal_positions(6, 8, base=100.0)
    for position in range(6):
        for k in range(4):
            angle = position * 100.0 ** (-k / 4)
            assert table[position, k] == pytest.approx(np.sin(angle), abs=1e-6)
            assert table[position, 4 + k] == pytest.approx(np.cos(angle), abs=1e-6)


def test_grid_positions_join_those_of_row_and_column():
    table = sinusoidal_positions((3, 5), 8).reshape(3, 5, 8)
    assert torch.equal(table[..., :4], sinusoidal_positions(3, 4)[:, None].expand(3, 5, 4))
    assert torch.equal(table[..., 4:], sinusoidal_positions(5, 4)[None].expand(3, 5, 4))


def test_inner_products_depend_on_the_distance_alone():
    table = sinusoidal_positions(30, 16).double()
    products = table @ table.T
    assert torch.allclose(products.diagonal(), torch.full((30,), 8.0, dtype=torch.float64), atol=1e-5)
    for distance in (1, 7):
        assert products.diagonal(distance).std() < 1e-5


def test_table_is_added_from_the_first_position_on():
    table = PositionTable((4,), 2, "learned")
    assert torch.equal(table(torch.zeros(3, 2, 2)), table.table[:2].expand(3, 2, 2))


def test_only_learned_positions_are_parameters_and_state():
    learned, fixed, none = (PositionTable((4,), 2, kind) for kind in ("learned", "sinusoidal", None))
    assert list(learned.state_dict()) == ["table"]
    assert not fixed.state_dict()
    assert not list(fixed.parameters())
    tokens = torch.randn(1, 9, 2)
    assert none(tokens) is tokens


@pytest.mark.parametrize(
    ("grid", "dim", "message"),
    [
        (4, 3, "dim must be a multiple of 2 for 1 axes, got 3"),
        ((2, 2), 6, "dim must be a multiple of 4 for 2 axes, got 6"),
        ((2, 0), 4, "at least one position along each axis"),
    ],
)
def test_refuses_sizes_that_do_not_divide(grid, dim, message):
    with pytest.raises(ValueError, match=message):
        sinusoidal_positions(grid, dim)


def test_refuses_more_tokens_than_positions():
    with pytest.raises(ValueError, match="there are 4 positions, got 5 tokens"):
        PositionTable((4,), 2)(torch.zeros(1, 5, 2))
