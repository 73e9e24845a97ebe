"""Contrast of mixed samples with both of their sources in another modality, and what a multimodal classifier adds to it."""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.nn import MLP
from coloss.ops import (
    beta_weights,
    dealt_places,
    full_precision,
    gather_with_gradient,
    is_distributed,
    mix_pairs,
    own_place,
    rank,
    soft_contrastive_loss,
)
from coloss.ops.distributed import row_counts

from .soft_clip import check_paired, soft_clip_loss, soft_target_clip_loss, unit_rows


class MixedPairs(NamedTuple):
    """Samples mixed with partners, and how.

    Attributes:
        mixed: (samples, ...), in new memory.
        partner: number of each sample's partner; over several processes counted in the order of ranks.
        weight: share of the sample itself in [0, 1]; 1 where nothing was mixed in.
    """

    mixed: Tensor
    partner: Tensor
    weight: Tensor


def mixup_pairs(
    samples: Float[Tensor, "samples *features"],
    beta: float = 0.15,
    probability: float = 0.5,
    generator: torch.Generator | None = None,
    *,
    across_processes: bool = True,
) -> MixedPairs:
    r"""Each sample mixed with a random partner by a weight of its own: $\tilde z_i = \lambda_i z_i + (1 - \lambda_i) z_{\pi(i)}$.

    $\pi$ is a random permutation and $\lambda_i \sim \mathrm{Beta}(\beta, \beta)$; with probability $1 - p$ a sample stays as it is, with
    $\lambda_i = 1$.

    Args:
        samples: $z$: embeddings, or inputs that are encoded afterwards.
        beta: $\beta > 0$; small values keep one of the two dominant.
        probability: $p$, in [0, 1].
        generator: of randomness, the same on all processes of a run, which then draw one permutation of their joined batch: the one that
            a single process would draw, whose rows were dealt out to the processes in turn.
        across_processes: partners from all processes; False keeps to this one's.

    Raises:
        ValueError: for a value out of range.

    Cost:
        Memory of the mixed samples; over several processes also of everyone's samples.

    Source:
        Kumar et al. 2024 (M3CoL), arXiv 2409.17777; Zhang et al. 2018 (mixup), arXiv 1710.09412.

    Examples:
        >>> mixed, partner, weight = mixup_pairs(torch.eye(4), generator=torch.Generator().manual_seed(0))
        >>> bool((mixed[weight == 1] == torch.eye(4)[weight == 1]).all()), partner.sort().values.tolist()
        (True, [0, 1, 2, 3])
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    places = dealt_places(samples, across_processes)
    every, own = torch.cat(places), places[own_place(places)]
    total = len(every)
    device = "cpu" if generator is None else generator.device
    permutation = torch.randperm(total, generator=generator, device=device).cpu()
    weight = beta_weights(total, beta, generator)
    kept = torch.rand(total, generator=generator, device=device).cpu() >= probability
    weight = weight.masked_fill(kept, 1.0)[own].to(samples.device)
    # From the place in the joint batch to the number in the order of ranks.
    partner = every.argsort()[permutation[own]].to(samples.device)
    everyone = gather_with_gradient(samples) if len(places) > 1 else samples
    return MixedPairs(mix_pairs(samples, everyone[partner], weight), partner, weight)


def mixup_contrastive_loss(
    mixed: Float[Tensor, "samples dim"],
    others: Float[Tensor, "samples dim"],
    partner: Int[Tensor, " samples"],
    weight: Float[Tensor, " samples"],
    temperature: float = 0.1,
    *,
    bidirectional: bool = True,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""Cost of finding both sources of a mixed sample in another modality, in proportion to their shares.

    Targets $P_{ij} = \lambda_i [j = i] + (1 - \lambda_i) [j = \pi(i)]$ of the softmax of cosine similarities over $\tau$. The way back,
    from the other modality to the mixed samples, has the targets $P^\top$, whose rows need not sum to 1.

    Args:
        mixed: $\tilde z$ of one modality, see `mixup_pairs`.
        others: $z$ of the other modality, not mixed.
        partner: $\pi$. A sample that is its own partner has the target 1 at itself, whatever its weight.
        weight: $\lambda$ in [0, 1].
        temperature: $\tau > 0$.
        bidirectional: the mean of both ways; False takes the first alone.
        chunk_size: as for `coloss.ops.soft_contrastive_loss`.
        across_processes: compare with the samples of all processes of a run; `partner` counts them in the order of ranks.

    Returns:
        A scalar, at least float32. It can be differentiated once.

    Raises:
        ValueError: if shapes differ, a partner does not exist, or a value is out of range.

    Cost:
        That of two `info_nce_loss`, with at most two stored targets for each sample.

    Source:
        Kumar et al. 2024 (M3CoL), arXiv 2409.17777, the "M3Co" loss.

    Examples:
        >>> swap, half = torch.tensor([1, 0]), torch.full((2,), 0.5)
        >>> loss = mixup_contrastive_loss(torch.ones(2, 1), torch.ones(2, 1), swap, half)
        >>> round(loss.item(), 4)  # two equal logits: log 2
        0.6931
    """
    check_paired(mixed, others)
    ring = across_processes and is_distributed()
    counts = row_counts(mixed) if ring else [len(mixed)]
    for name, values in (("partner", partner), ("weight", weight)):
        if values.shape != mixed.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(mixed)},), got {tuple(values.shape)}")
    if len(partner) and not 0 <= int(partner.min()) <= int(partner.max()) < sum(counts):
        raise ValueError(f"partner must hold numbers in [0, {sum(counts)}), got {partner.tolist()}")
    start = sum(counts[: rank()]) if ring else 0
    everyone = (gather_with_gradient(partner), gather_with_gradient(weight)) if ring else (partner, weight)
    targets, back_targets = _mixed_targets(*everyone, slice(start, start + len(mixed)))
    if not bidirectional:
        x, y = unit_rows(mixed, others)
        return soft_contrastive_loss(
            x, y, targets, temperature, chunk_size=chunk_size, across_processes=across_processes
        )
    return soft_target_clip_loss(
        mixed,
        others,
        targets,
        back_targets,
        temperature,
        chunk_size=chunk_size,
        across_processes=across_processes,
    )


