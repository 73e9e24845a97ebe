"""Networks trained on real data whose parameters are kept along the way, at a smooth pace: what a distilled data set is matched to.

    loss of an expert at epoch e    ramp(e) * cross_entropy + penalty * input_gradient_penalty

Part of `dataset-distillation` (Shen, Yang, Lam, 2023, arXiv 2310.10541); trajectories after Cazenavette et al., 2022,
arXiv 2203.11932.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.ops import without_autocast
from coloss.train.outcome import NonFiniteLossError
from coloss.train.unrolling import FlatParameters

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""`(inputs, generator) -> inputs`, differentiable; the generator is on the CPU."""


def loss_ramp(start: float = 0.5, epochs: int = 10) -> Callable[[int], float]:
    """A factor for the loss that rises from `start` to 1 in even steps, one an epoch, and stays there.

    The authors call it clipping loss. With plain SGD and no weight decay it is a warm-up of the learning rate, no more.

    Args:
        start: factor of epoch 0, in (0, 1].
        epochs: epochs below 1, >= 1.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Shen, Yang, Lam, 2023, arXiv 2310.10541 (values as in the authors' code).

    Examples:
        >>> ramp = loss_ramp()
        >>> [round(ramp(epoch), 2) for epoch in (0, 1, 9, 10, 30)]
        [0.5, 0.55, 0.95, 1.0, 1.0]
    """
    if not 0 < start <= 1:
        raise ValueError(f"start must be in (0, 1], got {start}")
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    return lambda epoch: min(start + (1 - start) * max(epoch, 0) / epochs, 1.0)


def input_gradient_penalty(
    model: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "batch *sample"],
    target: float = 1.0,
    dim: int | Sequence[int] | None = 1,
) -> Float[Tensor, ""]:
    """How far the gradient of the summed logits by the inputs is from a wanted length: mean of (|d sum_k z_k / dx| - target)^2.

    Args:
        model: gives logits.
        inputs: without augmentation.
        target: wanted length, >= 0.
        dim: over which the length is taken; 1 is that of each pixel over channels, as published; None is that of a whole sample.

    Returns:
        A scalar, differentiable in the model's parameters; the mean over everything but `dim`.

    Raises:
        ValueError: if target < 0.

    Cost: one forward and backward pass more, and a backward pass through it.

    Source:
        Gulrajani et al., 2017, arXiv 1704.00028, on a classifier's input as in arXiv 2310.10541.

    Examples:
        >>> round(input_gradient_penalty(lambda x: 3 * x, torch.ones(2, 1), dim=None).item(), 4)  # (3 - 1)^2
        4.0
    """
    if not target >= 0:
        raise ValueError(f"target must be >= 0, got {target}")
    with torch.enable_grad(), without_autocast(inputs.device):
        places = inputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(places).sum(), places, create_graph=True)
        over = tuple(range(1, inputs.ndim)) if dim is None else dim
        lengths = torch.linalg.vector_norm(gradient, dim=over)
        return (lengths - target).square().mean()


