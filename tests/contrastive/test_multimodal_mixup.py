"""The method adds both losses at its places of any fusion classifier, and keeps the promises of every method."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import TrainingStep
from coloss.contrastive import LocalNegativesWarning, MultimodalMixup, MultimodalMixupLoss
from coloss.contrastive.local_negatives import warn_of_local_negatives
from coloss.data import IndexedDataset, load
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.metrics import evaluate_classifier
from coloss.nn import MLP, Classifier, DualEncoder, FusionClassifier
from coloss.train import Budget


def new_model(dim: int = 5) -> FusionClassifier:
    torch.manual_seed(3)
    return FusionClassifier([MLP(4, [dim], norm=None), MLP(6, [dim], norm=None)], 3)


def new_data(count: int = 32, dtype: torch.dtype = torch.float32) -> IndexedDataset:
    draw = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(count, width, generator=draw).to(dtype) for width in (4, 6))
    return IndexedDataset(inputs, torch.arange(count) % 3)


def one_step(method: MultimodalMixup, model: nn.Module | None = None, progress: float = 0.0) -> TrainingStep:
    step = TrainingStep(model or new_model(), F.cross_entropy, [method])
    step.state.progress = progress
    step.state.generator.manual_seed(0)
    return step


def test_terms_are_the_two_losses_on_the_tapped_embeddings():
    batch = new_data().all()
    for progress in (0.1, 0.9):
        method = MultimodalMixup(hidden=(7,))
        step = one_step(method, progress=progress)
        terms = step(batch)
        embeddings = [encoder(part) for encoder, part in zip(step.model.encoders, batch.inputs)]
        expected = MultimodalMixupLoss()(embeddings, progress, torch.Generator().manual_seed(0))
        torch.testing.assert_close(terms["multimodal_mixup"], expected)
        heads = [head(rows) for head, rows in zip(method.unimodal.heads, embeddings)]
        torch.testing.assert_close(terms["unimodal"], sum(F.cross_entropy(h, batch.targets) for h in heads))


def test_a_weight_of_zero_leaves_the_encoders_alone():
    found = []
    for options in (None, {"weight": 0.0, "unimodal_weight": 0.0}):
        model = new_model()
        methods = [] if options is None else [MultimodalMixup(**options)]
        coloss.fit(model, new_data(), F.cross_entropy, methods, budget=Budget(steps=4), batch_size=8)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_mixed_inputs_are_encoded_and_word_ids_have_their_embeddings_mixed():
    batch = new_data().all()
    model = FusionClassifier([MLP(4, [], 5), MLP(6, [], 5)], 3)
    # A linear encoder maps mixed inputs to mixed embeddings.
    by_embedding, by_input = (
        one_step(MultimodalMixup(mix=mix, probability=1.0), model)(batch)["multimodal_mixup"]
        for mix in ("embeddings", "inputs")
    )
    torch.testing.assert_close(by_embedding, by_input)

    class Bag(nn.Module):
        out_features = 5

        def __init__(self) -> None:
            super().__init__()
            self.words = nn.EmbeddingBag(9, 5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids)

    texts = FusionClassifier([MLP(4, [], 5), Bag()], 3)
    ids = torch.randint(9, (32, 4))
    inputs, outputs = (batch.inputs[0], ids), texts((batch.inputs[0], ids))
    step = one_step(MultimodalMixup(mix="inputs", probability=1.0), texts)
    mixed = step(inputs, batch.targets)["multimodal_mixup"]
    expected = one_step(MultimodalMixup(probability=1.0), texts)(inputs, batch.targets)["multimodal_mixup"]
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(step.state.outputs, outputs)


def test_any_model_serves_whose_embeddings_can_be_named():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.top = nn.Linear(4, 5), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
            return self.top(self.left(inputs[0]) + self.right(inputs[1]))

    with pytest.raises(InputError, match="Sums has no list of two or more encoders: name the module paths"):
        one_step(MultimodalMixup(), Sums())
    terms = one_step(MultimodalMixup(embeddings=("left", "right")), Sums())(new_data().all())
    assert terms["multimodal_mixup"].isfinite()
    towers = DualEncoder(MLP(4, [5]), MLP(6, [5]))
    step = TrainingStep(towers, None, [MultimodalMixup(heads=False)])
    assert sorted(step(new_data().all())) == ["multimodal_mixup"]


def test_bad_input_is_named(as_users_call):
    for options, message in (
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"mix": "outputs"}, 'mix must be "embeddings" or "inputs", got \'outputs\''),
        ({"embeddings": ["encoders.0"]}, "embeddings must name at least two modalities"),
        ({"switch": -0.1}, r"switch must be in \[0, 1\], got -0.1"),
    ):
        with pytest.raises(InputError, match=message):
            MultimodalMixup(**options)
    with pytest.raises(InputError, match="Classifier has no list of two or more encoders"):
        one_step(MultimodalMixup(), Classifier(MLP(4, [5]), 3))
    with pytest.raises(InputError, match="unimodal heads need one class index for each sample"):
        TrainingStep(new_model(), None, [MultimodalMixup()])(new_data().inputs, torch.rand(32))
    with pytest.raises(InputError, match="features cannot be read"):
        one_step(MultimodalMixup(embeddings=("encoders.0", "encoders.7")))
    activated = FusionClassifier([MLP(4, [5]), MLP(6, [5])], 3)
    with pytest.raises(InputError, match="at 'encoders.0.layers.2' does not declare out_features"):
        one_step(MultimodalMixup(embeddings=("encoders.0.layers.2", "encoders.1")), activated)


def test_heads_stay_behind_and_the_model_ships_as_it_was_built():
    model, method = new_model(), MultimodalMixup()
    names = set(model.state_dict())
    run = coloss.fit(model, new_data(), F.cross_entropy, [method], budget=Budget(steps=4), batch_size=8)
    assert set(run.model.state_dict()) == names
    assert any(name.startswith("unimodal.heads.1") for name in method.state_dict())
    assert not any(module._forward_hooks for module in run.model.modules())


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    data = new_data()
    batches = [((a, b), c) for a, b, c in zip(*(part.split(8) for part in (*data.inputs, data.targets)))]
    check_loops(new_model, MultimodalMixup, batches, F.cross_entropy)


@pytest.mark.parametrize("mix", ["embeddings", "inputs"])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, mix: str):
    check_resume(
        new_model, lambda: MultimodalMixup(mix=mix, switch=0.8), new_data(), tmp_path, F.cross_entropy
    )


@pytest.mark.parametrize("mix", ["embeddings", "inputs"])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, mix: str):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            new_model().double(),
            new_data(dtype=torch.float64),
            F.cross_entropy,
            [MultimodalMixup(mix=mix, probability=1.0, switch=0.5, weight=1.0)],
            budget=Budget(steps=6),
            batch_size=8,
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_keeping_to_one_process_s_negatives_is_warned_of(monkeypatch):
    monkeypatch.setattr("coloss.contrastive.local_negatives.world_size", lambda: 4)
    with pytest.warns(LocalNegativesWarning, match="1 / 4 of the negatives"):
        one_step(MultimodalMixup(across_processes=False))
    warn_of_local_negatives("MultimodalMixup", across_processes=True)


def test_it_composes_with_another_method():
    class Smoothness(coloss.Method):
        def terms(self, state: coloss.State) -> dict[str, Tensor]:
            return {"smoothness": state.outputs.square().mean()}

    run = coloss.fit(
        new_model(),
        new_data(),
        F.cross_entropy,
        [MultimodalMixup(), Smoothness()],
        budget=Budget(steps=4),
        batch_size=8,
        accumulate=2,
    )
    assert sorted(run.history[-1].terms) == ["cross_entropy", "multimodal_mixup", "smoothness", "unimodal"]


def test_alignment_brings_the_two_halves_of_a_sample_together():
    data = new_data()
    data.inputs = data.inputs[0], torch.cat([data.inputs[0], data.inputs[1][:, :2]], 1)

    def gap(weight: float) -> float:
        model = new_model(16)
        coloss.fit(
            model,
            data,
            F.cross_entropy,
            [MultimodalMixup(weight=weight)],
            budget=Budget(steps=30),
            batch_size=32,
            optimizer=partial(torch.optim.Adam, lr=1e-2),
        )
        with torch.no_grad():
            first, second = (
                F.normalize(encoder(part), dim=1) for encoder, part in zip(model.encoders, data.inputs)
            )
        scores = first @ second.T
        return float(scores.diagonal().mean() - scores.mean())

    assert gap(1.0) > gap(0.0) + 0.2


def test_three_modalities_in_a_cycle_classify_tumours():
    splits = load("breast-cancer")
    data = IndexedDataset(splits.train.inputs.split(10, dim=1), splits.train.targets)
    torch.manual_seed(0)
    model = FusionClassifier([MLP(10, [16]) for _ in range(3)], 2)
    method = MultimodalMixup(pairs="cycle")
    run = coloss.fit(
        model,
        data,
        F.cross_entropy,
        [method],
        budget=Budget(steps=24),
        batch_size=64,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    assert len(method.unimodal.heads) == 3
    test = IndexedDataset(splits.test.inputs.split(10, dim=1), splits.test.targets)
    assert evaluate_classifier(run.model, test)["accuracy"] > 0.9


def test_the_claim_runs():
    found = verify("m3col", smoke=True, seeds=1)
    assert set(found["arms"]) == {"fusion", "fusion and heads", "clip and heads", "m3col"}
    assert found["metric"] == "accuracy"
