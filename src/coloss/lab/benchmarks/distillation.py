"""Distillation losses over a large vocabulary, forward and backward, beside the usual formulation with two softmaxes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.lab.benchmarks.measure import Report, cost_in_fresh_process, interleaved, silent
from coloss.lab.benchmarks.output_layer import timed
from coloss.lab.benchmarks.row import Row
from coloss.ops import distillation_kl_loss, dkd_loss

TEMPERATURE = 4.0
ONE_PASS, USUAL = "one pass", "two softmaxes"


def measure(
    report: Report = silent, *, vocabulary: int = 50_000, rows: int = 256, calls: int = 5, rounds: int = 3
) -> list[Row]:
    """Hinton's and the decoupled distillation loss with a vocabulary of 50,000, forward and backward, beside the usual formulations.

    Args:
        report: told the share done.
        vocabulary: classes.
        rows: positions in a batch.
        calls: passes in one process; their median is taken.
        rounds: processes for each case.
    """
    cases = {f"{loss}, {way}": (loss, way) for loss, way in LOSSES}
    work = {
        name: partial(_cost, loss, way, vocabulary=vocabulary, rows=rows, calls=calls)
        for name, (loss, way) in cases.items()
    }
    found = interleaved(work, rounds, report)
    table: list[Row] = []
    for loss in dict.fromkeys(loss for loss, _ in LOSSES):
        ours, usual = found[f"{loss}, {ONE_PASS}"], found[f"{loss}, {USUAL}"]
        for way, cost in ((ONE_PASS, ours), (USUAL, usual)):
            table.append(Row.of(f"{loss}, {way}", cost[:, :2], "ms", over=ours[:, :2]))
            table.append(Row.of(f"  extra memory: {loss}, {way}", cost[:, 2], "MB", over=ours[:, 2]))
        speed = usual[:, :2] / ours[:, :2]
        table.append(
            Row.of(f"{loss}: {USUAL} / {ONE_PASS}", speed[:, 1], "x", limit=1.5, at_least=True, note="by CPU")
        )
        # In bytes of one tensor of logits, which a machine's noise does not move.
        size = 4e-6 * rows * vocabulary
        saved = (usual[:, 2] - ours[:, 2]) / size
        note = "in tensors of the logits' size"
        table.append(Row.of(f"{loss}: memory saved", saved, "", limit=0.0, at_least=True, note=note))
    return table


def _cost(loss: str, way: str, **sizes: int) -> tuple[float, float, float]:
    cost = cost_in_fresh_process(f"{__name__}.passes", loss=loss, way=way, **sizes)
    return *cost.result, cost.peak_mb


def passes(loss: str, way: str, *, vocabulary: int, rows: int, calls: int) -> Callable[[], Any]:
    """Forward and backward passes of a loss, ready to run; they give their median milliseconds, by the wall clock and by CPU.

    Examples:
        >>> passes("KL", "one pass", vocabulary=11, rows=3, calls=1)()[0] > 0
        True
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    student.requires_grad_()
    compute = LOSSES[loss, way]
    small = student.detach()[:2].requires_grad_()
    torch.autograd.grad(compute(small, teacher[:2], targets[:2]), small)  # loads the libraries

    def both_ways() -> None:
        torch.autograd.grad(compute(student, teacher, targets), student)

    return lambda: timed(both_ways, calls)


def _usual_kl(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    log_q, p = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    return TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")


def _usual_decoupled(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    right = F.one_hot(targets, student.shape[1]).bool()
    q, p = F.softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    coins = [torch.stack([(part * right).sum(1), (part * ~right).sum(1)], 1) for part in (q, p)]
    others = [(part / TEMPERATURE).masked_fill(right, -1000.0) for part in (student, teacher)]
    coin = F.kl_div(coins[0].log(), coins[1], reduction="batchmean")
    rest = F.kl_div(F.log_softmax(others[0], 1), F.softmax(others[1], 1), reduction="batchmean")
    return TEMPERATURE**2 * (coin + 8.0 * rest)


LOSSES: dict[tuple[str, str], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    ("KL", ONE_PASS): lambda student, teacher, targets: distillation_kl_loss(student, teacher, TEMPERATURE),
    ("KL", USUAL): _usual_kl,
    ("decoupled", ONE_PASS): lambda student, teacher, targets: dkd_loss(
        student, teacher, targets, TEMPERATURE
    ),
    ("decoupled", USUAL): _usual_decoupled,
}
