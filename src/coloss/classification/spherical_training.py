r"""Ranks the right class high without a softmax: losses on three sums of the logits, which leave the cost of many classes out.

Alexandre de Brebisson, Pascal Vincent 2016, "The Z-loss: a shift and scale invariant classification loss belonging to the
Spherical Family", arXiv 1604.08859. The output layer whose exact update costs the same for any number of classes
(`coloss.classification.factored_output`): Vincent, de Brebisson, Bouthillier 2015, arXiv 1412.7091. Sibling losses: de Brebisson,
Vincent 2016, arXiv 1511.05042. Not the penalty on the squared log-partition function that PaLM calls "z-loss".

A loss of the spherical family needs nothing of D logits o but the target's, their sum and their sum of squares:

    o_c, s = sum_k o_k, q = sum_k o_k^2
    Z-loss             (1/a) softplus(a (b - z_c)),   z_c = (o_c - s/D) / sqrt(q/D - (s/D)^2)
    Taylor softmax     -log((1 + o_c + o_c^2/2) / (D + s + q/2))
    spherical softmax  -log((o_c^2 + eps) / (q + D eps))
    squared error      q - 2 o_c + 1

a is `sharpness`, b is `location`: the z-score asked of the target, which lies within sqrt(D-1) of 0 on both sides. A large b asks
for first place, a small one for a good place; a small a makes the loss nearly linear. The gradient of the Z-loss is orthogonal to
the logits and to a constant: it sees neither scale nor offset.

When it helps: classes are so many (from ten thousand on) that the output layer is most of the cost, top-k rankings are wanted
and probabilities are not. `FactoredSphericalLinear` then takes the exact SGD step at a cost that does not grow with the classes
(`coloss bench output-layer`). When not: probabilities are wanted (there are none; a temperature can be fitted afterwards),
classes are few, or the output layer needs momentum or Adam, which the factored update cannot have.
Measured (`coloss verify z-loss`: a customer's next of 23,715 video games, eight seconds of training on one thread, 5 seeds): the
right item is among the first ten in 5.5 % of the cases, with softmax and cross-entropy in 1.9 %, with the factored Taylor softmax in 3.9 %.
That is a gain in steps, 1,200 against 103 for softmax; it says nothing about training to the end. A step of the output
layer alone (64 features, 256 samples, one thread) takes about 4 ms of processor time from a thousand to a million classes, where a
dense layer with cross-entropy takes as much at a thousand, and over 100 times as much at 100,000.

The size of the gradient falls with the size of the logits. So a head of zeros has a huge one (initialise it randomly), growing
weights slow training down, and weight decay on the head acts as a learning-rate schedule, not as a regulariser. D counts every
row of the head, padding included; in the dense `z_loss` a logit of -inf takes its class out. Sums over rows make these losses
ordinary row-wise ones: gradient accumulation and data-parallel training need nothing special.
"""

from typing import Any

from torch import Tensor, nn

from coloss.classification.factored_output import FactoredSphericalLinear
from coloss.classification.logit_sums import Kind, spherical_loss
from coloss.classification.next_item import next_item_task
from coloss.classification.spherical_losses import (
    one_hot_squared_error_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)
from coloss.errors import InputError
from coloss.nn import find_classifier
from coloss.train import Arm, Budget, Claim, Method, Schedule, State, System, value_at


