import pytest
import torch

from coloss.distillation import PredictionMemory, soften_targets
from coloss.ops import soft_cross_entropy_loss


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 1.0])
def test_soft_targets_sum_to_one(share: float) -> None:
    past = (9 * torch.randn(5, 4, dtype=torch.float64)).softmax(1)
    soft = soften_targets(torch.randint(4, (5,)), past, share)
    torch.testing.assert_close(soft.sum(1), torch.ones(5, dtype=torch.float64))
    assert bool((soft >= 0).all())


def test_the_gradient_of_the_cross_entropy_is_prediction_minus_target() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    past = torch.randn(6, 3, dtype=torch.float64).softmax(1)
    soft = soften_targets(torch.randint(3, (6,)), past, 0.7)
    (gradient,) = torch.autograd.grad(soft_cross_entropy_loss(logits, soft), logits)
    torch.testing.assert_close(gradient, (logits.softmax(1) - soft).detach() / 6)


def test_no_share_or_no_past_leaves_the_labels() -> None:
    past, targets = torch.full((2, 3), 1 / 3), torch.tensor([2, 0])
    labels = torch.eye(3)[targets]
    assert torch.equal(soften_targets(targets, past, 0.0), labels)
    assert torch.equal(soften_targets(targets, past, 1.0), past)
    unseen = torch.tensor([False, True])
    nothing = torch.stack([torch.full((3,), torch.nan), past[0]])  # what is not there does no harm
    assert torch.equal(soften_targets(targets, nothing, 1.0, unseen)[0], labels[0])


def test_targets_of_several_copies_share_what_is_known_of_the_sample() -> None:
    past = torch.full((2, 3, 4), 0.25)
    targets = torch.tensor([[0, 1, 2], [3, 3, 3]])
    soft = soften_targets(targets, past, 0.4, torch.tensor([True, False]))
    torch.testing.assert_close(soft[0], 0.6 * torch.eye(4)[targets[0]] + 0.1)
    assert torch.equal(soft[1], torch.eye(4)[targets[1]])


def test_nothing_learns_through_the_past() -> None:
    past = torch.full((1, 2), 0.5, requires_grad=True)
    assert not soften_targets(torch.tensor([0]), past, 0.5).requires_grad


def test_half_precision_loses_no_mass() -> None:
    """A thousand classes in float16 sum to 1 only to three digits."""
    probabilities = (4 * torch.randn(20, 1000)).softmax(1)
    memory, ids = PredictionMemory({"classes": (1000,)}), torch.arange(20)
    memory.write(ids, 0, {"classes": probabilities})
    stored = memory.rows.read(ids)[0]["classes"]
    assert stored.dtype == torch.float16
    assert (stored.float().sum(1) - 1).abs().max() > 1e-5
    found = memory.read(ids, 1)[0]["classes"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(20), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, probabilities, rtol=2e-3, atol=1e-6)


def test_a_row_counts_for_max_age_epochs() -> None:
    """Samplers that leave samples out make rows go stale."""
    ids, row = torch.tensor([5]), {"classes": torch.tensor([[0.25, 0.75]])}
    for max_age in (1, 3):
        memory = PredictionMemory({"classes": (2,)}, max_age=max_age)
        assert not memory.read(ids, 0)[1].any()
        memory.write(ids, 2, row)
        assert [bool(memory.read(ids, epoch)[1]) for epoch in (2, 3, 4, 5, 6)] == [
            epoch <= 2 + max_age for epoch in (2, 3, 4, 5, 6)
        ]


def test_epochs_are_counted_beyond_what_half_precision_can() -> None:
    memory, ids = PredictionMemory({"classes": (2,)}), torch.tensor([0])
    memory.write(ids, 4097, {"classes": torch.tensor([[0.5, 0.5]])})
    assert bool(memory.read(ids, 4098)[1]) and not bool(memory.read(ids, 4099)[1])


def test_a_repeated_id_gets_the_mean() -> None:
    memory = PredictionMemory({"classes": (2,)})
    memory.write(torch.tensor([1, 1]), 0, {"classes": torch.tensor([[1.0, 0.0], [0.5, 0.5]])})
    assert memory.read(torch.tensor([1]), 1)[0]["classes"].tolist() == [[0.75, 0.25]]


def test_the_memory_is_stored_whole() -> None:
    memory, other = (PredictionMemory({"classes": (2,), "joint": (3, 4)}) for _ in range(2))
    rows = {"classes": torch.rand(2, 2).softmax(1), "joint": torch.rand(2, 3, 4).softmax(2)}
    memory.write(torch.tensor([9, 4]), 3, rows)
    other.load_state_dict(memory.state_dict())
    ids = torch.tensor([4, 9, 0])
    (first, seen), (second, also) = memory.read(ids, 4), other.read(ids, 4)
    assert seen.tolist() == also.tolist() == [True, True, False]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.5"):
        soften_targets(torch.tensor([0]), torch.ones(1, 1), 1.5)
    with pytest.raises(ValueError, match="max_age must be >= 1 epoch, got 0"):
        PredictionMemory({"classes": (2,)}, max_age=0)
    with pytest.raises(
        ValueError, match=r"shapes must be of one or more sizes >= 1, got \(0,\) for 'classes'"
    ):
        PredictionMemory({"classes": (0,)})
