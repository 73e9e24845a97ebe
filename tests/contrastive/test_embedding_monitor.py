"""The monitor logs what the metrics say of the embeddings, and leaves training as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, differing, weights
from torch import Tensor, nn

import coloss
from coloss.contrastive import EmbeddingMonitor, NTXent, temperature_report
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.metrics import alignment, tolerance, uniformity
from coloss.nn import MLP, Classifier
from coloss.ops import effective_rank
from coloss.train import Budget, Method, State, ViewMethod


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs + 0.1 * torch.randn(2, *inputs.shape, generator=generator)


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MLP(6, (8,), 5, norm=None)


def new_data() -> IndexedDataset:
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return IndexedDataset(inputs, torch.arange(32) % 4)


def contrast(**options) -> NTXent:
    return NTXent(**({"view": noisy, "projector": (8, 4), "temperature": 0.2} | options))


class Copy(Method):
    """Keeps the last embeddings and targets."""

    def on_step(self, state: State) -> None:
        self.rows, self.targets = state.batch.extras["embeddings"], state.batch.targets


def train(*methods: Method, data=None, objective=None, steps: int = 2, model=None):
    return coloss.fit(
        model or new_model(),
        data if data is not None else new_data(),
        objective,
        list(methods),
        budget=Budget(steps=steps),
        batch_size=32,
        optimizer=SGD,
    )


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_logs_what_the_metrics_say(objective):
    copy = Copy()
    model = new_model() if objective is None else Classifier(new_model(), 4)
    run = train(contrast(), EmbeddingMonitor(every=2), copy, objective=objective, model=model)
    first, second = copy.rows.unflatten(0, (2, -1))
    found = run.history[-1].metrics
    (row,) = temperature_report(first, second, temperatures=(0.2,)).rows
    expected = {
        "batch_uniformity": uniformity(first),
        "batch_tolerance": tolerance(first, copy.targets[:32]),
        "batch_alignment": alignment(first, second),
        "batch_rank": effective_rank(torch.linalg.svdvals(first.double())),
        "batch_effective_negatives": row.effective_negatives,
    }
    assert {name: found[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )


def test_looks_every_so_many_steps():
    state, monitor = State(nn.Identity()), EmbeddingMonitor(every=3)
    state.batch.extras |= {"embeddings": torch.randn(8, 2), "embedding_views": 2}
    seen = []
    for state.step in range(1, 8):
        monitor.on_step(state)
        seen += [state.step] * bool(state.take_logged())
    assert seen == [3, 6]


def test_changes_nothing_in_training():
    with_it, without = (
        train(contrast(), *extra, steps=6).model for extra in ([EmbeddingMonitor(every=1)], [])
    )
    assert not differing(weights(with_it), weights(without))


def test_works_in_every_loop():
    class Both(NTXent):
        """A method and its monitor as one, as the check takes a single method."""

        def __init__(self) -> None:
            super().__init__(view=noisy, projector=(8, 4))
            self.monitor = EmbeddingMonitor(every=1)

        def on_step(self, state: State) -> None:
            self.monitor.on_step(state)
            assert math.isfinite(state.logged["batch_uniformity"][0])

    check_loops(new_model, Both, [(part,) for part in new_data().inputs.split(8)])


def test_temperature_is_the_given_one_or_that_of_the_run():
    def effective(*methods: Method) -> float | None:
        return train(*methods, steps=1).history[-1].metrics.get("batch_effective_negatives")

    own = effective(contrast(temperature=0.05), EmbeddingMonitor(every=1))
    assert own == effective(contrast(temperature=0.05), EmbeddingMonitor(every=1, temperature=0.05))
    scheduled = effective(contrast(temperature=lambda progress: 0.05), EmbeddingMonitor(every=1))
    assert own == pytest.approx(scheduled)
    assert own < effective(contrast(temperature=0.05), EmbeddingMonitor(every=1, temperature=5.0))

    class Agreement(ViewMethod):
        def view_terms(self, embeddings, state):
            return {"disagreement": (embeddings[0] - embeddings[1]).square().mean()}

    assert effective(Agreement(view=noisy), EmbeddingMonitor(every=1)) is None


def test_without_classes_there_is_no_tolerance_and_divergence_is_no_error():
    run = train(contrast(), EmbeddingMonitor(every=1), data=IndexedDataset(new_data().inputs), steps=1)
    assert "batch_tolerance" not in run.history[-1].metrics
    state = State(nn.Identity())
    state.step = 1
    state.batch.extras |= {"embeddings": torch.full((4, 2), math.nan), "embedding_views": 2}
    EmbeddingMonitor(every=1, temperature=0.1).on_step(state)
    found = state.take_logged()
    assert sorted(found) == ["batch_alignment", "batch_effective_negatives", "batch_rank", "batch_uniformity"]
    assert all(math.isnan(value) for value in found.values())


def test_bad_input_is_named():
    with pytest.raises(InputError, match="every must be >= 1, got 0"):
        EmbeddingMonitor(every=0)
    with pytest.raises(InputError, match=r"temperature must be > 0 and finite, or a schedule, got 0\.0"):
        EmbeddingMonitor(temperature=0.0)
    with pytest.raises(InputError, match="finds no embeddings: give it after a method on views"):
        train(EmbeddingMonitor(every=1), objective=F.cross_entropy, steps=1)
