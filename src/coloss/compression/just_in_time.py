"""Run a bfloat16 model with its weights compressed in memory: each block's weights are decoded just before its forward.

    model.eval().requires_grad_(False)
    compress_module_(model, blocks="transformer.blocks")       # two thirds of the memory, and one block's weights
    model(inputs)                                              # the same outputs, bit for bit

The decoded weights lie in one scratch buffer for each device, as large as the largest unit, and are overwritten by the next one. What
follows from that: no gradients and no training (refused); reading a `weight` outside of its unit's forward is an error; threads take turns,
all models on a device together; a block must not give away its weights as an output. `torch.compile` leaves the coded layers and blocks out
and compiles the rest. Layers are of a class derived from their own, so code that looks for the exact class does not find them, and a coded
model does not pickle: save its `state_dict`.

A `state_dict` holds the plain bfloat16 weights under their usual names, so it loads into the original model, and into a coded one, which
codes them again; it takes the memory of the whole model. For files without that see `compress_checkpoint` and `open_compressed`.

It is slower than the plain model, by the decoding, which takes the same time for any batch: use it where memory is what is missing.
On an accelerator the codes stay in the CPU's memory, and the weights are decoded there and copied.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coloss.compression.bf16_codec import DFloat11Tensor, encode_bf16
from coloss.compression.checkpoint_folder import CONTENTS, read_contents
from coloss.compression.coded_layers import (
    CodedWeight,
    Unit,
    attach,
    block_class,
    detach,
    is_block,
    is_coded,
)
from coloss.compression.compressed_checkpoint import SUFFIX, CompressedCheckpoint
from coloss.compression.decoding_units import (
    Paths,
    all_chosen,
    check_read,
    layer_of,
    layers_to_code,
    units_of,
)
from coloss.errors import InputError, suggest_names


@dataclass(frozen=True)
class CodedMemory:
    """What the weights of a module with coded layers take.

    Attributes:
        units: path of each layer or block that is decoded at once -> bytes of its weights when decoded.
        plain_bytes: of the coded weights as bfloat16.
        coded_bytes: of the same weights as they lie in memory, or in the mapped file.
        scratch_bytes: of the largest unit: what the decoded weights take at any time.
        other_bytes: of all other parameters and buffers.
    """

    units: Mapping[str, int]
    plain_bytes: int
    coded_bytes: int
    scratch_bytes: int
    other_bytes: int

    @property
    def ratio(self) -> float:
        """Coded over plain bytes."""
        return self.coded_bytes / self.plain_bytes if self.plain_bytes else 1.0


def compress_module_(
    module: nn.Module, layers: Paths = None, *, blocks: Paths = None, keep: Paths = None
) -> CodedMemory:
    """Code the bfloat16 weights of a module's layers in place; they are decoded when they are needed.

    Args:
        module: in evaluation mode; the weights of the layers without `requires_grad`.
        layers: paths of linear layers, convolutions, embeddings, or of blocks for all such layers inside. Default: all of the module that are
            bfloat16. Weights that coding does not make smaller (fewer than 16,384 entries) stay as they are.
        blocks: paths of modules whose layers are decoded together, once for each forward of the module; a `ModuleList` or `Sequential`
            stands for its entries. Without it, each layer is decoded for itself: least memory. A block whose parts are called from outside,
            past its own forward, is right too, and decoded once for each part.
        keep: paths of layers or blocks to leave alone: those whose weight is read elsewhere, such as an embedding that is the output layer.

    Returns:
        What the weights take now.

    Raises:
        InputError: for a module in training mode, weights that require gradients, are sharded or, where named, of another type than bfloat16;
            for paths that do not exist or hold no such layer; if nothing is left to code; for a layer of torch's
            `TransformerEncoderLayer`, which reads the weights itself, unless it lies in one of the blocks.

    Cost: memory of one coded layer at a time, beside the module's.

    Source: Zhang et al. 2025, arXiv 2504.11651, section 2.3.

    Examples:
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).bfloat16()
        >>> inputs = torch.randn(2, 256).bfloat16()
        >>> expected = model.eval().requires_grad_(False)(inputs)
        >>> memory = compress_module_(model)
        >>> memory.ratio < 0.7, memory.scratch_bytes == memory.plain_bytes // 2
        (True, True)
        >>> torch.equal(model(inputs), expected)
        True
    """
    if module.training:
        raise InputError(
            "module must be in evaluation mode, for coded weights cannot be trained: call eval()"
        )
    chosen = layers_to_code(module, layers, keep)
    for path, layer in list(chosen.items()):
        weight = layer.get_parameter("weight")
        if hasattr(weight, "placements"):
            raise InputError(f"the weight of {path} is sharded: coding needs whole weights")
        if weight.dtype != torch.bfloat16:
            if layers is not None:
                raise InputError(
                    f"the weight of {path} must be bfloat16, got {weight.dtype}: call bfloat16()"
                )
            del chosen[path]
        elif weight.requires_grad:
            raise InputError(
                f"the weight of {path} must not require gradients, for coded weights cannot be trained: call requires_grad_(False)"
            )
    shared = _shared(module)
    if not chosen:
        raise InputError(f"{type(module).__name__} has no bfloat16 layer to code: call bfloat16()")
    unit_of = units_of(module, chosen, blocks)
    weights = {path: layer.get_parameter("weight") for path, layer in chosen.items()}
    check_read(
        module,
        unit_of,
        {path: w.numel() for path, w in weights.items() if all_chosen(shared[id(w)], chosen)},
    )
    coded: dict[int, CodedWeight] = {}
    for path, layer in chosen.items():
        weight = layer.get_parameter("weight")
        if not all_chosen(shared[id(weight)], chosen):
            continue
        if id(weight) not in coded:
            coded[id(weight)] = CodedWeight(encode_bf16(weight))
        if coded[id(weight)].stored.coded:
            attach(layer, path, coded[id(weight)], unit_of[path], weight.device)
    if not any(is_coded(part) for part in module.modules()):
        raise InputError(
            f"{type(module).__name__} has no layer that coding makes smaller: it takes bfloat16 weights of 16,384 entries or more"
        )
    return _finished(module)


def decompress_module_(module: nn.Module) -> nn.Module:
    """Undo `compress_module_` and `open_compressed`: plain layers of the original classes, weights as before, shared where they were.

    Returns:
        The module.

    Raises:
        InputError: if it has no coded layers.

    Examples:
        >>> layer = nn.Linear(200, 100).bfloat16().eval().requires_grad_(False)
        >>> before = layer.weight.clone()
        >>> _ = compress_module_(layer)
        >>> torch.equal(decompress_module_(layer).weight, before), type(layer).__name__
        (True, 'Linear')
    """
    parts: list[Any] = [part for part in module.modules() if is_coded(part)]
    if not parts:
        raise InputError(f"{type(module).__name__} has no coded layers")
    plain: dict[int, nn.Parameter] = {}
    for layer in parts:
        weight: CodedWeight = layer._coded
        unit: Unit = layer._unit
        if id(weight) not in plain:
            decoded = weight.stored.decode().to(unit.device)
            plain[id(weight)] = nn.Parameter(decoded, requires_grad=False)
        unit.layers.remove(layer)
        detach(layer, plain[id(weight)])
    blocks: list[Any] = [part for part in module.modules() if is_block(part)]
    for block in blocks:
        if not block._unit.layers:
            del block.__dict__["_unit"]
            block.__class__ = type(block).__mro__[1]
    return module


def open_compressed(
    path: str | Path,
    model: nn.Module,
    layers: Paths = None,
    *,
    blocks: Paths = None,
    keep: Paths = None,
    check: bool = True,
) -> CodedMemory:
    """Load a compressed checkpoint into a model block by block, its layers left coded in the mapped file.

    The codes are read from the file when a unit is decoded, and the system may drop them from memory at any time; all other tensors are read
    at once. The model is put into evaluation mode, without gradients.

    Args:
        path: of a file or folder that `compress_checkpoint` wrote.
        model: of the original class, best built under `torch.device("meta")`, where it takes no memory; it need not have the types of the
            checkpoint, and gets them. One on an accelerator stays there. Everything is read and checked before it is changed; extra state
            of its modules is set last, so an error in a module's `set_extra_state` leaves it coded.
        layers, blocks, keep: as for `compress_module_`. Layers of a checkpoint that is not bfloat16 are loaded as plain ones.
        check: whether all coded bytes are compared with their SHA-256 now, for which the file is read once.

    Returns:
        What the weights take.

    Raises:
        InputError: if the file is cut off, altered or of another kind, names or shapes do not fit the model, a name is in two files, tensors
            differ that are one in the model, or the model has buffers on the meta device that no checkpoint holds.

    Examples:
        >>> import tempfile
        >>> from coloss.compression import compress_checkpoint
        >>> from coloss.train import save_model
        >>> def network():
        ...     return nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 128)).bfloat16()
        >>> trained = network()
        >>> path = save_model(trained, Path(tempfile.mkdtemp()) / "model.safetensors")
        >>> with torch.device("meta"):
        ...     model = network()
        >>> memory = open_compressed(compress_checkpoint(path).path, model)
        >>> inputs = torch.randn(2, 256).bfloat16()
        >>> torch.equal(model(inputs), trained(inputs))
        True
    """
    files = _opened(Path(path))
    holder: dict[str, CompressedCheckpoint] = {}
    for file in files:
        for name in file.names:
            if name in holder:
                raise InputError(f"{name} is in two files: {holder[name].path} and {file.path}")
            holder[name] = file
    values = _extra_state(files)
    chosen = layers_to_code(model, layers, keep)
    unit_of = units_of(model, chosen, blocks)
    places = _places(model)
    expected = {name for group in places for name in group}
    absent = [group[0] for group in places if not any(name in holder for name in group)]
    if absent:
        raise InputError(f"{path} has no {', '.join(absent[:5])}{suggest_names(absent[0], holder)}")
    if unknown := [name for name in holder if name not in expected]:
        raise InputError(
            f"the model has no {', '.join(unknown[:5])}{suggest_names(unknown[0], expected)}, which {path} holds"
        )
    # All is read and checked before the model is touched.
    plain: list[tuple[list[str], Tensor]] = []
    coded: list[tuple[list[str], DFloat11Tensor]] = []
    for group in places:
        name, *others = (name for name in group if name in holder)
        for other in others:
            if holder[other].digest(other) != holder[name].digest(name):
                raise InputError(f"{name} and {other} are one tensor in the model, but differ in {path}")
        present = _tensor(*_owner(model, group[0]))
        if holder[name].shape(name) != tuple(present.shape):
            raise InputError(
                f"{name} has shape {tuple(present.shape)} in the model, {holder[name].shape(name)} in {path}"
            )
        stored = holder[name].stored(name, check=check)
        narrow = isinstance(stored, DFloat11Tensor) and stored.coded and stored.dtype == torch.bfloat16
        if isinstance(stored, DFloat11Tensor) and narrow and all_chosen(group, chosen):
            coded.append((group, stored))
        else:
            plain.append((group, holder[name].tensor(name)))
    check_read(
        model,
        unit_of,
        {layer_of(name): torch.Size(stored.shape).numel() for group, stored in coded for name in group},
    )
    read = {name for group, _ in (*plain, *coded) for name in group}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    if left := [name for name, tensor in named if tensor.is_meta and name not in read]:
        raise InputError(
            f"no checkpoint holds the buffers {', '.join(left[:5])}: build the model on the CPU instead of the meta device"
        )
    for group, tensor in plain:
        present = _tensor(*_owner(model, group[0]))
        tensor = tensor.to(_device(present))
        new: Any = nn.Parameter(tensor, requires_grad=False) if isinstance(present, nn.Parameter) else tensor
        for owner, leaf in (_owner(model, name) for name in group):
            held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            held[leaf] = new
    for group, stored in coded:
        device = _device(_tensor(*_owner(model, group[0])))
        weight = CodedWeight(stored)
        for part in (layer_of(name) for name in group):
            attach(chosen[part], part, weight, unit_of[part], device)
    model.eval().requires_grad_(False)
    memory = _finished(model)
    if values:
        model.load_state_dict(values, strict=False)
    return memory


def coded_memory(module: nn.Module) -> CodedMemory:
    """What the weights of a module with coded layers take.

    Examples:
        >>> coded_memory(nn.Linear(2, 2)).other_bytes
        24
    """
    parts: list[Any] = [part for part in module.modules() if is_coded(part)]
    units: dict[int, Unit] = {id(part._unit): part._unit for part in parts}
    weights: dict[int, CodedWeight] = {id(part._coded): part._coded for part in parts}
    tensors: Iterable[Tensor] = {
        t.data_ptr() or id(t): t for t in (*module.parameters(), *module.buffers())
    }.values()
    largest = max((unit.room for unit in units.values()), default=0)
    return CodedMemory(
        units={unit.path: 2 * unit.room for unit in units.values()},
        plain_bytes=sum(2 * torch.Size(w.stored.shape).numel() for w in weights.values()),
        coded_bytes=sum(w.stored.nbytes for w in weights.values()),
        scratch_bytes=2 * largest,
        other_bytes=sum(t.nbytes for t in tensors),
    )


def _finished(module: nn.Module) -> CodedMemory:
    """Turn modules that are units into blocks, make room in the scratch buffer, and tell."""
    modules = dict(module.named_modules(remove_duplicate=False))
    coded: list[Any] = [part for part in module.modules() if is_coded(part)]
    units: dict[int, Unit] = {id(part._unit): part._unit for part in coded}
    for unit in units.values():
        part: Any = modules[unit.path]
        if not is_coded(part):
            part.__class__ = block_class(part.__class__)
            part._unit = unit
        unit.prepare()
    return coded_memory(module)


def _shared(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _device(tensor: Tensor) -> torch.device:
    """Where a tensor that takes this one's place belongs."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _places(model: nn.Module) -> list[list[str]]:
    """Names in the state dict of each parameter and persistent buffer; tied ones together."""
    kept = {name for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    found: dict[int, list[str]] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if name in kept:
            found.setdefault(id(tensor), []).append(name)
    return list(found.values())


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _tensor(owner: nn.Module, leaf: str) -> Tensor:
    places: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    found: Tensor = places[leaf]
    return found


def _opened(path: Path) -> list[CompressedCheckpoint]:
    if not path.is_dir():
        return [CompressedCheckpoint(path)]
    if not (path / CONTENTS).exists():
        raise InputError(f"{path} is no compressed checkpoint: it has no {CONTENTS}")
    return [CompressedCheckpoint(path / f"{name}{SUFFIX}") for name in read_contents(path)["compressed"]]


def _extra_state(files: Sequence[CompressedCheckpoint]) -> dict[str, Any]:
    """Extra state of modules, which `coloss.save_model` keeps beside the tensors."""
    values: dict[str, Any] = {}
    for file in files:
        try:
            found = json.loads(file.metadata.get("coloss", "{}"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(
                f"{file.path} has metadata 'coloss' that save_model did not write: {file.metadata['coloss'][:40]!r}"
            )
        values |= found
    return values
