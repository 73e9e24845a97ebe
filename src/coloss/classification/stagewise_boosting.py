"""The algorithm of gradient-boosted networks: stage after stage on pseudo-residuals, then folded into one network."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor
from sklearn.utils import check_random_state
from torch import Tensor

from coloss.classification.boosted_mlp import ACTIVATIONS, Activation, BoostedMLP
from coloss.classification.boosting_losses import (
    BoostingLoss,
    boosting_loss,
    check_targets,
    init_score,
    newton_step,
    pseudo_residual,
)
from coloss.nn import linear_layer


@dataclass(frozen=True)
class BoostingOptions:
    """How stages are made.

    Args:
        stages: T, how many, >= 0.
        units_per_stage: J, hidden units of each, >= 1.
        learning_rate: eta > 0, factor on every stage.
        subsample: share of the samples that a stage is fitted to, in (0, 1].
        activation: "logistic", "tanh" or "relu".
        max_iter: L-BFGS iterations for a stage, >= 1.
        l2: penalty on a stage's weights, >= 0.
        largest_step: limit of the Newton step, > 0.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> BoostingOptions(stages=-1)
        Traceback (most recent call last):
        ...
        ValueError: stages must be >= 0, got -1
    """

    stages: int = 25
    units_per_stage: int = 6
    learning_rate: float = 0.5
    subsample: float = 0.5
    activation: Activation = "logistic"
    max_iter: int = 200
    l2: float = 1e-4
    largest_step: float = 1e3

    def __post_init__(self) -> None:
        for name, least in (("stages", 0), ("units_per_stage", 1), ("max_iter", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "largest_step"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if not 0 < self.subsample <= 1:
            raise ValueError(f"subsample must be in (0, 1], got {self.subsample}")
        if not 0 <= self.l2 < math.inf:
            raise ValueError(f"l2 must be >= 0 and finite, got {self.l2}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {', '.join(ACTIVATIONS)}, got {self.activation!r}")


@dataclass(eq=False)
class Boosted:
    """What boosting gives.

    Attributes:
        network: the folded network, in float64; its outputs are logits (2 F for the logistic loss) or predictions.
        steps: Newton step of each stage that was kept.
        iterations: L-BFGS iterations of each.
        losses: mean training loss of the start and after each stage.
        validation_losses: likewise on the validation data, if there were any.
    """

    network: BoostedMLP
    steps: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)


@dataclass
class _Stage:
    weight: Tensor
    bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    activation: Activation
    iterations: int

    def __call__(self, inputs: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation]()(inputs @ self.weight.T + self.bias) @ self.output_weight.T + (
            self.output_bias
        )


def boost_network(
    features: Float[Tensor, "samples features"],
    targets: Float[Tensor, "samples outputs"],
    loss: BoostingLoss,
    options: BoostingOptions = BoostingOptions(),
    *,
    standardize: bool = True,
    random_state: int | np.random.RandomState | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
) -> Boosted:
    """Grow a network in stages, each fitted to what the ones before it leave, and fold it into one.

    F_0 is the best constant. Stage t draws a subsample, fits a network g_t of J hidden units to the negative gradient of the loss there
    by least squares, and adds eta rho_t g_t with rho_t one Newton step over all samples. A stage that predicts nothing is left out; so
    the network may have fewer stages than asked for.

    Args:
        features: one row for each sample, finite.
        targets: numbers for "squared", -1 or 1 for "logistic", one-hot rows for "softmax".
        loss: which one.
        options: how stages are made.
        standardize: fit to features of mean 0 and deviation 1, and for "squared" to targets of deviation 1, by these samples; folded into
            the network, which takes and gives unscaled values.
        random_state: of subsamples and of the stages' first weights, as in scikit-learn.
        validation: features and targets on which the loss is recorded after each stage.

    Returns:
        The network and its record.

    Raises:
        ValueError: for bad targets, features that are not finite, or rows that do not match.

    Warns:
        UserWarning: if a Newton step was negative: the sum stays valid, but a larger subsample is advised.

    Cost:
        `stages` fits of `units_per_stage` units, at most `max_iter` iterations each; memory O(samples * (features + outputs)).

    Source:
        Emami, Martinez-Munoz 2023, arXiv 1909.12098.

    Examples:
        >>> x = torch.linspace(-3, 3, 100, dtype=torch.float64)[:, None]
        >>> found = boost_network(x, x.sin(), "squared", BoostingOptions(stages=5), random_state=0)
        >>> found.network.stages, found.losses[-1] < 0.01 * found.losses[0]
        (5, True)
    """
    check_targets(loss, targets)
    if features.ndim != 2 or len(features) != len(targets):
        raise ValueError(
            f"features must be ({len(targets)}, features) as the targets say, got {tuple(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity")
    random = check_random_state(random_state)
    inputs, wanted = features.detach().cpu().double(), targets.detach().cpu().double()
    shift, factor = torch.zeros_like(inputs[0]), torch.ones_like(inputs[0])
    unit = torch.ones_like(wanted[0])
    if standardize:
        shift, factor = inputs.mean(0), _or_one(inputs.std(0, correction=0), inputs)
        if loss == "squared":
            unit = _or_one(wanted.std(0, correction=0), wanted)
    inputs, wanted = (inputs - shift) / factor, wanted / unit
    held = None
    if validation is not None:
        held = (validation[0].cpu().double() - shift) / factor, validation[1].cpu().double() / unit
    start = init_score(loss, wanted)
    kept: list[tuple[float, _Stage]] = []
    result = Boosted(_fold(start, kept, options, loss, shift, factor, unit))
    scores = start.expand_as(wanted).clone()
    held_scores = None if held is None else start.expand_as(held[1]).clone()
    _record(result, loss, wanted, scores, held, held_scores, unit)
    for rho, stage in _stages(inputs, wanted, loss, scores, options, random):
        kept.append((options.learning_rate * rho, stage))
        result.steps.append(rho)
        result.iterations.append(stage.iterations)
        if held is not None and held_scores is not None:
            held_scores += options.learning_rate * rho * stage(held[0])
        _record(result, loss, wanted, scores, held, held_scores, unit)
    result.network = _fold(start, kept, options, loss, shift, factor, unit)
    if any(rho < 0 for rho in result.steps):
        warnings.warn(
            f"{sum(rho < 0 for rho in result.steps)} of {len(result.steps)} Newton steps were negative: a stage that was fitted to "
            "its subsample points the wrong way on all samples; a larger subsample may help",
            UserWarning,
            stacklevel=2,
        )
    return result


def _stages(
    inputs: Tensor,
    targets: Tensor,
    loss: BoostingLoss,
    scores: Tensor,
    options: BoostingOptions,
    random: np.random.RandomState,
) -> Iterator[tuple[float, _Stage]]:
    """One stage after the other, with its Newton step; `scores` are brought up to date in place."""
    size = max(int(round(options.subsample * len(inputs))), 1)
    for _ in range(options.stages):
        residual = pseudo_residual(loss, targets, scores)
        if float(residual.abs().max()) <= 1e-12 * max(float(targets.abs().max()), 1.0):
            return  # nothing is left to fit but rounding
        rows = torch.from_numpy(random.permutation(len(inputs))[:size])
        seed = int(random.randint(2**31 - 1))
        stage = _fit_stage(inputs[rows], residual[rows], options, seed)
        direction = stage(inputs)
        # A unit may stall at a constant of rounding size, which points nowhere.
        if not bool(direction.isfinite().all()) or float(direction.abs().max()) < 1e-12:
            continue
        rho = newton_step(loss, targets, residual, direction, options.largest_step)
        if rho == 0:
            continue
        scores += options.learning_rate * rho * direction
        yield rho, stage


def _fit_stage(inputs: Tensor, residual: Tensor, options: BoostingOptions, seed: int) -> _Stage:
    network = MLPRegressor(
        hidden_layer_sizes=(options.units_per_stage,),
        activation=options.activation,
        solver="lbfgs",
        alpha=options.l2,
        max_iter=options.max_iter,
        max_fun=100 * options.max_iter,
        tol=0.0,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # A stage need not converge: the next one goes on from what it leaves.
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(inputs.numpy(), residual[:, 0].numpy() if residual.shape[1] == 1 else residual.numpy())
    first, last = (torch.from_numpy(np.asarray(part, dtype=np.float64).T.copy()) for part in network.coefs_)
    bias, output_bias = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in network.intercepts_)
    return _Stage(first, bias, last, output_bias, options.activation, int(network.n_iter_))


def _fold(
    start: Tensor,
    kept: list[tuple[float, _Stage]],
    options: BoostingOptions,
    loss: BoostingLoss,
    shift: Tensor,
    factor: Tensor,
    unit: Tensor,
) -> BoostedMLP:
    """All stages as one network for unscaled values; the logistic loss has probabilities sigmoid(2 F)."""
    outer = 2.0 * unit if loss == "logistic" else unit
    empty = start.new_zeros(0, len(shift))
    weight = torch.cat([empty, *[stage.weight for _, stage in kept]]) / factor
    bias = torch.cat([start.new_zeros(0), *[stage.bias for _, stage in kept]]) - weight @ shift
    output = torch.cat(
        [start.new_zeros(len(start), 0), *[size * stage.output_weight for size, stage in kept]], dim=1
    )
    shares = torch.stack([start, *[size * stage.output_bias for size, stage in kept]])
    hidden = linear_layer(weight, bias)
    return BoostedMLP(hidden, output * outer[:, None], shares * outer, options.activation)


def _record(
    result: Boosted,
    loss: BoostingLoss,
    targets: Tensor,
    scores: Tensor,
    held: tuple[Tensor, Tensor] | None,
    held_scores: Tensor | None,
    unit: Tensor,
) -> None:
    # In the unit of the targets as they were given; `unit` is 1 for the other losses.
    result.losses.append(float(boosting_loss(loss, targets * unit, scores * unit)))
    if held is not None and held_scores is not None:
        result.validation_losses.append(float(boosting_loss(loss, held[1] * unit, held_scores * unit)))


def _or_one(deviation: Tensor, values: Tensor) -> Tensor:
    """A constant column has a deviation of rounding size, and is divided by 1."""
    return torch.where(deviation > 1e-12 * values.abs().amax(0), deviation, 1.0)
