"""In which order deep linear networks learn pairs of features of the two halves of digits, and what foretells it: the trial behind a claim."""

import math

import torch
from torch import Tensor

from coloss.data import Splits, load
from coloss.jepa.deep_linear import DeepLinearSSL, train_deep_linear
from coloss.jepa.learning_times import Objective, fixed_point, jepa_time, mae_time
from coloss.jepa.view_statistics import view_moments
from coloss.metrics import rank_correlation
from coloss.train import Setting

PAIRS, DEPTH, START, SPREAD = 8, 3, 0.03, 0.15
RATES: dict[Objective, float] = {"jepa": 0.2, "mae": 0.02}


def predict_orders(setting: Setting) -> dict[str, dict[str, float]]:
    """Rank correlation of half-rise times, measured in networks trained by SGD, with what each rule foretells of them.

    Views are the halves of 900 images, in canonical pairs (correlations about 0.8 to 0.5) that are scaled so that their covariances lie
    within 15 % of one another: else these alone would decide.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    left, right = _halves(generator)
    moments = view_moments(left, right, "cca", rcond=1e-2)
    wanted = ((2 * torch.rand(PAIRS, generator=generator, dtype=torch.float64) - 1) * SPREAD).exp()
    views = []
    for view, directions in ((left, moments.directions_x), (right, moments.directions_y)):
        features = (view - view.mean(0)) @ directions[:, :PAIRS]
        views.append(features / features.std(0, correction=0))
    correlation = (views[0] * views[1]).mean(0)
    x, y = (view * (wanted / correlation).sqrt() for view in views)
    rules = {
        "exact solution": jepa_time(wanted, correlation, DEPTH, START),
        "covariance alone": -wanted,
        "regression alone": -correlation,
        "reconstruction's solution": mae_time(wanted, correlation, DEPTH, START),
    }
    measured = {
        "jepa": _measure("jepa", x, y, rules["exact solution"], correlation, generator, setting.smoke),
        "mae": _measure(
            "mae", x, y, rules["reconstruction's solution"], correlation, generator, setting.smoke
        ),
        "gaussian": _measure(
            "jepa", x, y, rules["exact solution"], correlation, generator, setting.smoke, gaussian=True
        ),
    }
    return {
        rule: {f"spearman_{name}": _agreement(times, foretold) for name, times in measured.items()}
        for rule, foretold in rules.items()
    }


def _agreement(times: Tensor, foretold: Tensor) -> float:
    found = rank_correlation(times, foretold)
    # Where nothing was learnt in time no order was foretold.
    return 0.0 if math.isnan(found) else found


def _measure(
    objective: Objective,
    x: Tensor,
    y: Tensor,
    foretold: Tensor,
    correlation: Tensor,
    generator: torch.Generator,
    smoke: bool,
    gaussian: bool = False,
) -> Tensor:
    """Half-rise times in one network."""
    model = DeepLinearSSL(PAIRS, DEPTH, objective, start=START, generator=generator).double()
    if gaussian:
        with torch.no_grad():
            scale = START ** (1 / DEPTH) / PAIRS**0.5
            model.layers.copy_(scale * torch.randn(model.layers.shape, generator=generator))
    rate = RATES[objective]
    steps = 100 if smoke else int(1.25 * float(foretold.max()) / rate)
    course = train_deep_linear(
        model, x, y, learning_rate=rate, steps=steps, batch_size=256, looks=1000, generator=generator
    )
    return course.reached(fixed_point(objective, correlation, DEPTH) / 2)


def _halves(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Left and right halves of 900 images."""
    splits = load("digits", seed=0)
    assert isinstance(splits, Splits)
    images = torch.cat([part.all().inputs for part in (splits.train, splits.validation, splits.test)])
    images = images[torch.randperm(len(images), generator=generator)[:900]].double().view(-1, 8, 8)
    return images[:, :, :4].flatten(1), images[:, :, 4:].flatten(1)
