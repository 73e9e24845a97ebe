r"""Divergences between the predictions of two networks, given as logits.

Everywhere `student_logits` is the side that learns. The teacher side is not detached, so that a generator can
be trained through a teacher; compute the teacher's logits under `torch.no_grad()` in ordinary distillation.
Classes are the last dimension; all other dimensions together are the batch. Reductions: `"none"` gives one
value for each position of the batch (summed over classes), `"sum"` their sum, `"batchmean"` their mean, 0 for
an empty batch.

Logits are divided by the temperature $T$ and every loss is multiplied by $T^2$, in this module and nowhere
else, so that gradients keep their size when the temperature changes. A logit of $-\infty$ is a class that
cannot occur: it counts 0 where both sides agree on it.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from .precision import full_precision

Reduction = Literal["batchmean", "sum", "none"]


def soft_cross_entropy_loss(
    logits: Float[Tensor, "*batch classes"],
    target_probabilities: Float[Tensor, "*batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy against a probability for every class: label smoothing, mixing, a stored teacher.

    $-T^2 \sum_k p_k \log \mathrm{softmax}(z/T)_k$ with $p$ the `target_probabilities` and $z$ the `logits`.

    Args:
        logits: logits of the network that learns.
        target_probabilities: non-negative, meant to sum to 1 over classes (not checked), same shape.
        temperature: $T > 0$, applied to the logits only.
        reduction: `"batchmean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or one value for each position with `"none"`; at least float32.

    Raises:
        ValueError: on unequal shapes, a temperature not above 0, or an unknown reduction.

    Examples:
        >>> loss = soft_cross_entropy_loss(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
        >>> round(loss.item(), 4)  # log 4
        1.3863
    """
    check_logits(
        logits, target_probabilities, temperature, reduction, names=("logits", "target_probabilities")
    )
    log_probability = torch.log_softmax(full_precision(logits) / temperature, dim=-1)
    target = full_precision(target_probabilities)
    cost = target * torch.where(target == 0, 0.0, log_probability)
    return _reduce(-(temperature**2) * cost.sum(-1), reduction)


def binary_kl_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    temperature: float = 2.0,
    reduction: Reduction = "batchmean",
) -> Float[Tensor, "..."]:
    r"""How far the student's per-class sigmoids are from the teacher's, each class a coin of its own.

    $T^2 \sum_k \mathrm{KL}(\mathrm{Bern}(\sigma(t_k/T)) \,\|\, \mathrm{Bern}(\sigma(z_k/T)))$. Unlike a
    softmax loss it sees a constant added to all logits. The gradient with respect to $z_k$ is $T
    (\sigma(z_k/T) - \sigma(t_k/T))$. The sum over classes grows with their number: rescale its weight with
    it.

    Args:
        student_logits: $z$, logits of the network that learns.
        teacher_logits: $t$, logits to match, same shape.
        temperature: $T > 0$.
        reduction: `"batchmean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or one value for each position with `"none"`; at least float32.

    Raises:
        ValueError: on unequal shapes, a temperature not above 0, or an unknown reduction.

    Source:
        Yang et al. 2024 (DHKD), arXiv 2411.08937.

    Examples:
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[-3.0, -2.0]])
        >>> bool(binary_kl_loss(student, teacher) > 1)
        True
    """
    check_logits(student_logits, teacher_logits, temperature, reduction)
    student, teacher = full_precision(student_logits), full_precision(teacher_logits)
    divergence = bernoulli_kl(student / temperature, teacher / temperature)
    return _reduce(temperature**2 * divergence.sum(-1), reduction)


