"""Salient regions of images on a grid of patches, ranked by how salient they are, and the order in which to predict them.

A saliency value for each patch is cut into foreground and background by Otsu's threshold; connected parts of the foreground that are
large enough are regions, ranked by their mean saliency; the last region is all the rest. With regions R_1, ..., R_n of an image:

    context_k = R_1 u ... u R_k,    target_k = R_(k+1),    k = 1 .. n - 1

He, Sakai, Chandhok, Beery, Yuan, Padoy, Hasegawa, Sigal, 2025, arXiv 2511.17354 (DSeq-JEPA); Otsu, 1979, "A Threshold Selection Method from
Gray-Level Histograms".
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.ops import full_precision


class SequentialMasks(NamedTuple):
    """What is seen and what is to be predicted from it, one step after the other.

    Attributes:
        context: True for visible patches, (batch, steps, patches).
        target: True for patches to predict.
        valid: False for steps without a context or without a target, (batch, steps).
    """

    context: Tensor
    target: Tensor
    valid: Tensor


def saliency_map(
    tokens: Float[Tensor, "batch tokens dim"], query: Float[Tensor, "#batch 1 dim"]
) -> Float[Tensor, "batch tokens"]:
    """How well each token answers a query: its inner product with it, divided by sqrt(dim).

    Args:
        tokens: of the target encoder, normalised.
        query: such as a learned class token; one for all samples, or one for each.

    Returns:
        At least float32.

    Source:
        DSeq-JEPA, arXiv 2511.17354, section 3.

    Examples:
        >>> saliency_map(torch.eye(4)[None], torch.ones(1, 1, 4))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    tokens, query = full_precision(tokens), full_precision(query).to(tokens)
    return (tokens * query).sum(-1) / math.sqrt(tokens.shape[-1])


def otsu_threshold(saliency: Float[Tensor, "*batch values"], bins: int = 256) -> Float[Tensor, "*batch"]:
    """The value that parts each row best into a low and a high class: the largest variance between the two.

    The range of a row is divided into equal bins. With shares w and means m of the values below and above a border, it is the border with
    the largest w_low w_high (m_low - m_high)^2; of equally good ones, as in an empty gap, the middle of the first such stretch.

    Args:
        saliency: rows of finite values.
        bins: of the histogram, >= 2.

    Returns:
        At least float32, between the smallest and largest value; foreground is what is larger. For a row of equal values, that value: no
        foreground.

    Raises:
        ValueError: for too few bins, rows without values, or values that are not finite.

    Cost:
        O(rows * (values + bins)), in tensor operations.

    Source:
        Otsu, 1979.

    Examples:
        >>> bool(0.1 < otsu_threshold(torch.tensor([0.1, 0.1, 0.9, 0.9, 0.9])) < 0.9)
        True
    """
    if bins < 2:
        raise ValueError(f"bins must be >= 2, got {bins}")
    if saliency.shape[-1] == 0 or not bool(saliency.isfinite().all()):
        raise ValueError(
            f"saliency must hold finite values, at least one in a row, got {tuple(saliency.shape)}"
        )
    values = (
        full_precision(saliency.detach()).flatten(0, -2)
        if saliency.ndim > 1
        else full_precision(saliency)[None]
    )
    values = values.double()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scaled = (values - low) / torch.where(high > low, high - low, 1)
    index = (scaled * bins).long().clamp(max=bins - 1)
    counts = torch.zeros(len(values), bins, dtype=torch.double, device=values.device)
    sums = counts.scatter_add(1, index, scaled)
    counts = counts.scatter_add(1, index, torch.ones_like(scaled))
    below, total = counts.cumsum(1)[:, :-1], values.shape[1]
    mass = sums.cumsum(1)[:, :-1]
    above = total - below
    means = mass / below.clamp(min=1) - (sums.sum(1, keepdim=True) - mass) / above.clamp(min=1)
    between = below * above * means.square()
    best = between >= between.amax(1, keepdim=True) * (1 - 1e-12)
    first = best.to(torch.uint8).argmax(1, keepdim=True)
    # A stretch of equally good borders ends where the first worse one comes.
    border = torch.arange(bins - 1, device=values.device)
    worse = torch.where((border > first) & ~best, border, bins - 1).amin(1, keepdim=True)
    threshold = low + (high - low) * ((first + worse - 1) / 2 + 1) / bins
    found = torch.where(high > low, threshold, low)[:, 0].to(full_precision(saliency).dtype)
    return found.reshape(saliency.shape[:-1])


