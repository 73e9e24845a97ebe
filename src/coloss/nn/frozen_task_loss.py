"""Compares a model's picture with the true one by what a fixed network says of both: a perceptual loss whose features mean something."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from coloss.nn.frozen import Frozen
from coloss.ops import full_precision, without_autocast


class FrozenTaskLoss(nn.Module):
    r"""Weighted distance between a frozen network's outputs for a prediction and for the truth: $w \, d(\phi(\hat x), \operatorname{sg} \phi(x))$.

    With a network for joints or masks it asks a picture to show the same bodies as the true one; with one trained on photographs it is a
    perceptual loss. The gradient reaches the prediction alone: the network's parameters and batch-norm statistics never change, whatever
    mode the model around it is in, and the truth's side has no graph. The network runs in the precision of its own parameters, outside autocast, and
    the distance is taken in float32 at least, so that small differences do not vanish and equal pictures have equal outputs.

    Args:
        network: frozen in place; any outputs, a tensor or nested ones, with samples in the first dimension.
        distance: `(outputs of the prediction, outputs of the truth) -> scalar`, such as `coloss.motion.heatmap_mse_loss`.
        weight: >= 0; at 0 the network does not run.
        preprocess: brings pictures to what the network knows (size, mean, channel order); applied to both sides alike. Must be
            differentiable, such as `ImagePreprocess`. A module is frozen like the network, and so is a distance that is one.
        crop_size: (height, width) of the cut-outs that `forward` makes where it is given boxes.
        copy: freeze deep copies and leave the modules that were given as they were.

    Returns:
        From `forward(prediction, truth)`: a scalar. `forward(prediction, cached=outputs)` takes the network's outputs for the truth
        from an earlier `outputs(truth)` and saves that pass. With `boxes` (batch, 4) in pixels (left, top, right, bottom), both sides are
        cut to them first; a sample whose box has a NaN (nobody there) is left out of the distance. Cached outputs are then those of the cut
        truth, `outputs(truth, boxes)`, with any outputs for a sample that is left out.

    Raises:
        ValueError: for a weight out of range; from `forward`, if not exactly one of truth and cached outputs is given, their shapes or
            the numbers of boxes do not fit, or there are boxes without `crop_size`.

    Cost:
        A forward and a backward pass of the network, and a forward pass for a truth that is not cached.

    Source:
        The generic form of the losses of SportsSloMo, arXiv 2308.16876; Johnson et al., 2016, arXiv 1603.08155.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> loss = FrozenTaskLoss(network, F.mse_loss, weight=0.1)
        >>> prediction, truth = torch.rand(2, 2, 3, 8, 8).unbind(0)
        >>> prediction.requires_grad_().grad is None, loss(prediction, prediction).item()
        (True, 0.0)
        >>> loss(prediction, truth).backward()
        >>> prediction.grad.abs().sum().item() > 0, network[0].weight.grad, network.training
        (True, None, False)
    """

    def __init__(
        self,
        network: nn.Module,
        distance: Callable[[Any, Any], Tensor],
        *,
        weight: float = 1.0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        crop_size: tuple[int, int] | None = None,
        copy: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be >= 0 and finite, got {weight}")
        if crop_size is not None and min(crop_size) < 1:
            raise ValueError(f"crop_size must be >= 1, got {crop_size}")
        self.frozen = Frozen(network.module if isinstance(network, Frozen) else network, copy=copy)
        self.preprocess: Callable[[Tensor], Tensor] | None = _fixed(preprocess, copy)
        self.distance: Callable[[Any, Any], Tensor] = _fixed(distance, copy)
        self.weight, self.crop_size = float(weight), crop_size
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTaskLoss":
        """Changes nothing: all of it stays in evaluation mode."""
        return super().train(False)

    @property
    def network(self) -> nn.Module:
        """The frozen network itself."""
        return self.frozen.module

    @torch.no_grad()
    def outputs(self, images: Float[Tensor, "batch *shape"], boxes: Tensor | None = None) -> Any:
        """What the network says of true pictures, without a graph; to be kept and given as `cached`."""
        if boxes is not None:
            height, width = images.shape[2:]
            # A cut-out is made of samples without a box too, so that rows of the outputs are those of the pictures.
            whole = boxes.new_tensor([0, 0, width, height])
            boxes = torch.where(_absent(boxes)[:, None], whole, boxes)
        return self._run(self._cut(images, boxes))

    def unweighted(
        self,
        prediction: Float[Tensor, "batch *shape"],
        truth: Float[Tensor, "batch *shape"] | None = None,
        *,
        cached: Any = None,
        boxes: Float[Tensor, "batch 4"] | None = None,
    ) -> Float[Tensor, ""]:
        """The distance itself, whatever the weight."""
        if (truth is None) == (cached is None):
            given = "neither" if truth is None else "both"
            raise ValueError(f"exactly one of truth and cached outputs must be given, got {given}")
        if truth is not None and truth.shape != prediction.shape:
            raise ValueError(
                f"prediction and truth must have equal shapes, got {tuple(prediction.shape)} and {tuple(truth.shape)}"
            )
        for rows in (*tree_leaves(cached), boxes):
            if isinstance(rows, Tensor) and rows.shape[:1] != prediction.shape[:1]:
                raise ValueError(
                    f"boxes and cached outputs must have a row for each of {len(prediction)} predictions, got {tuple(rows.shape)}"
                )
        if boxes is not None:
            present = ~_absent(boxes)
            if not bool(present.any()):
                return _nothing(prediction)
            boxes = boxes[present]
            prediction = prediction[present]
            truth = truth[present] if truth is not None else None
            cached = tree_map(lambda part: part[present] if isinstance(part, Tensor) else part, cached)
        if truth is not None:
            cached = self.outputs(truth, boxes)
        found = self._run(self._cut(prediction, boxes))
        with without_autocast(prediction.device):
            return self.distance(tree_map(_precise, found), tree_map(_precise, tree_map(_cut_off, cached)))

    def forward(
        self,
        prediction: Float[Tensor, "batch *shape"],
        truth: Float[Tensor, "batch *shape"] | None = None,
        *,
        cached: Any = None,
        boxes: Float[Tensor, "batch 4"] | None = None,
    ) -> Float[Tensor, ""]:
        if self.weight == 0:
            return _nothing(prediction)
        return self.weight * self.unweighted(prediction, truth, cached=cached, boxes=boxes)

    def _run(self, images: Tensor) -> Any:
        with without_autocast(images.device):
            if self.preprocess is not None:
                images = self.preprocess(full_precision(images))
            like = next((p for p in self.network.parameters() if p.is_floating_point()), images)
            return self.network(images.to(like.dtype))

    def _cut(self, images: Tensor, boxes: Tensor | None) -> Tensor:
        if boxes is None:
            return images
        if self.crop_size is None:
            raise ValueError("boxes need crop_size, the size that cut-outs are brought to")
        return crop_boxes(images, boxes, self.crop_size)


def _fixed(part: Any, copy: bool) -> Any:
    """A module without gradients of its own, anything else as it is."""
    return (deepcopy(part) if copy else part).requires_grad_(False) if isinstance(part, nn.Module) else part


def _absent(boxes: Tensor) -> Tensor:
    """Samples that have no box."""
    return boxes.isnan().any(1)


def _nothing(prediction: Tensor) -> Tensor:
    """Zero, with a graph."""
    return full_precision(prediction).flatten()[:0].sum()


def _cut_off(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _precise(value: Any) -> Any:
    return full_precision(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def crop_boxes(
    images: Float[Tensor, "batch channels height width"],
    boxes: Float[Tensor, "batch 4"],
    size: tuple[int, int],
) -> Float[Tensor, "batch channels cut_height cut_width"]:
    """One box of each picture, brought to a size by bilinear interpolation; differentiable in the pictures.

    Args:
        images: float.
        boxes: left, top, right and bottom edge in pixels (0 and the width are the picture's own edges), finite, with left < right and
            top < bottom.
            What lies outside the picture repeats its edge.
        size: (height, width) of the result.

    Returns:
        In the type of the pictures.

    Raises:
        ValueError: for a box that is not finite or has no area, or a size < 1.

    Examples:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> crop_boxes(image, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (2, 2))
        tensor([[[[ 9., 10.],
                  [13., 14.]]]])
    """
    if min(size) < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    if not bool((boxes[:, 2:] > boxes[:, :2]).all() & boxes.isfinite().all()):
        raise ValueError(f"boxes must be finite, with left < right and top < bottom, got {boxes.tolist()}")
    height, width = images.shape[2:]
    pictures, edges = full_precision(images), full_precision(boxes).to(images.device)
    edges = edges.to(pictures.dtype)

    def centres(count: int, low: Tensor, high: Tensor, length: int) -> Tensor:
        share = (torch.arange(count, dtype=edges.dtype, device=edges.device) + 0.5) / count
        return 2 * (low[:, None] + (high - low)[:, None] * share) / length - 1

    x = centres(size[1], edges[:, 0], edges[:, 2], width)[:, None, :].expand(-1, size[0], -1)
    y = centres(size[0], edges[:, 1], edges[:, 3], height)[:, :, None].expand(-1, -1, size[1])
    with without_autocast(images.device):
        cut = F.grid_sample(
            pictures, torch.stack([x, y], -1), padding_mode="border", mode="bilinear", align_corners=False
        )
    return cut.to(images.dtype)


class ImagePreprocess(nn.Module):
    """Brings pictures with colours in [0, 1] to what a pretrained network was trained on, without squashing them.

    Args:
        size: (height, width) the network takes; None leaves the size. The picture is scaled by one factor for both sides, and
            the rest filled with the mean colour, half on either side.
        mean: of each channel in the network's training data, in its channel order, or one for all; subtracted.
        std: of each channel, or one for all, > 0; divided by.
        reverse_channels: RGB to BGR.

    Returns:
        From `forward(images)`: float (batch, channels, *size).

    Raises:
        ValueError: for a size < 1, or a std that is not > 0; from `forward`, for pictures of another number of channels.

    Examples:
        >>> preprocess = ImagePreprocess((8, 4), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> preprocess(torch.ones(1, 3, 6, 6))[0, 0, :, 0]
        tensor([0., 0., 2., 2., 2., 2., 0., 0.])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: tuple[int, int] | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        reverse_channels: bool = False,
    ) -> None:
        super().__init__()
        if size is not None and min(size) < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        if not all(0 < value < math.inf for value in std):
            raise ValueError(f"std must be > 0 and finite, got {tuple(std)}")
        self.size, self.reverse_channels = size, reverse_channels
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        pictures = full_precision(images)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, pictures.shape[1]):
                raise ValueError(f"{name} must be 1 or {pictures.shape[1]} numbers, got {len(values)}")
        if self.reverse_channels:
            pictures = pictures.flip(1)
        # The mean colour becomes 0, which is what the filling is.
        pictures = (pictures - self.mean.to(pictures)) / self.std.to(pictures)
        if self.size is None:
            return pictures
        height, width = pictures.shape[2:]
        factor = min(self.size[0] / height, self.size[1] / width)
        inner = [max(1, min(whole, round(side * factor))) for whole, side in zip(self.size, (height, width))]
        if inner != [height, width]:
            pictures = F.interpolate(
                pictures, tuple(inner), mode="bilinear", align_corners=False, antialias=True
            )
        top, left = (self.size[0] - inner[0]) // 2, (self.size[1] - inner[1]) // 2
        return F.pad(pictures, (left, self.size[1] - inner[1] - left, top, self.size[0] - inner[0] - top))
