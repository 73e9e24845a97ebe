"""What zeros cost that are learnt, cut afterwards, or cut at half-time: the trial behind the claim of `SparseJEPA`."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import Batch, MaskRequest, Masks, Splits, load
from coloss.jepa.group_sparse import group_l2_norms, multi_information_gaussian
from coloss.jepa.masked_prediction import LatentPass
from coloss.jepa.sparse_prediction import SparseJEPA
from coloss.metrics import knn_probe, linear_probe, predict
from coloss.nn import TokenEncoder, token_encoder_for_shape
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.schedules import cosine, linear
from coloss.train.state import State
from coloss.train.task import Setting

STRENGTH = 0.01
STEPS = 200


class _Measured(SparseJEPA):
    """Keeps what was predicted; from half-time on, `pruned` columns of W, then the shortest, are held at zero."""

    kept: Tensor
    pruned = 0

    def setup(self, state: State) -> None:
        super().setup(state)
        self.register_buffer("kept", torch.ones_like(self.map.influence()))

    def extra_terms(self, predictions: Tensor, targets: Tensor, found: LatentPass, state: State) -> Any:
        self.seen = predictions, F.layer_norm(targets, targets.shape[-1:])
        return super().extra_terms(predictions, targets, found, state)

    def on_step(self, state: State) -> None:
        super().on_step(state)
        if self.pruned and state.progress >= 0.5:
            if bool(self.kept.all()):
                self.kept = _longest(self.map.weight, self.pruned)
            self.map.weight.data.mul_(self.kept[:, None])


def _longest(weight: Tensor, dropped: int) -> Tensor:
    """1 for all columns but the shortest ones."""
    norms = group_l2_norms(weight.detach())
    kept = torch.ones_like(norms).flatten()
    kept[norms.flatten().argsort()[:dropped]] = 0
    return kept.view_as(norms)


def _quadrants(request: MaskRequest, hidden: int | None = None) -> Masks:
    """One of the four tokens hidden: each image its own, or the same one of all."""
    chosen = torch.randint(4, (request.batch_size, 1), generator=request.generator)
    return Masks.partition(torch.arange(4) == (chosen if hidden is None else torch.full_like(chosen, hidden)))


def _unexplained(method: _Measured, encoder: nn.Module, images: Tensor) -> float:
    """Squared error of predicted latents as a share of their variance between images, all quadrants hidden in turn."""
    error = variance = 0.0
    for hidden in range(4):
        method.masker = partial(_quadrants, hidden=hidden)
        state = State(encoder, batch=Batch(images.to(next(encoder.parameters()).device)))
        with torch.no_grad():
            method.terms(state)
        predictions, targets = method.seen
        error += float((predictions - targets).square().sum())
        variance += float((targets - targets.mean(1, keepdim=True)).square().sum())
    return error / variance


def sparse_and_dense(setting: Setting, part: str = "test") -> dict[str, dict[str, float]]:
    """Train SparseJEPA with and without penalty, and with columns cut at half-time; errors and probes of each on images not trained on."""
    splits = load("digits", seed=setting.seed, limit=100 if setting.smoke else None)
    assert isinstance(splits, Splits)
    train, test = splits.train.all(), getattr(splits, part).all()
    mean, scale = train.inputs.mean(0), train.inputs.std(0).clamp(min=0.05)
    images, unseen = (train.inputs - mean) / scale, (test.inputs - mean) / scale

    budget = 20 if setting.smoke else 100

    def look(encoder: TokenEncoder) -> dict[str, float]:
        encoder.eval()
        known, found = (
            predict(encoder, some, len(some), call=encoder.encode)[0] for some in (images, unseen)
        )
        probed = (known.flatten(1), train.targets, found.flatten(1), test.targets)
        pooled = found.mean(1)[
            :, :-1
        ]  # the last entry follows from the others: the encoder ends in a layer norm
        return {
            "linear_probe": linear_probe(*probed, labels=budget, seed=setting.seed).accuracy,
            "knn": knn_probe(*probed, k=5, labels=budget, seed=setting.seed).accuracy,
            "multi_information": multi_information_gaussian(pooled, [4] * 7 + [3]),
        }

    def learn(strength: float, pruned: int = 0) -> tuple[_Measured, TokenEncoder, dict[str, float]]:
        torch.manual_seed(setting.seed)
        encoder = token_encoder_for_shape((1, 8, 8), dim=32, patch_size=4, positions="learned")
        method = _Measured(
            _quadrants, strength=strength, kind="mse", momentum=linear(0.99, 1.0), ships="online"
        )
        method.pruned = pruned
        run = fit(
            encoder,
            (images,),
            methods=[method],
            budget=Budget(steps=3 if setting.smoke else STEPS),
            batch_size=128,
            optimizer=partial(torch.optim.AdamW, lr=3e-3),
            learning_rate_schedule=cosine(warmup=0.05),
            seed=setting.seed,
            log_every=10,
        )
        metrics = {
            **look(encoder),
            "error": _unexplained(method, encoder, unseen),
            "zero_columns": method.zero_columns(),
            "target_std": run.history[-1].metrics.get("target_std", 0.0),
        }
        return method, encoder, metrics

    torch.manual_seed(setting.seed)
    untrained = look(token_encoder_for_shape((1, 8, 8), dim=32, patch_size=4, positions="learned"))
    sparse, _, found = learn(STRENGTH)
    zeros = round(found["zero_columns"] * sparse.map.influence().numel())
    dense, encoder, kept = learn(0.0)
    with torch.no_grad():
        dense.map.weight.mul_(_longest(dense.map.weight, zeros)[:, None])
    after = kept | {"error": _unexplained(dense, encoder, unseen), "zero_columns": dense.zero_columns()}
    return {
        "sparse": found,
        "dense": kept,
        "pruned afterwards": after,
        "pruned half-way": learn(0.0, zeros)[2],
        "untrained": untrained,
    }
