"""A distilled data set as a file: a few synthetic images, their labels, the learning rate to train with, and where they come from."""

import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from coloss.errors import InputError
from coloss.train.atomic_text import whole_file

FORMAT_VERSION = 1

_ARRAYS = ("images", "labels", "mean", "scale")
_METADATA = {
    "format_version": int,
    "source": str,
    "seed": int,
    "images_per_class": int,
    "learning_rate": float,
    "momentum": float,
    "class_names": list,
    "augmentation": str,
}


@dataclass(frozen=True)
class DistilledDataset:
    """Synthetic images that stand for a training set.

    Args:
        images: as a network sees them: (raw - mean) / scale.
        labels: probabilities of each class, rows that sum to 1.
        learning_rate: of the SGD they were made for, > 0.
        momentum: likewise, in [0, 1).
        mean, scale: statistics of the real training images, which every image must be brought to; broadcast against one image.
        source: name or path of the data set they stand for.
        seed: of its split and of the distillation.
        images_per_class: as asked for.
        class_names: one for each class, or none.
        augmentation: name of what they were augmented by in distillation, and are in training; see `named_augmentation`.

    Raises:
        InputError: if a value is out of range or shapes do not agree.

    Examples:
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> distilled = DistilledDataset(
        ...     images, torch.eye(2), 0.05, 0.0, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), "digits", 0, 1
        ... )
        >>> import tempfile
        >>> path = distilled.save(Path(tempfile.mkdtemp()) / "distilled.npz")
        >>> again = DistilledDataset.load(path)
        >>> again.learning_rate, again.source, torch.equal(again.images, images)
        (0.05, 'digits', True)
    """

    images: Float[Tensor, "samples *shape"]
    labels: Float[Tensor, "samples classes"]
    learning_rate: float
    momentum: float
    mean: Float[Tensor, "..."]
    scale: Float[Tensor, "..."]
    source: str
    seed: int
    images_per_class: int
    class_names: tuple[str, ...] = ()
    augmentation: str = "none"

    def __post_init__(self) -> None:
        samples, classes = len(self.images), self.labels.shape[-1] if self.labels.ndim == 2 else 0
        checks = (
            (
                "images",
                samples >= 1 and self.images.ndim >= 2,
                "of one sample at least",
                tuple(self.images.shape),
            ),
            (
                "labels",
                classes >= 1 and len(self.labels) == samples,
                "probabilities, a row for each image",
                tuple(self.labels.shape),
            ),
            ("learning_rate", 0 < self.learning_rate < math.inf, "> 0 and finite", self.learning_rate),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)", self.momentum),
            ("images_per_class", self.images_per_class >= 1, ">= 1", self.images_per_class),
            (
                "class_names",
                len(self.class_names) in (0, classes),
                f"{classes} or none",
                len(self.class_names),
            ),
        )
        for name, fine, rule, value in checks:
            if not fine:
                raise InputError(f"{name} must be {rule}, got {value}")
        for name in _ARRAYS:
            if not torch.isfinite(getattr(self, name)).all():
                raise InputError(f"{name} must be finite")
        sums = self.labels.sum(1)
        if bool((self.labels < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            raise InputError("labels must be probabilities: at least 0, rows that sum to 1")
        try:
            fits = torch.broadcast_shapes(self.images.shape[1:], self.mean.shape, self.scale.shape)
        except RuntimeError:
            fits = torch.Size()
        if fits != self.images.shape[1:] or not bool((self.scale > 0).all()):
            raise InputError(
                f"mean and scale must fit an image of shape {tuple(self.images.shape[1:])} and scale must be > 0, "
                f"got shapes {tuple(self.mean.shape)} and {tuple(self.scale.shape)}"
            )

    @property
    def num_classes(self) -> int:
        """Classes that the labels tell apart."""
        return self.labels.shape[1]

    def normalize(self, raw: Tensor) -> Tensor:
        """Real images on the scale of these."""
        return (raw - self.mean.to(raw)) / self.scale.to(raw)

    def raw_images(self) -> Tensor:
        """The images on the scale of the real ones, to be looked at; they may leave [0, 1]."""
        return self.images * self.scale + self.mean

    def save(self, path: str | Path) -> Path:
        """Write an `.npz` file without pickles, whole or not at all.

        Raises:
            InputError: if it cannot be written.
        """
        path = Path(path)
        metadata = {name: getattr(self, name) for name in _METADATA if name != "format_version"}
        metadata["class_names"] = list(self.class_names)
        text = json.dumps({"format_version": FORMAT_VERSION, **metadata})
        arrays = {name: getattr(self, name).detach().cpu().float().numpy() for name in _ARRAYS}
        with whole_file(path) as temporary, temporary.open("xb") as file:
            np.savez_compressed(file, metadata=np.array(text), **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "DistilledDataset":
        """Read what `save` wrote.

        Raises:
            InputError: if the file is missing, truncated, of another kind or of a newer format.
        """
        path = Path(path)
        try:
            file = np.load(path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise KeyError("metadata")
            with file:
                arrays = {name: file[name] for name in ("metadata", *_ARRAYS)}
            metadata = json.loads(str(arrays.pop("metadata")))
            if not isinstance(metadata, dict) or "format_version" not in metadata:
                raise KeyError("format_version")
        except FileNotFoundError as error:
            raise InputError(f"there is no file {path}") from error
        except KeyError as error:
            missing = str(error.args[0]).split(" ")[0]  # numpy's own message goes on
            raise InputError(f"{path} is no distilled data set: it has no {missing!r}") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is truncated or no distilled data set ({reason})") from error
        return cls._checked(path, metadata, arrays)

    @classmethod
    def _checked(cls, path: Path, metadata: dict[str, Any], arrays: dict[str, Any]) -> "DistilledDataset":
        version = metadata["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version!r}, this coloss reads {FORMAT_VERSION}: update it"
            )
        for name, kind in _METADATA.items():
            kinds = (int, float) if kind is float else (kind,)
            if not isinstance(metadata.get(name), kinds) or isinstance(metadata.get(name), bool):
                raise InputError(
                    f"{path} is damaged: {name} must be of type {kind.__name__}, got {metadata.get(name)!r}"
                )
        for name, array in arrays.items():
            if array.dtype.kind != "f":
                raise InputError(f"{path} is damaged: {name} must hold floats, got {array.dtype}")
        values: dict[str, Any] = {name: metadata[name] for name in _METADATA if name != "format_version"}
        values["class_names"] = tuple(str(name) for name in values["class_names"])
        try:
            values |= {name: torch.from_numpy(array).float() for name, array in arrays.items()}
            return cls(**values)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from error


def holds_distilled(path: str | Path) -> bool:
    """Whether a file looks like a distilled data set, without reading its images.

    Examples:
        >>> holds_distilled("nowhere.npz")
        False
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = {name.removesuffix(".npy") for name in file.namelist()}
    except (OSError, zipfile.BadZipFile):
        return False
    return {"metadata", *_ARRAYS} <= names