class SphericalObjective(Method):
    """Trains any classifier with a spherical loss in place of its objective; the head stays an ordinary layer.

    Args:
        kind: "z", "taylor-softmax", "spherical-softmax" or "squared-error".
        sharpness: a > 0, of the Z-loss.
        location: b, of the Z-loss: the z-score asked of the target.
        eps: > 0, of the Z-loss (default 1e-6) or the spherical softmax (default 1e-2).

    Raises:
        InputError: for an unknown kind or a value out of range.

    Source:
        de Brebisson, Vincent 2016, arXiv 1604.08859.

    Examples:
        >>> import coloss, torch
        >>> data = (torch.randn(64, 4), torch.randint(3, (64,)))
        >>> run = coloss.fit(
        ...     nn.Linear(4, 3), data, methods=[SphericalObjective()], budget=coloss.Budget(epochs=2)
        ... )
        >>> list(run.history[-1].terms)
        ['z_loss']
    """

    replaces_objective = True

    def __init__(
        self,
        kind: Kind = "z",
        *,
        sharpness: float = 1.0,
        location: float = 0.0,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        _checked_loss(kind, sharpness, location, eps)
        self.kind: Kind = kind
        self.sharpness, self.location, self.eps = sharpness, location, eps

    def terms(self, state: State) -> dict[str, Tensor]:
        logits, target = state.outputs, state.batch.targets
        if self.kind == "z":
            eps = 1e-6 if self.eps is None else self.eps
            loss = z_loss(logits, target, self.sharpness, self.location, eps=eps)
        elif self.kind == "spherical-softmax":
            loss = spherical_softmax_loss(logits, target, 1e-2 if self.eps is None else self.eps)
        elif self.kind == "taylor-softmax":
            loss = taylor_softmax_loss(logits, target)
        else:
            loss = one_hot_squared_error_loss(logits, target)
        return {_term(self.kind): loss}


class FactoredOutput(Method):
    """Trains a classifier's last layer in factored form: exact SGD at a cost that the number of classes does not change.

    The last linear layer becomes a `FactoredSphericalLinear` for the time of training and is put back, with its trained weights,
    at the end. Everything below it is trained by the run's own optimizer. In training mode the model returns the features in front
    of that layer (writing out the logits would cost what is saved); in evaluation mode it returns logits as ever.

    Args:
        learning_rate: of the output layer's SGD step: a number >= 0, or a schedule of progress.
        kind: which loss, see `spherical_loss`.
        sharpness: a > 0, of the Z-loss.
        location: b, of the Z-loss.
        eps: > 0, see `spherical_loss`.
        weight_decay: of the output layer, >= 0.
        stabilize_every: see `FactoredSphericalLinear`.
        classifier: module path of the layer; default: the last linear one.

    Raises:
        InputError: for a value out of range; in `setup`, for a path that names no linear layer, a layer that is the whole model, or
            weights that another part of the model shares; in training, if something else takes over the backward pass.

    Cost:
        As `FactoredSphericalLinear`; each evaluation, and the end, O(D d^2).

    Source:
        Vincent, de Brebisson, Bouthillier 2015, arXiv 1412.7091.

    Examples:
        >>> import coloss, torch
        >>> from coloss.nn import MLP, Classifier
        >>> data = (torch.randn(64, 4), torch.randint(1000, (64,)))
        >>> run = coloss.fit(
        ...     Classifier(MLP(4, [8]), 1000),
        ...     data,
        ...     methods=[FactoredOutput(0.5)],
        ...     budget=coloss.Budget(epochs=2),
        ... )
        >>> list(run.history[-1].terms), run.model.head
        (['z_loss'], Linear(in_features=8, out_features=1000, bias=True))
    """

    replaces_objective = True

    def __init__(
        self,
        learning_rate: Schedule = 0.1,
        kind: Kind = "z",
        *,
        sharpness: float = 1.0,
        location: float = 0.0,
        eps: float | None = None,
        weight_decay: float = 0.0,
        stabilize_every: int = 100,
        classifier: str | None = None,
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.loss = _checked_loss(kind, sharpness, location, eps)
        if not callable(learning_rate) and not 0 <= learning_rate < float("inf"):
            raise InputError(f"learning_rate must be >= 0 and finite, or a schedule, got {learning_rate}")
        if not 0 <= weight_decay < float("inf"):
            raise InputError(f"weight_decay must be >= 0 and finite, got {weight_decay}")
        if stabilize_every < 1:
            raise InputError(f"stabilize_every must be >= 1, got {stabilize_every}")
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.stabilize_every, self.classifier = stabilize_every, classifier
        self._path = ""

    def setup(self, state: State) -> None:
        path = find_classifier(state.model) if self.classifier is None else self.classifier
        linear = dict(state.model.named_modules()).get(path)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"classifier must name an nn.Linear of the model, got {path!r}")
        if not path:
            raise InputError("the model must be more than the linear layer itself")
        owners = [
            name
            for name, found in state.model.named_parameters(remove_duplicate=False)
            if found is linear.weight
        ]
        if len(owners) > 1:
            raise InputError(f"the weight of {path} must not be shared, it is also {owners[0]}")
        layer = FactoredSphericalLinear.from_linear(
            linear,
            value_at(self.learning_rate, 0.0),
            self.loss,
            weight_decay=self.weight_decay,
            stabilize_every=self.stabilize_every,
        )
        state.model.set_submodule(path, _Slot(layer))
        self._path = path
        state.tap("factored_output_features", f"{path}:input")

    def terms(self, state: State) -> dict[str, Tensor]:
        layer = self._layer(state)
        # Of the progress that the run's own schedule sees in this step.
        layer.learning_rate = value_at(self.learning_rate, state.progress)
        features = state.features["factored_output_features"]
        return {_term(self.kind): layer(features.flatten(0, -2), state.batch.targets.flatten())}

    def on_gradients(self, state: State) -> None:
        if not self._layer(state).has_gradients:
            raise InputError(
                "FactoredOutput needs the plain backward pass: leave out what takes it over (another method or the combiner)"
            )

    def on_step(self, state: State) -> None:
        self._layer(state).step()

    def finish(self, state: State) -> None:
        state.model.set_submodule(self._path, self._layer(state).to_linear())

    def _layer(self, state: State) -> FactoredSphericalLinear:
        slot = state.model.get_submodule(self._path)
        assert isinstance(slot, _Slot)
        return slot.layer


class _Slot(nn.Module):
    """Stands where the linear layer stood."""

    def __init__(self, layer: FactoredSphericalLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            return features
        return self.layer.scores(features.flatten(0, -2)).unflatten(0, features.shape[:-1])


def _term(kind: Kind) -> str:
    return kind.replace("-", "_") + "_loss"


def _checked_loss(kind: Kind, sharpness: float, location: float, eps: float | None) -> Any:
    try:
        return spherical_loss(kind, sharpness, location, eps)
    except ValueError as error:
        raise InputError(str(error)) from error


SYSTEM = System(
    slug="z-loss",
    title="The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
    paper="de Brebisson, Vincent 2016, arXiv 1604.08859",
    family="classification",
    acts_on=("loss", "model", "optimizer"),
    api=(
        "coloss.classification.z_loss",
        "coloss.classification.ZLoss",
        "coloss.classification.FactoredSphericalLinear",
        "coloss.classification.FactoredOutput",
        "coloss.classification.SphericalObjective",
        "coloss.classification.spherical_statistics",
        "coloss.classification.spherical_loss",
        "coloss.classification.taylor_softmax_loss",
        "coloss.classification.spherical_softmax_loss",
        "coloss.classification.one_hot_squared_error_loss",
    ),
    method="coloss.classification.SphericalObjective",
    kinds=("classification",),
)

CLAIM = Claim(
    statement=(
        "Trained for the same eight seconds on one thread to predict a customer's next of 23,715 items, a network with the factored "
        "Z-loss output layer has the right item among its first ten more often than with softmax and cross-entropy."
    ),
    metric="top_10",
    baseline="cross-entropy",
    method="z-loss, factored",
    task=next_item_task(Budget(seconds=8)),
    arms=(
        Arm("cross-entropy"),
        Arm("z-loss, factored", lambda setting: [FactoredOutput(100.0, sharpness=0.1, location=30.0)]),
        Arm("taylor softmax, factored", lambda setting: [FactoredOutput(3.0, "taylor-softmax")]),
    ),
    measure=lambda run, setting: {"steps": float(run.steps)},
)
