import pytest
import torch
from torch import nn

from coloss.nn import (
    GraphConv,
    MultiScaleTemporalConv,
    RelationGraphConv,
    SkeletonBlock,
    SkeletonEncoder,
    masked_pool,
)
from coloss.ops import graph_partition

PARENTS = [-1, 0, 1, 1]
PARTITION = graph_partition(PARENTS)


def test_graph_convolution_is_the_sum_over_subsets_and_joints() -> None:
    layer = GraphConv(3, 5, PARTITION, "fixed")
    maps = torch.randn(2, 3, 6, 4)
    weight, bias = layer.project.weight[..., 0, 0].view(3, 5, 3), layer.project.bias.view(3, 5)
    expected = torch.zeros(2, 5, 6, 4)
    for k in range(3):
        values = torch.einsum("oc,nctv->notv", weight[k], maps) + bias[k].view(1, 5, 1, 1)
        for u in range(4):
            for v in range(4):
                expected[..., u] += PARTITION[k, u, v] * values[..., v]
    assert torch.allclose(layer(maps), expected, atol=1e-6)


def test_learnt_adjacencies_begin_at_the_partition() -> None:
    for weighting in ("fixed", "importance", "additive"):
        assert torch.equal(GraphConv(3, 4, PARTITION, weighting).adjacency(), PARTITION)
    layer = GraphConv(3, 4, PARTITION)
    with torch.no_grad():
        layer.importance.fill_(2.0)
    assert torch.equal(layer.adjacency() == 0, PARTITION == 0)  # only bones pass anything


def test_a_joint_hears_only_those_within_reach() -> None:
    chain = graph_partition([-1, 0, 1, 2, 3])
    layers = nn.Sequential(GraphConv(2, 2, chain), GraphConv(2, 2, chain))
    maps = torch.randn(1, 2, 1, 5, requires_grad=True)
    layers(maps)[..., 0].sum().backward()
    reach = maps.grad.abs().sum((0, 1, 2)) > 0
    assert reach.tolist() == [True, True, True, False, False]


def test_relations_without_weight_are_a_plain_graph_convolution() -> None:
    layer = RelationGraphConv(6, 8, graph_partition(PARENTS, "directed")).eval()
    maps = torch.randn(2, 6, 5, 4)
    assert torch.equal(layer.adjacency(maps)[0, :, 3], graph_partition(PARENTS, "directed"))
    # The gain 1e-6 of the normalisation makes a new layer its shortcut.
    assert torch.allclose(layer(maps), torch.relu(layer.shortcut(maps)), atol=1e-4)
    with torch.no_grad():
        layer.alpha.fill_(1.0)
    adjacency = layer.adjacency(maps)
    assert not torch.allclose(adjacency[0], adjacency[1])  # now each clip has its own


def test_relation_of_two_joints_is_the_weighted_tanh_of_their_difference() -> None:
    layer = RelationGraphConv(6, 8, PARTITION[:1])
    with torch.no_grad():
        layer.alpha.fill_(0.5)
    maps = torch.randn(1, 6, 5, 4)
    one = layer.receiving(maps).mean(2)[0, :, 2]
    other = layer.giving(maps).mean(2)[0, :, 3]
    relation = layer.relation(torch.tanh(one - other).view(1, -1, 1, 1)).flatten()
    expected = 0.5 * relation + PARTITION[0, 2, 3]
    assert torch.allclose(layer.adjacency(maps)[0, 0, :, 2, 3], expected, atol=1e-6)


