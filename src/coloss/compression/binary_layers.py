"""Linear layers and convolutions whose weights, and if wanted inputs, are signs; and what to look at while they train."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops.binarization import Estimator, binarize, rectified_power
from coloss.ops.precision import full_precision

WeightScale = Literal["layer", "channel"]


class SignActivation(nn.Module):
    """+1 where the input is not negative, else -1: what stands before a layer of binary inputs when it ships.

    Examples:
        >>> SignActivation()(torch.tensor([-2.0, 0.0, 0.5]))
        tensor([-1.,  1.,  1.])
    """

    def forward(self, inputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return binarize(inputs, "ste")


class _Binary(nn.Module):
    """What binary layers share: options, the power that a schedule fills, the weight in effect, and the plain layer that they ship as."""

    weight: Tensor
    power: Tensor

    def _set_up(
        self,
        estimator: Estimator,
        weight_scale: WeightScale | None,
        binarize_input: bool,
        clip: float | None,
        small: float,
    ) -> None:
        if weight_scale not in ("layer", "channel", None):
            raise InputError(f'weight_scale must be "layer", "channel" or None, got {weight_scale!r}')
        self.estimator, self.weight_scale, self.binarize_input = estimator, weight_scale, binarize_input
        self.clip, self.small = clip, small
        self._looked = False
        # In the state dict, so that a resumed run goes on with it.
        self.register_buffer("power", torch.ones((), device=self.weight.device))
        binarize(torch.zeros(1), **self._options)  # refuses what is out of range

    @property
    def _options(self) -> dict[str, Any]:
        return {"estimator": self.estimator, "clip": self.clip, "small": self.small}

    def binary_weight(self) -> Tensor:
        """The weight in effect: signs times their scale, the mean of |weight| over the layer or over each output channel.

        The gradient goes through the scale too.
        """
        if hasattr(self.weight, "placements"):
            raise InputError("the weight is sharded: its scale is a mean over all of it, use strategy ddp")
        signs = binarize(self.weight, power=self.power, **self._options)
        if self.weight_scale is None:
            return signs
        size = full_precision(self.weight).abs()
        scale = (
            size.mean()
            if self.weight_scale == "layer"
            else size.flatten(1).mean(1).view(-1, *[1] * (size.ndim - 1))
        )
        return signs * scale.to(signs.dtype)

    def _seen(self, inputs: Tensor) -> Tensor:
        if not self.binarize_input:
            return inputs
        if self.training and not self._looked:
            self._looked = True
            if inputs.numel() > 1 and bool((inputs >= 0).all()):
                raise InputError(
                    "inputs of a binary layer must have both signs, got none below 0, as after a ReLU: put a normalization "
                    "right before the layer, or leave inputs as they are with binarize_input=False"
                )
        return binarize(inputs, power=self.power, **self._options)

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """An ordinary layer with the weight in effect, behind a `SignActivation` if inputs are binary; the outputs are the same.

        The layer's weights are two values (for each output channel, if that has its scale): `compress_model` stores one bit for each.
        """
        plain = self._plain_layer()
        plain.weight.copy_(self.binary_weight())
        if self.bias is not None:
            plain.bias.copy_(self.bias)
            plain.bias.requires_grad_(self.bias.requires_grad)
        plain.train(self.training)
        plain.weight.requires_grad_(self.weight.requires_grad)
        return nn.Sequential(SignActivation(), plain) if self.binarize_input else plain

    def _plain_layer(self) -> Any:
        raise TypeError(f"{type(self).__name__} has no plain layer")


class BinaryLinear(_Binary, nn.Linear):
    """A linear layer with weights of one bit: `sign(inputs) @ (scale * sign(weight)).T + bias`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        estimator, clip, small: of the sign's slope, see `coloss.ops.binarization_slope`.
        weight_scale: mean of |weight| over the "layer", over each output "channel", or None for plain signs.
        binarize_input: False leaves inputs as they are.

    Attributes:
        weight: the real-valued weight that the optimizer updates.
        power: scalar buffer, the estimator's power; 1 at the start.

    Raises:
        InputError, ValueError: for options out of range; in `forward`, for a sharded weight, and for the first training inputs if none of
            them is negative, since their signs would say nothing.

    Examples:
        >>> layer = BinaryLinear(3, 2)
        >>> layer.binary_weight().abs().unique().numel(), len(layer.to_plain())
        (1, 2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        estimator: Estimator = "reste",
        weight_scale: WeightScale | None = "layer",
        binarize_input: bool = True,
        clip: float | None = None,
        small: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ):
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._set_up(estimator, weight_scale, binarize_input, clip, small)

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return F.linear(self._seen(inputs), self.binary_weight(), self.bias)

    def _plain_layer(self) -> Any:
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        return nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None, **like
        )


