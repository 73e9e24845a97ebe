"""Softmax losses on the similarities of embeddings, in memory that does not grow with the number of pairs.

All stand on one streaming core (`coloss.ops.streaming`): scores are made tile by tile, each row (and column) keeps its log-sum-exp, and
the backward pass makes the tiles again. The results are exact, not estimates. In a run of several processes the columns of all of them
are compared, as if the batch had been joined; every process gets the joined batch's loss, and gradients to scale as in
`coloss.ops.distributed`.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .distributed import is_distributed, row_counts
from .loss_arguments import (
    Reduction,
    check_options,
    check_pairs,
    joint_groups,
    over_temperature,
    reduced,
    same_type,
)
from .pair_sums import group_sum, pair_scores
from .precision import full_precision, without_autocast
from .score_tiles import Mask
from .streaming import streaming_logsumexp
from .target_sums import function_target_sums


def info_nce_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    temperature: float | Float[Tensor, "*temperatures"] = 0.07,
    *,
    symmetric: bool = False,
    ids: Shaped[Tensor, " keys"] | None = None,
    ignore: Bool[Tensor, "queries keys"] | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Softmax cost of finding each query's own key among all keys.

    $\frac1B \sum_i [\log \sum_j e^{s_{ij}/\tau} - s_{ii}/\tau]$ with $s_{ij}$ the inner product of query $i$ and key $j$. Key $i$ is the
    positive of query $i$; keys beyond the number of queries are further negatives, such as a queue. Give unit vectors for cosine
    similarity.

    Args:
        queries: $B$ embeddings.
        keys: at least $B$ embeddings.
        temperature: $\tau > 0$: a number, a scalar tensor that may be learned, or one value for each query.
        symmetric: average with the loss of finding each of the first $B$ keys' query among all queries.
        ids: id of each key; query $i$ carries that of key $i$. Other keys with a query's own id are not taken for negatives.
        ignore: True where a pair is neither positive nor negative, for masks that ids cannot express; positives are always kept.
        reduction: over queries: `"mean"`, `"sum"`, or `"none"` for one value each.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the keys of all processes of a run; False keeps to this one's.

    Returns:
        A scalar (0 for no queries) or (queries,), at least float32. It can be differentiated once.

    Raises:
        ValueError: if there are fewer keys than queries, widths differ, a mask has another shape, or an option is out of range.

    Cost:
        $O(B M D)$ time, four matrix products forward and backward; memory of the embeddings, their gradients and two tiles. Up to
        about 4 million scores are kept for the backward pass, in place of being made again.

    Source:
        van den Oord, Li, Vinyals 2018, arXiv 1807.03748; Radford et al. 2021, arXiv 2103.00020, for the symmetric form.

    Examples:
        >>> embeddings = torch.eye(4)
        >>> round(info_nce_loss(embeddings, embeddings, temperature=1.0).item(), 4)  # log(1 + 3 / e)
        0.7437
    """
    check_options(temperature, reduction, chunk_size, len(queries))
    if keys.shape[0] < queries.shape[0] or keys.shape[1] != queries.shape[1]:
        rows, width = queries.shape
        raise ValueError(f"keys must have at least {rows} rows of width {width}, got {tuple(keys.shape)}")
    if ignore is not None and ignore.shape != (queries.shape[0], keys.shape[0]):
        raise ValueError(
            f"ignore must have shape {(queries.shape[0], keys.shape[0])}, got {tuple(ignore.shape)}"
        )
    if ids is not None and ids.shape != keys.shape[:1]:
        raise ValueError(f"ids must have shape ({len(keys)},), got {tuple(ids.shape)}")
    if symmetric and isinstance(temperature, Tensor) and temperature.ndim:
        raise ValueError("temperature must be one number where symmetric=True, got one for each query")
    ring = across_processes and is_distributed()
    if ring and ignore is not None:
        raise ValueError("ignore cannot name keys of other processes: give ids, or across_processes=False")

    x, y = same_type(queries, keys)
    x = over_temperature(x, temperature)
    count = len(x)
    own = (x * y[:count]).sum(1)
    mask = Mask()
    if ids is not None:
        own_ids, all_ids = joint_groups(ids[:count], ids, ring)
        mask = Mask(row_groups=own_ids, column_groups=all_ids)
    elif ignore is not None:
        mask = Mask(diagonal=0, ignore=ignore)
    of_rows, of_columns = streaming_logsumexp(x, y, mask, columns=symmetric, side=chunk_size, ring=ring)
    left_out = mask.diagonal is not None or mask.row_groups is not None
    loss = (torch.logaddexp(of_rows, own) if left_out else of_rows) - own
    if symmetric:
        back = of_columns[:count]
        loss = (loss + (torch.logaddexp(back, own) if left_out else back) - own) / 2
    return reduced(loss, None, reduction, ring)


