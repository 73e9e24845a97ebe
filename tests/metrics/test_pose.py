import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes
from torch import Tensor

from coloss.metrics import mean_over_actions, mpjpe, mpjve, n_mpjpe, p_mpjpe, pose_report


def poses(seed: int = 0, count: int = 4, joints: int = 6) -> Tensor:
    return torch.randn(count, joints, 3, generator=torch.Generator().manual_seed(seed))


def turn(seed: int) -> Tensor:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    q[:, 0] *= np.linalg.det(q)
    return torch.tensor(q, dtype=torch.float32)


def test_values_by_hand() -> None:
    target = torch.zeros(1, 3, 3)
    predicted = torch.tensor([[[1.0, 1, 1], [1, 1, 4], [5, 4, 1]]])  # relative: 0, 3 and 5
    assert mpjpe(predicted, target).item() == pytest.approx(8 / 3)
    assert mpjpe(predicted, target, root=None).item() == pytest.approx((3**0.5 + 18**0.5 + 42**0.5) / 3)
    assert mpjpe(predicted, target, root=1).item() == pytest.approx((3 + 0 + 34**0.5) / 3)
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    assert n_mpjpe(torch.tensor([[[0.0, 0, 0], [2, 2, 0]]]), line).item() == pytest.approx(0.5**0.5 / 2)


@settings(max_examples=8)
@given(st.integers(0, 1000), st.floats(0.1, 10), st.floats(-50, 50))
def test_procrustes_is_blind_to_similarity_and_never_above_the_others(
    seed: int, scale: float, shift: float
) -> None:
    predicted, target = poses(seed), poses(seed + 1)
    expected = p_mpjpe(predicted, target)
    moved = scale * predicted @ turn(seed) + shift
    torch.testing.assert_close(p_mpjpe(moved, target), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        p_mpjpe(target @ turn(seed) * scale + shift, target), torch.zeros(4), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        n_mpjpe(scale * predicted + shift, target), n_mpjpe(predicted, target), rtol=1e-3, atol=1e-4
    )


def test_procrustes_equals_that_of_scipy_in_its_squares() -> None:
    predicted, target = poses(0, 1, 8), poses(1, 1, 8)
    target_shape, aligned, squares = procrustes(target[0].numpy(), predicted[0].numpy())
    # scipy scales the target to norm 1 and lets reflections pass: take a pair whose best turn is none.
    assert (
        np.linalg.det(np.linalg.svd(target_shape.T @ aligned)[0] @ np.linalg.svd(target_shape.T @ aligned)[2])
        > 0
    )
    norm = (target[0] - target[0].mean(0)).norm()
    expected = norm * np.linalg.norm(target_shape - aligned, axis=1).mean()
    assert p_mpjpe(predicted, target).item() == pytest.approx(float(expected), rel=1e-4)


def test_a_mirror_image_is_not_aligned_away() -> None:
    target = poses(2, 3)
    assert (p_mpjpe(target * torch.tensor([-1.0, 1, 1]), target) > 0.1).all()


def test_degenerate_poses_have_defined_errors() -> None:
    target, point = poses(0, 1), torch.full((1, 6, 3), 0.1)
    spread = (target - target.mean(1, keepdim=True)).norm(dim=-1).mean()
    assert p_mpjpe(point, target).item() == pytest.approx(spread.item(), rel=1e-5)
    assert p_mpjpe(target, point).item() == 0
    assert n_mpjpe(point, target).item() == pytest.approx((target - target[:, :1]).norm(dim=-1).mean().item())
    line = torch.linspace(0, 1, 6)[None, :, None] * torch.tensor([1.0, 2, 3])
    assert (
        p_mpjpe(line, 2 * line @ turn(0)).item() < 1e-6
    )  # a line leaves the turn about itself open, not the error
    assert p_mpjpe(target[:, :1], target[:, :1]).item() == 0
    far = target.double() * 1e-3 + 1e4
    assert p_mpjpe(far, target.double()).item() < 1e-6


