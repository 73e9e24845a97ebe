"""A task's settings are the same for every trial of it."""

import torch
from torch import Tensor, nn

from coloss.lab import find_task
from coloss.train import Budget, Setting


class Learnt(nn.Module):
    """Cross-entropy with a scale that is learnt along."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.scale * outputs, targets)


def test_an_objective_that_learns_begins_anew_in_each_run():
    objective = Learnt()
    setting = Setting.of(find_task("iris"), seed=0, budget=Budget(steps=5))
    first, second = (setting.fit(setting.new_model(), objective) for _ in range(2))
    assert objective.scale == 1
    assert first.history[-1].terms == second.history[-1].terms
    for one, other in zip(first.model.parameters(), second.model.parameters()):
        assert torch.equal(one, other)
