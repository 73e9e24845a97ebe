"""NT-Xent equals its formula, SupCon is the same with labels, and the method keeps the promises of every method."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.contrastive import NTXent, nt_xent_loss
from coloss.data import Batch, IndexedDataset, load
from coloss.errors import InputError
from coloss.metrics import uniformity
from coloss.nn import MLP, Classifier
from coloss.train import Budget, linear


def by_formula(views: Tensor, temperature: float, hard: int | None = None) -> float:
    """Chen et al., written out row by row; Wang and Liu with `hard`."""
    rows = views.flatten(0, 1).double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    count, samples = len(rows), views.shape[1]
    costs = []
    for i in range(count):
        scores = rows @ rows[i] / temperature
        positives = [j for j in range(count) if j != i and j % samples == i % samples]
        negatives = np.sort([scores[j] for j in range(count) if j % samples != i % samples])[::-1][:hard]
        total = np.log(np.exp(scores[positives]).sum() + np.exp(negatives).sum())
        costs.append(np.mean([total - scores[j] for j in positives]))
    return float(np.mean(costs))


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 5.0])
def test_equals_the_formula(views, temperature):
    embeddings = 3 * torch.randn(views, 9, 4, dtype=torch.float64)
    assert nt_xent_loss(embeddings, temperature).item() == pytest.approx(by_formula(embeddings, temperature))


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("hard", [1, 5, 100])
def test_hard_form_equals_the_formula(views, hard):
    embeddings = 3 * torch.randn(views, 9, 4, dtype=torch.float64)
    found = nt_xent_loss(embeddings, 0.3, hard=hard).item()
    assert found == pytest.approx(by_formula(embeddings, 0.3, hard))


def test_hard_form_with_all_negatives_is_the_plain_loss_to_the_bit():
    embeddings = torch.randn(2, 9, 4)
    assert torch.equal(nt_xent_loss(embeddings, 0.1, hard=16), nt_xent_loss(embeddings, 0.1))


def test_equals_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    views = torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True)
    rows = views.flatten(0, 1)
    theirs = losses.NTXentLoss(temperature=0.2)(rows, torch.arange(12).repeat(2))
    ours = nt_xent_loss(views, 0.2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    for one, other in zip(torch.autograd.grad(ours, views), torch.autograd.grad(theirs, views)):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
    labels = torch.arange(12) % 3
    theirs = losses.SupConLoss(temperature=0.2)(rows, labels.repeat(2))
    ours = nt_xent_loss(views, 0.2, ids=labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(loss, views)[0] for loss in (ours, theirs)))


def test_duplicates_by_id_are_positives_not_negatives():
    views = torch.randn(2, 4, 3)
    views[:, 3] = views[:, 0]
    apart = nt_xent_loss(views, 0.1)
    together = nt_xent_loss(views, 0.1, ids=torch.tensor([5, 6, 7, 5]))
    assert together < apart


def test_bad_input_is_named(as_users_call):
    for options, message in (
        ({"temperature": 0.0}, "temperature must be > 0 and finite, or a schedule, got 0.0"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"views": 1}, "views must be >= 2, got 1"),
        ({"hard_share": 0.0}, r"hard_share must be in \(0, 1\], or a schedule, got 0.0"),
        ({"hard_share": 1.1}, r"hard_share must be in \(0, 1\], or a schedule, got 1.1"),
        ({"hard_warmup": 1.0}, r"hard_warmup must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(InputError, match=message):
            NTXent(**options)
    with pytest.raises(ValueError, match="views must hold at least two views of each sample, got 1"):
        nt_xent_loss(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match=r"ids must have shape \(4,\), got \(3,\)"):
        nt_xent_loss(torch.zeros(2, 4, 2), ids=torch.arange(3))
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        nt_xent_loss(torch.ones(2, 4, 2), hard=0)
    with pytest.raises(InputError, match=r"hard_share must stay in \(0, 1\], got 0.0 at progress 0"):
        coloss.fit(
            new_model(), new_data(), methods=[method(hard_share=linear(0.0, 1.0))], budget=Budget(steps=1)
        )
    with pytest.raises(InputError, match="labels=True needs one class index for each sample as targets"):
        coloss.fit(new_model(), new_data(), methods=[method(labels=True)], budget=Budget(steps=1))


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs + 0.1 * torch.randn(2, *inputs.shape, generator=generator)


def fixed(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Views that do not depend on the process that makes them."""
    return torch.stack([inputs, 0.5 * inputs + 0.1])


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MLP(6, (8,), 5, norm=None)


def new_data(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    return IndexedDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).to(dtype))


def method(**options) -> NTXent:
    return NTXent(**({"view": noisy, "projector": (8, 4)} | options))


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    batches = list(zip(new_data().inputs.split(8), torch.randint(3, (32,)).split(8)))
    check_loops(lambda: Classifier(new_model(), 3), method, batches, F.cross_entropy)


@pytest.mark.parametrize("options", [{}, {"hard_share": 0.3}])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, options: dict):
    check_resume(new_model, lambda: method(**options), new_data(), tmp_path)


