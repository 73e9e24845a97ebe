"""Losses of log-sum-exps over a row's pairs of its own label and over its other pairs, in memory that does not grow with the pairs.

They stand on the streaming core, as the losses in `coloss.ops.similarity`; several processes compare with the columns of all of them.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .distributed import is_distributed
from .loss_arguments import Reduction, check_options, joint_groups, reduced, same_type
from .score_tiles import Mask
from .streaming import streaming_logsumexp


def label_logsumexps(
    queries: Float[Tensor, "queries dim"],
    query_labels: Shaped[Tensor, " queries"],
    keys: Float[Tensor, "keys dim"] | None = None,
    key_labels: Shaped[Tensor, " keys"] | None = None,
    *,
    positive_scale: float = 1.0,
    negative_scale: float = 1.0,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> tuple[Float[Tensor, " queries"], Float[Tensor, " queries"]]:
    r"""For each query, the log-sum-exp of its scaled scores with the keys of its label, and with all others.

    $\log \sum_{j : y_j = y_i} e^{\beta s_{ij}}$ and $\log \sum_{j : y_j \ne y_i} e^{\gamma s_{ij}}$ with $s_{ij}$ the inner product. Many
    losses of metric learning are a function of the two.

    Args:
        queries: one row each, unit vectors for cosine similarity.
        query_labels: numbers of any kind.
        keys: what to compare with; None: the other queries, itself left out.
        key_labels: theirs; needed with keys.
        positive_scale: $\beta$, of either sign.
        negative_scale: $\gamma$.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the keys of all processes of a run; False keeps to this one's.

    Returns:
        Two tensors (queries,), at least float32; minus infinity, with gradient 0, where there is no such key. They can be differentiated
        once.

    Raises:
        ValueError: if shapes disagree, or an option is out of range.

    Cost:
        $O(N M D)$ time, eight matrix products forward and backward; memory of the embeddings, their gradients and two tiles.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> label_logsumexps(embeddings, torch.tensor([0, 0, 1]), negative_scale=3.0)
        (tensor([0., 0., -inf]), tensor([0.0000, 3.0000, 3.0486]))
    """
    check_options(1.0, "sum", chunk_size, 0)
    if (keys is None) != (key_labels is None):
        raise ValueError("keys and key_labels must be given together, got one of them")
    for name, labels, rows in (("query_labels", query_labels, queries), ("key_labels", key_labels, keys)):
        if rows is not None and labels is not None and labels.shape != rows.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(rows)},), got {tuple(labels.shape)}")
    if keys is not None and keys.shape[1] != queries.shape[1]:
        raise ValueError(f"keys must have width {queries.shape[1]}, got {keys.shape[1]}")
    for name, scale in (("positive_scale", positive_scale), ("negative_scale", negative_scale)):
        if not math.isfinite(scale):
            raise ValueError(f"{name} must be finite, got {scale}")
    ring = across_processes and is_distributed()
    x, y = same_type(queries, queries if keys is None else keys)
    diagonal = 0 if keys is None else None
    around = query_labels if key_labels is None else key_labels
    rows, columns = joint_groups(query_labels, around, ring)

    def side(same: bool, scale: float) -> Tensor:
        mask = Mask(diagonal=diagonal, row_groups=rows, column_groups=columns, same=same)
        if keys is None and scale > 0:
            # One set with itself costs half.
            return streaming_logsumexp(math.sqrt(scale) * x, None, mask, side=chunk_size, ring=ring)[0]
        return streaming_logsumexp(scale * x, y, mask, side=chunk_size, ring=ring)[0]

    # A pair left out "with same" is one of unequal labels.
    return side(True, positive_scale), side(False, negative_scale)


def multi_similarity_loss(
    embeddings: Float[Tensor, "samples dim"],
    labels: Shaped[Tensor, " samples"],
    positive_scale: float = 2.0,
    negative_scale: float = 50.0,
    margin: float = 0.5,
    *,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Soft pull on the least similar positives of each sample, and soft push on its most similar negatives.

    $\frac1N \sum_i [\frac1\beta \log(1 + \sum_{p \in P_i} e^{-\beta (s_{ip} - m)}) + \frac1\gamma \log(1 + \sum_{n \in N_i} e^{\gamma (s_{in} - m)})]$
    with $P_i$ the other samples of the label of $i$, $N_i$ all of other labels. No pairs are mined.

    Args:
        embeddings: one row for each sample, unit vectors for cosine similarity.
        labels: numbers of any kind.
        positive_scale: $\beta > 0$.
        negative_scale: $\gamma > 0$.
        margin: $m$, finite.
        reduction: over samples: `"mean"`, `"sum"`, or `"none"` for one value each.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the samples of all processes of a run; False keeps to this one's.

    Returns:
        A scalar or (samples,), at least float32; 0 where there is no pair. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        That of `label_logsumexps`.

    Source:
        Wang et al. 2019, arXiv 1904.06627, equation 15.

    Examples:
        >>> loss = multi_similarity_loss(torch.eye(2), torch.tensor([0, 0]))  # log(1 + e) / 2
        >>> round(loss.item(), 4)
        0.6566
    """
    check_options(1.0, reduction, chunk_size, 0)
    _check_scales(margin, positive_scale=positive_scale, negative_scale=negative_scale)
    positives, negatives = label_logsumexps(
        embeddings,
        labels,
        positive_scale=-positive_scale,
        negative_scale=negative_scale,
        chunk_size=chunk_size,
        across_processes=across_processes,
    )
    loss = F.softplus(positives + positive_scale * margin) / positive_scale
    loss = loss + F.softplus(negatives - negative_scale * margin) / negative_scale
    return reduced(loss, None, reduction, across_processes and is_distributed())


