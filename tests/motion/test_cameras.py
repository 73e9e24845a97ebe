from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coloss.motion import (
    PinholeCamera,
    mirror_poses,
    pixel_coordinates,
    ring_viewpoints,
    screen_coordinates,
)

DISTORTED = PinholeCamera(
    torch.tensor([2.2, 2.3]),
    torch.tensor([0.05, -0.02]),
    torch.tensor([-0.2, 0.25, -0.01]),
    torch.tensor([0.003, -0.002]),
)


def points(count: int = 5, joints: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, joints, 3, generator=generator) * 0.4
    return found + torch.tensor([0.2, 0.1, 4.0])


def test_projection_follows_opencvs_formula_written_out() -> None:
    (fx, fy), (cx, cy), (k1, k2, k3), (p2, p1) = (
        part.tolist() for part in (DISTORTED.focal, DISTORTED.centre, DISTORTED.radial, DISTORTED.tangential)
    )
    given = points().double().numpy()
    x, y = given[..., 0] / given[..., 2], given[..., 1] / given[..., 2]
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    u = fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + cx
    v = fy * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + cy
    np.testing.assert_allclose(DISTORTED(points()).numpy(), np.stack([u, v], -1), atol=1e-6)


def test_the_formula_of_the_human36m_code_counts_the_tangential_part_once() -> None:
    camera = PinholeCamera(2.0, 0.1, torch.tensor([0.1, 0.0, 0.0]), torch.tensor([0.02, 0.01]), "human3.6m")
    found = camera(torch.tensor([[[1.0, 2.0, 10.0]]]))
    direction, r2 = np.array([0.1, 0.2]), 0.05
    factor = 1 + 0.1 * r2 + 0.02 * 0.1 + 0.01 * 0.2
    np.testing.assert_allclose(
        found[0, 0], 2 * (direction * factor + np.array([0.02, 0.01]) * r2) + 0.1, rtol=1e-5
    )


