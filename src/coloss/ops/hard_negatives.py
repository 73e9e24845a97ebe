"""The negatives nearest to each query, and softmax losses against these alone, in memory that does not grow with the number of pairs.

Scores are visited tile by tile; of each query the k largest are remembered, without gradient. The losses then take the scores of those
pairs again, with gradient. In a run of several processes the keys of all of them are candidates.
"""

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .distributed import is_distributed, rank, row_counts
from .loss_arguments import Reduction, check_options, joint_groups, over_temperature, reduced, same_type
from .pair_sums import group_sum, pair_scores
from .precision import full_precision
from .ring import Ring
from .score_tiles import Mask, Tiles
from .similarity import info_nce_loss, supervised_contrastive_loss
from .streaming import streaming_logsumexp


def hardest_keys(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    k: int,
    *,
    ids: tuple[Shaped[Tensor, " queries"], Shaped[Tensor, " keys"]] | None = None,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> tuple[Float[Tensor, "queries {k}"], Int[Tensor, "queries {k}"]]:
    """The k keys with the largest inner products with each query, largest first, without gradient.

    Args:
        queries: embeddings; unit vectors for cosine similarity.
        keys: candidates.
        k: how many of them, >= 1.
        ids: of queries and of keys; pairs of equal ids are left out (the query itself, its positives, duplicates).
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: look among the keys of all processes of a run.

    Returns:
        Inner products, at least float32, and numbers of the keys, in a run of several processes among the joined keys in the order of
        ranks. Where fewer than k keys are left the rest is minus infinity and -1. Of equal products any may be kept.

    Raises:
        ValueError: if widths or the number of ids disagree, or an option is out of range.

    Cost:
        $O(N M D)$ time; memory of the embeddings, the result and three tiles.

    Examples:
        >>> keys = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> hardest_keys(keys[:1], keys, 2, ids=(torch.tensor([0]), torch.arange(3)))
        (tensor([[0.8000, 0.0000]]), tensor([[1, 2]]))
    """
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"keys must have width {queries.shape[1]}, got {keys.shape[1]}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    groups: tuple[Tensor | None, Tensor | None] = (None, None)
    ring = across_processes and is_distributed()
    if ids is not None:
        for name, side, rows in (("queries", ids[0], queries), ("keys", ids[1], keys)):
            if side.shape != rows.shape[:1]:
                raise ValueError(f"ids of {name} must have shape ({len(rows)},), got {tuple(side.shape)}")
        groups = joint_groups(*ids, ring)
    x, y = same_type(queries.detach(), keys.detach())
    return _hardest(x, y, k, *groups, chunk_size, ring)


def hardest_scores(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    k: int,
    *,
    ids: tuple[Shaped[Tensor, " queries"], Shaped[Tensor, " keys"]] | None = None,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "queries {k}"]:
    """The k largest inner products of each query with keys, with gradient; which keys are chosen carries none.

    Args:
        queries, keys, k, ids, chunk_size, across_processes: as for `hardest_keys`.

    Returns:
        Inner products, at least float32, largest first; minus infinity, with gradient 0, where fewer than k keys are left. They can be
        differentiated once.

    Raises:
        ValueError: as `hardest_keys`.

    Cost:
        That of `hardest_keys`, and of the k inner products of each query.

    Examples:
        >>> query = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> hardest_scores(query, torch.tensor([[0.8, 0.6], [0.0, 1.0]]), 1).sum().backward()
        >>> query.grad
        tensor([[0.8000, 0.6000]])
    """
    _, indices = hardest_keys(
        queries, keys, k, ids=ids, chunk_size=chunk_size, across_processes=across_processes
    )
    x, y = same_type(queries, keys)
    return _listed_scores(x, y, indices, across_processes and is_distributed())


def hard_info_nce_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    k: int,
    temperature: float | Float[Tensor, "*temperatures"] = 0.07,
    *,
    ids: Shaped[Tensor, " keys"] | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Softmax cost of finding each query's own key among itself and the k negatives most similar to the query.

    $\frac1B \sum_i [\log (e^{s_{ii}/\tau} + \sum_{j \in H_i} e^{s_{ij}/\tau}) - s_{ii}/\tau]$ with $H_i$ the $k$ negatives of largest
    $s_{ij}$, chosen without gradient. With $k$ of all negatives this is `info_nce_loss`, to the bit. From a random start a small $k$ can
    draw all embeddings to one point: begin with many, see `coloss.contrastive.NTXent`.

    Args:
        queries: $B$ embeddings.
        keys: at least $B$ embeddings; key $i$ is the positive of query $i$, keys beyond the number of queries are further negatives.
        k: negatives that each query keeps, >= 1.
        temperature: $\tau > 0$: a number, a scalar tensor that may be learned, or one value for each query.
        ids: id of each key; query $i$ carries that of key $i$. Other keys with a query's own id are not taken for negatives.
        reduction: over queries: `"mean"`, `"sum"`, or `"none"` for one value each.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the keys of all processes of a run; False keeps to this one's.

    Returns:
        A scalar (0 for no queries) or (queries,), at least float32. It can be differentiated once.

    Raises:
        ValueError: if there are fewer keys than queries, widths differ, ids have another shape, or an option is out of range.

    Cost:
        $O(B M D)$ time, one matrix product; memory of the embeddings, their gradients, $2 B k$ numbers and three tiles.

    Source:
        Wang and Liu 2021, arXiv 2012.09740, section 3.4 (hard contrastive loss).

    Examples:
        >>> embeddings = torch.eye(4)
        >>> round(hard_info_nce_loss(embeddings, embeddings, 1, temperature=1.0).item(), 4)  # log(1 + 1 / e)
        0.3133
    """
    check_options(temperature, reduction, chunk_size, len(queries))
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    ring = across_processes and is_distributed()
    if k >= (sum(row_counts(keys)) if ring else len(keys)) - 1:
        return info_nce_loss(
            queries,
            keys,
            temperature,
            ids=ids,
            reduction=reduction,
            chunk_size=chunk_size,
            across_processes=across_processes,
        )
    if keys.shape[0] < queries.shape[0] or keys.shape[1] != queries.shape[1]:
        rows, width = queries.shape
        raise ValueError(f"keys must have at least {rows} rows of width {width}, got {tuple(keys.shape)}")
    if ids is not None and ids.shape != keys.shape[:1]:
        raise ValueError(f"ids must have shape ({len(keys)},), got {tuple(ids.shape)}")
    count = len(queries)
    if ids is None:
        # Every key of every process is another.
        ids = torch.arange(len(keys), device=keys.device) + (rank() << 40)
    x, y = same_type(queries, keys)
    x = over_temperature(x, temperature)
    groups = joint_groups(ids[:count], ids, ring)
    own = (x * y[:count]).sum(1)
    kept = _scores_of_hardest(x, y, k, *groups, chunk_size, ring)
    loss = torch.cat([own.unsqueeze(1), kept], 1).logsumexp(1) - own
    return reduced(loss, None, reduction, ring)


def hard_supervised_contrastive_loss(
    embeddings: Float[Tensor, "samples dim"],
    labels: Shaped[Tensor, " samples"],
    k: int,
    temperature: float | Float[Tensor, ""] = 0.07,
    *,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Softmax cost of finding, for each sample, the others of its label among these and the k most similar samples of other labels.

    $\frac{1}{|A|} \sum_{i \in A} \frac{1}{|P_i|} \sum_{p \in P_i} [\log \sum_{a \in P_i \cup H_i} e^{s_{ia}/\tau} - s_{ip}/\tau]$: the
    loss of `supervised_contrastive_loss` with only the $k$ hardest negatives $H_i$, chosen without gradient. With $k$ of all it is that
    loss, to the bit. With two views of each image under one label it is the hard form of NT-Xent.

    Args:
        embeddings: one row for each sample, unit vectors for cosine similarity.
        labels: class, or id of the image that views were made of; numbers of any kind.
        k: negatives that each sample keeps, >= 1.
        temperature: $\tau > 0$: a number, or a scalar tensor that may be learned.
        reduction: over anchors with a positive: `"mean"`, `"sum"`; or `"none"`: one value each, 0 where there is no positive.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the samples of all processes of a run; False keeps to this one's.

    Returns:
        A scalar (0 if no sample has a positive) or (samples,), at least float32. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        $O(N^2 D)$ time, three matrix products; memory of the embeddings, their gradient, $2 N k$ numbers and three tiles.

    Source:
        Wang and Liu 2021, arXiv 2012.09740, section 3.4, with the several positives of Khosla et al. 2020, arXiv 2004.11362.

    Examples:
        >>> views = torch.eye(3).repeat(2, 1)
        >>> loss = hard_supervised_contrastive_loss(views, torch.arange(3).repeat(2), 1, temperature=1.0)
        >>> round(loss.item(), 4)  # log(e + 1) - 1
        0.3133
    """
    check_options(temperature, reduction, chunk_size, len(embeddings))
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape ({len(embeddings)},), got {tuple(labels.shape)}")
    ring = across_processes and is_distributed()
    if k >= (sum(row_counts(embeddings)) if ring else len(embeddings)) - 2:
        return supervised_contrastive_loss(
            embeddings,
            labels,
            temperature,
            reduction=reduction,
            chunk_size=chunk_size,
            across_processes=across_processes,
        )
    x = over_temperature(full_precision(embeddings), temperature**0.5)
    groups = joint_groups(labels, labels, ring)
    alike = Mask(diagonal=0, row_groups=groups[0], column_groups=groups[1], same=True)
    own, _ = streaming_logsumexp(x, None, alike, side=chunk_size, ring=ring)
    kept = _scores_of_hardest(x, x, k, *groups, chunk_size, ring)
    positives = group_sum(x, labels, labels, ring) - x
    count = group_sum(x.new_ones(len(x), 1), labels, labels, ring).squeeze(1) - 1
    anchors = count > 0
    terms = torch.cat([own.unsqueeze(1), kept], 1).masked_fill(~anchors.unsqueeze(1), 0.0)
    loss = terms.logsumexp(1) - (x * positives).sum(1) / count.clamp(min=1)
    return reduced(torch.where(anchors, loss, 0.0), anchors, reduction, ring)


for _loss in (hard_info_nce_loss, hard_supervised_contrastive_loss):
    _loss.batch_statistic = True  # type: ignore[union-attr]


def _scores_of_hardest(
    x: Tensor, y: Tensor, k: int, row_groups: Tensor, column_groups: Tensor, side: int | None, ring: bool
) -> Tensor:
    """(rows, k) scores of the hardest pairs of unequal groups, with gradient; minus infinity where there are fewer."""
    _, indices = _hardest(x.detach(), y.detach(), k, row_groups, column_groups, side, ring)
    return _listed_scores(x, y, indices, ring)


def _listed_scores(x: Tensor, y: Tensor, indices: Tensor, ring: bool) -> Tensor:
    """Scores of each row with the columns listed for it; minus infinity where that is -1."""
    if not len(y) and not ring:
        return x.new_full(indices.shape, -math.inf)
    rows = torch.arange(len(x), device=x.device).unsqueeze(1).expand_as(indices)
    pairs = torch.stack([rows.flatten(), indices.flatten().clamp(min=0)])
    scores = pair_scores(x, y, pairs, ring).view(indices.shape)
    return scores.masked_fill(indices < 0, -math.inf)


@torch.library.custom_op("coloss::hardest_keys", mutates_args=())
def _hardest(
    x: Tensor,
    y: Tensor,
    k: int,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    side: int | None,
    ring: bool,
) -> tuple[Tensor, Tensor]:
    values = x.new_full((len(x), k), -math.inf)
    indices = torch.full((len(x), k), -1, device=x.device)
    if not ring:
        _search(values, indices, Tiles(x, y, Mask(row_groups=row_groups, column_groups=column_groups), side))
        return values, indices
    journey = Ring(y)
    for _ in range(len(journey)):
        here = None if column_groups is None else column_groups[journey.rows]
        tiles = Tiles(x, y, Mask(row_groups=row_groups, column_groups=here), side)
        _search(values, indices, tiles, journey.rows.start)
        (y,) = journey.pass_on(y)
    return values, indices


@_hardest.register_fake
def _(x, y, k, row_groups, column_groups, side, ring):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _search(values: Tensor, indices: Tensor, tiles: Tiles, offset: int = 0) -> None:
    """Take the best of each tile into the best so far; `offset` is the number of the first column."""
    k = values.shape[1]
    for rows, columns, tile, spare in tiles.scores():
        tiles.mask.apply(tile, spare, rows, columns, -math.inf)
        best, place = tile.topk(min(k, tile.shape[1]), dim=1)
        place = (place + (columns.start + offset)).masked_fill_(best == -math.inf, -1)
        both = torch.cat([values[rows], best], 1)
        values[rows], order = both.topk(k, dim=1)
        indices[rows] = torch.cat([indices[rows], place], 1).gather(1, order)
