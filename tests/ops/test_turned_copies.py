import pytest
import torch

from coloss.ops import joint_labels, marginal_logits, quarter_turns, rotate4, transform_copies


def test_copies_stand_beside_each_other_and_the_first_is_the_image() -> None:
    images = torch.randn(3, 2, 5, 5)
    copies = rotate4(images)
    assert copies.shape == (12, 2, 5, 5)
    assert torch.equal(copies[0::4], images)
    assert torch.equal(copies[6], images[1].flip(-1).flip(-2))  # half a turn mirrors both axes


def test_half_a_turn_twice_and_four_quarters_are_the_identity() -> None:
    images = torch.randn(2, 1, 4, 4)
    assert torch.equal(rotate4(rotate4(images)[2::4])[2::4], images)
    quarter, half, three = quarter_turns()
    assert torch.equal(quarter(three(images)), images)
    assert torch.equal(half(half(images)), images)


def test_joint_labels_hold_class_and_version() -> None:
    targets = torch.tensor([3, 0, 7])
    joint = joint_labels(targets, 4)
    assert torch.equal(joint // 4, targets.repeat_interleave(4))
    assert torch.equal(joint % 4, torch.arange(4).repeat(3))
    assert torch.equal(joint_labels(targets, 1), targets)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_joint_labels_of_small_whole_numbers_do_not_overflow(dtype: torch.dtype) -> None:
    assert joint_labels(torch.tensor([100, 3], dtype=dtype), 4).tolist() == [
        400,
        401,
        402,
        403,
        12,
        13,
        14,
        15,
    ]


def test_the_marginal_of_a_joint_distribution_is_its_summed_probability() -> None:
    logits = 5 * torch.randn(6, 12, dtype=torch.float64)
    summed = logits.softmax(1).view(6, 4, 3).sum(2)
    torch.testing.assert_close(marginal_logits(logits, 3).softmax(1), summed)
    torch.testing.assert_close(marginal_logits(logits, 3, "sum"), logits.view(6, 4, 3).sum(2))
    assert torch.equal(marginal_logits(logits, 1, "sum"), logits)


def test_the_sum_of_logits_may_choose_another_class_than_the_sum_of_probabilities() -> None:
    logits = torch.tensor([[5.0, -6.0, 1.0, 1.0]])
    assert marginal_logits(logits, 2).argmax() == 0
    assert marginal_logits(logits, 2, "sum").argmax() == 1


def test_marginals_keep_impossible_classes_and_leave_half_precision() -> None:
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 3] = 0.0
    assert marginal_logits(logits, 2).tolist() == [[-torch.inf, 0.0]]
    assert marginal_logits(torch.full((1, 4), 6e4, dtype=torch.float16), 4, "sum").item() == pytest.approx(
        4 * torch.tensor(6e4, dtype=torch.float16).item()
    )


def test_an_empty_batch_has_no_copies() -> None:
    assert rotate4(torch.empty(0, 1, 4, 4)).shape == (0, 1, 4, 4)
    assert joint_labels(torch.empty(0, dtype=torch.int64), 4).shape == (0,)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be square .* got shape \(1, 1, 2, 3\)"):
        quarter_turns()[0](torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="transformations must hold at least one function, got none"):
        transform_copies(torch.zeros(2, 3), [])
    with pytest.raises(ValueError, match=r"must keep the shape \(2, 3\), got \(2, 2\) from number 1"):
        transform_copies(torch.zeros(2, 3), [torch.neg, lambda x: x[:, :2]])
    with pytest.raises(ValueError, match="copies must be >= 1, got 0"):
        joint_labels(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match=r"multiple of copies = 4 .* got \(2, 6\)"):
        marginal_logits(torch.zeros(2, 6), 4)
