"""Mixes body parts over a time window of two clips, and lets each region of the mixture find the clip that it came from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.nn import masked_pool
from coloss.ops import full_precision, negative_logsumexp

Parts = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]


class MixedClips(NamedTuple):
    """Clips of which a region comes from another clip.

    Attributes:
        clips: as the inputs.
        mask: bool, True where a position of the encoder's map was pasted: (blocks, joints), or (clips, blocks, joints).
        partner: int64 (clips), the clip that each region came from; never the clip itself.
    """

    clips: Tensor
    mask: Tensor
    partner: Tensor


def skeleton_mix(
    clips: Float[Tensor, "clips channels frames joints *persons"],
    parts: Parts,
    n_parts: tuple[int, int] = (2, 3),
    blocks: tuple[int, int] = (7, 11),
    stride: int = 4,
    generator: torch.Generator | None = None,
    *,
    per_clip: bool = False,
) -> MixedClips:
    """Paste some body parts of one clip into a time window of another: CutMix for skeletons.

    Clip i takes from clip (i + n) mod N, the shift n uniform in 1 .. N - 1. The window begins and ends at multiples of the stride, so that
    the mask falls exactly on the positions of the encoder's last map. It serves any grid: of images, rows are frames and columns joints.

    Args:
        clips: N >= 2.
        parts: joints of each part, by name or in a list.
        n_parts: fewest and most parts that are pasted.
        blocks: shortest and longest window, in blocks of `stride` frames.
        stride: frames of a block, those that one frame of the encoder's map stands for; must divide the frames.
        generator: decides every choice.
        per_clip: draw parts and window for each clip; otherwise once for the batch, as published, which a batch norm sees as a batch of
            its own kind.

    Returns:
        `MixedClips`.

    Raises:
        ValueError: for fewer than two clips, or a value out of range.

    Examples:
        >>> clips = torch.zeros(3, 1, 8, 2) + torch.arange(3.0).view(3, 1, 1, 1)
        >>> draw = torch.Generator().manual_seed(1)
        >>> mixed = skeleton_mix(clips, [[0], [1]], (1, 1), (1, 1), 4, draw)
        >>> mixed.mask.int(), mixed.partner
        (tensor([[0, 0],
                [1, 0]], dtype=torch.int32), tensor([2, 0, 1]))
        >>> mixed.clips[0, 0, :, 0]
        tensor([0., 0., 0., 0., 2., 2., 2., 2.])
    """
    count, frames, joints = len(clips), clips.shape[2], clips.shape[3]
    groups = list(parts.values()) if isinstance(parts, Mapping) else list(parts)
    check_mix(groups, joints, n_parts)
    if count < 2:
        raise ValueError(f"clips must hold at least 2, to take from one another, got {count}")
    if stride < 1 or frames % stride:
        raise ValueError(f"stride must divide the {frames} frames, got {stride}")
    if not 1 <= blocks[0] <= blocks[1] <= frames // stride:
        raise ValueError(
            f"blocks must be fewest and most in [1, {frames // stride}], the blocks of {stride} frames, got {blocks}"
        )
    device = torch.device("cpu") if generator is None else generator.device

    def drawn(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=generator, device=device)

    draws = count if per_clip else 1
    shift = int(drawn(1, count - 1, 1))
    # The first of the parts in a random order.
    place = torch.rand(draws, len(groups), generator=generator, device=device).argsort(1).argsort(1)
    chosen = place < drawn(*n_parts, draws)[:, None]
    member = torch.zeros(len(groups), joints, dtype=torch.bool, device=device)
    for number, group in enumerate(groups):
        member[number, list(group)] = True
    of_parts = (chosen[:, :, None] & member).any(1)
    length = drawn(*blocks, draws)[:, None]
    free = frames // stride - length + 1
    start = (torch.rand(draws, 1, generator=generator, device=device) * free).long().minimum(free - 1)
    block = torch.arange(frames // stride, device=device)
    mask = (((block >= start) & (block < start + length))[:, :, None] & of_parts[:, None]).to(clips.device)
    partner = (torch.arange(count, device=clips.device) + shift) % count
    fine = mask.repeat_interleave(stride, 1)[:, None].view(draws, 1, frames, joints, *[1] * (clips.ndim - 4))
    return MixedClips(torch.where(fine, clips[partner], clips), mask if per_clip else mask[0], partner)


def check_mix(groups: Sequence[Sequence[int]], joints: int, n_parts: tuple[int, int]) -> None:
    """Refuse parts that cannot be pasted.

    Raises:
        ValueError: if there are none, a part is empty or holds a joint that does not exist, or their number is out of range.
    """
    if not groups or not all(groups):
        raise ValueError("parts must be at least one, each with at least one joint, got an empty one")
    held = [joint for group in groups for joint in group]
    if not 0 <= min(held) <= max(held) < joints:
        raise ValueError(f"parts must hold joints in [0, {joints}), got {min(held)} to {max(held)}")
    if not 1 <= n_parts[0] <= n_parts[1] <= len(groups):
        raise ValueError(
            f"n_parts must be fewest and most in [1, {len(groups)}], the number of parts, got {n_parts}"
        )


def queue_contrast_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "queries dim"],
    negatives: Float[Tensor, "negatives dim"],
    temperature: float = 0.2,
    *,
    extra: Float[Tensor, "queries dim"] | None = None,
    query_ids: Int[Tensor, " ids"] | None = None,
    negative_ids: Int[Tensor, " negative_ids"] | None = None,
) -> Float[Tensor, ""]:
    """Softmax cost of finding each query's own key among negatives of earlier batches.

        mean over i of log( 1 + ( sum_j e^{<q_i, Q_j> / tau} + e^{<q_i, e_i> / tau} ) / e^{<q_i, k_i> / tau} )

    Cosines: rows may have any length. Keys of other queries are no negatives, unlike in `coloss.ops.info_nce_loss`.

    Args:
        queries: q.
        keys: k, the positive of each query.
        negatives: Q, such as a `coloss.nn.FeatureQueue`; may be empty.
        temperature: tau > 0.
        extra: e, one more negative for each query.
        query_ids, negative_ids: of samples; a negative with the query's own id is left out. Give both or neither.

    Returns:
        A scalar >= 0, at least float32: 0 where there is no negative at all. No gradient reaches keys, negatives and extra.

    Raises:
        ValueError: if shapes disagree or the temperature is out of range.

    Cost:
        O(queries x negatives x dim) time, in memory that does not grow with their product.

    Source:
        He et al. 2020 (MoCo), arXiv 1911.05722, equation 1.

    Examples:
        >>> q = torch.eye(2)
        >>> round(queue_contrast_loss(q, q, -q.flip(0), 1.0).item(), 4)  # log(1 + (1 + 1/e) / e)
        0.4076
    """
    if (query_ids is None) != (negative_ids is None):
        raise ValueError("query_ids and negative_ids must be given together, got one of them")
    q, k, others = (F.normalize(full_precision(part), dim=1) for part in (queries, keys, negatives))
    if query_ids is None or negative_ids is None:
        query_ids = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        negative_ids = torch.ones(len(others), dtype=torch.int64, device=q.device)
    logits, _ = negative_logsumexp(
        q, others.detach(), temperature, query_ids=query_ids, key_ids=negative_ids, across_processes=False
    )
    if extra is not None:
        beside = F.normalize(full_precision(extra.detach()), dim=1)
        logits = torch.logaddexp(logits, (q * beside).sum(1) / temperature)
    return F.softplus(logits - (q * k.detach()).sum(1) / temperature).mean()


def mixed_region_loss(
    inside: Float[Tensor, "clips dim"],
    outside: Float[Tensor, "clips dim"],
    keys: Float[Tensor, "clips dim"],
    partner: Int[Tensor, " clips"],
    negatives: Float[Tensor, "negatives dim"],
    temperature: float = 0.2,
    *,
    ids: Int[Tensor, " ids"] | None = None,
    negative_ids: Int[Tensor, " negative_ids"] | None = None,
) -> Float[Tensor, ""]:
    """Each region of a mixed clip finds the key of the clip it came from; the other region of the same clip is one more negative.

        ( L(p_i; k_partner(i); Q and sg c_i) + L(c_i; k_i; Q and sg p_i) ) / 2     L: `queue_contrast_loss`

    Args:
        inside: p, embeddings of what was pasted.
        outside: c, embeddings of the rest.
        keys: of the clips before they were mixed.
        partner: of `skeleton_mix`.
        negatives: of earlier batches; may be empty.
        temperature: tau > 0.
        ids, negative_ids: of samples; negatives of a region's own source are left out. Give both or neither.

    Returns:
        A scalar >= 0, at least float32.

    Raises:
        ValueError: if shapes disagree or the temperature is out of range.

    Examples:
        >>> p, c, none = torch.eye(2), -torch.eye(2), torch.zeros(0, 2)
        >>> loss = mixed_region_loss(p, c, torch.eye(2), torch.tensor([1, 0]), none, 1.0)
        >>> round(loss.item(), 4)  # (log(1 + 1/e) + log(2)) / 2
        0.5032
    """
    loss = queue_contrast_loss(
        inside,
        keys[partner],
        negatives,
        temperature,
        extra=outside,
        query_ids=None if ids is None else ids[partner],
        negative_ids=negative_ids,
    )
    loss = loss + queue_contrast_loss(
        outside,
        keys,
        negatives,
        temperature,
        extra=inside,
        query_ids=ids,
        negative_ids=negative_ids,
    )
    return loss / 2


def mix_contrastive_loss(
    queries: Float[Tensor, "clips dim"],
    inside: Float[Tensor, "clips dim"],
    outside: Float[Tensor, "clips dim"],
    keys: Float[Tensor, "clips dim"],
    partner: Int[Tensor, " clips"],
    negatives: Float[Tensor, "negatives dim"],
    temperature: float = 0.2,
) -> Float[Tensor, ""]:
    """The whole objective of one mix: ordinary clips find their keys, and so do both regions of the mixed ones.

        queue_contrast_loss(queries, keys, negatives) + mixed_region_loss(inside, outside, keys, partner, negatives)

    Args:
        queries: embeddings of the clips before they were mixed, in one view.
        inside, outside, keys, partner, negatives, temperature: as for `mixed_region_loss`; keys are of the other view.

    Returns:
        A scalar >= 0, at least float32.

    Source:
        Chen et al., 2022, arXiv 2207.03065, and its published code.

    Examples:
        >>> rows = torch.eye(2)
        >>> loss = mix_contrastive_loss(rows, rows, rows, rows, torch.tensor([1, 0]), torch.zeros(0, 2), 1.0)
        >>> round(loss.item(), 4)  # 0 + (log(1 + e) + log(2)) / 2
        1.0032
    """
    instance = queue_contrast_loss(queries, keys, negatives, temperature)
    return instance + mixed_region_loss(inside, outside, keys, partner, negatives, temperature)


def region_features(
    maps: Float[Tensor, "people width blocks joints"],
    mask: Bool[Tensor, "*clips blocks joints"],
    clips: Float[Tensor, "clips channels frames joints *persons"],
) -> tuple[Float[Tensor, "clips width"], Float[Tensor, "clips width"]]:
    """Mean of an encoder's maps over the pasted region and over the rest, and over the persons that are there.

    A person is in a region if any of his coordinates there is not 0, so that empty second persons do not enter the mean.

    Args:
        maps: (clips x persons, width, blocks, joints), the persons of a clip together.
        mask: of `skeleton_mix`.
        clips: what the maps were made of, already mixed.

    Returns:
        Inside and outside; 0 where a region is empty.

    Examples:
        >>> maps = torch.arange(4.0).view(1, 1, 2, 2)
        >>> region_features(maps, torch.tensor([[True, True], [False, False]]), torch.ones(1, 3, 4, 2))
        (tensor([[0.5000]]), tensor([[2.5000]]))
    """
    five = clips if clips.ndim == 5 else clips[..., None]
    count, persons, blocks = len(five), five.shape[4], mask.shape[-2]
    every = mask.expand(count, *mask.shape[-2:])
    # A block of the map is there for a person if any of its frames is: (clips, persons, blocks, joints).
    seen = (five != 0).any(1).unflatten(1, (blocks, -1)).any(2).permute(0, 3, 1, 2)
    pooled = masked_pool(maps, every.repeat_interleave(persons, 0))
    found = []
    for region, means in zip((every, ~every), pooled):
        here = (seen & region[:, None]).flatten(2).any(2).to(means.dtype)
        total = (means.unflatten(0, (count, persons)) * here[..., None]).sum(1)
        found.append(total / here.sum(1, keepdim=True).clamp_min(1))
    return found[0], found[1]