def logit_gap_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    temperature: float = 2.0,
    reduction: Reduction = "batchmean",
) -> Float[Tensor, "..."]:
    r"""Log-cosh regression of the student's raw logits on the teacher's: quadratic near, linear far.

    $T^2 \sum_k \log\cosh\frac{z_k - t_k}{2T}$, which equals $T^2 \sum_k \mathrm{KL}(\mathrm{Bern}(1/2) \,\|\,
    \mathrm{Bern}(\sigma((z_k - t_k)/T)))$: the gap between student and teacher has to look like a fair coin.
    About $(z-t)^2/8$ for small gaps and $\frac{T}{2}|z-t|$ for large ones. The gradient
    $\frac{T}{2}\tanh\frac{z_k - t_k}{2T}$ is bounded by $T/2$. Not invariant to a constant added to all
    logits, and summed over classes: rescale its weight with their number.

    Args:
        student_logits: $z$, logits of the network that learns.
        teacher_logits: $t$, logits to match, same shape.
        temperature: $T > 0$, half the gap at which the loss turns from quadratic to linear.
        reduction: `"batchmean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or one value for each position with `"none"`; at least float32.

    Raises:
        ValueError: on unequal shapes, a temperature not above 0, or an unknown reduction.

    Source:
        "BinaryKL-Norm" of Yang et al. 2024 (DHKD), arXiv 2411.08937; the closed form is derived here.

    Examples:
        >>> gap = torch.tensor([[1e4]], requires_grad=True)
        >>> logit_gap_loss(gap, torch.zeros(1, 1)).backward()
        >>> gap.grad
        tensor([[1.]])
    """
    check_logits(student_logits, teacher_logits, temperature, reduction)
    student, teacher = full_precision(student_logits), full_precision(teacher_logits)
    gap = student - teacher
    gap = gap.masked_fill((student == teacher) & student.isinf(), 0.0)
    return _reduce(temperature**2 * _LogCosh.apply(gap / (2 * temperature)).sum(-1), reduction)


