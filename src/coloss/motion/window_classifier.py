"""Tells from a short window of pose features what a person does: two bidirectional LSTM layers that bear missing numbers.

After Riccio, 2024, arXiv 2411.11548: LSTM of 91 units in each direction over the window, dropout, a second one of which the last state of
each direction counts, dropout, a linear layer. Unlike there, features are standardised over all frames alike, not by their place in the
window, so that a window may begin anywhere; with numbers of the training windows alone; and a missing number is no number.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.train.method import Method
from coloss.train.state import State


def carry_forward(
    windows: Float[Tensor, "windows frames features"],
) -> Float[Tensor, "windows frames features"]:
    """Every missing number (NaN) replaced by the last one of its window before it; NaN where there was none yet.

    Args:
        windows: (windows, frames, features).

    Examples:
        >>> carry_forward(torch.tensor([[[torch.nan], [1.0], [torch.nan], [3.0]]])).flatten()
        tensor([nan, 1., 1., 3.])
    """
    frames = torch.arange(windows.shape[1], device=windows.device)[:, None]
    last = torch.where(windows.isnan(), 0, frames).cummax(1).values
    return windows.gather(1, last)


class FeatureScaler(nn.Module):
    """Brings features to mean 0 and standard deviation 1, counting only what is there, and fills in what is not.

    A number that is missing (NaN) or infinite becomes the last one of its feature in the window, or the training mean if there was none. The numbers are buffers:
    they are stored with the model.

    Args:
        features: how many.

    Examples:
        >>> scaler = FeatureScaler(1).fit(torch.tensor([[[1.0], [3.0], [torch.nan]]]))
        >>> scaler(torch.tensor([[[torch.nan], [3.0], [torch.nan]]])).flatten()
        tensor([0., 1., 1.])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def fit(self, windows: Float[Tensor, "windows frames features"]) -> "FeatureScaler":
        """Take mean and standard deviation of training windows; 0 and 1 for a feature that is never there, 1 for a constant one.

        Raises:
            ValueError: for another number of features, or none of them there.
        """
        if windows.shape[-1] != len(self.mean):
            raise ValueError(f"windows must have {len(self.mean)} features, got {windows.shape[-1]}")
        rows = windows.flatten(0, 1).double()
        present = rows.isfinite()
        if not present.any():
            raise ValueError("windows must hold at least one number, all are missing")
        count = present.sum(0).clamp_min(1)
        mean = torch.where(present, rows, 0).sum(0) / count
        spread = torch.where(present, rows - mean, 0).square().sum(0).div(count).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(spread > 1e-6 * (1 + mean.abs()), spread, 1.0))
        return self

    def forward(
        self, windows: Float[Tensor, "windows frames features"]
    ) -> Float[Tensor, "windows frames features"]:
        scaled = (windows.to(self.mean.dtype) - self.mean) / self.scale
        return carry_forward(scaled.masked_fill(~scaled.isfinite(), torch.nan)).nan_to_num(nan=0.0)


class WindowClassifier(nn.Module):
    """Logits of what happens in a window of features, some of which may be missing (NaN).

    Args:
        features: numbers of a frame, >= 1.
        classes: logits, >= 1.
        hidden: units of each LSTM in each direction, >= 1.
        dropout: probability in [0, 1) after each LSTM layer.

    Attributes:
        scaler: a `FeatureScaler`; call `scaler.fit(training windows)` before training.

    Raises:
        ValueError: for a size < 1 or dropout out of range; from `forward` for another number of features or no frames.

    Source: Riccio, 2024, arXiv 2411.11548; sizes from the model file that the author published. Input weights begin as Glorot's, recurrent
    ones orthogonal, forget gates open.

    Examples:
        >>> model = WindowClassifier(22, 4, hidden=8).eval()
        >>> windows = torch.randn(3, 30, 22)
        >>> windows[0, 5:9, 2] = torch.nan
        >>> model(windows).shape
        torch.Size([3, 4])
    """

    def __init__(self, features: int, classes: int, hidden: int = 91, dropout: float = 0.4) -> None:
        super().__init__()
        for name, value in (("features", features), ("classes", classes), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.scaler = FeatureScaler(features)
        self.first = nn.LSTM(features, hidden, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * hidden, classes)
        for lstm in (self.first, self.second):
            for name, weight in lstm.named_parameters():
                if "weight_ih" in name:
                    nn.init.xavier_uniform_(weight)
                elif "weight_hh" in name:
                    for gate in weight.data.chunk(4):
                        nn.init.orthogonal_(gate)
                else:
                    nn.init.zeros_(weight)
                    if "bias_ih" in name:  # gates come as input, forget, cell, output
                        weight.data[hidden : 2 * hidden] = 1
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def features(self, windows: Float[Tensor, "windows frames features"]) -> Float[Tensor, "windows units"]:
        """What the classifier sees of each window: the last state of both directions of the second layer."""
        if windows.ndim != 3 or windows.shape[-1] != len(self.scaler.mean) or not windows.shape[1]:
            raise ValueError(
                f"windows must be (windows, frames, {len(self.scaler.mean)}) with frames, got {tuple(windows.shape)}"
            )
        states, _ = self.first(self.scaler(windows))
        _, (last, _) = self.second(self.dropout(states))
        return torch.cat([last[0], last[1]], -1)

    def forward(self, windows: Float[Tensor, "windows frames features"]) -> Float[Tensor, "windows classes"]:
        return self.classifier(self.dropout(self.features(windows)))

    def kernel_penalty(self) -> Float[Tensor, ""]:
        """Sum of squares of the LSTMs' input weights and the classifier's weights."""
        kernels = [weight for name, weight in self.named_parameters() if "weight_ih" in name]
        return torch.stack([kernel.square().sum() for kernel in [*kernels, self.classifier.weight]]).sum()


class KernelPenalty(Method):
    """Weight decay as published: on the weights that features and states come in by, not on recurrent ones and biases.

    Adds the term `kernel_penalty`, the sum of their squares, with weight 0.01.

    Args:
        weight: of the term, >= 0.

    Raises:
        ValueError: for a weight < 0; from `setup` if the model is no `WindowClassifier`.

    Examples:
        >>> import coloss
        >>> data = (torch.randn(16, 10, 3), torch.randint(2, (16,)))
        >>> run = coloss.fit(
        ...     WindowClassifier(3, 2, hidden=4),
        ...     data,
        ...     nn.functional.cross_entropy,
        ...     [KernelPenalty()],
        ...     budget=coloss.Budget(steps=2),
        ... )
        >>> sorted(run.history[-1].terms)
        ['cross_entropy', 'kernel_penalty']
    """

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must be >= 0, got {weight}")
        self.term_weights = {"kernel_penalty": float(weight)}

    def setup(self, state: State) -> None:
        if not isinstance(state.model, WindowClassifier):
            raise ValueError(f"model must be a WindowClassifier, got {type(state.model).__name__}")

    def terms(self, state: State) -> dict[str, Any]:
        model: Any = state.model
        return {"kernel_penalty": model.kernel_penalty()}
