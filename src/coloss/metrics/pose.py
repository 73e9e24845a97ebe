"""How far predicted poses are from true ones: plainly, after the best scale, after the best similarity, and in their velocities.

All give one number for each pose, in the unit of the input (metres give metres); `pose_report` averages them as papers do: within each
action first, then over actions. A joint that is not there is False in `valid`, never a zero. NaN or an infinity in a joint that counts
makes its pose's number NaN, and no other's; a pose without a joint that counts has NaN, too.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.errors import InputError
from coloss.ops import full_precision, without_autocast


def mpjpe(
    predicted: Float[Tensor, "poses joints 3"],
    target: Float[Tensor, "poses joints 3"],
    *,
    root: int | None = 0,
    valid: Bool[Tensor, "poses joints"] | None = None,
) -> Float[Tensor, " poses"]:
    """Mean distance between predicted and true joints, both poses moved so that their roots meet.

    Args:
        predicted: (poses, joints, 3).
        target: likewise.
        root: joint that both are taken relative to, the predicted one by its own root; None compares them where they are.
        valid: (poses, joints), which joints count; default: all. A root that does not count must be there all the same.

    Returns:
        (poses), in the unit of the input.

    Raises:
        InputError: for no joint, a target of another shape, or a root that is none of the joints.

    Examples:
        >>> target = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
        >>> mpjpe(target + torch.tensor([[[5.0, 0.0, 0.0], [5.0, 0.2, 0.0]]]), target)
        tensor([0.1000])
    """
    predicted, target, weight = _prepared(predicted, target, root, valid)
    return _mean_distance(predicted, target, weight)


def n_mpjpe(
    predicted: Float[Tensor, "poses joints 3"],
    target: Float[Tensor, "poses joints 3"],
    *,
    root: int | None = 0,
    valid: Bool[Tensor, "poses joints"] | None = None,
) -> Float[Tensor, " poses"]:
    """Mean distance of joints after the roots meet and each prediction has the scale of least squares, `<p, t> / <p, p>`.

    A prediction whose joints all lie on the root has no scale: it stays as it is, as does the scale 0 of one at right angles to the target.

    Args:
        predicted: (poses, joints, 3).
        target: likewise.
        root: joint that both are taken relative to; None compares them where they are.
        valid: (poses, joints), which joints count; default: all.

    Raises:
        InputError: for no joint, a target of another shape, or a root that is none of the joints.

    Examples:
        >>> target = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
        >>> n_mpjpe(3 * target, target)
        tensor([0.])
    """
    predicted, target, weight = _prepared(predicted, target, root, valid)
    product = (predicted * target * weight[..., None]).sum((1, 2))
    square = (predicted.square() * weight[..., None]).sum((1, 2))
    scale = product / torch.where(square == 0, 1, square)
    return _mean_distance(predicted * scale[:, None, None], target, weight)


def p_mpjpe(
    predicted: Float[Tensor, "poses joints 3"],
    target: Float[Tensor, "poses joints 3"],
    *,
    valid: Bool[Tensor, "poses joints"] | None = None,
) -> Float[Tensor, " poses"]:
    """Mean distance of joints after each prediction is moved, turned and scaled onto its target by least squares (Procrustes).

    Mirror images are not allowed. A prediction or target whose joints all lie on one point leaves nothing to turn or scale: then the number is
    the mean distance of the target's joints from their middle.

    Args:
        predicted: (poses, joints, 3).
        target: likewise.
        valid: (poses, joints), which joints count; default: all.

    Raises:
        InputError: for no joint, or a target of another shape.

    Examples:
        >>> target = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
        >>> turned = target @ torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> p_mpjpe(2 * turned + 7, target).item() < 1e-5
        True
    """
    predicted, target, weight = _prepared(predicted, target, None, valid)
    dtype = predicted.dtype
    with without_autocast(predicted.device):
        # In float64 (where there is one): the products of small poses far from the origin cancel in float32.
        wide = torch.float32 if predicted.device.type == "mps" else torch.float64
        predicted, target, weight = predicted.to(wide), target.to(wide), weight.to(wide)
        count = weight.sum(1)[:, None, None].clamp(min=1)
        # A pose on one point has rounding errors for a shape, which must not be scaled up.
        nothing = 1e-24 * predicted.square().sum((1, 2))
        predicted, target = (
            (pose - (pose * weight[..., None]).sum(1, keepdim=True) / count) * weight[..., None]
            for pose in (predicted, target)
        )
        product = predicted.mT @ target
        sound = product.isfinite().all(-1).all(-1)
        u, singular, vh = torch.linalg.svd(torch.where(sound[:, None, None], product, 0))
        sign = torch.ones_like(singular)
        sign[:, 2] = torch.where(torch.det(u @ vh) < 0, -1.0, 1.0)
        square = predicted.square().sum((1, 2))
        scale = torch.where(square > nothing, (singular * sign).sum(1) / square, 0)
        aligned = scale[:, None, None] * (predicted @ (u * sign[:, None]) @ vh)
        error = _mean_distance(aligned, target, weight)
    return torch.where(sound, error, torch.nan).to(dtype)


def mpjve(
    predicted: Float[Tensor, "clips frames joints 3"],
    target: Float[Tensor, "clips frames joints 3"],
    *,
    root: int | None = 0,
    valid: Bool[Tensor, "clips frames joints"] | None = None,
) -> Float[Tensor, " clips"]:
    """Mean distance between predicted and true joint velocities, in units of length per frame: how much a prediction trembles.

    Args:
        predicted: (clips, frames, joints, 3), frames of one clip in order, seen by one camera.
        target: likewise.
        root: joint that both are taken relative to in each frame; None compares them where they are.
        valid: (clips, frames, joints), which joints count; a velocity needs both of its frames. Default: all.

    Returns:
        (clips). NaN for a clip without any velocity that counts.

    Raises:
        InputError: for fewer than two frames, no joint, a target of another shape, or a root that is none of the joints.

    Examples:
        >>> target = torch.zeros(1, 3, 2, 3)
        >>> steps = torch.tensor([0.0, 0.1, 0.0])[None, :, None, None] * torch.tensor([0.0, 1.0])[:, None]
        >>> mpjve(target + steps * torch.tensor([1.0, 0.0, 0.0]), target)
        tensor([0.0500])
    """
    if predicted.shape[1] < 2:
        raise InputError(f"velocities need at least 2 frames, got {predicted.shape[1]}")
    _check_shapes(predicted, target)
    frames = predicted.shape[1]
    flat_valid = None if valid is None else valid.flatten(0, 1)
    parts = _prepared(predicted.flatten(0, 1), target.flatten(0, 1), root, flat_valid)
    moved, true, weight = (part.unflatten(0, (-1, frames)) for part in parts)
    both = weight[:, 1:] * weight[:, :-1]
    return _mean_distance(moved.diff(dim=1).flatten(1, 2), true.diff(dim=1).flatten(1, 2), both.flatten(1))


def mean_over_actions(errors: Float[Tensor, " poses"], actions: Int[Tensor, " poses"]) -> dict[int, float]:
    """Mean error of each action. Their mean, not that of all poses, is what papers on 3-D poses print.

    Args:
        errors: (poses), one number each; an action with a NaN in it has the mean NaN.
        actions: (poses) integer label of each.

    Returns:
        Mean by action, for the actions that occur, in rising order.

    Examples:
        >>> mean_over_actions(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([4, 4, 2]))
        {2: 8.0, 4: 2.0}
    """
    return {label: errors[actions == label].mean().item() for label in actions.unique().tolist()}


def pose_report(
    predicted: Float[Tensor, "poses joints 3"],
    target: Float[Tensor, "poses joints 3"],
    actions: Int[Tensor, " poses"] | None = None,
    *,
    root: int = 0,
    valid: Bool[Tensor, "poses joints"] | None = None,
    unit: float = 1000.0,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Errors of poses in one table: averaged within each action, then over actions.

    Args:
        predicted: (poses, joints, 3).
        target: likewise.
        actions: (poses) integer labels; None averages over all poses at once.
        root: joint that both are taken relative to.
        valid: (poses, joints), which joints count; default: all. Poses without any are left out.
        unit: factor on every number; 1000 turns metres into millimetres.
        names: of the actions by label; given with `actions`, the report has `mpjpe_<name>` for each that occurs, too.

    Returns:
        `mpjpe`, `p_mpjpe` and `n_mpjpe`, times `unit`.

    Raises:
        InputError: for no pose, no joint, a target of another shape, a root that is none of the joints, or a label without a name.

    Examples:
        >>> target = torch.randn(3, 4, 3)
        >>> report = pose_report(1.1 * target, target, torch.tensor([0, 0, 1]))
        >>> report["mpjpe"] > 10, report["p_mpjpe"] < 1e-3
        (True, True)
    """
    if not len(predicted):
        raise InputError("poses must hold at least one, got none")
    there = torch.ones(len(predicted), dtype=torch.bool) if valid is None else valid.any(1).cpu()
    labels = torch.zeros(len(predicted), dtype=torch.int64) if actions is None else actions.cpu()
    named = names if actions is not None else ()
    if named and not 0 <= int(labels.min()) <= int(labels.max()) < len(named):
        raise InputError(
            f"actions must be labels in [0, {len(named)}), one for each name, got {labels.tolist()}"
        )
    report: dict[str, float] = {}
    for name, errors in (
        ("mpjpe", mpjpe(predicted, target, root=root, valid=valid)),
        ("p_mpjpe", p_mpjpe(predicted, target, valid=valid)),
        ("n_mpjpe", n_mpjpe(predicted, target, root=root, valid=valid)),
    ):
        means = mean_over_actions(unit * errors.cpu()[there], labels[there])
        report[name] = sum(means.values()) / len(means) if means else math.nan
        if name == "mpjpe" and named:
            report |= {f"mpjpe_{named[label]}": value for label, value in means.items()}
    return report


def _prepared(
    predicted: Tensor, target: Tensor, root: int | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float32 at least, relative to the root, and the weight (0 or 1) of each joint; what does not count is 0."""
    _check_shapes(predicted, target)
    joints = predicted.shape[1]
    if joints < 1:
        raise InputError("poses must have at least one joint, got none")
    if root is not None and not 0 <= root < joints:
        raise InputError(f"root must be one of the {joints} joints, got {root}")
    predicted, target = full_precision(predicted), full_precision(target)
    if root is not None:
        predicted, target = predicted - predicted[:, root, None], target - target[:, root, None]
    if valid is None:
        return predicted, target, torch.ones_like(predicted[..., 0])
    return (
        torch.where(valid[..., None], predicted, 0),
        torch.where(valid[..., None], target, 0),
        valid.to(predicted.dtype),
    )


def _check_shapes(predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape:
        raise InputError(
            f"target must be {tuple(predicted.shape)} as predicted is, got {tuple(target.shape)}"
        )


def _mean_distance(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    distance = torch.linalg.vector_norm(predicted - target, dim=-1)
    mean = (distance * weight).sum(1) / weight.sum(1)
    return torch.where(mean.isfinite(), mean, torch.nan)
