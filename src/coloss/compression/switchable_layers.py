"""Layers whose weights run at any of several bit widths from one latent weight, and the batch norms that belong to each width.

`make_switchable(model)` turns the chosen linear layers and convolutions into switchable ones in place, with their parameters as they are;
`set_bits(model, 4)` or `set_bits(model, {"stages.1.0": 2})` says at which precision they run; `to_plain(model)` leaves ordinary torch layers
at the present precision."""

import copy
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coloss.compression.layer_choice import choose_layers
from coloss.compression.multibit_quantizers import (
    ActivationQuantizer,
    MultiBitQuantizer,
    QuantizedInput,
    check_bits,
)
from coloss.compression.replaced_layers import check_called, replace_layers
from coloss.errors import InputError, suggest_names
from coloss.ops.quantization import SecondRounding, check_rounding

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


_OPTIONS = ("per_channel", "activations", "rounding", "independent")


class _Switchable(nn.Module):
    """What switchable layers have in common: a quantiser of the weight, and one of the inputs or None."""

    weight_quantizer: MultiBitQuantizer
    input_quantizer: ActivationQuantizer | None

    def __init__(self, *args: Any, bits: Sequence[int] = (8, 6, 4, 2), **options: Any):
        quantizer = {name: options.pop(name) for name in _OPTIONS if name in options}
        super().__init__(*args, **options)
        self.add_quantizers(bits, **quantizer)

    def add_quantizers(
        self,
        bits: Sequence[int],
        *,
        per_channel: bool = False,
        activations: bool = False,
        rounding: SecondRounding = "nearest",
        independent: bool = False,
    ) -> None:
        """Give the layer its quantisers, with scales for the present weight."""
        weight = self.get_parameter("weight")
        bits = check_bits(bits)
        self.weight_quantizer = MultiBitQuantizer(
            max(bits), bits, per_channel, rounding=rounding, independent=independent
        ).initialise(weight)
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.input_quantizer = ActivationQuantizer(bits).to(weight.device, kind) if activations else None

    @property
    def bits(self) -> int:
        """The precision it runs at."""
        return self.weight_quantizer.current

    def set_bits(self, bits: int) -> None:
        """Choose one of its precisions."""
        known = self.weight_quantizer.bits
        if bits not in known:
            raise InputError(
                f"bits must be one of {', '.join(map(str, known))}, got {bits}: train or calibrate that one first"
            )
        self.weight_quantizer.current = bits
        if self.input_quantizer is not None:
            self.input_quantizer.current = bits

    def quantized_weight(self) -> Tensor:
        """The weight at the present precision."""
        return cast(Tensor, self.weight_quantizer(self.get_parameter("weight")))

    def quantized_input(self, x: Tensor) -> Tensor:
        """What the layer reads, at the present precision."""
        return x if self.input_quantizer is None else self.input_quantizer(x)


