"""A lifter that says how far off each joint may be: a loss, a head, and a training method that gives the head to any lifter.

From UAO: Wang et al., 2025, arXiv 2402.02339. With a predicted pose mu, its log-scale s and the true pose y, for each joint

    loss = |y - mu| exp(-s) + s

whose minimum over s lies at s = log |y - mu|: s learns the logarithm of the error to be expected. The distance is not squared.
A joint that is always right, such as the root of relative poses, would drive s to minus infinity and its weight exp(-s) to infinity: the
head keeps s above a bound, and the method leaves the root out of the loss.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.motion.lifting import check_root
from coloss.nn import Taps, find_classifier
from coloss.ops import full_precision
from coloss.train.method import Method
from coloss.train.state import State

LOWEST = -6.0
"""Bound under the log-scale by default: an expected error of exp(-6) m, 2.5 millimetres."""

_FLOOR = -20.0


class UncertainPoses(NamedTuple):
    """What an uncertain lifter gives.

    Attributes:
        pose: (batch, joints, 3), metres.
        log_scale: (batch, joints), logarithm of the expected error in metres.
    """

    pose: Tensor
    log_scale: Tensor


def certainty(log_scale: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """`exp(-s)`, the weight of a joint in a loss; s counts as -20 at least, so that no weight is infinite.

    Args:
        log_scale: logarithm of expected errors in metres.

    Examples:
        >>> certainty(torch.tensor([0.0, -1e9])).isfinite()
        tensor([True, True])
    """
    return (-_held(full_precision(log_scale))).exp()


def _held(log_scale: Tensor) -> Tensor:
    """The log-scale, -20 at least, with the gradient that it has there."""
    return torch.where(log_scale < _FLOOR, _FLOOR + (log_scale - log_scale.detach()), log_scale)


def laplace_pose_loss(
    predicted: Float[Tensor, "batch joints 3"],
    log_scale: Float[Tensor, "batch joints"],
    target: Float[Tensor, "batch joints 3"],
    *,
    valid: Bool[Tensor, "#batch joints"] | None = None,
) -> Float[Tensor, ""]:
    """Regression of poses in which each joint also learns how wrong it is: mean of `|target - predicted| exp(-s) + s`.

    Args:
        predicted: (batch, joints, 3), metres.
        log_scale: (batch, joints), s above. Under -20 it counts as -20.
        target: (batch, joints, 3), metres.
        valid: (batch, joints) or (1, joints), which joints count; the others may hold NaN. Default: all. Leave out a root that is 0 in both.

    Returns:
        A scalar in float32 at least, 0 where nothing counts. For s = 0 it is the mean joint distance.

    Source: Wang et al., 2025, arXiv 2402.02339, section 3.

    Examples:
        >>> target = torch.tensor([[[0.0, 0.3, 0.4]]])
        >>> laplace_pose_loss(torch.zeros(1, 1, 3), torch.zeros(1, 1), target)
        tensor(0.5000)
    """
    predicted, target, log_scale = (full_precision(part) for part in (predicted, target, log_scale))
    there = torch.ones_like(log_scale, dtype=torch.bool) if valid is None else valid.expand(log_scale.shape)
    gap = torch.where(there[..., None], target - predicted, 0)
    scale = torch.where(there, log_scale, 0)
    losses = torch.linalg.vector_norm(gap, dim=-1) * certainty(scale) + _held(scale)
    return torch.where(there, losses, 0).sum() / there.sum().clamp(min=1)


class LaplacePoseLoss(nn.Module):
    """`laplace_pose_loss` as an objective for `fit`: of what an `UncertainLifter` gives, and the true pose.

    Args:
        root: joint that is 0 in both and left out; None counts all.

    Raises:
        InputError: from `forward`, for a root that is none of the joints.

    Examples:
        >>> outputs = UncertainPoses(torch.zeros(1, 2, 3), torch.zeros(1, 2))
        >>> LaplacePoseLoss()(outputs, torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.3, 0.4]]]))
        tensor(0.5000)
    """

    def __init__(self, root: int | None = 0) -> None:
        super().__init__()
        self.root = root

    def forward(
        self, outputs: tuple[Tensor, Tensor], target: Float[Tensor, "batch joints 3"]
    ) -> Float[Tensor, ""]:
        pose, log_scale = outputs
        return laplace_pose_loss(pose, log_scale, target, valid=_without(self.root, pose))


def _without(root: int | None, pose: Tensor) -> Tensor | None:
    check_root(root, pose.shape[1])
    return None if root is None else torch.arange(pose.shape[1], device=pose.device)[None] != root


class UncertainLifterHead(nn.Module):
    """Log-scales of joints from a lifter's features: two linear layers, and a smooth bound from below.

    `s = lowest + softplus(h - lowest)` for the layers' result h: about h where h is far above the bound.

    Args:
        dim: size of a feature vector.
        joints: None where each joint has features of its own; their number where one vector describes the whole pose.
        hidden: width of the middle layer; default: half of `dim`, 8 at least.
        lowest: bound of the log-scale.

    Returns:
        From `forward`: (batch, joints), in float32 at least.

    Raises:
        InputError: for a size < 1, or a bound that is not finite.

    Examples:
        >>> UncertainLifterHead(16)(torch.randn(4, 21, 16)).shape
        torch.Size([4, 21])
        >>> UncertainLifterHead(64, joints=21)(torch.randn(4, 64)).shape
        torch.Size([4, 21])
    """

    def __init__(
        self, dim: int, joints: int | None = None, *, hidden: int | None = None, lowest: float = LOWEST
    ) -> None:
        super().__init__()
        hidden = max(dim // 2, 8) if hidden is None else hidden
        for name, value in (("dim", dim), ("joints", 1 if joints is None else joints), ("hidden", hidden)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if not math.isfinite(lowest):
            raise InputError(f"lowest must be finite, got {lowest}")
        self.joints, self.lowest = joints, float(lowest)
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 1 if joints is None else joints)
        )

    def forward(self, features: Float[Tensor, "batch *joints dim"]) -> Float[Tensor, "batch joints"]:
        found = full_precision(self.layers(features))
        found = found.squeeze(-1) if self.joints is None else found
        return self.lowest + nn.functional.softplus(found - self.lowest)


class UncertainLifter(nn.Module):
    """Any lifter with a head for log-scales on the features that its last layer reads.

    Args:
        lifter: a network from (batch, joints, 2) to (batch, joints, 3) that ends in a linear layer.
        head: from those features to (batch, joints); default: a new `UncertainLifterHead`.
        layer: module path of the linear layer whose input are the features; default: the last one.

    Attributes:
        lifter: the network that was given.
        head: the head.

    Returns:
        From `forward`: `UncertainPoses(pose, log_scale)`.

    Raises:
        InputError: if there is no such layer, or it does not end in three numbers for each joint; from `forward`, if the head does not give one
            number for each joint.

    Examples:
        >>> from coloss.motion import ResidualLifter
        >>> pose, log_scale = UncertainLifter(ResidualLifter(17, 32))(torch.randn(4, 17, 2))
        >>> pose.shape, log_scale.shape
        (torch.Size([4, 17, 3]), torch.Size([4, 17]))
    """

    def __init__(self, lifter: nn.Module, head: nn.Module | None = None, *, layer: str | None = None) -> None:
        super().__init__()
        path, dim, joints = feature_place(lifter, layer)
        self.lifter = lifter
        self.head = UncertainLifterHead(dim, joints) if head is None else head
        self._taps = Taps(lifter, {"features": f"{path}:input"})

    def forward(self, image: Float[Tensor, "batch joints 2"]) -> UncertainPoses:
        try:
            pose = self.lifter(image)
            log_scale = self.head(self._taps["features"])
            if log_scale.shape != pose.shape[:2]:
                raise InputError(
                    f"head must give {tuple(pose.shape[:2])}, one number for each joint, got {tuple(log_scale.shape)}"
                )
            return UncertainPoses(pose, log_scale)
        finally:
            self._taps.clear()


def feature_place(lifter: nn.Module, layer: str | None = None) -> tuple[str, int, int | None]:
    """Where a lifter's last features are: path of the layer that reads them, their size, and the number of joints if one vector is for all.

    Raises:
        InputError: if there is no such layer, or it does not end in three numbers for each joint.

    Examples:
        >>> from coloss.motion import ResidualLifter
        >>> feature_place(ResidualLifter(17, 32))
        ('head', 32, 17)
    """
    path = find_classifier(lifter) if layer is None else layer
    try:
        found = lifter.get_submodule(path)
    except AttributeError:
        raise InputError(f"layer must name a module of the lifter, got {path!r}") from None
    if not isinstance(found, nn.Linear) or found.out_features % 3:
        what = type(found).__name__
        what += f" with {found.out_features} outputs" if isinstance(found, nn.Linear) else ""
        raise InputError(f"layer must be an nn.Linear with 3 outputs for each joint, got {path!r}, a {what}")
    return path, found.in_features, None if found.out_features == 3 else found.out_features // 3


class UncertainPose(Method):
    """Train any lifter together with a head that tells how far off each joint may be.

    Adds the term `laplace_pose`, in place of the objective, and ships the lifter as an `UncertainLifter`, which gives
    (pose, log-scale) and is what `test_time_optimize` takes. The lifter itself stays as it was built: `run.model.lifter`.

    The mean is over samples, so data-parallel training takes the steps of one process, as far as the lifter's own layers (batch norm) allow it.

    Args:
        only_scale: train only the head by this loss, and let the objective train the lifter; for a lifter that is trained already, freeze it
            and give no objective.
        root: joint that is 0 in both poses and left out; None counts all joints.
        layer: module path of the lifter's last linear layer; default: the last one.
        hidden: width of the head; default: half the features.
        lowest: bound under the log-scale (logarithm of metres).

    Attributes:
        head: from `setup` on.

    Raises:
        InputError: if the lifter has no such layer, or a value is out of range.

    Source: Wang et al., 2025, arXiv 2402.02339, section 3.

    Examples:
        >>> import coloss
        >>> from coloss.motion import ResidualLifter
        >>> data = (torch.randn(16, 3, 2), torch.randn(16, 3, 3))
        >>> run = coloss.fit(
        ...     ResidualLifter(3, 8, 1), data, None, [UncertainPose()], budget=coloss.Budget(steps=2)
        ... )
        >>> run.model(data[0]).log_scale.shape
        torch.Size([16, 3])
    """

    def __init__(
        self,
        *,
        only_scale: bool = False,
        root: int | None = 0,
        layer: str | None = None,
        hidden: int | None = None,
        lowest: float = LOWEST,
    ) -> None:
        super().__init__()
        UncertainLifterHead(1, hidden=hidden, lowest=lowest)  # checks them now, the size is known at setup
        self.only_scale, self.root, self.layer, self.hidden, self.lowest = (
            only_scale,
            root,
            layer,
            hidden,
            lowest,
        )
        self.replaces_objective = not only_scale

    def setup(self, state: State) -> None:
        self.path, dim, joints = feature_place(state.model, self.layer)
        state.tap("last_pose_features", f"{self.path}:input")
        self.head = state.like_model(UncertainLifterHead(dim, joints, hidden=self.hidden, lowest=self.lowest))

    def terms(self, state: State) -> dict[str, Tensor]:
        pose, features = state.outputs, state.features["last_pose_features"]
        if self.only_scale:
            pose, features = pose.detach(), features.detach()
        valid = _without(self.root, pose)
        return {
            "laplace_pose": laplace_pose_loss(pose, self.head(features), state.batch.targets, valid=valid)
        }

    def finish(self, state: State) -> None:
        state.model = UncertainLifter(state.model, self.head, layer=self.path)


class ScaleCalibration(NamedTuple):
    """How well log-scales foretell errors.

    Attributes:
        correlation: of exp(s) with the errors; NaN where either does not vary.
        expected: (bins) mean of exp(s) in bins of equal count, in rising order of s.
        found: (bins) mean error there.
    """

    correlation: float
    expected: Tensor
    found: Tensor


def scale_calibration(
    errors: Float[Tensor, "*joints"], log_scale: Float[Tensor, "*joints"], bins: int = 10
) -> ScaleCalibration:
    """Tells whether joints that were said to be uncertain are those with large errors, and whether the sizes agree.

    Args:
        errors: distances of joints from the truth, metres, any shape.
        log_scale: of the same shape.
        bins: >= 1; fewer where there are fewer joints.

    Raises:
        InputError: for fewer than one bin, or no joints.

    Examples:
        >>> errors = torch.rand(500, generator=torch.Generator().manual_seed(0)) + 0.01
        >>> found = scale_calibration(errors, errors.log(), bins=4)
        >>> round(found.correlation, 3), torch.allclose(found.expected, found.found)
        (1.0, True)
    """
    if bins < 1:
        raise InputError(f"bins must be >= 1, got {bins}")
    if not errors.numel():
        raise InputError("errors must hold at least one joint, got none")
    errors, scale = (
        errors.detach().flatten().double().cpu(),
        log_scale.detach().flatten().double().cpu().exp(),
    )
    order = scale.argsort()
    parts = list(zip(scale[order].tensor_split(bins), errors[order].tensor_split(bins), strict=True))
    means = [torch.stack([part.mean() for part in side if len(part)]) for side in zip(*parts, strict=True)]
    varies = len(errors) > 1 and bool(errors.std() > 0) and bool(scale.std() > 0)
    correlation = torch.corrcoef(torch.stack([errors, scale]))[0, 1].item() if varies else math.nan
    return ScaleCalibration(correlation, means[0], means[1])
