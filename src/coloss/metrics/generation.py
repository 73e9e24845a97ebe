"""How good generated samples are, in the space of a learned evaluator: Frechet distance, R-precision, and how much samples vary.

All take embeddings, of any evaluator; numbers from two evaluators cannot be compared. torchmetrics has a Frechet distance for images only, which
takes the root of a product of covariances by the eigenvalues of a matrix that is not symmetric; here it comes from singular values, which stay
accurate where a covariance is singular.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from coloss.ops import accumulation_dtype

Embeddings = Float[Tensor, "samples dim"]


@torch.no_grad()
def frechet_distance(first: Embeddings, second: Float[Tensor, "others dim"]) -> Float[Tensor, ""]:
    r"""Distance of two sets of samples, each taken for a normal distribution; with image features known as FID.

    $|\mu_1 - \mu_2|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})$ with means $\mu$ and covariances $C$ (divided by n - 1). The trace of the root
    is the sum of singular values of $C_1^{1/2} C_2^{1/2}$, with which singular covariances need no correction.

    Args:
        first: at least two finite samples.
        second: likewise, of the same width.

    Returns:
        A scalar in float64, >= 0. Of two samples of one distribution it is above 0, and the more so the fewer they are (about
        proportional to 1 / n): compare sets of equal size only. With `samples <= dim` a covariance is singular and the bias large.

    Raises:
        ValueError: for fewer than two samples, unequal widths, or values that are not finite.

    Cost:
        O(n dim^2 + dim^3).

    Source:
        Heusel et al. 2017, arXiv 1706.08500; Dowson and Landau 1982.

    Examples:
        >>> samples = torch.randn(50, 3)
        >>> frechet_distance(samples, samples + torch.tensor([3.0, 4.0, 0.0])).round(decimals=4)
        tensor(25., dtype=torch.float64)
    """
    _check_widths("first", first, "second", second)
    means, roots = [], []
    for name, samples in (("first", first), ("second", second)):
        if len(samples) < 2:
            raise ValueError(f"{name} must hold at least 2 samples, got {len(samples)}")
        wide = samples.to(accumulation_dtype(samples.device))
        if not bool(wide.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        means.append(wide.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(wide.T).reshape(wide.shape[1], -1))
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    spread = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return ((means[0] - means[1]).square().sum() + spread).clamp(min=0)


@torch.no_grad()
def r_precision(
    text: Embeddings,
    motion: Embeddings,
    groups: Shaped[Tensor, " samples"] | None = None,
    *,
    top: Sequence[int] = (1, 2, 3),
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """How often a text's own motion is among the k nearest of a small batch.

    Pairs are shuffled into batches; an incomplete last one is left out. Euclidean distance.

    Args:
        text: one row for each pair.
        motion: likewise.
        groups: number of each pair's caption: any motion of the same group counts as a text's own, and the nearest of them is looked for.
            Without it two clips with one caption compete, and even a perfect model falls short of 1.
        top: the k, each >= 1.
        batch_size: motions to choose from; the usual 32 makes 1 / 32 the chance of k = 1.
        generator: of the order.

    Returns:
        `"r_precision@k"` for each k, in [0, 1]. Other motions as near as the own one count half before it, so a model that gives everything one
        embedding scores 0 for small k, not 1.

    Raises:
        ValueError: if the pairs do not make one batch, shapes differ, or a value is not finite.

    Cost:
        O(samples batch_size dim).

    Source:
        Guo et al. 2022 (T2M), CVPR 2022, section 5.

    Examples:
        >>> r_precision(torch.eye(32), torch.eye(32))
        {'r_precision@1': 1.0, 'r_precision@2': 1.0, 'r_precision@3': 1.0}
        >>> r_precision(torch.eye(32), torch.ones(32, 32))["r_precision@3"]
        0.0
    """
    _check_pairs(text, motion)
    if groups is not None and groups.shape != text.shape[:1]:
        raise ValueError(f"groups must have shape ({len(text)},), got {tuple(groups.shape)}")
    if not 1 <= batch_size <= len(text):
        raise ValueError(f"batch_size must be in [1, {len(text)}], the number of pairs, got {batch_size}")
    if not top or min(top) < 1:
        raise ValueError(f"top must hold numbers >= 1, got {tuple(top)}")
    order = _draw(len(text), len(text), generator, text.device)
    batches = len(text) // batch_size
    order = order[: batches * batch_size].view(batches, batch_size)
    names = torch.arange(len(text), device=text.device) if groups is None else groups.to(text.device)
    wide = accumulation_dtype(text.device)
    distances = torch.cdist(
        text.to(wide)[order], motion.to(wide)[order], compute_mode="donot_use_mm_for_euclid_dist"
    )
    own = names[order][:, :, None] == names[order][:, None, :]
    best = distances.masked_fill(~own, math.inf).amin(2, keepdim=True)
    nearer = ((distances < best) & ~own).sum(2)
    as_near = ((distances == best) & ~own).sum(2)
    place = nearer + as_near.to(wide) / 2
    return {f"r_precision@{k}": (place < k).sum().item() / place.numel() for k in top}


@torch.no_grad()
def multimodal_distance(text: Embeddings, motion: Embeddings) -> Float[Tensor, ""]:
    """Mean Euclidean distance of the embeddings of paired texts and motions.

    Raises:
        ValueError: for no pairs, unequal shapes, or values that are not finite.

    Examples:
        >>> multimodal_distance(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor(3., dtype=torch.float64)
    """
    _check_pairs(text, motion)
    wide = accumulation_dtype(text.device)
    return torch.linalg.vector_norm(text.to(wide) - motion.to(wide), dim=1).mean()


@torch.no_grad()
def diversity(
    embeddings: Embeddings, pairs: int | None = None, *, generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    """Mean distance of random pairs of samples; the closer to that of real ones the better.

    Two draws of `pairs` samples, each without replacement, are compared one by one. As in the published protocol a sample may meet itself, which
    makes the mean smaller by 1 / n of it.

    Args:
        embeddings: finite, at least one.
        pairs: in [1, samples]; None for the protocol's 300, 100 where there are no more than 300 samples, all where there are fewer than 100.
        generator: of the draws.

    Raises:
        ValueError: for a number of pairs out of range, or values that are not finite.

    Source:
        Guo et al. 2020 (Action2Motion), arXiv 2007.15240.

    Examples:
        >>> diversity(torch.ones(10, 3))
        tensor(0., dtype=torch.float64)
    """
    _check_finite("embeddings", embeddings)
    samples = len(embeddings)
    if pairs is None:
        pairs = 300 if samples > 300 else min(100, samples)
    if not 1 <= pairs <= samples:
        raise ValueError(f"pairs must be in [1, {samples}], the number of samples, got {pairs}")
    wide = embeddings.to(accumulation_dtype(embeddings.device))
    first, second = (_draw(samples, pairs, generator, embeddings.device) for _ in range(2))
    return torch.linalg.vector_norm(wide[first] - wide[second], dim=1).mean()


@torch.no_grad()
def multimodality(
    embeddings: Float[Tensor, "texts generations dim"],
    pairs: int = 10,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Mean distance of random pairs among several generations for one text, over texts.

    For each text two draws of `pairs` generations, each without replacement, are compared one by one (so that one may meet itself).

    Args:
        embeddings: finite; the protocol has 30 generations for about 100 texts.
        pairs: in [1, generations].
        generator: of the draws.

    Returns:
        A scalar in float64; it says how much the answers to one text vary, not whether they are right.

    Raises:
        ValueError: for a number of pairs out of range, no texts, or values that are not finite.

    Source:
        Guo et al. 2020 (Action2Motion), arXiv 2007.15240; 2022 (T2M).

    Examples:
        >>> multimodality(torch.ones(4, 12, 3))
        tensor(0., dtype=torch.float64)
    """
    _check_finite("embeddings", embeddings)
    texts, generations, _ = embeddings.shape
    if not 1 <= pairs <= generations:
        raise ValueError(f"pairs must be in [1, {generations}], the generations of a text, got {pairs}")
    wide = embeddings.to(accumulation_dtype(embeddings.device))
    device = embeddings.device if generator is None else generator.device
    drawn = [
        torch.rand(texts, generations, generator=generator, device=device).argsort(1)[:, :pairs]
        for _ in range(2)
    ]
    first, second = (
        wide.gather(1, d.to(wide.device)[..., None].expand(-1, -1, wide.shape[2])) for d in drawn
    )
    return torch.linalg.vector_norm(first - second, dim=2).mean()


def generation_metrics(
    text: Embeddings,
    real: Embeddings,
    generated: Embeddings,
    groups: Shaped[Tensor, " samples"] | None = None,
    *,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """The usual measures of motions generated from texts, with those of the real ones beside them.

    Args:
        text: embeddings of the texts.
        real: of each text's real motion.
        generated: of the motion generated from each text.
        groups: number of each text's caption, see `r_precision`.
        batch_size: of R-precision, which is left out where there are fewer texts.
        generator: of all draws.

    Returns:
        `fid` (generated against real), `r_precision@1..3`, `multimodal_distance` and `diversity` of the generated, the same three with `real_` in
        front, and `fid_samples_per_dimension`, which should be well above 1 (see `frechet_distance`).

    Raises:
        ValueError: as the single measures.

    Examples:
        >>> x = torch.randn(64, 8)
        >>> found = generation_metrics(x, x, x)
        >>> round(found["fid"], 6), found["r_precision@1"], found["fid_samples_per_dimension"]
        (0.0, 1.0, 8.0)
    """
    found = {"fid": frechet_distance(generated, real).item()}
    for prefix, motion in (("", generated), ("real_", real)):
        if len(text) >= batch_size:
            precision = r_precision(text, motion, groups, batch_size=batch_size, generator=generator)
            found |= {prefix + name: value for name, value in precision.items()}
        found[f"{prefix}multimodal_distance"] = multimodal_distance(text, motion).item()
        found[f"{prefix}diversity"] = diversity(motion, generator=generator).item()
    return found | {"fid_samples_per_dimension": len(generated) / generated.shape[1]}


class RepeatedMetric(NamedTuple):
    """One measure over repeated evaluations.

    Attributes:
        mean: of the values.
        half_width: 1.96 standard deviations (divided by n) over sqrt(n), the papers' "95% interval"; NaN for one value.
        values: one for each repeat.
    """

    mean: float
    half_width: float
    values: tuple[float, ...]


def repeated_evaluation(
    evaluate: Callable[[torch.Generator], Mapping[str, float]], repeats: int = 20, *, seed: int = 0
) -> dict[str, RepeatedMetric]:
    """Measures of several evaluations with different draws, as mean and spread.

    The interval is that of generation and sampling alone: it says nothing about other training seeds.

    Args:
        evaluate: generates and measures with the draws of a generator, and gives the same names each time.
        repeats: >= 1; the papers take 20.
        seed: of the first repeat's generator; the others count up.

    Raises:
        ValueError: for no repeats, or other names than the first time.

    Examples:
        >>> found = repeated_evaluation(lambda generator: {"score": float(generator.initial_seed())}, 3)
        >>> found["score"].mean, round(found["score"].half_width, 4)
        (1.0, 0.924)
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    rounds = [dict(evaluate(torch.Generator().manual_seed(seed + n))) for n in range(repeats)]
    changed = next((one for one in rounds if one.keys() != rounds[0].keys()), None)
    if changed is not None:
        raise ValueError(
            f"evaluate must give the same names each time, got {sorted(rounds[0])} and {sorted(changed)}"
        )
    found = {}
    for name in rounds[0]:
        values = torch.tensor([one[name] for one in rounds], dtype=torch.float64)
        half = 1.96 * values.std(correction=0).item() / math.sqrt(repeats) if repeats > 1 else math.nan
        found[name] = RepeatedMetric(values.mean().item(), half, tuple(values.tolist()))
    return found


def _draw(samples: int, number: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    where = device if generator is None else generator.device
    return torch.randperm(samples, generator=generator, device=where)[:number].to(device)


def _check_widths(one: str, first: Tensor, other: str, second: Tensor) -> None:
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{other} must have the width {first.shape[1]} of {one}, got {second.shape[1]}")


def _check_pairs(text: Tensor, motion: Tensor) -> None:
    if text.shape != motion.shape:
        raise ValueError(f"motion must have the shape {tuple(text.shape)} of text, got {tuple(motion.shape)}")
    _check_finite("text", text)
    _check_finite("motion", motion)


def _check_finite(name: str, embeddings: Tensor) -> None:
    if not len(embeddings):
        raise ValueError(f"{name} must hold at least one sample, got none")
    if not bool(embeddings.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