def supervised_contrastive_loss(
    embeddings: Float[Tensor, "samples dim"],
    labels: Shaped[Tensor, " samples"],
    temperature: float | Float[Tensor, "*temperatures"] = 0.07,
    *,
    references: Float[Tensor, "references dim"] | None = None,
    reference_labels: Shaped[Tensor, " references"] | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Softmax cost of finding, for each sample, the others of its label among all others.

    $\frac{1}{|A|} \sum_{i \in A} \frac{1}{|P_i|} \sum_{p \in P_i} [\log \sum_{a \ne i} e^{s_{ia}/\tau} - s_{ip}/\tau]$ with $P_i$ the other
    samples of the label of $i$, and $A$ those that have any ("out" form). With two views of each image under one label this is NT-Xent.

    Args:
        embeddings: one row for each sample, unit vectors for cosine similarity.
        labels: class, or id of the image that views were made of; numbers of any kind.
        temperature: $\tau > 0$: a number, a scalar tensor that may be learned, or one value for each sample.
        references: further positives and negatives that are no anchors, such as a queue of older embeddings.
        reference_labels: their labels; one that is nobody's makes a pure negative.
        reduction: over anchors with a positive: `"mean"`, `"sum"`; or `"none"`: one value each, 0 where there is no positive.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the samples of all processes of a run; False keeps to this one's.

    Returns:
        A scalar (0 if no sample has a positive) or (samples,), at least float32. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        $O(N^2 D)$ time: two matrix products, four with references or temperatures of samples. Memory of the embeddings, their gradient
        and two tiles; positives enter by sums over each label, not pair by pair.

    Source:
        Khosla et al. 2020, arXiv 2004.11362, equation 2; Chen et al. 2020 (NT-Xent), arXiv 2002.05709.

    Examples:
        >>> views = torch.eye(2).repeat(2, 1)
        >>> loss = supervised_contrastive_loss(views, torch.tensor([0, 1, 0, 1]), temperature=1.0)
        >>> round(loss.item(), 4)  # log(e + 2) - 1
        0.5514
    """
    check_options(temperature, reduction, chunk_size, len(embeddings))
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape ({len(embeddings)},), got {tuple(labels.shape)}")
    if (references is None) != (reference_labels is None):
        raise ValueError("references and reference_labels must be given together, got one of them")
    if references is not None and references.shape[1:] != embeddings.shape[1:]:
        raise ValueError(
            f"references must have width {embeddings.shape[1]}, got shape {tuple(references.shape)}"
        )
    if (
        references is not None
        and reference_labels is not None
        and reference_labels.shape != references.shape[:1]
    ):
        raise ValueError(
            f"reference_labels must have shape ({len(references)},), got {tuple(reference_labels.shape)}"
        )
    ring = across_processes and is_distributed()
    samples = full_precision(embeddings)
    mask = Mask(diagonal=0)
    if references is None and not (isinstance(temperature, Tensor) and temperature.ndim):
        x = y = over_temperature(samples, temperature**0.5)
        around = labels
        logs, _ = streaming_logsumexp(x, None, mask, side=chunk_size, ring=ring)
    else:
        x, y, around = samples, samples, labels
        if references is not None and reference_labels is not None:
            x, others = same_type(embeddings, references)
            y, around = torch.cat([x, others]), torch.cat([labels, reference_labels])
        x = over_temperature(x, temperature)
        logs, _ = streaming_logsumexp(x, y, mask, side=chunk_size, ring=ring)
    positives = group_sum(y, around, labels, ring) - y[: len(x)]
    count = group_sum(y.new_ones(len(y), 1), around, labels, ring).squeeze(1) - 1
    anchors = count > 0
    loss = logs - (x * positives).sum(1) / count.clamp(min=1)
    return reduced(torch.where(anchors, loss, 0.0), anchors, reduction, ring)


def soft_contrastive_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    targets: Tensor | Callable[[Tensor, Tensor], Tensor],
    temperature: float | Float[Tensor, "*temperatures"] = 0.07,
    *,
    ids: tuple[Shaped[Tensor, " queries"], Shaped[Tensor, " keys"]] | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Cross-entropy of each query's softmax over the keys against a target distribution over them.

    $\frac1B \sum_i \sum_j T_{ij} [\log \sum_k e^{s_{ik}/\tau} - s_{ij}/\tau]$. With $T$ the identity this is InfoNCE.

    Args:
        queries: $B$ embeddings.
        keys: $M$ embeddings.
        targets: $T$, rows that sum to 1 (others are taken as weights): a sparse or dense (B, M) tensor, without gradient; or a function
            of a column of query numbers and a row of key numbers that gives their targets, for targets too many to be stored.
        temperature: $\tau > 0$: a number, a scalar tensor that may be learned, or one value for each query.
        ids: of queries and of keys; pairs of equal ids are left out of the sum over $k$. Their target should be 0.
        reduction: over queries: `"mean"`, `"sum"`, or `"none"` for one value each.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the keys of all processes of a run, which number the columns of `targets` in the order of ranks.

    Returns:
        A scalar (0 for no queries) or (queries,), at least float32. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        That of `info_nce_loss`, and of one inner product for each stored target; a function costs two more matrix products. Functions
        are the one form that `torch.compile` cannot take without a graph break.

    Examples:
        >>> embeddings = torch.eye(3)
        >>> smooth = torch.full((3, 3), 0.05) + 0.85 * torch.eye(3)
        >>> loss = soft_contrastive_loss(embeddings, embeddings, smooth, temperature=1.0)
        >>> same = soft_contrastive_loss(
        ...     embeddings, embeddings, lambda i, j: 0.05 + 0.85 * (i == j), temperature=1.0
        ... )
        >>> bool(torch.isclose(loss, same)), round(loss.item(), 4)
        (True, 0.6514)
    """
    check_options(temperature, reduction, chunk_size, len(queries))
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"keys must have width {queries.shape[1]}, got {keys.shape[1]}")
    ring = across_processes and is_distributed()
    columns = sum(row_counts(keys)) if ring else len(keys)
    if isinstance(targets, Tensor) and targets.shape != (len(queries), columns):
        raise ValueError(f"targets must have shape {(len(queries), columns)}, got {tuple(targets.shape)}")
    x, y = same_type(queries, keys)
    x = over_temperature(x, temperature)
    mask = Mask()
    if ids is not None:
        row_groups, column_groups = joint_groups(*ids, ring)
        mask = Mask(row_groups=row_groups, column_groups=column_groups)
    logs, _ = streaming_logsumexp(x, y, mask, side=chunk_size, ring=ring)
    if not isinstance(targets, Tensor):
        mass, score = function_target_sums(x, y, targets, chunk_size, ring)
    elif targets.layout == torch.strided and not ring:
        weights = targets.detach().to(x.dtype)
        with without_autocast(x.device):
            mass, score = weights.sum(1), (x * (weights @ y)).sum(1)
    else:
        stored = targets.detach().to_sparse_coo().coalesce()
        pairs, weights = stored.indices(), stored.values().to(x.dtype)
        mass = x.new_zeros(len(x)).index_add(0, pairs[0], weights)
        score = x.new_zeros(len(x)).index_add(0, pairs[0], weights * pair_scores(x, y, pairs, ring))
    # A row without targets, or in which nothing counts, costs nothing: 0 times minus infinity must not be asked for.
    counted = mass != 0
    loss = torch.where(counted, mass * logs.masked_fill(~counted, 0.0) - score, 0.0)
    return reduced(loss, None, reduction, ring)


