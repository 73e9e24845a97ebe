import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume, check_two_processes, differing, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget
from coloss.motion import (
    GraphMLPLifter,
    HopGraphFormer,
    LaplacePoseLoss,
    MirrorPoses,
    ResidualLifter,
    UncertainLifter,
    UncertainLifterHead,
    UncertainPose,
    UncertainPoses,
    certainty,
    laplace_pose_loss,
    scale_calibration,
)
from coloss.ops import hop_masks

PARENTS, MIRROR = (-1, 0, 1, 0, 3), (0, 3, 4, 1, 2)


def new_lifter() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(10, 15), nn.Unflatten(1, (5, 3)))


def new_data(rows: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pose = torch.randn(rows, 5, 3, generator=generator) * 0.3
    pose = pose - pose[:, :1]
    return pose[..., :2] / 2 + 0.01 * torch.randn(rows, 5, 2, generator=generator), pose


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    image, pose = new_data(8 * count)
    return list(zip(image.split(8), pose.split(8), strict=True))


# The loss


def test_at_a_constant_scale_the_loss_is_the_distance_scaled() -> None:
    predicted, target = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    distance = (target - predicted).norm(dim=-1)
    for scale in (-2.0, 0.0, 1.5):
        found = laplace_pose_loss(predicted, torch.full((4, 5), scale), target)
        assert found.item() == pytest.approx(distance.mean().item() * math.exp(-scale) + scale, rel=1e-5)


def test_the_scale_is_best_at_the_logarithm_of_the_error() -> None:
    predicted, target = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    scale = (target - predicted).norm(dim=-1).log().requires_grad_()
    laplace_pose_loss(predicted, scale, target).backward()
    assert scale.grad is not None and scale.grad.abs().max() < 1e-6


def test_gradients_of_the_loss() -> None:
    parts = [torch.randn(2, 3, 3), torch.randn(2, 3), torch.randn(2, 3, 3)]
    assert torch.autograd.gradcheck(laplace_pose_loss, [p.double().requires_grad_() for p in parts])


def test_exact_and_extreme_predictions_are_finite() -> None:
    pose = torch.randn(2, 3, 3)
    for shift in (0.0, 1.0):
        predicted = (pose + shift).requires_grad_()
        scale = torch.tensor([[-1e9, -20.0, 300.0]] * 2, requires_grad=True)
        loss = laplace_pose_loss(predicted, scale, pose)
        loss.backward()
        assert loss.isfinite() and predicted.grad is not None and predicted.grad.isfinite().all()
        assert scale.grad is not None and scale.grad.isfinite().all()
        # Far too certain and wrong: the scale is pushed up, though its value counts as -20.
        assert (scale.grad[0, 0] < 0) == (shift > 0)
    assert certainty(torch.tensor([-1e9])).item() == pytest.approx(math.exp(20))


def test_joints_that_do_not_count_may_hold_anything() -> None:
    predicted, target = torch.randn(2, 3, 3, requires_grad=True), torch.randn(2, 3, 3)
    scale = torch.zeros(2, 3, requires_grad=True)
    target[:, 1] = torch.nan
    valid = torch.tensor([[True, False, True]])
    loss = laplace_pose_loss(predicted, scale, target, valid=valid)
    loss.backward()
    distance = (target - predicted).norm(dim=-1)[:, [0, 2]]
    assert loss.item() == pytest.approx(distance.mean().item(), rel=1e-5)
    assert predicted.grad is not None and predicted.grad[:, 1].abs().sum() == 0
    assert predicted.grad.isfinite().all() and scale.grad is not None and scale.grad.isfinite().all()
    assert laplace_pose_loss(predicted, scale, target).isnan()
    assert laplace_pose_loss(predicted, scale, target, valid=torch.zeros(1, 3, dtype=torch.bool)).item() == 0


def test_half_precision_is_computed_in_full() -> None:
    parts = torch.randn(4, 5, 3).half(), torch.randn(4, 5).half(), torch.randn(4, 5, 3).half()
    found = laplace_pose_loss(*parts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, laplace_pose_loss(*(part.float() for part in parts)))


def test_the_objective_leaves_the_root_out() -> None:
    outputs = UncertainPoses(torch.randn(4, 5, 3), torch.randn(4, 5))
    target = torch.randn(4, 5, 3)
    torch.testing.assert_close(
        LaplacePoseLoss(2)(outputs, target),
        laplace_pose_loss(*(part[:, [0, 1, 3, 4]] for part in (*outputs, target))),
    )
    torch.testing.assert_close(LaplacePoseLoss(None)(outputs, target), laplace_pose_loss(*outputs, target))
    for root in (-1, 5):
        with pytest.raises(ValueError, match=f"root must be one of the 5 joints or None, got {root}"):
            LaplacePoseLoss(root)(outputs, target)


# The head


def test_the_head_is_bounded_below_and_free_above() -> None:
    head = UncertainLifterHead(4, lowest=-3.0)
    with torch.no_grad():
        head.layers[2].weight.zero_()
        for bias, expected in ((-1e4, -3.0), (-3.0, -3 + math.log(2)), (5.0, 5 + math.log1p(math.exp(-8)))):
            head.layers[2].bias.fill_(bias)
            torch.testing.assert_close(head(torch.randn(2, 3, 4)), torch.full((2, 3), expected))


def test_a_joint_that_is_always_right_does_not_make_its_weight_explode() -> None:
    # The root of relative poses is exactly 0 in both: without a bound its scale falls with every step.
    pose = torch.zeros(1, 1, 3)
    head = UncertainLifterHead(1, hidden=8)
    optimizer = torch.optim.SGD(head.parameters(), lr=10.0)
    for _ in range(50):
        optimizer.zero_grad()
        laplace_pose_loss(pose, head(torch.ones(1, 1, 1)), pose).backward()
        optimizer.step()
    assert -6 <= head(torch.ones(1, 1, 1)).item() < -5.9
    assert certainty(head(torch.ones(1, 1, 1))).item() < 404


@pytest.mark.parametrize(
    "lifter",
    [
        ResidualLifter(5, 8, 1),
        GraphMLPLifter(PARENTS, MIRROR, 8, 1),
        HopGraphFormer(hop_masks(PARENTS, 2), dim=8, depth=1),
        nn.Sequential(nn.Flatten(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 15), nn.Unflatten(1, (5, 3))),
    ],
    ids=["residual", "graph mlp", "hop", "one's own"],
)
def test_any_lifter_gets_a_head_and_keeps_its_poses(lifter: nn.Module) -> None:
    image, model = torch.randn(6, 5, 2), UncertainLifter(lifter).eval()
    pose, log_scale = model(image)
    torch.testing.assert_close(pose, lifter(image))
    assert log_scale.shape == (6, 5) and log_scale.std() > 0
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(image).log_scale, log_scale)
    assert twin.lifter is not lifter


