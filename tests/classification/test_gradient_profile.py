import json
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.classification import (
    EnsLoss,
    GradientProfile,
    LossProfiles,
    comp_sum_loss,
    ens_loss,
    gradient_profile,
    metric_loss,
)
from coloss.classification.comp_sum import PROFILE as COMP_SUM
from coloss.classification.ensloss import PROFILE as ENSLOSS

MARGINS = torch.tensor([-3.0, -0.5, 0.0, 2.0])


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_value_and_slope_of_a_known_loss(tau: float, classes: int) -> None:
    profile = gradient_profile(partial(comp_sum_loss, tau=tau), MARGINS, num_classes=classes)
    p = 1 / (1 + (classes - 1) * torch.exp(-MARGINS))
    value = -p.log() if tau == 1 else (p ** (tau - 1) - 1) / (1 - tau)
    torch.testing.assert_close(profile.value, value)
    torch.testing.assert_close(profile.gradient, -(p ** (tau - 1)) * (1 - p))
    assert profile.name == "comp_sum_loss" and profile.spread is None


def test_a_binary_loss_of_pytorch_takes_its_targets_as_floats() -> None:
    for reduction in ("mean", "sum"):
        loss = torch.nn.BCEWithLogitsLoss(reduction=reduction)
        profile = gradient_profile(loss, MARGINS, kind="binary")
        torch.testing.assert_close(profile.value, F.softplus(-MARGINS))
        torch.testing.assert_close(profile.gradient, -torch.sigmoid(-MARGINS))
        assert profile.name == "BCEWithLogitsLoss"


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_a_loss_that_compares_samples_sees_them_together_and_each_by_its_own_slope(kind: Any) -> None:
    def joint(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim == 1:
            return F.binary_cross_entropy_with_logits(logits, targets.float())
        return F.cross_entropy(logits, targets)

    apart = gradient_profile(joint, MARGINS, kind=kind, num_classes=3)
    together = gradient_profile(joint, MARGINS, kind=kind, num_classes=3, whole_batch=True)
    torch.testing.assert_close(together.gradient, apart.gradient)
    assert together.value is None and apart.value is not None


@pytest.mark.parametrize("loss", [ens_loss, EnsLoss(), EnsLoss(reduction="sum")])
def test_a_loss_known_by_its_gradient_alone(loss: Any) -> None:
    margins = torch.linspace(-3, 3, 61)
    profile = gradient_profile(loss, margins, kind="binary", draws=40)
    assert profile.value is None and profile.spread is not None
    assert bool((profile.gradient < 0).all()) and bool((profile.gradient.diff() > -0.02).all())
    assert float(profile.gradient[0]) == pytest.approx(-1, abs=1e-3)
    # Two logits are one score, so the slope in the second is the same.
    two = gradient_profile(loss, margins, draws=40)
    torch.testing.assert_close(two.gradient, profile.gradient, atol=0.1, rtol=0)


def test_a_metric_of_the_batch_has_slopes() -> None:
    profile = gradient_profile(partial(metric_loss, metric="balanced_accuracy", amplification=10.0))
    assert profile.value is None
    steepest = profile.margins[profile.gradient.argmin()]
    assert abs(float(steepest)) < 0.1 and float(profile.gradient.max()) <= 1e-6
    assert len(profile.margins) == 161 and float(profile.margins[0]) == -4


def test_the_data_form_is_json_and_marks_what_is_not_finite() -> None:
    profile = GradientProfile(
        "x", MARGINS[:2], torch.tensor([-math.inf, -1.0]), torch.tensor([math.nan, 2.0])
    )
    data = json.loads(json.dumps(profile.as_data(), allow_nan=False))
    assert data == {
        "name": "x",
        "margins": [-3.0, -0.5],
        "value": [None, 2.0],
        "gradient": [None, -1.0],
        "spread": None,
    }


@pytest.mark.parametrize("profiles", [COMP_SUM, ENSLOSS])
def test_the_rooms_pictures(profiles: LossProfiles) -> None:
    before = torch.get_rng_state()
    first, second = profiles.as_data(), profiles.as_data()
    assert first == second and torch.equal(torch.get_rng_state(), before)
    assert [profile["name"] for profile in first["profiles"]] == list(profiles.losses)
    assert all(len(profile["gradient"]) == profiles.points for profile in first["profiles"])
    json.dumps(first, allow_nan=False)


def test_inside_no_grad_it_works_all_the_same() -> None:
    with torch.no_grad():
        assert gradient_profile(F.cross_entropy, torch.tensor([0.0])).gradient.item() == -0.5


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "soft"}, "kind must be .* got 'soft'"),
        ({"num_classes": 1}, "num_classes must be >= 2 and draws >= 1, got 1 and 1"),
        ({"draws": 0}, "num_classes must be >= 2 and draws >= 1, got 2 and 0"),
        ({"margins": torch.zeros(0)}, "margins must hold at least one point"),
        ({"loss": lambda logits, targets: logits}, r"one number that depends on the logits, got \(1, 2\)"),
        ({"loss": lambda logits, targets: 1.0}, "one number that depends on the logits, got float"),
        ({"loss": lambda logits, targets: logits.detach().sum()}, "one number that depends on the logits"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_profile(**({"loss": F.cross_entropy} | options))


def test_measuring_leaves_the_generators_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    LossProfiles({"cross-entropy": F.cross_entropy}, points=3).measure()
    assert not reseeded
