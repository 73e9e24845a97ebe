"""Training state on disk: safetensors for tensors, JSON for the rest, written whole or not at all; never pickle.

A checkpoint is a folder `step-00000120/` with `tensors.safetensors` and `state.json` (which holds the tensors' checksum). It is made
under a temporary name and renamed when complete, so a killed run leaves complete checkpoints only.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coloss.errors import InputError


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: int = 2
) -> Path:
    """Store one checkpoint and drop all but the newest `keep`.

    Raises:
        InputError: if the folder cannot be written.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".step-*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
            temporary / "tensors.safetensors",
        )
        checksum = hashlib.sha256((temporary / "tensors.safetensors").read_bytes()).hexdigest()
        (temporary / "state.json").write_text(json.dumps({"checksum": checksum, "step": step, **values}))
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError as error:
        raise InputError(f"cannot write a checkpoint in {folder}: {error.strerror or error}") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one checkpoint back.

    Raises:
        InputError: if a file is missing, damaged or altered; the message says which checkpoint and what to do.
    """
    try:
        values = json.loads((path / "state.json").read_text())
        content = (path / "tensors.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != values.pop("checksum"):
            raise ValueError("the tensors do not match their checksum")
        return load_file(path / "tensors.safetensors"), values
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"the checkpoint {path} is damaged ({error}); delete that folder to resume from the one before"
        ) from error


def split_state(prefix: str, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part a module's state dict into tensors and JSON values, names under `prefix`.

    Raises:
        InputError: if a value is neither a tensor nor plain JSON.
    """
    tensors, values = {}, {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
        else:
            try:
                json.dumps(value)
            except TypeError as error:
                raise InputError(
                    f"the state {prefix}{name} must be a tensor or plain JSON, got {type(value).__name__}"
                ) from error
            values[f"{prefix}{name}"] = value
    return tensors, values


def join_state(prefix: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `split_state`."""
    merged: dict[str, Any] = {**tensors, **values}
    return {name.removeprefix(prefix): value for name, value in merged.items() if name.startswith(prefix)}


def split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part an optimizer's state into tensors (`optimizer/<parameter>/<name>`) and JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"optimizer/{index}/{name}"] = value
    groups = [
        {k: float(v) if isinstance(v, Tensor) else v for k, v in g.items()} for g in state["param_groups"]
    ]
    return tensors, {"state": values, "groups": groups}


def join_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Load what `split_optimizer` stored."""
    state: dict[int, dict[str, Any]] = {}
    stored = {k: v for k, v in tensors.items() if k.startswith("optimizer/")} | values["state"]
    for key, value in stored.items():
        _, index, name = key.split("/", 2)
        state.setdefault(int(index), {})[name] = value
    groups = []
    for saved, present in zip(values["groups"], optimizer.state_dict()["param_groups"], strict=True):
        groups.append({k: tuple(v) if isinstance(present.get(k), tuple) else v for k, v in saved.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Store a model's weights as a safetensors file.

    Raises:
        InputError: if the file cannot be written.

    Examples:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> path = save_model(model, Path(tempfile.mkdtemp()) / "model.safetensors")
        >>> torch.equal(load_model(nn.Linear(2, 1), path).weight, model.weight)
        True
    """
    path = Path(path)
    tensors, values = split_state("", model.state_dict())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
            temporary,
            metadata={"coloss": json.dumps(values)},
        )
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    return path


def load_model(model: nn.Module, path: str | Path) -> nn.Module:
    """Load weights stored by `save_model` into a model of the same shape, and return it.

    Raises:
        InputError: if the file is missing or damaged, or does not fit the model.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {}).get("coloss", "{}"))
            state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()} | values  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"cannot read the model {path}: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit this model: {' '.join(str(error).split())}") from error
    return model