def test_a_head_that_does_not_fit_the_joints_is_named(as_users_call: None) -> None:
    one_joint = UncertainLifter(
        ResidualLifter(1, 8, 1, root=None)
    )  # 3 outputs: taken for features of each joint
    with pytest.raises(ValueError, match=r"head must give \(4, 1\), one number for each joint, got \(4,?\)"):
        one_joint(torch.randn(4, 1, 2))
    with pytest.raises(ValueError, match=r"head must give \(4, 5\), one number for each joint, got \(4, 3\)"):
        UncertainLifter(ResidualLifter(5, 8, 1), UncertainLifterHead(8, 3))(torch.randn(4, 5, 2))


def test_a_lifter_that_does_not_end_in_three_numbers_a_joint_is_named() -> None:
    with pytest.raises(
        ValueError, match="layer must be an nn.Linear with 3 outputs for each joint, got '1', a Linear with 4"
    ):
        UncertainLifter(nn.Sequential(nn.Flatten(), nn.Linear(10, 4)))
    with pytest.raises(ValueError, match="layer must be an nn.Linear .* got 'stem', a Sequential"):
        UncertainLifter(ResidualLifter(5, 8, 1), layer="stem")
    with pytest.raises(ValueError, match="layer must name a module of the lifter, got 'tail'"):
        UncertainLifter(ResidualLifter(5, 8, 1), layer="tail")
    for arguments, message in (
        ({"dim": 0}, "dim must be >= 1, got 0"),
        ({"dim": 4, "joints": 0}, "joints must be >= 1, got 0"),
        ({"dim": 4, "lowest": -math.inf}, "lowest must be finite, got -inf"),
    ):
        with pytest.raises(ValueError, match=message):
            UncertainLifterHead(**arguments)
    with pytest.raises(ValueError, match="hidden must be >= 1, got 0"):
        UncertainPose(hidden=0)


