"""Weights of which n in each m neighbours stay: which layers take it, the cut, its check, and how near to free it is before it is made.

Neighbours lie along the inputs: the columns of a linear layer, the input channels of a convolution at each place of its kernel, as hardware
wants them (the kernel permuted to outputs x places x channels). Where m does not divide the inputs, those behind the last whole group stay.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from coloss.compression.cost import CONVOLUTIONS
from coloss.compression.layer_choice import choose_layers
from coloss.errors import InputError
from coloss.ops import nm_mask
from coloss.train import Schedule, value_at

KINDS = (nn.Linear, *CONVOLUTIONS)
"""Layers that n:m masks fit."""


def choose_nm_layers(
    model: nn.Module, n: int = 2, m: int = 4, layers: str | Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The layers whose weights lose places: those of `choose_layers` with at least m inputs.

    Args:
        model: any network.
        n, m: 1 <= n <= m.
        layers: paths, of layers or of blocks; None: by the rule of `choose_layers`, which spares the first and the last layer.

    Returns:
        Path -> layer, in the order of the model.

    Raises:
        InputError: as `choose_layers`; if n and m are out of range, a named layer has fewer than m inputs, or a weight is sharded or
            shared with another layer.

    Examples:
        >>> from coloss.nn import MLP, Classifier
        >>> list(choose_nm_layers(Classifier(MLP(4, (64, 64, 64)), 3)))
        ['backbone.layers.3', 'backbone.layers.6']
    """
    if not 1 <= n <= m:
        raise InputError(f"n must be in [1, m], got n={n}, m={m}")
    chosen = choose_layers(model, layers, kinds=KINDS)
    for path, layer in chosen.items():
        weight = layer.get_parameter("weight")
        if hasattr(weight, "placements") or weight.ndim < 2:
            raise InputError(f"the weight of {path} is sharded: masks need whole weights, use strategy ddp")
    narrow = [path for path, layer in chosen.items() if layer.get_parameter("weight").shape[1] < m]
    named = {layers} if isinstance(layers, str) else set(layers or ())
    if refused := [path for path in narrow if path in named]:
        raise InputError(f"layers must have at least m={m} inputs, got {', '.join(refused)} with fewer")
    if len(narrow) == len(chosen):
        raise InputError(f"{type(model).__name__} has no layer with at least m={m} inputs: name layers")
    chosen = {path: layer for path, layer in chosen.items() if path not in narrow}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for path, layer in chosen.items():
        if owners[id(layer.get_parameter("weight"))] > 1:
            raise InputError(f"the weight of {path} is shared with another layer: name layers without it")
    return chosen


def nm_parameter_groups(
    model: nn.Module, n: int = 2, m: int = 4, layers: str | Sequence[str] | None = None
) -> list[dict[str, object]]:
    """Parameter groups for `AdamS`: the weights that lose places, and the rest.

    Make them before `RowGroupScale` is put on the layers, whose weights are computed from then on, and add its scales to the rest:
    `groups[1]["params"].append(scale.scale)`.

    Raises:
        InputError: as `choose_nm_layers`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> [(group["sparse"], len(group["params"])) for group in nm_parameter_groups(model)]
        [(True, 1), (False, 5)]
    """
    inside = [layer.get_parameter("weight") for layer in choose_nm_layers(model, n, m, layers).values()]
    known = {id(weight) for weight in inside}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [
        {"params": inside, "sparse": True, "nm": (n, m)},
        *([{"params": rest, "sparse": False}] if rest else []),
    ]


