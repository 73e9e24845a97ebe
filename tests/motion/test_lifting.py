from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coloss.data.skeleton import SKELETONS
from coloss.motion import GraphMLPLifter, ResidualLifter
from coloss.ops import graph_partition

PARENTS, MIRROR = (-1, 0, 1, 0, 3), (0, 3, 4, 1, 2)


def lifters() -> list[nn.Module]:
    return [ResidualLifter(5, 16, 1), GraphMLPLifter(PARENTS, MIRROR, 8, 2)]


def test_the_root_is_exactly_zero_in_training_and_evaluation() -> None:
    image = torch.randn(6, 5, 2)
    for lifter in lifters():
        for mode in (True, False):
            assert torch.equal(lifter.train(mode)(image)[:, 0], torch.zeros(6, 3))
    absolute, relative = (ResidualLifter(5, 16, 1, root=root).eval() for root in (None, 3))
    relative.load_state_dict(absolute.state_dict())
    whole = absolute(image)
    torch.testing.assert_close(relative(image), whole - whole[:, 3:4])


def test_the_residual_lifter_written_out() -> None:
    lifter, image = ResidualLifter(5, 8, 1, root=None).eval(), torch.randn(3, 5, 2)
    for module in lifter.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean, module.running_var = torch.randn(8), torch.rand(8) + 0.5

    def layer(x: Tensor, linear: Any, norm: Any) -> Tensor:
        x = (x @ linear.weight.T - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
        return (x * norm.weight + norm.bias).relu()

    hidden = layer(image.flatten(1), lifter.stem[0], lifter.stem[1])
    block: Any = lifter.blocks[0]
    hidden = hidden + layer(layer(hidden, block[0], block[1]), block[4], block[5])
    expected = (hidden @ lifter.head.weight.T + lifter.head.bias).unflatten(1, (5, 3))
    torch.testing.assert_close(lifter(image), expected)


def test_the_graph_mlp_block_is_a_graph_convolution_and_two_mlps() -> None:
    block: Any = GraphMLPLifter(PARENTS, MIRROR, 8, 1).blocks[0]
    x = torch.randn(2, 5, 8)
    partition = graph_partition(PARENTS, "symmetric", mirror=MIRROR)
    weight = block.graph.project.weight[:, :, 0, 0].unflatten(0, (4, 8))
    bias = block.graph.project.bias.unflatten(0, (4, 8))
    mapped = torch.einsum("bvc,kdc->kbvd", block.graph_norm(x), weight) + bias[:, None, None]
    x1 = x + torch.einsum("kuv,kbvd->bud", partition, mapped)
    channels = block.channels(block.channel_norm(x1))
    joints = block.over_joints(block.joint_norm(x1).mT).mT
    torch.testing.assert_close(block(x), x1 + channels + joints)
    assert [layer.out_features for layer in [*block.over_joints.before, *block.over_joints.after]] == [
        15,
        30,
        15,
        5,
    ]
    assert [layer.out_features for layer in [*block.channels.before, *block.channels.after]] == [4, 8]


def test_dropped_paths_keep_the_mean_and_are_off_in_evaluation() -> None:
    lifter = GraphMLPLifter(PARENTS, MIRROR, 8, 3, drop_path=0.4)
    assert [block.drop_path for block in lifter.blocks] == [0.0, 0.2, 0.4]
    branch = torch.ones(2000, 5, 8)
    dropped = lifter.blocks[2]._dropped(branch)
    assert dropped.mean().item() == pytest.approx(1, abs=0.08)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert torch.equal(lifter.eval().blocks[2]._dropped(branch), branch)


def test_lifters_fit_any_skeleton() -> None:
    for name in ("bandai", "hdm05"):
        skeleton = SKELETONS[name]
        assert skeleton.mirror is not None
        image = torch.randn(2, skeleton.num_joints, 2)
        for lifter in (
            ResidualLifter(skeleton.num_joints, 8, 0),
            GraphMLPLifter(skeleton.parents, skeleton.mirror, 8, 1),
        ):
            assert lifter(image).shape == (2, skeleton.num_joints, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_stay_finite(dtype: torch.dtype) -> None:
    for lifter in lifters():
        found = lifter.to(dtype)(torch.randn(6, 5, 2, dtype=dtype))
        found.float().square().sum().backward()
        assert found.dtype == dtype and found.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in lifter.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResidualLifter(0), "joints must be >= 1, got 0"),
        (lambda: ResidualLifter(5, 0), "width must be >= 1, got 0"),
        (lambda: ResidualLifter(5, blocks=-1), "blocks must be >= 0, got -1"),
        (lambda: ResidualLifter(5, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: ResidualLifter(5, root=5), "root must be one of the 5 joints or None, got 5"),
        (lambda: GraphMLPLifter(PARENTS, MIRROR, 7), "width must be even and >= 2, got 7"),
        (lambda: GraphMLPLifter(PARENTS, MIRROR, blocks=0), "blocks must be >= 1, got 0"),
        (lambda: GraphMLPLifter(PARENTS, MIRROR, drop_path=1.0), r"drop_path must be in \[0, 1\), got 1.0"),
        (lambda: GraphMLPLifter(PARENTS, (0, 1)), "mirror must swap 5 joints in pairs"),
        (lambda: ResidualLifter(5)(torch.zeros(1, 4, 2)), r"image must be \(batch, 5, 2\), got \(1, 4, 2\)"),
        (lambda: lifters()[1](torch.zeros(1, 5, 3)), r"image must be \(batch, 5, 2\), got \(1, 5, 3\)"),
    ],
)
def test_bad_input_is_named(build: Any, message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        build()
