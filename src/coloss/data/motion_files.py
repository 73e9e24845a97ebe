"""Files of recorded motion: the data sets by name, and an `.npz` file of one's own."""

from pathlib import Path
from typing import Any

import numpy as np

from coloss.data.catalog import dataset_info, locate
from coloss.data.formats import read_arrays
from coloss.data.motion_clips import MotionClips
from coloss.data.skeleton import SKELETONS, Skeleton
from coloss.errors import InputError

_LABELS = {
    "bandai": ("action", "style", "part"),
    "hdm05": ("action", "actor"),
    "msr-action3d": ("action", "subject", "trial"),
    "sfinge-hands": ("gesture", "take"),
}
_FIELDS = {
    *("joints", "parents", "fps", "start", "length", "joint_names", "mirror", "units", "split", "names"),
    *("feet", "face", "joint"),
}
"""Names in a file that no label may have; that of a label `joint` would take the names of the joints."""


def load_motion(source: str | Path) -> MotionClips:
    """Clips of a data set by name, or of an `.npz` file of one's own.

    - `bandai`: metres; labels `action`, `style`, `part`.
    - `hdm05`: metres; labels `action`, `actor`; train and test actors differ.
    - `msr-action3d`: screen units, brought to the axes of the others (x to the person's left, y up, z towards the camera); labels
      `action`, `subject`, `trial`; train and test subjects differ. Frames without a skeleton are NaN, the one clip that has no other is
      left out.
    - `sfinge-hands`: metres; labels `gesture`, `take`.

    A file holds `joints` (frames, joints, 3), `parents` (joints), `fps`, and `start`, `length` (clips), where there is more than one clip;
    optionally `joint_names`, `mirror`, `units`, `split` (0, 1, 2), `names`, and for each label NAME whole numbers (clips) and their
    `NAME_names`. `save_motion` writes it.

    Args:
        source: a name, or a path.

    Raises:
        UnknownNameError: if it is neither; close names are proposed.
        DataNotFoundError: if the file is not there.
        InputError: if it does not hold motion.

    Examples:
        >>> clips = load_motion("msr-action3d")  # doctest: +SKIP
        >>> len(clips), clips.skeleton.num_joints  # doctest: +SKIP
        (566, 20)
    """
    text = str(source)
    if text not in SKELETONS:
        if isinstance(source, Path) or text.endswith(".npz") or "/" in text:
            return _own(Path(source).expanduser())
        info = dataset_info(text)
        raise InputError(
            f"data set {text!r} ({info.kind}) holds no motion: choose one of {', '.join(SKELETONS)}"
        )
    arrays = read_arrays(locate(text))
    joints = arrays["joints_mm" if text == "bandai" else "joints"].astype(np.float32)
    if text == "bandai":
        joints /= np.float32(1000)
    if text == "msr-action3d":
        unseen = ~joints.any((1, 2))
        joints = -joints
        joints[unseen] = np.nan
    labels = {name: arrays[name].astype(np.int64) for name in _LABELS[text]}
    count = len(arrays["start"])
    clips = MotionClips(
        joints,
        arrays["start"],
        arrays["length"].astype(np.int64),
        SKELETONS[text],
        {"sfinge-hands": 20.0}.get(text, 15.0),
        "screen" if text == "msr-action3d" else "m",
        labels,
        {
            name: tuple(str(value) for value in arrays[f"{name}_names"])
            for name in labels
            if f"{name}_names" in arrays
        },
        arrays["split"],
        tuple(str(name) for name in arrays["clip"]) if "clip" in arrays else tuple(map(str, range(count))),
        text,
    )
    return clips.select([index for index in range(count) if not np.isnan(clips.clip(index)).all()])


