"""Losses that add up a cost of each pair or triplet, in memory that does not grow with their number.

Unlike a softmax these do not normalise, so value and gradient are made in one walk over tiles of scores. Several processes compare with
the columns of all of them, as in `coloss.ops.similarity`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from .distributed import gather_with_gradient, is_distributed, row_counts
from .loss_arguments import check_options, joint_groups, over_temperature, reduced_total, same_type
from .precision import full_precision
from .ring import own_rows
from .score_tiles import Mask
from .streaming import streaming_margin_sum
from .triplets import triplet_sum


def pairwise_logistic_loss(
    positive: Float[Tensor, " positives"],
    negative: Float[Tensor, " negatives"],
    temperature: float | Float[Tensor, ""],
    chunk_size: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    r"""Logistic cost of every positive score against every negative score, a smooth bound on 1 - AUC.

    $\frac{1}{PN} \sum_{p, n} \log(1 + e^{-(s_p - s_n)/\tau})$, also called the Mann-Whitney loss. Divided by $\log 2$ it is never below
    the share of wrongly ordered pairs. A constant added to all scores changes nothing. The gradients of one call sum to 0.

    Args:
        positive: $s_p$, scores that should be high.
        negative: $s_n$, scores that should be low; $-\infty$ leaves a score out of the sum, not of the mean.
        temperature: $\tau > 0$, a number or a scalar tensor that may be learned.
        chunk_size: side of the tile of pairs held at once, >= 1; by default chosen for the device.
        reduction: `"mean"` over pairs or `"sum"`.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, when either pool is empty. It can be differentiated once.

    Raises:
        ValueError: on a temperature not above 0, `chunk_size` below 1, or an unknown reduction.

    Cost:
        $O(PN)$ time, $O(P + N)$ memory and two tiles; the gradient is formed in the same pass, sums are accumulated in float64. Nothing
        is exchanged between processes: gather the scores first.

    Source:
        arXiv 2510.00137, 2025 (Mann-Whitney loss); Burges et al. 2005 (RankNet) for one pair.

    Examples:
        >>> pairwise_logistic_loss(torch.zeros(3), torch.zeros(5), temperature=0.1)  # log 2
        tensor(0.6931)
    """
    check_options(temperature, reduction, chunk_size, 0, none=False)
    high, low = same_type(positive.unsqueeze(1), negative.unsqueeze(1))
    left_out = low.squeeze(1) == -math.inf
    low = low.masked_fill(left_out.unsqueeze(1), 0.0)
    # A shift changes nothing but rounding: about a common centre scores are smallest.
    centre = torch.cat([high, low]).detach().mean() if high.numel() + low.numel() else high.new_zeros(())
    high, low = over_temperature(high - centre, temperature), over_temperature(low - centre, temperature)
    x = torch.cat([-high, torch.ones_like(high)], 1)
    y = torch.cat([torch.ones_like(low), low], 1)
    mask = Mask()
    if torch.compiler.is_compiling() or bool(left_out.any()):
        nowhere = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        mask = Mask(row_groups=nowhere, column_groups=(~left_out).long())
    total, _ = streaming_margin_sum(x, y, mask, side=chunk_size)
    return total / max(positive.numel() * negative.numel(), 1) if reduction == "mean" else total


def sigmoid_pair_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    temperature: float | Float[Tensor, ""] = 0.1,
    bias: float | Float[Tensor, ""] = -10.0,
    *,
    ids: tuple[Shaped[Tensor, " queries"], Shaped[Tensor, " keys"]] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""Logistic cost of telling, for each query and key by itself, whether the two belong together.

    $\frac1B \sum_{ij} \log(1 + e^{-z_{ij}(s_{ij}/\tau + b)})$ with $z_{ij} = 1$ for pairs that belong together and -1 for others. No softmax:
    a pair's cost does not depend on the rest of the batch.

    Args:
        queries: $B$ embeddings, unit vectors for cosine similarity.
        keys: embeddings; without `ids` at least as many as queries, key $i$ belonging to query $i$.
        temperature: $\tau > 0$, a number or a scalar tensor that may be learned.
        bias: $b$, likewise; it should start near the log-odds of a pair to belong together.
        ids: of queries and of keys: pairs of equal ids belong together.
        reduction: `"mean"` over queries (a sum over keys), or `"sum"`.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the keys of all processes of a run; False keeps to this one's.

    Returns:
        A scalar, at least float32; 0 for no queries. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        $O(B M D)$ time, three matrix products (six with ids); memory of the embeddings, their gradients and two tiles.

    Source:
        Zhai et al. 2023 (SigLIP), arXiv 2303.15343, algorithm 1: temperature 0.1 and bias -10 are its initial values.

    Examples:
        >>> embeddings = torch.eye(2)
        >>> loss = sigmoid_pair_loss(embeddings, embeddings, temperature=1.0, bias=0.0)
        >>> round(loss.item(), 4)  # log(1 + 1/e) + log 2
        1.0064
    """
    check_options(temperature, reduction, chunk_size, 0, none=False)
    if keys.shape[1] != queries.shape[1] or (ids is None and len(keys) < len(queries)):
        rows, width = queries.shape
        least = f"at least {rows} rows of" if ids is None else "rows of"
        raise ValueError(f"keys must have {least} width {width}, got {tuple(keys.shape)}")
    if ids is not None and (ids[0].shape != queries.shape[:1] or ids[1].shape != keys.shape[:1]):
        raise ValueError(
            f"ids must have shapes ({len(queries)},) and ({len(keys)},), "
            f"got {tuple(ids[0].shape)} and {tuple(ids[1].shape)}"
        )
    ring = across_processes and is_distributed()
    x, y = same_type(queries, keys)
    x = over_temperature(x, temperature)
    shift = torch.as_tensor(bias, dtype=x.dtype, device=x.device).reshape(1, 1).expand(len(x), 1)
    x, y = torch.cat([x, shift], 1), torch.cat([y, torch.ones_like(y[:, :1])], 1)
    if ids is None:
        apart, _ = streaming_margin_sum(x, y, Mask(diagonal=0), side=chunk_size, ring=ring)
        together = -F.logsigmoid((x * y[: len(x)]).sum(1)).sum()
    else:
        own_ids, all_ids = joint_groups(*ids, ring)
        groups = Mask(row_groups=own_ids, column_groups=all_ids)
        apart, _ = streaming_margin_sum(x, y, groups, side=chunk_size, ring=ring)
        groups = Mask(row_groups=own_ids, column_groups=all_ids, same=True)
        together, _ = streaming_margin_sum(-x, y, groups, side=chunk_size, ring=ring)
    return reduced_total(apart + together, x.new_full((), len(x)), reduction, ring)


