"""Trains a deep network block by block, each block through a short preview of the layers above it.

AugLocal: Ma, Wu, Si and Tan, 2024, arXiv 2402.17318. Building block: `LocalLearning`, where each block learns alone and frees its
activations before the next one runs.

A linear head makes an early block throw away whatever a linear classifier cannot use. Here the head of a block that ends with layer l (of n,
counted from 0) holds d_l new layers with the widths of layers picked evenly from the m = n - 1 - l above it, then a mean over positions
and a linear layer:

    picked       i_j = round(l + (m / d_l) j),  j = 1 .. d_l        all of them if d_l >= m; the last is always n - 1 (in networks that go
                 from maps to vectors: of the layers up to where the kind of features changes)
    depth        d_k = max(1, round(d (1 - r_k) + r_k)),  r_k = taper k / (K - 2)        k = 0 .. K - 2 of K blocks
    resolution   whenever the picked widths have doubled, the next new layer has stride 2
    last block   the last d + 1 layers and the classifier, by ordinary backpropagation (`join_last`)

New layers are residual blocks of two convolutions on maps, linear layers with batch norm on vectors, and copies of the network's own layers
on tokens; `build` makes any other.

When it may help: activations do not fit in memory, the batch is large beside the weights, and accuracy a little below backpropagation is
acceptable; the first cuts pay most where early maps are large. When not: `torch.utils.checkpoint` has the gradients of backpropagation, for a
third more computation; it is the first thing to try, and `block_count_table` measures it beside the blocks. Measured on digits with
a residual network of 8 layers, each a block of its own, 6 epochs, 5 seeds: accuracy 0.955 against 0.883 with linear heads and 0.979 by
backpropagation, at equal training images; a step keeps 0.42 of backpropagation's activation bytes (linear heads 0.22), with 16 layers 0.20
(0.11), and takes nearly three times its computation. So part of the gain over linear heads is bought with deeper heads and more time; and
linear heads gain more than the others from longer training: after 25 epochs (3 seeds, learning rate 0.1) they had 0.971, AugLocal 0.981 and
backpropagation 0.986.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from coloss.distillation.local_learning import LocalHead, LocalLearning
from coloss.distillation.local_learning_trial import TRIED, measure, task
from coloss.distillation.network_layers import Layer
from coloss.errors import InputError
from coloss.nn.resnet import PostactivationBlock
from coloss.train.system import Arm, Claim, System
from coloss.train.task import Setting

LayerFactory = Callable[[int, int, int], nn.Module]
"""`(channels, width, stride) -> layer` from so many channels to that width."""


def uniform_layer_indices(layer: int, num_layers: int, depth: int) -> list[int]:
    """Pick layers evenly from those above one layer.

    Args:
        layer: index l of the layer, from 0.
        num_layers: layers n of the network.
        depth: how many to pick at most, >= 1.

    Returns:
        Rising indices, the last of them n - 1; none for the last layer itself.

    Raises:
        ValueError: for a value out of range.

    Source: Ma et al. 2024, arXiv 2402.17318.

    Examples:
        >>> uniform_layer_indices(0, 16, 3), uniform_layer_indices(12, 16, 5)
        ([5, 10, 15], [13, 14, 15])
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be between 0 and num_layers - 1 = {num_layers - 1}, got {layer}")
    if depth < 1:
        raise ValueError(f"depth must be >= 1, got {depth}")
    above = num_layers - 1 - layer
    if depth >= above:
        return list(range(layer + 1, num_layers))
    return [round(layer + above / depth * number) for number in range(1, depth + 1)]


def pyramid_depths(num_blocks: int, depth: int, taper: float = 0.5) -> list[int]:
    """How many layers the head of each block holds: fewer towards the output.

    Args:
        num_blocks: blocks of the network, the last one included, >= 1.
        depth: of the first head, >= 1.
        taper: 0 keeps the depth, 1 lets it fall to 1 linearly (tau in the paper).

    Returns:
        One depth for each block but the last.

    Raises:
        ValueError: for a value out of range.

    Source: Ma et al. 2024, arXiv 2402.17318.

    Examples:
        >>> pyramid_depths(6, 5, taper=1.0), pyramid_depths(6, 5, taper=0.0)
        ([5, 4, 3, 2, 1], [5, 5, 5, 5, 5])
    """
    if num_blocks < 1 or depth < 1:
        raise ValueError(f"num_blocks and depth must be >= 1, got {num_blocks} and {depth}")
    if not 0 <= taper <= 1:
        raise ValueError(f"taper must be in [0, 1], got {taper}")
    shares = [taper * number / max(num_blocks - 2, 1) for number in range(num_blocks - 1)]
    return [max(1, round(depth * (1 - share) + share)) for share in shares]


