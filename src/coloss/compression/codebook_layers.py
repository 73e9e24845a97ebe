"""Layers that keep their weights as packed codes and look them up in each forward pass.

They take the memory of the codes between passes, and the time of the look-up in each: on a CPU a look-up and a product take longer than the
product alone. `materialize` gives the plain layer, which is as fast as ever.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.compression.codebook import Codebook
from coloss.compression.replaced_layers import check_called, replace_layers
from coloss.compression.stored_weights import StoredWeight
from coloss.errors import InputError, suggest_names


class _CodebookLayer(nn.Module):
    """A weight as buffers of its stored form, and a bias; what is no tensor of that form is extra state of the state dict."""

    def __init__(self, codebook: Codebook, bias: Tensor | None) -> None:
        super().__init__()
        stored = codebook.stored()
        self.stored_kind, self.settings = type(stored), stored.settings()
        self.parts = list(stored.tensors())
        for name, tensor in stored.tensors().items():
            self.register_buffer(f"stored_{name}", tensor.to(codebook.codes.device))
        if bias is not None and len(bias) != len(codebook.codes):
            raise InputError(
                f"bias must have {len(codebook.codes)} entries, one for each row, got {len(bias)}"
            )
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def stored(self) -> StoredWeight:
        """The weight as a file holds it."""
        return self.stored_kind.from_parts(
            {n: getattr(self, f"stored_{n}") for n in self.parts}, self.settings
        )

    def get_extra_state(self) -> dict[str, Any]:
        return {"kind": self.stored_kind.kind, **self.settings}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        settings = dict(state)
        kind, shape = settings.pop("kind", None), list(settings.get("shape", ()))
        if (kind, shape) != (self.stored_kind.kind, self.settings["shape"]):
            raise InputError(
                f"the state must be of a {self.stored_kind.kind} weight of shape {self.settings['shape']}, got {kind} of {shape}"
            )
        self.settings = settings

    @property
    def weight(self) -> Tensor:
        """Looked up anew at each access."""
        return self.stored().restore()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.to(float64)` and the like must not widen the tables: only their device follows.
        kept = {n: getattr(self, f"stored_{n}") for n in self.parts}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, f"stored_{name}", tensor.to(getattr(self, f"stored_{name}").device))
        return self

    def _plain(self, layer: Any) -> Any:
        layer.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)


class CodebookLinear(_CodebookLayer):
    """A linear layer that runs from codes.

    Args:
        codebook: of a weight (outputs, inputs).
        bias: (outputs,), or None.

    Raises:
        InputError: if the weight is no matrix, or the bias does not fit.

    Examples:
        >>> from coloss.compression import kmeans_codebook
        >>> layer = nn.Linear(64, 32)
        >>> small = CodebookLinear(kmeans_codebook(layer.weight, bits=2), layer.bias)
        >>> sum(part.nbytes for part in small.buffers()), layer.weight.nbytes
        (520, 8192)
        >>> x = torch.ones(3, 64)
        >>> bool((small(x) == small.materialize()(x)).all())
        True
    """

    def __init__(self, codebook: Codebook, bias: Tensor | None = None) -> None:
        if codebook.codes.ndim != 2:
            raise InputError(
                f"codebook must be of a matrix, got codes of shape {tuple(codebook.codes.shape)}"
            )
        super().__init__(codebook, bias)
        self.out_features, self.in_features = codebook.codes.shape

    def forward(self, inputs: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        return F.linear(inputs, self.weight.to(inputs.dtype), _cast(self.bias, inputs))

    def materialize(self) -> nn.Linear:
        """The plain layer."""
        weight = self.weight
        plain = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=self.bias is not None)
        return self._plain(plain)


class CodebookConv2d(_CodebookLayer):
    """A convolution that runs from codes.

    Args:
        codebook: of a weight (outputs, inputs over groups, height, width).
        bias: (outputs,), or None.
        placed: `stride`, `padding`, `dilation`, `groups` and `padding_mode` of the convolution.

    Raises:
        InputError: if the weight is no kernel, or the bias does not fit.

    Examples:
        >>> from coloss.compression import kmeans_codebook
        >>> layer = nn.Conv2d(4, 8, 3, padding=1)
        >>> small = CodebookConv2d(kmeans_codebook(layer.weight, bits=3), layer.bias, padding=1)
        >>> small(torch.ones(1, 4, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(self, codebook: Codebook, bias: Tensor | None = None, **placed: Any) -> None:
        if codebook.codes.ndim != 4:
            raise InputError(
                f"codebook must be of a 2-D kernel, got codes of shape {tuple(codebook.codes.shape)}"
            )
        super().__init__(codebook, bias)
        shape: Any = codebook.codes.shape
        # A convolution without weights knows how to apply one, whatever its padding.
        with torch.device("meta"):
            self.placed = nn.Conv2d(
                shape[1] * placed.get("groups", 1),
                shape[0],
                tuple(shape[2:]),
                bias=bias is not None,
                **placed,
            )
        self.placed.weight = None  # type: ignore[assignment]
        self.placed.bias = None

    def forward(
        self, inputs: Float[Tensor, "*batch channels height width"]
    ) -> Float[Tensor, "*batch outputs rows columns"]:
        return self.placed._conv_forward(inputs, self.weight.to(inputs.dtype), _cast(self.bias, inputs))

    def materialize(self) -> nn.Conv2d:
        """The plain layer."""
        old = self.placed
        plain = nn.utils.skip_init(
            nn.Conv2d,
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=old.groups,
            padding_mode=old.padding_mode,
            bias=self.bias is not None,
        )
        return self._plain(plain)


def run_from_codes(model: nn.Module, codebooks: Mapping[str, Codebook]) -> nn.Module:
    """Put layers that run from codes in place of a model's linear layers and 2-D convolutions.

    Args:
        model: changed in place; its outputs become those with the codebooks' weights.
        codebooks: by path of the layer.

    Returns:
        The model.

    Raises:
        InputError: if a path is not the model's, a layer is neither, its weight has another shape, or a module around it reads its weight in
            place of calling it. Nothing is changed then.

    Examples:
        >>> from coloss.compression import kmeans_codebook
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> type(run_from_codes(model, {"0": kmeans_codebook(model[0].weight, bits=2)})[0]).__name__
        'CodebookLinear'
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in codebooks:
        if path not in modules:
            raise InputError(
                f"codebooks must name layers of the model, got {path!r}{suggest_names(path, list(modules))}"
            )
    check_called(model, codebooks)
    replacements: dict[nn.Module, nn.Module] = {}
    for path, codebook in codebooks.items():
        layer: Any = modules[path]
        if type(layer) not in (nn.Linear, nn.Conv2d):
            raise InputError(
                f"{path} must be a linear layer or a 2-D convolution, got {type(layer).__name__}"
            )
        if layer.weight.shape != codebook.codes.shape:
            raise InputError(
                f"the codebook of {path} must have the shape {tuple(layer.weight.shape)}, got {tuple(codebook.codes.shape)}"
            )
        small: _CodebookLayer
        if isinstance(layer, nn.Linear):
            small = CodebookLinear(codebook, layer.bias)
        else:
            names = ("stride", "padding", "dilation", "groups", "padding_mode")
            small = CodebookConv2d(codebook, layer.bias, **{name: getattr(layer, name) for name in names})
        replacements[layer] = small.train(layer.training)
    replace_layers(model, replacements)
    return model


def _cast(bias: Tensor | None, inputs: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(inputs.dtype)
