"""Retriever and reader trained together in `fit`: what the term is, what it reaches, how it runs, stops and ships."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.data import Batch, IndexedDataset, fit_text_encoder, load_raw
from coloss.errors import InputError
from coloss.lab import verify
from coloss.nn import DualEncoder, TokenEncoder, Words
from coloss.retrieval import (
    DenseRetriever,
    JointRetrieval,
    LateInteractionRetriever,
    MeanReader,
    RetrievalReader,
    TokenTower,
    reader_agreement,
    reader_ranked_loss,
    with_candidates,
)
from coloss.retrieval.joint_reader_trial import FrozenRetriever
from coloss.train import State, load_model, save_model

KINDS = ["pairwise", "listwise", "marginal"]


def new_model(**options) -> RetrievalReader:
    torch.manual_seed(3)
    facts = torch.randn(40, 6, generator=torch.Generator().manual_seed(9))
    tower = nn.Linear(6, 4)
    reader = MeanReader(6, 6, 3, hidden=(8,), dropout=options.pop("dropout", 0.0))
    options = {"n_candidates": 8, "n_used": 3, **options}
    return RetrievalReader(DenseRetriever(DualEncoder(tower, tower)), reader, facts, **options)


def new_data(count: int = 48) -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    return IndexedDataset(
        torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)
    )


def new_pairs(count: int = 48) -> IndexedDataset:
    return with_candidates(new_model(), new_data(count))


def new_batches() -> list:
    data = new_pairs()
    return [(tuple(p[i : i + 16] for p in data.inputs), data.targets[i : i + 16]) for i in (0, 16, 32)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_terms_are_the_functions_on_the_models_scores(kind: str):
    model, batch = new_model(), new_pairs().all()
    step = TrainingStep(model, F.cross_entropy, [JointRetrieval(kind=kind, n_sampled=8, temperature=0.2)])
    found = step(batch)
    queries, candidates = batch.inputs
    scores = model.retriever(queries, model.documents[candidates])
    singles = [model.reader(queries, model.documents[candidates[:, j : j + 1]]) for j in range(8)]
    costs = torch.stack([F.cross_entropy(single, batch.targets, reduction="none") for single in singles], 1)
    agreement = reader_agreement(scores, costs).mean()
    assert step.state.take_logged()["agreement"] == pytest.approx(agreement.item(), abs=1e-6)
    if kind == "marginal":
        assert sorted(found) == ["cross_entropy"]
        top = scores.topk(3)
        mixed = (top.values / 0.2).log_softmax(1) - costs.gather(1, top.indices)
        torch.testing.assert_close(found["cross_entropy"], -mixed.logsumexp(1).mean())
        return
    torch.testing.assert_close(found["rank"], reader_ranked_loss(scores, costs, kind=kind, temperature=0.2))
    best = scores.topk(3).indices
    together = model.reader(queries, model.documents[candidates.gather(1, best)])
    torch.testing.assert_close(found["cross_entropy"], F.cross_entropy(together, batch.targets))


def gradients(step: TrainingStep, batch: Batch, term: str) -> tuple[bool, bool]:
    """Whether a term reaches the retriever, and the reader."""
    model = step.model
    loss = step(batch)[term]
    found = []
    for part in (model.retriever, model.reader):
        slopes = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True)
        found.append(any(slope is not None and bool(slope.any()) for slope in slopes))
    return tuple(found)


@pytest.mark.parametrize("kind", KINDS)
def test_which_network_learns_from_which_term(kind: str):
    """Unit check 2."""
    step = TrainingStep(new_model(), F.cross_entropy, [JointRetrieval(kind=kind, n_sampled=8)])
    batch = new_pairs().all()
    if kind == "marginal":
        assert gradients(step, batch, "cross_entropy") == (True, True)
    else:
        assert gradients(step, batch, "rank") == (True, False)
        assert gradients(step, batch, "cross_entropy") == (False, True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_both_networks_is_trained(kind: str):
    """Trap: groups by the names of parameters leave a retriever without its learning rate, or frozen in most parts."""
    model = new_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    coloss.fit(
        model, new_pairs(), F.cross_entropy, [JointRetrieval(kind=kind, n_sampled=4)], budget=Budget(steps=3)
    )
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


def test_documents_are_tried_in_evaluation_mode():
    batch, model = new_pairs().all(), new_model(dropout=0.9)
    step = TrainingStep(model, F.cross_entropy, [JointRetrieval(n_sampled=8)])
    step.train()
    first, second = ({name: term.item() for name, term in step(batch).items()} for _ in range(2))
    assert first["rank"] == pytest.approx(second["rank"], rel=1e-5)
    assert first["cross_entropy"] != second["cross_entropy"]
    assert all(part.training for part in model.modules())


def test_other_methods_see_the_answer_and_not_the_trials():
    seen = []

    class Watcher(Method):
        def setup(self, state: State) -> None:
            state.tap("read", "reader")

        def terms(self, state: State) -> dict[str, Tensor]:
            seen.append(state.features["read"])
            assert state.features["read"] is state.outputs
            return {"small": state.outputs.square().mean()}

    for order in ([JointRetrieval(n_sampled=4), Watcher()], [Watcher(), JointRetrieval(n_sampled=4)]):
        run = coloss.fit(
            new_model(), new_pairs(), F.cross_entropy, order, budget=Budget(steps=3), batch_size=16
        )
        assert {"rank", "small", "cross_entropy"} == set(run.history[-1].terms)
        assert list(run.model.state_dict()) == list(new_model().state_dict())
    assert all(outputs.shape == (16, 3) for outputs in seen)


@pytest.mark.parametrize("kind", ["pairwise", "marginal"])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(kind: str):
    check_loops(new_model, lambda: JointRetrieval(kind=kind, n_sampled=4), new_batches(), F.cross_entropy)


@pytest.mark.parametrize("options", [{}, {"kind": "marginal"}, {"refresh_every": 4}])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, options: dict):
    """With an index that is encoded every fourth step, a run killed in between goes on with the old one."""
    check_resume(
        new_model,
        lambda: JointRetrieval(n_sampled=4, **options),
        new_pairs(),
        tmp_path,
        F.cross_entropy,
        batch_size=16,
        steps=10,
        kill_at=7,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(tmp_path: Path, kind: str):
    """Where all candidates are tried nothing is left to chance."""

    def train(fabric: Fabric) -> dict[str, Tensor]:
        data = new_pairs()
        data = IndexedDataset((data.inputs[0].double(), data.inputs[1]), data.targets)
        run = coloss.fit(
            new_model().double(), data, F.cross_entropy, [JointRetrieval(kind=kind, n_sampled=8)],
            budget=Budget(steps=4), batch_size=16, fabric=fabric, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )  # fmt: skip
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_micro_batches_average():
    def go(size: int, accumulate: int) -> nn.Module:
        return coloss.fit(
            new_model().double(), _double(new_pairs(32)), F.cross_entropy, [JointRetrieval(n_sampled=8)],
            budget=Budget(steps=1), batch_size=size, accumulate=accumulate, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        ).model  # fmt: skip

    for one, other in zip(go(32, 1).parameters(), go(16, 2).parameters(), strict=True):
        torch.testing.assert_close(one, other)


def _double(data: IndexedDataset) -> IndexedDataset:
    return IndexedDataset((data.inputs[0].double(), data.inputs[1]), data.targets)


def test_queries_alone_are_searched_for_at_each_step_without_themselves():
    model = new_model()
    facts = model.documents
    seen = []

    class Spy(Method):
        def on_batch(self, state: State) -> None:
            seen.append(state.batch)

    data = IndexedDataset(facts, torch.arange(40) % 3, extras={"own_document": torch.arange(40)})
    for refresh in (None, 2):
        method = JointRetrieval(n_sampled=4, refresh_every=refresh)
        coloss.fit(model, data, F.cross_entropy, [method, Spy()], budget=Budget(steps=3), batch_size=10)
    for batch in seen:
        queries, candidates = batch.inputs
        assert candidates.shape == (10, 8)
        assert not (candidates == batch.extras["own_document"][:, None]).any()
    assert model.index is None


@pytest.mark.parametrize("refresh", [None, 2])
def test_copies_of_a_question_are_not_searched_for(refresh: int | None):
    """Trap: a copy under another number hands over the answer as the question itself would."""
    model = new_model()
    model.documents[20:] = model.documents[:20]
    ids = torch.arange(20).repeat(2)
    method = JointRetrieval(n_sampled=4, refresh_every=refresh, document_ids=ids)
    step = TrainingStep(model, F.cross_entropy, [method])
    step(Batch(model.documents, ids % 3, torch.arange(40), {"own_document": ids}))
    assert not (ids[step.state.batch.inputs[1]] == ids[:, None]).any()
    assert not any("document_ids" in name for name in step.state_dict())


def test_the_marginal_needs_no_more_candidates_than_it_reads():
    """What is drawn is a diagnostic there."""
    data = with_candidates(new_model(), new_data(), 3).all()
    step = TrainingStep(new_model(), F.cross_entropy, [JointRetrieval(kind="marginal", n_sampled=10)])
    assert step(data)["cross_entropy"].isfinite()
    assert -1 <= step.state.take_logged()["agreement"] <= 1


def test_the_index_is_old_until_it_is_refreshed():
    model = new_model()
    method = JointRetrieval(n_sampled=4, refresh_every=2)
    step = TrainingStep(model, F.cross_entropy, [method])
    before = model.search(new_data().inputs)
    with torch.no_grad():
        model.retriever.encoder.query_encoder.weight.neg_()
        model.retriever.encoder.query_encoder.bias.neg_()
    # Queries and documents are negated together, which leaves inner products as they were; old documents are the opposite.
    step.state.step = 1
    step({"inputs": new_data().inputs, "targets": new_data().targets})
    stale = step.state.batch.inputs[1]
    step.state.step = 2
    step({"inputs": new_data().inputs, "targets": new_data().targets})
    fresh = step.state.batch.inputs[1]
    assert torch.equal(fresh, before) and not (stale[:, 0] == before[:, 0]).any()


def test_a_frozen_retriever_stays_and_the_reader_learns():
    model = new_model()
    before = [p.clone() for p in model.parameters()]
    coloss.fit(
        model, new_pairs(), F.cross_entropy, [FrozenRetriever()], budget=Budget(steps=3), batch_size=16
    )
    after = list(model.parameters())
    kept = len(list(model.retriever.parameters()))
    assert all(torch.equal(*pair) for pair in zip(before[:kept], after[:kept], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(before[kept:], after[kept:], strict=True))


def test_half_precision_trains_on_finite_numbers():
    run = coloss.fit(
        new_model(), new_pairs(), F.cross_entropy, [JointRetrieval(n_sampled=4)],
        budget=Budget(steps=3), batch_size=16, fabric=Fabric(accelerator="cpu", precision="bf16-mixed"),
    )  # fmt: skip
    assert all(math.isfinite(value) for value in run.history[-1].terms.values())
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_a_saved_model_is_loaded_and_answers_alike(tmp_path: Path):
    run = coloss.fit(
        new_model(), new_pairs(), F.cross_entropy, [JointRetrieval(n_sampled=4)], budget=Budget(steps=3)
    )
    model = run.model.eval()
    again = load_model(new_model(), save_model(model, tmp_path / "model.safetensors")).eval()
    torch.testing.assert_close(again(new_data().inputs), model(new_data().inputs))


def test_late_interaction_trains_on_the_words_of_pubmedqa():
    """Questions find abstracts of the collection by their tokens; the reader has the abstracts' vectors."""
    table = load_raw("pubmedqa")["table"].iloc[:40]
    names = sorted({word.lower() for text in table["question"] for word in text.split()})
    number = {name: place + 1 for place, name in enumerate(names)}

    def words(texts) -> Tensor:
        found = [[number.get(word.lower(), 0) for word in text.split()] for text in texts]
        found = [[word for word in row if word][:12] for row in found]
        return torch.tensor([row + [0] * (12 - len(row)) for row in found])

    vectors = fit_text_encoder(list(table["context"]), max_features=30)
    contents = torch.from_numpy(vectors(list(table["context"])))
    tower = TokenTower(TokenEncoder(Words(len(names) + 1, 8, max_length=12), 8, 1, 2, pool="none"), 8)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(30, 2)

        def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
            return self.network(documents.mean(1))

    model = RetrievalReader(
        LateInteractionRetriever(tower, tower), Reader(), words(table["context"]), contents, n_candidates=6, n_used=2
    )  # fmt: skip
    answers = torch.tensor((table["answer"] == "yes").to_numpy()).long()
    data = with_candidates(model, IndexedDataset(words(table["question"]), answers))
    before = [p.clone() for p in model.retriever.parameters()]
    run = coloss.fit(
        model, data, F.cross_entropy, [JointRetrieval(n_sampled=4, margin=1e-3)], budget=Budget(steps=4), batch_size=20
    )  # fmt: skip
    assert -1 <= run.history[-1].metrics["agreement"] <= 1
    assert any(not torch.equal(*pair) for pair in zip(before, model.retriever.parameters(), strict=True))
    assert run.model.eval()(data.inputs[0][:3]).shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "both"}, 'kind must be "pairwise", "listwise" or "marginal", got \'both\''),
        ({"n_sampled": 1}, "n_sampled must be >= 2, got 1"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, got -1.0"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"margin": -1.0}, "margin must be >= 0 and finite, got -1.0"),
        ({"rescale": "z"}, "rescale must be"),
        ({"refresh_every": 0}, "refresh_every must be >= 1 or None, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, as_users_call):
    with pytest.raises(InputError, match=message):
        JointRetrieval(**options)


def test_bad_runs_are_refused():
    with pytest.raises(InputError, match="the model must be a RetrievalReader, got Linear"):
        TrainingStep(nn.Linear(2, 2), F.cross_entropy, [JointRetrieval()])
    with pytest.raises(InputError, match=r"document_ids must have shape \(40,\), got \(39,\)"):
        TrainingStep(new_model(), F.cross_entropy, [JointRetrieval(document_ids=torch.arange(39))])
    step = TrainingStep(new_model(), F.cross_entropy, [JointRetrieval(n_sampled=10)])
    with pytest.raises(
        InputError, match=r"n_sampled must fit the candidates of each query: n must be in \[0, 8\]"
    ):
        step(new_pairs().all())
    step = TrainingStep(
        new_model(), F.cross_entropy, [JointRetrieval(n_sampled=4, reader_loss=F.cross_entropy)]
    )
    with pytest.raises(
        InputError, match=r"reader_loss must give one loss for each of 192 rows, got shape \(\)"
    ):
        step(new_pairs().all())


def test_the_claim_runs():
    found = verify("jmlr", smoke=True, seeds=1)
    assert found["metric"] == "accuracy" and len(found["arms"]) == 6
    for arm in found["arms"].values():
        assert set(arm["metrics"]) == {"accuracy", "accuracy_in_list", "agreement", "same_intent"}
