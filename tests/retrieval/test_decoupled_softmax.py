"""DecoupledSoftmax on embeddings and on logits, in every loop, resumed, on two processes; and its claim."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import Batch, IndexedDataset
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.lab.tasks import find_task
from coloss.nn import MLP, DualEncoder
from coloss.retrieval import DecoupledSoftmax, decoupled_score_loss, positive_pairs
from coloss.retrieval.decoupled_softmax import LabelTable
from coloss.train import Budget, Method, Setting, State

LABELS = 7


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return LabelTable(MLP(5, (8,), 4, norm=None), LABELS)


def towers(inputs: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return DualEncoder(MLP(inputs, (8,), 4, norm=None), MLP(inputs, (8,), 4, norm=None))


def new_data(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 5, generator=generator).to(dtype)
    relevance = (torch.rand(32, LABELS, generator=generator) < 0.4).float()
    relevance[3] = 0
    return IndexedDataset(inputs, relevance)


@pytest.mark.parametrize("form", ["decoupled", "softmax", "topk"])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(form) -> None:
    batches = list(zip(new_data().inputs.split(8), new_data().targets.split(8)))
    check_loops(new_model, lambda: DecoupledSoftmax(form=form, positives_per_query=2, k=2), batches)


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    check_resume(new_model, lambda: DecoupledSoftmax(positives_per_query=1), new_data(), tmp_path)


@pytest.mark.parametrize("form", ["decoupled", "softmax", "topk"])
def test_two_processes_take_the_steps_of_one(form: str, tmp_path: Path) -> None:
    inputs = new_data(torch.float64).inputs
    ids = {"document": torch.arange(32) // 3, "query": torch.arange(32) % 9}

    def train(fabric: Fabric) -> dict[str, Tensor]:
        found = {}
        for name, model, data in (
            ("table", new_model(), new_data(torch.float64)),
            ("towers", towers(), IndexedDataset((inputs, inputs.flip(1)), extras=ids)),
            ("logits", nn.Linear(5, LABELS), new_data(torch.float64)),
        ):
            run = coloss.fit(
                model.double(),
                data,
                methods=[DecoupledSoftmax(form=form, k=2, temperature=0.3)],
                budget=Budget(steps=5),
                batch_size=8,
                fabric=fabric,
            )
            found |= {f"{name}.{key}": value for key, value in run.model.state_dict().items()}
        return found

    check_two_processes(train, tmp_path)


@pytest.mark.parametrize("form", ["decoupled", "softmax", "topk"])
@pytest.mark.parametrize("drawn", [None, 1])
def test_logits_and_embeddings_give_the_same_loss(form: str, drawn: int | None) -> None:
    data = new_data()
    queries, labels = new_model()(data.inputs)
    values = []
    for outputs in ((queries, labels), queries @ labels.T):
        method = DecoupledSoftmax(form=form, positives_per_query=drawn, k=2)
        state = State(nn.Identity(), batch=Batch(data.inputs, data.targets), outputs=outputs)
        state.local_generator.manual_seed(0)
        values += list(method.terms(state).values())
    torch.testing.assert_close(*values)
    if form == "decoupled" and drawn is None:
        torch.testing.assert_close(values[1], decoupled_score_loss(queries @ labels.T, data.targets, 0.05))


def test_positives_that_were_not_drawn_are_no_negatives() -> None:
    queries = torch.tensor([[1.0, 0.0]]).requires_grad_()
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    method = DecoupledSoftmax(positives_per_query=1)
    state = State(nn.Identity(), batch=Batch(None, torch.tensor([[1, 1, 0]])), outputs=(queries, labels))
    loss = method.terms(state)["decoupled_softmax"]
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(-20.0)).item())  # against the third alone


def test_it_composes_and_runs_in_mixed_precision() -> None:
    class Shrink(Method):
        def terms(self, state: State) -> dict[str, Tensor]:
            return {"shrink": state.outputs[0].float().square().mean()}

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(
        new_model(),
        new_data(),
        methods=[DecoupledSoftmax(), Shrink()],
        budget=Budget(steps=3),
        fabric=fabric,
    )
    assert set(run.history[-1].terms) == {"decoupled_softmax", "shrink"}
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_micro_batches_are_joined() -> None:
    weights = []
    inputs = new_data().inputs
    for accumulate in (1, 4):
        model = towers()
        coloss.fit(
            model,
            IndexedDataset((inputs, inputs.flip(1))),
            methods=[DecoupledSoftmax()],
            budget=Budget(steps=4),
            batch_size=16 // accumulate,
            accumulate=accumulate,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        weights.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
    torch.testing.assert_close(*weights)


def test_pairs_follow_relevance_ids_or_position() -> None:
    documents = torch.zeros(3, 2)
    pairs, grades = positive_pairs(Batch(None), 2, documents)
    assert pairs.tolist() == [[0, 1], [0, 1]] and grades is None
    extras = {"relevance": torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])}
    pairs, grades = positive_pairs(Batch(None, extras=extras), 2, documents)
    assert pairs.tolist() == [[0, 0], [1, 2]] and grades.tolist() == [2.0, 1.0]
    with pytest.raises(InputError, match="a batch must hold a document for each query, got 3 for 4"):
        positive_pairs(Batch(None), 4, documents)


def test_it_trains_the_labels_of_reuters() -> None:
    setting = Setting.of(find_task("reuters", limit=200), seed=0, budget=Budget(steps=60))
    method = DecoupledSoftmax.for_setting(setting)
    assert method.temperature == 1.0
    run = setting.fit(setting.new_model(), methods=[method])
    assert set(run.history[-1].terms) == {"decoupled_softmax"}
    assert run.history[-1].terms["decoupled_softmax"] < 0.5 * run.history[0].terms["decoupled_softmax"]


def test_bad_input_is_named(as_users_call: None) -> None:
    for options, message in (
        ({"form": "hinge"}, 'form must be "decoupled", "softmax" or "topk", got \'hinge\''),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"k": -1}, "k must be > 0 and finite, got -1"),
        ({"positives_per_query": 0}, "positives_per_query must be >= 1, got 0"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            DecoupledSoftmax(**options)
    state = State(nn.Identity(), batch=Batch(None, torch.zeros(3)), outputs=torch.zeros(3, 4))
    with pytest.raises(
        InputError, match=r"targets must hold the relevance of each label, shape \(3, 4\), got \(3,\)"
    ):
        DecoupledSoftmax().terms(state)
    state.outputs = "text"
    with pytest.raises(InputError, match="must return scores .* or a pair of embeddings, got str"):
        DecoupledSoftmax().terms(state)


def test_the_claim_runs() -> None:
    found = verify("decoupled-softmax", smoke=True, seeds=1)
    assert {"map", "precision@1"} <= set(found["arms"]["decoupled"]["metrics"])
