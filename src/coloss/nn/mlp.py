"""A multilayer perceptron: the smallest backbone, projector and head."""

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers, each hidden one followed by a norm, an activation and dropout.

    Every hidden layer is `h -> dropout(activation(norm(W h + b)))`; the last layer, of width `out_features`,
    is linear alone. Inputs of more than two dimensions are flattened from dimension 1, so images and series
    go in as they are.

    Args:
        in_features: values per sample after flattening.
        hidden: width of each hidden layer; may be empty when `out_features` is given.
        out_features: width of the final linear layer. `None` ends the network at its last hidden layer (with
            norm and activation), which is what a backbone under a separate head wants.
        norm: `"batch"`, `"layer"` or `None`, before each activation. Under `"batch"` the linear layers carry
            no bias, since the norm would cancel it.
        activation: called without arguments, once for each hidden layer.
        dropout: probability in [0, 1) after each activation.

    Attributes:
        out_features: features per sample of the result.

    Returns:
        From `forward`: one row of `out_features` values per sample.

    Raises:
        ValueError: for a width below 1, no layer at all, an unknown norm, or inputs of another size.

    Examples:
        >>> import torch
        >>> from coloss.nn import MLP
        >>> MLP(64, [128, 32], 10)(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> MLP(64, [128, 32]).out_features
        32
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int | None = None,
        *,
        norm: Literal["batch", "layer"] | None = "batch",
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        if out_features is None and not hidden:
            raise ValueError("hidden must not be empty when out_features is None, got ()")
        for width in [*widths, *([] if out_features is None else [out_features])]:
            if width < 1:
                raise ValueError(f"in_features, hidden and out_features must be >= 1, got {width}")
        if norm not in ("batch", "layer", None):
            raise ValueError(f'norm must be "batch", "layer" or None, got {norm!r}')
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers.append(nn.Linear(width_in, width_out, bias=norm != "batch"))
            if norm is not None:
                layers.append(nn.BatchNorm1d(width_out) if norm == "batch" else nn.LayerNorm(width_out))
            layers.append(activation())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        if out_features is not None:
            layers.append(nn.Linear(widths[-1], out_features))
        self.layers = nn.Sequential(*layers)
        self.in_features = in_features
        self.out_features = widths[-1] if out_features is None else out_features

    def forward(self, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch features"]:
        rows = inputs.flatten(1) if inputs.ndim > 2 else inputs
        if rows.ndim != 2 or rows.shape[1] != self.in_features:
            raise ValueError(
                f"inputs must hold {self.in_features} values per sample, got shape {tuple(inputs.shape)}"
            )
        return self.layers(rows)
