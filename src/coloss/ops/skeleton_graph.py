"""Trees of joints as graphs: hop distances, and the adjacency matrices that graph convolutions on skeletons take.

A skeleton is given by its parents: `parents[v]` is the joint that joint v hangs on, -1 at the root. Matrices are indexed
[receiving joint, giving joint]: row u holds the weights with which joint u takes from the others.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path
from torch import Tensor

Partition = Literal["uniform", "distance", "spatial", "directed", "symmetric"]


def check_parents(parents: Sequence[int]) -> tuple[int, ...]:
    """Parents as whole numbers, after a look at what they describe.

    Raises:
        ValueError: for no joints, a parent that is no joint, or joints that hang on one another in a circle.

    Examples:
        >>> check_parents([-1, 0, 1])
        (-1, 0, 1)
        >>> check_parents([1, 0])
        Traceback (most recent call last):
        ...
        ValueError: parents must lead to a root (-1) from every joint, joint 0 hangs on itself in a circle
    """
    found = tuple(int(parent) for parent in parents)
    if not found:
        raise ValueError("parents must have a number for each joint, got none")
    for joint, parent in enumerate(found):
        if not -1 <= parent < len(found):
            raise ValueError(
                f"parents must be joints in [0, {len(found)}) or -1 at a root, got {parent} for joint {joint}"
            )
    for joint in range(len(found)):
        at, steps = joint, 0
        while at != -1:
            at, steps = found[at], steps + 1
            if steps > len(found):
                raise ValueError(
                    f"parents must lead to a root (-1) from every joint, joint {joint} hangs on itself in a circle"
                )
    return found


def hop_distance(parents: Sequence[int]) -> Int[Tensor, "joints joints"]:
    """Number of bones between each two joints, by breadth-first search; -1 where nothing connects them.

    Args:
        parents: of each joint, -1 at the root.

    Returns:
        int64 (joints, joints), symmetric, 0 on the diagonal.

    Raises:
        ValueError: if the parents are no tree.

    Examples:
        >>> hop_distance([-1, 0, 1, 0])
        tensor([[0, 1, 2, 1],
                [1, 0, 1, 2],
                [2, 1, 0, 3],
                [1, 2, 3, 0]])
    """
    found = check_parents(parents)
    child = [joint for joint, parent in enumerate(found) if parent >= 0]
    parent = [found[joint] for joint in child]
    edges = csr_array((np.ones(len(child)), (child, parent)), shape=(len(found), len(found)))
    distances = shortest_path(edges, directed=False, unweighted=True)
    return torch.from_numpy(np.where(np.isinf(distances), -1, distances).astype(np.int64))


def hop_masks(parents: Sequence[int], max_hop: int) -> Bool[Tensor, "hops joints joints"]:
    """Which joints are exactly k bones apart, for k = 0 to `max_hop`.

    Exact distances, not powers of the adjacency matrix, which count walks: two steps lead back to where they began.

    Args:
        parents: of each joint, -1 at the root.
        max_hop: largest distance, >= 0.

    Returns:
        bool (max_hop + 1, joints, joints); a ring may be empty for some joints.

    Raises:
        ValueError: if the parents are no tree, or for a negative hop.

    Examples:
        >>> hop_masks([-1, 0, 1], 2).int()[2]
        tensor([[0, 0, 1],
                [0, 0, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    if max_hop < 0:
        raise ValueError(f"max_hop must be >= 0, got {max_hop}")
    return hop_distance(parents) == torch.arange(max_hop + 1)[:, None, None]


def normalize_adjacency(
    adjacency: Float[Tensor, "*subsets joints joints"], *, symmetric: bool = False
) -> Float[Tensor, "*subsets joints joints"]:
    """Each joint's incoming weights divided by their sum, so that it takes a mean; a joint that takes nothing stays at 0.

    Args:
        adjacency: [..., receiving, giving], weights >= 0.
        symmetric: D^-1/2 A D^-1/2 instead of D^-1 A, with D the sums of the rows.

    Examples:
        >>> normalize_adjacency(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]])
    """
    degrees = adjacency.sum(-1)
    inverse = torch.where(degrees > 0, 1 / degrees.clamp_min(torch.finfo(degrees.dtype).tiny), 0)
    if symmetric:
        return inverse.sqrt()[..., :, None] * adjacency * inverse.sqrt()[..., None, :]
    return inverse[..., :, None] * adjacency


def graph_partition(
    parents: Sequence[int],
    kind: Partition = "spatial",
    *,
    centre: int | None = None,
    mirror: Sequence[int] | None = None,
) -> Float[Tensor, "subsets joints joints"]:
    """Adjacency matrices of a skeleton, one for each kind of neighbour.

    - `uniform`: 1 subset, the joint and its neighbours.
    - `distance`: 2, the joint itself; its neighbours.
    - `spatial`: 3, those as far from the centre as the joint (itself), nearer, farther (Yan, Xiong, Lin, 2018); together a mean.
    - `directed`: 3, the joint itself, its parent, its children, each a mean by itself.
    - `symmetric`: 4, as `spatial` with a fourth for the joint's partner on the body's other side; together a mean.

    Args:
        parents: of each joint, -1 at the root.
        kind: see above.
        centre: joint from which `spatial` and `symmetric` count; the root by default.
        mirror: partner of each joint on the other side (itself on the middle line), for `symmetric`.

    Returns:
        float32 (subsets, joints, joints), [k, u, v] the weight with which u takes from v. Weights of a joint that has no neighbour of a
        kind are 0.

    Raises:
        ValueError: if the parents are no tree, for an unknown kind, a centre that is no joint, or a missing or odd mirror.

    Examples:
        >>> graph_partition([-1, 0, 0], "spatial")[2]
        tensor([[0.0000, 0.3333, 0.3333],
                [0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    if kind not in get_args(Partition):
        raise ValueError(f"kind must be one of {', '.join(get_args(Partition))}, got {kind!r}")
    found = check_parents(parents)
    joints = len(found)
    if centre is None:
        centre = found.index(-1)
    if not 0 <= centre < joints:
        raise ValueError(f"centre must be a joint in [0, {joints}), got {centre}")
    distance = hop_distance(found)
    itself, neighbours = (distance == 0).float(), (distance == 1).float()
    if kind == "uniform":
        return normalize_adjacency(itself + neighbours)[None]
    if kind == "distance":
        return normalize_adjacency(torch.stack([itself, neighbours]))
    if kind == "directed":
        from_parent = torch.zeros(joints, joints)
        for joint, parent in enumerate(found):
            if parent >= 0:
                from_parent[joint, parent] = 1
        return normalize_adjacency(torch.stack([itself, from_parent, from_parent.T]))
    depth = distance[centre]
    nearer = neighbours * (depth[None, :] < depth[:, None])
    subsets = [itself + neighbours * (depth[None, :] == depth[:, None]), nearer]
    subsets.append(neighbours * (depth[None, :] > depth[:, None]))
    if kind == "symmetric":
        partner = check_mirror(mirror, joints)
        links = torch.zeros(joints, joints)
        links[torch.arange(joints), torch.tensor(partner)] = 1
        subsets.append(links * (1 - itself))
    stacked = torch.stack(subsets)
    # The subsets share one mean, so that a joint with many neighbours is not louder than one at the end of a limb.
    return stacked / stacked.sum((0, 2))[None, :, None]


def check_mirror(mirror: Sequence[int] | None, joints: int) -> tuple[int, ...]:
    """Partners on the body's other side, after a look that they are partners of each other.

    Raises:
        ValueError: if there are none, or they are no such pairs.

    Examples:
        >>> check_mirror([0, 2, 1], 3)
        (0, 2, 1)
    """
    if mirror is None:
        raise ValueError("mirror must name the partner of each joint on the other side, got None")
    partner = tuple(int(joint) for joint in mirror)
    if len(partner) != joints or any(
        not 0 <= other < joints or partner[other] != joint for joint, other in enumerate(partner)
    ):
        raise ValueError(f"mirror must swap {joints} joints in pairs, got {partner}")
    return partner
