"""Encoders trained at several temperatures, with the hard and with the simple loss: how even and how tolerant their embeddings are."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.contrastive.nt_xent import NTXent
from coloss.contrastive.simple_contrast import simple_contrastive_loss
from coloss.data import small_image_views
from coloss.metrics import evaluate_encoder, extract_features, tolerance, uniformity
from coloss.ops import full_precision
from coloss.train import Setting, State, ViewMethod

TEMPERATURES = (0.07, 0.3, 1.0)
HARD_SHARE = 0.1

# Turned, scaled, shifted and noisy, but not occluded: with stronger views the two of a digit are less alike than different digits are.
digit_views = partial(
    small_image_views, views=2, rotation=0.2, scaling=0.15, shift=0.15, gain=0.1, noise=0.1, occlusion=0
)


class SimpleContrast(ViewMethod):
    """Trains on views by `simple_contrastive_loss`, with the negatives of NT-Xent."""

    def view_terms(self, embeddings: Float[Tensor, "views samples dim"], state: State) -> dict[str, Tensor]:
        rows = F.normalize(full_precision(embeddings), dim=2)
        samples = torch.arange(rows.shape[1], device=rows.device).repeat(2)
        loss = simple_contrastive_loss(
            rows[:2].flatten(0, 1), rows[:2].flip(0).flatten(0, 1), ids=samples, across_processes=False
        )
        return {"simple": loss}


def compare_temperatures(setting: Setting) -> dict[str, dict[str, float]]:
    """Train one encoder for each arm and measure the embeddings of test images, as the loss sees them, and the encoder's probes.

    Args:
        setting: on digits.

    Returns:
        For each temperature, the hard loss at the highest and the simple loss: `uniformity` and `tolerance` of the embeddings, and `knn`
        and `linear_probe` of the features. "rising temperature" holds `least_change`: the smallest change of uniformity or tolerance
        between neighbouring temperatures, which the paper says are all above 0; "no effect" holds 0.
    """
    highest = TEMPERATURES[-1]
    methods: dict[str, ViewMethod] = {
        f"temperature {value:g}": NTXent(temperature=value, view=digit_views) for value in TEMPERATURES
    }
    arms = {name: _measured(setting, method) for name, method in methods.items()}
    rising = list(arms.values())
    changes = [
        after[meter] - before[meter]
        for before, after in zip(rising, rising[1:])
        for meter in ("uniformity", "tolerance")
    ]
    hard = NTXent(temperature=highest, hard_share=HARD_SHARE, view=digit_views)
    return {
        "no effect": {"least_change": 0.0},
        "rising temperature": {"least_change": min(changes)},
        **arms,
        f"temperature {highest:g}, hard": _measured(setting, hard),
        "simple loss": _measured(setting, SimpleContrast(view=digit_views)),
    }


def _measured(setting: Setting, method: ViewMethod) -> dict[str, float]:
    run = setting.fit(setting.new_model(), methods=[method])
    embeddings, targets = extract_features(nn.Sequential(run.model, method.projector), setting.splits.test)
    assert isinstance(targets, Tensor)
    probes = evaluate_encoder(run.model, setting.splits)
    return {
        "uniformity": float(uniformity(embeddings)),
        "tolerance": float(tolerance(embeddings, targets)),
        "knn": probes["knn"],
        "linear_probe": probes["linear_probe"],
    }
