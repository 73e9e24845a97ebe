"""A deep linear network that learns from two views, by latent prediction or by reconstruction: the smallest model of both, to experiment with."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.jepa.learning_times import Objective, check_objective, check_start
from coloss.ops import without_autocast


class DeepLinearSSL(nn.Module):
    """An encoder W = W_L ... W_1 and a head V, all square and linear, started small and balanced.

        JEPA  1/2 E |V W x - stop_gradient(W y)|^2          MAE  1/2 E |V W x - y|^2

    Args:
        features: of a view, >= 1.
        depth: L >= 1.
        objective: "jepa" or "mae".
        start: gain of every feature at the beginning, > 0: each matrix is start^(1/L) times an orthogonal one.
        stop_gradient: False lets the gradient of JEPA into its target; a control, which collapses to 0.
        generator: draws the orthogonal factors; None takes the identity.

    Attributes:
        layers: W_1 ... W_L (depth, features, features).
        head: V (features, features): predictor or decoder.

    Returns:
        From `forward`: the representation W x of each row.

    Raises:
        ValueError: for a value out of range.

    Source:
        After Littwin et al. 2024, arXiv 2407.03475.

    Examples:
        >>> model = DeepLinearSSL(3, depth=2, start=0.01)
        >>> model.gains()
        tensor([0.0100, 0.0100, 0.0100])
        >>> round(model.loss(torch.eye(3), torch.eye(3)).item(), 8)
        4.05e-05
    """

    def __init__(
        self,
        features: int,
        depth: int,
        objective: Objective = "jepa",
        *,
        start: float = 0.01,
        stop_gradient: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise InputError(f"features must be >= 1, got {features}")
        check_objective(objective, depth)
        check_start(start)
        self.objective, self.stop_gradient = objective, stop_gradient
        factors = torch.eye(features).expand(depth, features, features)
        if generator is not None:
            factors = torch.linalg.qr(torch.randn(depth, features, features, generator=generator))[0]
        scale = start ** (1 / depth)
        self.layers = nn.Parameter(scale * factors.clone())
        # A decoder undoes the turns of the encoder; a predictor maps its space to itself.
        turn = torch.eye(features) if objective == "jepa" else _product(factors).T.contiguous()
        self.head = nn.Parameter(scale * turn)

    def encoder(self) -> Float[Tensor, "features features"]:
        """W, the product of the layers."""
        return _product(self.layers)

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        return x @ self.encoder().T

    def loss(
        self, x: Float[Tensor, "batch features"], y: Float[Tensor, "batch features"]
    ) -> Float[Tensor, ""]:
        """Half the squared error, summed over features and averaged over rows."""
        encoder = self.encoder()
        target = y
        if self.objective == "jepa":
            target = y @ (encoder.detach() if self.stop_gradient else encoder).T
        return (x @ encoder.T @ self.head.T - target).square().sum(1).mean() / 2

    @torch.no_grad()
    def gains(self, directions: Float[Tensor, "features count"] | None = None) -> Float[Tensor, " count"]:
        """By how much the encoder stretches directions; None for the coordinates."""
        encoder = self.encoder()
        return (encoder if directions is None else encoder @ directions.to(encoder)).norm(dim=0)

    @torch.no_grad()
    def imbalance(self) -> float:
        """Largest entry of W_(a+1)^T W_(a+1) - W_a W_a^T, the head included; small steps conserve each."""
        chain = [*self.layers, self.head]
        return max(
            float((upper.T @ upper - lower @ lower.T).abs().max()) for lower, upper in zip(chain, chain[1:])
        )

    def extra_repr(self) -> str:
        depth, features, _ = self.layers.shape
        return f"{features}, depth={depth}, objective={self.objective!r}, stop_gradient={self.stop_gradient}"


class GainCourse(NamedTuple):
    """How gains rose in training.

    Attributes:
        times: steps done times the learning rate (looks).
        gains: (looks, directions).
    """

    times: Tensor
    gains: Tensor

    def reached(self, levels: Float[Tensor, " directions"]) -> Float[Tensor, " directions"]:
        """When each gain first was at its level, between looks by a straight line; infinite if never.

        Examples:
            >>> course = GainCourse(torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 0.0], [0.4, 0.1]]))
            >>> course.reached(torch.tensor([0.2, 0.2])).tolist()
            [1.5, inf]
        """
        there = self.gains >= levels
        place = there.int().argmax(0)
        before = (place - 1).clamp(min=0)
        low, high = (self.gains.gather(0, rows[None])[0] for rows in (before, place))
        share = ((levels - low) / (high - low)).where(place > 0, 1.0)
        times = self.times[before] + share * (self.times[place] - self.times[before])
        return times.where(there.any(0), torch.inf)


def train_deep_linear(
    model: DeepLinearSSL,
    x: Float[Tensor, "samples features"],
    y: Float[Tensor, "samples features"],
    *,
    learning_rate: float,
    steps: int,
    batch_size: int | None = None,
    looks: int = 500,
    generator: torch.Generator | None = None,
) -> GainCourse:
    """Train by stochastic gradient descent without momentum, as the theory has it, and record the gains of the coordinates.

    Args:
        model: trained in place.
        x, y: two views, centred, row by row of one sample; in the type of the model.
        learning_rate: > 0; too large for a feature of large variance it diverges.
        steps: >= 1.
        batch_size: rows drawn for a step, with replacement; None for all rows at every step.
        looks: about how many times the gains are recorded, >= 1.
        generator: of the draws.

    Returns:
        Times (in units of the theory) and gains.

    Raises:
        ValueError: for a value out of range, views that do not match, or gains that are no longer finite.

    Examples:
        >>> views = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> model = DeepLinearSSL(2, depth=1, start=0.1)
        >>> course = train_deep_linear(model, views, views, learning_rate=0.1, steps=500)
        >>> bool((course.gains[-1] > 0.5).all())
        True
    """
    for name, value in (
        ("steps", steps),
        ("looks", looks),
        ("batch_size", 1 if batch_size is None else batch_size),
    ):
        if value < 1:
            raise InputError(f"{name} must be >= 1, got {value}")
    if not learning_rate > 0:
        raise InputError(f"learning_rate must be > 0, got {learning_rate}")
    if x.shape != y.shape or len(x) == 0:
        raise InputError(
            f"views must be of one shape and hold a row, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    parameters = [model.layers, model.head]
    every = max(steps // looks, 1)
    # Autocast keeps the cast weights of the first step, and training would not move them.
    with without_autocast(model.head.device):
        times, gains = [0.0], [model.gains()]
        for step in range(1, steps + 1):
            rows = (
                slice(None)
                if batch_size is None
                else torch.randint(len(x), (batch_size,), generator=generator)
            )
            slopes = torch.autograd.grad(model.loss(x[rows], y[rows]), parameters)
            # Written out: on matrices this small an optimizer's own work would take most of the time.
            with torch.no_grad():
                for parameter, slope in zip(parameters, slopes):
                    parameter.sub_(slope, alpha=learning_rate)
            if step % every == 0 or step == steps:
                times.append(step * learning_rate)
                gains.append(model.gains())
    if not bool(gains[-1].isfinite().all()):
        raise InputError(f"learning_rate must be smaller, got {learning_rate}: training diverged")
    return GainCourse(torch.tensor(times, dtype=gains[0].dtype), torch.stack(gains))


def _product(layers: Tensor) -> Tensor:
    product = layers[0]
    for layer in layers[1:]:
        product = layer @ product
    return product