def proxy_anchor_loss(
    embeddings: Float[Tensor, "samples dim"],
    labels: Int[Tensor, " samples"],
    proxies: Float[Tensor, "classes dim"],
    scale: float = 32.0,
    margin: float = 0.1,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""Each class's proxy pulls the samples of its class, the farthest most, and pushes the others, the nearest most.

    $\frac{1}{|P^+|} \sum_{k \in P^+} \log(1 + \sum_{i : y_i = k} e^{-\gamma (s_{ki} - m)}) + \frac{1}{|P|} \sum_k \log(1 + \sum_{i : y_i \ne k} e^{\gamma (s_{ki} + m)})$
    with $P^+$ the proxies that have a sample in the batch, and $P$ all of them.

    Args:
        embeddings: one row for each sample, unit vectors for cosine similarity.
        labels: class of each sample in [0, classes); a sample of another number is everyone's negative.
        proxies: one row for each class, unit vectors likewise.
        scale: $\gamma > 0$.
        margin: $m$, finite.
        reduction: `"mean"` as above, or `"sum"` over proxies.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the samples of all processes of a run; False keeps to this one's.

    Returns:
        A scalar, at least float32. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        That of `label_logsumexps`; each process computes it for all proxies.

    Source:
        Kim et al. 2020, arXiv 2003.13911, equation 4.

    Examples:
        >>> loss = proxy_anchor_loss(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), scale=1.0, margin=0.0)
        >>> round(loss.item(), 4)  # log(1 + 1 / e) + log 2
        1.0064
    """
    check_options(1.0, reduction, chunk_size, 0, none=False)
    _check_scales(margin, scale=scale)
    positives, negatives = label_logsumexps(
        proxies,
        torch.arange(len(proxies), device=labels.device),
        embeddings,
        labels,
        positive_scale=-scale,
        negative_scale=scale,
        chunk_size=chunk_size,
        across_processes=across_processes,
    )
    pull, push = F.softplus(positives + scale * margin), F.softplus(negatives + scale * margin)
    if reduction == "sum":
        return pull.sum() + push.sum()
    present = (positives > -math.inf).sum().clamp(min=1)
    return pull.sum() / present + push.sum() / max(len(proxies), 1)


def _check_scales(margin: float, **scales: float) -> None:
    for name, scale in scales.items():
        if not 0 < scale < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {scale}")
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}")


for _loss in (multi_similarity_loss, proxy_anchor_loss):
    _loss.batch_statistic = True  # type: ignore[union-attr]
