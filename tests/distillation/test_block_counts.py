import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coloss import Budget, TrainingStep
from coloss.distillation import (
    AugmentedLocalLearning,
    LocalLearning,
    MomentumLocalLearning,
    block_count_table,
    step_bytes,
)
from coloss.distillation.block_counts import checkpointed_bytes
from coloss.distillation.local_learning_trial import residual_classifier
from coloss.errors import InputError
from coloss.train import SavedActivations


def test_memory_and_quality_by_number_of_blocks():
    data = (torch.rand(64, 1, 8, 8), torch.randint(10, (64,)))
    rows = block_count_table(
        lambda: residual_classifier(16),
        data,
        F.cross_entropy,
        lambda blocks: AugmentedLocalLearning(data[0][:2], blocks=blocks, depth=1, join_last=False),
        [2, 4, 16],
        batch=data,
        evaluate=lambda model: {"loss": float(F.cross_entropy(model(data[0]), data[1]))},
        budget=Budget(steps=1),
        batch_size=32,
    )
    assert [(row.name, row.blocks) for row in rows] == [
        ("backpropagation", 1),
        ("checkpointing", 1),
        ("2 blocks", 2),
        ("4 blocks", 4),
        ("16 blocks", 16),
    ]
    shares = [row.share for row in rows]
    assert shares[0] == 1 and shares[2] > shares[3] > shares[4]
    assert shares[1] < 0.65 and shares[3] < 0.65 and shares[4] < 0.3
    assert rows[1].metrics == rows[0].metrics
    assert all(row.metrics["loss"] > 0 and row.saved_bytes > 0 for row in rows)


def test_bytes_of_one_step_worked_by_hand_and_the_model_unchanged():
    model = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))
    before = [p.clone() for p in model.parameters()]
    batch = (torch.zeros(100, 10), torch.zeros(100, 1))
    assert step_bytes(model, batch, F.mse_loss) == 4 * 100 * (10 + 10 + 1 + 1)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_checkpointing_leaves_the_model_as_it_was():
    model = residual_classifier(4)
    assert checkpointed_bytes(model, (torch.rand(8, 1, 8, 8), torch.zeros(8).long()), F.cross_entropy) > 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert checkpointed_bytes(nn.Linear(2, 2), (torch.rand(3, 2), torch.rand(3, 2)), F.mse_loss) is None


def test_bad_input():
    with pytest.raises(InputError, match=r"blocks must hold numbers >= 2, got \[1\]"):
        block_count_table(nn.Module, (), F.mse_loss, lambda blocks: LocalLearning(0), [1], batch=(0, 0))


def test_no_bytes_outlive_the_backward_pass_and_few_blocks_save_too():
    data = (torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))
    model = residual_classifier(16, in_channels=3)
    whole = step_bytes(model, data, F.cross_entropy)
    for kind in (LocalLearning, AugmentedLocalLearning, MomentumLocalLearning):
        step = TrainingStep(model.train(), F.cross_entropy, [kind(data[0][:2], blocks=2)])
        with SavedActivations(step) as meter:
            step.backward(step(*data))
            assert meter.held == 0
        assert meter.peak < 0.65 * whole
        step.finish()


def test_the_network_s_code_cannot_keep_a_block_in_memory():
    """A local variable of the forward pass holds the graph of the first block until the end."""

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

        def forward(self, x):
            kept = self.layers[0](x)
            return self.layers[3](self.layers[2](self.layers[1](kept)))

    data = (torch.randn(100, 8), torch.randn(100, 8))
    step = TrainingStep(Holds(), F.mse_loss, [LocalLearning(data[0][:2], blocks=2)])
    held = []
    with SavedActivations(step) as meter:
        step.model.layers[3].register_forward_pre_hook(lambda module, args: held.append(meter.held))
        step(*data)
    assert held == [2 * 3200]  # input and output of the third layer alone
