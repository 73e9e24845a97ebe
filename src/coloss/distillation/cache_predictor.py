"""Linear maps from a small language model's keys and values to those of a large one, and what they are trained and started with.

Layer j of the large model gets its keys and values from layer m(j) of the small one, the heads of each side laid end to end:

    keys_j = split(P_j merge(small keys_m(j)) + b_j),    values_j = split(Q_j merge(small values_m(j)) + c_j)

so both models may have any number of heads of any width, and any number of heads of keys and values (grouped queries). Keys are taken
before the small model's norm of them and before they are turned by their positions, and given to the large model at the same place: it
applies its own norm and its own turn. A map of turned keys would have to undo another turn at every position.
"""

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.nn import CausalLanguageModel, KeyValues
from coloss.nn.transformer import SelfAttention
from coloss.ops.precision import full_precision


def uniform_layer_map(
    base_layers: int, auxiliary_layers: int, share: Literal["early", "even"] = "early"
) -> list[int]:
    """Which layer of a small model stands for each layer of a large one: in order, each for as many as any other, or one more.

    Args:
        base_layers: of the large model.
        auxiliary_layers: of the small one, from 1 to `base_layers`.
        share: which layers of the small model stand for one more, where the numbers do not divide: `"early"` the first ones, as published;
            `"even"` spreads them.

    Raises:
        ValueError: for a number out of range, or an unknown `share`.

    Source: Horton et al. 2024, arXiv 2410.08391.

    Examples:
        >>> uniform_layer_map(7, 5), uniform_layer_map(7, 5, "even"), uniform_layer_map(4, 2)
        ([0, 0, 1, 1, 2, 3, 4], [0, 0, 1, 2, 2, 3, 4], [0, 0, 1, 1])
    """
    if not 1 <= auxiliary_layers <= base_layers:
        raise ValueError(
            f"auxiliary_layers must be from 1 to base_layers {base_layers}, got {auxiliary_layers}"
        )
    if share not in ("early", "even"):
        raise ValueError(f'share must be "early" or "even", got {share!r}')
    if share == "even":
        return [layer * auxiliary_layers // base_layers for layer in range(base_layers)]
    each, more = divmod(base_layers, auxiliary_layers)
    return [layer for layer in range(auxiliary_layers) for _ in range(each + (layer < more))]


def kept_layers(depth: int, share: float) -> list[int]:
    """Which layers a pruned copy keeps: evenly spaced, the first among them.

    Args:
        depth: number of layers.
        share: of them to keep, in (0, 1]: 0.25 keeps 0, 4, 8, ...; 0.5 every second; 0.75 drops every fourth.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> kept_layers(8, 0.25), kept_layers(8, 0.5), kept_layers(8, 0.75)
        ([0, 4], [0, 2, 4, 6], [0, 1, 2, 4, 5, 6])
    """
    if depth < 1:
        raise ValueError(f"depth must be >= 1, got {depth}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    count = max(round(depth * share), 1)
    if 2 * count > depth:
        dropped = {(number + 1) * depth // (depth - count) - 1 for number in range(depth - count)}
        return [layer for layer in range(depth) if layer not in dropped]
    return [number * depth // count for number in range(count)]


def pruned_copy(model: CausalLanguageModel, keep: Sequence[int]) -> CausalLanguageModel:
    """A language model with some layers of another one and all else of it, to be trained by itself; nothing is shared.

    For state dicts of other transformers there is `prune_layers`.

    Args:
        model: the deep one, left as it is.
        keep: numbers of the layers to keep, rising.

    Raises:
        ValueError: if `keep` is empty, does not rise, or names a layer that the model does not have.

    Examples:
        >>> pruned_copy(CausalLanguageModel(10, 8, 4, heads=2), [0, 2]).depth
        2
    """
    inside = bool(keep) and keep[0] >= 0 and keep[-1] < model.depth
    if not inside or any(later <= earlier for earlier, later in pairwise(keep)):
        raise ValueError(
            f"keep must be rising numbers of layers, from 0 to {model.depth - 1}, got {list(keep)}"
        )
    copy = deepcopy(model)
    copy.transformer.blocks = nn.ModuleList(copy.transformer.blocks[layer] for layer in keep)
    if copy.query_norms is not None and copy.key_norms is not None:
        copy.query_norms = nn.ModuleList(copy.query_norms[layer] for layer in keep)
        copy.key_norms = nn.ModuleList(copy.key_norms[layer] for layer in keep)
    return copy.requires_grad_(True)


class KVCachePredictor(nn.Module):
    """Two linear maps for each layer of the large model: its keys and its values from those of a layer of the small model.

    Args:
        auxiliary_dims: width of all heads of keys together, which values have too, of each layer of the small model.
        base_dims: the same of each layer of the large model.
        base_heads: heads of keys and values of each layer of the large model, which divides its width.
        layer_map: for each layer of the large model the layer of the small one that it is predicted from, never falling.

    Returns:
        From `forward(key_values)`, those of each layer of the small model: keys and values for each layer of the large one, each
        (batch, base heads, tokens, head_dim).

    Raises:
        ValueError: for lengths or sizes that do not fit one another, or a layer that the small model does not have.

    Cost: `2 tokens sum_j 2 (auxiliary width * base width)` operations; its parameters begin as those of any `nn.Linear`.

    Source: Horton et al. 2024, arXiv 2410.08391.

    Examples:
        >>> predictor = KVCachePredictor([6, 6], [8, 8, 8], [2, 2, 2], [0, 1, 1])
        >>> small = [KeyValues(torch.randn(5, 3, 7, 2), torch.randn(5, 3, 7, 2)) for _ in range(2)]
        >>> len(predictor(small)), predictor(small)[0].keys.shape
        (3, torch.Size([5, 2, 7, 4]))
    """

    def __init__(
        self,
        auxiliary_dims: Sequence[int],
        base_dims: Sequence[int],
        base_heads: Sequence[int],
        layer_map: Sequence[int],
    ) -> None:
        super().__init__()
        if not len(base_dims) == len(base_heads) == len(layer_map) or not layer_map:
            raise ValueError(
                "base_dims, base_heads and layer_map must have one number for each layer of the base, got "
                f"{len(base_dims)}, {len(base_heads)} and {len(layer_map)}"
            )
        outside = [layer for layer in layer_map if not 0 <= layer < len(auxiliary_dims)]
        if outside:
            raise ValueError(
                f"layer_map must name layers 0 to {len(auxiliary_dims) - 1} of the auxiliary model, got {outside[0]}"
            )
        if any(later < earlier for earlier, later in pairwise(layer_map)):
            raise ValueError(f"layer_map must never fall, got {list(layer_map)}")
        for dim, heads in zip(base_dims, base_heads, strict=True):
            if heads < 1 or dim % heads:
                raise ValueError(f"base_heads must divide base_dims {dim}, got {heads}")
        self.layer_map, self.base_heads = tuple(layer_map), tuple(base_heads)
        self.auxiliary_layers = len(auxiliary_dims)
        sizes = [(auxiliary_dims[layer], dim) for layer, dim in zip(layer_map, base_dims, strict=True)]
        self.keys = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.values = nn.ModuleList(nn.Linear(*size) for size in sizes)

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Inputs, outputs and heads of the maps for each layer of the large model."""
        return [
            (linear.in_features, linear.out_features, heads)  # type: ignore[misc]
            for linear, heads in zip(self.keys, self.base_heads, strict=True)
        ]

    @classmethod
    def between(
        cls,
        auxiliary: CausalLanguageModel,
        base: CausalLanguageModel,
        layer_map: Sequence[int] | None = None,
    ) -> "KVCachePredictor":
        """Maps of the sizes of two models; with no `layer_map`, that of `uniform_layer_map`.

        Examples:
            >>> small, large = CausalLanguageModel(10, 8, 2, heads=2), CausalLanguageModel(10, 16, 4, heads=4)
            >>> KVCachePredictor.between(small, large).layer_map
            (0, 0, 1, 1)
        """
        if layer_map is None:
            layer_map = uniform_layer_map(base.depth, auxiliary.depth)
        small, large = ([heads * dim for heads, dim in _head_sizes(model)] for model in (auxiliary, base))
        return cls(small, large, [heads for heads, _ in _head_sizes(base)], layer_map)

    def start_as_identity(self) -> "KVCachePredictor":
        """Make every map give back what it gets, and return the predictor: a start for an auxiliary model made of the base's layers.

        Raises:
            ValueError: for maps that do not give as many numbers as they get.

        Examples:
            >>> predictor = KVCachePredictor([4], [4], [2], [0]).start_as_identity()
            >>> keys, values = torch.randn(2, 1, 2, 3, 2)
            >>> torch.equal(predictor([KeyValues(keys, values)])[0].keys, keys)
            True
        """
        for linear in (*self.keys, *self.values):
            assert isinstance(linear, nn.Linear)
            if linear.in_features != linear.out_features:
                raise ValueError(
                    f"a map must have equal sizes to begin as identity, got {linear.in_features} to {linear.out_features}"
                )
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        return self

    def forward(self, key_values: Sequence[KeyValues]) -> list[KeyValues]:
        if len(key_values) != self.auxiliary_layers:
            raise ValueError(
                f"key_values must be of {self.auxiliary_layers} layers of the auxiliary model, got {len(key_values)}"
            )
        merged = [[tensor.transpose(1, 2).flatten(2) for tensor in layer] for layer in key_values]
        return [
            KeyValues(_split(keys(merged[layer][0]), heads), _split(values(merged[layer][1]), heads))
            for layer, heads, keys, values in zip(
                self.layer_map, self.base_heads, self.keys, self.values, strict=True
            )
        ]


def kv_cache_loss(
    predicted: Sequence[KeyValues],
    target: Sequence[KeyValues],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    reduction: Literal["sum_layers", "mean_layers"] = "sum_layers",
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """How far predicted keys and values are from true ones: of each layer the mean absolute difference of keys plus that of values.

        sum_j [ mean |keys_j - target keys_j| + mean |values_j - target values_j| ]

    Args:
        predicted: of each layer, (batch, heads, tokens, head_dim).
        target: the same of the large model itself; give them without a graph.
        valid: False for padding, which does not count; there must be a valid token, or the means are NaN.
        reduction: `"sum_layers"`, as published, grows with depth beside other losses; `"mean_layers"` divides by the layers.

    Returns:
        The loss, and each layer's share `"layer_0"`, ... before the reduction, detached.

    Raises:
        ValueError: for another number of layers, other shapes, or an unknown reduction.

    Examples:
        >>> true = KeyValues(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1))
        >>> found = KeyValues(torch.tensor([[[[1.0], [3.0]]]]), torch.tensor([[[[0.0], [-1.0]]]]))
        >>> kv_cache_loss([found], [true])
        (tensor(2.5000), {'layer_0': tensor(2.5000)})
    """
    if reduction not in ("sum_layers", "mean_layers"):
        raise ValueError(f'reduction must be "sum_layers" or "mean_layers", got {reduction!r}')
    if len(predicted) != len(target) or not target:
        raise ValueError(
            f"predicted and target must be of as many layers, at least one, got {len(predicted)} and {len(target)}"
        )
    layers = []
    for number, (mine, true) in enumerate(zip(predicted, target, strict=True)):
        parts = []
        for name, found, wanted in zip(("keys", "values"), mine, true, strict=True):
            if found.shape != wanted.shape:
                raise ValueError(
                    f"predicted {name} of layer {number} must have shape {tuple(wanted.shape)}, got {tuple(found.shape)}"
                )
            gap = (full_precision(found) - full_precision(wanted)).abs().mean(dim=(1, 3))
            parts.append(gap.mean() if valid is None else gap[valid].mean())
        layers.append(parts[0] + parts[1])
    total = torch.stack(layers).sum()
    if reduction == "mean_layers":
        total = total / len(layers)
    return total, {f"layer_{number}": layer.detach() for number, layer in enumerate(layers)}


def _head_sizes(model: CausalLanguageModel) -> list[tuple[int, int]]:
    """Heads of keys and values, and their width, of each layer."""
    found = []
    for block in model.transformer.blocks:
        attention = block.attention
        assert isinstance(attention, SelfAttention)
        found.append((attention.key_value_heads, attention.output.in_features // attention.heads))
    return found


def _split(merged: Tensor, heads: int) -> Tensor:
    return merged.unflatten(2, (heads, -1)).transpose(1, 2)
