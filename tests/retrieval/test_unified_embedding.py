"""One encoder for two tasks: what each batch trains on, in every loop, resumed, on two processes; and the claim."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import Batch, IndexedDataset, Loader, SingleTaskSampler
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.nn import MLP, DualEncoder
from coloss.retrieval import UnifiedEmbedding, multi_positive_info_nce_loss, pearson_loss, rank_kl_loss
from coloss.train import Budget, State

GRADED = 24


def new_model() -> nn.Module:
    torch.manual_seed(0)
    tower = MLP(5, (8,), 4, norm=None)
    return DualEncoder(tower, tower)


def new_data(dtype: torch.dtype = torch.float32, documents: int = 3) -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(48, 5, generator=generator).to(dtype)
    others = torch.randn(48, documents, 5, generator=generator).to(dtype)
    grades = torch.randint(6, (48,), generator=generator).to(dtype)
    graded = torch.arange(48) < GRADED
    return IndexedDataset(
        (queries, others), grades, extras={"graded": graded, "document": torch.arange(48) % 20}
    )


def loader(data: IndexedDataset) -> Loader:
    return Loader(data, None, sampler=SingleTaskSampler([GRADED, 48 - GRADED], 8))


def method(**options) -> UnifiedEmbedding:
    return UnifiedEmbedding(
        **({"positives": 2, "threshold": 3.0, "middle": "query_encoder.layers.0"} | options)
    )


def state_of(batch: Batch, method: UnifiedEmbedding) -> State:
    state = State(new_model(), batch=batch)
    method.setup(state)
    method.on_batch(state)
    state.outputs = state.model(state.batch.inputs)
    return state


def test_one_positive_and_no_negatives_is_cross_entropy():
    queries, documents = (F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1) for _ in range(2))
    loss = multi_positive_info_nce_loss(queries, documents.unsqueeze(1), None, 0.1)
    torch.testing.assert_close(loss, F.cross_entropy(queries @ documents.T / 0.1, torch.arange(6)))


def test_other_positives_of_a_query_are_no_candidates():
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1)
    positives = F.normalize(torch.randn(3, 2, 4, dtype=torch.float64), dim=2)
    negatives = F.normalize(torch.randn(3, 2, 4, dtype=torch.float64), dim=2)
    expected = []
    for m in range(2):
        candidates = torch.cat([positives[:, m], negatives.flatten(0, 1)])
        expected.append(F.cross_entropy(queries @ candidates.T / 0.1, torch.arange(3)))
    found = multi_positive_info_nce_loss(queries, positives, negatives, 0.1)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_queries_that_look_for_the_same_do_not_compete():
    queries = torch.eye(2)
    positives = torch.ones(2, 1, 2)
    assert multi_positive_info_nce_loss(queries, positives, ids=torch.tensor([3, 3])) == 0
    assert multi_positive_info_nce_loss(queries, positives) > 0.6


def test_each_batch_trains_on_its_own_losses():
    data = new_data()
    graded = data.subset(torch.arange(8)).all()
    state = state_of(graded, one := method())
    terms = one.terms(state)
    assert set(terms) == {"pearson", "rank_kl", "preference_order", "middle"}
    queries, documents = state.outputs
    cosines = (queries * documents).sum(1)
    torch.testing.assert_close(terms["pearson"], pearson_loss(cosines, graded.targets))
    torch.testing.assert_close(terms["rank_kl"], rank_kl_loss(cosines, graded.targets))
    search = data.subset(torch.arange(GRADED, GRADED + 8)).all()
    state = state_of(search, one := method())
    assert state.batch.inputs[1].shape == (24, 5)
    found = one.terms(state)
    documents = state.outputs[1].unflatten(0, (8, 3))
    expected = multi_positive_info_nce_loss(
        state.outputs[0], documents[:, :2], documents[:, 2:], ids=search.extras["document"]
    )
    assert set(found) == {"search"}
    torch.testing.assert_close(found["search"], expected)


def test_the_middle_layer_sees_pairs_graded_well_enough():
    graded = new_data().subset(torch.arange(8)).all()
    state = state_of(graded, one := method())
    value = one.terms(state)["middle"]
    layer = state.model.query_encoder.layers[0]
    first, second = (F.normalize(layer(side), dim=1) for side in (graded.inputs[0], graded.inputs[1][:, 0]))
    good = graded.targets >= 3
    logits = first[good] @ torch.cat([second[good], second[~good]]).T / 0.02
    torch.testing.assert_close(value, F.cross_entropy(logits, torch.arange(int(good.sum()))))
    none = method(threshold=9.0)
    assert none.terms(state_of(graded, none))["middle"] == 0


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    batches = [(b.inputs, b.targets, b.ids) for b in loader(new_data()).batches(0)]
    every = [Batch(i, t, ids, {"graded": ids < GRADED}) for i, t, ids in batches]
    check_loops(new_model, method, every)


def test_a_killed_run_resumes_bit_identically(tmp_path: Path):
    check_resume(new_model, method, loader(new_data()), tmp_path)


@pytest.mark.parametrize("graded", ["order", "info_nce"])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, graded: str):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            new_model().double(),
            loader(new_data(torch.float64)),
            methods=[method(graded=graded)],
            budget=Budget(steps=6),
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_nothing_stays_on_the_model():
    model = new_model()
    coloss.fit(model, loader(new_data()), methods=[method()], budget=Budget(steps=2))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_sampler_gives_one_task_at_a_time():
    sampler = SingleTaskSampler([10, 7], [4, 3])
    batches = list(sampler.batches(torch.Generator().manual_seed(0)))
    assert len(batches) == len(sampler) == 4
    assert {len(batch): {bool((batch >= 10).all()), bool((batch < 10).all())} for batch in batches} == {
        4: {False, True},
        3: {False, True},
    }
    positions = torch.cat(batches)
    assert positions.unique().numel() == positions.numel() == 14
    again = sampler.batches(torch.Generator().manual_seed(0))
    assert all(torch.equal(one, other) for one, other in zip(batches, again))


def test_bad_input_is_named(as_users_call: None):
    for options, message in (
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"positives": 0}, "positives must be >= 1, got 0"),
        ({"graded": "mse"}, 'graded must be "order" or "info_nce", got \'mse\''),
        ({"weights": (1.0, 2.0)}, r"weights must be three numbers >= 0, got \[1.0, 2.0\]"),
        ({"search_weight": -1.0}, "search_weight must be >= 0 and finite, or a schedule, got -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            UnifiedEmbedding(**options)
    data = new_data()
    with pytest.raises(InputError, match="batches must hold one task each, got one of both"):
        coloss.fit(new_model(), data, methods=[method()], budget=Budget(steps=1), batch_size=48)
    with pytest.raises(InputError, match='batches must say in extras\\["graded"\\]'):
        coloss.fit(new_model(), (data.inputs[0],), methods=[method()], budget=Budget(steps=1))
    with pytest.raises(InputError, match="middle must be a module path of the model, got 'layer9'"):
        coloss.fit(new_model(), loader(data), methods=[method(middle="layer9")], budget=Budget(steps=1))
    with pytest.raises(InputError, match="inputs must hold positives = 4 documents for each query, got 3"):
        coloss.fit(new_model(), loader(data), methods=[method(positives=4)], budget=Budget(steps=4))
    for lengths, sizes, message in (
        ([3, 2], 3, r"batch_sizes must be in \[1, 2\] for set 1, got 3"),
        ([], 3, "batch_sizes must be one for each of at least one set, got 0 for 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SingleTaskSampler(lengths, sizes)


def test_the_claim_runs():
    found = verify("codiemb", smoke=True, seeds=1)
    assert {"both", "spearman", "precision@1"} <= set(found["arms"]["codiemb"]["metrics"])
