"""Unified modalities, parts of a body, their networks and the fusion of scores."""

import math

import pytest
import torch
from contract import check_loops, check_resume
from torch import nn

from coloss import Budget, fit
from coloss.data import MotionClips, save_motion
from coloss.data.skeleton import SKELETONS, Skeleton
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.motion import (
    ARM_STRIDES,
    ARM_WIDTHS,
    BODY_STRIDES,
    BODY_WIDTHS,
    LEG_STRIDES,
    LEG_WIDTHS,
    MODALITIES,
    ClipCrops,
    PartStream,
    PartStreamEnsemble,
    PartStreamNet,
    fit_fusion_weights,
    fuse_scores,
    load_part_streams,
    random_stretches,
    streams_of_parts,
    train_part_streams,
    unify_modalities,
)
from coloss.nn import RelationGraphConv
from coloss.ops import graph_partition

MSR = SKELETONS["msr-action3d"]
TINY = {"widths": (4, 8), "strides": (1, 2)}


def clips(count: int = 2, frames: int = 6, joints: int = 20) -> torch.Tensor:
    return torch.randn(count, 3, frames, joints, generator=torch.Generator().manual_seed(0))


def test_bones_from_root_to_leaf_add_up_to_the_leaf():
    joints = clips()
    unified = unify_modalities(joints, MSR.parents)
    assert unified.shape == (2, 12, 6, 20)
    torch.testing.assert_close(unified[:, :3], joints)
    for leaf in range(20):
        along, at = torch.zeros(2, 3, 6), leaf
        while at >= 0:
            along, at = along + unified[:, 3:6, :, at], MSR.parents[at]
        torch.testing.assert_close(along, joints[..., leaf] - joints[..., MSR.root])
    torch.testing.assert_close(unified[:, 6:9, :-1], joints[:, :, 1:] - joints[:, :, :-1])
    assert (unified[:, 6:, -1] == 0).all() and (unified[:, 3:6, :, MSR.root] == 0).all()


def test_a_body_that_stands_still_has_no_steps_and_a_shift_changes_only_joints():
    still = clips(frames=1).expand(-1, -1, 5, -1)
    assert (unify_modalities(still, MSR.parents)[:, 6:] == 0).all()
    shifted = clips() + torch.tensor([3.0, -2, 1]).view(1, 3, 1, 1)
    difference = unify_modalities(shifted, MSR.parents) - unify_modalities(clips(), MSR.parents)
    torch.testing.assert_close(
        difference[:, :3], torch.tensor([3.0, -2, 1]).view(1, 3, 1, 1).expand(2, 3, 6, 20)
    )
    assert difference[:, 3:].abs().max() < 1e-5


def test_some_modalities_and_persons():
    five = clips()[..., None].expand(-1, -1, -1, -1, 2)
    assert unify_modalities(five, MSR.parents).shape == (2, 12, 6, 20, 2)
    bones = unify_modalities(clips(), MSR.parents, ("bone", "joint"))
    torch.testing.assert_close(bones[:, 3:], clips())
    with pytest.raises(ValueError, match="modalities must be among joint, bone"):
        unify_modalities(clips(), MSR.parents, ("speed",))


@pytest.mark.parametrize("name", ["bandai", "hdm05", "msr-action3d"])
def test_parts_are_connected_trees_at_the_joint_that_holds_them(name):
    skeleton = SKELETONS[name]
    streams = streams_of_parts(skeleton)
    assert streams["body"] == PartStream(tuple(range(skeleton.num_joints)), skeleton.parents)
    for stream, sides in (("arms", "arm"), ("legs", "leg")):
        part = streams[stream]
        assert set(part.joints[1:]) == {*skeleton.parts[f"left_{sides}"], *skeleton.parts[f"right_{sides}"]}
        assert part.parents[0] == -1 and part.parents.count(-1) == 1
        # Every bone of a limb is one of the body; both feet hang on their own shanks.
        for place, parent in enumerate(part.parents):
            if parent > 0:
                assert skeleton.parents[part.joints[place]] == part.joints[parent]
        left, right = (part.joints.index(skeleton.parts[f"{side}_{sides}"][-1]) for side in ("left", "right"))
        for leaf, side in ((left, "left"), (right, "right")):
            at = part.parents[leaf]
            while at > 0:
                assert part.joints[at] in skeleton.parts[f"{side}_{sides}"]
                at = part.parents[at]
    assert streams["legs"].joints[0] == skeleton.root


