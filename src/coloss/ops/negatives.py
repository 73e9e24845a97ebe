"""What a contrastive loss with its own weighting is made of: the log-sum-exp over each query's negatives alone, and their number."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .distributed import is_distributed
from .loss_arguments import check_options, joint_groups, over_temperature, same_type
from .score_tiles import Mask
from .streaming import streaming_logsumexp


def negative_logsumexp(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    temperature: float | Float[Tensor, "*temperatures"],
    *,
    query_ids: Shaped[Tensor, " queries"],
    key_ids: Shaped[Tensor, " keys"],
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> tuple[Float[Tensor, " queries"], Int[Tensor, " queries"]]:
    r"""Log of the summed exponentials of each query's scores with the keys of other ids, and how many those are.

    $\log \sum_{k : a_k \ne b_i} e^{q_i \cdot k_k / \tau_i}$ with $b$ the `query_ids` and $a$ the `key_ids`: a query itself, its positives
    and their duplicates are left out by their id, exactly and not by subtraction, so nothing is lost where negatives are faint beside
    the positive.

    Args:
        queries: embeddings, unit vectors for cosine similarity.
        keys: embeddings that they are compared with; the queries again for a batch against itself.
        temperature: $\tau > 0$: a number, a scalar tensor, or one value for each query; tensors get their gradient.
        query_ids, key_ids: numbers of any kind; equal ones belong together.
        chunk_size: side of the tile of scores held at once, >= 1; by default chosen for the device.
        across_processes: compare with the keys of all processes of a run; False keeps to this one's.

    Returns:
        The log-sum-exps, at least float32, minus infinity with gradient 0 where there is no negative; and the numbers of negatives. The
        first can be differentiated once.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Cost:
        $O(B M D)$ time, four matrix products forward and backward; memory of the embeddings, their gradients and two tiles.

    Examples:
        >>> rows, ids = torch.eye(3), torch.tensor([5, 5, 8])
        >>> logs, count = negative_logsumexp(rows, rows, 1.0, query_ids=ids, key_ids=ids)
        >>> logs.exp(), count
        (tensor([1., 1., 2.]), tensor([1, 1, 2]))
    """
    check_options(temperature, "none", chunk_size, len(queries))
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"keys must have width {queries.shape[1]}, got {keys.shape[1]}")
    for name, ids, rows in (("query_ids", query_ids, queries), ("key_ids", key_ids, keys)):
        if ids.shape != rows.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(rows)},), got {tuple(ids.shape)}")
    ring = across_processes and is_distributed()
    x, y = same_type(queries, keys)
    own, across = joint_groups(query_ids, key_ids, ring)
    mask = Mask(row_groups=own, column_groups=across)
    logs, _ = streaming_logsumexp(over_temperature(x, temperature), y, mask, side=chunk_size, ring=ring)
    of_group = torch.bincount(across, minlength=len(own) + len(across))
    return logs, len(across) - of_group[own]


# Its value belongs to a batch, whose samples are each other's negatives.
negative_logsumexp.batch_statistic = True  # type: ignore[attr-defined]