def decoupled_softmax_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    positives: Int[Tensor, "2 positives"],
    temperature: float | Float[Tensor, "*temperatures"] = 0.05,
    *,
    weight: Float[Tensor, " positives"] | None = None,
    ignore: Int[Tensor, "2 ignored"] | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Softmax cost of each positive key against the query's negatives only: positives do not compete with each other.

    $\frac{1}{|A|} \sum_{i \in A} \frac{1}{W_i} \sum_{p \in P_i} w_{ip} \log(1 + e^{-s_{ip}/\tau} \sum_{n \in N_i} e^{s_{in}/\tau})$, with $N_i$
    all keys that are neither positive for query $i$ nor ignored, $W_i$ the sum of weights, and $A$ the queries with a positive.
    Unlike with the usual softmax, no positive is ever pushed away.

    Args:
        queries: $B$ embeddings.
        keys: $M$ embeddings, such as those of all labels.
        positives: query and key number of each positive pair.
        temperature: $\tau > 0$: a number, a scalar tensor that may be learned, or one value for each query.
        weight: $w_{ip} \ge 0$ of each positive, such as its graded relevance.
        ignore: pairs that are no negatives, such as positives that were not drawn.
        reduction: over queries with a positive: `"mean"`, `"sum"`; or `"none"`: one value each, 0 without a positive.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the keys of all processes of a run, numbered in the order of ranks.

    Returns:
        A scalar (0 if there is no positive) or (queries,), at least float32. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree, a pair is out of range or an option is.

    Cost:
        $O(B M D)$ time; memory of the embeddings, their gradients, two tiles and one number for each positive.

    Source:
        Gupta et al. 2024 (DEXML), arXiv 2310.10636.

    Examples:
        >>> queries, keys = torch.tensor([[1.0]]), torch.tensor([[3.0], [0.0], [0.0], [-1.0], [-1.0], [-1.0]])
        >>> positives = torch.tensor([[0, 0, 0], [0, 1, 2]])
        >>> round(decoupled_softmax_loss(queries, keys, positives, temperature=1.0).item(), 4)
        0.5136
    """
    check_options(temperature, reduction, chunk_size, len(queries))
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"keys must have width {queries.shape[1]}, got {keys.shape[1]}")
    if weight is not None and weight.shape != positives.shape[1:]:
        raise ValueError(f"weight must have shape ({positives.shape[1]},), got {tuple(weight.shape)}")
    ring = across_processes and is_distributed()
    columns = sum(row_counts(keys)) if ring else len(keys)
    for name, pairs in (("positives", positives), ("ignore", ignore)):
        if pairs is not None:
            check_pairs(name, pairs, len(queries), columns)

    x, y = same_type(queries, keys)
    x = over_temperature(x, temperature)
    dropped = positives if ignore is None else torch.cat([positives, ignore], 1)
    mask = Mask(pairs=dropped[:, dropped[0].argsort()])
    negatives, _ = streaming_logsumexp(x, y, mask, side=chunk_size, ring=ring)
    weights = x.new_ones(positives.shape[1]) if weight is None else weight.to(x.dtype)
    rows = positives[0]
    term = -torch.nn.functional.logsigmoid(pair_scores(x, y, positives, ring) - negatives[rows])
    total = x.new_zeros(len(x)).index_add(0, rows, weights * term)
    mass = x.new_zeros(len(x)).index_add(0, rows, weights)
    return reduced(total / mass.masked_fill(mass == 0, 1.0), mass > 0, reduction, ring)


# Their value belongs to a batch, whose samples are each other's negatives: gradient accumulation must join batches, not average over them.
for _loss in (
    info_nce_loss,
    supervised_contrastive_loss,
    soft_contrastive_loss,
    decoupled_softmax_loss,
):
    _loss.batch_statistic = True  # type: ignore[union-attr]


def masked_logsumexp(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*#shape"], dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Log of the sum of exponentials over the entries that a mask keeps, safe where it keeps none.

    $\log \sum_{j : m_j} e^{x_j}$. With nothing kept, or only $-\infty$, the result is $-\infty$ and its
    gradient is zero, never NaN.

    Args:
        x: any shape; entries outside the mask may hold any value, NaN included.
        mask: True where an entry counts; broadcast against `x`.
        dim: dimension to reduce.

    Returns:
        `x` without `dim`, at least float32.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0, 9.0], [1.0, 2.0, 3.0]])
        >>> masked_logsumexp(x, torch.tensor([[True, True, False], [False, False, False]]))
        tensor([0.6931,   -inf])
    """
    kept = full_precision(x).masked_fill(~mask, -math.inf)
    empty = (kept == -math.inf).all(dim, keepdim=True)
    result = torch.logsumexp(kept.masked_fill(empty, 0.0), dim)
    return result.masked_fill(empty.squeeze(dim), -math.inf)


