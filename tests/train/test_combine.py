import pytest
import torch
from example_methods import ExtraHead
from torch import nn
from torch.nn import functional as F
from torchjd.aggregation import Sum, UPGrad

from coloss.errors import InputError
from coloss.train import Budget, JacobianDescent, State, UncertaintyWeighting, WeightedSum, fit, linear


def test_schedule_moves_the_weight():
    state = State(nn.Identity())
    combine = WeightedSum({"a": linear(0.0, 2.0)})
    terms = {"a": torch.tensor(3.0), "b": torch.tensor(1.0)}
    assert combine(state, terms) == 1.0
    state.progress = 0.5
    assert combine(state, terms) == 4.0


def test_unknown_term_is_named(data, new_model):
    with pytest.raises(
        InputError, match="no loss term named 'cros_entropy' to weigh; did you mean 'cross_entropy'"
    ):
        fit(new_model(), data, F.cross_entropy, combine={"cros_entropy": 2.0}, budget=Budget(steps=1))


def test_weights_of_the_user_win_over_the_method(data, new_model):
    run = fit(
        new_model(), data, F.cross_entropy, [ExtraHead(0.5)], combine={"extra": 0.0}, budget=Budget(steps=3)
    )
    assert run.methods[0].head.weight.grad is None or not run.methods[0].head.weight.grad.any()


def test_uncertainty_weighting_balances_scales(data, new_model):
    """At the optimum exp(s) equals the term, so the larger term gets the smaller weight."""
    combine = UncertaintyWeighting(["a", "b"])
    optimizer = torch.optim.SGD(combine.parameters(), lr=0.5)
    terms = {"a": torch.tensor(4.0), "b": torch.tensor(0.25)}
    for _ in range(200):
        optimizer.zero_grad()
        combine(State(nn.Identity()), terms).backward()
        optimizer.step()
    assert torch.allclose(combine.log_variances.exp(), torch.tensor([4.0, 0.25]), rtol=1e-3)


def test_uncertainty_weights_are_trained_by_fit(data, new_model):
    combine = UncertaintyWeighting(["cross_entropy", "extra"])
    fit(new_model(), data, F.cross_entropy, [ExtraHead()], combine=combine, budget=Budget(steps=3))
    assert combine.log_variances.abs().min() > 0


def test_uncertainty_weighting_wants_the_right_names(data, new_model):
    with pytest.raises(InputError, match=r"made for terms \['x'\], the run has \['cross_entropy'\]"):
        fit(new_model(), data, F.cross_entropy, combine=UncertaintyWeighting(["x"]), budget=Budget(steps=1))
    with pytest.raises(InputError, match="distinct names"):
        UncertaintyWeighting(["x", "x"])


def test_jacobian_descent_with_a_sum_is_the_plain_sum(data, new_model):
    double = (data[0].double(), data[1])
    runs = [
        fit(
            new_model().double(),
            double,
            F.cross_entropy,
            [ExtraHead(0.5).double()],
            combine=combine,
            budget=Budget(steps=5),
        )
        for combine in (None, JacobianDescent(Sum()))
    ]
    for a, b in zip(*(run.model.parameters() for run in runs)):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_upgrad_does_not_ascend_on_either_of_two_opposed_terms():
    """Two quadratic bowls: while both can fall, neither rises under UPGrad."""
    point = nn.Parameter(torch.tensor([4.0, 1.0]))

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.point = point

        def forward(self, inputs):
            return self.point + 0 * inputs.sum()

    def bowls(outputs, targets):
        steep = torch.tensor([1.0, 30.0])
        return {
            "a": (outputs - torch.tensor([1.0, 0.0])).square().sum(),
            "b": (steep * (outputs - torch.tensor([-1.0, 0.1])).square()).sum(),
        }

    values = []

    def keep(model):
        found = bowls(model.point.detach(), None)
        values.append((float(found["a"]), float(found["b"])))
        return {"a": values[-1][0]}

    fit(Point(), (torch.zeros(4, 1), torch.zeros(4)), bowls, combine=JacobianDescent(UPGrad()), budget=Budget(steps=20), batch_size=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), evaluate=keep, evaluate_every=1)  # fmt: skip
    for before, after in zip(values, values[1:]):
        assert after[0] <= before[0] + 1e-6
        assert after[1] <= before[1] + 1e-6
