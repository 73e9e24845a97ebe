"""Running a network over a data set to look at it: nothing is trained, and nothing outside changes.

Data come as a tensor of inputs; as anything with `len(data)` and `data.take(indices)`, such as
`coloss.data.IndexedDataset`; as a torch `Dataset`; or as an iterable of batches. A batch is a tensor of
inputs, a tuple `(inputs[, targets, ...])`, a dict with the key `inputs`, or an object with that attribute.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from coloss.nn.taps import Taps


class Predictions(NamedTuple):
    """What a network returned for every sample of a data set, on the CPU.

    Attributes:
        outputs: a tensor, or a tuple or dict of tensors, as the network returns them; samples along the first
            dimension.
        targets: in the same order and nesting as the data set's own; None where there are none.
    """

    outputs: Any
    targets: Any


class Features(NamedTuple):
    """Features of every sample of a data set, on the CPU.

    Attributes:
        features: (samples, dimensions).
        targets: in the same order; None where the data hold none.
    """

    features: Tensor
    targets: Any


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Look at a network without leaving a trace: eval mode, no gradients, randomness of its own.

    Inside, every submodule is in eval mode, gradients are off, and torch's global generators (CPU, and the
    device of the network) start from a fixed seed. On the way out, also after an error, each submodule has
    its own mode back, a frozen part of a training network included, and the generators continue as if nothing
    had happened.

    Args:
        model: the network.

    Examples:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
        >>> with evaluation_mode(model):
        ...     model.training, torch.is_grad_enabled()
        (False, False)
        >>> model.training
        True
    """
    device = _device(model)
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.manual_seed(0)
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def predict(
    model: nn.Module, data: Any, batch_size: int = 512, *, call: Callable[[Any], Any] | None = None
) -> Predictions:
    """Outputs of a network for a whole data set, in its order, together with the targets.

    Args:
        model: any module that takes a batch of inputs as its only argument.
        data: see the head of this module; inputs are moved to the device of the model's first parameter.
        batch_size: samples in one forward pass, >= 1; an iterable of batches keeps its own.
        call: what to run instead of the model itself, such as `model.encode_query`.

    Returns:
        Outputs and targets of all samples, on the CPU.

    Raises:
        ValueError: if data hold no sample or are of no known kind, or batch_size < 1.

    Examples:
        >>> outputs, targets = predict(nn.Flatten(), torch.arange(8.0).reshape(2, 2, 2))
        >>> outputs
        tensor([[0., 1., 2., 3.],
                [4., 5., 6., 7.]])
    """
    with evaluation_mode(model):
        outputs, targets = zip(*_passes(call or model, data, batch_size, _device(model)))
    return Predictions(_joined(outputs), _joined(targets))


def extract_features(
    model: nn.Module, data: Any, module_path: str | None = None, batch_size: int = 512
) -> Features:
    """One feature vector for every sample of a data set: the output of the network or of a submodule.

    Args:
        model: any module that takes a batch of inputs as its only argument.
        data: see the head of this module.
        module_path: dotted name of a submodule, such as "backbone.stages.1"; with ":input" behind it, what
            goes into that submodule; None takes the output of the model itself. See `coloss.nn.Taps`.
        batch_size: samples in one forward pass, >= 1; an iterable of batches keeps its own.

    Returns:
        Features, flattened to (samples, dimensions), and targets, on the CPU.

    Raises:
        ValueError: if there is no such submodule, or features are not one tensor for each batch; or if data
            hold no sample or are of no known kind, or batch_size < 1.
        RuntimeError: if the submodule does not run in a forward pass.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 2))
        >>> features, _ = extract_features(model, torch.tensor([[[-1.0, 2.0], [3.0, -4.0]]]), "1")
        >>> features
        tensor([[0., 2., 3., 0.]])
    """
    parts, targets = [], []
    paths = {} if module_path is None else {"features": module_path}
    with Taps(model, paths) as taps, evaluation_mode(model):
        for outputs, batch_targets in _passes(model, data, batch_size, _device(model)):
            features = outputs if module_path is None else _moved(taps["features"], torch.device("cpu"))
            taps.clear()
            if not isinstance(features, Tensor) or features.ndim == 0:
                raise ValueError(f"features must be one tensor a batch, got {type(features).__name__}")
            parts.append(features.flatten(1) if features.ndim > 1 else features[:, None])
            targets.append(batch_targets)
    return Features(torch.cat(parts), _joined(targets))


def _device(model: nn.Module) -> torch.device:
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _passes(
    call: Callable[[Any], Any], data: Any, batch_size: int, device: torch.device
) -> Iterator[tuple[Any, Any]]:
    """Outputs and targets of one batch after the other, computed on a device and brought to the CPU."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    home = torch.device("cpu")
    empty = True
    for batch in _batches(data, batch_size):
        inputs, targets = _inputs_and_targets(batch)
        yield _moved(call(_moved(inputs, device)), home), _moved(targets, home)
        empty = False
    if empty:
        raise ValueError("data must hold at least one sample, got none")


def _batches(data: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(data, Tensor):
        return data.split(batch_size) if len(data) else ()
    if hasattr(data, "take") and hasattr(data, "__len__"):
        return (data.take(indices) for indices in torch.arange(len(data)).split(batch_size) if len(indices))
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size)
    if isinstance(data, Iterable):
        return data
    raise ValueError(
        f"data must be a tensor, a data set or an iterable of batches, got {type(data).__name__}"
    )


def _inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Tensor):
        return batch, None
    if hasattr(batch, "inputs"):
        return batch.inputs, getattr(batch, "targets", None)
    if isinstance(batch, dict) and "inputs" in batch:
        return batch["inputs"], batch.get("targets")
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0], batch[1] if len(batch) > 1 else None
    raise ValueError(
        f"a batch must be a tensor, (inputs, targets) or have inputs, got {type(batch).__name__}"
    )


def _moved(nested: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, nested)


def _joined(batches: Sequence[Any]) -> Any:
    """Concatenate tensors along samples, inside whatever nesting they have; other values are dropped."""
    return tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else None, *batches)
