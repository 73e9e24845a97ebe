"""Training of one weight for all its precisions, with an update after every precision.

For each batch and each precision b, from high to low: a forward pass at b bits with the batch norms of b, the loss, a step of the
optimizer for the weights, and a step of Adam for the scales, whose moments belong to b. See
`coloss.compression.scale_optimizer` for their rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coloss.compression.int8_artefact import Int8Artefact, export_int8, narrow_weight
from coloss.compression.mixed_precision import draw_bits, redraw_probability
from coloss.compression.multibit_quantizers import check_bits
from coloss.compression.scale_optimizer import Adaptation, ScaleAdam, read_adaptation, scale_rates
from coloss.compression.stored_weights import StoredWeight, store_exactly
from coloss.compression.switchable_layers import find_switchable, make_switchable, set_bits, to_plain
from coloss.errors import InputError
from coloss.ops import distillation_kl_loss
from coloss.ops.quantization import SecondRounding, check_rounding
from coloss.train.loop import NonFiniteLossError
from coloss.train.method import Method, overrides
from coloss.train.schedules import Schedule, cosine, value_at
from coloss.train.state import State
from coloss.train.step import Objective, term_name


class JointPrecisionStep:
    """One batch of joint training in a loop of your own: as many forward passes, backward passes and updates as precisions.

    Args:
        model: with switchable layers, see `make_switchable`.
        loss_fn: `(outputs, targets) -> scalar`.
        opt_w: optimizer of the weights; it may hold the scales too, whose gradients it never sees.
        opt_s: optimizer of the scales; default: `ScaleAdam(model)`. Save its state dict beside the model's.
        bits: precisions of each batch, in this order; default: the model's, from high to low. With `distill` the highest comes first.
        scale_rate: lambda, the largest relative step of a scale.
        alrs: adapt the rate: "relative" (True), "literal" or False for the same rate at every precision.
        distill: lower precisions learn the outputs of the highest instead of the targets; outputs are logits of a softmax.

    Raises:
        InputError: if the model is not switchable, or options are out of range.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = make_switchable(model, (8, 4, 2))
        >>> step = JointPrecisionStep(
        ...     model, nn.functional.cross_entropy, torch.optim.Adam(model.parameters())
        ... )
        >>> losses = step(torch.randn(16, 4), torch.randint(2, (16,)))
        >>> list(losses), model[2].bits
        ([8, 4, 2], 8)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        opt_w: torch.optim.Optimizer,
        opt_s: ScaleAdam | None = None,
        bits: Sequence[int] | None = None,
        *,
        scale_rate: float = 5e-3,
        alrs: bool | Adaptation = True,
        distill: bool = False,
    ):
        layers = find_switchable(model)
        known = next(iter(layers.values())).weight_quantizer.bits
        self.model, self.loss_fn, self.opt_w = model, loss_fn, opt_w
        self.opt_s = ScaleAdam(model) if opt_s is None else opt_s
        self.bits = tuple(sorted(known, reverse=True)) if bits is None else check_bits(bits)
        if missing := set(self.bits) - set(known):
            raise InputError(f"bits must be among the model's {known}, got {sorted(missing)}")
        if not scale_rate > 0:
            raise InputError(f"scale_rate must be > 0, got {scale_rate}")
        if distill and self.bits[0] != max(self.bits):
            raise InputError(f"bits must begin with the highest for distill=True, got {self.bits}")
        self.scale_rate, self.adaptation, self.distill = scale_rate, read_adaptation(alrs), distill

    def __call__(self, inputs: Any, targets: Any) -> dict[int, float]:
        """Train on one batch, and leave the model at the first of the precisions.

        Returns:
            Bits -> loss.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite; no weight and no scale is updated by it.
            InputError: with `distill`, for outputs of one number or none.
        """
        losses: dict[int, float] = {}
        highest: Any = None
        of_scales = self.opt_s.parameters_of_scales()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for bits in self.bits:
                set_bits(self.model, bits)
                torch.clear_autocast_cache()
                outputs = self.model(inputs)
                if highest is None or not self.distill:
                    loss = self.loss_fn(outputs, targets)
                else:
                    loss = distillation_kl_loss(outputs, highest, temperature=1.0)
                if highest is None and self.distill:
                    highest = _teacher(outputs)
                losses[bits] = _finite(loss, f"at {bits} bits")
                self.opt_w.zero_grad()
                loss.backward()
                gradients = {id(p): p.grad for p in parameters if id(p) in of_scales}
                for parameter in parameters:
                    if id(parameter) in of_scales:
                        parameter.grad = None
                rates = scale_rates(self.opt_s, gradients, self.scale_rate, self.adaptation)
                self.opt_w.step()
                self.opt_s.step(gradients, rates)
        finally:
            set_bits(self.model, self.bits[0])
        return losses


