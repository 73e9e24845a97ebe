"""A classifier on several inputs at once: one encoder for each, one head on all of their features together."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.nn.mlp import MLP


class FusionClassifier(nn.Module):
    """Encoders whose features are put side by side under one head: `head(concat(encoder_m(input_m)))`.

    Args:
        encoders: one for each modality, with an integer attribute `out_features`; each gives (batch, out_features).
        num_outputs: number of classes, or 1 for a binary logit or a regression.
        hidden: widths of the head's hidden layers; none for a linear head.

    Attributes:
        encoders: `nn.ModuleList` of the encoders: tap `"encoders.0"`, `"encoders.1"` ... for the features of each modality.
        head: linear, or an `MLP` where it has hidden layers.

    Returns:
        From `forward`: logits of shape (batch, num_outputs).

    Raises:
        ValueError: for no encoders, one without `out_features`, a width below 1, or another number of inputs than encoders.

    Examples:
        >>> model = FusionClassifier([MLP(8, [16]), MLP(3, [4])], num_outputs=5)
        >>> model((torch.rand(2, 8), torch.rand(2, 3))).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, encoders: Sequence[nn.Module], num_outputs: int, *, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("encoders must hold at least one module, got none")
        widths = [getattr(encoder, "out_features", None) for encoder in encoders]
        for encoder, width in zip(encoders, widths, strict=True):
            if not isinstance(width, int):
                raise ValueError(
                    f"encoders must each have an integer out_features, got {type(encoder).__name__}"
                )
        if num_outputs < 1:
            raise ValueError(f"num_outputs must be >= 1, got {num_outputs}")
        self.encoders = nn.ModuleList(encoders)
        joined = sum(width for width in widths if width is not None)
        self.head: nn.Module = (
            MLP(joined, hidden, num_outputs, norm=None) if hidden else nn.Linear(joined, num_outputs)
        )

    def forward(self, inputs: Sequence[Any]) -> Float[Tensor, "batch outputs"]:
        if isinstance(inputs, Tensor) or len(inputs) != len(self.encoders):
            found = "a tensor" if isinstance(inputs, Tensor) else len(inputs)
            raise ValueError(f"inputs must be one for each of {len(self.encoders)} encoders, got {found}")
        features = [encoder(part) for encoder, part in zip(self.encoders, inputs, strict=True)]
        return self.head(torch.cat(features, dim=1))