@pytest.mark.parametrize("camera", [PinholeCamera(2.2), DISTORTED])
def test_unprojecting_at_the_right_depth_gives_the_points_back(camera: PinholeCamera) -> None:
    torch.testing.assert_close(
        camera.unproject(camera(points()), points()[..., 2]), points(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "radial", [(0.35, 0.0, 0.0), (0.5, 0.0, 0.0), (0.2, 0.2, 0.0), (-0.2, 0.25, -0.01), (-0.2, 0.0, 0.0)]
)
def test_wide_lenses_are_undone_to_the_edge(radial: tuple[float, ...]) -> None:
    camera = PinholeCamera(1.0, radial=torch.tensor(radial, dtype=torch.float64))
    reach = torch.linspace(0, 0.9, 9, dtype=torch.float64)  # 42 degrees off the axis
    seen = torch.stack([reach, torch.zeros_like(reach), torch.ones_like(reach)], 1)[None]
    torch.testing.assert_close(camera.unproject(camera(seen), seen[..., 2]), seen, atol=1e-6, rtol=0)


def test_pixels_and_screen_coordinates_keep_the_aspect() -> None:
    pixels = torch.tensor([[0.0, 0.0], [1000.0, 800.0], [500.0, 400.0]])
    screen = screen_coordinates(pixels, 1000, 800)
    torch.testing.assert_close(screen, torch.tensor([[-1.0, -0.8], [1.0, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(pixel_coordinates(screen, 1000, 800), pixels)
    with pytest.raises(ValueError, match="width must be > 0 pixels, got 0"):
        screen_coordinates(pixels, 0, 800)


def test_a_calibration_in_pixels_projects_to_the_pixels() -> None:
    camera = PinholeCamera.from_pixels(
        (1145.0, 1143.0), (512.0, 515.0), 1000, 1002, (0.1, 0.0, 0.0, 0.0, 0.0)
    )
    seen = pixel_coordinates(camera(torch.tensor([[[0.4, 0.8, 4.0]]])), 1000, 1002)
    factor = 1 + 0.1 * 0.05
    torch.testing.assert_close(seen, torch.tensor([[[512 + 1145 * 0.1 * factor, 515 + 1143 * 0.2 * factor]]]))


@pytest.mark.parametrize("seed", range(5))
def test_the_fitted_root_is_exact_for_exact_input(seed: int) -> None:
    root = torch.tensor([[0.3, -0.2, 4.5], [-0.8, 0.4, 3.0]])
    pose = (points(2, 9, seed) - points(2, 9, seed)[:, :1]).clamp(-0.8, 0.8)
    for camera in (PinholeCamera(2.2), DISTORTED):
        found = camera.fit_root(pose, camera(pose + root[:, None]))
        assert (found - root).abs().max() < 1e-4


def test_a_joint_without_confidence_does_not_pull_at_the_root() -> None:
    camera, root = PinholeCamera(2.2), torch.tensor([[0.3, -0.2, 4.5]])
    pose = points(1, 9) - points(1, 9)[:, :1]
    image = camera(pose + root[:, None])
    image[0, 4] += 0.5
    confidence = torch.ones(1, 9)
    confidence[0, 4] = 0
    assert (camera.fit_root(pose, image) - root).norm() > 0.05
    assert (camera.fit_root(pose, image, confidence) - root).norm() < 1e-4
    assert camera.fit_root(pose, image, torch.zeros(1, 9)).abs().max() == 0  # nothing to fit to: the smallest
    with pytest.raises(ValueError, match="image must be finite to fit a root"):
        camera.fit_root(pose, image * torch.nan)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=rf"confidence must be \(1, 9\), >= 0 and finite, got .* with {wrong:g}"
        ):
            camera.fit_root(pose, image, torch.full((1, 9), wrong))


def test_the_mirrored_camera_sees_the_mirrored_scene_as_the_mirrored_image() -> None:
    mirror, flip = (0, 2, 1, 4, 3, 5, 6), torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(
        DISTORTED.mirrored()(mirror_poses(points(), mirror)), mirror_poses(DISTORTED(points()), mirror)
    )
    assert not torch.allclose(
        DISTORTED(mirror_poses(points(), mirror)), mirror_poses(DISTORTED(points()), mirror)
    )
    assert torch.equal(DISTORTED.mirrored().centre, DISTORTED.centre * flip)


def test_one_camera_for_each_pose_is_that_camera() -> None:
    focal = torch.tensor([[2.0, 2.0], [3.0, 3.0], [1.0, 1.0]])
    camera = PinholeCamera(focal)
    found = camera(points(3))
    for row in range(3):
        torch.testing.assert_close(found[row], PinholeCamera(focal[row])(points(3)[row, None])[0])
        torch.testing.assert_close(camera.select(torch.tensor([row]))(points(3)[row, None])[0], found[row])
    with pytest.raises(ValueError, match="focal must be of 5 poses as the points are, got 3"):
        camera(points(5))


def test_points_beside_or_behind_the_camera_stay_finite_with_finite_gradients() -> None:
    wild = torch.tensor([[[0.0, 0, 0], [1, 1, -3], [100, 0, 1e-6], [1e6, 1e6, 1.0]]], requires_grad=True)
    found = DISTORTED(wild)
    found.sum().backward()
    assert found.isfinite().all() and wild.grad is not None and wild.grad.isfinite().all()
    # Everything that can be in the image of a wide lens is projected as it is.
    torch.testing.assert_close(
        PinholeCamera(0.5)(torch.tensor([[[1.9, 0.0, 1.0]]])), torch.tensor([[[0.95, 0.0]]])
    )


def test_gradients_of_the_projection() -> None:
    assert torch.autograd.gradcheck(DISTORTED.project, points(2, 3).double().requires_grad_())


def test_half_precision_is_computed_in_full() -> None:
    found = PinholeCamera(2.2)(points().half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, PinholeCamera(2.2)(points().half().float()))


def test_ring_cameras_stand_upright_at_their_distance_and_look_at_the_target() -> None:
    targets = torch.tensor([[1.0, 0.9, -2.0]]).repeat(200, 1)
    views = ring_viewpoints(targets, off_target=0.0, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(3).expand(200, 3, 3)
    torch.testing.assert_close(views.rotation @ views.rotation.mT, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(views.rotation), torch.ones(200))
    seen = views.to_camera(targets[:, None])
    assert seen[..., :2].abs().max() < 1e-5 and (seen[..., 2] > 3.4).all()
    away = (views.position - targets)[:, [0, 2]].norm(dim=1)
    assert away.min() >= 3.5 - 1e-4 and away.max() <= 5.5 + 1e-4 and away.std() > 0.3
    assert views.position[:, 1].min() >= 0.8 and views.position[:, 1].max() <= 1.8
    above = views.to_camera(targets[:, None] + torch.tensor([0.0, 0.5, 0.0]))
    assert (above[..., 1] < -0.4).all()  # up in the world is up in the image, where y points down
    torch.testing.assert_close(views.to_world(seen), targets[:, None], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"focal": 1145.0}, r"focal must be > 0 and in units of half the image's width .* got 1145"),
        ({"focal": -1.0}, "focal must be > 0 .* got -1"),
        ({"focal": torch.ones(3)}, r"focal must be of shape \(2\) or \(poses, 2\), got \(3,\)"),
        ({"focal": 2.0, "radial": float("nan")}, "radial must be finite, got nan"),
        ({"focal": 2.0, "radial": -0.2}, "radial must be 3 coefficients or 0, got the number -0.2"),
        ({"focal": 2.0, "tangential": 0.01}, "tangential must be 2 coefficients or 0, got the number 0.01"),
        ({"focal": 2.0, "distortion": "fisheye"}, "distortion must be .* got 'fisheye'"),
        ({"focal": torch.ones(2, 2), "centre": torch.ones(3, 2)}, r"one number of poses, got \[2, 3\]"),
    ],
)
def test_a_bad_camera_is_named(arguments: dict[str, Any], message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        PinholeCamera(**arguments)


def test_bad_rings_and_calibrations_are_named() -> None:
    with pytest.raises(ValueError, match=r"distance must be > 0 and rise, got \(5, 3\)"):
        ring_viewpoints(torch.zeros(1, 3), distance=(5, 3))
    with pytest.raises(ValueError, match=r"distortion must be \(k1, k2, p1, p2, k3\), got 4 numbers"):
        PinholeCamera.from_pixels((1000.0, 1000.0), (500.0, 500.0), 1000, 1000, (0.0,) * 4)
