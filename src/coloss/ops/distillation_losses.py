r"""Losses that bring a student's softened class probabilities to a teacher's, in one pass over the logits.

Conventions are those of `coloss.ops.divergence`: $z$ are the `student_logits`, $t$ the `teacher_logits`, classes are the last dimension,
logits are divided by the temperature $T$ and losses multiplied by $T^2$. Where only the student learns, its gradient is made together with
the loss, a few rows at a time: of everything that has the size of the logits, only that gradient is kept. The usual two softmaxes stand
behind as well, for a teacher that learns and for second derivatives.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .divergence import Reduction, bernoulli_kl, check_logits
from .precision import full_precision

# Entries of the logits that a processor works on at a time: they and what is made of them fit into its cache.
_ON_CPU, _ELSEWHERE = 1 << 16, 1 << 25

Rows: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def distillation_kl_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    temperature: float = 4.0,
    reduction: Reduction = "batchmean",
    *,
    valid: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "..."]:
    r"""How far the student's softened class probabilities are from the teacher's: Hinton's distillation term.

    $T^2 \sum_k p_k (\log p_k - \log q_k)$ with $p = \mathrm{softmax}(t/T)$ of `teacher_logits` and $q =
    \mathrm{softmax}(z/T)$ of `student_logits`. The gradient with respect to $z$ is $T (q - p)$; for large $T$
    the loss tends to $\frac{1}{2K}$ times the squared distance of the centred logits.

    Args:
        student_logits: logits of the network that learns.
        teacher_logits: logits to match, same shape.
        temperature: $T > 0$; higher values weigh the small probabilities more.
        reduction: `"batchmean"`, `"sum"` or `"none"`.
        valid: False for positions that do not count, such as padding, whatever their logits hold.

    Returns:
        A scalar, or one value for each position with `"none"` (0 where it does not count); at least float32.

    Raises:
        ValueError: on unequal shapes, a temperature not above 0, or an unknown reduction.

    Cost:
        Two exponentials for each logit, and one tensor of the logits' size, kept for the backward pass.

    Source:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.

    Examples:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> round(distillation_kl_loss(student, teacher, temperature=1.0).item(), 4)
        0.3278
    """
    check_logits(student_logits, teacher_logits, temperature, reduction)
    losses = _losses(_kl_rows, _kl_slopes, student_logits, teacher_logits, valid, temperature=temperature)
    return _reduced(losses, student_logits.shape[:-1], reduction, valid)


def dkd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    temperature: float = 4.0,
    reduction: Reduction = "batchmean",
    *,
    target_weight: float = 1.0,
    other_weight: float | Float[Tensor, "*batch"] = 8.0,
    valid: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "..."]:
    r"""Decoupled distillation: how sure the teacher is of the right class, and how it ranks the others, each with a weight of its own.

    $T^2 (\alpha \, \mathrm{KL}(b^t \| b^z) + \beta \, \mathrm{KL}(\hat p^t \| \hat p^z))$ where $b$ is the coin of the right class against
    all others and $\hat p$ the distribution over the other classes alone. With $\alpha = 1$ and $\beta$ the teacher's probability of the
    other classes this is `distillation_kl_loss`, in which a confident teacher thus mutes what it knows of the other classes.

    Args:
        student_logits: logits of the network that learns.
        teacher_logits: logits to match, same shape.
        targets: the right classes, in [0, classes).
        temperature: $T > 0$.
        reduction: `"batchmean"`, `"sum"` or `"none"`.
        target_weight: $\alpha$.
        other_weight: $\beta$, one for all or one for each position. The best value depends on the pair of networks.
        valid: False for positions that do not count, such as padding, whatever their logits and targets hold.

    Returns:
        A scalar, or one value for each position with `"none"`; at least float32. With one class it is 0, with two only the coin counts.

    Raises:
        ValueError: on unequal shapes, a temperature not above 0, an unknown reduction, or, on a CPU, a target out of range.

    Cost:
        As for `distillation_kl_loss`.

    Source:
        Zhao et al. 2022, arXiv 2203.08679; there the weight grows over the first 20 epochs, `weight=lambda progress: ...` here.

    Examples:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[3.0, 1.0, 0.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0, other_weight=0.0).round(decimals=4)
        tensor(0.5570)
    """
    check_logits(student_logits, teacher_logits, temperature, reduction)
    if targets.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"targets must have the shape {tuple(student_logits.shape[:-1])}, got {tuple(targets.shape)}"
        )
    counted = targets if valid is None else targets[valid]
    if counted.device.type == "cpu" and counted.numel() and not torch.compiler.is_compiling():
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= student_logits.shape[-1]:
            raise ValueError(
                f"targets must be in [0, {student_logits.shape[-1]}), got {low if low < 0 else high}"
            )
    weight = torch.as_tensor(other_weight, dtype=torch.float32, device=targets.device).expand(targets.shape)
    losses = _losses(
        _decoupled_rows,
        _decoupled_slopes,
        student_logits,
        teacher_logits,
        valid,
        targets.long(),
        weight,
        temperature=temperature,
        target_weight=target_weight,
    )
    return _reduced(losses, student_logits.shape[:-1], reduction, valid)


def dist_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    *,
    class_weight: float = 1.0,
    sample_weight: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Match how the teacher orders classes for a sample, and samples for a class, but not the probabilities themselves.

    $T^2 (\beta (1 - \overline{\rho}_\text{rows}) + \gamma (1 - \overline{\rho}_\text{columns}))$ with $\rho$ Pearson's correlation of the
    student's and the teacher's softened probabilities, over the classes of each sample and over the samples of each class. Kinder than a
    divergence to a student that is much weaker than its teacher. It belongs to the batch as a whole.

    Args:
        student_logits: logits of the network that learns.
        teacher_logits: logits to match, same shape.
        temperature: $T > 0$.
        class_weight: $\beta$, of the correlation over classes.
        sample_weight: $\gamma$, of the correlation over samples.

    Returns:
        A scalar in $[0, 2 T^2 (\beta + \gamma)]$, at least float32. A row or column that does not vary, up to rounding, counts as
        uncorrelated and gets no gradient; an empty batch costs 0.

    Raises:
        ValueError: on unequal shapes or a temperature not above 0.

    Cost:
        Two softmaxes and their gradients.

    Source:
        Huang et al. 2022, arXiv 2205.10536.

    Examples:
        >>> teacher = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
        >>> dist_loss(teacher, teacher).abs() < 1e-6, dist_loss(-teacher, teacher) > 1
        (tensor(True), tensor(True))
    """
    check_logits(student_logits, teacher_logits, temperature)
    student = torch.softmax(full_precision(student_logits) / temperature, dim=-1)
    teacher = torch.softmax(full_precision(teacher_logits) / temperature, dim=-1)
    over_classes = _correlations(student, teacher, dim=1)
    over_samples = _correlations(student, teacher, dim=0)
    if not len(student):
        return student.sum()
    gap = class_weight * (1 - over_classes.mean()) + sample_weight * (1 - over_samples.mean())
    return temperature**2 * gap