@torch.no_grad()
def finalize_nm_(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    layers: str | Sequence[str] | None = None,
    *,
    masks: Mapping[str, Bool[Tensor, "..."]] | None = None,
) -> dict[str, Bool[Tensor, "..."]]:
    """Set all but n of each m neighbours to exactly zero, in place: the cut after `AdamS`, and one-shot pruning of any other model.

    Args:
        model: any network.
        n, m: of each m neighbours the n of greatest absolute value stay; of equal ones the first.
        layers: paths; None: `choose_nm_layers`.
        masks: by path, to cut by instead.

    Returns:
        Path -> mask, True where a weight stayed.

    Raises:
        InputError: as `choose_nm_layers`; for masks of other layers or shapes.
        ValueError: if a weight is NaN. After an error no weight has changed.

    Examples:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, -3.0, 2.0, 0.2]]))
        >>> model = nn.Sequential(layer)
        >>> _ = finalize_nm_(model, 2, 4, layers="0")
        >>> layer.weight.data
        tensor([[ 0., -3.,  2.,  0.]])
    """
    chosen = choose_nm_layers(model, n, m, layers)
    weights = {path: layer.get_parameter("weight") for path, layer in chosen.items()}
    if masks is None:
        masks = {path: nm_mask(weight, n, m, dim=1) for path, weight in weights.items()}
    for path, weight in weights.items():
        if path not in masks or masks[path].shape != weight.shape:
            raise InputError(f"masks must have one of shape {tuple(weight.shape)} for {path}")
    if others := [path for path in masks if path not in weights]:
        raise InputError(f"masks must be of the chosen layers, {', '.join(weights)}, got {', '.join(others)}")
    found = {path: masks[path].to(weight.device) for path, weight in weights.items()}
    for path, weight in weights.items():
        weight.masked_fill_(~found[path], 0.0)
    return found


