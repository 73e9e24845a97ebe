"""PamC finds the clusters of a graph whatever the order and number of processes; meta-nodes serve views with any source of clusters."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.contrastive import MetaNodeViews, PamC, influence, knn_graph, meta_node_contrast_loss
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.lab.arms import build_arm, parse_arm
from coloss.lab.claims import verify
from coloss.lab.tasks import find_task
from coloss.metrics import clustering_accuracy
from coloss.nn import MLP, Classifier
from coloss.train import Budget, Setting, State, TrainingStep


def fixed(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Views that do not depend on the process that makes them."""
    return torch.stack([inputs, 0.5 * inputs + 0.1])


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs + 0.1 * torch.randn(2, *inputs.shape, generator=generator)


def clouds(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(32, 6, generator=generator) + 10 * torch.eye(6)[torch.arange(32) % 4]
    return IndexedDataset(points.to(dtype), torch.arange(32) % 4)


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MLP(6, (8,), 5, norm=None)


def graph() -> Tensor:
    return influence(knn_graph(clouds().inputs, 3), 2)


def pamc(**options) -> PamC:
    return PamC(graph(), **({"clusters": 4} | options))


def views(**options) -> MetaNodeViews:
    return MetaNodeViews(**({"view": noisy, "projector": (8, 4), "clusters": 3} | options))


def test_it_finds_clouds_and_needs_no_graph_afterwards():
    method = pamc()
    run = coloss.fit(new_model(), clouds(), methods=[method], budget=Budget(epochs=60), batch_size=32)
    embeddings = run.model(clouds().inputs)
    assert clustering_accuracy(method.predict(embeddings), clouds().targets) > 0.9
    terms = [point.terms["clustering"] + point.terms["meta_node_contrast"] for point in run.history]
    assert terms[-1] < terms[0]
    assert sorted(run.model.state_dict()) == sorted(new_model().state_dict())
    assert sorted(method.state_dict()) == ["assignment.centres", "initialized"]


def terms_of(method: PamC, rows: Tensor, data: IndexedDataset) -> dict[str, Tensor]:
    model = new_model()
    step = TrainingStep(model, None, [method])
    method.assignment.centres.data = torch.linspace(-1, 1, 20).reshape(4, 5)
    method.initialized.fill_(True)
    return step(coloss.data.Batch(data.inputs[rows], None, data.ids[rows]))


@pytest.mark.parametrize("soft", [False, True])
def test_its_loss_is_that_of_the_graph_in_any_order_of_the_nodes(soft):
    data, adjacency = clouds(), graph()
    method = pamc(soft=soft, inverse_temperature=1.5, size_weighted=True)
    terms = terms_of(method, torch.arange(32), data)
    shares = method.assignment(new_model()(data.inputs))
    expected = meta_node_contrast_loss(
        new_model()(data.inputs),
        adjacency.indices(),
        shares.detach() if soft else shares.argmax(1),
        weights=adjacency.values(),
        inverse_temperature=1.5,
        size_weighted=True,
    )
    torch.testing.assert_close(terms["meta_node_contrast"], expected)
    shuffled = terms_of(
        pamc(soft=soft, inverse_temperature=1.5, size_weighted=True), torch.randperm(32), data
    )
    for name, term in terms.items():
        torch.testing.assert_close(shuffled[name], term)


def test_a_part_of_the_nodes_has_the_edges_within_it():
    rows = torch.tensor([3, 30, 7, 11, 0])
    adjacency = graph().to_dense()[rows][:, rows].to_sparse_coo().coalesce()
    method = pamc(exact=True)
    term = terms_of(method, rows, clouds())["meta_node_contrast"]
    expected = meta_node_contrast_loss(
        new_model()(clouds().inputs[rows]), adjacency.indices(), weights=adjacency.values(), exact=True
    )
    torch.testing.assert_close(term, expected)


def test_dense_and_sparse_graphs_are_one():
    results = []
    for adjacency in (graph(), graph().to_dense()):
        method = PamC(adjacency, clusters=4)
        results.append(terms_of(method, torch.arange(32), clouds())["meta_node_contrast"])
    torch.testing.assert_close(*results)


def test_it_goes_beside_an_objective():
    run = coloss.fit(
        Classifier(new_model(), 4), clouds(), F.cross_entropy, [pamc()], budget=Budget(steps=2), batch_size=32
    )
    assert sorted(run.history[-1].terms) == ["clustering", "cross_entropy", "meta_node_contrast"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"soft": True},
        {"exact": True},
        {"size_weighted": True},
        {"cluster_ids": torch.arange(32) % 5},
        {"cluster_ids": torch.eye(5)[torch.arange(32) % 5]},
    ],
)
def test_views_with_every_source_of_clusters(options):
    run = coloss.fit(
        new_model(),
        IndexedDataset(clouds().inputs),
        methods=[views(**options)],
        budget=Budget(steps=40),
        batch_size=32,
    )
    losses = [point.terms["meta_node_contrast"] for point in run.history]
    assert losses[-1] < losses[0] - 0.1


