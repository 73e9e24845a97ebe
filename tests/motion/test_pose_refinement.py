from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coloss.lab.claims import verify
from coloss.motion import (
    PinholeCamera,
    ResidualLifter,
    UncertainLifter,
    UncertainPoses,
    mirror_poses,
    test_time_optimize,
)

MIRROR = (0, 3, 4, 1, 2)
CAMERA = PinholeCamera(2.2, torch.tensor([0.03, 0.01]))
ROOT = torch.tensor([[0.1, 0.0, 4.0], [-0.2, 0.1, 4.5], [0.0, 0.2, 3.5]])


def new_model(dropout: float = 0.0) -> UncertainLifter:
    torch.manual_seed(1)
    model = UncertainLifter(ResidualLifter(5, 16, 1, dropout=dropout)).eval()
    with torch.no_grad():
        model.lifter.head.weight.mul_(0.2)
        model.lifter.head.bias.mul_(0.2)
    return model


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, 2, generator=torch.Generator().manual_seed(0)) * 0.2


class Exact(nn.Module):
    """Knows the pose behind the image of one camera at one root: unprojects at the true depth."""

    def __init__(self, depth: Tensor, root: Tensor) -> None:
        super().__init__()
        self.register_buffer("depth", depth)
        self.register_buffer("root", root)

    def forward(self, image: Tensor) -> UncertainPoses:
        pose = CAMERA.unproject(image, self.depth) - self.root[:, None]
        return UncertainPoses(pose, torch.zeros_like(self.depth))


def test_without_steps_the_pose_is_the_models() -> None:
    model, image = new_model(), images()
    pose, info = test_time_optimize(model, image, CAMERA, steps=0)
    expected = model(image)
    torch.testing.assert_close(pose, expected.pose)
    torch.testing.assert_close(info.log_scale, expected.log_scale)
    assert torch.equal(info.image, image) and info.projection.shape == (1,)
    turned, _ = test_time_optimize(model, image, CAMERA, steps=0, mirror=MIRROR)
    mirrored = mirror_poses(model(mirror_poses(image, MIRROR)).pose, MIRROR)
    torch.testing.assert_close(turned, (expected.pose + mirrored) / 2)


def test_an_exact_pose_of_an_exact_image_does_not_move() -> None:
    for dtype, root in ((torch.float32, ROOT), (torch.float64, ROOT.double()), (torch.float64, None)):
        pose = torch.randn(3, 5, 3, dtype=dtype) * 0.3
        pose = pose - pose[:, :1]
        points = pose + ROOT[:, None].to(dtype)
        image = CAMERA(points)
        model = Exact(points[..., 2], ROOT.to(dtype))
        found, info = test_time_optimize(model, image, CAMERA, steps=5, root=root)
        assert torch.equal(info.image, image) and info.projection.max() == 0
        torch.testing.assert_close(found, pose, atol=1e-6, rtol=0)
        torch.testing.assert_close(info.root, ROOT.to(dtype), atol=1e-6, rtol=0)
        assert info.root_is_fitted == (root is None)


def test_the_steps_are_those_of_adam_on_the_published_loss_written_out() -> None:
    model, image = new_model(), images()
    prior = model(image).pose.detach()
    z = image.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=2e-3)
    for _ in range(3):
        optimizer.zero_grad()
        pose, scale = model(z)
        hold = ((pose - prior).norm(dim=-1) * torch.exp(-scale.detach())).mean()
        x = pose + ROOT[:, None]
        seen = 2.2 * x[..., :2] / x[..., 2:] + torch.tensor([0.03, 0.01])
        (0.3 * hold + (seen - image).norm(dim=-1).mean()).backward()
        optimizer.step()
    found, info = test_time_optimize(model, image, CAMERA, steps=3, lr=2e-3, prior_weight=0.3, root=ROOT)
    torch.testing.assert_close(info.image, z.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found, model(z).pose.detach(), atol=1e-4, rtol=0)


def test_certain_joints_are_held_and_uncertain_ones_move() -> None:
    image = images()

    class Direct(nn.Module):
        def forward(self, z: Tensor) -> UncertainPoses:
            scale = torch.tensor([-6.0, -6, -6, 3, 3]).expand(len(z), 5)
            return UncertainPoses(torch.cat([z, torch.zeros_like(z[..., :1])], -1), scale)

    observed = image.clone()
    pose, info = test_time_optimize(
        Direct(), observed, lambda x: x[..., :2] + 0.05, steps=20, root=torch.zeros(3, 3), prior_weight=0.1
    )
    moved = (pose[..., :2] - image).norm(dim=-1).mean(0)
    assert moved[:3].max() < 0.005 < 0.02 < moved[3:].min()
    free, _ = test_time_optimize(
        Direct(),
        observed,
        lambda x: x[..., :2] + 0.05,
        steps=20,
        root=torch.zeros(3, 3),
        prior_weight=0.1,
        uncertainty=False,
    )
    assert (free[..., :2] - image).norm(dim=-1).mean(0)[:3].min() > 0.02


def test_a_projection_that_is_not_finite_is_no_fit() -> None:
    def lost(points: Tensor) -> Tensor:
        return CAMERA(points) * torch.nan

    _, info = test_time_optimize(new_model(), images(), lost, steps=1, root=ROOT)
    assert info.projection.isnan().all()


