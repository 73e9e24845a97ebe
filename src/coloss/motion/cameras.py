"""Cameras for lifting 2-D poses to 3-D: pinhole projection with lens distortion and back, cameras on a ring, the root that fits an image.

Image coordinates are in units of half the image's width, from its middle: x from -1 to 1, y from -h/w to h/w, downwards; width alone
divides both, so that the aspect is kept. Camera coordinates are metres: x to the right, y downwards, z (depth) ahead. World coordinates
are metres with y upwards. With the direction x = (X / Z, Y / Z) of a point and r^2 = |x|^2

    image = focal * (x (1 + k1 r^2 + k2 r^4 + k3 r^6 + m p.x) + p r^2) + centre

with radial k, tangential p = (p along x, p along y), and m = 2 (OpenCV's model) or m = 1 (the formula of the Human3.6M code).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.errors import InputError
from coloss.ops import full_precision, without_autocast

NEAR = 0.01
"""Smallest depth, in metres, that is divided by; what is nearer or behind is projected as if it were there."""


def screen_coordinates(
    pixels: Float[Tensor, "*batch 2"], width: float, height: float
) -> Float[Tensor, "*batch 2"]:
    """Pixels to units of half the image's width, from its middle: `2 x / width - 1`, `2 y / width - height / width`.

    Args:
        pixels: (..., 2), x to the right and y downwards from the upper left corner.
        width: of the image in pixels, > 0.
        height: of the image in pixels, > 0.

    Raises:
        InputError: for a width or height that is not > 0.

    Examples:
        >>> screen_coordinates(torch.tensor([[0.0, 0.0], [640.0, 360.0], [1280.0, 720.0]]), 1280, 720)
        tensor([[-1.0000, -0.5625],
                [ 0.0000,  0.0000],
                [ 1.0000,  0.5625]])
    """
    return pixels * (2 / _checked_size(width, height)) - pixels.new_tensor([1.0, height / width])


def pixel_coordinates(
    image: Float[Tensor, "*batch 2"], width: float, height: float
) -> Float[Tensor, "*batch 2"]:
    """Pixels of points in screen coordinates; undoes `screen_coordinates`.

    Args:
        image: (..., 2) in units of half the image's width.
        width: of the image in pixels, > 0.
        height: of the image in pixels, > 0.

    Raises:
        InputError: for a width or height that is not > 0.

    Examples:
        >>> pixel_coordinates(torch.tensor([0.0, 0.0]), 1280, 720)
        tensor([640., 360.])
    """
    return (image + image.new_tensor([1.0, height / width])) * (_checked_size(width, height) / 2)


def _checked_size(width: float, height: float) -> float:
    for name, value in (("width", width), ("height", height)):
        if not value > 0:
            raise InputError(f"{name} must be > 0 pixels, got {value}")
    return width


def check_confidence(confidence: Tensor | None, image: Tensor) -> None:
    """Refuse weights of joints that are of another shape than the image has, negative, or not finite.

    Raises:
        InputError: naming the shape and the worst value.

    Examples:
        >>> check_confidence(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2, 2))
        Traceback (most recent call last):
        coloss.errors.InputError: confidence must be (1, 2), >= 0 and finite, got (1, 2) with -1
    """
    if confidence is None:
        return
    wrong = ~((confidence >= 0) & confidence.isfinite())
    if confidence.shape != image.shape[:2] or wrong.any():
        found = f"{tuple(confidence.shape)}" + (
            f" with {float(confidence[wrong][0]):g}" if wrong.any() else ""
        )
        raise InputError(f"confidence must be {tuple(image.shape[:2])}, >= 0 and finite, got {found}")


@dataclass(frozen=True, eq=False)
class PinholeCamera:
    """One camera for all poses, or one for each: from points in space to the image and back. Calling it projects.

    Args:
        focal: (2) or (poses, 2), focal length along x and y in units of half the image's width: pixels * 2 / width. A number holds for
            both axes.
        centre: (2) or (poses, 2), image of the optical axis in screen coordinates. A number holds for both axes.
        radial: (3) or (poses, 3), k1, k2, k3; of numbers only 0.
        tangential: (2) or (poses, 2), the coefficient along x and the one along y; in OpenCV's naming (p2, p1). Of numbers only 0.
        distortion: `"opencv"` or `"human3.6m"`, which differ in m above.

    Raises:
        InputError: for a wrong shape, a value that is not finite, a focal length <= 0 or so long (>= 50) that it must be in pixels, or an
            unknown kind of distortion.

    Examples:
        >>> camera = PinholeCamera(2.0)
        >>> camera(torch.tensor([[[0.5, -0.5, 4.0]]]))
        tensor([[[ 0.2500, -0.2500]]])
        >>> camera.unproject(torch.tensor([[[0.25, -0.25]]]), torch.tensor([[4.0]]))
        tensor([[[ 0.5000, -0.5000,  4.0000]]])
    """

    focal: float | Tensor
    centre: float | Tensor = 0.0
    radial: float | Tensor = 0.0
    tangential: float | Tensor = 0.0
    distortion: Literal["opencv", "human3.6m"] = "opencv"

    def __post_init__(self) -> None:
        if self.distortion not in ("opencv", "human3.6m"):
            raise InputError(f'distortion must be "opencv" or "human3.6m", got {self.distortion!r}')
        poses = set()
        for name, size in _SIZES.items():
            value = torch.as_tensor(getattr(self, name), dtype=None)
            value = value.float() if not value.is_floating_point() else full_precision(value)
            if value.ndim == 0 and value.isfinite() and value != 0 and name in ("radial", "tangential"):
                raise InputError(f"{name} must be {size} coefficients or 0, got the number {float(value):g}")
            value = value.expand(size) if value.ndim == 0 else value
            if value.ndim > 2 or value.shape[-1] != size:
                raise InputError(
                    f"{name} must be of shape ({size}) or (poses, {size}), got {tuple(value.shape)}"
                )
            if not value.isfinite().all():
                raise InputError(
                    f"{name} must be finite, got {value.flatten()[~value.flatten().isfinite()][0]}"
                )
            poses |= {len(value)} if value.ndim == 2 else set()
            object.__setattr__(self, name, value)
        if len(poses) > 1:
            raise InputError(f"parameters must be of one number of poses, got {sorted(poses)}")
        assert isinstance(self.focal, Tensor)
        if self.focal.numel() and not 0 < float(self.focal.min()) <= float(self.focal.max()) < 50:
            extreme = float(self.focal.min()) if self.focal.min() <= 0 else float(self.focal.max())
            raise InputError(
                f"focal must be > 0 and in units of half the image's width (pixels * 2 / width), got {extreme:g}"
            )

    @classmethod
    def from_pixels(
        cls,
        focal: Sequence[float],
        centre: Sequence[float],
        width: float,
        height: float,
        distortion: Sequence[float] = (0.0, 0.0, 0.0, 0.0, 0.0),
    ) -> "PinholeCamera":
        """A calibration in pixels, with OpenCV's five distortion coefficients.

        Args:
            focal: (fx, fy) in pixels.
            centre: (cx, cy) in pixels.
            width: of the image in pixels.
            height: of the image in pixels.
            distortion: (k1, k2, p1, p2, k3), in OpenCV's order.

        Raises:
            InputError: for another number of coefficients, and what the class refuses.

        Examples:
            >>> PinholeCamera.from_pixels((1145, 1143), (512, 515), 1000, 1002).focal
            tensor([2.2900, 2.2860])
        """
        if len(distortion) != 5:
            raise InputError(f"distortion must be (k1, k2, p1, p2, k3), got {len(distortion)} numbers")
        k1, k2, p1, p2, k3 = distortion
        return cls(
            torch.tensor(focal, dtype=torch.float32) * (2 / _checked_size(width, height)),
            screen_coordinates(torch.tensor(centre, dtype=torch.float32), width, height),
            torch.tensor([k1, k2, k3], dtype=torch.float32),
            torch.tensor([p2, p1], dtype=torch.float32),
        )

    def __call__(self, points: Float[Tensor, "poses joints 3"]) -> Float[Tensor, "poses joints 2"]:
        return self.project(points)

    def project(self, points: Float[Tensor, "poses joints 3"]) -> Float[Tensor, "poses joints 2"]:
        """Images of points, differentiable everywhere; half precision is computed in float32.

        A depth under one centimetre counts as one centimetre. Directions are held within twice the image's width, at least within
        -1 to 1, beyond which the distortion's polynomial means nothing; no gradient passes there.

        Args:
            points: (poses, joints, 3) in camera coordinates, metres.

        Raises:
            ValueError: if the camera's poses are another number.
        """
        points = full_precision(points)
        focal, centre, _, _ = self._broadcast(points)
        direction = points[..., :2] / points[..., 2:].clamp(min=NEAR)
        bound = (2 * (1 + centre.abs()) / focal).clamp(min=1.0).expand_as(direction)
        return focal * self._distorted(torch.minimum(torch.maximum(direction, -bound), bound)) + centre

    def directions(self, image: Float[Tensor, "poses joints 2"]) -> Float[Tensor, "poses joints 2"]:
        """Directions (X / Z, Y / Z) that points of the image were seen in, without distortion, by 50 steps of a damped fixed-point iteration.

        Exact to rounding where the distortion can be undone: as long as what is farther from the axis is also seen farther from it.

        Args:
            image: (poses, joints, 2) in screen coordinates.
        """
        image = full_precision(image)
        focal, centre, radial, tangential = self._broadcast(image)
        seen = (image - centre) / focal
        if not bool(radial.any()) and not bool(tangential.any()):
            return seen
        direction = seen
        for _ in range(50):
            square = direction.square().sum(-1, keepdim=True)
            # The slope along the radius: full steps diverge where it is above 2, as at the edge of a wide pincushion lens.
            powers = torch.cat([3 * square, 5 * square**2, 7 * square**3], -1)
            slope = (1 + (powers * radial).sum(-1, keepdim=True)).clamp(min=1)
            direction = direction - (self._distorted(direction) - seen) / slope
        return direction

    def unproject(
        self, image: Float[Tensor, "poses joints 2"], depth: Float[Tensor, "poses joints"]
    ) -> Float[Tensor, "poses joints 3"]:
        """Points of an image at given depths; undoes `project`.

        Args:
            image: (poses, joints, 2) in screen coordinates.
            depth: (poses, joints) in metres.
        """
        depth = full_precision(depth)[..., None]
        return torch.cat([self.directions(image) * depth, depth], -1)

    def fit_root(
        self,
        pose: Float[Tensor, "poses joints 3"],
        image: Float[Tensor, "poses joints 2"],
        confidence: Float[Tensor, "poses joints"] | None = None,
    ) -> Float[Tensor, "poses 3"]:
        """The place in space that lets a pose with its root at 0 come nearest to an image, in closed form.

        With the directions d of the image's points, least squares of `t_x - d_x t_z = d_x Z - X` and the same along y, over all joints:
        exact for exact input. What is small is the error in space across the line of sight, not that in the image.

        Args:
            pose: (poses, joints, 3) relative to the root, metres.
            image: (poses, joints, 2) in screen coordinates.
            confidence: (poses, joints) >= 0, weight of each joint; default 1. Under a weight of 0 the image may hold anything finite.

        Returns:
            (poses, 3), the root in camera coordinates, metres; float64 inside. Where fewer than two different directions are given, the
            one of smallest norm among those that fit equally.

        Raises:
            InputError: for a value that is not finite, or a confidence that is negative or of another shape.

        Examples:
            >>> pose = torch.tensor([[[0.0, 0.0, 0.0], [0.2, 0.5, 0.1], [-0.2, 0.4, 0.0]]])
            >>> camera, root = PinholeCamera(2.0), torch.tensor([[0.3, 0.1, 4.0]])
            >>> camera.fit_root(pose, camera(pose + root[:, None]))
            tensor([[0.3000, 0.1000, 4.0000]])
        """
        for name, value in (("pose", pose), ("image", image)):
            if not value.isfinite().all():
                raise InputError(f"{name} must be finite to fit a root, got NaN or an infinity")
        check_confidence(confidence, image)
        points = pose.double()
        focal = self._broadcast(points)[0]
        # The plain equations weigh an error in space as the image does at equal depth: times the focal length.
        direction = self.directions(image.double())
        rows = torch.zeros(*direction.shape, 3, dtype=points.dtype, device=points.device)
        rows[..., 0, 0], rows[..., 1, 1] = focal[..., 0], focal[..., 1]
        rows[..., 2] = -focal * direction
        sides = focal * (direction * points[..., 2:] - points[..., :2])
        if confidence is not None:
            weight = confidence.double().sqrt()[..., None]
            rows, sides = rows * weight[..., None], sides * weight
        with without_autocast(points.device):
            rows, sides = rows.flatten(1, 2), sides.flatten(1)
            normal, right = rows.mT @ rows, rows.mT @ sides[..., None]
            root = torch.linalg.pinv(normal, hermitian=True, rtol=1e-10) @ right
        return root[..., 0].to(full_precision(pose).dtype)

    def mirrored(self) -> "PinholeCamera":
        """The camera that sees the mirrored scene as this one's mirrored image: centre and tangential coefficient along x negated."""
        sign = torch.tensor([-1.0, 1.0])
        assert isinstance(self.centre, Tensor) and isinstance(self.tangential, Tensor)
        sign = sign.to(self.centre)
        return replace(self, centre=self.centre * sign, tangential=self.tangential * sign)

    def select(self, indices: Int[Tensor, " chosen"]) -> "PinholeCamera":
        """The cameras of some poses; of one camera for all, itself.

        Args:
            indices: int64 positions.
        """
        parts = {name: getattr(self, name) for name in _SIZES}
        return replace(self, **{name: part[indices] for name, part in parts.items() if part.ndim == 2})

    def _broadcast(self, points: Tensor) -> list[Tensor]:
        found = []
        for name in _SIZES:
            value = getattr(self, name).to(points)
            if value.ndim == 2 and len(value) != len(points):
                raise InputError(f"{name} must be of {len(points)} poses as the points are, got {len(value)}")
            found.append(value[:, None] if value.ndim == 2 else value)
        return found

    def _distorted(self, direction: Tensor) -> Tensor:
        _, _, radial, tangential = self._broadcast(direction)
        square = direction.square().sum(-1, keepdim=True)
        powers = torch.cat([square, square**2, square**3], -1)
        factor = 1 + (powers * radial).sum(-1, keepdim=True)
        share = 2.0 if self.distortion == "opencv" else 1.0
        factor = factor + share * (direction * tangential).sum(-1, keepdim=True)
        return direction * factor + tangential * square


