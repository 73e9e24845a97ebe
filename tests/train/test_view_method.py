"""The base of methods on views: one forward pass over all views, in every loop, resumed and on two processes."""

import math
from pathlib import Path

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.metrics import rankme, uniformity
from coloss.nn import MLP, Classifier
from coloss.ops import info_nce_loss
from coloss.train import Budget, State, ViewMethod


class Contrast(ViewMethod):
    seen: tuple = ()

    def view_terms(self, embeddings: Tensor, state: State) -> dict[str, Tensor]:
        self.seen = (tuple(embeddings.shape), self.sample_ids(state))
        one, other = nn.functional.normalize(embeddings, dim=-1)
        return {"contrast": info_nce_loss(one, other, 0.5)}


class Spread(ViewMethod):
    def view_terms(self, embeddings: Tensor, state: State) -> dict[str, Tensor]:
        return {"spread": (embeddings.square().mean() - 1).square()}


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    noise = torch.randn(2, *inputs.shape, generator=generator, dtype=inputs.dtype)
    return inputs + 0.1 * noise


def shifted(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Views that do not depend on the process that makes them."""
    return torch.stack([inputs, 0.5 * inputs + 0.1])


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MLP(6, (8,), 5, norm=None)


def new_data(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    return IndexedDataset(torch.randn(32, 6, generator=generator, dtype=dtype), ids=torch.arange(32) + 7)


def contrast(**options) -> Contrast:
    return Contrast(view=noisy, projector=(8, 4), **options)


def test_fit_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    labels = torch.randint(3, (32,))
    batches = list(zip(new_data().inputs.split(8), labels.split(8)))
    check_loops(lambda: Classifier(new_model(), 3), lambda: contrast(), batches, nn.functional.cross_entropy)


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    check_resume(new_model, contrast, new_data(), tmp_path)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        method = Contrast(view=shifted, projector=(8, 4))
        run = coloss.fit(
            new_model().double(),
            new_data(torch.float64),
            methods=[method],
            budget=Budget(steps=6),
            batch_size=8,
            fabric=fabric,
        )
        return dict(run.model.state_dict()) | {
            f"projector.{name}": value for name, value in method.projector.state_dict().items()
        }

    check_two_processes(train, tmp_path)


def test_without_an_objective_all_views_go_through_the_model_at_once() -> None:
    method, calls = contrast(), []
    model = new_model()
    model.register_forward_hook(lambda module, inputs, outputs: calls.append(tuple(inputs[0].shape)))
    coloss.fit(model, new_data(), methods=[method], budget=Budget(steps=1), batch_size=8)
    assert calls == [(16, 6)]
    shape, ids = method.seen
    assert shape == (2, 8, 4)
    assert len(ids) == 8 and set(ids.tolist()) <= set(range(7, 39))


def test_beside_an_objective_the_batch_stays() -> None:
    method = contrast()
    data = IndexedDataset(new_data().inputs, torch.randint(3, (32,)), new_data().ids)
    model = Classifier(new_model(), 3)
    run = coloss.fit(model, data, nn.functional.cross_entropy, [method], budget=Budget(steps=2), batch_size=8)
    assert set(run.history[-1].terms) == {"cross_entropy", "contrast"}
    assert method.seen[0] == (2, 8, 4) and len(method.seen[1]) == 8
    assert method.projector[0].in_features == 5


def test_a_second_method_takes_the_views_of_the_first() -> None:
    calls: list[tuple[int, ...]] = []
    model = new_model()
    model.register_forward_hook(lambda module, inputs, outputs: calls.append(tuple(outputs.shape)))
    spread = Spread(view=noisy)
    run = coloss.fit(model, new_data(), methods=[contrast(), spread], budget=Budget(steps=1), batch_size=8)
    assert calls == [(16, 5)]
    assert set(run.history[-1].terms) == {"contrast", "spread"}


def test_bad_input_is_named(as_users_call: None) -> None:
    with pytest.raises(InputError, match="views must be >= 1, got 0"):
        Contrast(views=0)
    with pytest.raises(InputError, match="projector must hold widths >= 1, at least one, got \\[\\]"):
        Contrast(projector=())
    with pytest.raises(TypeError, match="ViewMethod must define view_terms"):
        coloss.fit(new_model(), new_data(), methods=[ViewMethod()], budget=Budget(steps=1))


def test_meters_of_the_embeddings_that_the_loss_saw():
    method = Contrast(view=noisy, projector=(8, 4))
    inputs = torch.randn(300, 6)
    run = coloss.fit(MLP(6, [5], 5), (inputs,), methods=[method], budget=Budget(steps=3))
    found = method.report(run.model, IndexedDataset(inputs))
    with torch.no_grad():
        embedded = method.projector.eval()(run.model.eval()(inputs))
    assert found["embedding_rankme"] == pytest.approx(float(rankme(embedded)), rel=1e-4)
    assert found["embedding_uniformity"] == pytest.approx(float(uniformity(embedded)), rel=1e-4)
    spread = (embedded - embedded.mean(0)).square().sum(1).mean().sqrt()
    assert found["embedding_scale"] == pytest.approx(float(spread), rel=1e-4)
    # Small noise: the views of a sample stay close, and samples apart.
    assert 0 < found["embedding_alignment"] < 0.3 and 1 <= found["embedding_lidar"] <= 4
    assert found == method.report(run.model, IndexedDataset(inputs))
    assert method.report(run.model, [(inputs, None)]) == {}
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.nan)
    assert all(math.isnan(value) for value in method.report(run.model, IndexedDataset(inputs)).values())
