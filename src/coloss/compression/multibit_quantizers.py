"""Quantisers that keep one scale for several precisions of a weight, and a scale for each precision of a layer's inputs.

A scale is exp(log_scale): positive whatever an optimizer does, and a step of an optimizer is relative to its size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops import double_round, fake_quantize, full_precision, integer_range, scale_gradient
from coloss.ops.distributed import is_distributed
from coloss.ops.quantization import SecondRounding, check_rounding

SPREAD = 3.0
"""Root mean squares of a weight that its grid spans at first, to each side."""


class FullPrecisionModule(nn.Module):
    """Keeps what it holds in float32 where the model around it is turned to half precision: its steps are too small for that.

    Examples:
        >>> MultiBitQuantizer().bfloat16().log_scale.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FullPrecisionModule":
        def wide(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return tensor.to(found.device) if found.dtype in (torch.float16, torch.bfloat16) else found

        return super()._apply(wide, recurse)


class MultiBitQuantizer(FullPrecisionModule):
    """One weight at several precisions, from integers of the highest one.

    Args:
        high_bits: of the integers that are stored, in 2..8.
        bits: the precisions it can run at, each in 2..`high_bits`.
        per_channel: a scale for each output channel, instead of one.
        rounding: how the second rounding goes, see `coloss.ops.double_round`.
        independent: scales of its own for each precision, and one rounding only. What must be stored then is the latent weight in full:
            there is no file of integers to switch. The paper finds it more accurate; on digits no difference was measured.

    Attributes:
        current: bits it runs at.
        log_scales: natural logarithms of the scales, by bits; under the highest alone unless `independent`.

    Raises:
        InputError: for bits out of range.
        ValueError: for an unknown rounding.

    Scales stay in float32 where the model around them is turned to half precision.

    Examples:
        >>> weight = torch.linspace(-1, 1, 5)
        >>> quantizer = MultiBitQuantizer(8, (8, 2)).initialise(weight)
        >>> quantizer.current = 2
        >>> torch.unique(quantizer(weight)).numel()
        3
    """

    def __init__(
        self,
        high_bits: int = 8,
        bits: Sequence[int] = (8, 6, 4, 2),
        per_channel: bool = False,
        *,
        rounding: SecondRounding = "nearest",
        independent: bool = False,
    ):
        super().__init__()
        self.bits = check_bits(bits, high_bits)
        check_rounding(rounding)
        self.high_bits, self.per_channel, self.independent = high_bits, per_channel, independent
        self.rounding: SecondRounding = rounding
        self.current = self.bits[0]
        stored = self.bits if independent else (high_bits,)
        self.log_scales = nn.ParameterDict({str(b): nn.Parameter(torch.zeros(())) for b in stored})

    def initialise(self, weight: Tensor) -> "MultiBitQuantizer":
        """Set the scales for a weight: 2^b steps at b bits span three root mean squares to either side, shared or not.

        LSQ's 2 mean|W| / sqrt(p) at 8 bits is too coarse to share: its step at 2 bits is nine standard deviations wide, and all weights
        become 0. Weights that are all 0, or a channel of them, get the scale of a fresh layer's, whose mean square is 1 / inputs: they
        would leave any smaller grid at their first step.
        """
        wide = full_precision(weight.detach())
        dims = tuple(range(1, wide.ndim))
        power = wide.square().mean(dims, keepdim=True) if self.per_channel and dims else wide.square().mean()
        power = torch.where(power == 0, 1 / max(math.prod(wide.shape[1:]), 1), power)
        finest = (SPREAD * power.sqrt() / integer_range(8)[1]).clamp_min(1e-12)
        for name in self.log_scales:
            self.log_scales[name] = nn.Parameter((finest * 2.0 ** (8 - int(name))).log())
        return self

    @torch.no_grad()
    def add_precision(self, bits: int) -> None:
        """Let it run at one more, with a grid that spans what that of the highest one spans."""
        self.bits = (*self.bits, bits)
        if self.independent:
            wider = math.log(2.0) * (self.high_bits - bits)
            self.log_scales[str(bits)] = nn.Parameter(self.log_scales[str(self.high_bits)] + wider)

    def log_scale_at(self, bits: int) -> nn.Parameter:
        """The scale's logarithm at a precision: the same for all, unless they are independent."""
        return cast(nn.Parameter, self.log_scales[str(bits if self.independent else self.high_bits)])

    @property
    def log_scale(self) -> nn.Parameter:
        """The scale's logarithm in use."""
        return self.log_scale_at(self.current)

    @property
    def scale(self) -> Tensor:
        """The scale in use: of the highest precision's integers, or of the present one's where they are independent."""
        return full_precision(self.log_scale).exp()

    def forward(self, weight: Tensor) -> Tensor:
        entries = weight.numel() // max(self.log_scale.numel(), 1)
        scale = scale_gradient(self.scale, _lsq_factor(entries, integer_range(self.current)[1]))
        if self.independent:
            return fake_quantize(weight, scale, self.current)
        return double_round(weight, scale, self.high_bits, self.current, self.rounding)[1]

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The integers of the highest precision, which are all that has to be stored beside the scale.

        Raises:
            InputError: for independent scales, which share no integers.
        """
        if self.independent:
            raise InputError(
                "quantizers with independent scales share no integers: train with independent=False to store them"
            )
        return double_round(weight, self.scale, self.high_bits, self.high_bits)[0]


class ActivationQuantizer(FullPrecisionModule):
    """Inputs of a layer on a grid of their own for each precision, whose step sizes are learned.

    Unsigned where the first batch of training has no negative value, as after a ReLU, else signed; steps start at LSQ's 2 mean|x| /
    sqrt(p) of that batch. Before that, each batch gets the step that fits it. A batch that is empty, all 0 or not finite is not the first.
    Steps stay in float32 where the model around them is turned to half precision.

    Args:
        bits: precisions.

    Attributes:
        current: bits it runs at.
        signed: None until the first batch of training.

    Several processes take the first batch of all of them together.

    Examples:
        >>> quantizer = ActivationQuantizer((8, 2))
        >>> quantizer.current = 2
        >>> quantizer(torch.tensor([[0.0, 1.0, 2.0, 9.0]])).unique().numel(), quantizer.signed
        (3, False)
    """

    def __init__(self, bits: Sequence[int]):
        super().__init__()
        self.bits = tuple(bits)
        self.current = self.bits[0]
        self.signed: bool | None = None
        self.ready: set[int] = set()
        self.log_scales = nn.ParameterDict({str(b): nn.Parameter(torch.zeros(())) for b in self.bits})

    def log_scale_at(self, bits: int) -> nn.Parameter:
        """The scale's logarithm at a precision."""
        return cast(nn.Parameter, self.log_scales[str(bits)])

    @property
    def log_scale(self) -> nn.Parameter:
        """The scale's logarithm in use."""
        return self.log_scale_at(self.current)

    @property
    def scale(self) -> Tensor:
        """The step in use."""
        return full_precision(self.log_scale).exp()

    def forward(self, x: Tensor) -> Tensor:
        scale, signed = self.scale, self.signed
        if self.current not in self.ready:
            scale, signed = self._first_scale(x)
        highest = integer_range(self.current, bool(signed))[1]
        factor = _lsq_factor(x.numel() // max(len(x), 1), highest)
        return fake_quantize(x, scale_gradient(scale, factor), self.current, signed=bool(signed))

    def get_extra_state(self) -> dict[str, Any]:
        return {"signed": self.signed, "ready": sorted(self.ready)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.signed, self.ready = state["signed"], set(state["ready"])

    def add_precision(self, bits: int) -> None:
        """Let it run at one more, whose step the next batch in training mode sets."""
        self.bits = (*self.bits, bits)
        self.log_scales[str(bits)] = nn.Parameter(torch.zeros_like(self.log_scale))

    def input_hook(self, path: str) -> "QuantizedInput":
        """The hook that does for a plain layer what this quantiser does now.

        Raises:
            InputError: if its step was never set; names the layer's path.
        """
        if self.current not in self.ready or self.signed is None:
            raise InputError(
                f"the inputs of {path} have no step at {self.current} bits yet: train or calibrate the model first"
            )
        return QuantizedInput(float(self.scale.detach()), self.current, self.signed)

    @torch.no_grad()
    def _measure(self, x: Tensor) -> tuple[Tensor, bool, bool]:
        """The step that fits a batch, whether that has a sign, and whether it tells at all."""
        wide = full_precision(x)
        found = torch.stack(
            [wide.abs().sum(), wide.new_tensor(float(wide.numel())), (wide < 0).sum().to(wide.dtype)]
        )
        if self.training and is_distributed():
            torch.distributed.all_reduce(found)
        total, count, negative = found.unbind()
        signed = self.signed if self.signed is not None else bool(negative > 0)
        highest = integer_range(self.current, signed)[1]
        step = (2 * total / count.clamp_min(1) / math.sqrt(highest)).clamp_min(1e-12)
        return step, signed, bool(total.isfinite() & (total > 0))

    def _first_scale(self, x: Tensor) -> tuple[Tensor, bool]:
        scale, signed, telling = self._measure(x)
        if not (self.training and telling):
            return scale, signed
        self.signed = signed
        self.ready.add(self.current)
        self.log_scale.data.copy_(scale.log())
        return self.scale, signed


@dataclass(frozen=True)
class QuantizedInput:
    """A forward pre-hook that rounds what a plain layer reads, as its switchable form did.

    Attributes:
        scale: step size.
        bits: of the integers.
        signed: whether they have a sign.
    """

    scale: float
    bits: int
    signed: bool

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        scale = torch.tensor(self.scale, dtype=full_precision(x[:0]).dtype, device=x.device)
        x = fake_quantize(x, scale, self.bits, signed=self.signed)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


def drop_input_rounding(layer: nn.Module) -> None:
    """Take off the hooks that round what a plain layer reads; those of others stay."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, QuantizedInput):
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def check_bits(bits: Sequence[int], high_bits: int | None = None) -> tuple[int, ...]:
    """Refuse precisions that cannot be.

    Raises:
        InputError: unless they are distinct integers in 2..high_bits (8), at least one.
    """
    highest = 8 if high_bits is None else high_bits
    found = tuple(bits)
    good = all(isinstance(b, int) and not isinstance(b, bool) and 2 <= b <= highest for b in found)
    if not found or not good or len(set(found)) != len(found) or not 2 <= highest <= 8:
        raise InputError(f"bits must be distinct integers in 2..{highest} (8 at most), got {bits}")
    return found


def _lsq_factor(entries: int, highest: int) -> float:
    return 1.0 / math.sqrt(max(entries, 1) * highest)