class SwitchableLinear(_Switchable, nn.Linear):
    """A linear layer at several precisions.

    Args:
        args: as for `nn.Linear`.
        bits: precisions, the highest of which is stored.
        options: as for `nn.Linear`, and `per_channel`, `rounding`, `independent` of `MultiBitQuantizer`; `activations=True` rounds inputs too.

    Examples:
        >>> layer = SwitchableLinear(8, 4, bits=(8, 2))
        >>> layer.set_bits(2)
        >>> layer.quantized_weight().unique().numel() <= 4, layer(torch.rand(3, 8)).shape
        (True, torch.Size([3, 4]))
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class _SwitchableConvolution(_Switchable):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)  # type: ignore


class SwitchableConv1d(_SwitchableConvolution, nn.Conv1d):
    """A convolution of series at several precisions, see `SwitchableConv2d`."""


class SwitchableConv2d(_SwitchableConvolution, nn.Conv2d):
    """A convolution at several precisions, with the options of `nn.Conv2d` and those of `SwitchableLinear`.

    Examples:
        >>> layer = SwitchableConv2d(1, 4, 3, bits=(8, 4), per_channel=True)
        >>> layer.bits, layer.weight_quantizer.scale.shape
        (8, torch.Size([4, 1, 1, 1]))
    """


class SwitchableConv3d(_SwitchableConvolution, nn.Conv3d):
    """A convolution of volumes at several precisions, see `SwitchableConv2d`."""


_CLASSES: dict[type[nn.Module], type[_Switchable]] = {
    nn.Linear: SwitchableLinear,
    nn.Conv1d: SwitchableConv1d,
    nn.Conv2d: SwitchableConv2d,
    nn.Conv3d: SwitchableConv3d,
}
_PLAIN = {switchable: plain for plain, switchable in _CLASSES.items()}


class SwitchableBatchNorm(nn.Module):
    """A batch norm of its own for each precision: their inputs differ in mean and variance.

    Args:
        norm: the batch norm that each begins as.
        bits: precisions.
        before: path of the switchable layer whose output it normalises, as far as the order of the model's modules tells; None for none.
        after: path of the switchable layer that follows; None for none.
        transitional: one for each pair of precisions, of the layer before and of the one after, for networks whose layers run at
            different ones.

    Attributes:
        norms: by `norm_key`.
        key: of the one in use.

    Examples:
        >>> norm = SwitchableBatchNorm(nn.BatchNorm1d(3), (8, 4))
        >>> norm.key = "4"
        >>> _ = norm(torch.randn(16, 3) + 5)
        >>> [bool(part.running_mean.sum() > 0) for part in norm.norms.values()]
        [False, True]
    """

    def __init__(
        self,
        norm: _BatchNorm,
        bits: Sequence[int],
        *,
        before: str | None = None,
        after: str | None = None,
        transitional: bool = False,
    ):
        super().__init__()
        self.before, self.after, self.transitional = before, after, transitional
        pairs = product(bits, bits) if transitional else ((b, b) for b in bits)
        keys = [_key(*pair, transitional) for pair in pairs]
        self.norms = nn.ModuleDict({key: _copied(norm) for key in keys})
        self.key = keys[0]

    @property
    def norm(self) -> nn.Module:
        """The one in use."""
        return self.norms[self.key]

    def select(self, bits: Mapping[str, int]) -> None:
        """Choose by the precisions of the layers around it."""
        self.key = norm_key(bits, self.before, self.after, self.transitional)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def norm_key(bits: Mapping[str, int], before: str | None, after: str | None, transitional: bool) -> str:
    """Which batch norm of a `SwitchableBatchNorm` belongs to the precisions of the layers around it.

    Args:
        bits: of the switchable layers, by path.
        before, after, transitional: see `SwitchableBatchNorm`; where neither layer is there, the highest precision counts.

    Examples:
        >>> bits = {"a": 8, "b": 4}
        >>> norm_key(bits, "a", "b", False), norm_key(bits, "a", "b", True), norm_key(bits, None, "b", True)
        ('8', '8_4', '4_4')
    """
    around = [bits[p] for p in (before, after) if p is not None and p in bits] or [max(bits.values())]
    return _key(around[0], around[-1], transitional)


def make_switchable(
    model: nn.Module,
    bits: Sequence[int] = (8, 6, 4, 2),
    *,
    layers: str | Sequence[str] | None = None,
    per_channel: bool = False,
    activations: bool = False,
    rounding: SecondRounding = "nearest",
    independent: bool = False,
    transitional: bool = False,
) -> dict[str, nn.Module]:
    """Let layers of a model run at several precisions, in place, with the weights it has.

    Args:
        model: any network with linear layers or convolutions. The first and the last layer stay as they are, unless named.
        bits: precisions; the highest is the stored one. The layers run at the first.
        layers: paths; default: `choose_layers`.
        per_channel, rounding, independent: see `MultiBitQuantizer`.
        activations: round what the layers read too, see `ActivationQuantizer`.
        transitional: see `SwitchableBatchNorm`.

    Returns:
        Path -> layer, of the switchable layers.

    Raises:
        InputError: for bits out of range, no such layers, the model being a single layer or switchable already, or a layer that shares
            its weight, has it sharded over processes, or stands in a module of torch that reads its weight. Nothing is changed then.
        ValueError: for an unknown rounding.

    Batch norms are told by the order of the model's modules which layers they stand between.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> list(make_switchable(model, (8, 4)))
        ['1']
        >>> set_bits(model, 4)
        >>> model[1].bits, model[2].key
        (4, '4')
    """
    bits = check_bits(bits)
    check_rounding(rounding)
    if any(isinstance(part, _Switchable | SwitchableBatchNorm) for part in model.modules()):
        raise InputError(
            "the model is switchable already: start from the plain one, and name all layers at once"
        )
    chosen = choose_layers(model, layers, kinds=tuple(_CLASSES))
    if "" in chosen:
        raise InputError(f"model must contain its layers, got a {type(model).__name__} itself")
    check_called(model, chosen)
    owners = Counter(id(p) for part in model.modules() for p in part.parameters(recurse=False))
    for path, layer in chosen.items():
        weight = layer.get_parameter("weight")
        if hasattr(weight, "placements") or weight.ndim < 2:
            raise InputError(
                f"the weight of {path} is sharded: quantisation needs whole weights, use strategy ddp"
            )
        if owners[id(weight)] > 1:
            raise InputError(
                f"layers must have weights of their own, got {path or 'the model'}, which shares its weight"
            )
    for layer in chosen.values():
        layer.__class__ = _CLASSES[type(layer)]
        cast(_Switchable, layer).add_quantizers(
            bits, per_channel=per_channel, activations=activations, rounding=rounding, independent=independent
        )
    order = list(model.named_modules())
    places = {path: place for place, (path, _) in enumerate(order)}
    switchable: dict[nn.Module, nn.Module] = {}
    for path, norm in order:
        if isinstance(norm, _BatchNorm):
            before = [None, *(p for p in chosen if places[p] < places[path])][-1]
            after = [*(p for p in chosen if places[p] > places[path]), None][0]
            new = SwitchableBatchNorm(norm, bits, before=before, after=after, transitional=transitional)
            switchable[norm] = _in_place_of(norm, new)
    replace_layers(model, switchable)
    set_bits(model, bits[0])
    return chosen


def find_switchable(model: nn.Module) -> dict[str, Any]:
    """The switchable layers of a model, by path.

    Raises:
        InputError: if it has none.
    """
    found = {path: part for path, part in model.named_modules() if isinstance(part, _Switchable)}
    if not found:
        raise InputError(f"{type(model).__name__} has no switchable layer: make_switchable(model) first")
    return found


def set_bits(model: nn.Module, bits: int | Mapping[str, int]) -> None:
    """Choose at which precision the switchable layers of a model run, and the batch norms that go with it.

    Args:
        model: with switchable layers.
        bits: one of the precisions for all layers, or a precision by path for some; the others keep theirs.

    Raises:
        InputError: if the model has no such layer, or the layer no such precision; nothing is changed then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = make_switchable(model, (8, 4, 2))
        >>> set_bits(model, {"1": 2})
        >>> bits_of(model)
        {'1': 2, '2': 8}
    """
    layers = find_switchable(model)
    wanted = dict.fromkeys(layers, bits) if isinstance(bits, int) else dict(bits)
    for path, value in wanted.items():
        if path not in layers:
            near = suggest_names(path, list(layers))
            raise InputError(f"bits must name switchable layers, got {path!r}{near}")
        if value not in layers[path].weight_quantizer.bits:
            layers[path].set_bits(value)  # says what is known
    for path, value in wanted.items():
        layers[path].set_bits(value)
    now = {path: layer.bits for path, layer in layers.items()}
    for part in model.modules():
        if isinstance(part, SwitchableBatchNorm):
            part.select(now)


def bits_of(model: nn.Module) -> dict[str, int]:
    """At which precision each switchable layer runs, by path.

    Raises:
        InputError: if the model has none.
    """
    return {path: layer.bits for path, layer in find_switchable(model).items()}


def to_plain(model: nn.Module) -> dict[str, QuantizedInput]:
    """Turn switchable layers into ordinary torch layers with the weights of the present precision, in place.

    Where inputs are rounded too, a forward pre-hook goes on doing it: outputs in eval mode are those of before, bit for bit. The hook
    is no part of the state dict.

    Returns:
        Path -> hook, where inputs are rounded.

    Raises:
        InputError: if the model has no switchable layer, or a step of its inputs was never set; nothing is changed then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = make_switchable(model, (2,))
        >>> _ = to_plain(model)
        >>> type(model[1]) is nn.Linear, model[1].weight.unique().numel() <= 4
        (True, True)
    """
    layers = find_switchable(model)
    rounding = {path: layer.input_quantizer for path, layer in layers.items()}
    hooks = {path: part.input_hook(path) for path, part in rounding.items() if part is not None}
    for path, layer in layers.items():
        weight = nn.Parameter(layer.quantized_weight().detach(), layer.weight.requires_grad)
        del layer.weight_quantizer, layer.input_quantizer
        layer.__class__ = _PLAIN[type(layer)]  # type: ignore[assignment]
        layer.weight = weight
        if path in hooks:
            layer.register_forward_pre_hook(hooks[path], with_kwargs=True)
    norms = [part for part in model.modules() if isinstance(part, SwitchableBatchNorm)]
    replace_layers(model, {part: _in_place_of(part, part.norm) for part in norms})
    return hooks


def _copied(norm: _BatchNorm) -> _BatchNorm:
    """A copy without the hooks, which may lead to the whole model."""
    bare = copy.copy(norm)
    none: dict[str, Any] = {name: OrderedDict() for name in _HOOKS} | {"_is_full_backward_hook": None}
    bare.__dict__ = norm.__dict__ | none
    return copy.deepcopy(bare)


def _in_place_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """The new module with the hooks that others registered at the old one."""
    new.__dict__.update({name: getattr(old, name) for name in _HOOKS})
    new.training = old.training
    return new


def _key(before: int, after: int, transitional: bool) -> str:
    return f"{before}_{after}" if transitional else str(before)