def pair_margin_loss(
    embeddings: Float[Tensor, "samples dim"],
    labels: Shaped[Tensor, " samples"],
    positive_margin: float = 1.0,
    negative_margin: float = 0.5,
    *,
    power: Literal[1, 2] = 1,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""Pull pairs of one label up to a similarity, push pairs of two labels below another; the contrastive loss on similarities.

    $\frac{1}{|P|}\sum_{(i,j) \in P} [m_+ - s_{ij}]_+^a + \frac{1}{|N|}\sum_{(i,j) \in N} [s_{ij} - m_-]_+^a$ over ordered pairs $i \ne j$ of equal
    ($P$) and different ($N$) labels. Means are over the pairs that still cost something, as easy ones would drown the rest.

    Args:
        embeddings: one row for each sample, unit vectors for cosine similarity.
        labels: numbers of any kind.
        positive_margin: $m_+$.
        negative_margin: $m_-$.
        power: $a$, 1 or 2.
        reduction: `"mean"` as above, or `"sum"` over all pairs.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the samples of all processes of a run; False keeps to this one's.

    Returns:
        A scalar, at least float32; 0 where no pair costs anything. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        $O(N^2 D)$ time, three to four matrix products; memory of the embeddings, their gradient and two tiles.

    Source:
        Hadsell, Chopra, LeCun 2006; Wu et al. 2017, arXiv 1706.07567, for margins on both sides.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1])  # one pair at similarity 0; others at 0.8 and 0.6
        >>> round(pair_margin_loss(embeddings, labels).item(), 4)  # 1 + (0.3 + 0.1) / 2
        1.2
    """
    check_options(1.0, reduction, chunk_size, 0, none=False)
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape ({len(embeddings)},), got {tuple(labels.shape)}")
    ring = across_processes and is_distributed()
    samples = full_precision(embeddings)
    ones = torch.ones_like(samples[:, :1])
    rows, columns = joint_groups(labels, labels, ring)
    function = "hinge" if power == 1 else "squared_hinge"
    loss = samples.new_zeros(())
    for same, sign, margin in ((True, -1, positive_margin), (False, 1, -negative_margin)):
        mask = Mask(diagonal=0, row_groups=rows, column_groups=columns, same=same)
        total, active = streaming_margin_sum(
            torch.cat([sign * samples, margin * ones], 1),
            torch.cat([samples, ones], 1),
            mask,
            function=function,
            side=chunk_size,
            ring=ring,
        )
        loss = loss + reduced_total(total, active, reduction, ring)
    return loss


def triplet_margin_loss(
    embeddings: Float[Tensor, "samples dim"],
    labels: Shaped[Tensor, " samples"],
    margin: float = 0.2,
    *,
    mining: Literal["hard", "semi-hard", "all"] = "hard",
    distance: Literal["euclidean", "squared", "cosine"] = "euclidean",
    reduction: Literal["mean", "mean-active", "sum"] = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""Hinge on triplets: an anchor's positive should be nearer than its negative by a margin.

    Mean of $[d_{ap} - d_{an} + m]_+$ over triplets with $p$ of the anchor's label and $n$ of another. Which triplets:

    - `"hard"`: each anchor with its farthest positive and its nearest negative;
    - `"semi-hard"`: each anchor and positive with the nearest negative that is farther than the positive;
    - `"all"`: every triplet, counted by sorting and never listed.

    Args:
        embeddings: one row for each sample.
        labels: numbers of any kind.
        margin: $m$, finite.
        mining: see above.
        distance: $d$: Euclidean, its square, or one minus the inner product (the cosine, for unit vectors).
        reduction: `"mean"` over the triplets chosen, `"mean-active"` over those that cost something, or `"sum"`.
        chunk_size: anchors compared at once, >= 1; by default about a million scores.
        across_processes: gather the samples of all processes of a run; False keeps to this one's.

    Returns:
        A scalar, at least float32; 0 where there is no triplet. It can be differentiated once. A Euclidean distance of 0 has gradient 0.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        $O(N^2 D)$ time, with `"semi-hard"` and `"all"` $O(N^2 \log N)$ for sorting; memory of the embeddings of all processes, their
        gradient and some arrays of chunk x samples.

    Source:
        Schroff et al. 2015 (FaceNet), arXiv 1503.03832; Hermans et al. 2017, arXiv 1703.07737, for hard mining in the batch.

    Examples:
        >>> embeddings = torch.tensor([[0.0], [1.0], [1.5]])
        >>> triplet_margin_loss(
        ...     embeddings, torch.tensor([0, 0, 1])
        ... )  # anchors 0: 1 - 1.5 + 0.2 < 0, and 1: 1 - 0.5 + 0.2
        tensor(0.3500)
    """
    for name, value, known in (
        ("mining", mining, ("hard", "semi-hard", "all")),
        ("distance", distance, ("euclidean", "squared", "cosine")),
        ("reduction", reduction, ("mean", "mean-active", "sum")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    check_options(1.0, "sum", chunk_size, 0)
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape ({len(embeddings)},), got {tuple(labels.shape)}")
    ring = across_processes and is_distributed()
    x = full_precision(embeddings)
    y = gather_with_gradient(x) if ring else x
    rows, columns = joint_groups(labels, labels, ring)
    first = own_rows(row_counts(x)).start if ring else 0
    if distance != "cosine":
        # Scores become minus the squared distance: two more columns. Distances do not change with the origin, rounding does.
        centre = y.detach().mean(0) if len(y) else y.new_zeros(y.shape[1])
        x, y = x - centre, y - centre
        of_x, of_y = (x * x).sum(1, keepdim=True), (y * y).sum(1, keepdim=True)
        x = torch.cat([2 * x, -of_x, torch.ones_like(of_x)], 1)
        y = torch.cat([y, torch.ones_like(of_y), -of_y], 1)
    total, chosen, active = triplet_sum(
        x, y, rows, columns, first, margin, mining, distance == "euclidean", chunk_size
    )
    return reduced_total(total, active if reduction == "mean-active" else chosen, reduction, ring)


# Their value belongs to a batch, as that of the losses in `coloss.ops.similarity`.
for _loss in (pairwise_logistic_loss, sigmoid_pair_loss, pair_margin_loss, triplet_margin_loss):
    _loss.batch_statistic = True  # type: ignore[union-attr]