def record_trajectory(
    model: nn.Module,
    data: IndexedDataset,
    *,
    epochs: int,
    learning_rate: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    loss_scale: Callable[[int], float] | None = None,
    penalty: float = 0.0,
    decay_at: float | None = 0.5,
    decay: float = 0.6,
    augment: Augment | None = None,
    every: int | None = None,
    stop_after: int | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[float], None] | None = None,
) -> Float[Tensor, "points parameters"]:
    """Train an expert in place by SGD, and give its parameters at the start and after every epoch.

    Args:
        model: fresh; gives logits. Neither batch norm nor dropout, see `require_matchable`.
        data: inputs with class numbers, on the model's device.
        epochs: >= 1; the schedule is made for so many.
        learning_rate: > 0.
        momentum: in [0, 1).
        weight_decay: >= 0.
        batch_size: >= 1; a last batch that is smaller is used.
        loss_scale: factor of the cross-entropy in epoch 0, 1, ...; see `loss_ramp`. None is 1.
        penalty: weight of `input_gradient_penalty`, >= 0.
        decay_at: share of the epochs after which the learning rate is multiplied by `decay`; None for never.
        decay: likewise.
        augment: of the inputs of the cross-entropy.
        every: keep parameters every so many steps instead of every epoch.
        stop_after: train so many of the epochs alone, in [1, epochs]: the first points of the whole trajectory. None is all.
        generator: of the order and of `augment`.
        progress: called with the share done.

    Returns:
        float32 on the CPU, in the order of `FlatParameters`; the last row is the trained model.

    Raises:
        InputError: for a model that `require_matchable` refuses, or values out of range.
        NonFiniteLossError: if the expert diverges.

    Examples:
        >>> data = IndexedDataset(torch.randn(20, 4), torch.arange(20) % 2)
        >>> trajectory = record_trajectory(nn.Linear(4, 2), data, epochs=3)
        >>> trajectory.shape
        torch.Size([4, 10])
    """
    require_matchable(model)
    checks = (
        ("epochs", epochs >= 1, ">= 1", epochs),
        ("learning_rate", learning_rate > 0, "> 0", learning_rate),
        ("momentum", 0 <= momentum < 1, "in [0, 1)", momentum),
        ("weight_decay", weight_decay >= 0, ">= 0", weight_decay),
        ("batch_size", batch_size >= 1, ">= 1", batch_size),
        ("penalty", penalty >= 0, ">= 0", penalty),
        ("every", every is None or every >= 1, ">= 1", every),
        ("stop_after", stop_after is None or 1 <= stop_after <= epochs, f"in [1, {epochs}]", stop_after),
        ("data", len(data) >= 1, "of at least one sample", len(data)),
    )
    for name, fine, rule, value in checks:
        if not fine:
            raise InputError(f"{name} must be {rule}, got {value}")
    flat = FlatParameters(model.train())
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    inputs, targets = data.all().inputs, data.all().targets
    generator = generator or torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    points, step = [flat.vector().cpu()], 0
    ends = epochs if stop_after is None else stop_after
    for epoch in range(ends):
        scale = loss_scale(epoch) if loss_scale is not None else 1.0
        if decay_at is not None and epoch > decay_at * epochs:
            optimizer.param_groups[0]["lr"] = learning_rate * decay
        order = torch.randperm(len(data), generator=generator).to(targets.device)
        for rows in order.split(batch_size):
            given = inputs[rows]
            with without_autocast(given.device):
                seen = given if augment is None else augment(given, generator)
                loss = scale * F.cross_entropy(model(seen), targets[rows])
                if penalty:
                    loss = loss + penalty * input_gradient_penalty(model, given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if every is not None and step % every == 0:
                points.append(flat.vector().cpu())
        if every is None:
            points.append(flat.vector().cpu())
        if not torch.isfinite(flat.vector()).all():
            raise NonFiniteLossError(f"the expert diverged in epoch {epoch}: lower its learning rate")
        if progress is not None:
            progress((epoch + 1) / ends)
    if every is not None and step % every:
        points.append(flat.vector().cpu())
    return torch.stack(points).float()


def step_lengths(trajectory: Float[Tensor, "points parameters"]) -> Float[Tensor, " steps"]:
    """How far an expert's parameters move from each stored point to the next: large first steps are what cannot be matched.

    Args:
        trajectory: from `record_trajectory`.

    Examples:
        >>> step_lengths(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]]))
        tensor([5., 1.])
    """
    return torch.linalg.vector_norm(trajectory.diff(dim=0), dim=1)


def require_matchable(model: nn.Module) -> None:
    """Refuse a model whose behaviour is not in its parameters alone.

    Raises:
        InputError: if it has batch norm or another norm with running statistics, which are not matched, or dropout with p > 0, whose
            draws differ between a step and its recomputation (`checkpoint` of `coloss.train.unroll`).

    Examples:
        >>> require_matchable(nn.BatchNorm1d(2))
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: model must not have batch norm, whose running statistics are not matched (at ''): use instance, group or layer norm
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise InputError(
                "model must not have batch norm, whose running statistics are not matched "
                f"(at {name!r}): use instance, group or layer norm"
            )
        if getattr(module, "track_running_stats", False):
            raise InputError(
                f"model must not have norms with running statistics, which are not matched (at {name!r}): "
                "set track_running_stats to False"
            )
        share = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        if isinstance(module, nn.RReLU) or (isinstance(share, float) and share > 0):
            raise InputError(
                f"model must not be random in training, as dropout with p > 0 makes it (at {name!r}): set p to 0"
            )
