import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import graph_partition, hop_distance, hop_masks, normalize_adjacency
from coloss.ops.skeleton_graph import check_mirror, check_parents

BODY = [-1, 0, 1, 1, 1]  # hips, chest, head, left hand, right hand


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    count = draw(st.integers(1, 12))
    return [-1, *(draw(st.integers(0, joint - 1)) for joint in range(1, count))]


@settings(max_examples=20)
@given(trees())
def test_hop_rings_divide_all_pairs_of_joints(parents: list[int]) -> None:
    masks = hop_masks(parents, len(parents))
    assert bool((masks.int().sum(0) == 1).all())
    assert torch.equal(masks, masks.transpose(1, 2))
    assert torch.equal(masks[0], torch.eye(len(parents)).bool())


@settings(max_examples=20)
@given(trees())
def test_distance_is_that_of_paths_through_the_nearest_common_ancestor(parents: list[int]) -> None:
    def ancestors(joint: int) -> list[int]:
        return [joint, *(ancestors(parents[joint]) if parents[joint] >= 0 else [])]

    distance = hop_distance(parents)
    for one in range(len(parents)):
        for other in range(len(parents)):
            up, down = ancestors(one), ancestors(other)
            expected = min(up.index(joint) + down.index(joint) for joint in up if joint in down)
            assert int(distance[one, other]) == expected


def test_hops_are_exact_distances_and_not_counts_of_walks() -> None:
    adjacency = (hop_distance(BODY) == 1).float()
    walks = adjacency @ adjacency
    assert float(walks.diagonal().min()) > 0  # two steps lead back
    assert not bool(hop_masks(BODY, 2)[2].diagonal().any())


def test_joints_of_separate_trees_are_unreachable() -> None:
    assert hop_distance([-1, -1]).tolist() == [[0, -1], [-1, 0]]


def test_spatial_partition_is_one_mean_by_distance_to_the_centre() -> None:
    subsets = graph_partition(BODY, "spatial", centre=1)
    assert torch.allclose(subsets.sum((0, 2)), torch.ones(5))
    # The hand takes half from itself and half from the chest, which is nearer to the centre.
    assert subsets[:, 3].tolist() == [[0, 0, 0, 0.5, 0], [0, 0.5, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert float(subsets[2, 1].sum()) == pytest.approx(4 / 5)  # all four neighbours are farther


def test_directed_partition_takes_from_the_parent_and_from_children_apart() -> None:
    itself, parent, children = graph_partition(BODY, "directed")
    assert torch.equal(itself, torch.eye(5))
    assert parent[3].tolist() == [0, 1, 0, 0, 0]
    assert children[1].tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert float(parent[0].abs().sum()) == 0  # the root has no parent: nothing, not NaN


def test_symmetric_partition_links_left_and_right() -> None:
    subsets = graph_partition(BODY, "symmetric", mirror=[0, 1, 2, 4, 3])
    assert subsets.shape[0] == 4
    assert float(subsets[3, 3, 4]) > 0
    assert float(subsets[3, 2, 2]) == 0  # a joint on the middle line is no partner of its own
    assert torch.allclose(subsets.sum((0, 2)), torch.ones(5))


@pytest.mark.parametrize("kind", ["uniform", "distance", "directed"])
def test_each_subset_is_a_mean_or_nothing(kind) -> None:
    sums = graph_partition(BODY, kind).sum(2)
    assert bool(((sums - 1).abs().lt(1e-6) | (sums == 0)).all())


def test_symmetric_normalisation_divides_by_the_roots_of_both_degrees() -> None:
    adjacency = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]])
    assert torch.allclose(normalize_adjacency(adjacency, symmetric=True)[0, 1], torch.tensor(0.5**0.5))


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "parents must have a number for each joint, got none"),
        ([-1, 5], r"parents must be joints in \[0, 2\) or -1 at a root, got 5 for joint 1"),
        ([1, 0], "joint 0 hangs on itself in a circle"),
    ],
)
def test_parents_that_are_no_tree_are_refused(parents, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_parents(parents)


def test_arguments_out_of_range_are_refused(as_users_call) -> None:
    with pytest.raises(ValueError, match="max_hop must be >= 0, got -1"):
        hop_masks(BODY, -1)
    with pytest.raises(ValueError, match="kind must be one of uniform, .*, got 'round'"):
        graph_partition(BODY, "round")
    with pytest.raises(ValueError, match=r"centre must be a joint in \[0, 5\), got 7"):
        graph_partition(BODY, centre=7)
    with pytest.raises(ValueError, match="mirror must name the partner .*, got None"):
        graph_partition(BODY, "symmetric")
    with pytest.raises(ValueError, match="mirror must swap 2 joints in pairs"):
        check_mirror([1, 1], 2)
