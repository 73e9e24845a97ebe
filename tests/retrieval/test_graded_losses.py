"""Losses on graded pairs: what leaves them unchanged, what they equal, and merging of checkpoints."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata

from coloss.retrieval import merge_checkpoints, pearson_loss, preference_order_loss, rank_kl_loss
from coloss.retrieval.graded_losses import average_ranks


def pair(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(count, generator=generator, dtype=torch.float64),
        torch.randint(4, (count,), generator=generator).double(),
    )


def test_pearson_is_one_minus_the_correlation():
    s, y = pair()
    assert pearson_loss(s, y).item() == pytest.approx(1 - pearsonr(s.numpy(), y.numpy()).statistic, abs=1e-6)
    assert pearson_loss(3 * y + 1, y).item() == pytest.approx(0, abs=1e-6)
    assert pearson_loss(-0.1 * y, y).item() == pytest.approx(2, abs=1e-6)
    assert pearson_loss(s, 5 * y - 2).item() == pytest.approx(pearson_loss(s, y).item(), abs=1e-6)


@pytest.mark.parametrize("s", [torch.zeros(4), torch.full((4,), 0.3)])
def test_equal_predictions_or_targets_give_finite_gradients(s):
    s = s.clone().requires_grad_()
    for y in (torch.arange(4.0), torch.ones(4)):
        for loss in (pearson_loss, rank_kl_loss, preference_order_loss):
            (gradient,) = torch.autograd.grad(loss(s, y), s)
            assert gradient.isfinite().all()
    assert pearson_loss(s, torch.ones(4)) == 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_ranks_are_those_of_scipy(values):
    found = average_ranks(torch.tensor(values, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), rankdata([-value for value in values]) - 1)


def test_rank_kl_equals_its_formula_and_sees_the_order_alone():
    s, y = pair()
    t = torch.from_numpy(1 - (rankdata(-y.numpy()) - 1) / 11)
    expected = F.kl_div((s / 0.1).log_softmax(0), (t / 0.1).softmax(0), reduction="sum")
    assert rank_kl_loss(s, y, 0.1, per_pair=False).item() == pytest.approx(expected.item())
    assert rank_kl_loss(s, y, 0.1).item() == pytest.approx(expected.item() / 12)
    assert rank_kl_loss(s, y.exp(), 0.1).item() == pytest.approx(rank_kl_loss(s, y, 0.1).item())
    tied = y == 2
    shuffled = s.clone()
    shuffled[tied] = s[tied].flip(0)
    assert rank_kl_loss(shuffled, y, 0.1).item() == pytest.approx(rank_kl_loss(s, y, 0.1).item())


def test_preference_order_equals_its_formula():
    s, y = pair()
    costs = []
    for k in range(12):
        below = [j for j in range(12) if y[k] - y[j] > 1e-8]
        if below:
            own = max(y[k] - y[j] for j in below) * s[k] / 0.2
            others = torch.stack([(y[k] - y[j]) * s[j] / 0.2 for j in below])
            costs.append(torch.cat([own[None], others]).logsumexp(0) - own)
    assert preference_order_loss(s, y, 0.2).item() == pytest.approx(torch.stack(costs).mean().item())
    two = preference_order_loss(torch.tensor([0.1, 0.4]), torch.tensor([1.0, 0.0]), 0.05)
    assert two.item() == pytest.approx(F.softplus(torch.tensor(0.3 / 0.05)).item())
    assert preference_order_loss(s, 5 * y, 0.2) != pytest.approx(preference_order_loss(s, y, 0.2).item())


@pytest.mark.parametrize("loss", [pearson_loss, rank_kl_loss, preference_order_loss])
def test_gradients_and_half_precision(loss):
    s, y = pair(7)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, y), s)
    half = s.detach().bfloat16().requires_grad_()
    value = loss(half, y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(half.detach().float(), y).item())
    for count in (0, 1):
        assert loss(torch.zeros(count), torch.zeros(count)) == 0


def test_merging_weighs_by_distance():
    base = {"w": torch.zeros(2, 3), "n": torch.tensor(3)}
    states = [{"w": torch.ones(2, 3) * size, "n": torch.tensor(3 + size)} for size in (1, 3)]
    merged = merge_checkpoints(base, states)
    torch.testing.assert_close(merged["w"], torch.full((2, 3), (1 * 1 + 3 * 3) / 4))
    assert merged["n"] == 6
    torch.testing.assert_close(merge_checkpoints(base, states, gamma=0)["w"], torch.full((2, 3), 2.0))
    torch.testing.assert_close(merge_checkpoints(base, states, how="uniform")["w"], torch.full((2, 3), 2.0))
    same = merge_checkpoints(base, [states[1]] * 3)
    torch.testing.assert_close(same["w"], states[1]["w"])
    torch.testing.assert_close(merge_checkpoints(base, [base, base])["w"], base["w"])


def test_merging_by_row_and_by_element():
    base = {"w": torch.zeros(2, 2)}
    states = [{"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}, {"w": torch.tensor([[0.0, 5.0], [1.0, 0.0]])}]
    by_row = merge_checkpoints(base, states, granularity="row")["w"]
    torch.testing.assert_close(by_row, torch.tensor([[1.5, 4.5], [1.0, 0.0]]))
    by_element = merge_checkpoints(base, states, granularity="element")["w"]
    torch.testing.assert_close(by_element, torch.tensor([[3.0, 16 / 9 + 25 / 9], [1.0, 0.0]]))


def test_bad_input_is_named(as_users_call):
    for loss in (pearson_loss, rank_kl_loss, preference_order_loss):
        with pytest.raises(
            ValueError, match=r"targets must have the shape of predictions \(2,\), got \(3,\)"
        ):
            loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        pearson_loss(torch.zeros(2), torch.zeros(2), eps=0)
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        rank_kl_loss(torch.zeros(2), torch.zeros(2), 0)
    base = {"w": torch.zeros(2)}
    for arguments, options, message in (
        (([],), {}, "states must hold at least one state dict, got 0"),
        (([{"v": torch.zeros(2)}],), {}, "state 0 differs in 'v'"),
        (([base, {"w": torch.zeros(3)}],), {}, "state 1 differs in 'w'"),
        (([base],), {"how": "soup"}, 'how must be "delta" or "uniform", got \'soup\''),
        (
            ([base],),
            {"granularity": "layer"},
            'granularity must be "tensor", "row" or "element", got \'layer\'',
        ),
        (([base],), {"gamma": -1.0}, "gamma must be >= 0 and finite, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_checkpoints(base, *arguments, **options)