def augmented_layers(
    builders: Sequence[LayerFactory],
    widths: Sequence[int],
    layer: int,
    indices: Sequence[int],
    widen: float = 1.0,
) -> tuple[list[nn.Module], int]:
    """New layers that take the features of one layer through the widths of some above it.

    A layer gets stride 2 where the width has doubled since the layer that comes in more often than strides were taken, so the resolution
    falls as it does in the network.

    Args:
        builders: one for each layer of the network.
        widths: of each layer's output.
        layer: whose features come in.
        indices: of the layers that are previewed.
        widen: factor on their widths, > 0.

    Returns:
        The layers and their last width.

    Raises:
        ValueError: if `widen` is not > 0, or `builders` and `widths` differ in length.

    Examples:
        >>> build = lambda channels, width, stride: nn.Conv2d(channels, width, 3, stride, padding=1)
        >>> layers, width = augmented_layers([build] * 4, [8, 8, 16, 16], layer=0, indices=[1, 3])
        >>> [made.stride for made in layers], width
        ([(1, 1), (2, 2)], 16)
    """
    if not widen > 0:
        raise ValueError(f"widen must be > 0, got {widen}")
    if len(builders) != len(widths):
        raise ValueError(f"builders must be one for each of {len(widths)} widths, got {len(builders)}")
    made: list[nn.Module] = []
    channels, strides = widths[layer], 0
    for index in indices:
        stride = 2 if math.log2(widths[index] / widths[layer]) - strides >= 1 else 1
        strides += stride - 1
        width = max(1, round(widths[index] * widen))
        made.append(builders[index](channels, width, stride))
        channels = width
    return made, channels


def augmented_head(
    builders: Sequence[LayerFactory],
    widths: Sequence[int],
    layer: int,
    indices: Sequence[int],
    num_outputs: int,
    *,
    widen: float = 1.0,
) -> LocalHead:
    """A head for maps that previews some of the layers above: `augmented_layers`, mean over positions, linear layer.

    Args:
        builders, widths, layer, indices, widen: as for `augmented_layers`.
        num_outputs: of the linear layer. A batch norm stands before it where there is at most one new layer.

    Examples:
        >>> import torch
        >>> head = augmented_head([residual_layer] * 4, [8, 8, 16, 16], 0, [1, 3], num_outputs=10)
        >>> head(torch.zeros(2, 8, 8, 8)).shape
        torch.Size([2, 10])
    """
    made, width = augmented_layers(builders, widths, layer, indices, widen)
    return LocalHead(made, "maps", width, (1, num_outputs), norm=len(made) <= 1)


def residual_layer(channels: int, width: int, stride: int) -> nn.Module:
    """A residual block of two convolutions on images: the new layer that heads on maps are made of.

    Examples:
        >>> import torch
        >>> residual_layer(4, 8, 2)(torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """
    return PostactivationBlock(channels, width, stride, dims=2, kernel_size=3)