_SIZES = {field.name: size for field, size in zip(fields(PinholeCamera), (2, 2, 3, 2))}


class Viewpoints(NamedTuple):
    """Where cameras stand and look; one for each pose.

    Attributes:
        rotation: (poses, 3, 3), rows are the camera's axes x, y, z in the world.
        position: (poses, 3) in the world, metres.

    Examples:
        >>> views = ring_viewpoints(torch.zeros(2, 3), generator=torch.Generator().manual_seed(0))
        >>> views.to_camera(views.position[:, None]).abs().max() < 1e-6
        tensor(True)
    """

    rotation: Tensor
    position: Tensor

    def to_camera(self, points: Float[Tensor, "poses joints 3"]) -> Float[Tensor, "poses joints 3"]:
        """World to camera coordinates.

        Args:
            points: (poses, joints, 3) in the world, metres.
        """
        with without_autocast(points.device):
            return (points - self.position[:, None]) @ self.rotation.mT

    def to_world(self, points: Float[Tensor, "poses joints 3"]) -> Float[Tensor, "poses joints 3"]:
        """Camera to world coordinates; undoes `to_camera`.

        Args:
            points: (poses, joints, 3) in camera coordinates, metres.
        """
        with without_autocast(points.device):
            return points @ self.rotation + self.position[:, None]