def test_parts_of_ones_own():
    hand = streams_of_parts(SKELETONS["sfinge-hands"])
    assert set(hand) == {"body", "thumb", "index", "middle", "ring", "little"}
    assert hand["index"].joints == (4, 5, 6, 7) and hand["index"].parents == (-1, 0, 1, 2)
    chosen = streams_of_parts(MSR, {"right": ("right_arm", "right_leg")})["right"]
    assert chosen.joints[0] == MSR.root and len(chosen.joints) == 9
    assert PartStream.of(Skeleton((-1, 0, 1, 2)), [3, 2], root=0) == PartStream((0, 3, 2), (-1, 2, 0))
    for bad, message in (
        (lambda: PartStream((0, 0), (-1, 0)), "joints must be distinct"),
        (lambda: PartStream((0, 1), (-1,)), "parents must be 2"),
        (lambda: PartStream((0, 1), (-1, -1)), "one root"),
        (lambda: PartStream.of(MSR, [25]), r"joints must be in \[0, 20\)"),
        (lambda: streams_of_parts(MSR, {"tail": ("tail",)}), "no part named 'tail'"),
    ):
        with pytest.raises(InputError, match=message):
            bad()


def test_a_part_of_all_joints_is_the_body():
    torch.manual_seed(0)
    body = PartStreamNet(streams_of_parts(MSR)["body"], 5, **TINY).eval()
    part = PartStreamNet(PartStream.of(MSR, range(20)), 5, **TINY).eval()
    part.load_state_dict(body.state_dict())
    torch.testing.assert_close(part(clips()), body(clips()))


def test_a_part_network_looks_at_its_joints_alone():
    legs = PartStreamNet(streams_of_parts(MSR)["legs"], 5, **TINY).eval()
    joints = clips()
    moved = joints.clone()
    moved[..., [0, 7, 9, 11, 19]] += 1  # left arm and head
    torch.testing.assert_close(legs(moved), legs(joints))
    # Positions are those of the whole body, not of the part: a shift changes the scores.
    assert not torch.allclose(legs(joints + 1), legs(joints))


def test_without_relations_the_layer_is_a_plain_graph_convolution():
    partition = graph_partition(MSR.parents, "directed")
    layer = RelationGraphConv(12, 8, partition).eval()
    x = torch.randn(2, 12, 6, 20)
    with torch.no_grad():
        layer.norm.weight.fill_(1.0)
        values = layer.values(x).unflatten(1, (3, 8))
        plain = torch.einsum("kuv,nkctv->nctu", partition, values)
        torch.testing.assert_close(layer(x), torch.relu(layer.norm(plain) + layer.shortcut(x)))
        layer.norm.weight.fill_(1e-6)  # as it begins: its shortcut
        torch.testing.assert_close(layer(x), torch.relu(layer.shortcut(x)), atol=1e-4, rtol=0)


def test_parameters_fall_with_the_part_and_twelve_channels_cost_little():
    def count(part, widths, strides, modalities=MODALITIES, classes=60):
        net = PartStreamNet(
            streams_of_parts(MSR)[part], classes, widths=widths, strides=strides, modalities=modalities
        )
        return sum(parameter.numel() for parameter in net.parameters())

    body = count("body", BODY_WIDTHS, BODY_STRIDES)
    arms, legs = count("arms", ARM_WIDTHS, ARM_STRIDES), count("legs", LEG_WIDTHS, LEG_STRIDES)
    assert body > arms > legs and 2.3e6 < body + arms + legs < 3.3e6  # 2.8 million in the paper
    assert body < 1.02 * count("body", BODY_WIDTHS, BODY_STRIDES, ("joint",))


