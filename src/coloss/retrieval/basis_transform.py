r"""Upgrades an embedding model without embedding the stored items anew, and keeps all of the new model's own quality.

Yifei Zhou et al. 2022, "BT^2: Backward-compatible Training with Basis Transformation", ICCV 2023, arXiv 2211.03989.

Given an old encoder with embeddings o(x) of dim_old numbers and a new one, trained without any constraint, with v(x) of dim_new, a third
network is trained whose embedding holds both. With f its unit feature of dim_new numbers, a its k free unit dimensions, and P, R
orthogonal (see `BackwardCompatibleHead`):

    n = [a ; P (C f)]     b = R n[:dim_old]     embedding e = [b ; n[dim_old:]]
    loss = CE(W f, y) + w_1 (1 - cos(f, v)) + w_2 CE(<b / |b|, W_ps>, y) + w_3 (1 - cos(b, o))

with the old embeddings' class means W_ps as a classifier. New queries search the old index by b, the first dim_old coordinates, and the
new index by all of e. Since <e, e'> = <a, a'> + C^2 <f, f'>, nothing of f is lost to compatibility.

Two indexes: an index holds vectors of one length, so there are two while an upgrade lasts, of dim_old and of k + dim_new numbers. b is
not of unit length: among items of unit length that changes no ranking, but Euclidean distances (thresholds) are wrong, and an old index
that goes on growing must be given unit vectors, `UpgradedEncoder.compatible`. For the next upgrade e is the old embedding: its first
dim_old coordinates still search the oldest index.

When it helps: the gallery is too large, or no longer at hand, to be embedded again at once. Without training for it new queries find
nothing in an old index.
When not: where embedding anew is cheap. Backward-compatible training (`BackwardCompatibleTraining`) needs no unconstrained network
beforehand and may end with the better new index; an orthogonal map (`procrustes_map`) needs no training at all. Measure both beside it,
with `compatibility_report`.

Measured here (mAP and top-1 on 597 test digits; an old encoder of 8 dimensions that learnt 5 of 10 classes; 300 steps, 5 seeds; k = 4):

    queries by                        old index        new index
    the old encoder                   0.642  0.829     -
    an unconstrained new one          0.174  0.127     0.893  0.962
    the same, turned by Procrustes    0.607  0.663     0.893  0.962
    BCT                               0.667  0.737     0.919  0.965
    BT^2                              0.709  0.849     0.882  0.962
    BT^2, only a head trained         0.696  0.819     0.863  0.951

So BT^2 serves the old index best, and its new index is about as good as the unconstrained one's; BCT's class means even improve the new
index here, which the paper's larger tasks do not show.

Frozen features work as well as networks: train with `nn.Identity()` on precomputed features (`in_features` says how long they are) and
only the head is learnt. Targets are best computed once, with the transforms of evaluation (`embedding_table`): a network given in place of
a table sees the augmented inputs of the step. Other than published: the logits W f are scaled (of unit features they start flat), and the
class means are those of embeddings brought to unit length.

All terms are means over samples, so data-parallel training takes the steps of one process with the joined batch, as far as the trunk's
own layers allow it. Checkpoints hold the head and the networks; tables of targets must be given again to resume.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.nn import Classifier
from coloss.ops import full_precision
from coloss.retrieval.compatible_head import BackwardCompatibleHead, PrototypeHead, UpgradedEncoder
from coloss.retrieval.compatible_losses import backward_compatible_terms, class_prototypes
from coloss.retrieval.embedding_targets import EmbeddingTargets, Targets, embedding_table
from coloss.retrieval.upgrade_trial import measure_upgrade, upgrade_task
from coloss.train import Claim, Method, Setting, State, System


class _Upgrade(Method):
    """What both trainings share: a head over the trunk, which ships with it, and loss terms on what the head gives."""

    replaces_objective = True
    prototypes: Tensor | None

    def __init__(
        self,
        prototypes: Tensor | None,
        in_features: int | None,
        logit_scale: float,
        prototype_scale: float,
        weights: Mapping[str, float],
    ) -> None:
        super().__init__()
        if prototypes is not None and (prototypes.ndim != 2 or not bool(prototypes.isfinite().all())):
            raise InputError(
                f"prototypes must be a finite (classes, dim_old) matrix, got {tuple(prototypes.shape)}"
            )
        for name, value in (("logit_scale", logit_scale), ("prototype_scale", prototype_scale)):
            if not value > 0:
                raise InputError(f"{name} must be > 0, got {value}")
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise InputError(f"the weight of {name} must be >= 0 and finite, got {value}")
        self.register_buffer("prototypes", prototypes)
        self.in_features, self.logit_scale, self.prototype_scale = in_features, logit_scale, prototype_scale
        self.term_weights = weights

    def new_head(self, in_features: int) -> BackwardCompatibleHead | PrototypeHead:
        """The head over features of that length."""
        raise TypeError(f"{type(self).__name__} must define new_head(in_features)")

    def setup(self, state: State) -> None:
        trunk = state.model
        width = self.in_features if self.in_features is not None else getattr(trunk, "out_features", None)
        if not isinstance(width, int):
            raise InputError(f"{type(trunk).__name__} does not declare out_features: give in_features")
        like = next((p for p in trunk.parameters() if p.is_floating_point()), torch.zeros(()))
        state.model = UpgradedEncoder(trunk, self.new_head(width).to(like))
        try:
            state.tap("compatible", "head")
        except ValueError as error:
            raise InputError(f"{type(self).__name__} must stand before methods that tap features") from error

    def finish(self, state: State) -> None:
        encoder = state.model
        assert isinstance(encoder, UpgradedEncoder)
        encoder.head.ship()

    def labels(self, state: State) -> Tensor | None:
        """Classes of the batch; None without prototypes."""
        targets = state.batch.targets
        if self.prototypes is None:
            return None
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            raise InputError("prototypes need one class index for each sample as targets")
        return targets

    @property
    def num_classes(self) -> int | None:
        """Classes of the head's classifier; None without labels."""
        return None if self.prototypes is None else len(self.prototypes)


