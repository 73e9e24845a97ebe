"""Pictures of moving figures from recorded motion, with exact joints and masks: bones as anti-aliased capsules, texture behind, bars in front.

What is seen is a simulation; how it moves is not, where the joints were recorded. Image coordinates are pixels: x to the right, y downwards,
(0, 0) in the middle of the upper left pixel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.data import Skeleton
from coloss.errors import InputError


class RenderedFigures(NamedTuple):
    """Pictures, and what is known of them.

    Attributes:
        images: colours in [0, 1].
        masks: share of each pixel that shows the figure, in [0, 1]; what a bar hides is 0.
        points: exact joints in pixels, NaN for a joint that is not there; hidden ones and those outside the picture included.
        visible: joints inside the picture that no bar hides.
    """

    images: Float[Tensor, "frames 3 height width"]
    masks: Float[Tensor, "frames height width"]
    points: Float[Tensor, "frames joints 2"]
    visible: Bool[Tensor, "frames joints"]


def orthographic_view(
    joints: Float[Tensor, "clips frames joints 3"],
    azimuth: Float[Tensor, " clips"],
    size: int,
    *,
    extent: float,
) -> tuple[Float[Tensor, "clips frames joints 2"], Float[Tensor, "clips frames joints"]]:
    """Joints as a far, level camera sees them, which looks at the middle of the body and does not follow it.

    Args:
        joints: in any unit, y upwards. NaN marks a joint that is not there.
        azimuth: direction of the camera about the vertical axis in radians, one for each clip.
        size: side of the square picture in pixels, >= 1.
        extent: what the picture's side spans, in the unit of the joints, > 0.

    Returns:
        Points in pixels, the middle of the clip's box (over joints and frames) in the middle of the picture; and depth in pixels, larger
        for what is nearer. A joint that is not there is NaN.

    Raises:
        InputError: for a size or an extent out of range.

    Examples:
        >>> post = torch.tensor([[[[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]]])
        >>> orthographic_view(post, torch.zeros(1), 9, extent=4.5)[0]
        tensor([[[[4., 6.],
                  [4., 2.]]]])
    """
    if size < 1:
        raise InputError(f"size must be >= 1, got {size}")
    if not 0 < extent < math.inf:
        raise InputError(f"extent must be > 0 and finite, got {extent}")
    sine, cosine = azimuth.sin()[:, None, None], azimuth.cos()[:, None, None]
    x, y, z = joints.unbind(-1)
    seen = torch.stack([cosine * x - sine * z, -y, sine * x + cosine * z], -1)
    flat = seen.flatten(1, 2)
    absent = flat.isnan()
    low = flat.masked_fill(absent, math.inf).amin(1)
    high = flat.masked_fill(absent, -math.inf).amax(1)
    middle = ((low + high) / 2)[:, None, None]
    pixels = (seen - middle) * (size / extent)
    return pixels[..., :2] + (size - 1) / 2, pixels[..., 2]


def render_figures(
    points: Float[Tensor, "frames joints 2"],
    bones: Skeleton | Sequence[tuple[int, int]],
    size: int | tuple[int, int],
    *,
    depth: Float[Tensor, "frames joints"] | None = None,
    radius: float | Float[Tensor, " bones"] = 1.5,
    colors: Float[Tensor, "bones 3"] | Float[Tensor, "frames bones 3"] | None = None,
    background: Float[Tensor, "frames 3 height width"] | None = None,
    bars: Float[Tensor, "frames 4 height width"] | None = None,
) -> RenderedFigures:
    r"""Draws figures of any skeleton at any size: each bone a capsule whose edge fades over one pixel.

    With d the distance of a pixel's middle from a bone of radius r, the bone covers $a = \operatorname{clamp}(r - d + 1/2, 0, 1)$ of the pixel.
    The figure covers the largest a of its bones, times what no bar hides; its colour there is that of the bones, the nearer in front.

    Args:
        points: joints in pixels. A bone with an end that is NaN is not drawn.
        bones: a skeleton, or (joint, joint) for each bone.
        size: of the picture in pixels: a side, or (height, width).
        depth: of each joint, larger for nearer; a bone is as near as the mean of its ends. Without it later bones are in front.
        radius: of the bones in pixels, > 0.
        colors: of the bones, in [0, 1]; white by default.
        background: black by default.
        bars: colour and share of each pixel that is hidden, in [0, 1], drawn over the figure; none by default.

    Returns:
        Pictures, soft masks, the points, and which joints are visible: inside, behind less than half of a bar.

    Raises:
        InputError: for a size or radius out of range, or a bone whose joints do not exist.

    Cost:
        Time and memory O(frames * bones * height * width), without a loop over any of them.

    Examples:
        >>> arm = render_figures(torch.tensor([[[1.0, 2.0], [3.0, 2.0]]]), [(1, 0)], 5, radius=0.5)
        >>> arm.masks[0, 2]
        tensor([0., 1., 1., 1., 0.])
        >>> arm.masks.sum().item(), arm.visible.tolist()
        (3.0, [[True, True]])
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InputError(f"size must be >= 1, got {size}")
    pairs = torch.tensor(bones.bones() if isinstance(bones, Skeleton) else list(bones)).reshape(-1, 2)
    count, joints = len(pairs), points.shape[1]
    if count == 0 or int(pairs.min()) < 0 or int(pairs.max()) >= joints:
        raise InputError(
            f"bones must be pairs of joints in [0, {joints}), at least one, got {pairs.tolist()}"
        )
    thickness = torch.as_tensor(radius, dtype=points.dtype, device=points.device).expand(count)
    if not bool((thickness > 0).all()):
        raise InputError(f"radius must be > 0, got {radius}")
    pairs = pairs.to(points.device)
    first, second = points[:, pairs[:, 0]], points[:, pairs[:, 1]]
    drawn = (first + second).isfinite().all(-1)
    cover = _capsules(first.nan_to_num(), second.nan_to_num(), thickness, height, width)
    cover = cover * drawn[..., None, None]

    mask = cover.amax(1)
    hue = points.new_ones(count, 3) if colors is None else colors
    hue = hue.expand(len(points), count, 3)
    if depth is not None:
        order = (depth[:, pairs[:, 0]] + depth[:, pairs[:, 1]]).nan_to_num(-math.inf).argsort(1)
        cover = cover.gather(1, order[..., None, None].expand_as(cover))
        hue = hue.gather(1, order[..., None].expand_as(hue))
    # From the front: what each bone leaves of those behind it.
    cover, hue = cover.flip(1), hue.flip(1)
    shown = cover * torch.cat([torch.ones_like(cover[:, :1]), (1 - cover).cumprod(1)[:, :-1]], 1)
    colour = torch.einsum("fbhw,fbc->fchw", shown, hue)
    colour = colour / shown.sum(1).clamp(min=torch.finfo(shown.dtype).tiny)[:, None]
    images = mask[:, None] * colour
    if background is not None:
        images = images + (1 - mask[:, None]) * background
    hidden = points.new_zeros(len(points), height, width)
    if bars is not None:
        hidden = bars[:, 3]
        images = hidden[:, None] * bars[:, :3] + (1 - hidden[:, None]) * images
        mask = mask * (1 - hidden)
    return RenderedFigures(images, mask, points, _visible(points, hidden))


def _capsules(first: Tensor, second: Tensor, radius: Tensor, height: int, width: int) -> Tensor:
    """Share of each pixel that each bone covers, (frames, bones, height, width)."""
    rows = torch.arange(height, dtype=first.dtype, device=first.device)[:, None]
    columns = torch.arange(width, dtype=first.dtype, device=first.device)[None, :]
    along = second - first
    x, y = (columns - first[..., 0, None, None], rows - first[..., 1, None, None])
    dx, dy = along[..., 0, None, None], along[..., 1, None, None]
    length = (dx.square() + dy.square()).clamp(min=torch.finfo(first.dtype).tiny)
    place = ((x * dx + y * dy) / length).clamp(0, 1)
    distance = ((x - place * dx).square() + (y - place * dy).square()).sqrt()
    return (radius[:, None, None] - distance + 0.5).clamp(0, 1)


def _visible(points: Tensor, hidden: Tensor) -> Tensor:
    """Joints inside the picture of which a bar hides less than half."""
    height, width = hidden.shape[1:]
    known = points.isfinite().all(-1)
    x, y = points.nan_to_num(-1e6).round().long().unbind(-1)
    inside = known & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(1)
    return inside & (hidden.flatten(1).gather(1, place) < 0.5)


def textured_background(
    count: int, size: int | tuple[int, int], generator: torch.Generator | None = None
) -> Float[Tensor, "count 3 height width"]:
    """Random textures: noise on grids of 2, 4, 8, ... cells, each finer one half as strong, between two random colours.

    Args:
        count: textures, >= 0.
        size: in pixels: a side, or (height, width).
        generator: of randomness.

    Returns:
        Colours in [0, 1].

    Raises:
        InputError: for a count or size out of range.

    Examples:
        >>> textured_background(2, 16, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 16, 16])
    """
    height, width = _checked_sides(count, size)
    noise = torch.zeros(count, 1, height, width)
    cells, strength = 2, 1.0
    while cells <= max(height, width) and count:
        grid = torch.randn(count, 1, cells, cells, generator=generator)
        noise = noise + strength * F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        cells, strength = 2 * cells, strength / 2
    first, second = torch.rand(2, count, 3, 1, 1, generator=generator).unbind(0)
    return torch.lerp(first, second, noise.sigmoid()).clamp(0, 1)


def occluding_bars(
    count: int,
    size: int | tuple[int, int],
    generator: torch.Generator | None = None,
    *,
    bars: int = 2,
    thickness: tuple[float, float] = (0.03, 0.09),
) -> Float[Tensor, "count 4 height width"]:
    """Straight bars of one random colour across each picture, at random places and angles, their edges fading over one pixel.

    Args:
        count: pictures, >= 0.
        size: in pixels: a side, or (height, width).
        generator: of randomness.
        bars: in each picture, >= 0.
        thickness: least and largest, as a share of the longer side, 0 <= least <= largest.

    Returns:
        Colour, and the share of each pixel that is hidden, all in [0, 1].

    Raises:
        InputError: for a value out of range.

    Examples:
        >>> covered = occluding_bars(1, 32, torch.Generator().manual_seed(0))[0, 3]
        >>> 0 < covered.mean().item() < 0.5
        True
    """
    height, width = _checked_sides(count, size)
    low, high = thickness
    if bars < 0:
        raise InputError(f"bars must be >= 0, got {bars}")
    if not 0 <= low <= high:
        raise InputError(f"thickness must be 0 <= least <= largest, got {thickness}")
    side = max(height, width)
    draws = torch.rand(count, bars, 4, 1, 1, generator=generator)
    colour = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, height, width)
    angle = draws[:, :, 0] * math.pi
    rows = torch.arange(height)[:, None] - draws[:, :, 1] * (height - 1)
    columns = torch.arange(width)[None, :] - draws[:, :, 2] * (width - 1)
    distance = (angle.sin() * columns - angle.cos() * rows).abs()
    half = side * (low + (high - low) * draws[:, :, 3]) / 2
    cover = (half - distance + 0.5).clamp(0, 1)
    hidden = cover.amax(1, keepdim=True) if bars else torch.zeros(count, 1, height, width)
    return torch.cat([colour, hidden], 1)