def ring_viewpoints(
    targets: Float[Tensor, "poses 3"],
    *,
    distance: tuple[float, float] = (3.5, 5.5),
    height: tuple[float, float] = (0.8, 1.8),
    off_target: float = 0.2,
    generator: torch.Generator | None = None,
) -> Viewpoints:
    """Upright cameras around people: at a random angle, distance and height, looking nearly at the target.

    Args:
        targets: (poses, 3) what to look at, such as the hips, in the world, metres, y upwards.
        distance: least and largest horizontal distance from the target, metres.
        height: least and largest height above the floor (y = 0), metres.
        off_target: standard deviation of the place looked at around the target, metres: people are not always in the middle.
        generator: source of randomness.

    Raises:
        InputError: for a distance that is not > 0, a range that falls, or a negative deviation.

    Examples:
        >>> views = ring_viewpoints(torch.tensor([[0.0, 0.9, 0.0]]), off_target=0.0)
        >>> seen = views.to_camera(torch.tensor([[[0.0, 0.9, 0.0]]]))[0, 0]
        >>> seen[:2].abs().max() < 1e-5, 3.4 < seen[2] < 5.7
        (tensor(True), tensor(True))
    """
    if not 0 < distance[0] <= distance[1]:
        raise InputError(f"distance must be > 0 and rise, got {distance}")
    if not height[0] <= height[1]:
        raise InputError(f"height must rise, got {height}")
    if off_target < 0:
        raise InputError(f"off_target must be >= 0, got {off_target}")
    count = len(targets)
    shares = torch.rand(count, 3, generator=generator)
    noise = torch.randn(count, 3, generator=generator) * off_target
    angle = shares[:, 0] * 2 * torch.pi
    far = distance[0] + shares[:, 1] * (distance[1] - distance[0])
    high = height[0] + shares[:, 2] * (height[1] - height[0])
    position = torch.stack(
        [targets[:, 0].cpu() + far * angle.sin(), high, targets[:, 2].cpu() + far * angle.cos()], 1
    )
    position, noise = position.to(targets), noise.to(targets)
    ahead = torch.nn.functional.normalize(targets + noise - position, dim=1)
    up = targets.new_tensor([0.0, 1.0, 0.0]).expand_as(ahead)
    right = torch.nn.functional.normalize(torch.linalg.cross(ahead, up), dim=1)
    down = torch.linalg.cross(ahead, right)
    return Viewpoints(torch.stack([right, down, ahead], 1), position)
