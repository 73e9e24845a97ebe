r"""Contrast between clusters in place of contrast between all nodes: a loss whose cost grows with the nodes, not with their pairs."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.ops import (
    all_reduce_mean,
    full_precision,
    gather_with_gradient,
    is_distributed,
    segment_logsumexp,
    segment_sizes,
    segment_sum,
    without_autocast,
    world_size,
)
from coloss.ops.loss_arguments import check_pairs, reduced
from coloss.ops.pair_sums import pair_scores
from coloss.ops.score_tiles import Mask
from coloss.ops.streaming import streaming_logsumexp


def meta_nodes(
    embeddings: Float[Tensor, "nodes dim"],
    assignments: Int[Tensor, " nodes"] | Float[Tensor, "nodes clusters"],
    clusters: int | None = None,
    *,
    across_processes: bool = True,
) -> tuple[Float[Tensor, "clusters dim"], Float[Tensor, " clusters"]]:
    """The sum of the embeddings of each cluster, and how many nodes it holds.

    Args:
        embeddings: one row for each node.
        assignments: the cluster of each node, from 0; or the share of each cluster in each node, rows that sum to 1.
        clusters: how many there are, for cluster numbers; None takes the largest number plus one, over all processes.
        across_processes: sum over the nodes of all processes of a run; False keeps to this one's.

    Returns:
        (clusters, dim), at least float32, zeros for an empty cluster; and (clusters,), the sum of shares where those are given.
        Gradients reach the embeddings, and shares that ask for one.

    Raises:
        ValueError: for another number of assignments than nodes, or a cluster outside [0, clusters).

    Cost:
        O(nodes * dim) for cluster numbers, O(nodes * clusters * dim) for shares.

    Source:
        Kulatilleke, Portmann, Chandra, 2022, arXiv 2209.14067.

    Examples:
        >>> sums, sizes = meta_nodes(
        ...     torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 2, 0])
        ... )
        >>> sums.tolist(), sizes.tolist()
        ([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]], [2.0, 0.0, 1.0])
    """
    if len(assignments) != len(embeddings):
        raise ValueError(f"assignments must be {len(embeddings)}, one for each node, got {len(assignments)}")
    rows = full_precision(embeddings)
    across = across_processes and is_distributed()
    if assignments.ndim == 2:
        shares = assignments.to(rows.dtype)
        with without_autocast(rows.device):
            sums, sizes = shares.T @ rows, shares.sum(0)
    else:
        if clusters is None:
            largest = assignments.amax().reshape(1) if len(assignments) else assignments.new_tensor([-1])
            clusters = int((gather_with_gradient(largest) if across else largest).amax()) + 1
        sums = segment_sum(rows, assignments, clusters)
        sizes = segment_sizes(assignments, clusters).to(rows.dtype)
    if across:
        sums, sizes = (all_reduce_mean(part) * world_size() for part in (sums, sizes))
    return sums, sizes


def meta_node_contrast_loss(
    embeddings: Float[Tensor, "nodes dim"],
    edges: Int[Tensor, "2 edges"],
    assignments: Int[Tensor, " nodes"] | Float[Tensor, "nodes clusters"] | None = None,
    *,
    weights: Float[Tensor, " edges"] | None = None,
    clusters: int | None = None,
    inverse_temperature: float = 0.5,
    exclude_self: bool = True,
    size_weighted: bool = False,
    normalize: bool = True,
    exact: bool = False,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""Cost of nodes that are unlike their neighbours, and of clusters that are like each other.

    $-\frac{1}{|A|} \sum_{i \in A} \log \sum_{j} \gamma_{ij} e^{\tau s_{ij}} + \frac1C \sum_c \log \sum_{c'} e^{\tau \hat s_{cc'}}$ with
    cosines $s$ of nodes and $\hat s$ of cluster sums (`meta_nodes`), and $A$ the nodes with a neighbour. The exact form has the mean of
    $\log \sum_k e^{\tau s_{ik}}$ over all nodes for its second part. $\tau$ multiplies: it is the inverse of the usual temperature.

    Empty clusters are left out. The second part does not depend on the anchors: it keeps clusters apart, each with the same
    weight whatever its size, unless `size_weighted`.

    Args:
        embeddings: one row for each node, of any length.
        edges: node and neighbour of each positive pair, of this process; a graph's edges, or the views of a sample.
        assignments: the cluster of each node or its shares of clusters, as for `meta_nodes`; not needed for `exact`.
        weights: $\gamma \ge 0$ of each edge, without gradient; None for 1.
        clusters: number of clusters, for cluster numbers.
        inverse_temperature: $\tau \ge 0$. 0.1 here is a temperature of 10: almost no contrast.
        exclude_self: take the cosine of a node or cluster with itself for 0, as published; else for 1.
        size_weighted: let cluster c stand for its $n_c$ nodes, as anchor and as negative. Where the nodes of each cluster are equal
            this is the exact loss.
        normalize: sum unit vectors, so that long embeddings do not dominate their cluster; False as published.
        exact: contrast with all nodes.
        across_processes: use the clusters (or nodes) of all processes of a run; False keeps to this one's.

    Returns:
        A scalar, at least float32; 0 for no nodes. It can be differentiated once.

    Raises:
        ValueError: if shapes disagree, or a value is out of range.

    Cost:
        O(edges * dim + nodes * dim + clusters^2 * dim) time and O(edges + nodes * dim) memory; `exact`, streamed,
        O(nodes^2 * dim) time in the same memory.

    Source:
        Kulatilleke, Portmann, Chandra, 2022, arXiv 2209.14067; the exact form is the loss that it approximates.

    Examples:
        >>> nodes, edges = torch.eye(4), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
        >>> loss = meta_node_contrast_loss(nodes, edges, torch.tensor([0, 0, 1, 1]))
        >>> round(loss.item(), 4)  # log 2: orthogonal neighbours cost 0, orthogonal clusters log(1 + 1)
        0.6931
    """
    if not 0 <= inverse_temperature < math.inf:
        raise ValueError(f"inverse_temperature must be >= 0 and finite, got {inverse_temperature}")
    if assignments is None and not exact:
        raise ValueError("assignments must be given unless exact=True, got None")
    if weights is not None and weights.shape != edges.shape[1:]:
        raise ValueError(f"weights must have shape ({edges.shape[1]},), got {tuple(weights.shape)}")
    if weights is not None and not bool((weights >= 0).all()):
        raise ValueError(f"weights must be >= 0, got {weights.min().item()}")
    check_pairs("edges", edges, len(embeddings), len(embeddings))
    ring = across_processes and is_distributed()
    rows = full_precision(embeddings)
    unit = F.normalize(rows, dim=1)

    scores = pair_scores(inverse_temperature * unit, unit, edges, False)
    own = 0.0 if exclude_self else inverse_temperature
    scores = torch.where(edges[0] == edges[1], own, scores)
    if weights is not None:
        scores = scores + weights.detach().to(scores.dtype).log()
    attraction = segment_logsumexp(scores, edges[0], len(rows))
    anchors = attraction > -math.inf
    attraction = reduced(attraction, anchors, "mean", ring)

    if exact:
        repulsion = reduced(_log_sums(unit, inverse_temperature, own, ring=ring), None, "mean", ring)
        return repulsion - attraction
    assert assignments is not None
    sums, sizes = meta_nodes(
        unit if normalize else rows, assignments, clusters, across_processes=across_processes
    )
    lengths = torch.linalg.vector_norm(sums.detach(), dim=1)
    # A sum that cancels out points nowhere; its direction would be rounding noise with a boundless gradient.
    there = (lengths > 1e-6 * lengths.amax()) & (sizes > 0) if len(lengths) else lengths > 0
    nodes, sizes = F.normalize(sums[there], dim=1), sizes[there].detach()
    logs = _log_sums(nodes, inverse_temperature, own, sizes if size_weighted else None)
    share = sizes / sizes.sum() if size_weighted else torch.full_like(sizes, 1 / max(len(sizes), 1))
    return (share * logs).sum() - attraction


