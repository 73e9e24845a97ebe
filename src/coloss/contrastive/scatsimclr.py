r"""Contrastive training for small image sets: fixed wavelets in place of early layers, and a question about the image as second loss.

ScatSimCLR: Kinakh, Taran, Voloshynovskiy, 2021, arXiv 2108.13939, "ScatSimCLR: self-supervised contrastive learning with pretext task
regularization for small-scale datasets".

Two parts that serve alone as well. The encoder: scattering coefficients of the image x (`ScatteringFront`, nothing learnt) and a small
residual network on them (`ResidualAdapter`):

    S0 = x * phi      S1 = |x * psi_j,l| * phi      S2 = ||x * psi_j,l| * psi_k,m| * phi     with k > j
    channels = 1 + L J + L^2 J (J - 1) / 2          for each colour, J scales, L angles

The loss: NT-Xent on two views, and a pretext question put to the same encoder, by a head of its own:

    L = NT-Xent + 0.3 * cross_entropy(head(features(changed image)), which change)
    rotation: 0, 90, 180 or 270 degrees, all four of each image      jigsaw: which of 35 orders of the 3 x 3 tiles

`ScatSimCLR` is this loss for whatever encoder is trained: it swaps nothing in the model, so that it compares with other methods on equal
networks. The whole published system is `fit(ScatteringEncoder(...), data, methods=[ScatSimCLR()])`, and in the lab
`coloss compare mnist-ssl --methods scatsimclr --model coloss.contrastive:scattering_encoder`. `RotationPretext` and `JigsawPretext` go
beside any method or objective.

When it helps: images, few of them, few labels: the wavelets know what small shifts and deformations do before anything is learnt.
Measured with frozen features, a linear probe on 100 labels and 5 draws of them, test accuracy on Fashion-MNIST and on MNIST:

    scattering, J = 2, L = 8    0.749   0.897
    its first order alone       0.735   0.884     a fifth of the coefficients, most of the gain
    raw pixels                  0.703   0.711     the baseline of the claim
    random convolutions         0.632   0.730     as many maps as the scattering, of the same size

What the pretext question adds to NT-Xent was not measured here. Rotation costs 4 encoder passes for each image beside the 2 of the views,
jigsaw 9. When not: vectors and series; images without an upright position for rotation (the digits 0, 6, 8 and 9 tell little); much data,
where learnt layers may catch up.

The scattering runs in float32 whatever the precision of the rest. Distributed: NT-Xent compares with the views of all processes; the
pretext terms are means over each process's own rows, so with equal numbers of rows and no random augmentation data-parallel training
takes the steps of one process, as far as the encoder's own layers allow it. Checkpoints hold the heads and the orders of the tiles.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from coloss.contrastive.nt_xent import NTXent
from coloss.contrastive.pretext import JigsawPretext, Pretext, RotationPretext
from coloss.contrastive.scattering import ScatteringFront, scattering_channels
from coloss.data import Splits, View, load
from coloss.errors import InputError
from coloss.metrics import extract_features, label_budget, linear_probe
from coloss.nn import ConvNet
from coloss.train import Claim, Schedule, Setting, State, System


class ScatSimCLR(NTXent):
    """Self-supervised training by NT-Xent on views and a pretext question about each image, on any image encoder.

    Adds the terms `nt_xent` and `rotation` or `jigsaw`. With `pretext_weight` 0 every step is that of `NTXent`. The encoder is the model's
    own affair; `ScatteringEncoder` is the published one.

    Args:
        pretext: `"rotation"` or `"jigsaw"`.
        pretext_weight: of the question: a number >= 0 or a schedule of progress.
        temperature, weight, views, projector, view, tap, in_features: as for `NTXent`. The turned copies of an image get the first view of
            `view` as their augmentation.
        hidden: widths of the pretext head; None for the published ones (512, 128) and (512, 4096).
        dropout: in the pretext head.

    Attributes:
        pretext: the `RotationPretext` or `JigsawPretext`.

    Raises:
        InputError: for a value out of range; in a run, for inputs that are no images.

    Cost:
        For each image 2 encoder passes for the views, and 4 (rotation) or 9 (jigsaw) more.

    Source:
        Kinakh et al., 2021, arXiv 2108.13939.

    Examples:
        >>> import coloss
        >>> from coloss.contrastive import ScatteringEncoder
        >>> encoder = ScatteringEncoder(1, scales=1, blocks=((16, 1),), stem=16, pool=2)
        >>> images = torch.rand(64, 1, 8, 8)
        >>> run = coloss.fit(encoder, (images,), methods=[ScatSimCLR()], budget=coloss.Budget(epochs=1))
        >>> sorted(run.history[-1].terms), run.model(images).shape
        (['nt_xent', 'rotation'], torch.Size([64, 64]))
    """

    def __init__(
        self,
        *,
        pretext: Literal["rotation", "jigsaw"] = "rotation",
        pretext_weight: Schedule = 0.3,
        temperature: Schedule = 0.5,
        weight: Schedule = 1.0,
        views: int = 2,
        projector: Sequence[int] = (128, 64),
        view: View | None = None,
        hidden: Sequence[int] | None = None,
        dropout: float = 0.5,
        tap: str | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            weight=weight,
            views=views,
            projector=projector,
            view=view,
            tap=tap,
            in_features=in_features,
        )
        head = {"hidden": hidden} if hidden is not None else {}
        options: dict = {"dropout": dropout, "tap": tap, "in_features": in_features, **head}
        self.pretext: Pretext
        if pretext == "rotation":
            self.pretext = RotationPretext(pretext_weight, view=view, **options)
        elif pretext == "jigsaw":
            self.pretext = JigsawPretext(pretext_weight, **options)
        else:
            raise InputError(f'pretext must be "rotation" or "jigsaw", got {pretext!r}')
        self.term_weights = {**self.term_weights, **self.pretext.term_weights}

    def setup(self, state: State) -> None:
        super().setup(state)
        self.pretext.setup(state)

    def on_batch(self, state: State) -> None:
        # Before the images give way to their views.
        self.pretext.on_batch(state)
        super().on_batch(state)

    def terms(self, state: State) -> dict[str, Tensor]:
        return super().terms(state) | self.pretext.terms(state)


SYSTEM = System(
    slug="scatsimclr",
    title="ScatSimCLR: self-supervised contrastive learning with pretext task regularization for small-scale datasets",
    paper="Kinakh, Taran, Voloshynovskiy, 2021, arXiv 2108.13939",
    family="contrastive",
    acts_on=("batch", "model", "loss"),
    api=(
        "coloss.contrastive.ScatSimCLR",
        "coloss.contrastive.ScatteringEncoder",
        "coloss.contrastive.ScatteringFront",
        "coloss.contrastive.ResidualAdapter",
        "coloss.contrastive.RotationPretext",
        "coloss.contrastive.JigsawPretext",
        "coloss.contrastive.Pretext",
        "coloss.contrastive.jigsaw_permutations",
        "coloss.contrastive.rotated_copies",
        "coloss.contrastive.shuffled_tiles",
        "coloss.contrastive.JigsawHead",
        "coloss.contrastive.scattering_channels",
        "coloss.contrastive.scattering_encoder",
    ),
    method="coloss.contrastive.ScatSimCLR",
    kinds=("self-supervised", "classification"),
)

_PENALTIES = (1.0, 100.0, 10_000.0)


def _trial(setting: Setting) -> Mapping[str, Mapping[str, float]]:
    """Accuracy of probes with 100 labels on frozen features, on two image sets; as many validation images choose the probe's penalty."""
    arms: dict[str, dict[str, float]] = {}
    limits = {"fashion-mnist": None, "mnist": 200}
    for data, limit in [("fashion-mnist", 20)] if setting.smoke else limits.items():
        splits = load(data, seed=setting.seed, limit=limit)
        assert isinstance(splits, Splits)
        parts = [part.all() for part in (splits.train, splits.validation, splits.test)]
        images, targets = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets")
        )
        labels = 10 if setting.smoke else 100
        train = label_budget(targets, labels, setting.seed)
        others = torch.randperm(len(targets), generator=torch.Generator().manual_seed(setting.seed))
        others = others[~torch.isin(others, train)]
        metric = "accuracy" if data == "fashion-mnist" else f"accuracy_{data}"
        for arm, features in _features(images).items():
            penalties = _PENALTIES[:1] if setting.smoke else _PENALTIES
            score = _probed(features, targets, train, others[:labels], others[labels:], penalties)
            arms.setdefault(arm, {})[metric] = score
    return arms