def test_absent_persons_change_nothing():
    torch.manual_seed(0)
    net = PartStreamNet(streams_of_parts(MSR)["body"], 5, **TINY)
    alone = clips()[..., None]
    with_nobody = torch.cat([alone, torch.zeros_like(alone)], -1)
    torch.testing.assert_close(net(with_nobody), net(alone))


def test_who_stands_still_is_there():
    torch.manual_seed(0)
    net = PartStreamNet(streams_of_parts(MSR)["arms"], 5, modalities=("motion",), **TINY).eval()
    moves, still = clips(1)[..., None], clips(1, frames=1).expand(-1, -1, 6, -1)[..., None]
    both = net.encoded(torch.cat([moves, still], -1))
    torch.testing.assert_close(both, (net.encoded(moves) + net.encoded(still)) / 2)
    assert net.encoded(still).any()


def test_fused_scores():
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(fuse_scores([first, second]), (first + second) / 2)
    torch.testing.assert_close(fuse_scores([first, second], [2.0, 0.5]), 2 * first + 0.5 * second)
    for bad, message in (
        (lambda: fuse_scores([]), "scores must be at least one"),
        (lambda: fuse_scores([first, second[:2]]), "all of one shape"),
        (lambda: fuse_scores([first], [1.0, 2.0]), "weights must be 1 numbers >= 0"),
        (lambda: fuse_scores([first], [-1.0]), "weights must be 1 numbers >= 0"),
        (lambda: fit_fusion_weights([first], torch.tensor([0, 1])), "targets must be 4"),
        (lambda: fit_fusion_weights([first], torch.tensor([0, 1, 2, 3])), r"targets must be in \[0, 3\)"),
        (lambda: fit_fusion_weights([first * math.nan], torch.zeros(4, dtype=torch.int64)), "finite"),
        (lambda: PartStreamEnsemble({}), "nets must hold at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_fitted_weights_are_the_best_there_are():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (60,), generator=generator)
    scores = [
        quality * torch.eye(4)[targets] + torch.randn(60, 4, generator=generator)
        for quality in (2.0, 1.0, 0.0, -1.0)
    ]
    weights = fit_fusion_weights(scores, targets, penalty=0.0)
    assert weights[0] > weights[1] > weights[2] and weights[3] == 0

    def loss(given):
        return nn.functional.cross_entropy(fuse_scores(scores, given), targets).item()

    best = loss(weights)
    for index in range(3):
        for change in (-0.05, 0.05):
            other = weights.clone()
            other[index] = (other[index] + change).clamp_min(0)
            assert loss(other) >= best - 1e-6
    strong = fit_fusion_weights(scores, targets, penalty=1e6)
    torch.testing.assert_close(strong, torch.full((4,), 0.25), atol=1e-3, rtol=0)


def test_one_loss_trains_all_networks():
    torch.manual_seed(0)
    streams = streams_of_parts(MSR)
    ensemble = PartStreamEnsemble(
        {name: PartStreamNet(stream, 3, **TINY) for name, stream in streams.items()}
    )
    before = {name: value.clone() for name, value in ensemble.named_parameters()}
    data = (clips(8), torch.arange(8) % 3)
    fit(ensemble, data, nn.functional.cross_entropy, [ClipCrops()], budget=Budget(steps=2), batch_size=8)
    for name in streams:
        weight = f"nets.{name}.classifier.weight"
        assert not torch.equal(before[weight], dict(ensemble.named_parameters())[weight])


def test_stretches_stay_within_the_clip():
    ramp = torch.arange(12.0).view(1, 1, 12, 1).expand(40, 3, 12, 2)
    found = random_stretches(ramp, 0.5, torch.Generator().manual_seed(0))
    steps = found.diff(dim=2)
    assert found.min() >= 0 and found.max() <= 11 and steps.min() >= 0.5 - 1e-5 and steps.max() <= 1 + 1e-5
    assert (
        steps.std(dim=2).max() < 1e-4 and steps[:, 0, 0, 0].std() > 0.05
    )  # even within a clip, other ones in another
    torch.testing.assert_close(random_stretches(ramp, 1.0), ramp)
    assert random_stretches(ramp[:, :, :1], 0.5).shape == (40, 3, 1, 2)
    with pytest.raises(ValueError, match=r"shortest must be in \(0, 1\], got 0"):
        random_stretches(ramp, 0.0)
    with pytest.raises(ValueError, match="degrees must be >= 0"):
        ClipCrops(degrees=-1.0)


def test_crops_in_every_loop_and_after_a_kill(tmp_path):
    def new_model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 2))

    data = (torch.randn(16, 3, 4, 5), torch.arange(16) % 2)
    batches = [(data[0][k : k + 8], data[1][k : k + 8]) for k in (0, 8)]
    check_loops(new_model, ClipCrops, batches, nn.functional.cross_entropy, epochs=1)
    check_resume(new_model, ClipCrops, data, tmp_path, nn.functional.cross_entropy, steps=6, kill_at=4)


