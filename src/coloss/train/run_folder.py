"""What a folder of `coloss run` holds besides weights and checkpoints: what it is for, and the metrics."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coloss.errors import InputError
from coloss.train.atomic_text import write_atomically


def claim_folder(folder: Path, run: Mapping[str, Any]) -> None:
    """Write down in `run.json` what a folder is for; refuse one that is for something else.

    Args:
        folder: made if it is not there.
        run: plain JSON values, `data` and `seed` among them.

    Raises:
        InputError: if it holds another run, or cannot be read or written.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> claim_folder(folder, {"data": "iris", "seed": 0})
        >>> claim_folder(folder, {"data": "iris", "seed": 0})  # the same run goes on
        >>> read_run(folder)
        {'data': 'iris', 'seed': 0}
    """
    path = folder / "run.json"
    if not path.exists():
        _write(path, run)
        return
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): choose another folder") from error
    if stored == json.loads(json.dumps(run)):
        return
    asked, held = (tuple(values.get(name) for name in ("data", "seed")) for values in (run, stored))
    what = f"a run on {held[0]!r} with seed {held[1]}"
    if asked == held:
        what += " and other settings"
    raise InputError(f"{folder} holds {what}: choose another folder")


def read_run(folder: Path) -> dict[str, Any]:
    """What `claim_folder` wrote down.

    Raises:
        InputError: if it is not there, or damaged.

    Examples:
        >>> read_run(Path("nowhere"))
        Traceback (most recent call last):
        coloss.errors.InputError: nowhere holds no encoder that can be read ([Errno 2] No such file or directory: 'nowhere/run.json')
    """
    try:
        found = json.loads((folder / "run.json").read_text())
        if not isinstance(found, dict):
            raise ValueError("run.json is no object")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no encoder that can be read ({error})") from error


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Store numbers in `metrics.json`, whole or not at all; a value that is not finite becomes null.

    Raises:
        InputError: if it cannot be written.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_metrics(folder, {"knn": 0.5, "rankme": math.nan})
        >>> json.loads((folder / "metrics.json").read_text())
        {'knn': 0.5, 'rankme': None}
    """
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    _write(folder / "metrics.json", finite)


def source_name(data: str) -> str:
    """A path in full, so that the same file is known again from another working directory; other names as they are.

    Examples:
        >>> source_name("iris")
        'iris'
    """
    return str(Path(data).resolve()) if Path(data).exists() else data


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=1) + "\n")
