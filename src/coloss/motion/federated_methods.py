"""What holds a client's training to the model that it downloaded: distillation of early blocks, and FedProx.

    block distillation    1/m sum_l d(h_l, t_l)          h_l, t_l: output of block l of the training model and of the model as downloaded
    FedProx               mu/2 ||theta - theta_0||^2     theta_0: the shared weights as downloaded

Both are methods of `coloss.fit`, for clients of a federation as for any fine-tuning that should stay near where it began.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.errors import InputError
from coloss.motion.federated_averaging import split_state
from coloss.nn import Frozen, Taps
from coloss.ops import full_precision, hint_loss
from coloss.train.method import Method
from coloss.train.schedules import Schedule
from coloss.train.state import State


def block_distillation_loss(
    student: Sequence[Float[Tensor, "batch ..."]],
    teacher: Sequence[Float[Tensor, "batch ..."]],
    blocks: int = 2,
    *,
    normalized: bool = True,
) -> Float[Tensor, ""]:
    """Mean distance between what the first blocks of two networks of one shape give.

        1/m sum_{l <= m} 1/B sum_b || h_lb / |h_lb| - t_lb / |t_lb| ||^2

    Args:
        student: h, outputs of its blocks in order, each (batch, ...).
        teacher: t, outputs of the same blocks; detached here.
        blocks: m, how many are compared, from 1 to as many as are given.
        normalized: bring each sample's whole map to length 1, so that the scale of a block does not decide what counts (a map of zeros stays);
            False takes the mean squared difference instead.

    Returns:
        A scalar, at least float32; in [0, 4] when normalized.

    Raises:
        ValueError: for other numbers of blocks or shapes that differ.

    Source: Guo et al., 2023, arXiv 2306.11046, multi-grain distillation; the distance is not public, this one is a reconstruction.

    Examples:
        >>> maps = [torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])]
        >>> block_distillation_loss(maps, [2 * maps[0], torch.tensor([[0.0, 1.0]])])
        tensor(1.)
    """
    if not 1 <= blocks <= min(len(student), len(teacher)):
        raise ValueError(
            f"blocks must be in [1, {min(len(student), len(teacher))}], the blocks that both give, got {blocks}"
        )
    losses = []
    for number, (own, given) in enumerate(zip(student[:blocks], teacher[:blocks], strict=True), 1):
        if own.shape != given.shape:
            raise ValueError(
                f"student and teacher must have one shape in block {number}, got {tuple(own.shape)} and {tuple(given.shape)}"
            )
        left, right = (full_precision(maps).flatten(1) for maps in (own, given.detach()))
        if normalized:
            gap = _unit(left) - _unit(right)
            losses.append(gap.square().sum() / max(len(gap), 1))
        else:
            losses.append(hint_loss(left, right))
    return torch.stack(losses).mean()


def _unit(rows: Tensor) -> Tensor:
    size = rows.detach().abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_ones(len(rows), 1)
    rows = rows / torch.where(size == 0, 1, size)
    squares = rows.square().sum(1, keepdim=True)
    return rows / torch.where(squares == 0, 1, squares).sqrt()


def proximal_loss(parameters: Sequence[Tensor], reference: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Half the squared distance of weights from others: FedProx without its factor.

        1/2 sum_i || theta_i - theta_0i ||^2

    Args:
        parameters: theta, tensors of any shapes.
        reference: theta_0, as many of the same shapes; detached here.

    Returns:
        A scalar >= 0, at least float32.

    Raises:
        ValueError: for no tensors, or tensors that do not fit.

    Source: Li et al., 2020, arXiv 1812.06127, equation 2.

    Examples:
        >>> proximal_loss([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 0.0])])
        tensor(2.)
    """
    if not parameters or len(parameters) != len(reference):
        raise ValueError(
            f"parameters and reference must be equally many, at least one, got {len(parameters)} and {len(reference)}"
        )
    total = []
    for number, (value, start) in enumerate(zip(parameters, reference, strict=True)):
        if value.shape != start.shape:
            raise ValueError(
                f"parameters and reference must have the same shapes, got {tuple(value.shape)} and {tuple(start.shape)} at {number}"
            )
        total.append((full_precision(value) - full_precision(start.detach())).square().sum())
    return torch.stack(total).sum() / 2