class BinaryConv2d(_Binary, nn.Conv2d):
    """A convolution with weights of one bit.

    Padding of zeros comes after the sign, so the border is 0 to the weights, neither -1 nor +1.

    Args:
        in_channels, out_channels, kernel_size and the rest: as in `nn.Conv2d`.
        estimator, weight_scale, binarize_input, clip, small: as in `BinaryLinear`.

    Raises:
        InputError, ValueError: as `BinaryLinear`.

    Examples:
        >>> layer = BinaryConv2d(3, 4, 3, padding=1)
        >>> images = torch.randn(2, 3, 5, 5)
        >>> torch.equal(layer(images), layer.to_plain()(images))
        True
    """

    def __init__(
        self,
        *sizes: Any,
        estimator: Estimator = "reste",
        weight_scale: WeightScale | None = "layer",
        binarize_input: bool = True,
        clip: float | None = None,
        small: float = 0.1,
        **options: Any,
    ):
        nn.Conv2d.__init__(self, *sizes, **options)
        self._set_up(estimator, weight_scale, binarize_input, clip, small)

    def forward(
        self, inputs: Float[Tensor, "*batch channels height width"]
    ) -> Float[Tensor, "*batch out h w"]:
        return self._conv_forward(self._seen(inputs), self.binary_weight(), self.bias)

    def _plain_layer(self) -> Any:
        return nn.utils.skip_init(nn.Conv2d, **convolution_options(self))


def convolution_options(layer: nn.Conv2d) -> dict[str, Any]:
    """What another convolution of the same shape, device and type is built from."""
    names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    like = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    return {name: getattr(layer, name) for name in names} | like


def binary_layers(model: nn.Module) -> Iterator[BinaryLinear | BinaryConv2d]:
    """The binary layers of a model.

    Examples:
        >>> len(list(binary_layers(nn.Sequential(BinaryLinear(2, 2), nn.Linear(2, 2)))))
        1
    """
    return (module for module in model.modules() if isinstance(module, BinaryLinear | BinaryConv2d))


@torch.no_grad()
def estimating_error(model: nn.Module, power: float | None = None) -> float:
    r"""How far the estimator's function is from the sign on the binary layers' weights, $\sum_l \|f(W_l; o) - \mathrm{sign}(W_l)\|_2$.

    f is the function whose derivative the layer's estimator takes for that of the sign: x for "ste", `rectified_power` for "reste",
    2 x - x |x| within [-1, 1] for "polynomial", tanh(o x) for "tanh".

    Args:
        model: with binary layers.
        power: o >= 1 in place of the layers' own, for "reste" and "tanh".

    Returns:
        0 for a model without binary layers; falls as the power grows.

    Raises:
        ValueError: for power < 1.

    Source: Wu et al. 2023, arXiv 2308.06689.

    Examples:
        >>> layer = BinaryLinear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.25]]))
        >>> estimating_error(layer), estimating_error(layer, power=2.0)
        (0.75, 0.5)
    """
    total = 0.0
    for layer in binary_layers(model):
        weight = full_precision(layer.weight)
        total += float((_estimate(weight, layer, power) - binarize(weight)).norm())
    return total


def _estimate(weight: Tensor, layer: BinaryLinear | BinaryConv2d, power: float | None) -> Tensor:
    """The function whose derivative the layer's estimator takes for that of the sign."""
    if layer.estimator == "polynomial":
        inner = weight.clamp(-1, 1)
        return 2 * inner - inner * inner.abs()
    power = float(layer.power) if power is None else power
    if not power >= 1:
        raise ValueError(f"power must be >= 1, got {power}")
    if layer.estimator == "tanh":
        return (power * weight).tanh()
    return rectified_power(weight, 1.0 if layer.estimator == "ste" else power)


@torch.no_grad()
def gradient_stability(model: nn.Module) -> float:
    r"""How unevenly gradients fall on the binary layers' weights, $\sum_l \mathrm{Var}(|\partial L / \partial W_l|)$ after a backward pass.

    Small is stable; the variance is over the entries of a layer. Layers without a gradient count nothing.

    Args:
        model: with binary layers.

    Source: Wu et al. 2023, arXiv 2308.06689.

    Examples:
        >>> layer = BinaryLinear(2, 1)
        >>> layer.weight.grad = torch.tensor([[1.0, -3.0]])
        >>> gradient_stability(layer)
        1.0
    """
    gradients = [layer.weight.grad for layer in binary_layers(model) if layer.weight.grad is not None]
    return sum(float(full_precision(gradient).abs().var(correction=0)) for gradient in gradients)
