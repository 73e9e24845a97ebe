"""Which layers of a model are compressed where none are named."""

from collections.abc import Sequence

from torch import nn

from coloss.compression.cost import CONVOLUTIONS
from coloss.errors import InputError, suggest_names

_KINDS = (*CONVOLUTIONS, nn.Linear)


def choose_layers(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    kinds: tuple[type[nn.Module], ...] = _KINDS,
    spare_ends: bool = True,
) -> dict[str, nn.Module]:
    """Layers to compress: the named ones, or all linear layers and convolutions except those that read the input and give the output.

    The ends are the first layer with weights in the order of the model (an embedding counts, so after one every linear layer is inside)
    and its last linear layer or convolution. Name the layers where that is wrong, such as in a language model whose embedding is also its
    output layer. Frozen layers, layers that another library subclassed and layers whose weight is computed (a
    parametrization, a pruning mask) may be ends, but are not chosen by the rule.

    Args:
        model: any network.
        layers: paths as in `model.named_modules()`, one or several; a path to a block stands for all layers of `kinds` in it. None: by rule.
        kinds: classes of layers that the method can compress.
        spare_ends: False takes the first and the last layer too.

    Returns:
        Path -> layer, in the order of the model.

    Raises:
        InputError: if a path does not exist or holds no layer of `kinds`, or the rule finds none.

    Examples:
        >>> from coloss.nn import MLP, Classifier
        >>> model = Classifier(MLP(4, (64, 64, 64)), 3)
        >>> list(choose_layers(model))
        ['backbone.layers.3', 'backbone.layers.6']
        >>> list(choose_layers(model, ["backbone.layers.0", "head"]))
        ['backbone.layers.0', 'head']
    """
    modules = dict(model.named_modules())
    names = ", ".join(kind.__name__ for kind in kinds)
    if layers is not None:
        wanted: set[str] = set()
        for path in (layers,) if isinstance(layers, str) else layers:
            if path not in modules:
                known = [name for name, part in modules.items() if type(part) in kinds]
                raise InputError(
                    f"layers must be paths of the model, got {path!r}{suggest_names(path, known)}"
                )
            inside = path and f"{path}."
            found = {
                n for n, m in modules.items() if type(m) in kinds and (n == path or n.startswith(inside))
            }
            if not found:
                raise InputError(f"layers must hold {names}, got {path!r}, a {type(modules[path]).__name__}")
            wanted |= found
        if not wanted:
            raise InputError("layers must name at least one layer, got none")
        return {name: part for name, part in modules.items() if name in wanted}
    weighted = [name for name, part in modules.items() if isinstance(part, (*_KINDS, nn.Embedding))]
    outputs = [name for name in weighted if isinstance(modules[name], _KINDS)]
    ends = {*weighted[:1], *outputs[-1:]} if spare_ends else set()
    chosen = {
        name: part
        for name, part in modules.items()
        if type(part) in kinds and name not in ends and _trains_its_weight(part)
    }
    if not chosen:
        raise InputError(
            f"{type(model).__name__} has no layer to compress: looked for trainable {names} between the first layer and the last; "
            "name layers with layers=[...]"
        )
    return chosen


def _trains_its_weight(layer: nn.Module) -> bool:
    """False also where the weight is no parameter but computed from others, as by `torch.nn.utils.prune`."""
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.requires_grad