def _checked_sides(count: int, size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if count < 0:
        raise InputError(f"count must be >= 0, got {count}")
    if height < 1 or width < 1:
        raise InputError(f"size must be >= 1, got {size}")
    return height, width


def side_colors(
    skeleton: Skeleton, count: int, generator: torch.Generator | None = None
) -> Float[Tensor, "count bones 3"]:
    """Colours for the bones of some figures that tell left from right: warm on the left, cool on the right, grey in the middle.

    Each figure's are jittered by up to 0.15. Without knowledge of the sides (`skeleton.mirror`) all bones are grey.

    Args:
        skeleton: of the figures.
        count: figures, >= 0.
        generator: of randomness.

    Returns:
        Colours in [0, 1], in the order of `skeleton.bones()`.

    Examples:
        >>> side_colors(Skeleton((-1, 0, 0), ("hips", "left", "right"), mirror=(0, 2, 1)), 4).shape
        torch.Size([4, 2, 3])
    """
    palette = torch.tensor([[0.85, 0.85, 0.85], [0.95, 0.45, 0.25], [0.25, 0.5, 0.95]])
    mirror = skeleton.mirror or tuple(range(skeleton.num_joints))
    left = {joint for name, part in skeleton.parts.items() if name.startswith("left") for joint in part}
    sides = []
    for joint, _ in skeleton.bones():
        pair = mirror[joint]
        # Without named parts the lower number of a pair counts as left.
        is_left = joint in left or (joint not in left and pair not in left and joint < pair)
        sides.append(0 if pair == joint else 1 if is_left else 2)
    jitter = (torch.rand(count, 1, 3, generator=generator) - 0.5) * 0.3
    return (palette[sides] + jitter).clamp(0, 1)
