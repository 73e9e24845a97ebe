"""Layers whose weight lies coded in memory and is decoded for the time of a forward pass.

A coded layer is of a class made from its own (`CodedLinear`, `CodedEmbedding` ...) without the parameter `weight`. A unit is what is decoded
at once: one layer, or all coded layers of a block. While the forward of a unit runs, each of its layers has a `weight`, a slice of the
device's one scratch buffer; before and after, reading it is an error that says so.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from coloss.compression.bf16_codec import DFloat11Tensor, encode_bf16
from coloss.errors import InputError

_ALIGN = 32
"""Weights start at multiples of 64 bytes, as torch's own tensors do."""


class Scratch:
    """The memory of one device that units are decoded into; shared by all coded modules that are alive.

    Threads take turns: a unit holds the buffer until its forward is over. A unit that runs within another one's forward gets what is left
    of the buffer, or memory of its own.
    """

    _known: weakref.WeakValueDictionary[str, "Scratch"] = weakref.WeakValueDictionary()
    _making = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.buffer = torch.empty(0, dtype=torch.bfloat16, device=device)
        self._used = 0

    @classmethod
    def on(cls, device: torch.device) -> "Scratch":
        """The one of a device."""
        with cls._making:
            found = cls._known.get(str(device))
            if found is None:
                found = cls._known[str(device)] = cls(device)
            return found

    def __deepcopy__(self, memo: Any) -> "Scratch":
        return self

    def reserve(self, count: int) -> None:
        """Let the buffer hold `count` weights."""
        with self.lock:
            if not self._used and len(self.buffer) < count:
                self.buffer = self._new(count)

    def _new(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(count, dtype=torch.bfloat16, device=self.buffer.device)

    @contextmanager
    def lend(self, count: int) -> Iterator[Tensor]:
        """Memory for `count` weights until the end of the block."""
        with self.lock:
            self.reserve(count)
            before = self._used
            inside = before + count <= len(self.buffer)
            place = self.buffer[before : before + count] if inside else self._new(count)
            self._used = before + count if inside else before
            try:
                yield place
            finally:
                self._used = before


class CodedWeight:
    """A coded tensor that the layers with this weight share.

    Attributes:
        stored: the coded tensor; replaced, never written to, so copies of a module share it.
    """

    def __init__(self, stored: DFloat11Tensor) -> None:
        self.stored = stored
        self._saved: tuple[str, weakref.ref[Tensor]] | None = None

    def save(self, destination: Any, name: str, device: torch.device) -> None:
        """Decode it into a state dict, in which layers that share it get one tensor."""
        if self._saved is not None and self._saved[0] != name:
            other, kept = self._saved
            if (decoded := kept()) is not None and destination.get(other) is decoded:
                destination[name] = decoded
                return
        decoded = destination[name] = self.stored.decode().to(device)
        self._saved = name, weakref.ref(decoded)

    @property
    def room(self) -> int:
        """Places of the scratch buffer that it needs."""
        return -(-torch.Size(self.stored.shape).numel() // _ALIGN) * _ALIGN

    def __deepcopy__(self, memo: Any) -> "CodedWeight":
        return CodedWeight(self.stored)


class Unit:
    """Layers that are decoded together.

    Attributes:
        path: of the layer or block.
        layers: coded layers; filled by `attach`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.layers: list[Any] = []
        self._depth = 0
        self._scratch: Scratch | None = None

    def weights(self) -> list[CodedWeight]:
        """Each weight once."""
        return list({id(layer._coded): layer._coded for layer in self.layers}.values())

    @property
    def room(self) -> int:
        """Places of the scratch buffer that it needs."""
        return sum(weight.room for weight in self.weights())

    @property
    def device(self) -> torch.device:
        """Where its layers are."""
        return self.layers[0]._buffers["weight_place"].device

    def prepare(self) -> Scratch:
        """The scratch buffer of its device, large enough."""
        if self._scratch is None or self._scratch.buffer.device != self.device:
            self._scratch = Scratch.on(self.device)
        self._scratch.reserve(self.room)
        return self._scratch

    @contextmanager
    def decoded(self) -> Iterator[None]:
        """Give its layers their weights until the end of the block; within itself this does nothing."""
        scratch = self.prepare()
        with scratch.lock:
            if self._depth:
                yield
                return
            with scratch.lend(self.room) as place:
                self._depth = 1
                try:
                    self._fill(place)
                    yield
                finally:
                    self._depth = 0
                    for layer in self.layers:
                        layer.__dict__.pop("weight", None)
                    # What autograd still holds of the buffer must not pass for the weight.
                    increment_version(place)

    def _fill(self, place: Tensor) -> None:
        start, ready = 0, {}
        for weight in self.weights():
            shape = torch.Size(weight.stored.shape)
            ready[id(weight)] = weight.stored.decode(out=place[start : start + shape.numel()].view(shape))
            start += weight.room
        increment_version(place)
        for layer in self.layers:
            layer.__dict__["weight"] = ready[id(layer._coded)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unit":
        import copy

        other = memo[id(self)] = Unit(self.path)
        other.layers = copy.deepcopy(self.layers, memo)
        return other


def attach(layer: nn.Module, path: str, weight: CodedWeight, unit: Unit, device: torch.device) -> None:
    """Make a layer a coded one, of this unit."""
    coded: Any = layer
    layer._parameters.pop("weight", None)
    layer.register_buffer(
        "weight_place", torch.empty(0, dtype=torch.bfloat16, device=device), persistent=False
    )
    coded.__class__ = coded_class(coded.__class__)
    coded._coded, coded._path, coded._unit = weight, path, unit
    unit.layers.append(layer)


def detach(layer: nn.Module, weight: nn.Parameter) -> None:
    """Make a coded layer a plain one with this weight."""
    others = {name: value for name, value in layer._parameters.items() if name != "weight"}
    del layer._buffers["weight_place"]
    layer._non_persistent_buffers_set.discard("weight_place")
    for name in ("_coded", "_path", "_unit"):
        layer.__dict__.pop(name, None)
    layer.__class__ = type(layer).__mro__[1]
    layer._parameters.clear()
    layer._parameters.update({"weight": weight, **others})


def is_coded(module: nn.Module) -> bool:
    """Whether a module is a coded layer."""
    return "_coded" in module.__dict__


def is_block(module: nn.Module) -> bool:
    """Whether a module is a block whose coded layers are decoded together."""
    return "_unit" in module.__dict__ and not is_coded(module)


@cache
def coded_class(kind: type[Any]) -> type[Any]:
    """The class of a coded layer, from that of the plain one."""
    methods = {
        "forward": _layer_forward(kind),
        "__getattr__": _no_weight,
        "extra_repr": _extra_repr(kind),
        "_apply": _same_type(kind),
        "_save_to_state_dict": _save(kind),
        "_load_from_state_dict": _load(kind),
        "__doc__": kind.__doc__,
    }
    return type(f"Coded{kind.__name__}", (kind,), methods)


@cache
def block_class(kind: type[Any]) -> type[Any]:
    """The class of a block whose coded layers are decoded together."""

    @_left_out_of_compilation
    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        with self._unit.decoded():
            return kind.forward(self, *inputs, **named)

    return type(f"Coded{kind.__name__}", (kind,), {"forward": forward, "__doc__": kind.__doc__})


def _left_out_of_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, without the seconds that it takes to import the compiler where nobody compiles."""
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def called(*inputs: Any, **named: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*inputs, **named)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*inputs, **named)

    called._torchdynamo_disable = True  # type: ignore[attr-defined]
    return called


def _layer_forward(kind: type[Any]) -> Callable[..., Any]:
    @_left_out_of_compilation
    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if self.training:
            raise InputError(f"{self._path} has a coded weight, which cannot be trained: call eval() first")
        given = (*inputs, *named.values())
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
            raise InputError(
                f"{self._path} has a coded weight, through which no gradients flow: run it under torch.no_grad()"
            )
        with self._unit.decoded():
            return kind.forward(self, *inputs, **named)

    return forward


def _no_weight(self: Any, name: str) -> Any:
    if name == "weight":
        raise AttributeError(
            f"the weight of {self.__dict__.get('_path', 'this layer')} is coded, and there only while the forward of "
            f"{self._unit.path or 'its module'} runs: keep it plain with keep=[...], or name the module that reads it in blocks=[...]"
        )
    return nn.Module.__getattr__(self, name)


def _extra_repr(kind: type[Any]) -> Callable[[Any], str]:
    def extra_repr(self: Any) -> str:
        return f"{kind.extra_repr(self)}, weight coded in {self._coded.stored.nbytes:,} bytes"

    return extra_repr


def _same_type(kind: type[Any]) -> Callable[..., Any]:
    def apply(self: Any, fn: Callable[[Tensor], Tensor], *rest: Any, **named: Any) -> Any:
        if fn(self._buffers["weight_place"]).dtype != torch.bfloat16:
            raise InputError(
                f"{self._path} has a coded bfloat16 weight, which has no other type: decompress_module_ first; layers before it were "
                "changed, and bfloat16() brings back their type"
            )
        return kind._apply(self, fn, *rest, **named)

    return apply


def _save(kind: type[Any]) -> Callable[..., None]:
    def save(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._coded.save(destination, f"{prefix}weight", self._unit.device)
        kind._save_to_state_dict(self, destination, prefix, keep_vars)

    return save


def _load(kind: type[Any]) -> Callable[..., None]:
    def load(
        self: Any,
        state: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        key = f"{prefix}weight"
        kind._load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors)
        if key in unexpected:
            unexpected.remove(key)
        if key not in state:
            if strict:
                missing.append(key)
        elif tuple(state[key].shape) != tuple(self._coded.stored.shape):
            errors.append(
                f"size mismatch for {key}: {tuple(state[key].shape)} from checkpoint, {self._coded.stored.shape} in the model"
            )
        else:
            self._coded.stored = encode_bf16(state[key].detach().to(torch.bfloat16))

    return load