class Rows(nn.Module):
    """Gives its input back, as an embedding."""

    out_features = 6

    def forward(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("exact", [False, True])
def test_the_loss_on_views_is_that_of_pairs_of_views_and_clusters_of_samples(exact):
    data = clouds()
    method = views(view=fixed, labels=True, exact=exact, inverse_temperature=3.0)
    method.new_projector = lambda in_features: nn.Linear(6, 6)
    step = TrainingStep(Rows(), None, [method])
    term = step(data.inputs, data.targets)["meta_node_contrast"]
    rows = method.projector(fixed(data.inputs).flatten(0, 1))
    pairs = torch.stack([torch.arange(64), torch.arange(64).roll(32)])
    expected = meta_node_contrast_loss(
        rows, pairs, data.targets.repeat(2), inverse_temperature=3.0, exact=exact
    )
    torch.testing.assert_close(term, expected)


def test_clusters_of_a_batch_hold_both_views_of_a_sample():
    method = views(view=fixed, clusters=4)
    step = TrainingStep(new_model(), None, [method])
    found = method._clusters_of_batch(torch.randn(2, 9, 3), State(step.model))
    assert found.shape == (9,) and found.max() < 4
    shares = views(soft=True, clusters=4)._clusters_of_batch(torch.randn(2, 9, 3), State(step.model))
    assert shares.shape == (9, 4)
    torch.testing.assert_close(shares.sum(1), torch.ones(9))
    assert views(clusters=8)._clusters_of_batch(torch.randn(2, 3, 3), State(step.model)).shape == (3,)


def test_the_lab_builds_it_from_what_people_type():
    task = find_task("digits-ssl", limit=40)
    (built,) = build_arm(parse_arm("pamc:clusters=4:soft=true", task)).methods(Setting.of(task, 0))
    run = Setting.of(task, 0, Budget(steps=2)).fit(task.model(task.load(0)), methods=[built])
    assert built.clusters == 4 and set(run.history[-1].terms) == {"meta_node_contrast"}


def test_bad_input_is_named(as_users_call):
    ids = torch.arange(32)
    for build, message in (
        (lambda: PamC(torch.zeros(2, 3)), r"adjacency must be a square matrix, got shape \(2, 3\)"),
        (lambda: PamC(-torch.eye(3)), "adjacency must be >= 0, got -1.0"),
        (lambda: pamc(clusters=1), "clusters must be >= 2, got 1"),
        (
            lambda: pamc(contrast_weight=-1.0),
            "contrast_weight must be >= 0 and finite, or a schedule, got -1.0",
        ),
        (lambda: pamc(degrees=0.0), "degrees must be > 0 and finite, got 0.0"),
        (lambda: views(clusters=1), "clusters must be >= 2, got 1"),
        (lambda: views(inverse_temperature=-2.0), "inverse_temperature must be >= 0 and finite"),
        (lambda: views(labels=True, cluster_ids=ids), "give cluster_ids or labels=True, not both"),
        (lambda: views(cluster_ids=ids.float()), r"cluster_ids must be integers \(ids,\) or shares"),
        (lambda: MetaNodeViews(views=1), "views must be >= 2, got 1"),
    ):
        with pytest.raises(InputError, match=message):
            build()
    inputs = clouds().inputs
    for method, data, message in (
        (PamC(torch.eye(20), clusters=4), clouds(), r"ids must be in \[0, 20\), the nodes of the graph, got"),
        (pamc(clusters=40), clouds(), "the first batch must start the clusters: .* 40 clusters, got 32"),
        (views(labels=True), (inputs,), "labels=True needs one class index"),
        (
            views(cluster_ids=ids[:9]),
            clouds(),
            "cluster_ids must name a cluster for every id, got 9 for ids up to",
        ),
    ):
        with pytest.raises(InputError, match=message):
            coloss.fit(new_model(), data, methods=[method], budget=Budget(steps=1), batch_size=32)
    step = TrainingStep(new_model(), None, [pamc()])
    with pytest.raises(InputError, match="PamC needs the id of each node of the batch"):
        step(inputs)
    with pytest.raises(InputError, match="a batch must hold each node once, got repeated ids"):
        step(coloss.data.Batch(inputs, None, ids // 2))


def test_half_precision():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    for method in (pamc(), views(), views(soft=True)):
        run = coloss.fit(
            new_model(), clouds(), methods=[method], budget=Budget(steps=2), batch_size=32, fabric=fabric
        )
        assert all(torch.tensor(list(run.history[-1].terms.values())).isfinite())


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    batches = [(part,) for part in clouds().inputs.split(8)]
    check_loops(new_model, views, batches, epochs=1)


@pytest.mark.parametrize("method", [partial(pamc, clusters=2), views])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, method):
    check_resume(new_model, method, clouds(), tmp_path)


@pytest.mark.parametrize(
    "method",
    [
        pamc,
        partial(pamc, soft=True),
        partial(views, view=fixed, labels=True),
        partial(views, view=fixed, cluster_ids=torch.rand(32, 3, dtype=torch.float64).softmax(1)),
        partial(views, view=fixed, exact=True),
    ],
)
def test_two_processes_take_the_steps_of_one(tmp_path: Path, method):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            new_model().double(),
            clouds(torch.float64),
            methods=[method()],
            budget=Budget(steps=4),
            batch_size=32,
            fabric=fabric,
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_the_claim_runs():
    found = verify("pamc", smoke=True, seeds=1)
    assert {"PamC", "KL alone", "KL and exact contrast", "k-means"} <= set(found["arms"])
    assert found["metric"] in found["arms"]["PamC"]["metrics"]