class MetaNodeContrast(nn.Module):
    """`meta_node_contrast_loss` as a module.

    Args:
        inverse_temperature, exclude_self, size_weighted, normalize, exact, across_processes: as for the function.

    Returns:
        From `forward(embeddings, edges, assignments=None, weights=None, clusters=None)`: a scalar.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> contrast = MetaNodeContrast(inverse_temperature=2.0)
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> loss = contrast(torch.ones(2, 4), edges, torch.tensor([0, 0]))
        >>> round(loss.item(), 4)  # equal neighbours, one cluster: -tau
        -2.0
    """

    def __init__(
        self,
        inverse_temperature: float = 0.5,
        *,
        exclude_self: bool = True,
        size_weighted: bool = False,
        normalize: bool = True,
        exact: bool = False,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= inverse_temperature < math.inf:
            raise ValueError(f"inverse_temperature must be >= 0 and finite, got {inverse_temperature}")
        self.inverse_temperature, self.exclude_self = inverse_temperature, exclude_self
        self.size_weighted, self.normalize, self.exact = size_weighted, normalize, exact
        self.across_processes = across_processes

    def forward(
        self,
        embeddings: Float[Tensor, "nodes dim"],
        edges: Int[Tensor, "2 edges"],
        assignments: Int[Tensor, " nodes"] | Float[Tensor, "nodes clusters"] | None = None,
        weights: Float[Tensor, " edges"] | None = None,
        clusters: int | None = None,
    ) -> Float[Tensor, ""]:
        return meta_node_contrast_loss(
            embeddings,
            edges,
            assignments,
            weights=weights,
            clusters=clusters,
            inverse_temperature=self.inverse_temperature,
            exclude_self=self.exclude_self,
            size_weighted=self.size_weighted,
            normalize=self.normalize,
            exact=self.exact,
            across_processes=self.across_processes,
        )


def _log_sums(
    unit: Tensor, inverse_temperature: float, own: float, sizes: Tensor | None = None, *, ring: bool = False
) -> Tensor:
    """log of the sum over all rows of exp(tau * cosine), with `own` for tau times the cosine with itself; each counted `sizes` times."""
    mask = Mask(diagonal=0)
    if sizes is None:
        others, _ = streaming_logsumexp(math.sqrt(inverse_temperature) * unit, None, mask, ring=ring)
        return torch.logaddexp(others, others.new_full((), own))
    # One more coordinate adds the logarithm of a column's size to each of its scores.
    one = unit.new_ones(len(unit), 1)
    columns = torch.cat([unit, sizes.log().unsqueeze(1)], 1)
    others, _ = streaming_logsumexp(torch.cat([inverse_temperature * unit, one], 1), columns, mask)
    mine = (sizes - 1).clamp(min=0).log() + inverse_temperature
    return torch.logaddexp(others, torch.logaddexp(mine, mine.new_full((), own)))
