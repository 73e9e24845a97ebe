"""What is done to clips of skeletons before and during training: streams, crops, shears, turns. Batched, and a function of a generator alone.

Batches are (clips, channels, frames, joints) or, with persons, (clips, channels, frames, joints, persons); the three channels are x, y
(up) and z. Every draw is one for each clip.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from coloss.data.skeleton import Skeleton
from coloss.ops import without_autocast
from coloss.ops.skeleton_graph import check_mirror, check_parents

Clips = Float[Tensor, "clips channels frames joints *persons"]


def skeleton_streams(clips: Clips, parents: Sequence[int]) -> dict[str, Clips]:
    """The four streams that skeletons are read in: `joint`, `bone` (joint minus parent, 0 at the root), `motion` (next frame minus this
    one, 0 at the last) and `bone_motion`.

    Args:
        clips: positions.
        parents: of each joint, -1 at the root.

    Raises:
        ValueError: if the joints are not those of the parents.

    Examples:
        >>> streams = skeleton_streams(torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]]), [-1, 0])
        >>> streams["bone"][0, 0].tolist(), streams["motion"][0, 0].tolist()
        ([[0.0, 1.0], [0.0, 3.0]], [[0.0, 2.0], [0.0, 0.0]])
    """
    found = check_parents(parents)
    _check(clips, len(found))
    # A root is its own parent here, so that its bone is exactly 0.
    index = torch.tensor(
        [joint if parent < 0 else parent for joint, parent in enumerate(found)], device=clips.device
    )
    bone = clips - clips.index_select(3, index)
    return {"joint": clips, "bone": bone, "motion": _steps(clips), "bone_motion": _steps(bone)}


def _steps(clips: Tensor) -> Tensor:
    return torch.cat([clips[:, :, 1:] - clips[:, :, :-1], torch.zeros_like(clips[:, :, :1])], 2)


def resample_frames(clips: Clips, frames: int) -> Float[Tensor, "clips channels new_frames joints *persons"]:
    """Another number of frames, by linear interpolation between the first and the last.

    Examples:
        >>> resample_frames(torch.tensor([0.0, 2.0]).view(1, 1, 2, 1), 3).flatten()
        tensor([0., 1., 2.])
    """
    if frames < 1:
        raise ValueError(f"frames must be >= 1, got {frames}")
    last = clips.shape[2] - 1
    at = torch.linspace(0, last, frames, device=clips.device)
    below = at.floor().long().clamp_max(max(last - 1, 0))
    share = (at - below).to(clips.dtype).view(-1, *[1] * (clips.ndim - 3))
    return torch.lerp(clips.index_select(2, below), clips.index_select(2, (below + 1).clamp_max(last)), share)


def temporal_crop(
    clips: Clips, padding: int | None = None, generator: torch.Generator | None = None
) -> Clips:
    """A window as long as the clip, at random in the clip continued by its mirror image at both ends.

    Args:
        clips: positions.
        padding: frames added at each end, in [0, frames); a sixth of the frames by default.

    Examples:
        >>> clip = torch.arange(6.0).view(1, 1, 6, 1)
        >>> temporal_crop(clip, 1, torch.Generator().manual_seed(0)).flatten()
        tensor([1., 2., 3., 4., 5., 4.])
    """
    frames = clips.shape[2]
    padding = frames // 6 if padding is None else padding
    if not 0 <= padding < frames:
        raise ValueError(f"padding must be in [0, {frames}), got {padding}")
    first = torch.randint(
        -padding, padding + 1, (len(clips), 1), generator=generator, device=_device(generator)
    )
    at = first.to(clips.device) + torch.arange(frames, device=clips.device)
    # Mirrored at the ends without repeating the end itself: -1 is frame 1, frames is frame frames - 2.
    at = at.abs()
    at = torch.where(at > frames - 1, 2 * (frames - 1) - at, at)
    index = at.view(len(clips), 1, frames, *[1] * (clips.ndim - 3)).expand(
        -1, clips.shape[1], -1, *clips.shape[3:]
    )
    return clips.gather(2, index)


def shear(clips: Clips, amplitude: float = 0.5, generator: torch.Generator | None = None) -> Clips:
    """Each clip's space sheared: x + a y + b z and so on, the six factors uniform in [-amplitude, amplitude].

    Examples:
        >>> shear(torch.ones(1, 3, 1, 1), 0.0).flatten()
        tensor([1., 1., 1.])
    """
    if amplitude < 0:
        raise ValueError(f"amplitude must be >= 0, got {amplitude}")
    draws = torch.rand(len(clips), 3, 3, generator=generator, device=_device(generator)) * 2 - 1
    matrices = draws * amplitude * (1 - torch.eye(3, device=draws.device)) + torch.eye(3, device=draws.device)
    return _linear(clips, matrices)


def crop_and_shear(
    clips: Clips,
    views: int = 2,
    generator: torch.Generator | None = None,
    *,
    padding: float = 1 / 6,
    amplitude: float = 0.5,
) -> Float[Tensor, "views clips channels frames joints *persons"]:
    """Random views of clips: a window at random in the clip continued by its mirror image in time, then a shear of space.

    One draw for each clip and view, batched.

    Args:
        clips: (clips, 3, frames, joints) or that with persons.
        views: of each clip, >= 1.
        generator: decides every choice.
        padding: share of the frames that the clip is continued by at each end, in [0, 1).
        amplitude: of the shear, >= 0.

    Returns:
        (views, clips, ...).

    Raises:
        ValueError: for a value out of range, or other than 3 channels.

    Examples:
        >>> crop_and_shear(torch.rand(5, 3, 12, 4), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 5, 3, 12, 4])
    """
    if views < 1:
        raise ValueError(f"views must be >= 1, got {views}")
    if not 0 <= padding < 1:
        raise ValueError(f"padding must be in [0, 1), got {padding}")
    repeated = clips.repeat(views, *[1] * (clips.ndim - 1))
    cropped = temporal_crop(repeated, int(padding * clips.shape[2]), generator)
    return shear(cropped, amplitude, generator).unflatten(0, (views, len(clips)))


def rotate_joints(
    clips: Clips, degrees: float = 17.0, axis: str = "xyz", generator: torch.Generator | None = None
) -> Clips:
    """Each clip turned about the origin, by an angle uniform in [-degrees, degrees] about each axis named, one after another.

    Args:
        clips: positions.
        degrees: largest angle, >= 0.
        axis: letters of "xyz"; "y" turns about the vertical.

    Examples:
        >>> turned = rotate_joints(torch.ones(1, 3, 1, 1), 90.0, "y", torch.Generator().manual_seed(0))
        >>> round(float(turned.norm()), 4), float(turned[0, 1])
        (1.7321, 1.0)
    """
    if degrees < 0:
        raise ValueError(f"degrees must be >= 0, got {degrees}")
    if not axis or set(axis) - set("xyz"):
        raise ValueError(f'axis must be letters of "xyz", got {axis!r}')
    draws = torch.rand(len(axis), len(clips), generator=generator, device=_device(generator)) * 2 - 1
    matrices = torch.eye(3, device=draws.device).expand(len(clips), 3, 3)
    for letter, angle in zip(axis, draws * math.radians(degrees)):
        matrices = axis_rotation(angle, letter) @ matrices
    return _linear(clips, matrices)


def axis_rotation(angle: Float[Tensor, " angles"], axis: str) -> Float[Tensor, "angles 3 3"]:
    """Matrices that turn columns by angles (radians) about x, y or z, by the right-hand rule.

    Examples:
        >>> axis_rotation(torch.tensor([torch.pi / 2]), "y")[0].round().abs() @ torch.tensor([0.0, 0.0, 1.0])
        tensor([1., 0., 0.])
    """
    at = "xyz".index(axis)
    one, two = (at + 1) % 3, (at + 2) % 3
    matrices = torch.zeros(len(angle), 3, 3, device=angle.device, dtype=angle.dtype)
    matrices[:, at, at] = 1
    matrices[:, one, one] = matrices[:, two, two] = angle.cos()
    matrices[:, two, one] = angle.sin()
    matrices[:, one, two] = -angle.sin()
    return matrices


def mirror_skeleton(clips: Clips, mirror: Sequence[int]) -> Clips:
    """Left and right exchanged: x reversed and each joint in the place of its partner. Twice gives the clip again.

    Examples:
        >>> mirror_skeleton(torch.tensor([[1.0, -2.0], [5.0, 6.0], [0.0, 0.0]]).view(1, 3, 1, 2), [1, 0])[
        ...     0, :, 0
        ... ].tolist()
        [[2.0, -1.0], [6.0, 5.0], [0.0, 0.0]]
    """
    partner = torch.tensor(check_mirror(mirror, clips.shape[3]), device=clips.device)
    sign = torch.ones(clips.shape[1], device=clips.device, dtype=clips.dtype)
    sign[0] = -1
    return clips.index_select(3, partner) * sign.view(1, -1, *[1] * (clips.ndim - 2))


def joint_noise(clips: Clips, sigma: float = 0.01, generator: torch.Generator | None = None) -> Clips:
    """Gaussian noise of a standard deviation added to every coordinate, in the clips' unit.

    Examples:
        >>> joint_noise(torch.zeros(1, 3, 1, 1), 0.0).flatten()
        tensor([0., 0., 0.])
    """
    if sigma < 0:
        raise ValueError(f"sigma must be >= 0, got {sigma}")
    noise = torch.randn(clips.shape, generator=generator, device=_device(generator)).to(clips)
    return clips + sigma * noise


def axis_mask(clips: Clips, share: float = 0.5, generator: torch.Generator | None = None) -> Clips:
    """One of the three axes set to zero, in a share of the clips.

    Examples:
        >>> axis_mask(torch.ones(1, 3, 1, 1), 1.0, torch.Generator().manual_seed(0)).sum()
        tensor(2.)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    device = _device(generator)
    chosen = torch.rand(len(clips), generator=generator, device=device) < share
    axis = torch.randint(clips.shape[1], (len(clips),), generator=generator, device=device)
    gone = functional.one_hot(axis, clips.shape[1]).bool() & chosen[:, None]
    return clips.masked_fill(gone.to(clips.device).view(*gone.shape, *[1] * (clips.ndim - 2)), 0)


