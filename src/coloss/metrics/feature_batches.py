"""Features of a data set batch by batch, from several places of a network at once, for statistics that need not keep them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from coloss.metrics.inference import _device, _moved, _passes, evaluation_mode
from coloss.nn.taps import Taps


class FeatureBatch(NamedTuple):
    """What one forward pass gave, on the CPU.

    Attributes:
        features: one (batch, dimensions) tensor for each name.
        outputs: what the network returned.
        targets: of the batch; None where the data hold none.
    """

    features: dict[str, Tensor]
    outputs: Any
    targets: Any


@contextmanager
def feature_stream(
    model: nn.Module, data: Any, paths: Mapping[str, str], batch_size: int = 512
) -> Iterator[Iterator[FeatureBatch]]:
    """Run a network over a data set and look at one batch after the other; inside the block it is in eval mode.

    Args:
        model: any module that takes a batch of inputs as its only argument.
        data: as for `coloss.metrics.predict`. Floating inputs are brought to the type of the model's parameters.
        paths: name -> module path, or module path with ":input" (see `coloss.nn.Taps`). Features are flattened to one row a sample.
        batch_size: samples in one forward pass, >= 1; an iterable of batches keeps its own.

    Returns:
        A context that gives an iterator over `FeatureBatch`. Modes, gradients and randomness are as before when it is left.

    Raises:
        ValueError: for an unknown path, a feature that is no tensor, data without samples or of no known kind, or batch_size < 1.
        RuntimeError: if a submodule does not run in a forward pass.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
        >>> with feature_stream(model, torch.zeros(5, 2), {"hidden": "1"}, batch_size=3) as batches:
        ...     for batch in batches:
        ...         print(batch.features["hidden"].shape, batch.outputs.shape)
        torch.Size([3, 3]) torch.Size([3, 4])
        torch.Size([2, 3]) torch.Size([2, 4])
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    with Taps(model, paths) as taps, evaluation_mode(model):

        def call(inputs: Any) -> Any:
            return model(inputs if dtype is None else tree_map(lambda leaf: _typed(leaf, dtype), inputs))

        def batches() -> Iterator[FeatureBatch]:
            for outputs, targets in _passes(call, data, batch_size, _device(model)):
                features = {name: _rows(name, taps[name]) for name in paths}
                taps.clear()
                yield FeatureBatch(features, outputs, targets)

        yield batches()


def _typed(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _rows(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim == 0:
        raise ValueError(f"features must be one tensor a batch, got {type(value).__name__} at {name!r}")
    moved: Tensor = _moved(value, torch.device("cpu"))
    return moved.flatten(1) if moved.ndim > 1 else moved[:, None]
