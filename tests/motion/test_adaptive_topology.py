"""Learnt links: equal to the plain graph at the start, gradients that reach every part, what is private."""

import pytest
import torch

from coloss.motion import AdaptiveGraphConv, AdaptiveTopology, add_adaptive_topology, split_state
from coloss.nn import GraphConv, RelationGraphConv, SkeletonEncoder
from coloss.ops import graph_partition
from coloss.train import load_model, save_model

ADJACENCY = graph_partition([-1, 0, 1, 0])


def test_the_sum_worked_by_hand():
    topology = AdaptiveTopology(torch.eye(2)[None], scales=(2.0, 3.0, 5.0))
    with torch.no_grad():
        topology.shared_matrix[0, 0, 1] = 1.0
        topology.private_matrix[0, 1, 0] = -1.0
    assert topology()[0].tolist() == [[2.0, 3.0], [-5.0, 2.0]]


def test_without_learnt_links_it_is_the_plain_graph_convolution():
    torch.manual_seed(0)
    plain = GraphConv(3, 4, ADJACENCY, "fixed")
    adaptive = AdaptiveGraphConv(3, 4, ADJACENCY)
    adaptive.project = plain.project
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(adaptive(x), plain(x))
    # Coefficients of 0 beside matrices that are not: still the plain graph.
    off = AdaptiveTopology(ADJACENCY, scales=(1.0, 0.0, 0.0), noise=1.0)
    assert torch.equal(off(), ADJACENCY)


@pytest.mark.parametrize("graph", ["fixed", "importance", "additive"])
def test_a_model_computes_the_same_after_the_swap(graph):
    torch.manual_seed(0)
    encoder = SkeletonEncoder(ADJACENCY, widths=(4, 8), strides=(1, 2), kernel=3, graph=graph).eval()
    with torch.no_grad():
        for block in encoder.blocks:
            if graph == "importance":
                block.graph.importance.uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 4)
    before = encoder(x)
    assert add_adaptive_topology(encoder) == 2
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder(x), before)
    with pytest.raises(ValueError, match="must hold GraphConv layers"):
        add_adaptive_topology(encoder)


def test_learnt_importances_are_stored_with_the_model(tmp_path):
    def encoder() -> SkeletonEncoder:
        return SkeletonEncoder(ADJACENCY, widths=(4,), strides=(1,), kernel=3).eval()

    torch.manual_seed(0)
    learnt, fresh = encoder(), encoder()
    with torch.no_grad():
        learnt.blocks[0].graph.importance.uniform_(0.5, 2)
    add_adaptive_topology(learnt)
    add_adaptive_topology(fresh)
    load_model(fresh, save_model(learnt, tmp_path / "model.safetensors"))
    x = torch.randn(2, 3, 8, 4)
    assert torch.equal(fresh(x), learnt(x))


def test_every_part_learns():
    layer = AdaptiveGraphConv(3, 4, ADJACENCY)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(4, 3, 5, 4)).square().mean().backward()
        # The matrices learn at once, their coefficients as soon as a matrix is not 0.
        assert layer.topology.shared_matrix.grad.abs().sum() > 0
        assert layer.topology.private_matrix.grad.abs().sum() > 0
        optimizer.step()
    assert layer.topology.shared_scale.grad.abs() > 0


def test_a_dead_start_is_refused():
    with pytest.raises(ValueError, match="neither would get a gradient"):
        AdaptiveTopology(ADJACENCY, scales=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="for private"):
        AdaptiveTopology(ADJACENCY, scales=(1.0, 1.0, 0.0))
    AdaptiveTopology(ADJACENCY, shared=False, scales=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match=r"adjacency must be \(subsets, joints, joints\), got \(0, 3, 3\)"):
        AdaptiveTopology(ADJACENCY[:0, :3, :3])
    with pytest.raises(ValueError, match="noise must be >= 0, got -1"):
        AdaptiveTopology(ADJACENCY, noise=-1.0)
    with pytest.raises(ValueError, match="must hold GraphConv layers"):
        add_adaptive_topology(RelationGraphConv(3, 4, ADJACENCY))


def test_noise_is_drawn_from_the_generator_alone():
    state = torch.get_rng_state()
    first, second = (
        AdaptiveTopology(ADJACENCY, noise=0.1, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.private_matrix, second.private_matrix)
    assert not torch.equal(first.private_matrix, first.shared_matrix)
    assert torch.equal(state, torch.get_rng_state())


def test_one_of_the_matrices_alone():
    shared = AdaptiveGraphConv(3, 4, ADJACENCY, private=False)
    assert shared.topology.private_names == ("adjacency", "fixed_scale", "shared_scale")
    private = AdaptiveGraphConv(3, 4, ADJACENCY, shared=False)
    assert "topology.private_matrix" in split_state(private, ("topology",))[1]
    assert set(split_state(private, ("topology",))[0]) == {"project.weight", "project.bias"}
    assert [name for name in private.state_dict() if "private" not in name and "scale" not in name] == [
        *("project.weight", "project.bias", "topology.adjacency"),
    ], "A is stored once"


def test_half_precision_gives_finite_maps():
    layer = AdaptiveGraphConv(3, 4, ADJACENCY).bfloat16()
    assert layer(torch.randn(2, 3, 5, 4, dtype=torch.bfloat16)).isfinite().all()