def test_the_models_precision_decides() -> None:
    model, image = new_model(), images()
    assert test_time_optimize(model, image.double(), CAMERA, steps=1).pose.dtype == torch.float32
    assert test_time_optimize(model.double(), image, CAMERA, steps=1).pose.dtype == torch.float64


@pytest.mark.parametrize("mirror", [None, MIRROR])
def test_the_projection_improves_and_the_model_is_left_as_it_was(mirror: Any) -> None:
    model, image = new_model(dropout=0.5).train(), images()
    model.lifter.stem.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    options: dict[str, Any] = {"steps": 10, "lr": 0.02, "root": ROOT, "mirror": mirror}
    first, info = test_time_optimize(model, image, CAMERA, **options)
    again, _ = test_time_optimize(model, image, CAMERA, **options)
    assert info.projection[-1] < 0.99 * info.projection[0] and info.projection.shape == (11,)
    assert torch.equal(first, again)  # dropout is off
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not first.requires_grad and torch.equal(first[:, 0], torch.zeros(3, 3))
    model.eval()(image).pose.sum().backward()  # trains on as before


def test_a_pose_does_not_depend_on_the_batch_it_is_in() -> None:
    model, image = new_model(), images(2)
    together, _ = test_time_optimize(model, image, CAMERA, steps=2, mirror=MIRROR)
    for row in range(2):
        alone, _ = test_time_optimize(model, image[row, None], CAMERA, steps=2, mirror=MIRROR)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


def test_with_a_mirror_mirrored_input_gives_mirrored_poses_under_the_mirrored_camera() -> None:
    model, image = new_model(), images()
    plain, first = test_time_optimize(model, image, CAMERA, steps=4, mirror=MIRROR)
    turned, second = test_time_optimize(
        model, mirror_poses(image, MIRROR), CAMERA.mirrored(), steps=4, mirror=MIRROR
    )
    torch.testing.assert_close(turned, mirror_poses(plain, MIRROR), atol=1e-5, rtol=0)
    torch.testing.assert_close(second.root, first.root * torch.tensor([-1.0, 1, 1]), atol=1e-4, rtol=0)


def test_a_joint_that_was_not_seen_does_not_pull() -> None:
    model, image = new_model(), images()
    guessed = image.clone()
    guessed[:, 4] += 0.3
    confidence = torch.ones(3, 5)
    confidence[:, 4] = 0

    def project_only_seen(x: Tensor) -> Tensor:
        seen = CAMERA(x)
        return torch.cat([seen[:, :4], guessed[:, 4:]], 1)  # the last joint is always where it was guessed

    options: dict[str, Any] = {"steps": 5, "root": ROOT}
    masked, _ = test_time_optimize(model, guessed, CAMERA, confidence=confidence, **options)
    expected, _ = test_time_optimize(model, guessed, project_only_seen, **options)
    torch.testing.assert_close(masked, expected)


def test_it_works_for_lifters_without_a_scale_in_half_precision_and_under_inference_mode() -> None:
    model, image = new_model(), images()
    plain = test_time_optimize(model.lifter, image, CAMERA, steps=1)
    same = test_time_optimize(model, image, CAMERA, steps=1, uncertainty=False)
    torch.testing.assert_close(plain.pose, same.pose)
    assert plain.info.log_scale is None
    expected = test_time_optimize(model, image, CAMERA, steps=1).pose
    with torch.inference_mode():
        torch.testing.assert_close(test_time_optimize(model, image * 1, CAMERA, steps=1).pose, expected)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(test_time_optimize(model, image, CAMERA, steps=1).pose, expected)
    half = test_time_optimize(model.bfloat16(), image, CAMERA, steps=1).pose
    assert half.dtype == torch.float32 and (half - expected).abs().max() < 0.05
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"lr": 0.0}, "lr must be > 0 and finite, got 0.0"),
        ({"prior_weight": -1.0}, "prior_weight must be >= 0 and finite, got -1.0"),
        ({"image": images() * 1000}, "image must be in units of half its width"),
        ({"image": images() * torch.nan}, "image must be finite"),
        ({"image": torch.zeros(3, 4, 2)}, r"image must be \(batch, 5, 2\), got \(3, 4, 2\)"),
        ({"root": torch.zeros(2, 3)}, r"root must be \(3, 3\), got \(2, 3\)"),
        ({"root": ROOT * torch.nan}, "root must be finite, got NaN or an infinity"),
        ({"confidence": torch.ones(3, 4)}, r"confidence must be \(3, 5\), >= 0 and finite, got \(3, 4\)"),
        (
            {"project": lambda x: x[..., :2]},
            "root must be given where project cannot fit it .* got None and function",
        ),
        ({"mirror": (0, 1)}, "mirror must have a partner for each of 5 joints, got 2"),
        ({"model": nn.Flatten()}, r"the model must give poses \(3, 5, 3\), got \(3, 10\)"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str, as_users_call: None) -> None:
    given = {"model": new_model(), "image": images(), "project": CAMERA} | options
    with pytest.raises(ValueError, match=message):
        test_time_optimize(given.pop("model"), given.pop("image"), given.pop("project"), **given)


def test_the_claim_runs() -> None:
    found = verify("uao", smoke=True, seeds=1)
    assert found["method"]["name"] == "uncertainty-weighted prior"
    assert {"mpjpe", "p_mpjpe", "root_error"} <= found["arms"]["projection only, true root"]["metrics"].keys()
    assert "scale_correlation" in found["arms"]["no optimisation"]["metrics"]
