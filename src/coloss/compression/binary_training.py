"""Puts binary layers into a network, trains them with a slope that sharpens, and ships ordinary layers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coloss.compression.binary_layers import (
    BinaryConv2d,
    BinaryLinear,
    WeightScale,
    binary_layers,
    convolution_options,
    estimating_error,
    gradient_stability,
)
from coloss.compression.layer_choice import choose_layers
from coloss.compression.replaced_layers import check_called, replace_layers
from coloss.errors import InputError
from coloss.ops.binarization import Estimator
from coloss.train import Method, Setting, State


def binarize_layers(model: nn.Module, layers: str | Sequence[str] | None = None, **options: Any) -> list[str]:
    """Put binary layers in the place of linear layers and 2-D convolutions, with the same parameters.

    Args:
        model: changed in place.
        layers: paths; None: `choose_layers`, which leaves out the first and the last.
        options: `estimator`, `weight_scale`, `binarize_input`, `clip`, `small` of `BinaryLinear`.

    Returns:
        Paths of the layers.

    Raises:
        InputError: if there is no such layer, or an option is out of range.

    Examples:
        >>> model = nn.Sequential(
        ...     nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        ... )
        >>> binarize_layers(model), type(model[2]).__name__
        (['2'], 'BinaryLinear')
    """
    chosen = choose_layers(model, layers, kinds=(nn.Linear, nn.Conv2d))
    check_called(model, chosen)
    replace_layers(model, {layer: _binary(layer, options) for layer in chosen.values()})
    return list(chosen)


def ship_binary_layers(model: nn.Module) -> list[str]:
    """Put ordinary layers in the place of the binary ones inside a model; its outputs stay what they were.

    Binary inputs need a `SignActivation` before the layer, so the layer's place then holds an `nn.Sequential` of the two. To load a shipped
    model's weights elsewhere, give a fresh model the same two calls first: `binarize_layers(model, ...)`, `ship_binary_layers(model)`.

    Args:
        model: changed in place.

    Returns:
        Paths of the layers.

    Raises:
        InputError: for a model that is itself a binary layer, which cannot be changed in place: call its `to_plain`.

    Examples:
        >>> model = nn.Sequential(BinaryLinear(4, 4, binarize_input=False))
        >>> ship_binary_layers(model), model
        (['0'], Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        ))
    """
    plain = {layer: layer.to_plain() for layer in binary_layers(model)}
    paths = [path for path, module in model.named_modules() if module in plain]
    replace_layers(model, plain)
    return paths


class Binarization(Method):
    """Trains linear layers and convolutions with weights, and inputs, of one bit, and ships them as ordinary layers.

    List it before methods that tap a layer's outputs: it puts other layers in the place of those that it finds.

    Args:
        layers: paths of the layers; default: all linear layers and 2-D convolutions but the first and the last.
        estimator: "reste", "ste", "polynomial" (Bi-Real) or "tanh"; see `coloss.ops.binarization_slope`.
        end_power: o at the end of training, >= 1; for "reste" and "tanh".
        start_power: o at the beginning, >= 1.
        weight_scale: mean of |weight| over the "layer" or each output "channel", or None.
        binarize_input: False trains binary weights on inputs as they are.
        clip, small: of the slope; defaults of the estimator.
        log_indicators: report `estimating_error` and `gradient_stability` of each step as diagnostics; waits for the device.

    Raises:
        InputError, ValueError: for values out of range; in `setup`, for layers that are none; in the first forward pass, for inputs of a
            layer that are never negative.

    Cost: a few element-wise passes over weights and inputs of the layers in each step; training is slower than the plain network's.

    Source: Wu et al. 2023, arXiv 2308.06689.

    Examples:
        >>> import torch, coloss
        >>> inputs = torch.randn(64, 8)
        >>> model = nn.Sequential(
        ...     nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)
        ... )
        >>> run = coloss.fit(
        ...     model,
        ...     (inputs, (inputs[:, 0] > 0).long()),
        ...     nn.functional.cross_entropy,
        ...     [Binarization()],
        ...     budget=coloss.Budget(steps=5),
        ... )
        >>> run.model[2][1].weight.abs().unique().numel()
        1
    """

    def __init__(
        self,
        *,
        layers: str | Sequence[str] | None = None,
        estimator: Estimator = "reste",
        end_power: float = 3.0,
        start_power: float = 1.0,
        weight_scale: WeightScale | None = "layer",
        binarize_input: bool = True,
        clip: float | None = None,
        small: float = 0.1,
        log_indicators: bool = False,
    ):
        super().__init__()
        for name, value in (("start_power", start_power), ("end_power", end_power)):
            if not 1 <= value < math.inf:
                raise InputError(f"{name} must be >= 1 and finite, got {value}")
        self.layers, self.start_power, self.end_power = layers, start_power, end_power
        self.log_indicators = log_indicators
        self._options: dict[str, Any] = {
            "estimator": estimator,
            "weight_scale": weight_scale,
            "binarize_input": binarize_input,
            "clip": clip,
            "small": small,
        }
        BinaryLinear(1, 1, **self._options, device="meta")  # refuses what is out of range

    def setup(self, state: State) -> None:
        binarize_layers(state.model, self.layers, **self._options)

    def on_batch(self, state: State) -> None:
        if self._options["estimator"] in ("reste", "tanh"):
            power = power_at(state.progress, self.end_power, self.start_power)
            for layer in binary_layers(state.model):
                layer.power.fill_(power)

    def on_gradients(self, state: State) -> None:
        if self.log_indicators:
            error, stability = estimating_error(state.model), gradient_stability(state.model)
            state.log({"estimating_error": error, "gradient_stability": stability})

    def finish(self, state: State) -> None:
        ship_binary_layers(state.model)

    @classmethod
    def for_setting(cls, setting: Setting, **parameters: Any) -> "Binarization":
        """With inputs as they are, since the lab's networks have no normalization right before their layers."""
        return cls(**{"binarize_input": False, **parameters})


def power_at(progress: float, end_power: float = 3.0, start_power: float = 1.0) -> float:
    """The estimator's power after a share of training: a quarter of a cosine from one value to the other, slow at first.

    Args:
        progress: in [0, 1].
        end_power, start_power: at 1 and at 0.

    Examples:
        >>> power_at(0.0), round(power_at(0.5), 3), round(power_at(1.0), 12)
        (1.0, 1.586, 3.0)
    """
    return start_power + (1 - math.cos(math.pi / 2 * progress)) * (end_power - start_power)


def _binary(layer: Any, options: dict[str, Any]) -> nn.Module:
    # On no device, and so without drawing weights that nobody needs.
    if isinstance(layer, nn.Conv2d):
        binary: Any = BinaryConv2d(**convolution_options(layer) | {"device": "meta"}, **options)
    else:
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        binary = BinaryLinear(*sizes, **options, device="meta")
    # The very parameters, so that an optimizer that has them keeps them.
    binary.weight, binary.bias = layer.weight, layer.bias
    binary.power = torch.ones((), device=layer.weight.device)
    return binary.train(layer.training)
