"""Plans: what cannot be is refused before anything is trained, and choices follow the data."""

import pytest
import torch

from coloss.data import IndexedDataset, Splits, load
from coloss.distillation import DistillationPlan, plan_for
from coloss.errors import InputError


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_start": 12}, "max_start - 1 \\+ expert_steps must be <= expert_epochs, got 13 and 12"),
        ({"start": "best"}, "start must be random or kmeans, got 'best'"),
        ({"networks": 0}, "networks must be >= 1, got 0"),
        ({"steps": 1}, "steps must be >= expert_steps to match points between, got 1"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"expert_steps": 0}, "expert_steps must be >= 1, got 0"),
        ({"max_start": 0}, "max_start must be >= 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be > 0 and finite, got -1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"intermediate": "nope"}, "intermediate must be none, equal or rising, got nope"),
        ({"perturbation": -1.0}, "perturbation must be >= 0, got -1"),
        ({"inner_batch": 0}, "inner_batch must be >= 1, got 0"),
        ({"image_rate": 0.0}, "image_rate must be > 0, got 0"),
        ({"clip": 0.0}, "clip must be > 0, got 0"),
        ({"truncate": 0}, "truncate must be >= 1, got 0"),
        ({"expert_rate": 0.0}, "expert_rate must be > 0, got 0"),
        ({"expert_momentum": 2.0}, r"expert_momentum must be in \[0, 1\), got 2"),
        ({"expert_decay": -1.0}, "expert_decay must be >= 0, got -1"),
        ({"expert_batch": 0}, "expert_batch must be >= 1, got 0"),
        ({"penalty": -1.0}, "penalty must be >= 0, got -1"),
        ({"augmentation": "x"}, "augmentation must be none, shifted, mirrored, got 'x'"),
    ],
)
def test_plans_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillationPlan(**options)


def test_fifty_images_of_a_class_are_unrolled_in_parts() -> None:
    splits = load("digits")
    assert plan_for(splits, 50).inner_batch == 100
    assert plan_for(splits, 1).inner_batch is None
    assert plan_for(splits, 1).augmentation == "none"


def test_experts_train_no_longer_than_they_are_matched_unless_the_trained_one_is_needed() -> None:
    plan = DistillationPlan(expert_epochs=12, max_start=6, expert_steps=2)
    assert plan.trained_epochs == 7
    assert (
        DistillationPlan(expert_epochs=12, max_start=6, expert_steps=2, start="kmeans").trained_epochs == 12
    )


@pytest.mark.parametrize(("channels", "augmentation"), [(1, "shifted"), (3, "mirrored")])
def test_larger_images_have_a_faster_student_more_outer_steps_and_augmentation(
    channels: int, augmentation: str
) -> None:
    images = torch.zeros(2, channels, 16, 16)
    part = IndexedDataset(images, torch.arange(2))
    shape = (channels, 16, 16)
    splits = Splits("x", "classification", part, part, part, input_shape=shape, num_classes=2)
    plan = plan_for(splits)
    assert (plan.learning_rate, plan.outer_steps, plan.augmentation) == (0.1, 1000, augmentation)
    assert (plan.inner_batch, plan.checkpoint) == (None, False)
    many = plan_for(splits, 51)
    assert (many.inner_batch, many.checkpoint) == (100, True)
