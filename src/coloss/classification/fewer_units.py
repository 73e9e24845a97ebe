"""The claim of boosted networks: digits by fewer and fewer hidden units, beside a trained network that loses its least important ones."""

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from torch import nn

from coloss.classification.boosted_mlp import ACTIVATIONS, BoostedMLP
from coloss.classification.stagewise_boosting import BoostingOptions, boost_network
from coloss.data import Splits, load
from coloss.nn import linear_layer
from coloss.train import Setting

STAGES, UNITS = 24, 6
EIGHTHS = (1, 2, 4, 8)


def units_by_importance(network: MLPClassifier, inputs: np.ndarray) -> BoostedMLP:
    """A trained scikit-learn network with its hidden units ordered, so that the least important are switched off first.

    Importance is the deviation of what a unit adds to the outputs over the inputs. A unit that is off leaves its mean behind.

    Examples:
        >>> inputs, labels = np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 3
        >>> network = MLPClassifier(hidden_layer_sizes=(4,), max_iter=5).fit(inputs, labels)
        >>> ordered = units_by_importance(network, inputs)
        >>> scores = ordered(torch.tensor(inputs)).softmax(1).detach().numpy()
        >>> ordered.stages, bool(np.allclose(scores, network.predict_proba(inputs)))
        (4, True)
    """
    (first, last), (bias, output_bias) = (
        [torch.tensor(part) for part in parts] for parts in (network.coefs_, network.intercepts_)
    )
    active = ACTIVATIONS[network.activation]()(torch.tensor(inputs) @ first + bias)
    order = (active.std(0, correction=0) * last.norm(dim=1)).argsort(descending=True)
    left_behind = active.mean(0)[:, None] * last
    shares = torch.cat([(output_bias + left_behind.sum(0))[None], -left_behind[order]])
    hidden = linear_layer(first.T[order], bias[order])
    return BoostedMLP(hidden, last[order].T, shares, network.activation)


def fewer_and_fewer_units(setting: Setting) -> dict[str, dict[str, float]]:
    """Test accuracy with an eighth, a quarter, half and all of the units, for both ways of training."""
    splits = load("digits", seed=setting.seed, limit=100 if setting.smoke else None)
    assert isinstance(splits, Splits)
    (train, digits), (test, wanted) = (
        (torch.as_tensor(part.inputs).flatten(1).double(), torch.as_tensor(part.targets))
        for part in (splits.train, splits.test)
    )
    rounds = 5 if setting.smoke else 200
    options = BoostingOptions(STAGES, UNITS, learning_rate=0.1, max_iter=rounds)
    one_hot = nn.functional.one_hot(digits, 10).double()
    mean, spread = train.mean(0), train.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    scaled, scaled_test = ((part - mean) / spread for part in (train, test))
    by_adam = MLPClassifier(
        hidden_layer_sizes=(STAGES * UNITS,),
        learning_rate_init=0.01,
        alpha=1.0,
        max_iter=rounds,
        random_state=setting.seed,
    ).fit(scaled.numpy(), digits.numpy())
    ordered = units_by_importance(by_adam, scaled.numpy())
    boosted = boost_network(train, one_hot, "softmax", options, random_state=setting.seed).network
    found = {}
    for name, network, inputs in (("boosted", boosted, test), ("Adam", ordered, scaled_test)):
        accuracy = {
            f"accuracy_{part}_eighths": float(
                (network(inputs, stages=network.stages * part // 8).argmax(1) == wanted).double().mean()
            )
            for part in EIGHTHS
        }
        found[name] = accuracy | {"accuracy_over_sizes": sum(accuracy.values()) / len(EIGHTHS)}
    return found
