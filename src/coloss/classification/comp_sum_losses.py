"""The comp-sum losses as functions and modules, and their smooth adversarial form; equations stand in `coloss.classification.comp_sum`."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor, nn

from coloss.classification.adversarial import Attack, projected_gradient_attack
from coloss.metrics import evaluation_mode
from coloss.ops import full_precision, target_log_probability

Reduction = Literal["none", "mean", "sum"]


def comp_sum_loss(
    input: Float[Tensor, "batch classes *positions"],
    target: Shaped[Tensor, "batch *rest"],
    weight: Float[Tensor, " classes"] | None = None,
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*left"]:
    """Cross-entropy with its gradient times p_y^(tau-1): takes the place of `F.cross_entropy`, and equals it at tau = 1.

        (p_y^(tau-1) - 1) / (1 - tau),    p = softmax(input / rho);    -log p_y at tau = 1

    Args:
        input: logits, classes in dimension 1.
        target: class numbers, without the dimension of classes; or a probability for each class, in the shape of `input`: then the cost
            is the mean over classes with these probabilities.
        weight: of each class, >= 0.
        tau: >= 0; 1 is cross-entropy, 1.5 to 1.7 stand wrong labels, 2 is 1 - p_y.
        rho: > 0, scale of the margins; the gradient is 1 / rho times as large.
        ignore_index: class number of what is left out.
        reduction: `"none"`, `"mean"` or `"sum"`, as in `F.cross_entropy`: the mean over class numbers weighs them by `weight`.
        label_smoothing: in [0, 1], share of the target that is spread over all classes.

    Returns:
        A scalar, or one value for each target with `"none"`; at least float32; 0 for an empty batch, or where all is left out. Where
        p_y^(tau-1) would overflow (tau < 1) the loss goes on linearly in log p_y.

    Raises:
        ValueError: if shapes do not fit or a value is out of range.

    Source: Mao, Mohri, Zhong, 2023, arXiv 2304.07288; Zhang, Sabuncu, 2018, arXiv 1805.07836 for tau in (1, 2).

    Examples:
        >>> logits, target = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]), torch.tensor([0, 2])
        >>> for tau in (1.0, 1.5, 2.0):  # the second label looks wrong
        ...     print(comp_sum_loss(logits, target, tau=tau, reduction="none"))
        tensor([0.2395, 3.0949])
        tensor([0.2258, 1.5744])
        tensor([0.2130, 0.9547])
    """
    check_options(tau, rho, reduction, label_smoothing)
    if input.ndim < 2:
        raise ValueError(f"input must have a batch and a class dimension, got shape {tuple(input.shape)}")
    classes = input.shape[1]
    soft = target.is_floating_point()
    expected = tuple(input.shape) if soft else (len(input), *input.shape[2:])
    if tuple(target.shape) != expected:
        what = "probabilities" if soft else "class numbers"
        raise ValueError(f"target must hold {what} of shape {expected}, got {tuple(target.shape)}")
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"weight must have one entry for each of {classes} classes, got {tuple(weight.shape)}"
        )
    logits = full_precision(input.movedim(1, -1)) / rho
    importance = logits.new_ones(classes) if weight is None else weight.to(logits.dtype)
    if soft:
        shares = target.movedim(1, -1).to(logits.dtype)
        norm = logits.new_tensor(float(shares[..., 0].numel()))
    else:
        kept = target != ignore_index
        labels = torch.where(kept, target, 0).long()
        log_probability = target_log_probability(logits, labels)
        counts = torch.where(kept, importance[labels], 0.0)
        norm = counts.sum()
        if label_smoothing == 0:
            losses = counts * _from_log_probability(log_probability, tau)
            return _reduce(torch.where(counts == 0, 0.0, losses), norm, reduction)
        shares = torch.nn.functional.one_hot(labels, classes).to(logits.dtype) * kept.unsqueeze(-1)
    if label_smoothing > 0:
        shares = (1 - label_smoothing) * shares + label_smoothing / classes * shares.sum(-1, keepdim=True)
    shares = shares * importance
    costs = _from_log_probability(torch.log_softmax(logits, dim=-1), tau)
    return _reduce(torch.where(shares == 0, 0.0, shares * costs).sum(-1), norm, reduction)


class CompSumLoss(nn.Module):
    """Cross-entropy with its gradient times p_y^(tau-1), as a module: takes the place of `nn.CrossEntropyLoss`.

    Args:
        weight, tau, rho, ignore_index, reduction, label_smoothing: as for `comp_sum_loss`.

    Returns:
        From `forward(input, target)`: a scalar, or one value for each target with `reduction="none"`.

    Raises:
        ValueError: for a value out of range.

    Source: Mao, Mohri, Zhong, 2023, arXiv 2304.07288.

    Examples:
        >>> CompSumLoss(tau=2.0)(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        tensor(0.7500)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, " classes"] | None = None,
        *,
        tau: float = 1.0,
        rho: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_options(tau, rho, reduction, label_smoothing)
        self.register_buffer("weight", weight)
        self.tau, self.rho = float(tau), float(rho)
        self.ignore_index, self.label_smoothing = ignore_index, float(label_smoothing)
        self.reduction: Reduction = reduction

    def forward(
        self, input: Float[Tensor, "batch classes *positions"], target: Shaped[Tensor, "batch *rest"]
    ) -> Float[Tensor, "*left"]:
        return comp_sum_loss(
            input,
            target,
            self.weight,
            tau=self.tau,
            rho=self.rho,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, rho={self.rho:g}"


def target_margins(
    logits: Float[Tensor, "batch classes"], target: Integer[Tensor, " batch"]
) -> Float[Tensor, "batch others"]:
    """By how much the right class outscores each other class: Delta_k = z_y - z_k for k != y, in the order of the classes.

    Args:
        logits: z.
        target: y, class numbers.

    Returns:
        One row of classes - 1 margins for each sample, at least float32.

    Raises:
        ValueError: if the sizes do not fit.

    Examples:
        >>> target_margins(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
        tensor([[3., 2.]])
    """
    if logits.shape[:1] != target.shape:
        raise ValueError(f"target must have {len(logits)} class numbers, got shape {tuple(target.shape)}")
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = others + (others >= target.unsqueeze(1))
    logits = full_precision(logits)
    return logits.gather(1, target.long().unsqueeze(1)) - logits.gather(1, others)


def margin_shift(
    changed_logits: Float[Tensor, "batch classes"],
    logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """How far the margins of each sample move between two sets of logits: || Delta(changed) - Delta ||_2.

    Args:
        changed_logits: for the changed inputs.
        logits: for the inputs as they are.
        target: class numbers.

    Returns:
        One value >= 0 for each sample; where nothing moved, 0 with a zero gradient.

    Raises:
        ValueError: if the sizes do not fit.

    Examples:
        >>> margin_shift(torch.tensor([[3.0, 0.0, 4.0]]), torch.zeros(1, 3), torch.tensor([1]))
        tensor([5.])
    """
    if changed_logits.shape != logits.shape:
        raise ValueError(
            f"changed_logits must have the shape {tuple(logits.shape)} of logits, got {tuple(changed_logits.shape)}"
        )
    return torch.linalg.vector_norm(
        target_margins(full_precision(changed_logits) - full_precision(logits), target), dim=1
    )


class AdversarialCompSumLoss(nn.Module):
    """Comp-sum loss of the inputs as they are, and nu times the shift of the margins under the worst small change: for a loop of your own.

    Args:
        tau, rho: as for `comp_sum_loss`.
        nu: >= 0, weight of the shift. The guarantee of the paper holds from sqrt(classes - 1) / rho on, where training may end in a
            constant network.
        attack: (model, inputs, objective) -> changed inputs; default: `projected_gradient_attack` with its defaults (8/255, 10 steps).

    Returns:
        From `forward(model, inputs, target)`: the loss, and its parts `{"clean": ..., "smooth": ...}`, means over samples.

    Raises:
        ValueError: for a value out of range.

    Cost: that of the attack, a forward pass without and one with graph, in addition to the forward pass itself.

    Source: Mao, Mohri, Zhong, 2023, arXiv 2304.07288, section 5.

    Examples:
        >>> from functools import partial
        >>> loss = AdversarialCompSumLoss(nu=2.0, attack=partial(projected_gradient_attack, eps=0.1))
        >>> total, parts = loss(nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,)))
        >>> bool(total == parts["clean"] + 2 * parts["smooth"])
        True
    """

    def __init__(
        self, tau: float = 1.0, rho: float = 1.0, nu: float = 0.1, attack: Attack = projected_gradient_attack
    ) -> None:
        super().__init__()
        check_options(tau, rho, "mean", 0.0)
        if not 0 <= nu < math.inf:
            raise ValueError(f"nu must be >= 0 and finite, got {nu}")
        self.tau, self.rho, self.nu, self.attack = float(tau), float(rho), float(nu), attack

    def forward(
        self, model: nn.Module, inputs: Float[Tensor, "batch *shape"], target: Integer[Tensor, " batch"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        logits = model(inputs)
        clean = comp_sum_loss(logits, target, tau=self.tau, rho=self.rho)
        smooth = attacked_margin_shift(model, inputs, logits, target, self.attack)
        return clean + self.nu * smooth, {"clean": clean, "smooth": smooth}

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, rho={self.rho:g}, nu={self.nu:g}"


def attacked_margin_shift(
    model: nn.Module, inputs: Tensor, logits: Tensor, target: Tensor, attack: Any
) -> Float[Tensor, ""]:
    """Mean shift of the margins between the inputs and what an attack on that shift makes of them."""
    with evaluation_mode(model):
        reference = model(inputs)
    changed = attack(model, inputs, lambda outputs: margin_shift(outputs, reference, target))
    shifts = margin_shift(model(changed), logits, target)
    return shifts.sum() / max(len(shifts), 1)


def _from_log_probability(log_probability: Tensor, tau: float) -> Tensor:
    """(p^(tau-1) - 1) / (1 - tau) from log p."""
    if tau == 1:
        return -log_probability
    power = (tau - 1) * log_probability
    if tau > 1:
        # exp(x) - 1 where p is small: there expm1 would give the derivative exp(x) as (exp(x) - 1) + 1, without its digits.
        small = power < -1
        value = torch.where(small, power.exp() - 1, torch.expm1(power.clamp(min=-1)))
        return value / (1 - tau)
    limit = math.log(torch.finfo(power.dtype).max) - 8
    beyond = (power - limit).clamp(min=0)
    return (torch.expm1(power.clamp(max=limit)) + math.exp(limit) * beyond) / (1 - tau)


def _reduce(losses: Tensor, norm: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / torch.where(norm == 0, 1.0, norm)


def check_options(tau: float, rho: float, reduction: str, label_smoothing: float) -> None:
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must be >= 0 and finite, got {tau}")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be > 0 and finite, got {rho}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
