"""The predictor of hidden tokens is a function of sets of visible tokens, and never sees what does not count."""

import pytest
import torch
from torch import nn

from coloss.nn import MaskTokenPredictor

EXACT = {"rtol": 0, "atol": 1e-11}


def predictor(**options) -> MaskTokenPredictor:
    torch.manual_seed(0)
    made = MaskTokenPredictor(6, (3, 4), **({"width": 8, "depth": 2, "heads": 2} | options)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made


CONTEXT = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SEEN = torch.tensor([[0, 3, 4, 8, 11], [1, 2, 5, 6, 7]])
HIDDEN = torch.tensor([[1, 2, 9], [0, 10, 11]])


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", None])
def test_order_of_visible_tokens_does_not_matter_and_predictions_follow_the_hidden_ones(positions) -> None:
    made = predictor(positions=positions)
    found = made(CONTEXT, SEEN, HIDDEN)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(made(CONTEXT[:, order], SEEN[:, order], HIDDEN), found, **EXACT)
    torch.testing.assert_close(made(CONTEXT, SEEN, HIDDEN[:, [2, 0, 1]]), found[:, [2, 0, 1]], **EXACT)


def test_positions_of_visible_and_hidden_tokens_matter() -> None:
    made = predictor()
    found = made(CONTEXT, SEEN, HIDDEN)
    assert (made(CONTEXT, SEEN.flip(1), HIDDEN) - found).abs().max() > 1e-3
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-3
    without = predictor(positions=None)(CONTEXT, SEEN, HIDDEN)
    torch.testing.assert_close(without[:, 0], without[:, 1], **EXACT)


def test_entries_that_only_fill_up_change_nothing_whatever_they_hold() -> None:
    made = predictor()
    filler = torch.full((2, 2, 6), 1e3, dtype=torch.float64)
    longer = torch.cat([CONTEXT, filler], 1)
    seen = torch.cat([SEEN, torch.tensor([[1, 2], [0, 9]])], 1)
    hidden = torch.cat([HIDDEN, torch.tensor([[5], [3]])], 1)
    found = made(
        longer,
        seen,
        hidden,
        context_valid=torch.tensor([[True] * 5 + [False] * 2] * 2),
        target_valid=torch.tensor([[True] * 3 + [False]] * 2),
    )
    torch.testing.assert_close(found[:, :3], made(CONTEXT, SEEN, HIDDEN), **EXACT)


def test_samples_without_anything_valid_are_finite() -> None:
    made = predictor()
    none = torch.zeros(2, 5, dtype=torch.bool)
    found = made(CONTEXT, SEEN, HIDDEN, context_valid=none, target_valid=none[:, :3])
    found.sum().backward()
    assert found.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_samples_do_not_see_one_another() -> None:
    made = predictor()
    changed = CONTEXT.clone()
    changed[1] += 5
    torch.testing.assert_close(made(changed, SEEN, HIDDEN)[0], made(CONTEXT, SEEN, HIDDEN)[0], **EXACT)


def test_the_mask_token_and_learned_positions_learn() -> None:
    made = predictor(positions="learned")
    made(CONTEXT, SEEN, HIDDEN).square().sum().backward()
    assert made.mask_token.grad.abs().max() > 0
    used = torch.cat([SEEN, HIDDEN], 1).unique()
    moved = made.positions.table.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == used.tolist()


def test_another_map_at_the_end() -> None:
    made = predictor(output=nn.Linear(8, 3))
    assert made(CONTEXT, SEEN, HIDDEN).shape == (2, 3, 3)


def test_no_hidden_token_and_no_visible_one() -> None:
    made = predictor()
    assert made(CONTEXT, SEEN, HIDDEN[:, :0]).shape == (2, 0, 6)
    assert made(CONTEXT[:, :0], SEEN[:, :0], HIDDEN).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"width": 6}, "dim must be a multiple of 4 for 2 axes, got 6"),
        ({"heads": 3}, "heads must divide dim 8, got 3"),
        ({"depth": -1}, "depth must be >= 0, got -1"),
        ({"positions": "rotary"}, "positions must be"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        predictor(**options)
    with pytest.raises(ValueError, match="dim must be >= 1, got 0"):
        MaskTokenPredictor(0, (3,), width=4, depth=1, heads=1)
