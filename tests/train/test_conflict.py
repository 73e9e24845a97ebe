import pytest
import torch
from example_methods import ExtraHead
from torch import nn
from torch.nn import functional as F

from coloss.train import Budget, ConflictMonitor, fit


def test_known_angles():
    """Gradients (1, 0), (1, 1) and (-2, 0) of three terms on one weight."""
    model = nn.Linear(2, 1, bias=False)

    def objective(outputs, targets):
        weight = model.weight[0]
        return {"x": weight[0], "diagonal": weight.sum(), "back": -2 * weight[0] + 0 * outputs.sum()}

    monitor = ConflictMonitor(every=1)
    fit(model, (torch.zeros(4, 2), torch.zeros(4)), objective, monitor=monitor, budget=Budget(steps=2))
    found = monitor.found[0]
    assert found.cosine["x|diagonal"] == pytest.approx(0.5**0.5, abs=1e-6)
    assert found.cosine["x|back"] == pytest.approx(-1.0)
    assert found.norm == pytest.approx({"x": 1.0, "diagonal": 2**0.5, "back": 2.0})
    assert monitor.summary()["x|back"] == pytest.approx({"mean_cosine": -1.0, "share_in_conflict": 1.0})


def test_looks_every_k_steps_and_leaves_training_alone(data, new_model):
    monitor = ConflictMonitor(every=2)
    watched = fit(new_model(), data, F.cross_entropy, [ExtraHead()], monitor=monitor, budget=Budget(steps=7))
    alone = fit(new_model(), data, F.cross_entropy, [ExtraHead()], budget=Budget(steps=7))
    assert [conflict.step for conflict in watched.conflicts] == [0, 2, 4, 6]
    for a, b in zip(watched.model.parameters(), alone.model.parameters()):
        assert torch.equal(a, b)


def test_only_parameters_both_reach_count(data, new_model):
    """The main head is reached by one term, the extra head by the other: the body alone is shared."""
    model, monitor = new_model().eval(), ConflictMonitor(every=1)
    method = ExtraHead()
    fit(model, data, F.cross_entropy, [method], monitor=monitor, budget=Budget(steps=1), batch_size=200)
    body = ConflictMonitor(every=1, parameters=lambda m: m[0].parameters())
    fit(
        new_model().eval(),
        data,
        F.cross_entropy,
        [ExtraHead()],
        monitor=body,
        budget=Budget(steps=1),
        batch_size=200,
    )
    assert monitor.found[0].norm == pytest.approx(body.found[0].norm)


def test_terms_that_share_nothing_have_no_cosine():
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    model.forward = lambda inputs: inputs
    monitor = ConflictMonitor(every=1)
    fit(model, (torch.zeros(4, 1), torch.zeros(4)), lambda o, t: {"a": model[0].weight.sum(), "b": model[1].weight.sum()},
        monitor=monitor, budget=Budget(steps=1))  # fmt: skip
    assert monitor.found[0].cosine["a|b"] != monitor.found[0].cosine["a|b"]
    assert monitor.summary() == {}


def test_one_term_is_nothing_to_compare(data, new_model):
    monitor = ConflictMonitor(every=1)
    fit(new_model(), data, F.cross_entropy, monitor=monitor, budget=Budget(steps=2))
    assert monitor.found == []


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        ConflictMonitor(every=0)