def save_motion(path: str | Path, clips: MotionClips) -> None:
    """Write clips to an `.npz` file that `load_motion` reads again.

    Args:
        path: ends in `.npz`.
        clips: any.

    Raises:
        InputError: for another ending, a label whose name the file needs for something else, or if it cannot be written.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "wave.npz"
        >>> save_motion(
        ...     path, MotionClips.from_list([np.zeros((4, 2, 3))], Skeleton((-1, 0)), fps=20, names=["wave"])
        ... )
        >>> load_motion(path).names
        ('wave',)
    """
    target = Path(path)
    if target.suffix != ".npz":
        raise InputError(f"path must end in .npz, got {target.name!r}")
    skeleton = clips.skeleton
    arrays: dict[str, Any] = {
        "joints": np.concatenate([clips.clip(index) for index in range(len(clips))])
        if len(clips)
        else clips.joints[:0],
        "start": np.cumsum(clips.length) - clips.length,
        "length": clips.length,
        "parents": np.array(skeleton.parents),
        "fps": np.array(clips.fps),
        "units": np.array(clips.units),
        "split": clips.split,
        "names": np.array(clips.names, dtype=np.str_),
    }
    if skeleton.names:
        arrays["joint_names"] = np.array(skeleton.names, dtype=np.str_)
    if skeleton.mirror is not None:
        arrays["mirror"] = np.array(skeleton.mirror)
    for name, joints in (("feet", skeleton.feet), ("face", skeleton.face)):
        if joints is not None:
            arrays[name] = np.array(joints)
    for name, part in skeleton.parts.items():
        arrays[f"part_{name}"] = np.array(part)
    for name, values in clips.labels.items():
        if _is_reserved(name):
            raise InputError(f"labels must have names that the file has no other use for, got {name!r}")
        arrays[name] = values
        if name in clips.label_names:
            arrays[f"{name}_names"] = np.array(clips.label_names[name], dtype=np.str_)
    try:
        with target.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error


def _own(path: Path) -> MotionClips:
    arrays = read_arrays(path)
    for field in ("joints", "parents", "fps"):
        if field not in arrays:
            raise InputError(
                f"{path} holds no motion: {field!r} is missing, it has {', '.join(sorted(arrays))}"
            )
    joints = arrays["joints"]
    if joints.ndim != 3 or joints.shape[-1] != 3:
        raise InputError(f"{path}: joints must be (frames, joints, 3), got {joints.shape}")
    start = arrays.get("start", np.zeros(1, np.int64)).astype(np.int64)
    length = arrays.get("length", np.array([len(joints)])).astype(np.int64)
    labels = {
        name: values.astype(np.int64)
        for name, values in arrays.items()
        if not _is_reserved(name) and values.shape == start.shape and values.dtype.kind in "iu"
    }
    try:
        skeleton = Skeleton(
            tuple(int(parent) for parent in arrays["parents"]),
            tuple(str(name) for name in arrays["joint_names"]) if "joint_names" in arrays else (),
            tuple(int(joint) for joint in arrays["mirror"]) if "mirror" in arrays else None,
            {
                name.removeprefix("part_"): tuple(int(joint) for joint in values)
                for name, values in arrays.items()
                if name.startswith("part_")
            },
            feet=_four(arrays.get("feet")),
            face=_four(arrays.get("face")),
        )
        return MotionClips(
            joints.astype(np.float32),
            start,
            length,
            skeleton,
            float(arrays["fps"]),
            str(arrays.get("units", "m")),
            labels,
            {
                name: tuple(str(value) for value in arrays[f"{name}_names"])
                for name in labels
                if f"{name}_names" in arrays
            },
            arrays.get("split", np.zeros(len(start), np.uint8)).astype(np.uint8),
            tuple(str(name) for name in arrays.get("names", np.arange(len(start)))),
            str(path),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _four(joints: Any) -> tuple[int, int, int, int] | None:
    if joints is None or len(joints) != 4:
        return None
    first, second, third, fourth = (int(joint) for joint in joints)
    return first, second, third, fourth


def _is_reserved(name: str) -> bool:
    return name in _FIELDS or name.startswith("part_")
