"""Turns a convolution or linear layer into two thinner ones, and says what that saves.

A weight laid out as a matrix `M` (`matricize`) of rank k is a product of two factors, `M = L R`, and a layer
with that weight is two layers in a row. With `M = U diag(s) V^T` the factors here are `L = U sqrt(s)` and
`R = sqrt(s) V^T`, so that both are of equal size and can be trained on. Multiply-adds per output position, for
C input and N output channels and a kernel of h x w at stride 1:

    scheme       matrix          first layer           second layer              dense      low rank
    channel      N x (C h w)     C -> k, h x w         k -> N, 1 x 1             N C h w    k (C h w + N)
    spatial      (C h) x (N w)   C -> k, h x 1         k -> N, 1 x w             N C h w    k (C h + N w)
    decoupled    N x C x (h w)   C -> k N, 1 x 1       k N -> N, h x w, grouped  N C h w    k N (C + h w)

Stride, padding and dilation go to the layer that has the kernel along that axis; with a stride the first layer
runs at more positions than the second, which the counts here include. The bias belongs to the second layer.
Both layers are ordinary torch layers, so a factorised model needs nothing of coloss to run.

Multiply-adds are not time. On one CPU core a 3 x 3 convolution at a quarter of its rank took

    channels, positions       32, 8 x 8     64, 32 x 32     256, 14 x 14
    channel (28 % of them)      95 %           56 %             32 %          of the time of the dense one
    spatial (17 %)              73 %           39 %             23 %

and "decoupled" was slower than the dense one except at 256 channels, since CPUs run grouped convolutions slowly.

Sources: Zhang et al. 2016 (channel, arXiv 1505.06798), Jaderberg et al. 2014 (spatial, arXiv 1405.3866), Guo et
al. 2018 (network decoupling, arXiv 1808.05517).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import skip_init

from coloss.compression.cost import CONVOLUTIONS, multiply_adds_per_position
from coloss.compression.replaced_layers import check_called, replace_layers
from coloss.data import Batch, IndexedDataset, Loader
from coloss.errors import InputError, suggest_names
from coloss.metrics import evaluation_mode
from coloss.ops import matricize, truncated_svd
from coloss.ops.spectral import Scheme

_KINDS = (*CONVOLUTIONS, nn.Linear)


@dataclass(frozen=True)
class DecomposedLayer:
    """What became of one layer.

    Attributes:
        path: of the layer in the model.
        rank: singular values kept (the most over all filters, for "decoupled").
        full_rank: how many there are.
        replaced: False if the two layers would not have been cheaper than the one.
        parameters_before, parameters_after: numbers stored, bias included.
        multiply_adds_before, multiply_adds_after: per output position.
    """

    path: str
    rank: int
    full_rank: int
    replaced: bool
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int


def decompose(
    module: nn.Module,
    scheme: Scheme = "channel",
    *,
    rank: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    only_if_smaller: bool = True,
) -> nn.Module:
    """Two thin layers in place of one, by a truncated singular value decomposition of its weight.

    The result computes what the layer would with the closest weight of that rank. At full rank it is the layer
    itself up to rounding.

    Args:
        module: `nn.Linear` ("channel" only), or `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with `groups=1` and any
            kernel, stride, padding and dilation ("spatial": `nn.Conv2d` only). It is left as it is.
        scheme: "channel", "spatial" or "decoupled"; see the head of this module.
        rank, energy, threshold: exactly one of them, as in `truncated_svd`. `energy` is a share of the SQUARED
            singular values; `threshold` keeps singular values not below it.
        only_if_smaller: give `module` itself back if two layers would not take fewer multiply-adds.

    Returns:
        `nn.Sequential` of two ordinary layers of the same device, dtype and mode; or `module`.

    Raises:
        ValueError: for a layer or scheme that cannot be factorised, or a criterion out of range.

    Source:
        Xu et al. 2020 (TRP), arXiv 2004.14566, section 3.

    Examples:
        >>> layer = nn.Conv2d(16, 32, 3, padding=1)
        >>> thin = decompose(layer, "channel", rank=4)
        >>> [tuple(part.weight.shape) for part in thin]
        [(4, 16, 3, 3), (32, 4, 1, 1)]
        >>> multiply_adds_per_position(layer), multiply_adds_per_position(thin)
        (4608, 704)
    """
    _check_layer(module, scheme)
    thin, _ = _factorise(module, scheme, rank=rank, energy=energy, threshold=threshold)
    return module if only_if_smaller and not _cheaper(thin, module) else thin


def decompose_model(
    model: nn.Module,
    scheme: Scheme = "channel",
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    layers: str | Sequence[str] | None = None,
    only_if_smaller: bool = True,
) -> list[DecomposedLayer]:
    """Factorise the layers of a trained model in place, and report what each costs now.

    A layer at `path` becomes an `nn.Sequential` at the same path, so its parameters are `path.0.weight`,
    `path.1.weight` and `path.1.bias`. Parameters are new objects: make a new optimizer to go on training.

    Args:
        model: changed in place.
        scheme: as for `decompose`.
        rank: one rank for all layers (a layer with fewer singular values keeps all), or one for each path.
        energy, threshold: as for `decompose`; exactly one of the three criteria.
        layers: paths of the layers; default: `select_layers`.
        only_if_smaller: keep a layer as it is where two layers would not take fewer multiply-adds.

    Returns:
        One entry for each layer looked at, in the order of the model.

    Raises:
        InputError: if there is no such layer, it cannot be factorised, or a rank is missing; for the model itself; for a layer whose
            weight the module around it reads, as in `nn.TransformerEncoderLayer`.
        ValueError: unless exactly one criterion is given and in its range.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1))
        >>> [found] = decompose_model(model, rank=3)
        >>> found.path, found.rank, found.multiply_adds_before, found.multiply_adds_after
        ('1', 3, 2304, 480)
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 4, 4, 4])
    """
    report = []
    chosen = select_layers(model, scheme, layers)
    check_decomposable(model, chosen)
    for path, layer in chosen.items():
        matrix, _ = matricize(layer.weight.detach(), scheme)
        full_rank = min(matrix.shape[-2:])
        wanted = rank
        if isinstance(rank, Mapping):
            if path not in rank:
                raise InputError(f"rank must hold a rank for each layer, got none for {path!r}")
            wanted = rank[path]
        if isinstance(wanted, int):
            wanted = min(wanted, full_rank)
        thin, found = _factorise(layer, scheme, rank=wanted, energy=energy, threshold=threshold)
        replaced = not only_if_smaller or _cheaper(thin, layer)
        after = thin if replaced else layer
        report.append(
            DecomposedLayer(
                path,
                found,
                full_rank,
                replaced,
                _parameters(layer),
                _parameters(after),
                multiply_adds_per_position(layer),
                multiply_adds_per_position(after),
            )
        )
        # A layer that sits at several paths (tied weights) stays one layer.
        replace_layers(model, {layer: after})
    return report


def check_decomposable(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse layers that a pair of layers cannot stand in for: the model itself, and those whose weight the module around them reads."""
    paths = list(paths)
    if "" in paths:
        raise InputError("layers must lie inside the model, got the model itself: use decompose")
    try:
        check_called(model, paths)
    except InputError as error:
        raise InputError(
            f"{error}, or keep them whole: TrainedRankPruning(decompose=False), and its stored_weights for compress_model"
        ) from error


def select_layers(
    model: nn.Module, scheme: Scheme = "channel", layers: str | Sequence[str] | None = None
) -> dict[str, Any]:
    """Layers worth keeping low-rank: the named ones, or those of the paper's rule.

    The rule: ungrouped convolutions with more than one weight per channel pair (no 1 x 1), except the first
    convolution of the model. Where there is none, and for the scheme "channel", linear layers except the first
    and the last of the model, which read the input and give the output. A layer that another library subclassed
    or that carries a parametrization is left out, since its weight is not what it seems.

    Args:
        model: any network.
        scheme: "spatial" takes `nn.Conv2d` only, "decoupled" convolutions, "channel" linear layers too.
        layers: paths as in `model.named_modules()`, one or several; a path to a block stands for all layers in it that the scheme
            takes. None applies the rule.

    Returns:
        Path -> layer, in the order of the model, or as given.

    Raises:
        InputError: if a path does not exist or its layer cannot be factorised, or the rule finds nothing; the
            message says what was looked for.

    Examples:
        >>> from coloss.nn import MLP, Classifier, ConvNet
        >>> list(select_layers(Classifier(ConvNet(1, (8, 8, 8)), 10)))
        ['backbone.stages.1.0', 'backbone.stages.2.0']
        >>> list(select_layers(Classifier(MLP(4, (64, 64)), 3)))
        ['backbone.layers.3']
    """
    if layers is None:
        chosen = _by_rule(model, scheme)
        if not chosen:
            kind = "2-D convolutions" if scheme == "spatial" else "convolutions"
            fallback = (
                ", nor linear layers between the first and the last of the model"
                if scheme == "channel"
                else ""
            )
            raise InputError(
                f"{type(model).__name__} has no layer to keep low-rank with the scheme {scheme!r}: looked for ungrouped "
                f"{kind} with a kernel larger than 1 after the first convolution{fallback}; name layers with layers=[...]"
            )
        return chosen
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {}
    for path in (layers,) if isinstance(layers, str) else layers:
        if path not in modules:
            known = [name for name, part in modules.items() if type(part) in _KINDS]
            raise InputError(f"layers must be paths of the model, got {path!r}{suggest_names(path, known)}")
        if inside := _inside(path, modules[path], scheme):
            chosen |= inside
            continue
        try:
            _check_layer(modules[path], scheme)
        except ValueError as error:
            raise InputError(f"layer {path!r} cannot be factorised: {error}") from error
        chosen[path] = modules[path]
    if not chosen:
        raise InputError("layers must name at least one layer, got none")
    return chosen


def refresh_batch_norm(model: nn.Module, data: Any, batch_size: int = 256) -> None:
    """Take the running statistics of batch normalisation anew, after weights were changed.

    Truncation changes the mean and variance of what a layer gives, while batch normalisation still holds those
    of the weights before: accuracy can fall far although little was cut. This needs no labels and no gradients.
    Means and variances of batches are averaged by their number of samples, with dropout off, as the shipped
    network runs.

    Args:
        model: changed in place, in its running statistics only.
        data: a tensor of inputs, an `IndexedDataset`, or an iterable of batches, as the model was trained on.
        batch_size: samples in one forward pass, for a tensor or dataset, >= 2.

    Raises:
        InputError: if the model has no batch normalisation with running statistics, or data no batch.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> refresh_batch_norm(model, torch.tensor([[1.0], [3.0]]))
        >>> model[0].running_mean, model[0].running_var
        (tensor([2.]), tensor([2.]))
    """
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    if not norms:
        raise InputError(f"{type(model).__name__} has no batch normalisation with running statistics")
    if batch_size < 2:
        raise InputError(f"batch_size must be >= 2, got {batch_size}")
    momenta = [norm.momentum for norm in norms]
    device = next(iter(norm.running_mean for norm in norms)).device  # type: ignore[union-attr]
    seen = 0
    with evaluation_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        try:
            for batch in _batches(data, batch_size):
                seen += len(batch)
                for norm in norms:
                    norm.momentum = len(batch) / seen
                model(batch.to(device).inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if seen == 0:
        raise InputError("data must give at least one batch, got none")


def _batches(data: Any, batch_size: int) -> Iterator[Batch]:
    if isinstance(data, Tensor):
        data = IndexedDataset(data)
    if isinstance(data, IndexedDataset):
        size = min(batch_size, len(data))
        # A last batch of a single sample has no variance.
        data = Loader(data, size, shuffle=False, drop_last=size > 1 and len(data) % size == 1)
    if not isinstance(data, Iterable):
        raise InputError(
            f"data must be a tensor, an IndexedDataset or an iterable of batches, got {type(data).__name__}"
        )
    return map(Batch.of, data)


def _check_layer(module: nn.Module, scheme: Scheme) -> None:
    kind = type(module)
    if kind not in _KINDS:
        names = ", ".join(f"nn.{known.__name__}" for known in _KINDS)
        raise ValueError(f"module must be one of {names} (no subclass), got {kind.__name__}")
    if scheme not in ("channel", "spatial", "decoupled"):
        raise ValueError(f'scheme must be "channel", "spatial" or "decoupled", got {scheme!r}')
    if kind is nn.Linear and scheme != "channel":
        raise ValueError(f'scheme must be "channel" for nn.Linear, got {scheme!r}')
    if kind is not nn.Conv2d and scheme == "spatial":
        raise ValueError(f'scheme must be "channel" or "decoupled" for nn.{kind.__name__}, got "spatial"')
    groups = getattr(module, "groups", 1)
    if groups != 1:
        raise ValueError(
            f"module must have groups=1, got {groups}: a grouped convolution has no low channel rank to use"
        )


def _by_rule(model: nn.Module, scheme: Scheme) -> dict[str, Any]:
    modules = list(model.named_modules())
    convolutions = [(path, part) for path, part in modules if type(part) in CONVOLUTIONS]
    kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,) if scheme == "spatial" else CONVOLUTIONS
    chosen = {
        path: part
        for path, part in convolutions[1:]
        if type(part) in kinds and part.groups == 1 and prod(part.kernel_size) > 1  # type: ignore[arg-type]
    }
    if chosen or scheme != "channel":
        return chosen
    return dict([(path, part) for path, part in modules if type(part) is nn.Linear][1:-1])


def _inside(path: str, block: nn.Module, scheme: Scheme) -> dict[str, Any]:
    """The layers of a block that a scheme can factorise; none if it is a layer itself."""
    kinds: dict[str, tuple[type[nn.Module], ...]] = {
        "channel": _KINDS,
        "spatial": (nn.Conv2d,),
        "decoupled": CONVOLUTIONS,
    }
    if type(block) in _KINDS or scheme not in kinds:
        return {}
    return {
        ".".join(filter(None, (path, name))): part
        for name, part in block.named_modules()
        if type(part) in kinds[scheme] and getattr(part, "groups", 1) == 1
    }


def _cheaper(thin: nn.Module, layer: nn.Module) -> bool:
    return multiply_adds_per_position(thin) < multiply_adds_per_position(layer)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _factorise(
    layer: Any, scheme: Scheme, *, rank: Any, energy: float | None, threshold: float | None
) -> tuple[nn.Sequential, int]:
    matrix, _ = matricize(layer.weight.detach(), scheme)
    U, S, Vh, kept = truncated_svd(matrix, rank=rank, energy=energy, threshold=threshold)
    left, right = U * S.sqrt().unsqueeze(-2), S.sqrt().unsqueeze(-1) * Vh
    first, second = _weights(layer, scheme, left, right)
    at_first: dict[str, Any] = {}
    at_second: dict[str, Any] = {}
    if not isinstance(layer, nn.Linear):
        every = range(len(layer.kernel_size))
        axes = {"channel": every, "spatial": (0,), "decoupled": ()}[scheme]
        at_first = _placed(layer, axes)
        at_second = _placed(layer, [axis for axis in every if axis not in axes])
        at_second["groups"] = layer.out_channels if scheme == "decoupled" else 1
    pair = nn.Sequential(_filled(layer, first, **at_first), _filled(layer, second, layer.bias, **at_second))
    return pair.train(layer.training), kept


def _weights(layer: Any, scheme: Scheme, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in the layout of the two layers' weights (out, in per group, *kernel)."""
    if isinstance(layer, nn.Linear):
        return right, left
    outputs, inputs, *kernel = layer.weight.shape
    points = [1] * len(kernel)
    if scheme == "channel":
        return right.reshape(-1, inputs, *kernel), left.reshape(outputs, -1, *points)
    if scheme == "spatial":
        height, width = kernel
        horizontal = right.reshape(-1, outputs, width).transpose(0, 1)
        return left.T.reshape(-1, inputs, height, 1), horizontal.unsqueeze(2)
    return left.transpose(1, 2).reshape(-1, inputs, *points), right.reshape(outputs, -1, *kernel)


def _placed(layer: Any, axes: Iterable[int]) -> dict[str, Any]:
    """How a convolution sits on its input along some axes, and pointwise along the others."""

    def keep(values: Sequence[int], pointwise: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else pointwise for axis, value in enumerate(values))

    return {
        "stride": keep(layer.stride, 1),
        "padding": layer.padding if isinstance(layer.padding, str) else keep(layer.padding, 0),
        "dilation": keep(layer.dilation, 1),
        "padding_mode": layer.padding_mode,
    }


@torch.no_grad()
def _filled(like: Any, weight: Tensor, bias: Tensor | None = None, groups: int = 1, **placed: Any) -> Any:
    """A layer with these weights, of the type, device, dtype and trainability of another; draws no random numbers."""
    outputs, inputs, *kernel = weight.shape
    if kernel:
        placed |= {"kernel_size": tuple(kernel), "groups": groups}
    placed |= {"bias": bias is not None, "device": like.weight.device, "dtype": like.weight.dtype}
    layer = skip_init(type(like), inputs * groups, outputs, **placed)
    layer.weight.copy_(weight).requires_grad_(like.weight.requires_grad)
    if bias is not None:
        layer.bias.copy_(bias).requires_grad_(bias.requires_grad)
    return layer
