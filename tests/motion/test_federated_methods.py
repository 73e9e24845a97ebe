"""Block distillation and FedProx: zero where training begins, a teacher that stays as it was, the contract of methods."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, differing, weights
from torch import nn

import coloss
from coloss import Budget
from coloss.errors import InputError
from coloss.motion import BlockDistillation, ProximalTerm, block_distillation_loss, proximal_loss
from coloss.train import Method

BLOCKS = ["0", "2"]


def net(norm: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    middle = nn.BatchNorm1d(6) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 6), nn.Linear(6, 3)).to(dtype)


def data(rows: int = 24, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, generator=generator, dtype=dtype), torch.randint(
        3, (rows,), generator=generator
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = data()
    return [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]


def test_the_loss_worked_by_hand():
    student = [torch.tensor([[[3.0], [4.0]], [[0.0], [0.0]]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])]
    teacher = [torch.tensor([[[4.0], [3.0]], [[0.0], [1.0]]]), torch.tensor([[0.0, 9.0], [5.0, 0.0]])]
    first = (2 * 0.2**2 + 1) / 2
    assert block_distillation_loss(student, teacher, 1).item() == pytest.approx(first)
    assert block_distillation_loss(student, teacher, 2).item() == pytest.approx((first + 1) / 2)
    plain = block_distillation_loss(student, teacher, 1, normalized=False)
    assert plain.item() == pytest.approx((1 + 1 + 1) / 4)


def test_the_teacher_gets_no_gradient():
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    block_distillation_loss([student], [teacher], 1).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    zeros = torch.zeros(3, 4, requires_grad=True)
    block_distillation_loss([zeros], [teacher], 1).backward()
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_maps_and_half_precision(scale):
    one, other = torch.randn(3, 8), torch.randn(3, 8)
    usual = block_distillation_loss([one], [other], 1)
    torch.testing.assert_close(block_distillation_loss([scale * one], [other], 1), usual)
    assert block_distillation_loss([one.bfloat16()], [one.bfloat16()], 1) == 0
    assert block_distillation_loss([one.bfloat16()], [other], 1).dtype == torch.float32
    assert block_distillation_loss([one * torch.nan], [other], 1).isnan()
    assert block_distillation_loss([one[:0]], [other[:0]], 1) == 0


def test_bad_blocks():
    one = [torch.zeros(2, 3)]
    with pytest.raises(ValueError, match=r"blocks must be in \[1, 1\].*got 2"):
        block_distillation_loss(one, one, 2)
    with pytest.raises(ValueError, match=r"one shape in block 1, got \(2, 3\) and \(2, 4\)"):
        block_distillation_loss(one, [torch.zeros(2, 4)], 1)
    for bad, message in (((), "one block or more"), ("0", "one block or more")):
        with pytest.raises(InputError, match=message):
            BlockDistillation(bad)
    with pytest.raises(InputError, match="weight must be >= 0"):
        BlockDistillation(["0"], -1.0)
    with pytest.raises(InputError, match="must name a module of the model, got '9'"):
        coloss.fit(net(), data(), F.cross_entropy, [BlockDistillation(["9"])], budget=Budget(steps=1))


class Watch(Method):
    """Records the distillation term, and the teacher before and after."""

    def __init__(self, distillation: BlockDistillation) -> None:
        super().__init__()
        self.__dict__["of"] = distillation
        self.seen: list[float] = []
        self.states: list[dict] = []

    def on_batch(self, state):
        self.states.append(weights(self.of.teacher))

    def on_step(self, state):
        self.seen.append(state.terms["block_distillation"].item())
        assert not self.of.teacher.module.training
        assert not any(p.requires_grad for p in self.of.teacher.parameters())


@pytest.mark.parametrize("norm", [False, True])
def test_zero_right_after_the_download_and_a_teacher_that_is_no_live_copy(norm):
    model = net(norm)
    start = copy.deepcopy(model)
    if norm:  # as in evaluation mode, where training and stored statistics are the same
        model[1] = model[1].eval()
        model[1].train = lambda mode=True: model[1]  # type: ignore[method-assign,assignment]
    distillation = BlockDistillation(BLOCKS)
    watch = Watch(distillation)
    coloss.fit(model, data(), F.cross_entropy, [distillation, watch], budget=Budget(steps=4), batch_size=8)
    assert watch.seen[0] == 0.0
    assert watch.seen[-1] > 0
    assert not differing(watch.states[0], watch.states[-1])
    assert not differing(weights(start), weights(distillation.teacher.module))


def test_training_statistics_leave_the_teacher_alone():
    distillation = BlockDistillation(BLOCKS)
    watch = Watch(distillation)
    coloss.fit(
        net(True), data(), F.cross_entropy, [distillation, watch], budget=Budget(steps=3), batch_size=8
    )
    assert not differing(watch.states[0], watch.states[-1])
    assert distillation.teacher.module[1].num_batches_tracked == 0


def test_proximal_loss_and_its_gradient():
    values = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)]
    start = [torch.tensor([0.0, 2.0]), torch.tensor([[1.0]])]
    loss = proximal_loss(values, start)
    assert loss.item() == 2.5
    loss.backward()
    assert [v.grad.flatten().tolist() for v in values] == [[1.0, 0.0], [2.0]]
    with pytest.raises(ValueError, match="equally many"):
        proximal_loss(values, start[:1])
    with pytest.raises(ValueError, match=r"got \(2,\) and \(1,\) at 0"):
        proximal_loss(values[:1], [torch.zeros(1)])


@functools.cache
def trained(weight: float | None = None, private: tuple[str, ...] = (), steps: int = 6) -> nn.Sequential:
    """After steps with a proximal term of that weight, or without one."""
    model, methods = net(), [] if weight is None else [ProximalTerm(weight, private)]
    coloss.fit(
        model,
        data(),
        F.cross_entropy,
        methods,
        budget=Budget(steps=steps),
        batch_size=8,
        optimizer=lambda p: torch.optim.SGD(p, 0.5),
    )
    return model


def test_fedprox_with_mu_0_is_fedavg_and_with_a_large_mu_stays():
    plain, none, strong = trained(), trained(0.0), trained(1.5)
    assert not differing(weights(plain), weights(none))

    def moved(model):
        return sum((p - q).square().sum() for p, q in zip(model.parameters(), net().parameters()))

    assert moved(strong) < 0.5 * moved(plain)


def test_private_weights_are_not_held():
    held, free = trained(1.5), trained(1.5, ("3",))
    start = net()
    assert (free[3].weight - start[3].weight).norm() > 1.5 * (held[3].weight - start[3].weight).norm()
    with pytest.raises(InputError, match="which has no tensor"):
        trained(1.0, ("9",), 1)
    with pytest.raises(InputError, match="which are all"):
        trained(1.0, ("0", "2", "3"), 1)
    with pytest.raises(InputError, match="weight must be >= 0"):
        ProximalTerm(-0.1)


METHODS = {
    "distillation": lambda: BlockDistillation(BLOCKS, 2.0),
    "proximal": lambda: ProximalTerm(0.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_three_loops_take_the_same_steps(name):
    check_loops(net, METHODS[name], batches(), F.cross_entropy, epochs=1)


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_resumes_to_the_bit(name, tmp_path):
    check_resume(
        net, METHODS[name], data(), tmp_path, F.cross_entropy, steps=5, kill_at=4, checkpoint_every=3
    )


def test_two_processes_take_the_steps_of_one(tmp_path):
    def train(fabric):
        model = net(dtype=torch.float64)
        run = coloss.fit(
            model,
            data(dtype=torch.float64),
            F.cross_entropy,
            [BlockDistillation(BLOCKS, 2.0), ProximalTerm(0.5)],
            budget=Budget(steps=3),
            batch_size=8,
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
            fabric=fabric,
        )
        return weights(run.model)

    check_two_processes(train, tmp_path)