# The method


def test_the_method_is_the_loss_on_the_model_with_a_head() -> None:
    lifter, (image, pose) = new_lifter(), new_data()
    method = UncertainPose()
    step = coloss.TrainingStep(lifter, F.mse_loss, [method])
    terms = step(image, pose)
    assert terms.keys() == {"laplace_pose"}
    expected = LaplacePoseLoss()(UncertainLifter(lifter, method.head)(image), pose)
    torch.testing.assert_close(terms["laplace_pose"], expected)


def test_only_the_scale_may_be_learnt_and_the_lifter_trained_by_its_own_objective() -> None:
    image, pose = new_data()
    alone, both = new_lifter(), new_lifter()
    options: dict[str, Any] = {"budget": Budget(steps=3), "batch_size": 8, "optimizer": SGD}
    coloss.fit(alone, (image, pose), F.mse_loss, **options)
    run = coloss.fit(both, (image, pose), F.mse_loss, [UncertainPose(only_scale=True)], **options)
    assert not differing(weights(alone), weights(both))
    assert sorted(run.history[-1].terms) == ["laplace_pose", "mse"]
    frozen = new_lifter().requires_grad_(False)
    before = weights(frozen)
    run = coloss.fit(frozen, (image, pose), None, [UncertainPose(only_scale=True)], **options)
    assert not differing(before, weights(frozen))
    assert run.model(image).log_scale.grad_fn is not None


def test_it_composes_and_ships_the_lifter_with_its_scale() -> None:
    lifter, (image, pose) = GraphMLPLifter(PARENTS, MIRROR, 8, 1), new_data()
    names = weights(lifter).keys()
    run = coloss.fit(
        lifter,
        (image, pose),
        None,
        [MirrorPoses(MIRROR), UncertainPose()],
        budget=Budget(steps=3),
        batch_size=8,
    )
    assert isinstance(run.model, UncertainLifter) and run.model.lifter is lifter
    assert weights(lifter).keys() == names
    torch.testing.assert_close(run.model(image).pose, lifter(image))


def test_it_takes_the_same_steps_in_every_loop() -> None:
    check_loops(new_lifter, UncertainPose, batches())


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resume(new_lifter, UncertainPose, new_data(), tmp_path, steps=6, kill_at=4, checkpoint_every=2)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    image, pose = new_data(16)

    def train(fabric: Fabric) -> dict[str, Tensor]:
        lifter = new_lifter().double()
        torch.manual_seed(0)
        run = coloss.fit(
            lifter,
            (image.double(), pose.double()),
            None,
            [UncertainPose()],
            budget=Budget(steps=3),
            batch_size=16,
            optimizer=SGD,
            fabric=fabric,
        )
        return {name: value for name, value in run.model.state_dict().items() if value.is_floating_point()}

    check_two_processes(train, tmp_path)


def test_mixed_precision_training_stays_finite() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(new_lifter(), batches(), None, [UncertainPose()], budget=Budget(steps=2), fabric=fabric)
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


# Calibration


def test_calibration_finds_scales_that_are_right_and_such_that_are_not() -> None:
    errors = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1
    exact = scale_calibration(errors, errors.log())
    assert exact.correlation == pytest.approx(1)
    torch.testing.assert_close(exact.expected, exact.found)
    assert len(exact.expected) == 10 and (exact.expected.diff() > 0).all()
    double = scale_calibration(errors, (2 * errors).log())
    torch.testing.assert_close(double.expected, 2 * double.found)
    assert scale_calibration(errors, -errors.log()).correlation < -0.5
    flat = scale_calibration(errors, torch.zeros(1000))
    assert math.isnan(flat.correlation) and flat.found.mean().item() == pytest.approx(
        errors.mean().item(), rel=1e-5
    )
    assert len(scale_calibration(errors[:3], errors[:3].log()).found) == 3
    assert math.isnan(scale_calibration(errors[:1], errors[:1]).correlation)


def test_calibration_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="errors must hold at least one joint, got none"):
        scale_calibration(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        scale_calibration(torch.zeros(1), torch.zeros(1), bins=0)
