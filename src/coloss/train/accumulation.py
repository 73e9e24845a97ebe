"""One optimizer step from several micro-batches: what may be averaged, and the large batch in two passes where nothing may.

A loss that is a mean over samples is averaged: each micro-batch is back-propagated by itself, its gradients divided by
their number. A batch statistic (a rank, a correlation, a contrast between samples) is another number on a part of the batch;
for such a loss the micro-batches are joined. A first pass without graph gives the outputs of all of them, the loss
on the joined outputs gives its gradient with respect to them, and a second pass, with the randomness of the first, carries that gradient
into the network one micro-batch at a time.

Source: Gao, Zhang, Han and Callan, 2021, arXiv:2101.06983 (gradient caching).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.ops import distributed
from coloss.train.state import State

if TYPE_CHECKING:
    from coloss.train.step import TrainingStep


def batch_statistics(step: "TrainingStep") -> list[str]:
    """Name the objective and the methods whose loss belongs to a batch as a whole (`batch_statistic = True`)."""
    found = []
    objective = step.objective
    while objective is not None:
        if getattr(objective, "batch_statistic", False):
            found.append(f"the objective {getattr(objective, '__name__', type(objective).__name__)}")
            break
        objective = getattr(objective, "func", None)  # of a functools.partial
    return found + [type(method).__name__ for method in step.state.methods if method.batch_statistic]


def check_averaging(step: "TrainingStep") -> None:
    """Refuse what is wrong when the gradients of micro-batches are averaged.

    Raises:
        InputError: if the loss holds a batch statistic, or the backward pass is taken over by something that does not accumulate.
    """
    statistics = batch_statistics(step)
    if statistics:
        raise InputError(
            f"{' and '.join(statistics)} must see the whole batch, which an average over micro-batches does not give: "
            "use coloss.fit(accumulate=...), which joins them, or larger batches"
        )
    if step.taker is not None and not getattr(step.taker, "accumulates", False):
        raise InputError(
            f"{type(step.taker).__name__} takes over the backward pass, and what it makes of one micro-batch's gradients is not "
            "what it would make of their mean: use accumulate=1 and a larger batch_size"
        )


def check_joining(step: "TrainingStep", monitored: bool) -> None:
    """Refuse what needs the graph from the loss to the weights, which joined micro-batches never hold.

    Raises:
        InputError: if something takes over the backward pass, or gradients are monitored.
    """
    reason = f"{' and '.join(batch_statistics(step))} must see the whole batch, so accumulate > 1 cuts the graph at the model's outputs"
    if step.taker is not None:
        raise InputError(
            f"{reason}, but {type(step.taker).__name__} takes over the backward pass and needs the whole graph: use accumulate=1"
        )
    if monitored:
        raise InputError(
            f"{reason}, but a ConflictMonitor needs the whole graph: use accumulate=1 or no monitor"
        )


def joined_backward(
    step: "TrainingStep",
    batches: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager[Any]],
    before_backward: Callable[[dict[str, Tensor]], None],
) -> None:
    """Leave the gradients of one large batch on the parameters, with the activations of one micro-batch in memory.

    Hooks see the joined batch, its outputs and its tapped features, once. Only the model's forward pass is run in parts, twice. Its
    buffers (running statistics) move in the second pass alone, and start there from where the first one started. Batch normalisation
    in training mode normalises each part by itself, so only there the result differs from that of a large batch.

    Args:
        step: the training step.
        batches: the micro-batches, on the device.
        autocast: makes the precision's context.
        before_backward: called with the loss terms before the backward pass.

    Raises:
        InputError: if a tensor in batch, outputs or tapped features does not hold the samples in its first dimension.

    Cost: two forward passes and one backward pass; outputs and tapped features of the whole batch in memory.
    """
    state, model = step.state, step.model
    state.micro_batch, state.micro_batches = 0, 1
    step.start(_join_batches(batches))
    inputs = _split(state.batch.inputs, len(batches))

    randomness, buffers = [], _buffers(model)
    values: list[list[Any]] = []
    spec: TreeSpec | None = None
    with torch.no_grad(), autocast():
        for part in inputs:
            randomness.append(_Randomness(state))
            leaves, spec = _outputs(state, model(part))
            values.append(leaves)
        for module, name, buffer, before in buffers:
            setattr(module, name, buffer.copy_(before))
    joined = _join_leaves(values, inputs)
    _hand_out(state, joined, spec)
    state.graph_is_cut = True
    try:
        with autocast():
            terms = step.collect_terms()
        before_backward(terms)
        step.propagate(step.combine(state, terms))
    finally:
        state.graph_is_cut = False
    gradients = [value.grad if isinstance(value, Tensor) else None for value in joined]

    after, start, reached = _Randomness(state), 0, False
    for part, random in zip(inputs, randomness):
        random.restore(state)
        with autocast():
            leaves, _ = _outputs(state, model(part))
        rows = _rows(part)
        pairs = [
            (leaf, gradient[start : start + rows].to(leaf.dtype))
            for leaf, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None and leaf.requires_grad
        ]
        if pairs:
            reached = True
            torch.autograd.backward([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        start += rows
        del leaves, pairs
    after.restore(state)
    if not reached and all(parameter.grad is None for parameter in state.trainable):
        raise InputError(f"no loss term depends on a trainable parameter (terms: {sorted(terms)})")
    _average_over_processes(state)
    _hand_out(state, [v.detach() if isinstance(v, Tensor) else v for v in joined], spec)
    step.edit_gradients()


class _Randomness:
    """A moment of every generator that a forward pass may draw from."""

    def __init__(self, state: State):
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self.shared, self.local = state.generator.get_state(), state.local_generator.get_state()

    def restore(self, state: State) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        state.generator.set_state(self.shared)
        state.local_generator.set_state(self.local)


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


def _outputs(state: State, outputs: Any) -> tuple[list[Any], TreeSpec]:
    """What one forward pass gave, tapped features included, as a flat list."""
    found = tree_flatten((outputs, state.reached_features()))
    state.clear_features()
    return found


def _hand_out(state: State, values: list[Any], spec: TreeSpec | None) -> None:
    assert spec is not None
    state.outputs, features = tree_unflatten(values, spec)
    state.replace_features(features)


def _join_leaves(values: list[list[Any]], inputs: list[Any]) -> list[Any]:
    joined = []
    for parts in zip(*values, strict=True):
        if not isinstance(parts[0], Tensor):
            joined.append(_equal(parts, "model outputs"))
            continue
        for part, given in zip(parts, inputs):
            if part.dim() == 0 or len(part) != _rows(given):
                raise InputError(
                    "accumulate > 1 with a batch statistic needs the samples in the first dimension of every output and tapped "
                    f"feature, got shape {tuple(part.shape)} for {_rows(given)} samples"
                )
        whole = torch.cat(parts)
        joined.append(whole.requires_grad_() if whole.is_floating_point() or whole.is_complex() else whole)
    return joined


def _join_batches(batches: Sequence[Batch]) -> Batch:
    def join(*parts: Any) -> Any:
        if isinstance(parts[0], Tensor) and parts[0].dim():
            return torch.cat(parts)
        return _equal(parts, "batch")

    parts = [(batch.inputs, batch.targets, batch.ids, batch.extras) for batch in batches]
    try:
        return Batch(*tree_map(join, *parts))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"accumulate > 1 cannot join these batches into one: {error}") from error


def _equal(parts: Sequence[Any], where: str) -> Any:
    first = parts[0]
    same = all(
        torch.equal(first, part) if isinstance(first, Tensor) and isinstance(part, Tensor) else part == first
        for part in parts[1:]
    )
    if not same:
        raise InputError(
            f"accumulate > 1 with a batch statistic cannot join the {type(first).__name__} values in the {where}: "
            "they must be tensors with samples in the first dimension, or equal in all micro-batches"
        )
    return first


def _split(inputs: Any, count: int) -> list[Any]:
    """As many parts of nearly equal size, fewer where there are fewer samples."""
    leaves, spec = tree_flatten(inputs)
    rows = {len(leaf) if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, Tensor)}
    if len(rows) != 1 or 0 in rows:
        raise InputError(
            "accumulate > 1 with a batch statistic needs the samples in the first dimension of every input tensor, "
            f"got first dimensions {sorted(rows)}"
        )
    count = min(count, *rows)
    parts = [leaf.tensor_split(count) if isinstance(leaf, Tensor) else (leaf,) * count for leaf in leaves]
    return [tree_unflatten(list(part), spec) for part in zip(*parts)]


def _rows(inputs: Any) -> int:
    return next(len(leaf) for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor))


def _average_over_processes(state: State) -> None:
    if distributed.world_size() == 1:
        return
    for parameter in state.trainable:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad.div_(distributed.world_size())
