"""Where an encoder's salient regions lie, and what its features are worth after sequential and after random masks: the trial behind a claim."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.data import MaskRequest, MultiBlock2d, Splits, load
from coloss.jepa.masked_prediction import MaskedPrediction
from coloss.jepa.sequential_prediction import DSeqJEPA, GivenSaliency, QuerySaliency, SalientSequence
from coloss.metrics import knn_probe, linear_probe, predict
from coloss.nn import TokenEncoder, token_encoder_for_shape
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.schedules import cosine, linear
from coloss.train.task import Setting

STEPS = 120
MIN_AREA = 0.06
EQUAL_COMPUTE = 2.25
"""I-JEPA's steps in the time of one of a run whose steps become sequential, measured here."""


def _ink(images: Tensor) -> Tensor:
    """Mean brightness of each patch of 2 x 2 pixels."""
    return F.avg_pool2d(images, 2)[:, 0]


def _overlap(regions: Tensor, ink: Tensor) -> Tensor:
    """Intersection over union, image by image."""
    return (regions & ink).sum(-1) / (regions | ink).sum(-1).clamp(min=1)


def salient_and_random_regions(setting: Setting, part: str = "test") -> dict[str, dict[str, float]]:
    """Train on MNIST of 14 x 14 pixels with sequential masks and with I-JEPA's; overlap of regions with the ink, and probes."""
    splits = load("mnist", seed=setting.seed, limit=100 if setting.smoke else None)
    assert isinstance(splits, Splits)
    known, unseen = splits.train.all(), getattr(splits, part).all()
    images, others = (F.avg_pool2d(inputs, 2) for inputs in (known.inputs[:2000], unseen.inputs[:1000]))
    labels, other_labels = known.targets[: len(images)], unseen.targets[: len(others)]
    # Patches more than a sixth bright are ink: about a quarter of all.
    ink = _ink((others - images.min()) / (images.max() - images.min())).flatten(1) > 0.15
    mean, scale = images.mean(), images.std()
    images, others = (images - mean) / scale, (others - mean) / scale
    budget = 20 if setting.smoke else 100
    random = torch.Generator().manual_seed(setting.seed)

    def look(encoder: TokenEncoder) -> dict[str, float]:
        seen, tokens = (
            predict(encoder, some, len(some), call=encoder.encode)[0] for some in (images, others)
        )
        probed = (seen.flatten(1), labels, tokens.flatten(1), other_labels)
        request = MaskRequest(len(others), (7, 7), tokens=tokens, inputs=others, encoder=encoder)
        first = SalientSequence(QuerySaliency(), min_area=MIN_AREA).regions(request)[:, 0]
        found = first.any(-1)
        moves = torch.randint(7, (len(first), 2), generator=random).tolist()
        elsewhere = torch.stack(
            [region.view(7, 7).roll(tuple(move), (0, 1)).flatten() for region, move in zip(first, moves)]
        )
        return {
            "overlap": float(_overlap(first, ink)[found].mean()) if bool(found.any()) else 0.0,
            "overlap_elsewhere": float(_overlap(elsewhere, ink)[found].mean()) if bool(found.any()) else 0.0,
            "overlap_of_another_image": float(_overlap(first.roll(1, 0), ink)[found].mean()),
            "images_with_a_region": float(found.float().mean()),
            "linear_probe": linear_probe(*probed, labels=budget, seed=setting.seed).accuracy,
            "knn": knn_probe(*probed, k=5, labels=budget, seed=setting.seed).accuracy,
        }

    def learn(method: MaskedPrediction | None, steps: int = STEPS) -> dict[str, float]:
        torch.manual_seed(setting.seed)
        encoder = token_encoder_for_shape((1, 14, 14), dim=32, patch_size=2, pool="cls")
        if method is None:
            return look(encoder)
        run = fit(
            encoder,
            (images,),
            methods=[method],
            budget=Budget(steps=3 if setting.smoke else steps),
            batch_size=32,
            optimizer=partial(torch.optim.AdamW, lr=2e-3),
            learning_rate_schedule=cosine(warmup=0.05),
            seed=setting.seed,
            log_every=10,
        )
        return look(encoder) | {"target_std": run.history[-1].metrics.get("target_std", 0.0)}

    options: dict[str, Any] = {"momentum": linear(0.99, 1.0)}
    given = GivenSaliency(_ink)
    found = {
        "dseq-jepa": learn(DSeqJEPA(min_area=MIN_AREA, **options)),
        "dseq-jepa, ink given": learn(DSeqJEPA(saliency=given, min_area=MIN_AREA, **options)),
        "i-jepa, equal steps": learn(MaskedPrediction(MultiBlock2d(), **options)),
        "i-jepa, equal compute": learn(
            MaskedPrediction(MultiBlock2d(), **options), round(EQUAL_COMPUTE * STEPS)
        ),
        "untrained": learn(None),
    }
    return {**found, "regions moved at random": {"overlap": found["dseq-jepa"]["overlap_elsewhere"]}}
