"""Meta-nodes are sums, the loss is its formula, and it meets the exact one where clusters are points."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from coloss.contrastive import MetaNodeContrast, meta_node_contrast_loss, meta_nodes

FLAGS = [
    {"exact": exact, "size_weighted": weighted, "exclude_self": excluded, "normalize": normalized}
    for exact, weighted in ((False, False), (False, True), (True, False))
    for excluded in (False, True)
    for normalized in (False, True)
]


def case(nodes: int = 9, clusters: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    embeddings = torch.randn(nodes, 4, dtype=torch.float64) * (1 + torch.arange(nodes)[:, None])
    near = torch.randint(nodes, (2 * nodes,))
    edges = torch.cat(
        [torch.stack([torch.arange(nodes).repeat(2), near]), torch.arange(nodes).expand(2, nodes)], 1
    ).unique(dim=1)
    weights = torch.rand(edges.shape[1], dtype=torch.float64)
    return embeddings, edges, weights, torch.arange(nodes) % clusters


def by_formula(
    embeddings, edges, weights, clusters, tau, *, exact, size_weighted, exclude_self, normalize
) -> float:
    """Both parts written out with dense matrices."""
    z = embeddings.numpy()
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)

    def cosines(rows):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        found = rows @ rows.T
        np.fill_diagonal(found, 0.0 if exclude_self else 1.0)
        return found

    near = np.zeros((len(z), len(z)))
    near[tuple(edges.numpy())] = weights.numpy()
    scores = np.exp(tau * cosines(z))
    attraction = np.log((near * scores).sum(1)).mean()
    if exact:
        return np.log(scores.sum(1)).mean() - attraction
    names = np.unique(clusters.numpy())
    sums = np.stack([(unit if normalize else z)[clusters.numpy() == name].sum(0) for name in names])
    sizes = np.array([(clusters.numpy() == name).sum() for name in names])
    pairs = np.exp(tau * cosines(sums))
    if not size_weighted:
        return np.log(pairs.sum(1)).mean() - attraction
    counts = np.tile(sizes, (len(sizes), 1)).astype(float)
    np.fill_diagonal(counts, 0.0)
    mine = (sizes - 1) * math.exp(tau) + np.diag(pairs)
    return (sizes / sizes.sum() * np.log((counts * pairs).sum(1) + mine)).sum() - attraction


@pytest.mark.parametrize("flags", FLAGS)
def test_equals_the_formula(flags):
    embeddings, edges, weights, clusters = case()
    for tau in (0.3, 4.0):
        loss = meta_node_contrast_loss(
            embeddings, edges, clusters, weights=weights, inverse_temperature=tau, **flags
        )
        assert loss.item() == pytest.approx(by_formula(embeddings, edges, weights, clusters, tau, **flags))


def test_sums_and_sizes_of_hard_and_soft_clusters():
    embeddings, _, _, clusters = case()
    sums, sizes = meta_nodes(embeddings, clusters, 5)
    np.testing.assert_allclose(sums[1], embeddings[1::3].numpy().sum(0))
    assert sizes.tolist() == [3, 3, 3, 0, 0] and not sums[3:].any()
    shares = torch.nn.functional.one_hot(clusters, 5).double()
    for one, other in zip(meta_nodes(embeddings, shares), (sums, sizes)):
        torch.testing.assert_close(one, other)
    shares = torch.rand(9, 3, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(meta_nodes(embeddings, shares)[0], shares.T @ embeddings)
    assert meta_nodes(embeddings[:0], clusters[:0])[0].shape == (0, 4)


def test_each_node_a_cluster_without_self_masking_is_the_exact_loss():
    embeddings, edges, weights, _ = case()
    losses = [
        meta_node_contrast_loss(
            embeddings, edges, torch.arange(9), weights=weights, exclude_self=False, exact=exact
        )
        for exact in (False, True)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_clusters_that_are_points_weighted_by_size_give_the_exact_loss(exclude_self):
    centres = torch.randn(3, 4, dtype=torch.float64)
    clusters = torch.tensor([0, 0, 0, 0, 1, 2, 2, 0])
    embeddings = centres[clusters]
    sums, _ = meta_nodes(embeddings, clusters)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(sums[0], sums[2], dim=0), cosine(centres[0], centres[2], dim=0))
    edges = torch.stack([torch.arange(8), torch.arange(8).roll(1)])
    losses = [
        meta_node_contrast_loss(
            embeddings, edges, clusters, inverse_temperature=3.0, exclude_self=exclude_self, **flags
        )
        for flags in ({"size_weighted": True}, {"exact": True})
    ]
    torch.testing.assert_close(*losses)


def test_without_temperature_only_numbers_are_left():
    embeddings, edges, weights, clusters = case()
    mass = torch.zeros(9, dtype=torch.float64).index_add(0, edges[0], weights)
    loss = meta_node_contrast_loss(embeddings, edges, clusters, weights=weights, inverse_temperature=0.0)
    assert loss.item() == pytest.approx(math.log(3) - mass.log().mean().item())


def test_lengths_matter_only_where_sums_are_not_normalized():
    embeddings, edges, weights, clusters = case()
    longer = embeddings * torch.rand(9, 1, dtype=torch.float64).add(0.1)

    def loss(rows, **options):
        return meta_node_contrast_loss(rows, edges, clusters, weights=weights, **options).item()

    assert loss(longer) == pytest.approx(loss(embeddings))
    assert loss(longer, exact=True) == pytest.approx(loss(embeddings, exact=True))
    assert loss(longer, normalize=False) != pytest.approx(loss(embeddings, normalize=False), abs=1e-4)


@pytest.mark.parametrize("size_weighted", [False, True])
def test_empty_clusters_are_left_out_wherever_they_are(size_weighted):
    embeddings, edges, weights, clusters = case()
    leaf = embeddings.requires_grad_()
    dense = meta_node_contrast_loss(leaf, edges, clusters, weights=weights, size_weighted=size_weighted)
    gaps = torch.tensor([1, 3, 6])[clusters]
    sparse = meta_node_contrast_loss(
        leaf, edges, gaps, weights=weights, clusters=9, size_weighted=size_weighted
    )
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in (sparse, dense)))


def test_a_small_and_a_large_cluster_repel_alike_unless_weighted():
    embeddings = torch.tensor([[1.0, 0.2], [1.0, 0.2], [1.0, 0.2], [0.2, 1.0]], dtype=torch.float64)
    edges, clusters = torch.arange(4).expand(2, 4), torch.tensor([0, 0, 0, 1])
    pushes = []
    for size_weighted in (False, True):
        leaf = embeddings.clone().requires_grad_()
        loss = meta_node_contrast_loss(leaf, edges, clusters, size_weighted=size_weighted)
        norms = torch.autograd.grad(loss, leaf)[0].norm(dim=1)
        pushes.append((norms[:3].sum() / norms[3]).item())
    assert pushes[0] == pytest.approx(1.0) == pushes[1]
    # Two clusters push each other equally; the weight shows in the value.
    assert meta_node_contrast_loss(embeddings, edges, clusters) != meta_node_contrast_loss(
        embeddings, edges, clusters, size_weighted=True
    )


@pytest.mark.parametrize("flags", [{}, {"size_weighted": True}, {"exact": True}, {"exclude_self": False}])
def test_gradients(flags):
    embeddings, edges, weights, clusters = case(7)

    def loss(rows):
        return meta_node_contrast_loss(
            rows, edges, clusters, weights=weights, inverse_temperature=2.0, **flags
        )

    assert torch.autograd.gradcheck(loss, embeddings.requires_grad_())


def finite(loss: Tensor, leaf: Tensor) -> bool:
    return bool(loss.isfinite() and torch.autograd.grad(loss, leaf)[0].isfinite().all())


@pytest.mark.parametrize("flags", [{}, {"size_weighted": True}, {"exact": True}])
def test_edge_cases_stay_finite(flags):
    edges = torch.tensor([[0, 1], [1, 0]])
    for rows, clusters in (
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], [0, 0, 1]),  # a sum that cancels
        ([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [0, 0, 0]),  # one cluster, one point
        ([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [0, 1, 2]),  # zero vectors
        ([[1e30, 0.0], [1e-30, 1.0], [0.0, 1e-30]], [0, 1, 1]),
    ):
        leaf = torch.tensor(rows).requires_grad_()
        loss = meta_node_contrast_loss(
            leaf, edges, torch.tensor(clusters), inverse_temperature=1000.0, **flags
        )
        assert finite(loss, leaf), (rows, flags)
    nothing = torch.zeros(0, 3, requires_grad=True)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert meta_node_contrast_loss(nothing, empty, torch.zeros(0, dtype=torch.int64), **flags) == 0
    leaf = torch.randn(4, 3, requires_grad=True)
    loss = meta_node_contrast_loss(leaf, empty, torch.arange(4), **flags)
    assert finite(loss, leaf) and loss > 0


def test_a_cancelled_sum_moves_nothing_far():
    leaf = torch.tensor([[1.0, 1e-9], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = meta_node_contrast_loss(leaf, torch.arange(3).expand(2, 3), torch.tensor([0, 0, 1]))
    assert torch.autograd.grad(loss, leaf)[0].abs().max() < 10


def test_nodes_without_neighbours_and_edges_without_weight_are_no_anchors():
    embeddings, _, _, clusters = case(4, 2)
    one = torch.tensor([[0], [1]])
    two = torch.tensor([[0, 2], [1, 3]])
    alone = meta_node_contrast_loss(embeddings, one, clusters)
    weighted = meta_node_contrast_loss(
        embeddings, two, clusters, weights=torch.tensor([1.0, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(alone, weighted)


@pytest.mark.parametrize("exact", [False, True])
def test_half_precision_is_computed_in_float32(exact):
    embeddings, edges, _, clusters = case()
    half = embeddings.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = meta_node_contrast_loss(half, edges, clusters, exact=exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(),
        meta_node_contrast_loss(half.double(), edges, clusters, exact=exact),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_module_is_the_function():
    embeddings, edges, weights, clusters = case()
    options = {"inverse_temperature": 3.0, "exclude_self": False, "size_weighted": True, "normalize": False}
    torch.testing.assert_close(
        MetaNodeContrast(**options)(embeddings, edges, clusters, weights, 4),
        meta_node_contrast_loss(embeddings, edges, clusters, weights=weights, clusters=4, **options),
    )


def test_bad_input_is_named(as_users_call):
    nodes, edges, clusters = torch.randn(3, 2), torch.tensor([[0], [1]]), torch.tensor([0, 1, 1])
    for call, message in (
        (lambda: MetaNodeContrast(-0.1), "inverse_temperature must be >= 0 and finite, got -0.1"),
        (
            lambda: meta_node_contrast_loss(nodes, edges, clusters, inverse_temperature=math.inf),
            "inverse_temperature must be >= 0 and finite, got inf",
        ),
        (lambda: meta_node_contrast_loss(nodes, edges), "assignments must be given unless exact=True"),
        (lambda: meta_node_contrast_loss(nodes, edges, clusters[:2]), "assignments must be 3, .* got 2"),
        (lambda: meta_node_contrast_loss(nodes, edges + 2, clusters), r"key numbers in \[0, 3\), got 3"),
        (
            lambda: meta_node_contrast_loss(nodes, edges, clusters, weights=torch.tensor([-1.0])),
            "weights must be >= 0, got -1.0",
        ),
        (
            lambda: meta_node_contrast_loss(nodes, edges, clusters, weights=torch.ones(2)),
            r"weights must have shape \(1,\), got \(2,\)",
        ),
        (lambda: meta_nodes(nodes, clusters, 1), r"index must be >= 0 and < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
