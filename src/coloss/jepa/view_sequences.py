"""Trains an encoder on views whose making is known: features of one view keep how it was made, a summary of several says what they show.

seq-JEPA: Ghaemi, Muller, Bakhtiari, 2025, arXiv 2505.03176, "seq-JEPA: Autoregressive Predictive Learning of Invariant-Equivariant World
Models".

A sample is seen in T views x_1 ... x_T whose making is known; a_t is what happened from view t to the next. With an encoder f, its slow
copy g, an embedding e of actions (linear, then batch norm without scale), a transformer A with a learned token in front, and a predictor p:

    tokens      c_t = [f(x_t), e(a_t)] for t < T,   c_T = [f(x_T), 0]           no positions: the actions give the order
    summary     z   = A(c_1, ..., c_T) at the learned token
    prediction  p([z, e(a_T)])                                                   a_T leads from the last view to the one that is not seen
    loss        mean over samples of  1 - cos(prediction, g(x_{T+1}))            no gradient into g
    after a step g <- m g + (1 - m) f,   m from .996 to 1 by half a cosine

To say what the next view will look like, f must know how each view was made, so it is equivariant; z, which is told the changes, can spare
a part of that. Two halves ship: `encode` (f, one view) and `aggregate` (z, any number of views). With T = 1, no actions and no
transformer it is BYOL's loss in one direction (at m = 0 SimSiam's).

When it helps: views with known parameters, or an agent's actions, where the change itself matters later (pose, place, what an action
does). Measured on 1,200 digits turned by up to 60 degrees, with 16 features (five seeds, test images; `coloss show seq-jepa`): R2 of the
relative angle from two views' features is 0.976; with the actions hidden 0.904 at that arm's own best settings and 0.854 at these, with one view
(BYOL's loss) 0.771, untrained 0.912. The classes are not paid for it: a linear probe on the mean of three views' features gives 0.877, with
actions hidden 0.874, with one view 0.882, untrained 0.725.

When not: changes that nobody knows or wants to know; where only the class matters, one view did as well. Nor does the summary beat
its fair baseline here: a probe on z gives 0.876, on the plain mean of the same views 0.877. z keeps much of the last view's angle (R2 0.78, a
single view 0.91), for digits have an upright position and the prediction needs to know where it starts. And the 64 raw pixels of such small
images tell the angle as well (0.973) as the 16 features do. The paper's larger gains are on larger images and networks.

Statistics of actions are those of real actions: a_T enters neither z nor the statistics that z is made with, and the zeros in its place
enter none. The slow copy runs in evaluation mode with the encoder's own batch-norm statistics, copied at each step. (In the released code
the zeros count, and the copy keeps statistics of its own.) Over several processes these statistics are of all rows, and the loss is a mean
over samples; batch norm inside the encoder is the user's. A checkpoint holds aggregator, predictor, slow copy and generators.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.data.stacking import repeated
from coloss.errors import InputError
from coloss.jepa.known_transforms import ActionKind, ParamTransform, Rotations, draw_views, relative_actions
from coloss.jepa.sequence_aggregator import (
    ActionConditionedAggregator,
    ActionPredictor,
    SequenceEncoder,
    features_at,
    next_view_loss,
)
from coloss.jepa.view_sequence_trial import TURNS, compare_halves, turned_digits_task
from coloss.metrics import feature_standard_deviation
from coloss.metrics.inference import evaluation_mode
from coloss.nn import ModuleEMA
from coloss.train.budget import Budget
from coloss.train.feature_source import FeatureSource, second_look
from coloss.train.method import Method
from coloss.train.schedules import Schedule, cosine, value_at
from coloss.train.state import State
from coloss.train.system import Claim, System


class SeqJEPA(Method):
    """Prediction of the next view from those before it and the actions between them, without an objective or beside one.

    The run's model is the encoder. Without an objective the batch becomes the T observed views of its samples, T times as many
    rows, in one forward pass (targets and ids are repeated), which a `ViewMethod` behind this one takes as its views. With an objective the
    batch stays, and the views take a second forward pass that leaves no trace in outputs, tapped features or batch-norm statistics.

    Views come from a transform, or with the data: then inputs are (batch, T + 1, ...), and the batch's extra "actions" (batch, T, action_dim) holds
    what happened after each of the first T. The model ships as it was built; `sequence_encoder` gives both halves.

    Args:
        transform: draws views with parameters; None for `Rotations(60)`, unless `action_dim` is given.
        observed: T, views before the one that is predicted, >= 1; left unused where views come with the data.
        action: what an action is, see `relative_actions`.
        action_dim: numbers in an action of data that come with views and actions, >= 1; None to draw views by `transform`.
        action_conditioned: False hides all actions: then the loss asks for features that are alike in all views.
        action_features: length of an embedded action.
        depth, heads, dropout: of the aggregator; depth 0 is a plain mean of the views.
        hidden: width of the predictor's hidden layer.
        momentum: m in [0, 1], a number or a schedule of progress. 0 is stop-gradient alone: the copy is the encoder at every step.
        weight: of the loss term, a number >= 0 or a schedule.
        tap: module path of the features (with ":input" for what goes in); None: the model's output, or beside an objective the input of its
            classifier.
        in_features: length of a feature vector, where the module does not declare it.
        meter_every: steps between values of `target_std` in the log, >= 1: `feature_standard_deviation` of the targets, near 0 when
            they have collapsed to one direction, about 1 / sqrt(features) when they are spread evenly.

    Attributes:
        target: the slow copy, a `ModuleEMA`; `aggregator`, `predictor`: all from `setup` on.

    Raises:
        InputError: for a value out of range; in a run, for sizes or data that do not fit.

    Cost:
        For each sample T forward and backward passes of the encoder, one pass of the slow copy, and a transformer over T + 1 tokens.

    Source:
        seq-JEPA, arXiv 2505.03176.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> images, method = torch.rand(64, 1, 8, 8), SeqJEPA(observed=2, action_features=32, depth=1)
        >>> run = coloss.fit(MLP(64, [32]), (images,), methods=[method], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms), method.encode(images).shape
        (['next_view'], torch.Size([64, 32]))
        >>> views, angles = draw_views(method.transform, images, 4)
        >>> method.aggregate(views, method.actions_of(angles)).shape
        torch.Size([64, 64])
    """

    batch_statistic = True
    target: ModuleEMA
    aggregator: ActionConditionedAggregator
    predictor: ActionPredictor

    def __init__(
        self,
        transform: ParamTransform | None = None,
        *,
        observed: int = 3,
        action: ActionKind = "difference",
        action_dim: int | None = None,
        action_conditioned: bool = True,
        action_features: int = 128,
        depth: int = 3,
        heads: int = 4,
        dropout: float = 0.1,
        hidden: int = 1024,
        momentum: Schedule = cosine(0.996, 1.0),
        weight: Schedule = 1.0,
        tap: str | None = None,
        in_features: int | None = None,
        meter_every: int = 10,
    ) -> None:
        super().__init__()
        for name, value in (("observed", observed), ("hidden", hidden), ("meter_every", meter_every)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if action_dim is not None and (action_dim < 1 or transform is not None):
            found = action_dim if action_dim < 1 else "both"
            raise InputError(f"action_dim must be >= 1, and given without a transform, got {found}")
        if not callable(momentum) and not 0 <= momentum <= 1:
            raise InputError(f"momentum must be in [0, 1], or a schedule, got {momentum}")
        if not callable(weight) and not weight >= 0:
            raise InputError(f"weight must be >= 0, or a schedule, got {weight}")
        self.transform = Rotations(60) if transform is None and action_dim is None else transform
        self.observed, self.action = observed, action
        self.action_dim = len(self.transform.names) if self.transform is not None else action_dim
        try:
            relative_actions(torch.zeros(1, 2, self.action_dim or 1), action)
        except ValueError as error:
            raise InputError(str(error).replace("kind", "action")) from error
        self.action_conditioned = action_conditioned
        self.action_features, self.depth, self.heads = action_features, depth, heads
        self.dropout, self.hidden, self.momentum = dropout, hidden, momentum
        self.meter_every, self.in_features = meter_every, in_features
        self.source = FeatureSource(tap)
        self.term_weights = {"next_view": weight}

    def actions_of(
        self, parameters: Float[Tensor, "batch views parameters"]
    ) -> Float[Tensor, "batch steps actions"]:
        """Actions between views, from the parameters that the transform drew; in the units that this method trains with."""
        spread = None if self.transform is None else self.transform.spread
        return relative_actions(parameters, self.action, spread)

    def setup(self, state: State) -> None:
        self.target = ModuleEMA(state.model)
        self.source.setup(state)
        width = self.source.required_width(state, self.in_features)
        try:
            aggregator = ActionConditionedAggregator(
                width,
                (self.action_dim or 0) if self.action_conditioned else 0,
                self.action_features,
                depth=self.depth,
                heads=self.heads,
                dropout=self.dropout,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.aggregator = state.like_model(aggregator)
        predictor = ActionPredictor(aggregator.out_features, aggregator.action_features, self.hidden, width)
        self.predictor = state.like_model(predictor)

    def on_batch(self, state: State) -> None:
        if state.objective is not None:
            return
        batch = state.batch
        if "views" in batch.extras:
            raise InputError(
                "SeqJEPA must draw the views, with their parameters: put it before other methods on views"
            )
        views, actions = self._sequences(state)
        observed = views.shape[1] - 1
        state.batch = replace(
            batch,
            inputs=views[:, :-1].transpose(0, 1).flatten(0, 1),
            targets=repeated(batch.targets, observed),
            ids=repeated(batch.ids, observed),
            extras={**batch.extras, "views": observed, "actions": actions, "next_view": views[:, -1]},
        )

    def terms(self, state: State) -> dict[str, Tensor]:
        extras = state.batch.extras
        if state.objective is None:
            features, observed = self.source.read(state), extras["views"]
            actions, target = extras["actions"], self._targets(state, extras["next_view"])
        else:
            views, actions = self._sequences(state)
            observed = views.shape[1] - 1
            with second_look(state):
                state.outputs = state.model(views[:, :-1].transpose(0, 1).flatten(0, 1))
                features = self.source.read(state)
            target = self._targets(state, views[:, -1])
        if len(features) != observed * len(actions):
            raise InputError(
                f"the model must give one feature vector for each row, got {len(features)} for {observed * len(actions)}"
            )
        sequences = features.unflatten(0, (observed, -1)).transpose(0, 1)
        left = {"embeddings": features.detach(), "embedding_views": observed}
        state.batch = replace(state.batch, extras={**state.batch.extras, **left})
        if state.step % self.meter_every == 0:
            state.log({"target_std": feature_standard_deviation(target)})
        return {"next_view": next_view_loss(sequences, actions, target, self.aggregator, self.predictor)}

    def on_step(self, state: State) -> None:
        self.target.decay = value_at(self.momentum, state.progress)
        self.target.update()

    def finish(self, state: State) -> None:
        # In a tuple, so that the model is not registered as a part of this method.
        self._encoder = (state.model,)

    @property
    def sequence_encoder(self) -> SequenceEncoder:
        """Both halves as one module in evaluation mode, after training; it shares the weights of the model that ships.

        Raises:
            InputError: before the end of a run.
        """
        if not hasattr(self, "_encoder"):
            raise InputError("SeqJEPA has both halves at the end of a run: train it first")
        return SequenceEncoder(self._encoder[0], self.aggregator, self.source.place).eval()

    def encode(self, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch features"]:
        """Features of single views, after training, without gradient: the equivariant half."""
        both = self.sequence_encoder
        with evaluation_mode(both):
            return both.encode(inputs)

    def aggregate(
        self,
        views: Float[Tensor, "batch views *shape"],
        actions: Float[Tensor, "batch steps actions"] | None = None,
    ) -> Float[Tensor, "batch out"]:
        """The summary of sequences of views, after training, without gradient: the invariant half."""
        both = self.sequence_encoder
        with evaluation_mode(both):
            return both.aggregate(views, actions)

    def _sequences(self, state: State) -> tuple[Tensor, Tensor]:
        """T + 1 views of each sample, and the T actions between them."""
        inputs = state.batch.inputs
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            found = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InputError(f"inputs must be one float tensor to make views of, got {found}")
        if self.transform is not None:
            try:
                views, parameters = draw_views(
                    self.transform, inputs, self.observed + 1, state.local_generator
                )
            except ValueError as error:
                raise InputError(f"views cannot be drawn: {error}") from error
            return views, self.actions_of(parameters).to(inputs)
        if state.objective is not None:
            raise InputError("views that come with the data cannot go beside an objective: give a transform")
        actions = state.batch.extras.get("actions")
        if not isinstance(actions, Tensor):
            raise InputError('data with views must hold their actions in the extra "actions", got none')
        if inputs.ndim < 3 or actions.shape != (len(inputs), inputs.shape[1] - 1, self.action_dim):
            raise InputError(
                "inputs must be (batch, T + 1, ...) and actions (batch, T, action_dim) with T >= 1 and "
                f"action_dim = {self.action_dim}, got {tuple(inputs.shape)} and {tuple(actions.shape)}"
            )
        return inputs, actions.to(inputs)

    @torch.no_grad()
    def _targets(self, state: State, next_view: Tensor) -> Tensor:
        with state.features.set_aside():
            return features_at(self.target.module, next_view, self.source.place)


SYSTEM = System(
    slug="seq-jepa",
    title="seq-JEPA: Autoregressive Predictive Learning of Invariant-Equivariant World Models",
    paper="Ghaemi, Muller, Bakhtiari, 2025, arXiv 2505.03176",
    family="jepa",
    acts_on=("batch", "model", "loss"),
    api=(
        "coloss.jepa.SeqJEPA",
        "coloss.jepa.SequenceEncoder",
        "coloss.jepa.ActionConditionedAggregator",
        "coloss.jepa.ActionPredictor",
        "coloss.jepa.next_view_loss",
        "coloss.jepa.ParamTransform",
        "coloss.jepa.draw_views",
        "coloss.jepa.relative_actions",
        "coloss.jepa.Rotations",
        "coloss.jepa.Saccades",
        "coloss.jepa.evaluate_equivariance",
        "coloss.jepa.evaluate_invariance",
    ),
    method="coloss.jepa.SeqJEPA",
    kinds=("self-supervised", "classification"),
)


_SMALL = partial(SeqJEPA, TURNS, action_features=16, depth=1, hidden=256)
_HIDDEN = partial(_SMALL, action_conditioned=False)

CLAIM = Claim(
    statement="On 1,200 digits seen turned by up to 60 degrees, an encoder that learns to predict the next view from three, told the turns "
    "between them, keeps more of the turn than the same encoder with the turns hidden: the relative angle of two views of a test image, "
    "regressed from their two embeddings, has the higher R2.",
    metric="action_r2",
    baseline="actions hidden",
    method="seq-jepa",
    task=turned_digits_task(Budget(steps=400)),
    # Learning rate (1e-3 to 1e-2) and momentum (.95, .99) are each arm's own best R2 on images held out of the training part, seeds 100 and 101.
    trial=partial(
        compare_halves,
        arms={
            "actions hidden": (partial(_HIDDEN, momentum=cosine(0.99, 1.0)), 5e-3),
            "seq-jepa": (partial(_SMALL, momentum=cosine(0.95, 1.0)), 2e-3),
            "actions hidden, settings of seq-jepa": (partial(_HIDDEN, momentum=cosine(0.95, 1.0)), 2e-3),
            "one view": (partial(_HIDDEN, observed=1, depth=0, momentum=cosine(0.95, 1.0)), 2e-3),
        },
    ),
)