def canonical_joints(
    joints: Float[Tensor, "*clips frames joints 3"], skeleton: Skeleton
) -> Float[Tensor, "*clips frames joints 3"]:
    """Clips as seen from where they begin: the root of the first frame above the origin, facing +z, the lowest joint on the floor (y = 0).

    A body that faces nowhere (hips and shoulders in one point or one above the other) is not turned.

    Args:
        joints: positions; y up.
        skeleton: whose `face` tells where the body looks.

    Raises:
        ValueError: if the skeleton does not say which hips and shoulders it has.

    Examples:
        >>> body = Skeleton((-1, 0, 0, 0, 0), face=(1, 2, 3, 4))
        >>> x = torch.tensor([[0.0, 1, 5], [0, 0, 4], [0, 0, 6], [0, 2, 4], [0, 2, 6]])[None]
        >>> canonical_joints(x, body)[0, 2].round().abs().tolist()
        [1.0, 0.0, 0.0]
    """
    forward = facing(joints[..., :1, :, :], skeleton)
    with without_autocast(joints.device):
        x, z = forward[..., 0], forward[..., 2]
        z = torch.where((x == 0) & (z == 0), 1.0, z)
        none = torch.zeros_like(x)
        # The direction itself says how to turn: an angle has no gradient where the direction is 0.
        turn = torch.stack([z, none, -x, none, none + 1, none, x, none, z], -1).unflatten(-1, (3, 3))
        root = joints[..., :1, skeleton.root, :]
        moved = (
            joints
            - torch.stack([root[..., 0], torch.zeros_like(root[..., 0]), root[..., 2]], -1)[..., None, :]
        )
        moved = (turn[..., None, :, :] @ moved[..., None]).squeeze(-1)
        floor = moved[..., 1].flatten(-2).amin(-1)[..., None, None]
    return torch.stack([moved[..., 0], moved[..., 1] - floor, moved[..., 2]], -1)


