"""Graphs of nodes for losses on neighbours: from nearest neighbours, and to neighbours of neighbours."""

import warnings
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.metrics import nearest_neighbours


def knn_graph(
    features: Float[Tensor, "nodes *shape"],
    k: int = 5,
    *,
    metric: Literal["cosine", "euclidean"] = "euclidean",
    self_loops: bool = True,
) -> Tensor:
    """The graph that joins each node and its k nearest neighbours, both ways, with rows that sum to 1.

    Args:
        features: of each node, flattened.
        k: neighbours, >= 1; capped at the other nodes. A node has more edges where others have it for a neighbour.
        metric: of nearness.
        self_loops: join each node with itself.

    Returns:
        A sparse COO tensor (nodes, nodes), coalesced, float32: 1 / edges of the row at each edge. Without self loops a single node has
        no edge.

    Raises:
        ValueError: for features that are not finite, or k < 1.

    Cost:
        O(nodes^2 * dim) time once, see `coloss.metrics.nearest_neighbours`; O(nodes * k) memory.

    Examples:
        >>> knn_graph(torch.tensor([[0.0], [1.0], [5.0]]), 1).to_dense()
        tensor([[0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333],
                [0.0000, 0.5000, 0.5000]])
    """
    points = features.detach().flatten(1)
    count = len(points)
    found = nearest_neighbours(points, points, k, metric=metric, exclude=True).indices
    rows = torch.arange(count, device=points.device).unsqueeze(1).expand_as(found)[found >= 0]
    columns = found[found >= 0]
    itself = torch.arange(count if self_loops else 0, device=points.device)
    first, second = torch.cat([rows, columns, itself]), torch.cat([columns, rows, itself])
    number = (first * count + second).unique()
    pairs = torch.stack([number // max(count, 1), number % max(count, 1)])
    degrees = torch.bincount(pairs[0], minlength=count)
    return torch.sparse_coo_tensor(
        pairs, 1 / degrees[pairs[0]].float(), (count, count), is_coalesced=True, check_invariants=False
    )


def influence(adjacency: Tensor, order: int = 2, *, cumulative: bool = True) -> Tensor:
    r"""How much each node weighs for each other over paths of several edges.

    $A + A^2 + \dots + A^r$ for the `adjacency` $A$ and `order` $r$; without `cumulative` $A^r$ alone. With rows that sum to 1, rows of
    the result sum to r, or to 1.

    Args:
        adjacency: (nodes, nodes), sparse COO or dense.
        order: r >= 1.
        cumulative: add the powers up.

    Returns:
        In the layout of `adjacency`; sparse ones coalesced.

    Raises:
        ValueError: if it is no square matrix, or order < 1.

    Cost:
        Each power of a sparse graph has the edges of all paths: it fills in quickly, and with it memory and the cost of the loss.

    Examples:
        >>> influence(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2)
        tensor([[1., 1.],
                [1., 1.]])
    """
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency must be a square matrix, got shape {tuple(adjacency.shape)}")
    if order < 1:
        raise ValueError(f"order must be >= 1, got {order}")
    power = total = adjacency
    for _ in range(order - 1):
        with warnings.catch_warnings():
            # torch multiplies by way of another layout, which it calls new.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            power = torch.sparse.mm(power, adjacency) if adjacency.is_sparse else power @ adjacency
        total = total + power if cumulative else power
    return total.coalesce() if total.is_sparse else total
