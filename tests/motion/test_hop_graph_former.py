import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coloss
from coloss import Budget
from coloss.data import Skeleton
from coloss.data.skeleton import COMMON
from coloss.lab.claims import verify
from coloss.motion import (
    HopAggregate,
    HopAttention,
    HopGraphFormer,
    LimbRefine,
    MirrorPoses,
    UncertainPose,
    limbs_of,
)
from coloss.ops import hop_distance, hop_masks

CHAIN = (-1, 0, 1, 2, 3, 4)
TREE = (-1, 0, 1, 2, 0, 4, 5)


def test_rings_begin_as_their_mean_and_empty_ones_are_zero() -> None:
    masks = hop_masks(TREE, 7)
    layer, x = HopAggregate(4, masks), torch.randn(2, 7, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4).expand(8, 4, 4))
    found = layer(x)
    for hop in range(8):
        for joint in range(7):
            ring = masks[hop, joint]
            expected = x[:, ring].mean(1) if ring.any() else torch.zeros(2, 4)
            torch.testing.assert_close(found[:, hop, joint], expected)
    assert not masks[7].any()
    with torch.no_grad():
        layer.logits.zero_()  # any constant within a ring is the mean
    torch.testing.assert_close(layer(x), found)


def test_ring_weights_are_a_softmax_inside_the_ring_with_finite_gradients_for_empty_ones() -> None:
    masks = hop_masks(CHAIN, 5)
    layer = HopAggregate(4, masks)
    with torch.no_grad():
        layer.logits.normal_()
    weights = layer.ring_weights()
    assert (weights[~masks] == 0).all()
    torch.testing.assert_close(weights.sum(-1), masks.any(-1).float())
    row = layer.logits[2, 2][[0, 4]].softmax(0)
    torch.testing.assert_close(weights[2, 2][[0, 4]], row)
    layer(torch.randn(2, 6, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.logits.grad is not None and (layer.logits.grad[~masks] == 0).all()


def test_with_no_hops_it_is_multi_head_attention() -> None:
    layer, x = HopAttention(8, 2, hop_masks(TREE, 0)), torch.randn(3, 7, 8)
    plain = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        value = layer.rings.weight[0]
        parts = [value @ layer.query[0], value @ layer.key[0], value]
        plain.in_proj_weight.copy_(torch.cat([part.T for part in parts]))
        plain.out_proj.weight.copy_(torch.eye(8))
    torch.testing.assert_close(layer(x), plain(x, x, x)[0], atol=1e-6, rtol=1e-5)


def test_all_hops_in_one_batch_are_the_equations_one_by_one() -> None:
    masks = hop_masks(TREE, 3)
    layer, x = HopAttention(6, 3, masks), torch.randn(2, 7, 6)
    with torch.no_grad():
        layer.rings.logits.normal_()
    weights, expected = layer.rings.ring_weights(), torch.zeros(2, 7, 6)
    for hop in range(4):
        group = weights[hop] @ x @ layer.rings.weight[hop]
        queries, keys = group @ layer.query[hop], group @ layer.key[hop]
        for head in range(3):
            part = slice(2 * head, 2 * head + 2)
            scores = queries[..., part] @ keys[..., part].mT / 2**0.5
            expected[..., part] += scores.softmax(-1) @ group[..., part]
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    off = HopAttention(6, 3, masks, attention=False)
    off.rings.load_state_dict(layer.rings.state_dict())
    torch.testing.assert_close(off(x), layer.rings(x).sum(1))


@pytest.mark.parametrize("attention", [True, False])
def test_permuting_joints_with_their_masks_permutes_the_result(attention: bool) -> None:
    order, masks = torch.randperm(7), hop_masks(TREE, 2)
    layer = HopAttention(8, 2, masks, attention=attention)
    turned = HopAttention(8, 2, masks[:, order][:, :, order], attention=attention)
    turned.load_state_dict(layer.state_dict() | {"rings.masks": turned.rings.masks})
    with torch.no_grad():
        layer.rings.logits.normal_()
        turned.rings.logits.copy_(layer.rings.logits[:, order][:, :, order])
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(turned(x[:, order]), layer(x)[:, order])


def test_without_attention_a_joint_sees_max_hop_bones_per_block_and_with_it_all() -> None:
    distance = hop_distance(CHAIN)
    for attention in (True, False):
        lifter = HopGraphFormer(hop_masks(CHAIN, 1), dim=8, depth=2, attention=attention, root=None)
        image = torch.randn(1, 6, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(lifter(image)[0, 0].sum(), image)
        reached = gradient[0].abs().sum(-1) > 0
        assert torch.equal(reached, (distance[0] <= 2) | attention)


def test_a_new_refinement_is_the_identity_and_a_trained_one_stays_within_its_limb() -> None:
    layer, x = LimbRefine(4, [(1, 2), (4, 5, 6)]), torch.randn(2, 7, 4, requires_grad=True)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    found = layer(x)
    assert torch.equal(found[:, [0, 3]], x[:, [0, 3]])
    (gradient,) = torch.autograd.grad(found[:, 6].sum(), x)
    assert (gradient.abs().sum((0, 2)) > 0).tolist() == [False] * 4 + [True] * 3
    expected = x[:, [4, 5, 6]].flatten(1) + layer.refine[1](x[:, [4, 5, 6]].flatten(1))
    torch.testing.assert_close(found[:, [4, 5, 6]].flatten(1), expected)


def test_the_block_is_the_transformer_shell_around_it() -> None:
    lifter: Any = HopGraphFormer(hop_masks(TREE, 2), [(1, 2, 3)], dim=8, depth=1)
    with torch.no_grad():
        for parameter in lifter.blocks[0].limbs.parameters():
            parameter.normal_(std=0.1)
    image, block = torch.randn(2, 7, 2), lifter.blocks[0]
    x = lifter.embedding(image) + lifter.places
    x = x + block.hop(block.hop_norm(x))
    x = block.limbs(x + block.mlp(block.mlp_norm(x)))
    pose = lifter.head(lifter.norm(x))
    torch.testing.assert_close(lifter(image), pose - pose[:, :1])
    assert torch.equal(lifter(image)[:, 0], torch.zeros(2, 3))


def test_it_fits_any_skeleton_with_its_limbs_and_root() -> None:
    skeleton = Skeleton((1, -1, 1, 2), parts={"left_leg": (2, 3), "trunk": (0, 1)})
    lifter = HopGraphFormer.for_skeleton(skeleton, 2, dim=8, depth=1)
    assert limbs_of(skeleton) == [(2, 3)] and lifter.blocks[0].limbs.limbs == ((2, 3),)
    assert torch.equal(lifter(torch.randn(2, 4, 2))[:, 1], torch.zeros(2, 3))
    assert sorted(len(limb) for limb in limbs_of(COMMON)) == [3] * 4
    assert isinstance(
        HopGraphFormer.for_skeleton(COMMON, 2, dim=8, depth=1, limbs=()).blocks[0].limbs, nn.Identity
    )


def test_it_trains_with_methods_and_loads_back() -> None:
    torch.manual_seed(0)
    lifter = HopGraphFormer.for_skeleton(COMMON, 3, dim=8, depth=1, heads=2)
    image = torch.randn(16, 15, 2) * 0.3
    pose = F.pad(image, (0, 1)) - F.pad(image, (0, 1))[:, :1]
    methods = [MirrorPoses(COMMON.mirror), UncertainPose()]
    run = coloss.fit(
        lifter,
        (image, pose),
        None,
        methods,
        budget=Budget(steps=6),
        batch_size=16,
        log_every=1,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    assert run.history[-1].terms["laplace_pose"] < run.history[0].terms["laplace_pose"]
    twin = copy.deepcopy(run.model)
    twin.load_state_dict(run.model.state_dict())
    assert torch.equal(twin(image).pose, run.model(image).pose)


def test_other_precisions_stay_finite() -> None:
    lifter, image = HopGraphFormer(hop_masks(CHAIN, 5), [(1, 2)], dim=8, depth=2), torch.randn(4, 6, 2)
    plain = lifter(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = lifter(image)
        mixed.float().square().sum().backward()
    torch.testing.assert_close(mixed.float(), plain, atol=0.1, rtol=0.1)
    assert all(p.grad is None or p.grad.isfinite().all() for p in lifter.parameters())
    assert lifter.bfloat16()(image.bfloat16()).isfinite().all()


def test_gradients_in_float64() -> None:
    lifter = HopGraphFormer(hop_masks(CHAIN[:4], 2), [(1, 2)], dim=4, depth=1, heads=2).double()

    def pose(image: Tensor) -> Tensor:
        return lifter(image)

    assert torch.autograd.gradcheck(pose, torch.randn(1, 4, 2).double().requires_grad_())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HopAttention(8, 3, hop_masks(CHAIN, 1)), "heads must divide dim 8, got 3"),
        (lambda: HopAggregate(0, hop_masks(CHAIN, 1)), "dim must be >= 1, got 0"),
        (
            lambda: HopAggregate(4, torch.ones(2, 3, 4, dtype=torch.bool)),
            r"masks must be bool .* \(2, 3, 4\)",
        ),
        (lambda: HopAggregate(4, torch.ones(2, 3, 3)), "masks must be bool .* got torch.float32"),
        (lambda: LimbRefine(4, []), r"limbs must hold at least one, each with joints, got \[\]"),
        (
            lambda: LimbRefine(4, [(1,), ()]),
            r"limbs must hold at least one, each with joints, got \[\(1,\), \(\)\]",
        ),
        (lambda: LimbRefine(4, [(1, 2), (2, 3)]), r"limbs must be distinct joints >= 0"),
        (lambda: LimbRefine(4, [(1, 9)])(torch.zeros(1, 7, 4)), r"limbs must hold joints in \[0, 7\), got 9"),
        (lambda: HopGraphFormer(hop_masks(CHAIN, 1), depth=0), "depth must be >= 1, got 0"),
        (lambda: HopGraphFormer(hop_masks(CHAIN, 1), dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: HopGraphFormer(hop_masks(CHAIN, 1), mlp_ratio=0.0), "mlp_ratio must be > 0, got 0.0"),
        (
            lambda: HopGraphFormer(hop_masks(CHAIN, 1), root=6),
            "root must be one of the 6 joints or None, got 6",
        ),
        (
            lambda: HopGraphFormer(hop_masks(CHAIN, 1))(torch.zeros(1, 5, 2)),
            r"image must be \(batch, 6, 2\), got",
        ),
        (lambda: HopGraphFormer.for_skeleton(COMMON, -1), "max_hop must be >= 0, got -1"),
    ],
)
def test_bad_input_is_named(build: Any, message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_claim_runs() -> None:
    found = verify("hopfir", smoke=True, seeds=1)
    assert found["method"]["name"] == "hop attention"
    parameters = {name: arm["metrics"]["parameters"]["mean"] for name, arm in found["arms"].items()}
    assert 0.9 < parameters["hop attention"] / parameters["one-hop graph convolution"] <= 1.0
    for arm in found["arms"].values():
        assert {"mpjpe", "p_mpjpe", "n_mpjpe"} <= arm["metrics"].keys()
