"""One file of integers that is read at 8, 6, 4 or 2 bits: no retraining, no float weights, and a plain model in the end.

The file is that of `CompressedModel`. A switchable weight lies in it as integers of the highest precision and a scale; lower
precisions are shifts with rounding of these. Batch norms lie in it once for each precision; everything else as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coloss.compression.compressed_file import CompressedModel, compress_model, load_compressed
from coloss.compression.multibit_quantizers import ActivationQuantizer, QuantizedInput, drop_input_rounding
from coloss.compression.stored_weights import StoredWeight
from coloss.compression.switchable_layers import SwitchableBatchNorm, find_switchable, norm_key
from coloss.errors import InputError, suggest_names
from coloss.ops import code_values, double_round, pack_codes, shift_codes, unpack_codes
from coloss.ops.quantization import SecondRounding

_NOTES = "double_rounding"


@dataclass(frozen=True)
class IntegerWeight(StoredWeight):
    """Signed integers of one precision and their scale, restored at that precision or a lower one.

    Attributes:
        codes: packed integers, 2^(h-1) added, see `coloss.ops.pack_codes`: a byte each at 8 bits.
        scale: of the integers, one number or one for each row of the first dimension.
        high_bits: h, of the stored integers.
        bits: of the restored weight.
        rounding: see `coloss.ops.double_round`.
        shape: of the weight.
        dtype: of the restored weight.

    Examples:
        >>> codes = torch.tensor([[100, -7], [24, 3]])
        >>> stored = IntegerWeight.from_codes(codes, torch.tensor(0.5), high_bits=8)
        >>> stored.restore().tolist(), replace(stored, bits=4).restore().tolist()
        ([[50.0, -3.5], [12.0, 1.5]], [[48.0, 0.0], [16.0, 0.0]])
    """

    kind: ClassVar[str] = "integer"
    codes: Tensor
    scale: Tensor
    high_bits: int
    bits: int
    rounding: SecondRounding
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        high_bits: int,
        bits: int | None = None,
        rounding: SecondRounding = "nearest",
        dtype: torch.dtype | None = None,
    ) -> "IntegerWeight":
        """Pack plain integers.

        Args:
            codes: in the range of `high_bits` bits, in the shape of the weight.
            scale: one number, or a shape that spreads to that of the codes.
            high_bits, bits, rounding, dtype: see the class; `bits` is `high_bits`, and the type the scale's, where None.

        Raises:
            ValueError: for codes out of range.
        """
        packed = pack_codes(codes.long() + 2 ** (high_bits - 1), high_bits)
        shape = tuple(codes.shape)
        return cls(packed, scale, high_bits, bits or high_bits, rounding, shape, dtype or scale.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    def settings(self) -> dict[str, Any]:
        return {
            "high_bits": self.high_bits,
            "bits": self.bits,
            "rounding": self.rounding,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def restore(self) -> Tensor:
        count = torch.Size(self.shape).numel()
        codes = unpack_codes(self.codes, self.high_bits, count).int() - 2 ** (self.high_bits - 1)
        codes = shift_codes(codes.reshape(self.shape), self.high_bits, self.bits, self.rounding)
        return code_values(codes, self.scale, self.high_bits, self.bits, self.rounding).to(self.dtype)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "IntegerWeight":
        named: Any = {name: settings[name] for name in ("high_bits", "bits", "rounding")}
        shape, dtype = tuple(settings["shape"]), getattr(torch, settings["dtype"])
        return cls(tensors["codes"], tensors["scale"], shape=shape, dtype=dtype, **named)


@dataclass(frozen=True)
class PerPrecisionWeight(StoredWeight):
    """One tensor for each precision, such as the mean that a batch norm expects.

    Attributes:
        values: (precisions, ...).
        keys: their names, see `norm_key`.
        key: of the one that is restored.
        before, after: paths of the layers around, whose precisions choose; None for none.
        transitional: whether both choose, or the first of them.
    """

    kind: ClassVar[str] = "per-precision"
    values: Tensor
    keys: tuple[str, ...]
    key: str
    before: str | None
    after: str | None
    transitional: bool

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def settings(self) -> dict[str, Any]:
        return {
            "keys": list(self.keys),
            "key": self.key,
            "before": self.before,
            "after": self.after,
            "transitional": self.transitional,
        }

    def restore(self) -> Tensor:
        return self.values[self.keys.index(self.key)].clone()

    def at(self, bits: Mapping[str, int]) -> "PerPrecisionWeight":
        """The same, restored as the layers around it need."""
        return replace(self, key=norm_key(bits, self.before, self.after, self.transitional))

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "PerPrecisionWeight":
        named = {name: settings[name] for name in ("key", "before", "after", "transitional")}
        return cls(tensors["values"], tuple(settings["keys"]), **named)


@dataclass(frozen=True)
class Int8Artefact:
    """A network stored once as integers, that becomes a plain model at any of its precisions.

    Attributes:
        compressed: the file's content, at the present precision: `load_compressed` reads the same file.
        bits: the precisions it can be read at.

    Examples:
        >>> import tempfile
        >>> from coloss.compression import make_switchable
        >>> new = lambda: nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 2))
        >>> model = new()
        >>> _ = make_switchable(model, (8, 4, 2))
        >>> path = export_int8(model).save(Path(tempfile.mkdtemp()) / "model.coloss")
        >>> plain = load_int8(path).set_bits(2).load_into(new())
        >>> type(plain[1]) is nn.Linear, plain[1].weight.unique().numel() <= 4
        (True, True)
    """

    compressed: CompressedModel
    bits: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, without the file's header."""
        return self.compressed.nbytes

    def bits_of(self) -> dict[str, int]:
        """At which precision each switchable layer is read, by path."""
        return {
            name.removesuffix(".weight"): stored.bits
            for name, stored in self.compressed.weights.items()
            if isinstance(stored, IntegerWeight)
        }

    def set_bits(self, bits: int | Mapping[str, int]) -> "Int8Artefact":
        """The same content, read at another precision.

        Args:
            bits: one of `bits` for all layers, or one by path for some; the others keep theirs.

        Raises:
            InputError: for a precision or a layer that is not there.
        """
        now = self.bits_of()
        wanted = dict.fromkeys(now, bits) if isinstance(bits, int) else dict(bits)
        for path, value in wanted.items():
            if path not in now:
                raise InputError(
                    f"bits must name switchable layers, got {path!r}{suggest_names(path, list(now))}"
                )
            if value not in self.bits:
                known = ", ".join(map(str, self.bits))
                raise InputError(
                    f"bits must be one of {known}, got {value}: calibrate_precision adds one before the export"
                )
        now |= wanted
        weights: dict[str, StoredWeight] = {}
        for name, stored in self.compressed.weights.items():
            if isinstance(stored, IntegerWeight):
                stored = replace(stored, bits=now[name.removesuffix(".weight")])
            elif isinstance(stored, PerPrecisionWeight):
                stored = stored.at(now)
            weights[name] = stored
        return replace(self, compressed=replace(self.compressed, weights=weights))

    def state_dict(self) -> dict[str, Any]:
        """Plain weights at the present precision."""
        return self.compressed.state_dict()

    def load_into(self, model: nn.Module, *, activations: bool = False) -> nn.Module:
        """Give a plain model of the original class these weights, and return it; one that holds another precision is switched.

        Args:
            model: the original class; ordinary layers, which stay ordinary. Rounding of inputs at an earlier precision ends.
            activations: also round what the layers read, by forward pre-hooks, as in training; outputs are then those of training bit
                for bit, but for layers that no batch of the training reached. Without it the model runs without this library, on
                inputs as they are.

        Raises:
            InputError: if the weights do not fit, or activations are asked for that were not rounded in training, or not at this precision.
        """
        steps = self.compressed.notes[_NOTES]["activations"]
        hooks = {}
        for path, at in self.bits_of().items() if activations else ():
            if steps.get(path) == {}:
                continue
            if str(at) not in steps.get(path, {}):
                raise InputError(
                    f"activations were not rounded in training: {path} has no step at {at} bits; say activations=False"
                )
            scale, signed = steps[path][str(at)]
            hooks[path] = QuantizedInput(scale, at, signed)
        self.compressed.load_into(model)
        for path in self.bits_of():
            drop_input_rounding(model.get_submodule(path))
        for path, hook in hooks.items():
            model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        return model

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all.

        Raises:
            InputError: if it cannot be written.
        """
        return self.compressed.save(path)


def export_int8(model: nn.Module, notes: Mapping[str, Any] | None = None) -> Int8Artefact:
    """Store a switchable model once, for all its precisions.

    Args:
        model: with switchable layers, as training left it; not changed. Its present precision is what the file is read at first.
        notes: plain JSON to travel along.

    Returns:
        The content of the file; `save` writes it.

    Raises:
        InputError: if the model has no switchable layer or is one itself, independent scales, or weights that are not finite.

    Cost: one byte for each weight at 8 bits, and batch norms times precisions.

    Examples:
        >>> from coloss.compression import make_switchable
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = make_switchable(model, (8, 4))
        >>> export_int8(model).compressed.weights["1.weight"].nbytes
        68
    """
    layers = find_switchable(model)
    if "" in layers:
        raise InputError(f"model must contain its layers, got a {type(model).__name__} itself")
    state = dict(model.state_dict())
    given: dict[str, StoredWeight] = {}
    steps: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        ours = f"{path}.weight_quantizer.", f"{path}.input_quantizer."
        for name in [n for n in state if n.startswith(ours)]:
            del state[name]
        stored = integer_weight(path, layer)
        given[f"{path}.weight"], state[f"{path}.weight"] = stored, stored.restore()
        if layer.input_quantizer is not None:
            steps[path] = _steps(path, layer.input_quantizer)
    for path, norm in model.named_modules():
        if isinstance(norm, SwitchableBatchNorm):
            around = norm.before, norm.after, norm.transitional
            for name in norm.norm.state_dict():
                values = [state.pop(f"{path}.norms.{key}.{name}") for key in norm.norms]
                weight = PerPrecisionWeight(torch.stack(values).cpu(), tuple(norm.norms), norm.key, *around)
                given[f"{path}.{name}"], state[f"{path}.{name}"] = weight, weight.restore()
    first = next(iter(layers.values())).weight_quantizer
    own = {"bits": list(first.bits), "activations": steps}
    return Int8Artefact(compress_model(state, given, {**(notes or {}), _NOTES: own}), first.bits)


def load_int8(path: str | Path) -> Int8Artefact:
    """Read a file that `export_int8` made.

    Raises:
        InputError: if it is missing, cut off, altered, or of another kind.
    """
    compressed = load_compressed(path)
    if _NOTES not in compressed.notes:
        raise InputError(f"{path} is a compressed model, but none that switches its precision")
    return Int8Artefact(compressed, tuple(compressed.notes[_NOTES]["bits"]))


def integer_weight(path: str, layer: Any) -> IntegerWeight:
    """The weight of a switchable layer as it is stored.

    Raises:
        InputError: if it is not finite, or its scales are independent.
    """
    quantizer = layer.weight_quantizer
    if not (layer.weight.isfinite().all() and quantizer.scale.isfinite().all()):
        raise InputError(f"the weight of {path} is not finite: it has no integers")
    codes, scale = quantizer.codes(layer.weight).cpu(), quantizer.scale.detach().cpu()
    settings = quantizer.high_bits, quantizer.current, quantizer.rounding, layer.weight.dtype
    return IntegerWeight.from_codes(codes, scale, *settings)


def narrow_weight(layer: Any) -> IntegerWeight:
    """The weight of a switchable layer with the bits of its present precision alone, which cannot be widened again.

    Raises:
        ValueError: for the rounding "middle", whose values are no multiples of a scale.
    """
    quantizer = layer.weight_quantizer
    if quantizer.rounding == "middle" and not quantizer.independent:
        raise ValueError('rounding must be "nearest" or "floor" to be stored narrow, got "middle"')
    high, bits = quantizer.high_bits, quantizer.current
    if quantizer.independent:
        high = bits
    with torch.no_grad():
        codes, _ = double_round(layer.weight, quantizer.scale, high, bits, quantizer.rounding)
        scale = quantizer.scale * 2.0 ** (high - bits)
    return IntegerWeight.from_codes(codes.cpu(), scale.detach().cpu(), bits, dtype=layer.weight.dtype)


def _steps(path: str, quantizer: ActivationQuantizer) -> dict[str, Any]:
    present, found = quantizer.current, {}
    try:
        for bits in sorted(quantizer.ready, reverse=True):
            quantizer.current = bits
            hook = quantizer.input_hook(path)
            found[str(bits)] = [hook.scale, hook.signed]
    finally:
        quantizer.current = present
    return found
