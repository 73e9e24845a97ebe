"""Images in folders, one folder for each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coloss.data.prepare import Labelled
from coloss.data.splitting import PART_NAMES, TRAIN
from coloss.data.tables import encode_targets, require_rows
from coloss.errors import InputError

RESIZED_SIDE = 64
"""Side in pixels that images of different or very large sizes are brought to."""

LARGEST_KEPT_SIDE = 256
"""Images of one common size are kept as they are up to this side."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of files read as images; other files are passed over."""

_GREY_MODES = ("1", "L", "I", "I;16", "F")


def labelled_images(folder: Path) -> Labelled:
    """Rows of a folder of images by class: `folder/CLASS/*.png`, or with parts `folder/train/CLASS/*.png`, `folder/test/CLASS/*.png`.

    Images keep their size if all share one of at most 256 x 256 pixels; otherwise each is resized to 64 x 64. They are grey (one channel)
    if all are, else RGB; transparency is put on white. Only the rows that are used are decoded.

    Args:
        folder: with one folder for each class, or parts (train, val, test) of such.

    Raises:
        InputError: if there are no images, one class only, or an image cannot be read; the message names it.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for label, shade in [("dark", 20), ("light", 230)]:
        ...     (folder / label).mkdir()
        ...     for number in range(6):
        ...         Image.new("L", (8, 8), shade).save(folder / label / f"{number}.png")
        >>> labelled_images(folder).inputs[np.array([0, 11])].shape
        (2, 8, 8)
    """
    parts_found = [child for child in _folders(folder) if child.name.lower() in PART_NAMES]
    with_parts = len(parts_found) == len(_folders(folder)) and any(
        PART_NAMES[child.name.lower()] == TRAIN for child in parts_found
    )
    paths: list[Path] = []
    labels: list[str] = []
    parts: list[int] = []
    for root in parts_found if with_parts else [folder]:
        for class_folder in _folders(root):
            found = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            paths += [path for path in found if not path.name.startswith(".")]
            labels += [class_folder.name] * (len(paths) - len(labels))
            parts += [PART_NAMES.get(root.name.lower(), TRAIN)] * (len(paths) - len(parts))
    if not paths:
        raise InputError(
            f"{folder} must hold one folder of images for each class ({', '.join(IMAGE_SUFFIXES)}), got no image"
        )
    require_rows(len(paths), str(folder))
    _, targets, class_names = encode_targets(np.array(labels), f"folders of {folder}", "classification")
    images = LazyImages(paths)
    return Labelled(
        str(folder),
        "classification",
        "image",
        images,
        targets,
        class_names,
        np.array(parts) if with_parts else None,
        note=images.note,
    )


class LazyImages:
    """Images that are decoded when rows are asked for, as uint8 (rows, height, width[, 3]) of one size.

    Args:
        sources: paths, or PIL images.

    Raises:
        InputError: if one cannot be read.

    Examples:
        >>> LazyImages([Image.new("RGB", (4, 6)), Image.new("L", (9, 9))])[np.array([1])].shape
        (1, 64, 64, 3)
    """

    def __init__(self, sources: Sequence[Any]):
        self._sources = sources
        sizes, modes = set(), set()
        for number in range(len(sources)):
            with self._opened(number) as image:
                sizes.add(image.size)
                modes.add(image.mode)
        self._grey = modes <= set(_GREY_MODES)
        common = next(iter(sizes)) if len(sizes) == 1 else None
        self._keep = common is not None and max(common) <= LARGEST_KEPT_SIDE
        self.note = "" if self._keep else f"images resized to {RESIZED_SIDE} x {RESIZED_SIDE}"

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, rows: NDArray) -> NDArray[np.uint8]:
        return np.stack([self._decoded(int(row)) for row in rows])

    def _opened(self, number: int) -> Image.Image:
        source = self._sources[number]
        if isinstance(source, Image.Image):
            return source.copy()
        try:
            return Image.open(source)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._unreadable(number, error) from error

    def _decoded(self, number: int) -> NDArray[np.uint8]:
        with self._opened(number) as image:
            try:
                picture = _grey(image) if self._grey else _coloured(image)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise self._unreadable(number, error) from error
            if not self._keep:
                picture = picture.resize((RESIZED_SIDE, RESIZED_SIDE), Image.Resampling.BILINEAR)
            return np.asarray(picture, dtype=np.uint8)

    def _unreadable(self, number: int, error: Exception) -> InputError:
        source = self._sources[number]
        name = f"image {number}" if isinstance(source, Image.Image) else str(source)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return InputError(f"{name} cannot be read as an image ({reason}): replace or delete it")


def _grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey has no conversion of its own to 8 bits: Pillow would clip it.
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    return image.convert("L")


def _coloured(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return (_grey(image) if image.mode in _GREY_MODES else image).convert("RGB")


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