def test_trained_stored_and_used_again(tmp_path):
    generator = torch.Generator().manual_seed(0)
    joints = [torch.randn(9 + k, 5, 3, generator=generator).numpy() for k in range(12)]
    skeleton = Skeleton((-1, 0, 1, 0, 3), parts={"left": (1, 2)})
    own = MotionClips.from_list(
        joints, skeleton, 15, labels={"action": [0, 1] * 6}, split=[0] * 6 + [1] * 2 + [2] * 4
    )
    save_motion(tmp_path / "own.npz", own)
    run = tmp_path / "run"
    metrics = train_part_streams(tmp_path / "own.npz", run, budget=Budget(steps=2))
    assert {"accuracy", "accuracy_left", "weight_body", "raw_knn_accuracy"} <= metrics.keys()
    model = load_part_streams(run)
    again = train_part_streams(tmp_path / "own.npz", run, budget=Budget(steps=2))
    assert again == metrics
    probabilities = model.probabilities(own.select(range(8, 12)))
    right = probabilities.argmax(-1) == torch.tensor([0, 1, 0, 1])
    assert right.float().mean().item() == pytest.approx(metrics["accuracy"])
    with pytest.raises(InputError, match="clips must have the skeleton of 5 joints .* got another of 6"):
        model.probabilities(
            MotionClips.from_list([joints[0][:, [0, 1, 2, 3, 4, 4]]], Skeleton((-1, 0, 1, 0, 3, 4)), 15)
        )
    gap, never = joints[0].copy(), joints[0].copy()
    gap[2:5, 3], never[:, 3] = math.nan, math.nan
    assert model.probabilities(MotionClips.from_list([gap], skeleton, 15)).isfinite().all()
    with pytest.raises(InputError, match="a joint of clip '1' is never seen"):
        model.probabilities(MotionClips.from_list([gap, never], skeleton, 15))
    joint = train_part_streams(
        tmp_path / "own.npz", tmp_path / "joint", together=True, budget=Budget(steps=2)
    )
    assert joint["weight_left"] == pytest.approx(1 / 2)
    with pytest.raises(InputError, match="other settings"):
        train_part_streams(tmp_path / "own.npz", run, together=True, budget=Budget(steps=2))
    with pytest.raises(InputError, match='size must be "small" or "paper"'):
        train_part_streams(tmp_path / "own.npz", run, size="big")
    (run / "run.json").write_text("{}")
    with pytest.raises(InputError, match="holds no part streams"):
        load_part_streams(run)


def test_the_claim_runs():
    found = verify("psumnet", smoke=True, seeds=1)
    arms = {name: arm["metrics"] for name, arm in found["arms"].items()}
    parameters = {name: arm["parameters"]["mean"] for name, arm in arms.items() if "parameters" in arm}
    assert parameters["unified modalities"] < 1.02 * parameters["joints"]
    assert parameters["four networks, one for each modality"] == 4 * parameters["joints"]
    assert 0 <= arms["neighbours by raw coordinates"]["accuracy"]["mean"] <= 1