@pytest.mark.parametrize("options", [{}, {"labels": True}, {"hard_share": 0.3, "hard_warmup": 0.4}])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, options: dict):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        data = IndexedDataset(new_data(torch.float64).inputs, torch.arange(32) % 4)
        run = coloss.fit(
            new_model().double(),
            data,
            methods=[method(view=fixed, **options)],
            budget=Budget(steps=6),
            batch_size=8,
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_temperature_does_not_scale_gradients_where_asked():
    views = torch.randn(2, 16, 4)
    sizes = []
    for temperature in (0.5, 50.0):
        leaf = views.clone().requires_grad_()
        loss = temperature * nt_xent_loss(leaf, temperature)
        sizes.append(torch.autograd.grad(loss, leaf)[0].norm().item())
    assert 0.3 < sizes[0] / sizes[1] < 3
    first, second = (
        coloss.fit(
            new_model(),
            new_data(),
            methods=[method(temperature=0.1, scale_by_temperature=scaled)],
            budget=Budget(steps=1),
            batch_size=32,
        )
        .history[-1]
        .terms["nt_xent"]
        for scaled in (False, True)
    )
    assert second == pytest.approx(0.1 * first, rel=1e-5)


def test_labels_pull_classes_together():
    torch.manual_seed(0)
    targets = torch.arange(64) % 2
    inputs = torch.randn(64, 6)
    inputs[:, 0] = 0.5 * (2.0 * targets - 1)
    run = coloss.fit(
        MLP(6, (16,), 8),
        IndexedDataset(inputs, targets),
        methods=[method(labels=True)],
        budget=Budget(steps=60),
        batch_size=32,
    )
    features = F.normalize(run.model.eval()(inputs), dim=1)
    same = targets[:, None] == targets
    similarity = features @ features.T
    assert similarity[same].mean() > similarity[~same].mean() + 0.2


def test_hard_share_counts_the_negatives_and_waits_for_the_warmup():
    used = []

    class Spy(NTXent):
        def _hard_loss(self, embeddings, temperature, ids, hard):
            used.append(hard)
            return super()._hard_loss(embeddings, temperature, ids, hard)

    def train(**options) -> list[int]:
        used.clear()
        coloss.fit(
            new_model(),
            new_data(),
            methods=[Spy(view=noisy, projector=(8, 4), **options)],
            budget=Budget(steps=10),
            batch_size=16,
        )
        return list(used)

    assert (
        train(hard_share=0.25) == [8] * 7
    )  # 25 % of 2 * 15, rounded up; all negatives for the first 3 steps
    assert train(hard_share=0.001, hard_warmup=0.0) == [1] * 10
    falling = train(hard_share=linear(1.0, 0.0 + 1e-3))
    assert len(falling) == 9 and falling == sorted(falling, reverse=True)
    assert train() == []


def test_a_sample_drawn_twice_is_not_its_own_negative():
    class Spy(NTXent):
        def view_terms(self, embeddings, state):
            found = super().view_terms(embeddings, state)
            apart = nt_xent_loss(embeddings, 0.5)
            together = nt_xent_loss(embeddings, 0.5, ids=torch.tensor([3, 4, 3]))
            assert found["nt_xent"] == together != apart
            return found

    one = Spy(view=noisy, projector=(8, 4))
    batch = Batch(new_data().inputs[[0, 1, 0]], ids=torch.tensor([3, 4, 3]))
    coloss.fit(new_model(), [batch], methods=[one], budget=Budget(steps=1))


def digits_embeddings(**options) -> tuple[Tensor, float]:
    """Embeddings of 256 digits under strong views, and the share of steps that used the hard loss."""
    images = load("digits", seed=0).train.inputs[:256]
    torch.manual_seed(0)
    contrast = NTXent(temperature=1.0, projector=(64, 32), hard_share=0.05, **options)
    run = coloss.fit(
        MLP(64, (128,), 32),
        IndexedDataset(images),
        methods=[contrast],
        budget=Budget(steps=62),
        batch_size=64,
    )
    with torch.no_grad():
        embeddings = contrast.projector.eval()(run.model.eval()(images))
    return embeddings, run.history[-1].metrics["hard_steps"]


def test_hard_negatives_alone_collapse_and_say_so():
    with pytest.warns(UserWarning, match="embeddings collapse under the hard loss: uniformity -0.1"):
        embeddings, used = digits_embeddings(hard_warmup=0.0, hard_safeguard=False)
    assert uniformity(embeddings) > -0.2 and used == 1


@pytest.mark.filterwarnings("error:embeddings collapse")
def test_the_safeguard_keeps_hard_negatives_from_collapse():
    embeddings, used = digits_embeddings(hard_warmup=0.0)
    assert uniformity(embeddings) < -1 and used < 1


def test_the_safeguard_lets_useful_hard_negatives_pass():
    torch.manual_seed(0)
    embeddings = torch.randn(1, 16, 8).repeat(2, 1, 1) + 0.1 * torch.randn(2, 16, 8)
    contrast = method(hard_share=0.2)
    assert contrast._hard_loss(embeddings, 1.0, None, 6) == nt_xent_loss(embeddings, 1.0, hard=6)
    strangers = torch.randn(2, 16, 8)  # the two views of a sample are no more alike than any two rows
    assert contrast._hard_loss(strangers, 1.0, None, 6) is None
