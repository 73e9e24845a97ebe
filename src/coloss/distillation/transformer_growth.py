"""Larger transformers from smaller ones and smaller from larger, weight by weight: no data, no training, one table for each naming scheme.

Widths (residual stream, heads, hidden units) and depth change by the linear maps of `coloss.train.StateMap`. Growing in width copies units
and divides what reads them, so the larger model computes what the smaller one does:

    post-norm (BERT), untied pre-norm      nothing else to do: LayerNorm and RMSNorm do not see copied features
    output layer tied to the embedding     the table is copied, so its products with the last norm's output grow by the number of copies;
                                           that norm's weight and bias are divided by it, as is everything that reads the width

(The paper's code halves the embedding instead, which is right where a norm follows the embedding and wrong for a pre-norm GPT: the stream is
halved while what the blocks add to it is not.) Exact for equal numbers of copies of each feature of the stream; heads and hidden units may
have any numbers. The size of a head stays, so attention, rotary positions and norms inside heads stay too. Growing in depth copies layers:
that does not keep the function. Dropout draws its own mask for each copy and thus acts more weakly on them.

Shrinking is the exact reverse: `coalesce(grow(state)) == state`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, isfinite
from typing import Any, TypeAlias

from coloss.distillation.transformer_layouts import TransformerLayout
from coloss.errors import InputError
from coloss.train.axis_map import AxisMap
from coloss.train.state_map import StateMap, stack_depths

Pairing: TypeAlias = str
"""Which units of the large model belong to unit i of n: "offset" means i, i + n, i + 2 n ..., "adjacent" a stretch of neighbours."""

Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class TransformerSizes:
    """What a transformer's weights are cut into.

    Args:
        depth: layers.
        heads: attention heads of queries.
        head_dim: features of a head; the same in the small and the large model.
        hidden: units of the feed-forward networks.
        width: features of the residual stream; None: `heads * head_dim`.
        key_value_heads: heads of keys and values; None: `heads`.

    Raises:
        InputError: for a size below 1.

    Examples:
        >>> TransformerSizes(depth=6, heads=6, head_dim=64, hidden=1536).scaled(width=2, depth=2)
        TransformerSizes(depth=12, heads=12, head_dim=64, hidden=3072, width=768, key_value_heads=12)
    """

    depth: int
    heads: int
    head_dim: int
    hidden: int
    width: int | None = None
    key_value_heads: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if self.heads % (self.key_value_heads or 1):
            raise InputError(f"key_value_heads must divide heads {self.heads}, got {self.key_value_heads}")

    @property
    def sharing(self) -> int:
        """Heads of queries for each head of keys and values."""
        return self.heads // (self.key_value_heads or self.heads)

    def axes(self) -> dict[str, int]:
        """Features of each width by its name in a layout."""
        return {
            "width": self.width or self.heads * self.head_dim,
            "heads": self.heads * self.head_dim,
            "key_value_heads": (self.key_value_heads or self.heads) * self.head_dim,
            "hidden": self.hidden,
        }

    def scaled(self, width: float | Fraction = 1, depth: float | Fraction = 1) -> "TransformerSizes":
        """All widths (but `head_dim`) and the depth multiplied, such as by 2 or `Fraction(1, 2)`.

        Raises:
            InputError: if a size does not stay whole.
        """
        scaled = {
            "depth": self.depth * depth,
            "heads": self.heads * width,
            "hidden": self.hidden * width,
            "width": self.axes()["width"] * width,
            "key_value_heads": (self.key_value_heads or self.heads) * width,
        }
        for name, value in scaled.items():
            if not isfinite(value) or value != int(value) or value < 1:
                raise InputError(f"width and depth must leave {name} whole and >= 1, got {float(value):g}")
        return replace(self, **{name: int(value) for name, value in scaled.items()})

    @classmethod
    def of_state(
        cls, state: Mapping[str, Any], layout: TransformerLayout, *, head_dim: int
    ) -> "TransformerSizes":
        """Read the sizes from the shapes of a state dict; the size of a head is not among them.

        Raises:
            InputError: if a size cannot be read, or `head_dim` is below 1 or does not divide the heads' features.

        Examples:
            >>> from coloss.distillation.transformer_layouts import encoder_layout
            >>> from torch.nn import TransformerEncoderLayer
            >>> layer = TransformerEncoderLayer(8, 2, 32, batch_first=True)
            >>> state = {f"layers.0.{name}": value for name, value in layer.state_dict().items()}
            >>> TransformerSizes.of_state(state, encoder_layout(), head_dim=4)
            TransformerSizes(depth=1, heads=2, head_dim=4, hidden=32, width=8, key_value_heads=2)
        """
        if head_dim < 1:
            raise InputError(f"head_dim must be >= 1, got {head_dim}")
        found = layout.axis_sizes(state)
        heads, odd = divmod(found["heads"], head_dim)
        shared, odd_shared = divmod(found["key_value_heads"], head_dim)
        if odd or odd_shared:
            raise InputError(
                f"head_dim must divide the {found['heads']} features of the heads, got {head_dim}"
            )
        depth = stack_depths(state, layout.parameters).get("layer", 0)
        return cls(depth, heads, head_dim, found["hidden"], found["width"], shared)


def coalescing_map(
    layout: TransformerLayout,
    large: TransformerSizes,
    small: TransformerSizes,
    *,
    width_pairing: Pairing = "offset",
    depth_pairing: Pairing = "offset",
    groups: Mapping[str, Groups] | None = None,
) -> StateMap:
    """Shrinks a transformer: units and layers of a group become one. `.reversed()` is the growing map.

    Args:
        layout: of the parameter names.
        large: sizes before.
        small: sizes after.
        width_pairing: of heads, hidden units and the stream's features, which are taken in blocks of the size of a head.
        depth_pairing: of layers.
        groups: by "width", "heads", "key_value_heads", "hidden" or "depth": which units of the large model become unit 0, 1, ... of the
            small one, in place of a pairing. Widths may be given in units of any size that divides them, but heads stay whole. Where each
            head of queries has keys and values of its own, "heads" alone is for these, too.

    Raises:
        InputError: for sizes or groups that do not fit: a small size above the large one, heads of another size, groups that
            cut heads apart, heads of queries that would part from their heads of keys and values.

    Examples:
        >>> from coloss.distillation import gpt2_layout
        >>> large = TransformerSizes(depth=12, heads=12, head_dim=64, hidden=3072)
        >>> shrink = coalescing_map(gpt2_layout(), large, large.scaled(Fraction(1, 2), Fraction(1, 2)))
        >>> shrink.stacks["layer"].made[0].nonzero().flatten().tolist()  # layers that become the first
        [0, 6]
    """
    if small.head_dim != large.head_dim:
        raise InputError(
            f"small must have heads of {large.head_dim} features as large has, got {small.head_dim}"
        )
    groups = dict(groups or {})
    before, after = large.axes() | {"depth": large.depth}, small.axes() | {"depth": small.depth}
    if "heads" in groups and large.sharing == small.sharing == 1:
        groups.setdefault("key_value_heads", groups["heads"])
    unknown = sorted(groups.keys() - before.keys())
    if unknown:
        raise InputError(f"groups must be for {', '.join(before)}, got {unknown[0]!r}")
    maps: dict[str, AxisMap] = {}
    for axis, size in before.items():
        if after[axis] > size:
            raise InputError(f"small must not be larger than large, got {axis} {after[axis]} for {size}")
        if axis in groups:
            maps[axis] = _explicit(axis, groups[axis], size, after[axis])
            continue
        pairing = depth_pairing if axis == "depth" else width_pairing
        maps[axis] = _paired(
            axis, pairing, size, after[axis], 1 if axis == "depth" else _block(axis, large, small)
        )
    _check_shared_heads(maps, large, small)
    depth = maps.pop("depth")
    return StateMap(layout.rules(maps), {"layer": depth})


def growing_map(
    layout: TransformerLayout,
    small: TransformerSizes,
    large: TransformerSizes,
    *,
    width_pairing: Pairing = "offset",
    depth_pairing: Pairing = "offset",
    groups: Mapping[str, Groups] | None = None,
) -> StateMap:
    """Grows a transformer: the reverse of `coalescing_map`, with its arguments.

    In width it keeps the function only if all features of the stream have equal numbers of copies, as for whole multiples of the width:
    a LayerNorm's mean and variance weigh a feature by its copies. `AxisMap.copies` tells the numbers.
    """
    return coalescing_map(
        layout, large, small, width_pairing=width_pairing, depth_pairing=depth_pairing, groups=groups
    ).reversed()


def coalesce(
    state: Mapping[str, Any],
    layout: TransformerLayout,
    large: TransformerSizes,
    small: TransformerSizes,
    **options: Any,
) -> dict[str, Any]:
    """A smaller transformer's state dict from a larger one's; options as in `coalescing_map`.

    Raises:
        InputError: as there, or if the state does not fit the layout and sizes.
    """
    layout.check(state)
    return coalescing_map(layout, large, small, **options)(state)


def grow(
    state: Mapping[str, Any],
    layout: TransformerLayout,
    small: TransformerSizes,
    large: TransformerSizes,
    **options: Any,
) -> dict[str, Any]:
    """A larger transformer's state dict from a smaller one's; options as in `coalescing_map`.

    It computes the same where only the width grows, by a whole multiple (or the stream not at all); unequal numbers of copies of the
    stream's features, as from 8 to 12, are allowed and change the function, see `growing_map`.

    Copies have equal gradients and would stay equal in training without dropout: blend with weights of the large model's own
    (`interpolate_states`), as the V-cycle does, or add noise.

    Raises:
        InputError: as there, or if the state does not fit the layout and sizes.

    Source: Zou, Zhang, Deng 2024, arXiv 2404.07999; the division at the last norm of a tied model is our own.

    Examples:
        >>> import torch
        >>> from coloss.distillation import causal_language_model_layout
        >>> from coloss.nn import CausalLanguageModel
        >>> small, layout = CausalLanguageModel(11, dim=8, depth=2, heads=2), causal_language_model_layout()
        >>> sizes = TransformerSizes.of_state(small.state_dict(), layout, head_dim=4)
        >>> large = CausalLanguageModel(11, dim=16, depth=2, heads=4)
        >>> _ = large.load_state_dict(grow(small.state_dict(), layout, sizes, sizes.scaled(width=2)))
        >>> ids = torch.tensor([[1, 5, 3]])
        >>> torch.allclose(small(ids), large(ids), atol=1e-5)
        True
    """
    layout.check(state)
    return growing_map(layout, small, large, **options)(state)


def prune_layers(state: Mapping[str, Any], layout: TransformerLayout, kept: Sequence[int]) -> dict[str, Any]:
    """Keep some layers of a transformer, in the order given; everything else stays as it is.

    Raises:
        InputError: if the state does not fit the layout, or has no such layers.

    Examples:
        >>> from coloss.distillation import causal_language_model_layout
        >>> from coloss.nn import CausalLanguageModel
        >>> state = CausalLanguageModel(11, dim=8, depth=4, heads=2).state_dict()
        >>> half = prune_layers(state, causal_language_model_layout(), [0, 2])
        >>> half["transformer.blocks.1.mlp.0.bias"] is state["transformer.blocks.2.mlp.0.bias"]
        True
    """
    depth = stack_depths(state, layout.parameters).get("layer", 0)
    try:
        stack = AxisMap.selecting(kept, depth)
    except ValueError as error:
        raise InputError(str(error)) from error
    return StateMap({pattern: () for pattern in layout.parameters}, {"layer": stack})(state)


def _block(axis: str, large: TransformerSizes, small: TransformerSizes) -> int:
    """Features that stay together: a head's, those of the heads with keys in common, or the hidden units there are for each head."""
    if axis != "hidden":
        sizes = large.axes()[axis], small.axes()[axis]
        block = large.head_dim
        if axis == "heads" and large.sharing == small.sharing:
            block *= large.sharing
        return block if not any(size % block for size in sizes) else gcd(*sizes)
    per_head = Fraction(large.hidden, large.heads)
    if per_head == Fraction(small.hidden, small.heads) and per_head.denominator == 1:
        return int(per_head)
    return gcd(large.hidden, small.hidden)


