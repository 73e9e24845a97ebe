"""What pruning left of each layer, and the plainest pruning of all: one cut after training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from coloss.compression.cost import CONVOLUTIONS
from coloss.compression.gradual_sparsifier import Scope, final_density
from coloss.compression.layer_choice import choose_layers
from coloss.errors import InputError
from coloss.ops import delta_rank, magnitude_masks


@dataclass(frozen=True)
class LayerSparsity:
    """What pruning left of one layer.

    Attributes:
        path: of the layer.
        weights: entries of its weight.
        density: share of them that is not 0.
        dead_rows: outputs without any weight: they are constant.
        dead_columns: inputs (channels of a convolution) that no weight reads.
        delta_rank: see `coloss.ops.delta_rank`; of a grouped convolution that of outputs by inputs within a group, all groups together.
    """

    path: str
    weights: int
    density: float
    dead_rows: int
    dead_columns: int
    delta_rank: int


def sparsity_report(
    model: nn.Module, layers: str | Sequence[str] | None = None, *, delta: float = 0.1
) -> list[LayerSparsity]:
    """Density, dead outputs and inputs, and rank of each layer of a pruned model; a weight that several layers share counts once.

    Args:
        model: any network.
        layers: paths; default: every linear layer and convolution, the first and the last too, so that the whole density shows.
        delta: of the rank.

    Raises:
        InputError: as `choose_layers`.
        ValueError: for a delta out of range, or a weight that is not finite.

    Cost:
        One SVD for each layer.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
        >>> sparsity_report(layer)
        [LayerSparsity(path='', weights=6, density=0.333..., dead_rows=1, dead_columns=1, delta_rank=1)]
    """
    if layers is None:
        chosen = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, *CONVOLUTIONS)}
        if not chosen:
            raise InputError(f"{type(model).__name__} has no linear layer or convolution")
    else:
        chosen = choose_layers(model, layers)
    found = []
    for path, weight in distinct_weights(chosen).items():
        there = weight != 0
        groups: Any = getattr(chosen[path], "groups", 1)
        by_input = there.unflatten(0, (groups, len(there) // groups)).transpose(1, 2)
        found.append(
            LayerSparsity(
                path=path,
                weights=weight.numel(),
                density=int(there.sum()) / max(weight.numel(), 1),
                dead_rows=int((~there.flatten(1).any(1)).sum()),
                dead_columns=int((~by_input.flatten(2).any(2)).sum()),
                delta_rank=delta_rank(weight, delta),
            )
        )
    return found


def prune_by_magnitude(
    model: nn.Module,
    sparsity: float,
    layers: str | Sequence[str] | None = None,
    scope: Scope = "global",
) -> nn.Module:
    """Set the weights of least magnitude to 0 after training, in place: what gradual pruning is held against.

    Args:
        model: any trained network.
        sparsity: share of the layers' weights, in [0, 1); exact to one weight. A weight that several layers share counts once.
        layers: paths; default: `choose_layers`.
        scope: rank the weights of all layers together ("global") or each layer's alone ("layer").

    Returns:
        The model.

    Raises:
        InputError: for a sparsity out of range or an unknown scope, or as `choose_layers`.

    Examples:
        >>> model = prune_by_magnitude(nn.Sequential(nn.Linear(10, 10)), 0.95, layers="0")
        >>> int(model[0].weight.count_nonzero())
        5
    """
    density = final_density(sparsity)
    if scope not in get_args(Scope):
        raise InputError(f'scope must be "global" or "layer", got {scope!r}')
    weights = distinct_weights(choose_layers(model, layers))
    with torch.no_grad():
        for path, mask in magnitude_masks(weights, density, scope).items():
            weights[path].masked_fill_(~mask, 0)
    return model


def distinct_weights(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The weight of each layer by its path; one that several layers share stands under the first of them alone.

    Args:
        layers: path -> layer with a weight, as `choose_layers` gives them.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> list(distinct_weights(dict(model.named_children())))
        ['0']
    """
    first: dict[int, tuple[str, Any]] = {}
    for path, layer in layers.items():
        first.setdefault(id(layer.weight), (path, layer.weight))
    return dict(first.values())
