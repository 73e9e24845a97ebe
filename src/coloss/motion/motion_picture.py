"""A clip as something to look at: an animated picture, and a strip of poses for a page."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter1d

from coloss.data import Skeleton
from coloss.errors import InputError
from coloss.motion.body_view import BodyView, Shape, Side
from coloss.train.atomic_text import whole_file

_PAPER, _INK = (247, 245, 240), (52, 58, 70)
_COLORS: dict[Side, tuple[int, int, int]] = {
    "left": (226, 92, 52),
    "right": (36, 122, 181),
    "middle": (74, 82, 98),
}
_FINE = 3  # drawn so many times larger, then reduced: smooth edges
_FASTEST = 30.0  # frames per second that viewers of GIF files keep up with
_ZOOM = 0.6  # height of the body, as a share of the picture's

_STRIP_COLORS: dict[Side, str] = {"left": "#e06c3f", "right": "#3d8fc9", "middle": "#7c8697"}
_STRIP_TEXT = "#7d8694"


def save_gif(
    path: str | Path,
    joints: NDArray[np.floating],
    skeleton: Skeleton,
    fps: float,
    caption: str = "",
    *,
    size: int = 400,
) -> None:
    """Write an animated picture of a clip: the body on a grid, its left side orange and its right side blue.

    The camera follows the body, so the grid passes below it and the line behind it shows where it came from.

    Args:
        path: ends in `.gif`.
        joints: (frames, joints, 3), y up, any unit; joints that are not seen may be NaN.
        skeleton: `parts` give the colours, `face` the trunk and where to look from.
        fps: frames per second, > 0; above 30 frames are left out, the tempo stays.
        caption: a sentence below the picture.
        size: width in pixels, >= 64; the height is the same, and the caption's lines.

    Raises:
        InputError: for joints of another skeleton, no frames, an option out of range, another ending, or if the file cannot be written.

    Cost:
        About 0.07 s and 15 kB for each frame of 400 pixels.

    Examples:
        >>> import tempfile
        >>> from coloss.data.skeleton import SKELETONS
        >>> path = Path(tempfile.mkdtemp()) / "noise.gif"
        >>> noise = np.random.default_rng(0).normal(size=(2, 21, 3))
        >>> save_gif(path, noise, SKELETONS["bandai"], fps=15, caption="nothing that anybody does", size=64)
        >>> Image.open(path).n_frames
        2
    """
    target = Path(path)
    if target.suffix.lower() != ".gif":
        raise InputError(f"path must end in .gif, got {target.name!r}")
    if size < 64:
        raise InputError(f"size must be >= 64, got {size}")
    if not (fps > 0 and math.isfinite(fps)):
        raise InputError(f"fps must be > 0, got {fps}")
    view = BodyView(joints, skeleton)
    kept = np.arange(len(view.joints))
    if fps > _FASTEST:
        kept = kept[np.unique(np.arange(0, len(kept), fps / _FASTEST).astype(int))]
    places = np.array([view.place(frame) for frame in range(len(view.joints))])
    looks = gaussian_filter1d(places, 0.4 * fps, axis=0, mode="nearest")
    font = ImageFont.load_default(max(size // 24, 10))
    lines = _wrapped(caption, font, 0.9 * size)
    frames = [_frame(view, int(frame), places, looks, size, lines, font) for frame in kept]
    # One set of colours for all frames: no flicker.
    sample = Image.new("RGB", (frames[0].width, frames[0].height * min(len(frames), 5)))
    for row, number in enumerate(np.linspace(0, len(frames) - 1, min(len(frames), 5)).astype(int)):
        sample.paste(frames[number], (0, row * frames[0].height))
    palette = sample.quantize(96, method=Image.Quantize.MEDIANCUT)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    # A file counts in hundredths of a second: what a rounded one lacks, the next one gets.
    ends = np.round(100 * np.append(kept[1:], len(view.joints)) / fps) * 10
    durations = np.maximum(np.diff(ends, prepend=0.0), 20).astype(int).tolist()
    with whole_file(target) as temporary:
        indexed[0].save(
            temporary,
            "GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=durations,
            loop=0,
            optimize=False,
        )


def film_strip_svg(
    joints: NDArray[np.floating], skeleton: Skeleton, fps: float, caption: str = "", *, poses: int = 7
) -> str:
    """A row of poses with their times and a sentence below, as one SVG element that reads well on light and on dark pages.

    The poses are evenly spaced in time and seen from one side, so that a turn shows; a small map shows the way from above where there is one.

    Args:
        joints: (frames, joints, 3), y up, any unit; joints that are not seen may be NaN.
        skeleton: see `save_gif`.
        fps: frames per second, > 0.
        caption: the sentence.
        poses: how many, >= 2 (a clip with fewer frames shows them all).

    Returns:
        The element, which carries caption and duration in words for screen readers.

    Raises:
        InputError: for joints of another skeleton, no frames, or an option out of range.

    Examples:
        >>> from coloss.data.skeleton import SKELETONS
        >>> noise = np.random.default_rng(0).normal(size=(30, 21, 3))
        >>> svg = film_strip_svg(noise, SKELETONS["bandai"], fps=15, caption="a person <jumps>", poses=4)
        >>> svg.startswith("<svg"), svg.count("<g "), "a person &lt;jumps&gt;" in svg
        (True, 4, True)
    """
    if poses < 2:
        raise InputError(f"poses must be >= 2, got {poses}")
    if not (fps > 0 and math.isfinite(fps)):
        raise InputError(f"fps must be > 0, got {fps}")
    view = BodyView(joints, skeleton)
    chosen = np.unique(np.linspace(0, len(view.joints) - 1, poses).round().astype(int))
    cell, unit, foot = 112.0, 122.0, 186.0
    places = np.array([view.place(frame) for frame in range(len(view.joints))])[:, [0, 2]]
    travelled = float(np.ptp(places, axis=0).max()) > 0.4 * view.height
    width = cell * len(chosen) + (cell if travelled else 0.0)
    height = foot + (58.0 if caption else 30.0)
    parts = []
    for column, frame in enumerate(chosen):
        middle = cell * (column + 0.5)
        shapes = view.shapes(int(frame))
        drawn = "".join(_shape_svg(shape, middle, foot - 0.48 * unit, unit) for shape in shapes)
        parts.append(
            f'<ellipse cx="{middle:g}" cy="{foot}" rx="30" ry="7" fill="{_STRIP_TEXT}" fill-opacity=".18"/>'
            f'<g stroke-linecap="round" stroke-linejoin="round">{drawn}</g>'
            f'<text x="{middle:g}" y="{foot + 22}" text-anchor="middle" font-size="11">{frame / fps:.1f} s</text>'
        )
    if travelled:
        parts.append(_map_svg(view, places, chosen, cell * (len(chosen) + 0.5), foot))
    if caption:
        parts.append(
            f'<text x="{width / 2:g}" y="{height - 10:g}" text-anchor="middle" font-size="16" '
            f'font-style="italic">{html.escape(caption)}</text>'
        )
    seconds = len(view.joints) / fps
    words = html.escape(f"{caption or 'a motion'}: {len(chosen)} poses in {seconds:.1f} seconds", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{words}" font-family="system-ui, sans-serif" fill="{_STRIP_TEXT}">{"".join(parts)}</svg>'
    )


def _wrapped(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _frame(
    view: BodyView,
    frame: int,
    places: NDArray[np.float64],
    looks: NDArray[np.float64],
    size: int,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> Image.Image:
    wide, look = size * _FINE, looks[frame]
    picture = Image.new("RGB", (wide, wide), _PAPER)
    draw = ImageDraw.Draw(picture)

    def pixels(points: NDArray[np.float64]) -> list[tuple[float, float]]:
        flat = np.atleast_2d(points) * _ZOOM * wide
        return [(wide / 2 + x, 0.49 * wide - y) for x, y in flat]

    _grid(draw, view, look, pixels, wide)
    behind = view.project(places[max(0, frame - 400) : frame + 1], look)[0]
    if len(behind) > 1:
        draw.line(pixels(behind), fill=_mixed(_INK, 0.35), width=wide // 130, joint="curve")
    draw.polygon(pixels(view.shadow(frame, look)), fill=_mixed(_INK, 0.16))
    shapes = view.shapes(frame, look)
    near, far = min(shape.depth for shape in shapes), max(shape.depth for shape in shapes)
    for shape in shapes:
        # A rim in the colour of the paper keeps limbs apart; what is far is paler.
        color = _mixed(_COLORS[shape.side], 1 - 0.3 * (shape.depth - near) / max(far - near, 1e-9))
        points, radius = pixels(shape.points), shape.radius * _ZOOM * wide
        _solid(draw, points, radius + wide / 260, _PAPER)
        _solid(draw, points, radius, color)
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    bar = 3
    step = round(font.size * 1.35) if isinstance(font, ImageFont.FreeTypeFont) else 14
    whole = Image.new("RGB", (size, size + step * len(lines) + (step // 2 if lines else 0)), _PAPER)
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    for row, line in enumerate(lines):
        draw.text((size / 2, size + step * row), line, fill=_INK, font=font, anchor="ma")
    share = (frame + 1) / len(view.joints)
    draw.rectangle((0, whole.height - bar, size * share, whole.height), fill=_mixed(_INK, 0.45))
    return whole


def _grid(draw: ImageDraw.ImageDraw, view: BodyView, look: NDArray[np.float64], pixels, wide: int) -> None:
    """Lines on the floor that grow pale with their distance from where the camera looks."""
    step, reach = 0.35 * view.height, 7
    ends = np.linspace(-reach, reach, 4 * reach + 1) * step
    lines = np.arange(-reach, reach + 1) * step
    points = np.zeros((2, len(lines), len(ends), 3))
    points[0, ..., 0], points[0, ..., 2] = lines[:, None], ends
    points[1, ..., 2], points[1, ..., 0] = lines[:, None], ends
    points += np.round(look / step) * step
    points[..., 1] = view.floor
    away = np.linalg.norm((points - look)[..., [0, 2]], axis=-1) / (reach * step)
    strength = 0.22 * np.maximum(0.0, 1 - (away[..., 1:] + away[..., :-1]) / 2) ** 1.2
    flat = view.project(points, look)[0]
    for axis, line, piece in zip(*np.nonzero(strength > 0.01)):
        color = _mixed(_INK, float(strength[axis, line, piece]))
        draw.line(pixels(flat[axis, line, piece : piece + 2]), fill=color, width=max(wide // 500, 1))


def _solid(
    draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], radius: float, color: tuple[int, int, int]
) -> None:
    if len(points) > 2:
        draw.polygon(points, fill=color)
    edges = [*zip(points, points[1:])] + ([(points[-1], points[0])] if len(points) > 2 else [])
    for (x, y), (u, v) in edges:
        length = math.hypot(u - x, v - y)
        if length > 1e-9:
            dx, dy = radius * (v - y) / length, radius * (x - u) / length
            draw.polygon([(x + dx, y + dy), (u + dx, v + dy), (u - dx, v - dy), (x - dx, y - dy)], fill=color)
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _mixed(color: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """So much of a colour on the paper."""
    red, green, blue = (
        round(share * mine + (1 - share) * paper) for mine, paper in zip(color, _PAPER, strict=True)
    )
    return red, green, blue


def _shape_svg(shape: Shape, x: float, y: float, unit: float) -> str:
    points = [(x + unit * px, y - unit * py) for px, py in shape.points]
    color, radius = _STRIP_COLORS[shape.side], unit * shape.radius
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="{radius:.1f}" fill="{color}"/>'
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    if len(points) > 2:
        return f'<path d="{path}Z" fill="{color}" stroke="{color}" stroke-width="{2 * radius:.1f}"/>'
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{2 * radius:.1f}"/>'


def _map_svg(
    view: BodyView, places: NDArray[np.float64], chosen: NDArray[np.int64], x: float, foot: float
) -> str:
    """The way on the floor from above, as the camera's left and right; a dot for each pose, the last one large."""
    ground = np.zeros((len(places), 3))
    ground[:, [0, 2]] = places
    flat = view.ground_plan(ground)
    low, high = flat.min(0), flat.max(0)
    scale = 70.0 / max(float((high - low).max()), 1e-9)
    flat = (flat - (low + high) / 2) * scale
    points = [(x + px, foot - 62 - py) for px, py in flat]
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    dots = "".join(
        f'<circle cx="{points[frame][0]:.1f}" cy="{points[frame][1]:.1f}" r="{4.5 if frame == chosen[-1] else 2.2}"/>'
        for frame in chosen
    )
    return (
        f'<path d="{path}" fill="none" stroke="{_STRIP_TEXT}" stroke-width="1.6" stroke-linejoin="round"/>{dots}'
        f'<text x="{x:g}" y="{foot + 22}" text-anchor="middle" font-size="11">from above</text>'
    )
