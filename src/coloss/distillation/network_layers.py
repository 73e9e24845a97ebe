"""The layers of a network in the order in which its forward pass runs them, and what each of them gives."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from coloss.errors import InputError, suggest_names
from coloss.metrics.inference import evaluation_mode

LayerPaths = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One layer of a network, and the features that it gives.

    Attributes:
        paths: module paths; most layers are one module, one of a plain `nn.Sequential` may be several in a row.
        modules: what stands there.
        shape: of its output for the example, samples first.
        kind: "maps" (batch, channels, *space), "tokens" (batch, tokens, dim) or "vectors" (batch, features).
        width: channels, dim or features.
        output_shape: of the network's output for the example.
    """

    paths: LayerPaths
    modules: tuple[nn.Module, ...]
    shape: tuple[int, ...]
    kind: Literal["maps", "tokens", "vectors"]
    width: int
    output_shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Features that it gives for one sample."""
        return math.prod(self.shape[1:])

    @property
    def module(self) -> nn.Module:
        """The layer as one module."""
        return self.modules[0] if len(self.modules) == 1 else nn.Sequential(*self.modules)


def find_layers(model: nn.Module) -> list[LayerPaths]:
    """Module paths of the layers of a network that is a sequence at heart.

    They are the members of the `nn.Sequential`s and `nn.ModuleList`s that hold most of its parameters, opened where one lies in another.
    Modules without a weight matrix (activations, norms, dropout) belong to the layer before them. A linear layer at the end, which gives
    the output, is not listed.

    Args:
        model: such as a stack, a residual network, a transformer.

    Returns:
        Paths of each layer, in the order of registration.

    Raises:
        InputError: if fewer than two layers are found.

    Examples:
        >>> from coloss.nn import MLP, Classifier, ResNet
        >>> find_layers(
        ...     nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        ... )
        [('0', '1'), ('2', '3')]
        >>> find_layers(Classifier(ResNet(1, (4, 8), (1, 1)), 3))[1:]
        [('backbone.stages.0.0',), ('backbone.stages.1.0',)]
    """
    best: list[tuple[str, nn.Module]] = []
    most = -1
    for path, module in model.named_modules():
        parts = [(path, module)] if not path else []
        if not _is_container(module):
            parts = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        parts = [part for part in parts if _is_container(part[1])]
        size = sum(parameter.numel() for _, part in parts for parameter in part.parameters())
        if parts and size > most:
            best, most = parts, size
    groups: list[list[tuple[str, nn.Module]]] = []
    for path, container in best:
        for member in _members(path, container):
            if not groups or (_has_matrix(member[1]) and any(_has_matrix(m) for _, m in groups[-1])):
                groups.append([])
            groups[-1].append(member)
    if groups and len(groups[-1]) == 1 and isinstance(groups[-1][0][1], nn.Linear):
        groups.pop()
    if len(groups) < 2:
        raise InputError(
            f"layers must be given as module paths: found {len(groups)} in the sequences of {type(model).__name__}"
        )
    return [tuple(path for path, _ in group) for group in groups]


def read_layers(
    model: nn.Module, example: Any, layers: Sequence[str | Sequence[str]] | None = None
) -> list[Layer]:
    """Run a network once on an example, without gradients and in evaluation mode, and see what each layer gives.

    Args:
        model: the network.
        example: inputs of one or more samples, as the network takes them; only their shapes matter.
        layers: module paths in the order of the forward pass, one or several in a row for each layer; None finds them.

    Returns:
        One record for each layer.

    Raises:
        InputError: for an unknown path, a layer that the forward pass does not run once and in this order, or one that does not give a
            single tensor of 2 to 5 dimensions with the samples first.

    Examples:
        >>> from coloss.nn import Classifier, ConvNet
        >>> [layer.shape for layer in read_layers(Classifier(ConvNet(1, (4, 8)), 3), torch.zeros(2, 1, 8, 8))]
        [(2, 4, 8, 8), (2, 8, 4, 4)]
    """
    paths: list[LayerPaths] = (
        find_layers(model)
        if layers is None
        else [(layer,) if isinstance(layer, str) else tuple(layer) for layer in layers]
    )
    if len(paths) < 2 or not all(paths):
        raise InputError(f"layers must name at least two layers, got {layers!r}")
    modules = dict(model.named_modules())
    for path in (path for group in paths for path in group):
        if path not in modules:
            raise InputError(f"the model has no layer {path!r}{suggest_names(path, list(modules))}")
    seen: list[tuple[int, Any]] = []
    handles = [
        modules[group[-1]].register_forward_hook(
            lambda module, args, output, number=number: seen.append((number, output))
        )
        for number, group in enumerate(paths)
    ]
    try:
        with evaluation_mode(model):
            output = model(_on_device_of(model, example))
    finally:
        for handle in handles:
            handle.remove()
    if [number for number, _ in seen] != list(range(len(paths))):
        ran = ", ".join(paths[number][-1] for number, _ in seen) or "none of them"
        wanted = ", ".join(group[-1] for group in paths)
        raise InputError(
            f"layers must be run once each in the order given ({wanted}), the forward pass runs: {ran}"
        )
    output_shape = tuple(output.shape) if isinstance(output, Tensor) else ()
    return [
        _record(group, tuple(modules[path] for path in group), found, output_shape)
        for group, (_, found) in zip(paths, seen, strict=True)
    ]


def _record(
    paths: LayerPaths, modules: tuple[nn.Module, ...], output: Any, output_shape: tuple[int, ...]
) -> Layer:
    if not isinstance(output, Tensor) or not 2 <= output.dim() <= 5:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"layer {paths[-1]!r} must give one tensor (batch, ...) of 2 to 5 dimensions, got {found}"
        )
    shape = tuple(output.shape)
    series = any(isinstance(part, nn.Conv1d) for module in modules for part in module.modules())
    if len(shape) == 2:
        return Layer(paths, modules, shape, "vectors", shape[1], output_shape)
    if len(shape) == 3 and not series:
        return Layer(paths, modules, shape, "tokens", shape[2], output_shape)
    return Layer(paths, modules, shape, "maps", shape[1], output_shape)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or (
        isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    )


def _members(path: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in container.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if _is_container(child):
            yield from _members(inner, child)
        else:
            yield inner, child


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _on_device_of(model: nn.Module, example: Any) -> Any:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example)