def facing(joints: Float[Tensor, "*frames joints 3"], skeleton: Skeleton) -> Float[Tensor, "*frames 3"]:
    """Horizontal unit vector in which a body looks: up x across, across from the left to the right hip and shoulder.

    Args:
        joints: positions; y up, right-handed.
        skeleton: with `face`.

    Raises:
        ValueError: if the skeleton has none.

    Examples:
        >>> body = Skeleton((-1, 0, 0, 0, 0), face=(1, 2, 3, 4))
        >>> facing(torch.tensor([[0.0, 1, 0], [-1, 0, 0], [1, 0, 0], [-1, 2, 0], [1, 2, 0]]), body)
        tensor([0., 0., 1.])
    """
    if skeleton.face is None:
        raise ValueError("skeleton must name its hips and shoulders in face, got None")
    right_hip, left_hip, right_shoulder, left_shoulder = (joints[..., joint, :] for joint in skeleton.face)
    across = (right_hip - left_hip) + (right_shoulder - left_shoulder)
    flat = torch.stack([across[..., 2], torch.zeros_like(across[..., 0]), -across[..., 0]], -1)
    return functional.normalize(flat, dim=-1)


def _linear(clips: Tensor, matrices: Tensor) -> Tensor:
    if clips.shape[1] != 3:
        raise ValueError(f"clips must have 3 channels (x, y, z), got {clips.shape[1]}")
    with without_autocast(clips.device):
        return torch.einsum("nij,nj...->ni...", matrices.to(clips), clips)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _check(clips: Tensor, joints: int) -> None:
    if clips.ndim not in (4, 5) or clips.shape[3] != joints:
        raise ValueError(
            f"clips must be (clips, channels, frames, {joints} joints) or that with persons, got {tuple(clips.shape)}"
        )
