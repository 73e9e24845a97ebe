"""EpisodicTraining reads episodes as their sampler lays them out, and keeps the promises of every method."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.contrastive import EpisodicTraining, MetricMix, proto_triplet_loss
from coloss.data import EpisodeSampler, IndexedDataset, Loader, locate
from coloss.errors import DataNotFoundError, InputError
from coloss.metrics import evaluate_episodes, icnn_score
from coloss.nn import MLP, Classifier
from coloss.ops import prototypes, prototypical_logits
from coloss.train import Budget, NonFiniteLossError, TrainingStep

SGD = partial(torch.optim.SGD, lr=0.1)
SLOW = partial(torch.optim.SGD, lr=0.01)


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MLP(6, (8,), 5, norm=None)


def new_data(dtype: torch.dtype = torch.float32, rows: int = 48) -> IndexedDataset:
    drawn = torch.Generator().manual_seed(1)
    targets = torch.arange(rows) % 6
    inputs = torch.randn(rows, 6, generator=drawn) + torch.eye(6)[targets]
    return IndexedDataset(inputs.to(dtype), targets)


def episodes(data: IndexedDataset, shots: int = 1, count: int = 4) -> Loader:
    return Loader(data, None, sampler=EpisodeSampler(data.targets, 3, shots, 4 - shots, count))


@pytest.mark.parametrize("shots", [1, 2])
def test_terms_are_those_of_the_sampler_s_parts(shots):
    data, model = new_data(), new_model()
    loader = episodes(data, shots)
    batch = next(loader.batches(0))
    step = TrainingStep(model, None, [EpisodicTraining(shots=shots, temperature=0.5, icnn_weight=1.0)])
    terms = step(batch)
    support, query_set = loader.sampler.parts(model(batch.inputs))
    centres = prototypes(support, torch.arange(3).repeat_interleave(shots), 3)
    answers = torch.arange(3).repeat_interleave(4 - shots)
    logits = prototypical_logits(query_set, centres, temperature=0.5)
    torch.testing.assert_close(terms["prototypical"], F.cross_entropy(logits, answers))
    torch.testing.assert_close(terms["proto_triplet"], proto_triplet_loss(query_set, answers, centres))
    score = icnn_score(model(batch.inputs), batch.targets, 3, soft=True)
    torch.testing.assert_close(terms["icnn"], -torch.log(score + 1e-6))
    logged = step.state.take_logged()
    assert logged["episode_accuracy"] == pytest.approx((logits.argmax(1) == answers).double().mean().item())
    assert 0 <= logged["active_triplets"] <= 1


def test_any_labelled_batch_makes_an_episode_of_the_classes_that_have_queries():
    model, inputs = new_model(), torch.randn(6, 6)
    step = TrainingStep(model, None, [EpisodicTraining(triplet_weight=0.0, icnn_weight=0.0)])
    terms = step(inputs, torch.tensor([4, 9, 4, 7, 9, 9]))
    assert list(terms) == ["prototypical"]
    rows = model(inputs)
    logits = prototypical_logits(rows[[2, 4, 5]], rows[[0, 1]])
    torch.testing.assert_close(terms["prototypical"], F.cross_entropy(logits, torch.tensor([0, 1, 1])))


def test_a_batch_without_two_such_classes_costs_nothing():
    step = TrainingStep(new_model(), None, [EpisodicTraining()])
    terms = step(torch.randn(4, 6), torch.tensor([0, 0, 1, 2]))
    assert sorted(terms) == ["icnn", "proto_triplet", "prototypical"]
    assert all(value == 0 and value.requires_grad for value in terms.values())


def test_the_score_counts_for_nothing_at_first_and_fully_at_the_end():
    weight = EpisodicTraining().term_weights["icnn"]
    assert (weight(0.0), weight(1.0)) == (0.0, 1.0)


def test_episodes_teach_classes_that_were_never_seen():
    torch.manual_seed(0)
    # What tells classes apart is the same in seen and unseen ones: the first two of eight noisy numbers.
    targets = torch.arange(20).repeat_interleave(12)
    places = 3 * torch.randn(20, 2)
    inputs = torch.cat([places[targets] + 0.2 * torch.randn(240, 2), 4 * torch.randn(240, 6)], 1)
    train, test = (IndexedDataset(inputs[part], targets[part]) for part in (targets < 12, targets >= 12))
    model = nn.Linear(8, 8)
    before = evaluate_episodes(model, test, 5, 1, 5, 50).mean
    loader = Loader(train, None, sampler=EpisodeSampler(train.targets, 6, 1, 4, 60))
    optimizer = partial(torch.optim.Adam, lr=0.02)
    coloss.fit(model, loader, methods=[EpisodicTraining()], budget=Budget(epochs=1), optimizer=optimizer)
    assert evaluate_episodes(model, test, 5, 1, 5, 50).mean > before + 0.2


def test_cosine_episodes_do_not_depend_on_the_length_of_embeddings():
    data, found = new_data(), []
    for factor in (1.0, 50.0):
        torch.manual_seed(3)
        model = nn.Linear(6, 5, bias=False)
        model.weight.data *= factor
        step = TrainingStep(
            model, None, [EpisodicTraining(metric="cosine", temperature=0.1, icnn_weight=1.0)]
        )
        found.append(step(next(episodes(data).batches(0))))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    data = new_data()
    batches = list(zip(data.inputs.split(12), data.targets.split(12)))
    check_loops(
        lambda: Classifier(new_model(), 6), EpisodicTraining, batches, F.cross_entropy, optimizer=SLOW
    )


def test_a_killed_run_resumes_bit_identically(tmp_path: Path):
    check_resume(new_model, EpisodicTraining, episodes(new_data()), tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"shots": 2, "metric": "cosine", "anchor": "prototype", "soft": False}]
)
def test_two_processes_take_the_steps_of_one(tmp_path: Path, options):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        loader = episodes(new_data(torch.float64), options.get("shots", 1))
        run = coloss.fit(
            new_model().double(),
            loader,
            methods=[EpisodicTraining(**options)],
            budget=Budget(steps=5),
            fabric=fabric,
            optimizer=SGD,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_it_composes_with_another_method_and_with_bfloat16():
    run = coloss.fit(
        new_model(),
        episodes(new_data()),
        methods=[EpisodicTraining(), MetricMix()],
        budget=Budget(steps=3),
        fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
        log_every=1,
    )
    assert {"prototypical", "proto_triplet", "icnn", "contrastive", "metric_mix"} == set(
        run.history[-1].terms
    )
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_divergence_is_named_with_its_term():
    model = nn.Linear(6, 5)
    model.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="prototypical"):
        coloss.fit(model, episodes(new_data()), methods=[EpisodicTraining()], budget=Budget(steps=1))


def test_bad_input_is_named(as_users_call):
    for options, message in (
        ({"shots": 0}, "shots must be >= 1, got 0"),
        ({"triplet_weight": -1.0}, "triplet_weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"metric": "l1"}, 'metric must be "sqeuclidean" or "cosine", got \'l1\''),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"mining": "easy"}, "mining must be"),
        ({"k": 0}, "k must be >= 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            EpisodicTraining(**options)
    with pytest.raises(InputError, match="an episode needs one class index for each sample as targets"):
        coloss.fit(new_model(), (new_data().inputs,), methods=[EpisodicTraining()], budget=Budget(steps=1))


def test_the_claim_runs():
    from coloss.lab.claims import verify

    try:
        locate("omniglot")
    except DataNotFoundError as error:
        pytest.skip(str(error))
    found = verify("proto-triplet-icnn", smoke=True, seeds=1)
    assert {"accuracy", "half_interval", "icnn_score", "silhouette"} <= set(
        found["arms"]["prototypical"]["metrics"]
    )