class DoubleRounding(Method):
    """Trains a network so that its integers can be switched between precisions, and leaves one file for all of them.

    Each batch takes one forward pass, one backward pass and one optimizer step for each precision: n times the work, so compare it with others
    at equal time (`--budget 60s`), not at equal steps. The loss is the run's own at every precision, other methods' terms included. After
    training `artefact` holds the switchable network, and the model is a plain one at `ship_bits`.

    Args:
        bits: precisions, from high to low; the highest is stored.
        ship_bits: precision of the model that the run leaves, or one by path; default: the highest.
        layers: paths; default: all linear layers and convolutions but the first and the last.
        activations: round what the layers read too, with steps of their own for each precision; the shipped model goes on rounding by
            forward pre-hooks, so that its outputs are those of training.
        per_channel: a scale for each output channel.
        rounding, independent: see `MultiBitQuantizer`. Independent scales leave no artefact.
        alrs: adapt the rate of the scales: "relative" (True), "literal" or False for the same at every precision.
        distill: lower precisions learn the outputs of the highest, logits of a softmax, instead of the objective.
        scale_rate: lambda, the largest relative step of a scale, or a schedule of progress.
        sensitivity: trace of the Hessian by path (`hessian_trace`): trains for layers at different precisions. Each batch runs the highest
            precision, a random one, of which layers drift to others by `draw_bits`, and the lowest (sandwich), with transitional batch norms.
        sigma: probability of drifting at the end of training.
        objective: `(outputs, targets) -> scalar` in place of the run's objective; needed under Lightning, whose own cannot be called again.

    Attributes:
        artefact: after training, the network as integers: `artefact.save(path)`, `artefact.set_bits(4).load_into(new_model)`.

    Raises:
        InputError: for options out of range; in `setup`, for layers that do not fit, share weights or are sharded, and models that are
            switchable already; in training, without an optimizer in `state.optimizer`, as in a plain loop that did not set it, and with
            `distill` for outputs of one number.
        ValueError: for an unknown rounding.

    A layer that no batch reached at the shipped precision has no step there: the shipped model does not round its inputs.

    In the file of batch norms each precision has its own. `fit(clip_norm=...)` clips at the last precision only; `on_gradients` of other
    methods runs before every update. Under several processes gradients are averaged as in any run.

    Source:
        Double Rounding 2025, arXiv 2502.01199.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> inputs = torch.randn(64, 8)
        >>> method = DoubleRounding((8, 4, 2), activations=False)
        >>> run = coloss.fit(
        ...     MLP(8, (32, 32), 2),
        ...     (inputs, (inputs[:, 0] > 0).long()),
        ...     nn.functional.cross_entropy,
        ...     [method],
        ...     budget=coloss.Budget(steps=3),
        ... )
        >>> small = method.artefact.set_bits(2).load_into(MLP(8, (32, 32), 2))
        >>> type(small.layers[3]) is nn.Linear, small.layers[3].weight.unique().numel() <= 4
        (True, True)
    """

    def __init__(
        self,
        bits: Sequence[int] = (8, 6, 4, 2),
        *,
        ship_bits: int | Mapping[str, int] | None = None,
        layers: str | Sequence[str] | None = None,
        activations: bool = True,
        per_channel: bool = False,
        rounding: SecondRounding = "nearest",
        independent: bool = False,
        alrs: bool | Adaptation = True,
        distill: bool = False,
        scale_rate: Schedule = cosine(5e-3),
        sensitivity: Mapping[str, float] | None = None,
        sigma: float = 0.5,
        objective: Objective | None = None,
    ):
        super().__init__()
        self.bits = check_bits(sorted(check_bits(bits), reverse=True))
        shipped = [ship_bits] if isinstance(ship_bits, int) else list((ship_bits or {}).values())
        if unknown := set(shipped) - set(self.bits):
            raise InputError(f"ship_bits must be among {self.bits}, got {sorted(unknown)}")
        check_rounding(rounding)
        if not callable(scale_rate) and not scale_rate > 0:
            raise InputError(f"scale_rate must be > 0, got {scale_rate}")
        if not 0 <= sigma <= 1:
            raise InputError(f"sigma must be in [0, 1], got {sigma}")
        self.ship_bits, self.layers, self.scale_rate = ship_bits, layers, scale_rate
        self.adaptation, self.distill = read_adaptation(alrs), distill
        self.options: dict[str, Any] = {
            "activations": activations,
            "per_channel": per_channel,
            "rounding": rounding,
            "independent": independent,
            "transitional": sensitivity is not None,
        }
        self.sensitivity, self.sigma = None if sensitivity is None else dict(sensitivity), sigma
        self.objective, self.replaces_objective = objective, objective is not None
        self.artefact: Int8Artefact | None = None
        self._stored: dict[str, StoredWeight] = {}
        self._plan: list[tuple[str, int | dict[str, int]]] = []
        self._shapes: dict[str, torch.Size] = {}
        self._autocast: dict[str, Any] = {}

    def setup(self, state: State) -> None:
        chosen = make_switchable(state.model, self.bits, layers=self.layers, **self.options)
        if self.sensitivity is not None and set(self.sensitivity) != set(chosen):
            raise InputError(
                f"sensitivity must name the switchable layers {sorted(chosen)}, got {sorted(self.sensitivity)}"
            )
        set_bits(state.model, self._ship())
        self._shapes = {path: layer.get_parameter("weight").shape for path, layer in chosen.items()}
        self.scales, self.artefact, self._stored = ScaleAdam(state.model), None, {}

    def on_batch(self, state: State) -> None:
        for path, shape in self._shapes.items():
            weight = state.model.get_submodule(path).get_parameter("weight")
            if weight.shape != shape or hasattr(weight, "placements"):
                raise InputError(
                    f"the weight of {path} is sharded: quantisation needs whole weights, use strategy ddp"
                )
        device = next(state.model.parameters()).device.type
        self._autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        self._plan = self._precisions(state)
        set_bits(state.model, self.bits[0])

    def terms(self, state: State) -> dict[str, Tensor]:
        if self.objective is None:
            return {}
        return _named(self.objective, state)

    def backward(self, state: State, terms: dict[str, Tensor]) -> None:
        if state.optimizer is None:
            raise InputError(
                "double rounding takes a step after every precision: set state.optimizer of the training step to the optimizer"
            )
        highest = _teacher(state.outputs) if self.distill else state.outputs
        for number, (name, bits) in enumerate(self._plan, 1):
            if number > 1:
                terms = self._again(state, bits, highest)
            loss = state.combine(state, terms)
            value = _finite(loss, f"{name}, step {state.step}")
            gradients = state.gradients(loss, keep_graph=False)
            rates = self._update(state, gradients, last=number == len(self._plan))
            state.log({f"loss_{name}": value} | {f"scale_rate_{name}": rates[b] for b in rates if b == bits})
        state.outputs = highest.detach() if isinstance(highest, Tensor) else highest
        set_bits(state.model, self._ship())

    def finish(self, state: State) -> None:
        set_bits(state.model, self._ship())
        if not self.options["independent"]:
            self.artefact = export_int8(state.model)
        layers = find_switchable(state.model)
        for layer in layers.values():
            if layer.input_quantizer is not None and layer.bits not in layer.input_quantizer.ready:
                layer.input_quantizer = None
        narrow = {}
        if self.options["rounding"] != "middle" or self.options["independent"]:
            narrow = {f"{p}.weight": narrow_weight(x) for p, x in layers.items()}
        to_plain(state.model)
        self._stored = {
            name: stored
            for name, stored in narrow.items()
            if stored.nbytes < store_exactly(state.model.get_parameter(name)).nbytes
        }

    def stored_weights(self, model: nn.Module) -> dict[str, StoredWeight]:
        """How to store the shipped model alone, for `compress_model(model, given=...)`: integers of its precision, which switch no more.

        Args:
            model: as the run left it.
        """
        return dict(self._stored)

    def _ship(self) -> int | dict[str, int]:
        if self.ship_bits is None:
            return self.bits[0]
        if isinstance(self.ship_bits, int):
            return self.ship_bits
        return dict.fromkeys(self._shapes, self.bits[0]) | dict(self.ship_bits)

    def _precisions(self, state: State) -> list[tuple[str, int | dict[str, int]]]:
        """What the forward passes of this batch run at, by name."""
        if self.sensitivity is None or len(self.bits) == 1:
            return [(f"at_{bits}_bits", bits) for bits in self.bits]
        high, low = self.bits[0], self.bits[-1]
        between = self.bits[1:-1] or self.bits
        start = between[int(torch.randint(len(between), (), generator=state.generator))]
        drift = redraw_probability(min(max(state.progress, 0.0), 1.0), self.sigma)
        drawn = draw_bits(self.sensitivity, self.bits, start, drift, state.generator)
        return [(f"at_{high}_bits", high), ("mixed", drawn), (f"at_{low}_bits", low)]

    def _again(self, state: State, bits: int | dict[str, int], highest: Any) -> dict[str, Tensor]:
        """The loss terms of the same batch at another precision."""
        set_bits(state.model, bits)
        torch.clear_autocast_cache()
        state.clear_features()
        with torch.autocast(**self._autocast):
            state.outputs = state.model(state.batch.inputs)
            terms: dict[str, Tensor] = {}
            if self.distill:
                terms["precision_distillation"] = distillation_kl_loss(
                    state.outputs, highest, temperature=1.0
                )
            elif (objective := self.objective or state.objective) is not None:
                terms = _named(objective, state)
            for method in state.methods:
                if method is not self:
                    terms |= method.terms(state)
        return terms

    def _update(self, state: State, gradients: list[Tensor | None], last: bool) -> dict[int, float]:
        """One update of weights (the last one is the loop's) and scales; gives the scales' rates."""
        of_scales = self.scales.parameters_of_scales()
        own = {id(p): g for p, g in zip(state.trainable, gradients, strict=True) if id(p) in of_scales}
        state.set_gradients(
            [None if id(p) in of_scales else g for p, g in zip(state.trainable, gradients, strict=True)]
        )
        rates = scale_rates(self.scales, own, value_at(self.scale_rate, state.progress), self.adaptation)
        if not last:
            assert state.optimizer is not None
            for method in state.methods:
                if overrides(method, "on_gradients"):
                    method.on_gradients(state)
            state.optimizer.step()
        self.scales.step(own, rates)
        return rates


def _named(objective: Objective, state: State) -> dict[str, Tensor]:
    found = objective(state.outputs, state.batch.targets)
    return dict(found) if isinstance(found, Mapping) else {term_name(objective): found}


def _teacher(outputs: Any) -> Tensor:
    """Logits that others learn."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[-1] < 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"distill=True needs logits of two classes or more, got outputs {got}")
    return outputs.detach()


def _finite(loss: Tensor, where: str) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteLossError(f"the loss is {value} {where}")
    return value
