"""One file for a compressed model: as small as its weights allow, checked when it is read, and read into the original class.

The file is a safetensors file. Its tensors are named `<weight>|<part>`; its header says of each weight how it is stored, carries what
else belongs to the model, and a SHA-256 over all of it, so that a file that was cut off or altered is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coloss.compression.stored_weights import StoredWeight, describe, from_description, store_exactly
from coloss.errors import InputError
from coloss.train.checkpoint import split_state

VERSION = 2
"""Since 2, a table for each of several equal slices of rows goes without their bounds."""

_HEADER = "coloss_compressed"


@dataclass(frozen=True)
class CompressedModel:
    """The weights of a model in the form in which a file holds them.

    Attributes:
        weights: by their names in the state dict; tied weights are there once.
        tied: names of further weights that are the same tensor as another one.
        values: entries of the state dict that are no tensors.
        notes: plain JSON that travels along: how it was made, what it scored.

    Examples:
        >>> import tempfile
        >>> from coloss.ops import nm_mask
        >>> layer = nn.Linear(64, 8)
        >>> _ = layer.weight.data.mul_(nm_mask(layer.weight))
        >>> path = compress_model(layer).save(Path(tempfile.mkdtemp()) / "layer.coloss")
        >>> restored = load_compressed(path).load_into(nn.Linear(64, 8))
        >>> bool((restored.weight == layer.weight).all())
        True
    """

    weights: Mapping[str, StoredWeight]
    tied: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, without the file's header."""
        return sum(stored.nbytes for stored in self.weights.values())

    def state_dict(self) -> dict[str, Any]:
        """The plain state dict, on the CPU; tied weights share one tensor."""
        state: dict[str, Any] = {name: stored.restore().cpu() for name, stored in self.weights.items()}
        return state | {name: state[other] for name, other in self.tied.items()} | dict(self.values)

    def load_into(self, model: nn.Module) -> nn.Module:
        """Give a model of the original class these weights, and return it.

        Raises:
            InputError: if the weights do not fit the model.
        """
        try:
            model.load_state_dict(self.state_dict())
        except RuntimeError as error:
            raise InputError(f"weights do not fit this model: {' '.join(str(error).split())}") from error
        return model

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all.

        Raises:
            InputError: if it cannot be written, or the notes or values are not plain JSON.
        """
        path = Path(path)
        tensors = {
            f"{name}|{part}": tensor.detach().cpu().contiguous()
            for name, stored in self.weights.items()
            for part, tensor in stored.tensors().items()
        }
        for what, content in (("values of the state dict", self.values), ("notes", self.notes)):
            try:
                json.dumps(dict(content), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise InputError(f"{what} must be plain JSON: {error}") from error
        header = json.dumps(
            {
                "version": VERSION,
                "weights": {name: describe(stored) for name, stored in self.weights.items()},
                "tied": dict(self.tied),
                "values": dict(self.values),
                "notes": dict(self.notes),
            }
        )
        metadata = {_HEADER: header, "sha256": _checksum(header, tensors.items())}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary, metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"cannot write {path}: {error}") from error
        return path


def compress_model(
    model: nn.Module | Mapping[str, Any],
    given: Mapping[str, StoredWeight] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> CompressedModel:
    """Store every weight in the smallest exact form.

    Args:
        model: a network, or its state dict. Weights that are zero, few-valued or narrow are found by looking at them.
        given: forms that cannot be read off the weights (low-rank factors, shared tables), by name in the state dict; any one of the names
            of a tied weight.
        notes: plain JSON to travel along.

    Raises:
        InputError: if `given` names no weight, or restores to something else than the model's weight, beyond rounding in its last
            places (1e-5 of its largest entry).

    Examples:
        >>> layer = nn.Linear(100, 10, bias=False)
        >>> _ = layer.weight.data.sign_()
        >>> compress_model(layer).nbytes
        129
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors, values = split_state("", state)
    given = given or {}
    if unknown := sorted(set(given) - set(tensors)):
        raise InputError(f"given must name weights of the model, got {', '.join(unknown)}")
    tied = tied_names(tensors)
    forms = {name: _checked(name, stored, tensors[name]) for name, stored in given.items()}
    for name, first in tied.items():
        if name in forms:
            forms.setdefault(first, forms[name])
    weights = {
        name: forms[name] if name in forms else store_exactly(tensor)
        for name, tensor in tensors.items()
        if name not in tied
    }
    return CompressedModel(weights, tied, values, dict(notes or {}))


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which names stand for the very tensor that an earlier name stands for: name -> first name.

    Examples:
        >>> weight = torch.ones(2, 3)
        >>> tied_names({"embedding": weight, "output": weight, "transposed": weight.T})
        {'output': 'embedding'}
    """
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.device.type != "meta":
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
            if (other := first.setdefault(place, name)) != name:
                tied[name] = other
    return tied


def load_compressed(path: str | Path) -> CompressedModel:
    """Read a file that `CompressedModel.save` wrote, by this version of the library or an older one.

    Raises:
        InputError: if the file is missing, cut off, altered, of another kind, or written by a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the compressed model {path}: {error}") from error
    header = metadata.get(_HEADER)
    if header is None:
        raise InputError(f"{path} is a safetensors file, but no compressed model of coloss")
    if metadata.get("sha256") != _checksum(header, tensors.items()):
        raise InputError(
            f"{path} was altered since it was written: its checksum does not fit; write it again"
        )
    content = json.loads(header)
    if content["version"] > VERSION:
        raise InputError(
            f"{path} has format version {content['version']}, this coloss reads up to {VERSION}: install a newer one"
        )
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in content["weights"]}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("|")
        parts[name][part] = tensor
    weights = {name: from_description(parts[name], d) for name, d in content["weights"].items()}
    return CompressedModel(weights, content["tied"], content["values"], content["notes"])


def _checked(name: str, stored: StoredWeight, weight: Tensor) -> StoredWeight:
    restored = stored.restore().cpu()
    if restored.shape != weight.shape or restored.dtype != weight.dtype:
        raise InputError(
            f"given weight {name} must restore to {weight.dtype} {tuple(weight.shape)}, "
            f"got {restored.dtype} {tuple(restored.shape)}"
        )
    if weight.numel():
        apart = float((restored - weight.detach().cpu()).abs().max())
        if not apart <= 1e-5 * float(weight.abs().max()):
            raise InputError(
                f"given weight {name} must restore to the model's weight, got a difference of {apart:.3g}"
            )
    return stored


def _checksum(header: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
    return digest.hexdigest()
