from functools import partial

import pytest
import torch
from torch import Tensor

from coloss.distillation import LogitDistillation, dist_loss, dkd_loss, logit_loss


def test_a_partial_of_a_named_loss_is_that_loss_with_its_options() -> None:
    student, teacher, targets = torch.randn(8, 4), torch.randn(8, 4), torch.randint(4, (8,))
    dist = logit_loss(
        partial(partial(dist_loss, class_weight=2.0), temperature=3.0), options={"sample_weight": 0.5}
    )
    expected = dist_loss(student, teacher, 3.0, class_weight=2.0, sample_weight=0.5)
    assert dist.batch_statistic and torch.equal(dist(student, teacher), expected)
    dkd = logit_loss(partial(dkd_loss, other_weight=2.0))
    assert not dkd.batch_statistic
    assert torch.equal(
        dkd(student, teacher, targets), dkd_loss(student, teacher, targets, 4.0, other_weight=2.0)
    )


def test_what_belongs_to_the_batch_as_a_whole_is_seen_through_a_partial() -> None:
    def own_loss(student: Tensor, teacher: Tensor, temperature: float, *, scale: float = 1.0) -> Tensor:
        return scale * (student - teacher).var()

    assert not logit_loss(partial(own_loss, scale=2.0)).batch_statistic
    own_loss.batch_statistic = True  # type: ignore[attr-defined]
    assert logit_loss(partial(own_loss, scale=2.0)).batch_statistic
    assert LogitDistillation(
        teacher_logits=torch.zeros(2, 3), loss=partial(dist_loss, class_weight=2.0)
    ).batch_statistic


def test_options_of_a_partial_of_a_named_loss_are_checked() -> None:
    with pytest.raises(ValueError, match="must be among class_weight, sample_weight, got weight"):
        logit_loss(partial(dist_loss, class_weight=2.0), options={"weight": 1.0})