class AugmentedLocalLearning(LocalLearning):
    """Train a network block by block, each block through a few new layers that preview those above it.

    Args:
        example, blocks, layers, loss, clip_norm: as for `LocalLearning`.
        depth: new layers in the head of the first block, >= 1.
        taper: how far the depth falls towards the output, in [0, 1].
        widen: factor on the widths of the new layers, > 0.
        build: `(channels, width, stride) -> layer` in place of those named above.
        join_last: keep the last `depth + 1` layers in one block; cuts between them are left out, so there may be fewer than `blocks`.

    Raises:
        InputError: as `LocalLearning`; in `setup`, if the joined last layers leave nothing to cut, the heads on tokens would need another width than the layer they copy, or maps have
            three dimensions and `build` is None.

    Cost: in time, 2 to 3 times ordinary training with small depths; in memory, the largest block with its head.

    Source: Ma et al. 2024, arXiv 2402.17318.

    Examples:
        >>> import torch, coloss
        >>> from coloss.nn import Classifier, ConvNet
        >>> data = (torch.randn(32, 1, 8, 8), torch.randint(3, (32,)))
        >>> model = Classifier(ConvNet(1, (4, 4, 8, 8)), 3)
        >>> method = AugmentedLocalLearning(data[0][:2], depth=1)
        >>> run = coloss.fit(
        ...     model, data, nn.functional.cross_entropy, [method], budget=coloss.Budget(epochs=1)
        ... )
        >>> len(method.heads), len(method.block_losses)
        (2, 2)
    """

    def __init__(
        self,
        example: Any,
        *,
        blocks: int | None = None,
        depth: int = 2,
        taper: float = 0.5,
        widen: float = 1.0,
        layers: Sequence[str | Sequence[str]] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        build: LayerFactory | None = None,
        join_last: bool = True,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(example, blocks=blocks, layers=layers, loss=loss, clip_norm=clip_norm)
        try:
            pyramid_depths(2, depth, taper)
        except ValueError as error:
            raise InputError(str(error)) from error
        if not widen > 0:
            raise InputError(f"widen must be > 0, got {widen}")
        self.depth, self.taper, self.widen, self.build = depth, taper, widen, build
        self.joined_layers = depth if join_last else 0

    def new_heads(self, layers: Sequence[Layer], ends: Sequence[int]) -> list[nn.Module]:
        depths = pyramid_depths(len(ends) + 1, self.depth, self.taper)
        return [self._head(layers, end, depth) for end, depth in zip(ends, depths, strict=True)]

    def head_sizes(self, layers: Sequence[Layer], blocks: int) -> list[list[float]]:
        def size(end: int, depth: int) -> float:
            indices = uniform_layer_indices(end, _alike(layers, end), depth)
            return self.widen * sum(layers[index].size for index in indices)

        depths = pyramid_depths(blocks, self.depth, self.taper)
        return [[size(end, depth) for end in range(len(layers))] for depth in depths]

    def _head(self, layers: Sequence[Layer], end: int, depth: int) -> nn.Module:
        layer, alike = layers[end], _alike(layers, end)
        indices = uniform_layer_indices(end, alike, depth)
        builders = [self.build or self._builder(seen) for seen in layers[:alike]]
        widths = [seen.width for seen in layers[:alike]]
        made, width = augmented_layers(builders, widths, end, indices, self.widen)
        return LocalHead(made, layer.kind, width, layer.output_shape, norm=len(made) <= 1)

    @classmethod
    def for_setting(cls, setting: Setting, **parameters: Any) -> LocalLearning:
        """Build it for a task of the lab, whose networks are short: by default their last layers are not joined."""
        return super().for_setting(setting, **({"join_last": False} | parameters))

    def _builder(self, layer: Layer) -> LayerFactory:
        if layer.kind == "vectors":
            return lambda channels, width, stride: nn.Sequential(
                nn.Linear(channels, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()
            )
        if layer.kind == "tokens":
            return lambda channels, width, stride: _copy(layer, channels, width)
        dims = len(layer.shape) - 2
        if dims > 2:
            raise InputError(f"build must be given for maps of {dims} dimensions")
        return lambda channels, width, stride: PostactivationBlock(channels, width, stride, dims, 3)


def _alike(layers: Sequence[Layer], end: int) -> int:
    """The index after the last of the layers from `end` on that give features of its kind."""
    kinds = [layer.kind == layers[end].kind for layer in layers[end:]]
    return end + (kinds.index(False) if False in kinds else len(kinds))


def _copy(layer: Layer, channels: int, width: int) -> nn.Module:
    if channels != width:
        raise InputError(
            f"build must be given where the width of tokens changes, here from {channels} to {width} at {layer.paths[-1]!r}"
        )
    return CopiedLayer(layer.module)


class CopiedLayer(nn.Module):
    """A copy of one of the network's layers, called with the same further arguments as the layer at the cut.

    Args:
        layer: copied as it is now.

    Examples:
        >>> import torch
        >>> CopiedLayer(nn.Linear(2, 3))(torch.zeros(1, 2)).shape
        torch.Size([1, 3])
    """

    takes_arguments = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(features, *args, **kwargs)


SYSTEM = System(
    slug="auglocal",
    title="Scaling Supervised Local Learning with Augmented Auxiliary Networks",
    paper="Ma et al., 2024, arXiv 2402.17318",
    family="distillation",
    acts_on=("model", "loss", "gradients"),
    api=(
        "coloss.distillation.AugmentedLocalLearning",
        "coloss.distillation.LocalLearning",
        "coloss.distillation.block_count_table",
        "coloss.distillation.uniform_layer_indices",
        "coloss.distillation.pyramid_depths",
        "coloss.distillation.augmented_head",
        "coloss.nn.LocalBlocks",
        "coloss.train.SavedActivations",
    ),
    method="coloss.distillation.AugmentedLocalLearning",
    kinds=("classification", "regression", "multilabel"),
)

CLAIM = Claim(
    statement="A network of 8 layers in which each layer is a block of its own classifies digits more accurately when the blocks learn "
    "through AugLocal's heads than through linear heads, at equal training images.",
    metric="accuracy",
    baseline="greedy",
    method="auglocal",
    task=task("digits-local"),
    arms=(
        Arm("greedy", lambda setting: [LocalLearning.for_setting(setting)]),
        Arm("auglocal", lambda setting: [AugmentedLocalLearning.for_setting(setting, join_last=False)]),
        Arm("backpropagation"),
    ),
    measure=measure,
    tried=TRIED,
)