class BasisTransformTraining(_Upgrade):
    """Train a trunk and a head whose embeddings serve the new index and the old one.

    The model is a trunk that gives features (batch, in_features), or `nn.Identity()` for precomputed ones. It becomes an
    `UpgradedEncoder`, which is what ships: its `forward` gives embeddings for the new index, its `compatible` those for the old. The
    run's objective is not computed. Adds the terms `match_new` and `match_old`, and with prototypes `classification` and
    `match_prototypes`.

    Args:
        old: the old encoder, or better a table of its embeddings by sample id (`embedding_table`).
        new: the unconstrained new encoder, or better a table of its embeddings.
        prototypes: old class means (classes, dim_old), see `class_prototypes`; then the batch must have classes as targets. None:
            no labels are used.
        extra_dims: k, free dimensions, in [0, dim_old].
        scale: C > 0, weight of the new feature.
        match_new, match_prototypes, match_old: weights of the terms, >= 0; the paper's defaults.
        logit_scale: of the head's classifier, > 0; the paper has 1.
        prototype_scale: of the classifier made of class means, > 0.
        in_features: length of the trunk's features, where it does not declare `out_features`.

    Raises:
        InputError: for values out of range, or sizes that do not fit; at a step, if targets or ids are missing.

    Cost:
        Two matrix exponentials per step beside the trunk, and a forward pass of each encoder that is no table.

    Source:
        Zhou et al. 2022, arXiv 2211.03989.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> data = IndexedDataset(torch.randn(64, 6), torch.arange(64) % 3)
        >>> old, new = MLP(6, (), 4), MLP(6, (16,), 8)
        >>> method = BasisTransformTraining.from_encoders(old, new, data, extra_dims=2)
        >>> run = coloss.fit(MLP(6, (16,)), data, methods=[method], budget=coloss.Budget(epochs=2))
        >>> run.model(data.inputs).shape, run.model.compatible(data.inputs).shape
        (torch.Size([64, 10]), torch.Size([64, 4]))
        >>> sorted(run.history[-1].terms)
        ['classification', 'match_new', 'match_old', 'match_prototypes']
    """

    def __init__(
        self,
        old: Targets,
        new: Targets,
        *,
        prototypes: Tensor | None = None,
        extra_dims: int = 32,
        scale: float = 2.0,
        match_new: float = 1.0,
        match_prototypes: float = 10.0,
        match_old: float = 5.0,
        logit_scale: float = 16.0,
        prototype_scale: float = 1.0,
        in_features: int | None = None,
    ) -> None:
        weights = {"match_new": match_new, "match_prototypes": match_prototypes, "match_old": match_old}
        super().__init__(prototypes, in_features, logit_scale, prototype_scale, weights)
        self.old, self.new = EmbeddingTargets(old, "old"), EmbeddingTargets(new, "new")
        self.extra_dims, self.scale = extra_dims, scale

    @classmethod
    def from_encoders(
        cls,
        old: nn.Module,
        new: nn.Module,
        dataset: IndexedDataset,
        *,
        use_labels: bool = True,
        **options: Any,
    ) -> "BasisTransformTraining":
        """Targets and class means of a training set, each embedding computed once.

        Args:
            old, new: encoders.
            dataset: with the transforms of evaluation, and class indices as targets where labels are used.
            use_labels: False trains without labels.
            options: further arguments of the constructor.

        Raises:
            InputError: if labels are used and the data set has none.
        """
        before, after = embedding_table(old, dataset), embedding_table(new, dataset)
        prototypes = _prototypes(before, dataset) if use_labels else None
        return cls(before, after, prototypes=prototypes, **options)

    def new_head(self, in_features: int) -> BackwardCompatibleHead:
        return BackwardCompatibleHead(
            self.new.dim,
            self.old.dim,
            self.extra_dims,
            self.scale,
            self.num_classes,
            in_features=in_features,
            logit_scale=self.logit_scale,
        )

    def terms(self, state: State) -> dict[str, Tensor]:
        return backward_compatible_terms(
            state.features["compatible"],
            self.new(state.batch),
            self.old(state.batch),
            self.labels(state),
            self.prototypes,
            prototype_scale=self.prototype_scale,
        )

    @classmethod
    def for_setting(
        cls, setting: Setting, *, use_labels: bool = True, **parameters: Any
    ) -> "BasisTransformTraining":
        """Build it for a task of the lab: the old encoder knows the first half of the classes, the new one all of them."""
        train = setting.splits.train
        if (
            not isinstance(train.targets, Tensor)
            or train.targets.ndim != 1
            or setting.splits.num_classes is None
        ):
            raise InputError("bt2 needs a data set with classes, which its two encoders learn beforehand")
        known = (train.targets < setting.splits.num_classes // 2).nonzero().flatten()
        encoders: list[Any] = []
        for part in (train.subset(known), train):
            inner = replace(setting, splits=replace(setting.splits, train=part))
            classifier = Classifier(setting.new_model(), setting.splits.num_classes)
            trained: Any = inner.fit(classifier, F.cross_entropy).model
            encoders.append(trained.backbone)
        old, new = encoders
        parameters = {"extra_dims": min(32, old.out_features), **parameters}
        return cls.from_encoders(old, new, train, use_labels=use_labels, **parameters)


class BackwardCompatibleTraining(_Upgrade):
    """Train a trunk and an embedding of the old length whose classes lie where the old encoder has them: BCT, the baseline.

        CE(W e, y) + weight * CE(<e, W_ps>, y)

    One embedding serves both indexes, so what the old space has no room for is lost. The model becomes an `UpgradedEncoder`, as with
    `BasisTransformTraining`. Adds the terms `classification` and `match_prototypes`.

    Args:
        prototypes: W_ps, old class means (classes, dim_old), see `class_prototypes`.
        weight: >= 0; the paper of BT^2 has 10.
        logit_scale: of the head's classifier, > 0.
        prototype_scale: of the classifier made of class means, > 0.
        in_features: length of the trunk's features, where it does not declare `out_features`.

    Raises:
        InputError: for values out of range; at a step, if the batch has no classes.

    Source:
        Shen, Xiong, Xia, Soatto 2020, arXiv 2003.11942.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> data = (torch.randn(64, 6), torch.arange(64) % 3)
        >>> method = BackwardCompatibleTraining(torch.eye(3, 4))
        >>> run = coloss.fit(MLP(6, (16,)), data, methods=[method], budget=coloss.Budget(epochs=2))
        >>> run.model(data[0]).shape, sorted(run.history[-1].terms)
        (torch.Size([64, 4]), ['classification', 'match_prototypes'])
    """

    def __init__(
        self,
        prototypes: Tensor,
        *,
        weight: float = 10.0,
        logit_scale: float = 16.0,
        prototype_scale: float = 1.0,
        in_features: int | None = None,
    ) -> None:
        weights = {"match_prototypes": weight}
        super().__init__(prototypes, in_features, logit_scale, prototype_scale, weights)
        self.dim_old = prototypes.shape[1]

    def new_head(self, in_features: int) -> PrototypeHead:
        return PrototypeHead(in_features, self.dim_old, self.num_classes, logit_scale=self.logit_scale)

    def terms(self, state: State) -> dict[str, Tensor]:
        return backward_compatible_terms(
            state.features["compatible"],
            None,
            None,
            self.labels(state),
            self.prototypes,
            prototype_scale=self.prototype_scale,
        )


def _prototypes(old: Tensor, dataset: IndexedDataset) -> Tensor:
    """Class means of unit embeddings."""
    targets = dataset.targets
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        raise InputError("the data set must have class indices as targets, or use_labels=False")
    unit = F.normalize(full_precision(old[dataset.ids.cpu()]), dim=1)
    return class_prototypes(unit, targets.cpu(), int(targets.max()) + 1)


SYSTEM = System(
    slug="bt2",
    title="BT^2: Backward-compatible Training with Basis Transformation",
    paper="Zhou et al. 2022, arXiv 2211.03989",
    family="retrieval",
    acts_on=("model", "loss"),
    api=(
        "coloss.retrieval.BasisTransformTraining",
        "coloss.retrieval.compatibility_report",
        "coloss.retrieval.BackwardCompatibleHead",
        "coloss.retrieval.BasisTransform",
        "coloss.retrieval.UpgradedEncoder",
        "coloss.retrieval.backward_compatible_loss",
        "coloss.retrieval.class_prototypes",
        "coloss.retrieval.embedding_table",
        "coloss.retrieval.procrustes_map",
        "coloss.retrieval.BackwardCompatibleTraining",
    ),
    method="coloss.retrieval.BasisTransformTraining",
    kinds=("self-supervised",),
)

CLAIM = Claim(
    statement=(
        "Digits, an old encoder of 8 dimensions that learnt 5 of 10 classes: queries by an encoder trained with basis transformation find "
        "more in the index that the old encoder filled (mAP, itself left out) than the old encoder's own queries do. (No claim against "
        "backward-compatible training, which is measured beside it.)"
    ),
    metric="map_in_old_index",
    baseline="old encoder",
    method="bt2",
    task=upgrade_task(),
    trial=measure_upgrade,
)