def test_nan_stays_with_its_pose_and_hidden_joints_with_themselves() -> None:
    predicted, target = poses(0), poses(1)
    plain = {f: f(predicted, target) for f in (mpjpe, n_mpjpe, p_mpjpe)}
    broken = predicted.clone()
    broken[1, 3] = math.nan
    broken[2, 3] = math.inf
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[1:, 3] = False
    for function, values in plain.items():
        found = function(broken, target)
        assert found.isnan().tolist() == [False, True, True, False]
        torch.testing.assert_close(found[[0, 3]], values[[0, 3]])
        kept = [0, 1, 2, 4, 5]
        hidden = function(broken, target, valid=valid)
        torch.testing.assert_close(hidden[1:], function(predicted[1:, kept], target[1:, kept]))
        assert function(predicted, target, valid=torch.zeros(4, 6, dtype=torch.bool)).isnan().all()


def test_velocity_errors() -> None:
    target = torch.zeros(1, 4, 2, 3)
    predicted = target.clone()
    predicted[0, :, 1, 2] = torch.tensor([0.0, 0.3, 0.3, 0.1])
    assert mpjve(predicted, target).item() == pytest.approx((0.3 + 0 + 0.2) / 6)
    # The root's own movement is taken off, and so is a constant error.
    assert mpjve(predicted + torch.randn(1, 4, 1, 3), target).item() == pytest.approx(0.5 / 6)
    assert mpjve(target + torch.tensor([[0.0] * 3, [1.0] * 3]), target).item() == 0
    valid = torch.ones(1, 4, 2, dtype=torch.bool)
    valid[0, 1] = False
    assert mpjve(predicted, target, valid=valid).item() == pytest.approx(0.2 / 2)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        mpjve(target[:, :1], target[:, :1])


def test_the_report_averages_within_actions_first() -> None:
    target = poses(0, 4)
    predicted = target.clone()
    predicted[:, 1, 0] += torch.tensor([0.6, 0.6, 0.6, 6.0])
    actions = torch.tensor([0, 0, 0, 2])
    report = pose_report(predicted, target, actions, names=("bow", "bye", "walk"))
    assert report["mpjpe"] == pytest.approx((100 + 1000) / 2, rel=1e-4)
    assert report["mpjpe_bow"] == pytest.approx(100, rel=1e-4)
    assert "mpjpe_bye" not in report
    assert pose_report(predicted, target)["mpjpe"] == pytest.approx((3 * 100 + 1000) / 4, rel=1e-4)
    assert mean_over_actions(torch.tensor([1.0, math.nan]), torch.tensor([0, 1]))[0] == 1
    hidden = torch.ones(4, 6, dtype=torch.bool)
    hidden[3] = False
    assert pose_report(predicted, target, actions, valid=hidden)["mpjpe"] == pytest.approx(100, rel=1e-4)


def test_half_precision_is_computed_in_full() -> None:
    predicted, target = poses(0).half(), poses(1).half()
    for function in (mpjpe, n_mpjpe, p_mpjpe):
        assert function(predicted, target).dtype == torch.float32
        torch.testing.assert_close(function(predicted, target), function(predicted.float(), target.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(p_mpjpe(poses(0), poses(0)), torch.zeros(4), atol=1e-5, rtol=0)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="root must be one of the 6 joints, got 6"):
        mpjpe(poses(), poses(), root=6)
    with pytest.raises(ValueError, match="at least one joint, got none"):
        p_mpjpe(poses()[:, :0], poses()[:, :0])
    with pytest.raises(ValueError, match="must hold at least one, got none"):
        pose_report(poses()[:0], poses()[:0])


def test_poses_of_other_joints_are_not_compared(as_users_call: None) -> None:
    for function in (mpjpe, n_mpjpe, p_mpjpe, pose_report):
        with pytest.raises(ValueError, match=r"target must be \(4, 6, 3\) as predicted is, got \(4, 1, 3\)"):
            function(poses(), poses()[:, :1])
    with pytest.raises(
        ValueError, match=r"target must be \(1, 4, 6, 3\) as predicted is, got \(1, 1, 6, 3\)"
    ):
        mpjve(poses()[None], poses()[None, :1])


def test_names_belong_to_actions() -> None:
    for label in (-1, 2):
        with pytest.raises(
            ValueError, match=rf"actions must be labels in \[0, 2\), .* got \[0, 1, 0, {label}\]"
        ):
            pose_report(poses(), poses(1), torch.tensor([0, 1, 0, label]), names=("bow", "bye"))
    assert pose_report(poses(), poses(1), names=("bow", "bye")).keys() == {"mpjpe", "p_mpjpe", "n_mpjpe"}