def _probed(
    features: Tensor,
    targets: Tensor,
    train: Tensor,
    validation: Tensor,
    test: Tensor,
    penalties: Sequence[float],
) -> float:
    """Test accuracy of a linear probe with the penalty that is best on the validation part."""

    def accuracy(part: Tensor, penalty: float) -> float:
        rows = features[train], targets[train], features[part], targets[part]
        return linear_probe(*rows, penalty=penalty).accuracy

    return accuracy(test, max(penalties, key=lambda penalty: accuracy(validation, penalty)))


def _features(images: Tensor) -> dict[str, Tensor]:
    """The frozen features of each arm; the two networks give equally many maps of one size, weights from the trial's seed."""
    front = ScatteringFront(1, scales=2, angles=8)
    scattering, _ = extract_features(front, images)
    convolutions = ConvNet(1, (40, front.out_channels), downsample=(True, True))
    random, _ = extract_features(convolutions, images, "stages")
    below = scattering_channels(2, 8, order=1) * scattering.shape[1] // front.out_channels
    return {
        "pixels": images.flatten(1),
        "scattering": scattering,
        "first order only": scattering[:, :below],
        "random convolutions": random,
    }


CLAIM = Claim(
    statement="With 100 labelled images of Fashion-MNIST, a linear probe on frozen scattering coefficients (2 scales, 8 angles) classifies "
    "unseen images better than the same probe on raw pixels.",
    metric="accuracy",
    baseline="pixels",
    method="scattering",
    trial=_trial,
)