def nm_violations(
    model: nn.Module, n: int = 2, m: int = 4, layers: str | Sequence[str] | None = None
) -> dict[str, int]:
    """How many groups of each layer have more than n weights that are not zero: 0 everywhere is what hardware asks for.

    Read from the weights, so it also holds for a file that was loaded; counting what a mask leaves out would prove nothing, since a
    mask leaves out (m-n)/m whatever it was made of.

    Raises:
        InputError: as `choose_nm_layers`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> nm_violations(model, layers="0")
        {'0': 12}
        >>> _ = finalize_nm_(model, layers="0")
        >>> nm_violations(model, layers="0")
        {'0': 0}
    """
    found = {}
    for path, layer in choose_nm_layers(model, n, m, layers).items():
        weight = layer.get_parameter("weight").detach().movedim(1, -1)
        groups = weight[..., : weight.shape[-1] // m * m].unflatten(-1, (-1, m))
        found[path] = int(((groups != 0).sum(-1) > n).sum())
    return found


class MaskedToKept(NamedTuple):
    """How large the losers of the groups still are.

    Attributes:
        mean: mean absolute value of the losers over that of the kept weights: 0 where the cut is free, 0.3 or so for a plain 2:4 model.
        max: largest absolute value of a loser over the mean of the kept ones; a few large losers can hurt where the mean is 0.
        masked: mean absolute value of the losers.
        kept: of the others.
    """

    mean: float
    max: float
    masked: float
    kept: float


@torch.no_grad()
def masked_to_kept_ratio(
    weights: Iterable[Tensor] | nn.Module,
    n: int = 2,
    m: int = 4,
    layers: str | Sequence[str] | None = None,
    *,
    masks: Iterable[Tensor] | None = None,
) -> MaskedToKept:
    """How far a model is from n:m, before the cut: the one number to watch while it trains.

    Args:
        weights: a network, or its weights, inputs in the second dimension. Of layers under `RowGroupScale` give the weights themselves,
            `layer.parametrizations.weight.original`: their products with the scales are not what is pruned.
        n, m: as for `finalize_nm_`.
        layers: of a network; None: `choose_nm_layers`.
        masks: True for kept weights, in the order of the weights; None makes them anew from the weights.

    Returns:
        Pooled over all weights in whole groups or behind them; 0 where nothing is masked, infinite ratios where all kept weights are 0 and
        losers are not.

    Raises:
        InputError: as `choose_nm_layers`.
        ValueError: for NaN among the weights.

    Examples:
        >>> ratio = masked_to_kept_ratio([torch.tensor([[4.0, 2.0, 1.0, -0.5]])])
        >>> ratio.mean, round(ratio.max, 4), ratio.masked
        (0.25, 0.3333, 0.75)
    """
    if isinstance(weights, nn.Module):
        weights = [
            layer.get_parameter("weight") for layer in choose_nm_layers(weights, n, m, layers).values()
        ]
    weights = list(weights)
    masks = [nm_mask(weight, n, m, dim=1) for weight in weights] if masks is None else masks
    sums = torch.zeros(3, dtype=torch.float64)
    counts = [0, 0]
    for weight, mask in zip(weights, masks, strict=True):
        size = weight.detach().abs().float()
        lost = size[~mask]
        sums[0] += lost.sum(dtype=torch.float64).cpu()
        sums[1] += size[mask].sum(dtype=torch.float64).cpu()
        if lost.numel():
            sums[2] = torch.maximum(sums[2], lost.max().double().cpu())
        counts = [counts[0] + lost.numel(), counts[1] + mask.numel() - lost.numel()]
    masked, kept = float(sums[0]) / max(counts[0], 1), float(sums[1]) / max(counts[1], 1)

    def ratio(value: float) -> float:
        return value / kept if kept else (float("inf") if value else 0.0)

    return MaskedToKept(ratio(masked), ratio(float(sums[2])), masked, kept)


def decay_budget(learning_rate: float, total_steps: int, schedule: Schedule = 1.0) -> float:
    """How far `AdamS` can pull a loser over a whole run: sum over steps of learning rate times ramp.

    Compare it before a run with the size of the losers (`masked_to_kept_ratio(...).masked`): it should be several times that, since the
    pull wins over the gradient only late. Losers beyond it never reach zero.

    Args:
        learning_rate: base rate, >= 0.
        total_steps: T, >= 1.
        schedule: factor on the rate, a number or a function of progress, as `fit` takes it.

    Raises:
        InputError: for values out of range.

    Examples:
        >>> from coloss.train import cosine
        >>> round(decay_budget(1e-3, 1000), 4), round(decay_budget(1e-3, 1000, cosine()), 4)
        (0.4995, 0.1487)
    """
    if not learning_rate >= 0:
        raise InputError(f"learning_rate must be >= 0, got {learning_rate}")
    if total_steps < 1:
        raise InputError(f"total_steps must be >= 1, got {total_steps}")
    shares = (step / total_steps for step in range(total_steps))
    return sum(learning_rate * value_at(schedule, share) * share for share in shares)


class SemiStructured(NamedTuple):
    """What `semi_structured_` did.

    Attributes:
        converted: paths of layers that now run on sparse kernels.
        left: path -> why a layer stayed dense.
    """

    converted: tuple[str, ...]
    left: dict[str, str]


@torch.no_grad()
def semi_structured_(model: nn.Module, layers: str | Sequence[str] | None = None) -> SemiStructured:
    """Let the 2:4 linear layers of a model run on the sparse tensor cores of a CUDA device, by `torch.sparse.to_sparse_semi_structured`.

    For inference, in place, after `finalize_nm_`. There are kernels for half precision and sizes in multiples of 64 or so; layers that
    torch refuses stay dense, and the result says why. On a CPU there is no such kernel: a pruned model runs there at dense speed, and
    what it gains is the size of its file (`compress_model`).

    Args:
        model: on a CUDA device of compute capability 8.0 or higher.
        layers: paths; None: `choose_nm_layers`.

    Raises:
        InputError: if the layers are not on a CUDA device, or a linear layer is not 2:4; no layer has been converted then.

    Examples:
        >>> semi_structured_(nn.Sequential(nn.Linear(64, 64)), layers="0")
        Traceback (most recent call last):
        coloss.errors.InputError: layers must be on a CUDA device to run on sparse kernels, got cpu: a pruned model runs at dense speed there
    """
    chosen = choose_nm_layers(model, 2, 4, layers)
    broken = nm_violations(model, 2, 4, list(chosen))
    for path, layer in chosen.items():
        device = layer.get_parameter("weight").device
        if device.type != "cuda":
            raise InputError(
                f"layers must be on a CUDA device to run on sparse kernels, got {device}: a pruned model runs at dense speed there"
            )
        if isinstance(layer, nn.Linear) and broken[path]:
            raise InputError(
                f"layers must be 2:4, got {path} with {broken[path]} groups that are not: call finalize_nm_ first"
            )
    converted, left = [], {}
    for path, layer in chosen.items():
        if not isinstance(layer, nn.Linear):
            left[path] = f"no sparse kernel for {type(layer).__name__}"
            continue
        try:
            sparse = to_sparse_semi_structured(layer.weight.detach())
            layer.weight = nn.Parameter(sparse, requires_grad=False)
            converted.append(path)
        except RuntimeError as error:
            left[path] = " ".join(str(error).split())
    return SemiStructured(tuple(converted), left)