def test_channels_of_the_relation_do_not_vanish_for_four_streams() -> None:
    assert RelationGraphConv(12, 16, PARTITION).reduced == 8
    assert RelationGraphConv(128, 16, PARTITION).reduced == 16


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_branches_of_time_agree_on_the_number_of_frames(stride: int) -> None:
    out = MultiScaleTemporalConv(8, 16, stride)(torch.randn(2, 8, 11, 4))
    assert out.shape == (2, 16, -(-11 // stride), 4)


@pytest.mark.parametrize("graph", ["importance", "relation"])
def test_encoder_pools_its_maps(graph) -> None:
    encoder = SkeletonEncoder(PARTITION, widths=(8, 16), strides=(1, 2), graph=graph).eval()
    clips = torch.randn(3, 3, 8, 4)
    maps = encoder.maps(clips)
    assert maps.shape == (3, 16, 4, 4) and encoder.stride == 2 and encoder.out_features == 16
    assert torch.allclose(encoder(clips), maps.mean((2, 3)), atol=1e-6)
    assert torch.allclose(encoder(clips[..., None]), encoder(clips))


def test_persons_that_are_not_there_change_nothing() -> None:
    torch.manual_seed(1)
    encoder = SkeletonEncoder(PARTITION, widths=(8,), strides=(1,))
    clips = torch.randn(3, 3, 8, 4)
    alone = encoder(clips)
    statistics = encoder.norm.running_mean.clone()
    encoder.norm.reset_running_stats()
    joined = torch.stack([clips, torch.zeros_like(clips)], -1)
    assert torch.allclose(encoder(joined), alone, atol=1e-6)
    assert torch.allclose(encoder.norm.running_mean, statistics, atol=1e-6)
    assert encoder.maps(joined).shape[0] == 6
    twice = torch.stack([clips, clips], -1)
    assert torch.allclose(encoder.eval()(twice), encoder(clips), atol=1e-6)
    assert torch.equal(encoder(torch.zeros(2, 3, 8, 4)), torch.zeros(2, 8))


@pytest.mark.parametrize("persons", [0, 2])
def test_clips_without_anybody_leave_the_statistics_alone(persons: int) -> None:
    encoder = SkeletonEncoder(PARTITION, widths=(8, 6), strides=(1, 2))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert torch.equal(encoder(torch.zeros(2, 3, 7, 4, persons)), torch.zeros(2, 6))
    assert encoder.maps(torch.zeros(2, 3, 7, 4, persons)).shape == (2 * persons, 6, 4, 4)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_a_batch_of_no_clips_has_no_vectors() -> None:
    encoder = SkeletonEncoder(PARTITION, widths=(8, 6), strides=(1, 2))
    assert encoder(torch.zeros(0, 3, 7, 4)).shape == (0, 6)
    assert encoder.maps(torch.zeros(0, 3, 7, 4, 2)).shape == (0, 6, 4, 4)
    assert bool(encoder.norm.running_mean.isfinite().all())


def test_the_caller_may_say_who_is_present() -> None:
    torch.manual_seed(2)
    encoder = SkeletonEncoder(PARTITION, widths=(8,), strides=(1,)).eval()
    clips = torch.randn(2, 3, 8, 4, 2)
    first = torch.tensor([[True, False], [True, False]])
    assert torch.allclose(encoder(clips, first), encoder(clips[..., :1]), atol=1e-6)
    with pytest.raises(ValueError, match=r"present must be \(2, 2\), got \(2, 1\)"):
        encoder(clips, first[:, :1])


def test_each_joint_has_its_own_normalisation() -> None:
    encoder = SkeletonEncoder(PARTITION, widths=(8,), strides=(1,))
    clips = torch.randn(16, 3, 8, 4)
    scale = torch.tensor([1.0, 10.0, 0.1, 5.0])
    assert torch.allclose(encoder(clips), encoder(clips * scale + 3), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_finite_vectors_and_gradients(dtype) -> None:
    encoder = SkeletonEncoder(PARTITION, widths=(8, 8), strides=(1, 2), graph="relation")
    with torch.autocast("cpu", dtype):
        out = encoder(torch.randn(4, 3, 8, 4))
    out.float().square().sum().backward()
    assert bool(out.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters() if p.grad is not None)


def test_regions_pooled_apart_add_up_to_the_whole() -> None:
    maps = torch.randn(3, 5, 4, 6)
    mask = torch.rand(3, 4, 6) < 0.4
    inside, outside = masked_pool(maps, mask)
    count = mask.flatten(1).sum(1, keepdim=True)
    assert torch.allclose(inside * count + outside * (24 - count), maps.flatten(2).sum(2), atol=1e-4)
    everything, nothing = masked_pool(maps, torch.ones(4, 6, dtype=torch.bool))
    assert torch.allclose(everything, maps.mean((2, 3)), atol=1e-6) and torch.equal(
        nothing, torch.zeros(3, 5)
    )


def test_regions_of_half_precision_do_not_overflow() -> None:
    maps = torch.full((1, 1, 70, 100), 30.0, dtype=torch.float16)
    mask = torch.arange(100) < 50
    inside, outside = masked_pool(maps, mask.expand(70, 100))
    assert inside.dtype == torch.float16
    assert inside.tolist() == outside.tolist() == [[30.0]]


def test_a_nan_stays_in_its_region() -> None:
    maps = torch.ones(1, 2, 4)
    maps[0, 0, 3] = torch.nan
    inside, outside = masked_pool(maps, torch.tensor([True, True, False, False]))
    assert inside.tolist() == [[1, 1]] and bool(outside[0, 0].isnan())


def test_bad_arguments_are_named(as_users_call) -> None:
    with pytest.raises(ValueError, match=r"partition must be \(subsets, joints, joints\), got \(4, 4\)"):
        GraphConv(3, 4, PARTITION[0])
    with pytest.raises(ValueError, match="weighting must be one of fixed, .*, got 'loud'"):
        GraphConv(3, 4, PARTITION, "loud")
    with pytest.raises(ValueError, match="out_channels must be a multiple of 4, got 6"):
        MultiScaleTemporalConv(4, 6)
    with pytest.raises(ValueError, match="stride must be >= 1, got 0"):
        MultiScaleTemporalConv(4, 8, 0)
    with pytest.raises(ValueError, match="kernel must be odd and >= 1, got 4"):
        SkeletonBlock(3, 4, PARTITION, kernel=4)
    with pytest.raises(ValueError, match="widths and strides must be as many numbers"):
        SkeletonEncoder(PARTITION, widths=(4, 8), strides=(1,))
    with pytest.raises(
        ValueError, match=r"clips must be \(clips, 3 channels, frames, 4 joints\).*got \(2, 3, 8, 5\)"
    ):
        SkeletonEncoder(PARTITION)(torch.zeros(2, 3, 8, 5))
    with pytest.raises(ValueError, match=r"mask must be \(4, 6\) or \(3, 4, 6\), got \(6,\)"):
        masked_pool(torch.zeros(3, 5, 4, 6), torch.zeros(6, dtype=torch.bool))
