"""Facts about the monitor: what it keeps, when it warns, and that training does not notice it."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coloss.errors import InputError
from coloss.jepa import (
    CollapseWarning,
    EffectiveRankMonitor,
    LeJEPA,
    entropy_rank,
    feature_standard_deviation,
    participation_ratio,
    rankme,
    stable_rank,
)
from coloss.nn import MLP, Classifier
from coloss.ops import gram_singular_values
from coloss.train import Budget, Method, TrainingStep, fit


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def data():
    return normal(90, 6), torch.arange(90) % 3


def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(Classifier(MLP(6, (8,), dropout=0.3), 3))


class Stop(Exception):
    pass


class StopAt(Method):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise Stop


def test_values_are_those_of_the_newest_rows():
    rows = normal(50, 4) + 0.5
    monitor = EffectiveRankMonitor(capacity=30)
    for part in rows.split(7):
        monitor.update(part)
    newest = rows[-30:]
    expected = {
        "rows": 30.0,
        "rankme": rankme(newest).item(),
        "rankme_centered": rankme(newest, center=True).item(),
        "entropy_rank": entropy_rank(newest).item(),
        "participation_ratio": participation_ratio(newest).item(),
        "stable_rank": stable_rank(newest).item(),
        "feature_std": feature_standard_deviation(newest).item(),
        "scale": (newest - newest.mean(0)).square().sum(1).mean().sqrt().item(),
        "collapsed": 0.0,
    }
    assert monitor.compute() == pytest.approx(expected, rel=1e-6)


def test_all_ranks_come_from_two_spectra(monkeypatch):
    spectra = []

    def count(embeddings, center=False):
        spectra.append(center)
        return gram_singular_values(embeddings, center)

    monkeypatch.setattr("coloss.metrics.effective_ranks.gram_singular_values", count)
    monitor = EffectiveRankMonitor()
    monitor.update(normal(20, 4))
    monitor.compute()
    assert sorted(spectra) == [False, True]


def test_one_update_larger_than_the_buffer():
    rows = normal(100, 3)
    monitor = EffectiveRankMonitor(capacity=10)
    monitor.update(rows)
    assert monitor.compute()["rankme"] == rankme(rows[-10:]).item()


def test_what_is_kept_has_no_graph_and_single_precision():
    monitor = EffectiveRankMonitor()
    monitor.update(normal(5, 3).bfloat16().requires_grad_())
    assert not monitor.newest.rows.requires_grad
    assert monitor.newest.rows.dtype == torch.float32
    assert list(monitor.parameters()) == list(monitor.buffers()) == []


@pytest.mark.parametrize("rows", [torch.zeros(0, 3), torch.zeros(1, 3), torch.full((4, 3), torch.nan)])
def test_too_little_or_not_finite(rows):
    monitor = EffectiveRankMonitor()
    monitor.update(rows)
    values = monitor.compute()
    assert values.pop("rows") == len(rows)
    assert values.pop("collapsed") == 0
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (normal(200, 30) * torch.tensor([1.0] + [1e-3] * 29), r"rankme is 1.\d+ of 30 possible \(limit 3\)"),
        (10 + 0.1 * normal(200, 30), r"feature_std is 0.00\d+ for even|feature_std is 0.00\d+ of 0.183"),
        (0.001 * normal(200, 30), r"scale is 0.00\d+ \(limit 0.1\)"),
    ],
)
def test_collapse_is_told_with_its_numbers(rows, message):
    monitor = EffectiveRankMonitor()
    monitor.update(rows)
    with pytest.warns(CollapseWarning, match=message):
        assert monitor.compute()["collapsed"] == 1


def test_it_warns_once_until_embeddings_recover():
    monitor = EffectiveRankMonitor(capacity=50)
    told = []
    for scale in (1, 0.001, 0.001, 1, 0.001):
        monitor.update(scale * normal(50, 8))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monitor.compute()
        told.append(len(caught))
    assert told == [0, 1, 0, 0, 1]


def test_limits_of_0_never_warn():
    monitor = EffectiveRankMonitor(min_rank_share=0.0, min_spread=0.0, min_scale=0.0)
    monitor.update(torch.ones(20, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.compute()["collapsed"] == 0


def test_healthy_embeddings_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (normal(512, 64), F.normalize(normal(512, 512), dim=1), normal(512, 64).relu()):
            monitor = EffectiveRankMonitor()
            monitor.update(rows)
            monitor.compute()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 1}, "capacity must be >= 2, got 1"),
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"min_rank_share": 1.5}, r"min_rank_share must be in \[0, 1\], got 1.5"),
        ({"min_spread": -1}, "min_spread must be >= 0, got -1"),
        ({"min_scale": -1}, "min_scale must be >= 0, got -1"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EffectiveRankMonitor(**options)


def test_rows_that_do_not_fit_are_refused(as_users_call):
    monitor = EffectiveRankMonitor()
    monitor.update(normal(4, 3))
    with pytest.raises(InputError, match="length 3 as before, got 5"):
        monitor.update(normal(4, 5))
    with pytest.raises(InputError, match=r"must be \(rows, dim\), got shape \(2, 3, 4\)"):
        monitor.update(normal(2, 3, 4))


@pytest.mark.parametrize("methods", [(), (LeJEPA,)])
def test_training_is_bit_for_bit_what_it_is_without(data, methods):
    def train(*watching):
        return fit(
            classifier(), data, F.cross_entropy, [*(kind(num_slices=4) for kind in methods), *watching],
            budget=Budget(steps=8), batch_size=32,
        )  # fmt: skip

    plain, watched = train(), train(EffectiveRankMonitor(every=2, capacity=64))
    for (name, one), other in zip(plain.model.state_dict().items(), watched.model.state_dict().values()):
        assert torch.equal(one, other), name
    assert [p.terms for p in plain.history] == [p.terms for p in watched.history]
    assert [step for step, _ in watched.methods[-1].found] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("source", "methods", "objective", "width"),
    [
        (None, [LeJEPA(projector=(5,))], F.cross_entropy, 5),
        ("", [LeJEPA(projector=(5,), in_features=3)], None, 3),
        (None, [LeJEPA(projector=(5,), in_features=3)], None, 5),
        (None, [], F.cross_entropy, 8),
        ("0.backbone.layers.0", [], F.cross_entropy, 8),
        ("0.head", [], F.cross_entropy, 3),
    ],
)
def test_what_it_watches(data, source, methods, objective, width):
    monitor = EffectiveRankMonitor(source=source, every=1)
    fit(classifier(), data, objective, [monitor, *methods], budget=Budget(steps=1), batch_size=32)
    assert monitor.newest.rows.shape[1] == width


def test_an_encoder_alone_is_watched_at_its_output(data):
    class Size(Method):
        def terms(self, state):
            return {"size": state.outputs.square().mean()}

    monitor = EffectiveRankMonitor(every=1)
    step = TrainingStep(MLP(6, (7,)), None, [Size(), monitor])
    step.backward(step(data[0]))
    step.after_step()
    assert torch.equal(monitor.newest.rows, step.state.outputs.detach())


def test_rows_of_the_steps_before_a_look_are_enough(data):
    monitor = EffectiveRankMonitor(every=5, capacity=60)
    run = fit(classifier(), data, F.cross_entropy, [monitor], budget=Budget(steps=10), batch_size=30)
    assert [(step, values["rows"]) for step, values in run.methods[0].found] == [(5, 60.0), (10, 60.0)]


def test_a_source_that_is_not_there_is_refused(data):
    with pytest.raises(InputError, match="features cannot be read: .*got 'backbon'"):
        fit(
            classifier(),
            data,
            F.cross_entropy,
            [EffectiveRankMonitor(source="backbon")],
            budget=Budget(steps=1),
        )


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_stop_and_go_on(data, tmp_path, stop):
    def go(*extra, **options):
        monitor = EffectiveRankMonitor(every=3, capacity=40, min_scale=100.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = fit(
                classifier(), data, F.cross_entropy, [LeJEPA(num_slices=4), monitor, *extra],
                budget=Budget(steps=9), batch_size=32, **options,
            )  # fmt: skip
        return run, [one for one in caught if one.category is CollapseWarning]

    whole, told = go()
    assert len(told) == 1
    with pytest.raises(Stop):
        go(StopAt(stop), checkpoint_dir=tmp_path, checkpoint_every=2)
    resumed, told_again = go(StopAt(-1), checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    assert whole.methods[1].found == resumed.methods[1].found
    assert torch.equal(whole.methods[1].newest.rows, resumed.methods[1].newest.rows)
    # The look at step 3 is in the checkpoint of step 4 only, which a stop at 4 comes before.
    assert len(told_again) == (1 if stop <= 4 else 0)
    for one, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(one, other)


def test_collapse_without_sigreg_is_noticed_and_health_with_it_is_not_disturbed():
    data = (normal(256, 8),)
    for weight, expected in ((0.0, True), (0.2, False)):
        monitor = EffectiveRankMonitor(every=20, capacity=512)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(
                MLP(8, (32,), 16), data, methods=[LeJEPA(weight=weight, num_slices=32, projector=(32, 4)), monitor],
                budget=Budget(steps=100), batch_size=128, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
            )  # fmt: skip
        assert any(one.category is CollapseWarning for one in caught) is expected, monitor.found