def connected_components_2d(mask: Bool[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Numbers of the connected parts of a mask, from 1 on; 0 outside. Diagonal neighbours are connected.

    Args:
        mask: True inside.

    Cost:
        On the CPU, by `scipy.ndimage.label`: a GPU tensor makes the round trip.

    Examples:
        >>> connected_components_2d(
        ...     torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
        ... )
        tensor([[1, 0, 1],
                [0, 1, 0],
                [0, 0, 0]])
    """
    from scipy.ndimage import label

    labels, _ = label(mask.cpu().numpy(), structure=np.ones((3, 3)))
    return torch.from_numpy(labels.astype(np.int64)).to(mask.device)


def ranked_regions(
    saliency: Float[Tensor, "batch rows columns"], n_regions: int = 5, min_area: float = 0.15
) -> Bool[Tensor, "batch regions patches"]:
    """Salient regions of each image, the most salient first, and the rest of the image as the last one.

    The foreground of `otsu_threshold` falls into connected components; those of at least `min_area` of all patches are kept, ranked by the
    mean of their saliency (scaled to [0, 1] in each image), and at most `n_regions - 1` of them.

    Args:
        saliency: one value for each patch, finite, at any scale.
        n_regions: >= 2.
        min_area: smallest share of the patches that a component must have, in [0, 1].

    Returns:
        True for the patches of a region. Regions are disjoint and hold all patches together; those that are missing are empty, in between.
        An image of constant saliency is all background.

    Raises:
        ValueError: for a value out of range, or saliency that is not finite.

    Cost:
        A loop over images and their components, on the CPU: about 0.1 ms for each image.

    Source:
        DSeq-JEPA, arXiv 2511.17354, section 3; its configuration has n_regions 5 and min_area 0.15, which leaves 1 to 3 components.

    Examples:
        >>> saliency = torch.tensor([[[9.0, 9.0, 0.0, 5.0], [9.0, 9.0, 0.0, 6.0]]])
        >>> ranked_regions(saliency, n_regions=3)[0].int().tolist()
        [[1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 1, 0]]
    """
    if n_regions < 2:
        raise ValueError(f"n_regions must be >= 2, got {n_regions}")
    if not 0 <= min_area <= 1:
        raise ValueError(f"min_area must be in [0, 1], got {min_area}")
    batch, rows, columns = saliency.shape
    regions = torch.zeros(batch, n_regions, rows * columns, dtype=torch.bool)
    if batch == 0 or rows * columns == 0:
        return regions.to(saliency.device)
    flat = full_precision(saliency.detach()).flatten(1).cpu()
    foreground = (flat > otsu_threshold(flat)[:, None]).view(batch, rows, columns)
    least = min_area * rows * columns
    # Components are found image by image: their number differs, and each step of the search depends on the one before.
    for image in range(batch):
        labels = connected_components_2d(foreground[image]).flatten()
        sizes = torch.bincount(labels)
        means = torch.bincount(labels, flat[image].double()) / sizes.clamp(min=1)
        kept = [part for part in range(1, len(sizes)) if sizes[part] >= least]
        kept.sort(key=lambda part: -float(means[part]))
        for place, part in enumerate(kept[: n_regions - 1]):
            regions[image, place] = labels == part
        regions[image, -1] = ~regions[image].any(0)
    return regions.to(saliency.device)


def sequential_masks(regions: Bool[Tensor, "batch regions patches"]) -> SequentialMasks:
    """The next region from all before it: contexts that grow, and a target for each.

    Empty regions are passed over: a step counts where its target has patches and something was seen before.

    Args:
        regions: of each image in order, disjoint; see `ranked_regions`.

    Returns:
        `context[:, k - 1]` is the union of the first k regions, `target[:, k - 1]` region k + 1, for k = 1 .. regions - 1. Everything a step
        that is not valid would predict is left out of `target`.

    Raises:
        ValueError: for fewer than two regions, or regions that overlap.

    Source:
        DSeq-JEPA, arXiv 2511.17354, section 3. In the released code the latest region is missing from the context from the third target on.

    Examples:
        >>> masks = sequential_masks(torch.eye(3, dtype=torch.bool)[None])
        >>> masks.context.int().tolist(), masks.target.int().tolist()
        ([[[1, 0, 0], [1, 1, 0]]], [[[0, 1, 0], [0, 0, 1]]])
    """
    if regions.shape[1] < 2:
        raise ValueError(f"regions must be at least two, got {regions.shape[1]}")
    if bool((regions.sum(1) > 1).any()):
        raise ValueError("regions must be disjoint, got some patches twice")
    context = regions.cumsum(1)[:, :-1] > 0
    target = regions[:, 1:]
    valid = context.any(-1) & target.any(-1)
    return SequentialMasks(context, target & valid[..., None], valid)