def relevance_from_ids(
    query_ids: Shaped[Tensor, " queries"], document_ids: Shaped[Tensor, " documents"]
) -> Bool[Tensor, "queries documents"]:
    """Which documents answer which queries: those that carry the same id.

    Args:
        query_ids: id of the document, class or identity that each query looks for.
        document_ids: id of each document.

    Returns:
        True where the two ids are equal.

    Examples:
        >>> relevance_from_ids(torch.tensor([7, 8]), torch.tensor([7, 8, 7])).int()
        tensor([[1, 0, 1],
                [0, 1, 0]], dtype=torch.int32)
    """
    return query_ids.unsqueeze(1) == document_ids.unsqueeze(0)


def duplicate_mask(ids: Shaped[Tensor, " items"]) -> Bool[Tensor, "items items"]:
    """For each item, the other items that hold the same id: false negatives to leave out of a batch.

    Its first $B$ rows are the `ignore` of `info_nce_loss` when `ids` are those of the keys.

    Args:
        ids: id of each item.

    Returns:
        True where ids are equal and the items are not the same; the diagonal is False.

    Examples:
        >>> duplicate_mask(torch.tensor([7, 8, 7])).int()
        tensor([[0, 0, 1],
                [0, 0, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    return relevance_from_ids(ids, ids).fill_diagonal_(False)