def standardized_logits(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    r"""Logits with mean 0 and variance 1 over the classes of each position, so that a student need not match the teacher's scale.

    `distillation_kl_loss(standardized_logits(z), standardized_logits(t), T)` is distillation with logit standardisation: the temperature
    becomes one of each sample.

    Args:
        logits: classes in the last dimension.

    Returns:
        The same shape, at least float32; zeros, without a gradient, where all logits of a position are equal up to rounding.

    Raises:
        ValueError: if there is no class.

    Source:
        Sun et al. 2024, arXiv 2403.01427.

    Examples:
        >>> standardized_logits(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    check_logits(logits, logits)
    centred = _centred(full_precision(logits), -1)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.where(variance > 0, variance, 1).sqrt()


def _correlations(first: Tensor, second: Tensor, dim: int) -> Tensor:
    first, second = _centred(first, dim), _centred(second, dim)
    product = (first * second).sum(dim)
    lengths = first.square().sum(dim) * second.square().sum(dim)
    return product / torch.where(lengths > 0, lengths, 1).sqrt()


def _centred(values: Tensor, dim: int) -> Tensor:
    """Values of mean 0 and largest size 1 along a dimension; zeros, without a gradient, where they differ by rounding alone."""
    if not values.numel():
        return values
    centred = values - values.mean(dim, keepdim=True)
    # Probabilities of many classes are small: squares of them leave the range before their ratio does.
    size = centred.detach().abs().amax(dim, keepdim=True)
    rounding = 4 * torch.finfo(values.dtype).eps * values.detach().abs().amax(dim, keepdim=True)
    low, high = centred.detach().aminmax(dim=dim, keepdim=True)
    flat = high - low <= rounding
    return torch.where(flat, 0.0, centred / torch.where(flat, 1, size))


def _losses(
    rows: Callable[..., Tensor],
    slopes: Rows,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    *others: Tensor,
    **options: float,
) -> Tensor:
    """Losses of the positions that count, (rows,): by `rows`, a formula, or by `slopes`, which gives the student's gradient too."""
    dtypes = full_precision(student[:0]).dtype, full_precision(teacher[:0]).dtype
    if dtypes[0] != dtypes[1]:
        both = torch.promote_types(*dtypes)
        student, teacher = student.to(both), teacher.to(both)
    if valid is not None:
        flat = [part[valid] for part in (student, teacher, *others)]
    else:
        classes = student.shape[-1]
        flat = [
            *(part.reshape(-1, classes) for part in (student, teacher)),
            *(part.reshape(-1) for part in others),
        ]
    if teacher.requires_grad or torch._C._are_functorch_transforms_active():
        return rows(*flat, **options)
    return _WithSlopes.apply(rows, slopes, options, *flat)


class _WithSlopes(torch.autograd.Function):
    """Losses of rows, and in the same pass their gradients; differentiated twice, by the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Callable[..., Tensor],
        slopes: Rows,
        options: dict[str, float],
        student: Tensor,
        *others: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[3]
        ctx.rows, ctx.options = rows, options
        at_a_time = _ON_CPU * torch.get_num_threads() if student.device.type == "cpu" else _ELSEWHERE
        step = max(1, at_a_time // student.shape[1])
        dtype = full_precision(student[:0]).dtype
        losses = student.new_empty(len(student), dtype=dtype)
        # In bfloat16 a gradient keeps its range; in float16 small ones would vanish before a loss scale can lift them.
        kept = dtype if student.dtype == torch.float16 else student.dtype
        gradient = torch.empty_like(student, dtype=kept) if wanted else None
        for start in range(0, len(student), step):
            place = slice(start, start + step)
            parts = [
                full_precision(part[place]) if part.is_floating_point() else part[place]
                for part in (student, *others)
            ]
            losses[place], found = slopes(*parts, wanted=wanted, **options)
            if gradient is not None:
                gradient[place] = found
        ctx.save_for_backward(gradient, student, *others)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient, student, *others = ctx.saved_tensors
        nothing = [None] * len(others)
        if torch.is_grad_enabled():
            losses = ctx.rows(student, *others, **ctx.options)
            (found,) = torch.autograd.grad(losses, student, upstream, create_graph=True)
            return None, None, None, found, *nothing
        return None, None, None, (gradient * upstream[:, None]).to(student.dtype), *nothing


def _kl_rows(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    log_q = torch.log_softmax(full_precision(student) / temperature, dim=1)
    log_p = torch.log_softmax(full_precision(teacher) / temperature, dim=1)
    p = log_p.exp()
    return temperature**2 * (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(1)


def _kl_slopes(
    student: Tensor, teacher: Tensor, *, temperature: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    log_q = torch.log_softmax(student / temperature, dim=1)
    log_p = torch.log_softmax(teacher / temperature, dim=1)
    gap = log_p - log_q
    p = log_p.exp_()
    gap.masked_fill_(p == 0, 0.0)
    losses = temperature**2 * torch.linalg.vecdot(p, gap)
    return losses, log_q.exp_().sub_(p).mul_(temperature) if wanted else log_q


def _decoupled_rows(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    other_weight: Tensor,
    *,
    temperature: float,
    target_weight: float,
) -> Tensor:
    student, teacher = full_precision(student) / temperature, full_precision(teacher) / temperature
    coin_z, rest_z = _decoupled(student, targets)
    coin_t, rest_t = _decoupled(teacher, targets)
    p = rest_t.exp()
    others = (p * torch.where(p > 0, rest_t - rest_z, 0.0)).sum(1)
    return temperature**2 * (target_weight * bernoulli_kl(coin_z, coin_t) + other_weight * others)


def _decoupled_slopes(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    other_weight: Tensor,
    *,
    temperature: float,
    target_weight: float,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    coin_z, rest_z = _decoupled(student / temperature, targets)
    coin_t, rest_t = _decoupled(teacher / temperature, targets)
    gap = rest_t - rest_z
    p = rest_t.exp_()
    gap.masked_fill_(p == 0, 0.0)
    coins = target_weight * bernoulli_kl(coin_z, coin_t)
    losses = temperature**2 * (coins + other_weight * torch.linalg.vecdot(p, gap))
    if not wanted:
        return losses, p
    of_coin = (target_weight * (coin_z.sigmoid() - coin_t.sigmoid()))[:, None]
    gradient = rest_z.exp_().mul_(other_weight[:, None] - of_coin).sub_(p.mul_(other_weight[:, None]))
    return losses, gradient.scatter_(1, targets[:, None], of_coin).mul_(temperature)


def _decoupled(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logit of the coin of the right class, and log-probabilities among the other classes, where the right one has minus infinity."""
    others = logits.scatter(1, targets[:, None], -torch.inf)
    # Where nothing else can occur the coin is certain, and there is nothing to tell among the others.
    alone = others.detach().amax(1, keepdim=True) == -torch.inf
    total = torch.where(alone, 0.0, others).logsumexp(1, keepdim=True)
    coin = torch.where(alone, torch.inf, logits.gather(1, targets[:, None]) - total)
    return coin[:, 0], torch.where(alone, -torch.inf, others - total)


def _reduced(losses: Tensor, shape: torch.Size, reduction: Reduction, valid: Tensor | None) -> Tensor:
    if reduction == "none":
        if valid is None:
            return losses.reshape(shape)
        return losses.new_zeros(shape).masked_scatter(valid, losses)
    total = losses.sum()
    return total if reduction == "sum" else total / max(losses.numel(), 1)