class MultimodalMixupLoss(nn.Module):
    r"""Alignment of two or more modalities: with mixed samples first, with soft targets after.

    While progress is below `switch`: `mixup_contrastive_loss` of each pair of modalities, the first one mixed; from then on `soft_clip_loss`
    of each pair. Summed over pairs.

    Args:
        pairs: `"all"` ordered pairs of modalities, or the `"cycle"` 1 -> 2, 2 -> 3, ..., back to 1. For two modalities they are the same.
        switch: share of training with mixing, in [0, 1].
        beta, probability: as for `mixup_pairs`.
        mixup_temperature: of the first phase.
        soft_temperature: of the second.
        detach_target: as for `soft_clip_loss`.
        across_processes: as for both losses.

    Returns:
        From `forward(embeddings, progress, generator=None)`, for one (batch, dim) tensor a modality: a scalar. `mixed` may be given in
        place of mixing the embeddings: what the encoders made of inputs that `mixup_pairs` mixed.

    Raises:
        ValueError: for a value out of range, or fewer than two modalities.

    Cost:
        $O(P B^2 D)$ for P pairs, in memory that does not grow with $B^2$; no state.

    Source:
        Kumar et al. 2024 (M3CoL), arXiv 2409.17777.

    Examples:
        >>> loss, embeddings = MultimodalMixupLoss(), [torch.randn(8, 4) for _ in range(2)]
        >>> [loss(embeddings, progress).ndim for progress in (0.0, 0.9)]
        [0, 0]
    """

    def __init__(
        self,
        pairs: Literal["all", "cycle"] = "all",
        switch: float = 0.33,
        *,
        beta: float = 0.15,
        probability: float = 0.5,
        mixup_temperature: float = 0.1,
        soft_temperature: float = 0.125,
        detach_target: bool = True,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        if pairs not in ("all", "cycle"):
            raise ValueError(f'pairs must be "all" or "cycle", got {pairs!r}')
        for name, share in (("switch", switch), ("probability", probability)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        for name, value in (
            ("beta", beta),
            ("mixup_temperature", mixup_temperature),
            ("soft_temperature", soft_temperature),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        self.pairs, self.switch, self.beta, self.probability = pairs, switch, beta, probability
        self.mixup_temperature, self.soft_temperature = mixup_temperature, soft_temperature
        self.detach_target, self.across_processes = detach_target, across_processes

    def mixes(self, progress: float) -> bool:
        """Whether training is in its first phase."""
        return progress < self.switch

    def mix(self, samples: Tensor, generator: torch.Generator | None = None) -> MixedPairs:
        """Mix one modality as the first phase does."""
        return mixup_pairs(
            samples, self.beta, self.probability, generator, across_processes=self.across_processes
        )

    def forward(
        self,
        embeddings: Sequence[Tensor],
        progress: float,
        generator: torch.Generator | None = None,
        mixed: Sequence[MixedPairs] | None = None,
    ) -> Float[Tensor, ""]:
        count = len(embeddings)
        if count < 2:
            raise ValueError(f"embeddings must be of at least two modalities, got {count}")
        ordered = (
            list(permutations(range(count), 2))
            if self.pairs == "all"
            else [(number, (number + 1) % count) for number in range(count)]
        )
        if not self.mixes(progress):
            return torch.stack(
                [
                    soft_clip_loss(
                        embeddings[first],
                        embeddings[second],
                        self.soft_temperature,
                        detach_target=self.detach_target,
                        across_processes=self.across_processes,
                    )
                    for first, second in ordered
                ]
            ).sum()
        if mixed is None:
            mixed = [self.mix(rows, generator) for rows in embeddings]
        return torch.stack(
            [
                mixup_contrastive_loss(
                    mixed[first].mixed,
                    embeddings[second],
                    mixed[first].partner,
                    mixed[first].weight,
                    self.mixup_temperature,
                    across_processes=self.across_processes,
                )
                for first, second in ordered
            ]
        ).sum()


class UnimodalHeads(nn.Module):
    """A classifier for each modality alone, so that none of them leaves the work to the others.

    Args:
        dims: length of each modality's embedding.
        classes: logits of each head.
        hidden: widths of each head's hidden layers; none for linear heads.

    Returns:
        From `forward(embeddings, targets)`, for (batch, dims[m]) embeddings: the (batch, classes) logits of each modality, and the sum of
        their cross-entropies.

    Raises:
        ValueError: for no modality or a width below 1, or another number of embeddings.

    Examples:
        >>> heads = UnimodalHeads([4, 6], classes=3)
        >>> logits, loss = heads([torch.randn(5, 4), torch.randn(5, 6)], torch.tensor([0, 1, 2, 0, 1]))
        >>> [part.shape for part in logits], loss.shape
        ([torch.Size([5, 3]), torch.Size([5, 3])], torch.Size([]))
    """

    def __init__(self, dims: Sequence[int], classes: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        if not dims:
            raise ValueError("dims must hold the width of at least one modality, got none")
        self.heads = nn.ModuleList(MLP(dim, hidden, classes, norm=None) for dim in dims)

    def forward(
        self, embeddings: Sequence[Tensor], targets: Int[Tensor, " batch"]
    ) -> tuple[list[Tensor], Float[Tensor, ""]]:
        if len(embeddings) != len(self.heads):
            raise ValueError(f"embeddings must be of {len(self.heads)} modalities, got {len(embeddings)}")
        logits = [head(rows) for head, rows in zip(self.heads, embeddings, strict=True)]
        losses = [F.cross_entropy(full_precision(part), targets) for part in logits]
        return logits, torch.stack(losses).sum()


def _mixed_targets(partner: Tensor, weight: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    """Of all samples' partners and weights, the sparse rows of P and of its transpose that belong to this process.

    At most two entries a row of P; those that fall together, at a sample that is its own partner, add up to 1.
    """
    count = len(partner)
    sample = torch.arange(count, device=partner.device).repeat(2)
    source = torch.cat([sample[:count], partner])
    share = torch.cat([weight, 1 - weight])
    rows = own.stop - own.start

    def block(row: Tensor, column: Tensor) -> Tensor:
        here = (row >= own.start) & (row < own.stop)
        return torch.sparse_coo_tensor(
            torch.stack([row[here] - own.start, column[here]]),
            share[here],
            (rows, count),
            check_invariants=False,
        )

    return block(sample, source), block(source, sample)
