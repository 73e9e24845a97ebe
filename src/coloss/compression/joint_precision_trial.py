"""How the claim of double rounding is measured: one dense network of digits, trained on for several precisions in different ways."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coloss.compression.int8_artefact import Int8Artefact, export_int8, load_int8
from coloss.compression.joint_precision import DoubleRounding
from coloss.compression.precision_calibration import calibrate_precision
from coloss.compression.switchable_layers import find_switchable, make_switchable, set_bits
from coloss.data import load
from coloss.metrics import evaluate_classifier, evaluation_mode
from coloss.nn import Classifier, ConvNet
from coloss.ops.quantization import SecondRounding
from coloss.train.budget import Budget
from coloss.train.schedules import cosine
from coloss.train.task import Setting, Task

BITS = (8, 6, 4, 2)
EPOCHS = 4
DENSE_EPOCHS = 15
FACTORS = (1.4, 1.0, 0.7, 0.5, 0.35, 0.25)
"""Multiples of the first scale among which post-training rounding chooses by validation accuracy."""


@dataclass(frozen=True)
class Recipe:
    """How one arm goes on from the dense network.

    Attributes:
        rate: learning rate of the weights.
        scale_rate: of the scales.
        rounding, alrs: of `DoubleRounding`.
    """

    rate: float = 2e-3
    scale_rate: float = 5e-3
    rounding: SecondRounding = "nearest"
    alrs: bool = True


def digits_task() -> Task:
    """Digits and a small network of four convolutions, the first of which stays dense."""
    return Task(
        name="digits-precisions",
        kind="classification",
        title="digits with four convolutions, three of them at 8, 6, 4 and 2 bits (weights and inputs)",
        load=lambda seed: load("digits", seed=seed),
        model=lambda splits: Classifier(ConvNet(1, (8, 8, 16, 16)), splits.num_classes),
        objective=F.cross_entropy,
        objective_name="cross-entropy",
        validate=lambda model, splits: evaluate_classifier(model, splits.validation),
        test=lambda model, splits: evaluate_classifier(model, splits.test),
        metric="accuracy",
        budget=Budget(epochs=DENSE_EPOCHS),
        batch_size=64,
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        learning_rate_schedule=cosine(),
    )


def train_artefact(
    setting: Setting, dense: nn.Module, recipe: Recipe, bits: Sequence[int] = BITS
) -> Int8Artefact:
    """Train a copy of a dense network on for some precisions; gives its file as read back."""
    method = DoubleRounding(
        bits,
        rounding=recipe.rounding,
        alrs=recipe.alrs,
        scale_rate=cosine(recipe.scale_rate),
    )
    setting.fit(
        copy.deepcopy(dense),
        None,
        [method],
        budget=setting.budget if setting.smoke else Budget(epochs=EPOCHS),
        optimizer=partial(torch.optim.Adam, lr=recipe.rate),
    )
    assert method.artefact is not None
    return _read_back(method.artefact)


def accuracies(setting: Setting, artefact: Int8Artefact, part: str = "test") -> dict[str, float]:
    """Accuracy at each precision of a file, loaded into fresh plain networks."""
    found = {}
    for bits in artefact.bits:
        model = artefact.set_bits(bits).load_into(setting.new_model(), activations=True).eval()
        found[f"accuracy_at_{bits}_bits"] = evaluate_classifier(model, getattr(setting.splits, part))[
            "accuracy"
        ]
    return found


def round_after_training(
    setting: Setting,
    dense: nn.Module,
    rounding: SecondRounding = "nearest",
    factors: Sequence[float] = FACTORS,
) -> Int8Artefact:
    """The same file of a network that was not trained for it: scales chosen on validation data, batch norms and steps calibrated."""
    best: tuple[float, Int8Artefact] | None = None
    for factor in factors if not setting.smoke else (1.0,):
        model = copy.deepcopy(dense)
        make_switchable(model, BITS[:1], activations=True, rounding=rounding)
        for layer in find_switchable(model).values():
            layer.weight_quantizer.log_scale.data.add_(torch.tensor(factor).log())
        artefact = _read_back(switched(setting, model))
        found = accuracies(setting, artefact, "validation")
        score = sum(found.values())
        if best is None or score > best[0]:
            best = score, artefact
    assert best is not None
    return best[1]


def switched(setting: Setting, model: nn.Module) -> Int8Artefact:
    """The file of a switchable network at 8 bits, with the lower precisions calibrated but not trained."""
    with evaluation_mode(model):
        for layer in find_switchable(model).values():
            layer.train()
        model(setting.splits.train.inputs[:256])
    for bits in BITS[1:]:
        calibrate_precision(model, bits, setting.splits.train)
    set_bits(model, BITS[0])
    return export_int8(model)


def _read_back(artefact: Int8Artefact) -> Int8Artefact:
    with tempfile.TemporaryDirectory() as folder:
        return load_int8(artefact.save(Path(folder) / "model.coloss"))


def dense_network(setting: Setting) -> Any:
    """The dense network that all arms begin with."""
    return setting.fit(setting.new_model()).model