def js_divergence_loss(
    first_logits: Float[Tensor, "*batch classes"],
    second_logits: Float[Tensor, "*batch classes"],
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Float[Tensor, "..."]:
    r"""Jensen-Shannon divergence of two predictions: symmetric, and bounded even where they share no class.

    $\frac{T^2}{2} (\mathrm{KL}(p \| m) + \mathrm{KL}(q \| m))$ with $p = \mathrm{softmax}(a/T)$ of
    `first_logits`, $q = \mathrm{softmax}(b/T)$ of `second_logits` and $m = (p + q)/2$. At most $T^2 \log 2$.

    Args:
        first_logits: $a$.
        second_logits: $b$, same shape.
        temperature: $T > 0$.
        reduction: `"batchmean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or one value for each position with `"none"`; at least float32.

    Raises:
        ValueError: on unequal shapes, a temperature not above 0, or an unknown reduction.

    Source:
        Lin 1991, Divergence measures based on the Shannon entropy.

    Examples:
        >>> loss = js_divergence_loss(torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 90.0]]))
        >>> round(loss.item(), 4)  # log 2
        0.6931
    """
    check_logits(first_logits, second_logits, temperature, reduction, names=("first_logits", "second_logits"))
    first = _finite_log_softmax(full_precision(first_logits) / temperature)
    second = _finite_log_softmax(full_precision(second_logits) / temperature)
    mixture = torch.logaddexp(first, second) - math.log(2)
    terms = first.exp() * (first - mixture) + second.exp() * (second - mixture)
    return _reduce(temperature**2 / 2 * terms.sum(-1), reduction)


def entropy(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    r"""Shannon entropy of a prediction in nats: 0 when certain, log of the number of classes when uniform.

    $-\sum_k p_k \log p_k$ with $p = \mathrm{softmax}$ of `logits`.

    Args:
        logits: classes in the last dimension, at least one of them above $-\infty$.

    Returns:
        One value for each position, at least float32.

    Raises:
        ValueError: if there is no class.

    Examples:
        >>> entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([0.6931, 0.0000])
    """
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have at least one class in the last dimension, got {tuple(logits.shape)}"
        )
    log_probability = _finite_log_softmax(full_precision(logits))
    return (log_probability.exp() * -log_probability).sum(-1)


def target_log_probability(
    logits: Float[Tensor, "*batch classes"], target: Integer[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Log-probability that a prediction gives to the right class: minus the cross-entropy of each sample.

    $\log \mathrm{softmax}(z)_y$ with $z$ the `logits` and $y$ the `target`.

    Args:
        logits: classes in the last dimension.
        target: class numbers in [0, classes), any integer type.

    Returns:
        One value <= 0 for each position, at least float32; $-\infty$ where the target's logit is $-\infty$.

    Raises:
        ValueError: if the shapes do not fit, or, on a CPU, a target is no class number.

    Examples:
        >>> target_log_probability(torch.zeros(2, 4), torch.tensor([0, 3]))  # minus log 4
        tensor([-1.3863, -1.3863])
    """
    if logits.ndim == 0 or logits.shape[-1] == 0 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"logits must have the shape {tuple(target.shape)} of target and a dimension of classes, "
            f"got {tuple(logits.shape)}"
        )
    # Elsewhere the look would make the host wait for the device, which checks the index by itself.
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(
                f"target must hold class numbers in [0, {logits.shape[-1]}), got {low if low < 0 else high}"
            )
    log_probability = torch.log_softmax(full_precision(logits), dim=-1)
    return log_probability.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)


class _BernoulliKL(torch.autograd.Function):
    """KL(Bern(sigmoid(v)) || Bern(sigmoid(u))) entry by entry, for student u and teacher v.

    The closed-form gradient sigmoid(u) - sigmoid(v) is exactly 0 at u = v, which autograd through the two
    log-sigmoids misses by rounding.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, teacher: Tensor) -> Tensor:
        on, off = torch.sigmoid(teacher), torch.sigmoid(-teacher)
        on_ratio = F.logsigmoid(teacher) - F.logsigmoid(student)
        off_ratio = F.logsigmoid(-teacher) - F.logsigmoid(-student)
        return on * torch.where(on > 0, on_ratio, 0.0) + off * torch.where(off > 0, off_ratio, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        student, teacher = ctx.saved_tensors
        for_student = for_teacher = None
        if ctx.needs_input_grad[0]:
            for_student = gradient * (torch.sigmoid(student) - torch.sigmoid(teacher))
        if ctx.needs_input_grad[1]:
            slope = torch.sigmoid(teacher) * torch.sigmoid(-teacher)
            for_teacher = gradient * slope * torch.where(slope > 0, teacher - student, 0.0)
        return for_student, for_teacher


class _LogCosh(torch.autograd.Function):
    """log cosh(x), accurate to rounding for every x, with gradient tanh(x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        size = x.abs()
        # Near 0, |x| + log(1 + e^-2|x|) - log 2 would cancel; log(1 + 2 sinh^2(x/2)) keeps every digit.
        near = torch.log1p(2 * torch.sinh(size.clamp(max=1.0) / 2) ** 2)
        far = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
        return torch.where(size < 1, near, far)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.tanh(x)


def _finite_log_softmax(logits: Tensor) -> Tensor:
    # The smallest finite log-probability for an impossible class: its probability is still exactly 0, and
    # 0 times a finite number is 0 where 0 times infinity would be NaN.
    return torch.log_softmax(logits, dim=-1).clamp(min=torch.finfo(logits.dtype).min / 4)


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / max(values.numel(), 1)


def bernoulli_kl(
    student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """KL(Bern(sigmoid(v)) || Bern(sigmoid(u))) entry by entry, for logits u of the student and v of the teacher.

    Examples:
        >>> bernoulli_kl(torch.tensor([0.0, 5.0]), torch.tensor([0.0, -5.0]))
        tensor([0.0000, 4.9331])
    """
    return _BernoulliKL.apply(student, teacher)


def check_logits(
    first: Tensor,
    second: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    names: tuple[str, str] = ("student_logits", "teacher_logits"),
) -> None:
    """Refuse two sets of logits that do not fit each other, and options out of range.

    Raises:
        ValueError: naming the argument.

    Examples:
        >>> check_logits(torch.zeros(2, 3), torch.zeros(2, 3), temperature=-1.0)
        Traceback (most recent call last):
        ...
        ValueError: temperature must be > 0 and finite, got -1.0
    """
    if first.shape != second.shape:
        raise ValueError(
            f"{names[1]} must have the shape {tuple(first.shape)} of {names[0]}, got {tuple(second.shape)}"
        )
    if first.ndim == 0 or first.shape[-1] == 0:
        raise ValueError(
            f"{names[0]} must have at least one class in the last dimension, got {tuple(first.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if reduction not in ("batchmean", "sum", "none"):
        raise ValueError(f'reduction must be "batchmean", "sum" or "none", got {reduction!r}')
