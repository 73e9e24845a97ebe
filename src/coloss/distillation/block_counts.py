"""What cutting a network into blocks saves and costs: activation memory and quality by number of blocks, beside backpropagation.

Measured on digits with a residual network of 16 layers (width 8, then 16), seed 0 alone, 6 epochs of batches of 100, SGD with Nesterov
momentum 0.9 and a cosine from 0.1; bytes of a step on 128 images as a share of backpropagation's 12.2 MB, and test accuracy:

    blocks                 1 (backpropagation)    2               4               8               16
    linear heads           1.00  0.958            0.55  0.930     0.29  0.889     0.19  0.577     0.11  0.549
    AugLocal               1.00  0.958            0.63  0.936     0.38  0.928     0.29  0.914     0.20  0.883 (14 blocks)

Checkpointing every layer takes 0.29 and keeps the accuracy. The learning rate is one that backpropagation bears; at 0.3 it falls to 0.379, while
linear heads have 0.774, 0.914, 0.858 and 0.847: many blocks want larger rates.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coloss.data.batch import Batch
from coloss.distillation.local_learning import LocalLearning
from coloss.distillation.network_layers import find_layers
from coloss.errors import InputError
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.saved_activations import SavedActivations
from coloss.train.step import Objective, TrainingStep


@dataclass(frozen=True)
class BlockCount:
    """One row of `block_count_table`.

    Attributes:
        name: "backpropagation", "checkpointing", or the number of blocks in words.
        blocks: of the network; 1 without cuts.
        saved_bytes: the most bytes that one step holds for its backward pass.
        share: of those of backpropagation.
        seconds_per_step: of the training; NaN where none was run.
        metrics: of the trained model; empty where there was no training or no `evaluate`.
    """

    name: str
    blocks: int
    saved_bytes: int
    share: float
    seconds_per_step: float = float("nan")
    metrics: Mapping[str, float] = field(default_factory=dict)


def block_count_table(
    new_model: Callable[[], nn.Module],
    data: Any,
    objective: Objective,
    new_method: Callable[[int], LocalLearning],
    blocks: Sequence[int],
    *,
    batch: tuple[Any, Any],
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    **options: Any,
) -> list[BlockCount]:
    """Train a network by backpropagation and in 2, 4, 8 ... blocks, and put memory and quality side by side.

    The first row is backpropagation, the second backpropagation with `torch.utils.checkpoint` around every layer that `find_layers` finds (left
    out where it finds none). Its gradients are those of the first, whose metrics it repeats; they are its own but for batch norms, whose running
    statistics would see every batch twice.

    Args:
        new_model: makes the network; called under `seed` for each row, so all start alike.
        data: training data, as for `fit`.
        objective: of the run, and of the heads.
        new_method: number of blocks -> method, such as `lambda blocks: AugmentedLocalLearning(example, blocks=blocks)`.
        blocks: numbers of blocks to try, each >= 2.
        batch: `(inputs, targets)` of the step whose memory is measured.
        evaluate: `model -> metrics` on data that are not trained on.
        budget: of the training; None measures memory only.
        seed: of the weights and of `fit`.
        options: for `fit`, such as `optimizer` and `batch_size`.

    Returns:
        One row for backpropagation, one for checkpointing, one for each number of blocks. With joined last layers a method may cut less
        often than it is asked to: `blocks` is what it did.

    Raises:
        InputError: for a number of blocks below 2.

    Cost: a training run for each row but the second.

    Examples:
        >>> import torch.nn.functional as F
        >>> from coloss.nn import MLP
        >>> inputs, targets = torch.randn(64, 8), torch.randint(3, (64,))
        >>> rows = block_count_table(
        ...     lambda: MLP(8, [32] * 8, 3),
        ...     (inputs, targets),
        ...     F.cross_entropy,
        ...     lambda blocks: LocalLearning(inputs[:2], blocks=blocks),
        ...     [2, 8],
        ...     batch=(inputs, targets),
        ... )
        >>> [row.name for row in rows]
        ['backpropagation', 'checkpointing', '2 blocks', '8 blocks']
        >>> rows[3].share < rows[2].share < 0.65
        True
    """
    if not blocks or min(blocks) < 2:
        raise InputError(f"blocks must hold numbers >= 2, got {list(blocks)}")

    def fresh() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return new_model()

    def row(name: str, method: LocalLearning | None) -> BlockCount:
        measured = copy.deepcopy(method)
        saved = step_bytes(fresh(), batch, objective, measured)
        count = 1 if measured is None else len(measured.cuts) + 1
        if budget is None:
            return BlockCount(name, count, saved, saved / whole if whole else 1.0)
        methods = [] if method is None else [method]
        run = fit(fresh(), data, objective, methods, budget=budget, evaluate=evaluate, seed=seed, **options)
        share = saved / whole if whole else 1.0
        return BlockCount(name, count, saved, share, run.seconds / max(run.steps, 1), run.metrics)

    whole = 0
    rows = [row("backpropagation", None)]
    whole = rows[0].saved_bytes
    saved = checkpointed_bytes(fresh(), batch, objective)
    if saved is not None:
        rows.append(BlockCount("checkpointing", 1, saved, saved / whole, metrics=rows[0].metrics))
    return rows + [row(f"{count} blocks", new_method(count)) for count in blocks]


def step_bytes(
    model: nn.Module, batch: tuple[Any, Any], objective: Objective, method: LocalLearning | None = None
) -> int:
    """The most bytes that one training step holds for its backward pass.

    Args:
        model: in training mode from here on; its gradients are changed, its weights are not.
        batch: inputs and targets.
        objective: the loss.
        method: trains it in blocks; None for backpropagation.

    Examples:
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))
        >>> batch = (torch.zeros(100, 10), torch.zeros(100, 1))
        >>> step_bytes(model, batch, nn.functional.mse_loss)  # input, tanh, prediction and target
        8800
    """
    step = TrainingStep(model.train(), objective, [] if method is None else [method])
    with SavedActivations(step) as meter:
        step.backward(step(Batch.of(batch)))
    step.finish()
    return meter.peak


def checkpointed_bytes(model: nn.Module, batch: tuple[Any, Any], objective: Objective) -> int | None:
    """The same with every layer checkpointed: its inside is computed again in the backward pass. None where no layers are found.

    Examples:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(6)))
        >>> batch = (torch.zeros(100, 10), torch.zeros(100, 10))
        >>> checkpointed_bytes(model, batch, nn.functional.mse_loss) <= step_bytes(
        ...     model, batch, nn.functional.mse_loss
        ... )
        True
    """
    try:
        layers = find_layers(model)
    except InputError:
        return None
    groups = [[model.get_submodule(path) for path in paths] for paths in layers]
    # The first module of a layer stands for all of it, the others hand on what they get.
    for first, *others in groups:
        first.forward = _checkpointed([module.forward for module in (first, *others)])  # type: ignore[method-assign]
        for module in others:
            module.forward = lambda features, *more: features  # type: ignore[method-assign]
    inputs, targets = batch
    # The reentrant kind: autograd reaches a layer through its input alone, and its second pass is seen by the meter.
    seen = inputs.detach().clone().requires_grad_() if _is_float(inputs) else inputs
    try:
        with SavedActivations(model) as meter:
            found: Any = objective(model.train()(seen), targets)
            loss: Any = sum(found.values()) if isinstance(found, Mapping) else found
            loss.backward()
    finally:
        for module in (module for group in groups for module in group):
            del module.forward
    return meter.peak


def _checkpointed(forwards: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    def layer(*args: Any, **kwargs: Any) -> Any:
        found = forwards[0](*args, **kwargs)
        for forward in forwards[1:]:
            found = forward(found)
        return found

    return lambda *args, **kwargs: checkpoint(partial(layer, **kwargs), *args, use_reentrant=True)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
