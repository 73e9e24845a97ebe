"""Putting other layers in the place of a model's layers."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from coloss.errors import InputError

_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules of torch that read the weights of the layers in them, in place of calling these layers."""


def check_called(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse layers that another layer cannot stand in for, since the module around them reads their weights.

    Args:
        model: the network.
        paths: of its layers.

    Raises:
        InputError: naming the first such layer, in an `nn.MultiheadAttention` or a transformer layer of torch.

    Examples:
        >>> check_called(nn.TransformerEncoderLayer(8, 2, 8), ["linear1"])
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: layer 'linear1' cannot be replaced: its TransformerEncoderLayer reads its weight ...
    """
    for path in paths:
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, _READ_WEIGHTS):
            raise InputError(
                f"layer {path!r} cannot be replaced: its {type(parent).__name__} reads its weight in place of calling it; name other layers"
            )


def replace_layers(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Put new modules in the place of old ones, at every path at which these stand.

    Args:
        model: changed in place.
        replacements: old module -> new module.

    Raises:
        InputError: for the model itself.

    Examples:
        >>> old = nn.Linear(2, 2)
        >>> model = nn.Sequential(old, nn.ReLU(), old)
        >>> replace_layers(model, {old: nn.Identity()})
        >>> model[0] is model[2], type(model[2]).__name__
        (True, 'Identity')
    """
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            if not path:
                raise InputError(f"model must contain its layers, got a {type(module).__name__} itself")
            model.set_submodule(path, replacements[module])