def _paired(axis: str, pairing: str, large: int, small: int, block: int) -> AxisMap:
    if pairing not in ("offset", "adjacent"):
        raise InputError(f'the pairing of {axis} must be "offset" or "adjacent", got {pairing!r}')
    units, parents = large // block, small // block
    groups: list[list[int]] = [[] for _ in range(parents)]
    for unit in range(units):
        groups[unit % parents if pairing == "offset" else unit * parents // units].append(unit)
    return AxisMap.averaging(groups, block)


def _explicit(axis: str, groups: Groups, large: int, small: int) -> AxisMap:
    units = sum(len(group) for group in groups)
    if not units or large % units or len(groups) * (large // units) != small:
        raise InputError(
            f"groups of {axis} must make {small} features from {large}, got {len(groups)} groups of {units} units"
        )
    try:
        return AxisMap.averaging(groups, large // units)
    except ValueError as error:
        raise InputError(f"groups of {axis}: {error}") from error


def _check_shared_heads(
    maps: Mapping[str, AxisMap], large: TransformerSizes, small: TransformerSizes
) -> None:
    """Heads move whole, and the key head of a query head's parent must be the parent of its key head."""
    parents = [_parents(maps[axis], large.head_dim) for axis in ("heads", "key_value_heads")]
    for head, parent in enumerate(parents[0]):
        if parents[1][head // large.sharing] != parent // small.sharing:
            raise InputError(
                f"groups must keep heads of queries with their heads of keys and values: head {head} of the large model "
                "has other keys than its parent (use the other pairing)"
            )


def _parents(axis: AxisMap, head_dim: int) -> list[int]:
    features = axis.made.argmax(0).tolist()
    if axis.block % head_dim:
        if head_dim % axis.block:
            raise InputError(
                f"groups of heads must move heads of {head_dim} features whole, got blocks of {axis.block}"
            )
        units = head_dim // axis.block
        for head, first in enumerate(features[::units]):
            if first % units or features[head * units : (head + 1) * units] != [*range(first, first + units)]:
                raise InputError(
                    f"groups of heads must move heads of {head_dim} features whole and in order, got head {head} cut apart"
                )
        return [first // units for first in features[::units]]
    heads = axis.block // head_dim
    return [parent * heads + inner for parent in features for inner in range(heads)]
