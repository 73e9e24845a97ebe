"""Adds to any run what frozen networks think of the model's outputs: one loss term for each of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.nn import FrozenTaskLoss
from coloss.ops import full_precision
from coloss.train.method import Method
from coloss.train.provenance import teacher_fingerprint
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.teacher_table import TeacherTable


class FrozenTaskTerms(Method):
    """Loss terms from frozen networks, for any model whose outputs a network can look at.

    Each term compares what its network says of `state.outputs` with what it says of `state.batch.targets`. The networks are not part of
    the run: no optimizer, gradient synchronisation or checkpoint holds them; a checkpoint stores their sha256, and a run is not resumed
    with others. Terms are means over the batch wherever the distances are, and then data-parallel training takes the steps of one process.

    Args:
        losses: by name of the term. Their `weight` is the term's default weight.
        weights: in place of those, by name: a number >= 0 or a schedule of progress. While it is 0 the network does not run.
        every: a term is computed at every k-th step, k times as strong, which leaves its mean gradient as it is; on the steps
            between it is 0.
        cached: by name of the term, the network's outputs for the targets, made beforehand by
            `coloss.train.cache_teacher(loss.network, IndexedDataset(targets, ids=...))`, for losses without `preprocess`. Found by sample id; refused
            where the targets are not those that the network saw, as after an augmentation, and where the table says that it is of
            another network.
        boxes: name in `batch.extras` of boxes (batch, 4) in pixels to cut to, see `FrozenTaskLoss`; None uses whole pictures. Not with
            `cached`, whose outputs are of whole pictures.
        prediction: picks what the networks look at from the model's outputs.
        truth: picks its counterpart from the batch's targets.
        measure_every: steps between measurements of the terms' strength, 0 for none: `<name>_gradient_ratio` is reported, the norm
            of the weighted term's gradient on the model's outputs (on `prediction(outputs)` where that is one of them) over that of the
            objective's (of the plain sum, where it has several terms); NaN where the objective has none. Measured where the terms
            are computed, at steps that `every` divides too, and divided by `every`: the mean strength over steps. Costs a backward pass of
            the network and of the objective.

    Raises:
        InputError: for no losses, an unknown name, a value out of range, or cached outputs of another network; at setup, if a network shares parameters with the model;
            on resumption, if a network is another one.

    Cost:
        At each due step a forward and a backward pass of each network, and a forward pass for targets that are not cached.

    Examples:
        >>> import coloss
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        >>> terms = FrozenTaskTerms({"edges": FrozenTaskLoss(network, nn.functional.mse_loss, weight=0.1)})
        >>> images = torch.rand(16, 1, 6, 6)
        >>> run = coloss.fit(
        ...     nn.Conv2d(1, 1, 3, padding=1),
        ...     (images, images.flip(3)),
        ...     nn.functional.l1_loss,
        ...     [terms],
        ...     budget=coloss.Budget(steps=2),
        ... )
        >>> sorted(run.history[-1].terms)
        ['edges', 'l1']
    """

    def __init__(
        self,
        losses: Mapping[str, FrozenTaskLoss],
        *,
        weights: Mapping[str, Schedule] | None = None,
        every: int = 1,
        cached: Mapping[str, TeacherTable] | None = None,
        boxes: str | None = None,
        prediction: Callable[[Any], Tensor] | None = None,
        truth: Callable[[Any], Tensor] | None = None,
        measure_every: int = 0,
    ) -> None:
        super().__init__()
        if not losses:
            raise InputError("losses must hold at least one, got none")
        for argument, names in (("weights", weights or {}), ("cached", cached or {})):
            for name in names:
                if name not in losses:
                    raise InputError(f"{argument} must be of the losses {', '.join(losses)}, got {name!r}")
        for name, weight in (weights or {}).items():
            if not callable(weight) and not 0 <= weight < math.inf:
                raise InputError(f"the weight of {name} must be >= 0 and finite, or a schedule, got {weight}")
        if every < 1:
            raise InputError(f"every must be >= 1, got {every}")
        if measure_every < 0:
            raise InputError(f"measure_every must be >= 0, got {measure_every}")
        if boxes is not None and cached:
            raise InputError("cached outputs are of whole targets, and boxes cut them: give one of the two")
        for name in cached or {}:
            if losses[name].preprocess is not None:
                raise InputError(
                    f"cached outputs are of the targets themselves, and the loss {name!r} has a preprocess: make it part of the network"
                )
        for name, table in (cached or {}).items():
            if table.provenance.teacher is not None:
                table.require(teacher=losses[name].network)
        # Not registered: neither optimizers, nor data-parallel wrappers, nor checkpoints are to see frozen networks.
        self.__dict__["losses"] = dict(losses)
        self.cached, self.boxes, self.every = dict(cached or {}), boxes, every
        self.prediction, self.truth, self.measure_every = prediction, truth, measure_every
        self.term_weights = {name: loss.weight for name, loss in losses.items()} | dict(weights or {})
        self._fingerprints: dict[str, str] | None = None
        self._homes: dict[str, torch.device] = {}

    losses: dict[str, FrozenTaskLoss]

    def setup(self, state: State) -> None:
        own = set(state.model.parameters())
        for name, loss in self.losses.items():
            if any(parameter in own for parameter in loss.parameters()):
                raise InputError(
                    f"the network of {name} must not share parameters with the model, which would be frozen: "
                    "pass FrozenTaskLoss(..., copy=True)"
                )
        for name, loss in self.losses.items():
            for tensor in (*loss.parameters(), *loss.buffers()):
                self._homes[name] = tensor.device
        like = next(state.model.parameters(), None)
        if like is not None:
            for loss in self.losses.values():
                loss.to(like.device)

    def finish(self, state: State) -> None:
        # The networks are the caller's: back to where they came from.
        for name, device in self._homes.items():
            self.losses[name].to(device)

    def terms(self, state: State) -> dict[str, Tensor]:
        prediction = state.outputs if self.prediction is None else self.prediction(state.outputs)
        found = {}
        for name in self.losses:
            if state.step % self.every or value_at(self.term_weights[name], state.progress) == 0:
                # Zero, with a graph to the model.
                found[name] = full_precision(prediction).flatten()[:0].sum()
            else:
                found[name] = self.every * self._distance(name, prediction, state.batch)
        measured = self.measure_every and not (state.step % self.measure_every or state.step % self.every)
        if measured and torch.is_grad_enabled():
            self._measure(state, prediction, found)
        return found

    def _distance(self, name: str, prediction: Tensor, batch: Batch) -> Tensor:
        truth = batch.targets if self.truth is None else self.truth(batch.targets)
        boxes = None
        if self.boxes is not None:
            if self.boxes not in batch.extras:
                raise InputError(f"batch.extras must hold {self.boxes!r}, got {sorted(batch.extras)}")
            boxes = batch.extras[self.boxes]
        loss = self.losses[name]
        if name in self.cached:
            rows = self.cached[name].rows(Batch(truth, ids=batch.ids), called=f"cached outputs of {name!r}")
            return loss.unweighted(prediction, cached=rows.to(prediction.device), boxes=boxes)
        return loss.unweighted(prediction, truth, boxes=boxes)

    def _measure(self, state: State, prediction: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Report how strong each term is beside the objective, where both meet."""
        if state.objective is None or not prediction.requires_grad:
            return
        found = state.objective(state.outputs, state.batch.targets)
        total = torch.stack([*found.values()]).sum() if isinstance(found, Mapping) else found
        weighted = {
            name: term * value_at(self.term_weights[name], state.progress) / self.every
            for name, term in terms.items()
        }
        outputs = [out for out in tree_leaves(state.outputs) if isinstance(out, Tensor) and out.requires_grad]
        # The objective does not reach a tensor that is made of the outputs, such as a slice of them: they are where both meet.
        derived = bool(outputs) and not any(out is prediction for out in outputs)
        base, *norms = gradient_norms(
            {"objective": total, **weighted}, outputs if derived else prediction
        ).values()
        ratios = [norm / base if base > 0 else math.nan for norm in norms]
        state.log({f"{name}_gradient_ratio": ratio for name, ratio in zip(weighted, ratios, strict=True)})

    def get_extra_state(self) -> dict[str, Any]:
        if self._fingerprints is None:
            self._fingerprints = {
                name: teacher_fingerprint(loss.network) for name, loss in self.losses.items()
            }
        return {"networks": self._fingerprints}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        own, stored = self.get_extra_state()["networks"], state.get("networks", {})
        differing = sorted(name for name in own.keys() | stored.keys() if own.get(name) != stored.get(name))
        if differing:
            raise InputError(
                f"the frozen network of {differing[0]} is another one than that of the stored run"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenTaskTerms":
        # The networks follow to a device, but keep their own precision.
        device = fn(torch.empty(0)).device
        for loss in self.losses.values():
            loss.to(device)
        return super()._apply(fn, recurse)


def gradient_norms(terms: Mapping[str, Tensor], at: Tensor | Sequence[Tensor]) -> dict[str, float]:
    """Norm of each term's gradient on a tensor, or on several together, which says how strongly each of them pulls there.

    Args:
        terms: scalars with a graph to it; 0 for one that does not reach it.
        at: such as a model's output, or its outputs.

    Returns:
        By name; the graph is kept.

    Cost:
        A backward pass from each term down to the tensors.

    Examples:
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> gradient_norms({"square": x.square().sum() / 2, "sum": x.sum(), "none": torch.zeros(())}, x)
        {'square': 5.0, 'sum': 1.4142135381698608, 'none': 0.0}
    """
    norms = {}
    for name, term in terms.items():
        found: Sequence[Tensor | None] = ()
        if term.requires_grad:
            found = torch.autograd.grad(term, at, retain_graph=True, allow_unused=True)
        norms[name] = math.hypot(*(float(full_precision(part).norm()) for part in found if part is not None))
    return norms


def matched_weights(
    losses: Mapping[str, FrozenTaskLoss],
    prediction: Tensor,
    truth: Tensor,
    objective: Tensor,
    ratio: float = 1.0,
) -> dict[str, float]:
    """Weights with which each term pulls at a model's outputs as strongly as the objective does, or `ratio` times so.

    Networks, distances and picture sizes differ by orders of magnitude in the size of their gradients; this makes terms comparable.

    Args:
        losses: by name.
        prediction: the model's outputs for some samples, with their graph.
        truth: their targets.
        objective: the scalar that the model is trained on, for the same outputs.
        ratio: norm of the weighted term's gradient on the prediction over that of the objective's, > 0.

    Returns:
        By name.

    Raises:
        InputError: for a ratio out of range, or an objective or a term without gradient there.

    Examples:
        >>> from torch import nn
        >>> truth, prediction = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> loss = FrozenTaskLoss(nn.Identity(), lambda x, y: (x - y).square().sum())
        >>> matched_weights({"squares": loss}, prediction, truth, prediction[:, 0].sum() * 5, ratio=2.0)
        {'squares': 1.0}
    """
    if not 0 < ratio < math.inf:
        raise InputError(f"ratio must be > 0 and finite, got {ratio}")
    terms = {name: loss.unweighted(prediction, truth) for name, loss in losses.items()}
    (base,) = gradient_norms({"objective": objective}, prediction).values()
    if not base > 0:
        raise InputError("objective must have a gradient on the prediction, got none")
    found = gradient_norms(terms, prediction)
    for name, norm in found.items():
        if not norm > 0:
            raise InputError(
                f"the term {name} must have a gradient on the prediction, got none: no weight makes it as strong"
            )
    return {name: ratio * base / norm for name, norm in found.items()}