class BlockDistillation(Method):
    """Keep what the first blocks of a model give near what they gave when training began.

    The teacher is a frozen copy of the model as it is at `setup`, private parts included: on a client of a federation, the model as just
    downloaded. It runs in evaluation mode, so its batch norms use their stored statistics; the training model's use those of the batch. The
    term is therefore exactly 0 at the first step for a model in evaluation mode or without batch norm, and near 0 otherwise, as far as the
    stored statistics are those of the data: with statistics never updated (round 1 from a fresh model) it is not.

    Args:
        blocks: paths of the modules whose outputs are compared, early ones; the authors' best were the first two blocks.
        weight: of the term `block_distillation`, a number >= 0 or a schedule of progress.
        normalized: see `block_distillation_loss`.

    Attributes:
        teacher: the frozen copy, from `setup` on; it belongs to the method and does not ship with the model.

    Raises:
        InputError: for no blocks; at setup, for a path that the model does not have.

    Cost: one forward pass of the teacher each step.

    Source: Guo et al., 2023, arXiv 2306.11046; distance and weight are not public.

    Examples:
        >>> import coloss
        >>> from torch import nn
        >>> from torch.nn.functional import cross_entropy
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = (torch.randn(32, 4), torch.randint(2, (32,)))
        >>> run = coloss.fit(
        ...     model, data, cross_entropy, [BlockDistillation(["0"])], budget=coloss.Budget(steps=1)
        ... )
        >>> run.history[0].terms["block_distillation"]
        0.0
    """

    def __init__(self, blocks: Sequence[str], weight: Schedule = 1.0, *, normalized: bool = True) -> None:
        super().__init__()
        if isinstance(blocks, str) or not blocks:
            raise InputError(f"blocks must be paths of one block or more, got {blocks!r}")
        if not callable(weight) and not 0 <= weight < float("inf"):
            raise InputError(f"weight must be >= 0 and finite, got {weight}")
        self.blocks, self.normalized = tuple(blocks), normalized
        self.term_weights = {"block_distillation": weight}

    def setup(self, state: State) -> None:
        self.teacher = Frozen(state.model, copy=True)
        try:
            self._targets = Taps(self.teacher.module, {path: path for path in self.blocks})
            for path in self.blocks:
                state.tap(f"block_distillation:{path}", path)
        except ValueError as error:
            raise InputError(str(error)) from error

    def terms(self, state: State) -> dict[str, Tensor]:
        self.teacher(state.batch.inputs)
        given = [self._targets[path] for path in self.blocks]
        own = [state.features[f"block_distillation:{path}"] for path in self.blocks]
        self._targets.clear()
        loss = block_distillation_loss(own, given, len(self.blocks), normalized=self.normalized)
        return {"block_distillation": loss}


class ProximalTerm(Method):
    """Keep a model's shared weights near where they were when training began: FedProx, when that is the model as downloaded.

    Args:
        weight: mu, of the term `proximal`, >= 0; with 0 training takes the steps that it takes without this method, if the objective
            reaches every parameter (one that it does not reach has a gradient of 0 here instead of none, so that weight decay acts on it).
        private: parts that are left out, as in `split_state`: what a client keeps has no downloaded value.

    Raises:
        InputError: for a weight out of range; at setup, for private parts that the model does not have or if nothing is left.

    Cost: one pass over the weights.

    Source: Li et al., 2020, arXiv 1812.06127.

    Examples:
        >>> import coloss
        >>> from torch import nn
        >>> from torch.nn.functional import cross_entropy
        >>> model = nn.Linear(4, 2)
        >>> data = (torch.randn(32, 4), torch.randint(2, (32,)))
        >>> run = coloss.fit(model, data, cross_entropy, [ProximalTerm(0.1)], budget=coloss.Budget(steps=1))
        >>> run.history[0].terms["proximal"]
        0.0
    """

    def __init__(self, weight: Schedule, private: Sequence[str] = ()) -> None:
        super().__init__()
        if not callable(weight) and not 0 <= weight < float("inf"):
            raise InputError(f"weight must be >= 0 and finite, got {weight}")
        self.private = tuple(private)
        self.term_weights = {"proximal": weight}

    def setup(self, state: State) -> None:
        try:
            shared = split_state(state.model, self.private)[0]
        except ValueError as error:
            raise InputError(str(error)) from error
        self._held = [p for name, p in state.model.named_parameters() if name in shared and p.requires_grad]
        if not self._held:
            raise InputError(
                f"private must leave some parameters to be trained, got {self.private}, which are all"
            )
        for number, parameter in enumerate(self._held):
            self.register_buffer(f"reference_{number}", parameter.detach().clone())

    def terms(self, state: State) -> dict[str, Tensor]:
        reference = [self.get_buffer(f"reference_{number}") for number in range(len(self._held))]
        return {"proximal": proximal_loss(self._held, reference)}
