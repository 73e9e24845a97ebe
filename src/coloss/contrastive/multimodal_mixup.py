r"""Helps a classifier on two or more modalities to align them, by contrast of mixed samples with both of their sources.

M3CoL: Kumar et al., 2024 (TMLR 2025), arXiv 2409.17777. Auxiliary losses on the embeddings z^m of modalities m, of a classifier that
fuses them; only the classifier ships:

    mix (modality 1)   zt_i = l_i z_i + (1 - l_i) z_p(i),  l_i ~ Beta(0.15, 0.15), l_i = 1 for half of the samples
    targets            P_ij = l_i [j = i] + (1 - l_i) [j = p(i)]
    M3Co(1, 2)         1/2 [CE(P, softmax(cos(zt^1, z^2) / 0.1)) + CE(P^T, the same back)]
    soft CLIP(1, 2)    1/2 [CE(Q, softmax(cos(z^1, z^2) / 0.125)) + CE(Q, the same back)],  Q = softmax(cos(z^2, z^2) / 0.125)
    multimodal_mixup   sum over ordered pairs of M3Co in the first third of training, of soft CLIP after
    unimodal           sum over modalities of the cross-entropy of a head on z^m alone
    total              cross-entropy of the fusion + unimodal + 0.1 multimodal_mixup

What is settled here where sources differ: a sample that is its own partner keeps its whole target (the published code assigns where
it should add, which deletes about one positive in each batch); targets Q are not differentiated unless `detach_target=False`;
embeddings are mixed, as the published code does, or with `mix="inputs"` the inputs, as the paper says for images and tables.

When it may help: several modalities of the same thing whose relation labels alone do not teach, and many classes. When not: samples of
one class are each other's negatives, so with few classes or large batches many negatives are false, and alignment works against the
labels (lower the weight). Measured on top and bottom halves of digits, 100 labels, 12 seeds: fusion alone 89.8 %, with heads 89.5 %,
with heads and plain CLIP 89.3 %, with heads and M3CoL 89.3 %: contradicted here, by 0.3 points [0.0, 0.6]. Mixing could not be told
from plain CLIP (0.0 points, give or take 0.1). A step on 50 samples cost four times that of the heads alone.

The loss belongs to the batch as a whole. Over several processes it compares with the samples of all of them and draws one permutation
for the joined batch: the steps are those of one process. Checkpoints hold the unimodal heads; mixing has no state but the run's
generator.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from coloss.errors import InputError
from coloss.nn import find_classifier
from coloss.train import (
    Arm,
    Budget,
    Claim,
    FeatureSource,
    Method,
    Schedule,
    Setting,
    State,
    System,
    second_look,
    value_at,
)

from .local_negatives import warn_of_local_negatives
from .mixup_contrast import MixedPairs, MultimodalMixupLoss, UnimodalHeads
from .mixup_trial import NOISE, InputNoise, halves_task


class MultimodalMixup(Method):
    """Align the modalities of a fusion classifier: mixed contrast first, soft contrast after, a head for each modality throughout.

    Reads the embedding of each modality from inside the model and adds the terms `multimodal_mixup` and `unimodal`. The heads belong
    to the method: the model keeps its forward, its parameters and its state dict.

    Args:
        embeddings: module path of each modality's embedding, in the order of the inputs (with ":input" for what goes in); None:
            `encoders.0`, `encoders.1` ... as `coloss.nn.FusionClassifier` has them, or both towers of a `coloss.nn.DualEncoder`.
        weight: of the contrast: a number >= 0, or a schedule of progress; it is not computed while this is 0.
        unimodal_weight: of the heads' cross-entropies.
        heads: whether there are heads.
        hidden: widths of their hidden layers.
        classes: logits of a head; None: as many as the model's last linear layer gives.
        mix: `"embeddings"`; or `"inputs"`, which takes a second forward pass, where a modality of word ids has its embeddings mixed.
        pairs, switch, beta, probability, mixup_temperature, soft_temperature, detach_target: as for `MultimodalMixupLoss`.
        across_processes: False compares each process's samples with its own alone, with a warning in a run of several.

    Attributes:
        unimodal: the heads, from `setup` on.

    Raises:
        InputError: for a value out of range; in a run, for a model without such places, or targets that are no classes.

    Source:
        Kumar et al. 2024, arXiv 2409.17777.

    Examples:
        >>> import coloss, torch
        >>> from coloss.nn import MLP, FusionClassifier
        >>> model = FusionClassifier([MLP(4, [8]), MLP(6, [8])], 3)
        >>> inputs = torch.randn(64, 4), torch.randn(64, 6)
        >>> data = coloss.data.IndexedDataset(inputs, torch.randint(3, (64,)))
        >>> loss = nn.functional.cross_entropy
        >>> run = coloss.fit(model, data, loss, [MultimodalMixup()], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms)
        ['cross_entropy', 'multimodal_mixup', 'unimodal']
    """

    batch_statistic = True
    unimodal: UnimodalHeads | None

    def __init__(
        self,
        *,
        embeddings: Sequence[str] | None = None,
        weight: Schedule = 0.1,
        unimodal_weight: Schedule = 1.0,
        heads: bool = True,
        hidden: Sequence[int] = (),
        classes: int | None = None,
        mix: Literal["embeddings", "inputs"] = "embeddings",
        pairs: Literal["all", "cycle"] = "all",
        switch: float = 0.33,
        beta: float = 0.15,
        probability: float = 0.5,
        mixup_temperature: float = 0.1,
        soft_temperature: float = 0.125,
        detach_target: bool = True,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("unimodal_weight", unimodal_weight)):
            if not callable(value) and not 0 <= value < math.inf:
                raise InputError(f"{name} must be >= 0 and finite, or a schedule, got {value}")
        if mix not in ("embeddings", "inputs"):
            raise InputError(f'mix must be "embeddings" or "inputs", got {mix!r}')
        if embeddings is not None and len(embeddings) < 2:
            raise InputError(f"embeddings must name at least two modalities, got {list(embeddings)}")
        try:
            self.loss = MultimodalMixupLoss(
                pairs,
                switch,
                beta=beta,
                probability=probability,
                mixup_temperature=mixup_temperature,
                soft_temperature=soft_temperature,
                detach_target=detach_target,
                across_processes=across_processes,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.paths, self.mix, self.weight = embeddings, mix, weight
        self.wants_heads, self.hidden, self.classes = heads, tuple(hidden), classes
        self.unimodal = None
        self.term_weights = {"multimodal_mixup": weight} | ({"unimodal": unimodal_weight} if heads else {})

    def setup(self, state: State) -> None:
        warn_of_local_negatives(type(self).__name__, self.loss.across_processes)
        paths = self.paths if self.paths is not None else _modalities(state.model)
        self.sources = [FeatureSource(path) for path in paths]
        for source in self.sources:
            source.setup(state)
        if not self.wants_heads:
            return
        widths = [source.width(state) for source in self.sources]
        for path, width in zip(paths, widths, strict=True):
            if width is None:
                raise InputError(
                    f"the module at {path!r} does not declare out_features, which its head needs: give it, or heads=False"
                )
        classes = self.classes if self.classes is not None else _outputs(state.model)
        heads = UnimodalHeads([width for width in widths if width is not None], classes, self.hidden)
        self.unimodal = state.like_model(heads)

    def terms(self, state: State) -> dict[str, Tensor]:
        embeddings = [source.read(state) for source in self.sources]
        terms = {"multimodal_mixup": self._contrast(state, embeddings)}
        if self.unimodal is not None:
            targets = state.batch.targets
            if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
                raise InputError(
                    "unimodal heads need one class index for each sample as targets, or heads=False"
                )
            terms["unimodal"] = self.unimodal(embeddings, targets)[1]
        return terms

    def _contrast(self, state: State, embeddings: Sequence[Tensor]) -> Tensor:
        if value_at(self.weight, state.progress) == 0:
            return embeddings[0].new_zeros(())
        mixed = None
        if self.mix == "inputs" and self.loss.mixes(state.progress):
            mixed = self._encoded_mixes(state, embeddings)
        return self.loss(embeddings, state.progress, state.generator, mixed)

    def _encoded_mixes(self, state: State, embeddings: Sequence[Tensor]) -> list[MixedPairs]:
        """Embeddings of mixed inputs; mixed embeddings of a modality whose inputs are no real numbers."""
        inputs = state.batch.inputs
        if not isinstance(inputs, tuple | list) or len(inputs) != len(embeddings):
            raise InputError(f'mix="inputs" needs one input for each of {len(embeddings)} modalities')
        mixes = [
            self.loss.mix(part if part.is_floating_point() else rows, state.generator)
            for part, rows in zip(inputs, embeddings, strict=True)
        ]
        blended = tuple(
            made.mixed if part.is_floating_point() else part for part, made in zip(inputs, mixes, strict=True)
        )
        with second_look(state):
            state.model(blended)
            encoded = [source.read(state) for source in self.sources]
        return [
            made._replace(mixed=rows) if part.is_floating_point() else made
            for part, rows, made in zip(inputs, encoded, mixes, strict=True)
        ]

    @classmethod
    def for_setting(cls, setting: Setting, **parameters: Any) -> "MultimodalMixup":
        """Build it for a task of the lab; where the task is retrieval there is nothing to classify, and no heads."""
        return cls(**({"heads": setting.task.kind == "classification"} | parameters))


def _modalities(model: nn.Module) -> list[str]:
    """Where a model of a known shape keeps the embeddings of its modalities."""
    encoders = getattr(model, "encoders", None)
    if isinstance(encoders, nn.ModuleList) and len(encoders) > 1:
        return [f"encoders.{number}" for number in range(len(encoders))]
    towers = ["query_encoder", "document_encoder"]
    if all(name in dict(model.named_children()) for name in towers):
        return towers
    raise InputError(
        f"{type(model).__name__} has no list of two or more encoders: name the module paths of each modality in embeddings"
    )


def _outputs(model: nn.Module) -> int:
    """Logits of the classifier."""
    try:
        return int(model.get_submodule(find_classifier(model)).out_features)  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(f"{error}: give classes") from error


SYSTEM = System(
    slug="m3col",
    title="Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal Classification",
    paper="Kumar et al., 2024, arXiv 2409.17777",
    family="contrastive",
    acts_on=("loss",),
    api=(
        "coloss.contrastive.MultimodalMixup",
        "coloss.contrastive.MultimodalMixupLoss",
        "coloss.contrastive.mixup_contrastive_loss",
        "coloss.contrastive.mixup_pairs",
        "coloss.contrastive.soft_clip_loss",
        "coloss.contrastive.soft_target_clip_loss",
        "coloss.contrastive.UnimodalHeads",
        "coloss.nn.FusionClassifier",
    ),
    method="coloss.contrastive.MultimodalMixup",
    kinds=("retrieval", "classification"),
)


def _arm(name: str, **options: Any) -> Arm:
    return Arm(name, lambda setting: [InputNoise(NOISE), MultimodalMixup(**options)])


CLAIM = Claim(
    statement="A fusion classifier of the top and bottom halves of digits, trained on 100 labels with a head on each half, is more "
    "accurate on the other digits when mixed contrast and then soft contrast align the halves, at the same number of steps.",
    metric="accuracy",
    baseline="fusion and heads",
    method="m3col",
    task=halves_task(Budget(epochs=100)),
    arms=(
        Arm("fusion", lambda setting: [InputNoise(NOISE)]),
        _arm("fusion and heads", weight=0.0),
        _arm("clip and heads", probability=0.0, switch=1.0),
        _arm("m3col"),
    ),
    seeds=12,
    tried="Code: both losses and their gradients equal the plain formulas in NumPy and autograd, and without mixing they are CLIP's. "
    "Baseline: the heads gain nothing over fusion alone either, and 50 epochs are worse than 100 for every arm. Mixing: M3CoL and plain "
    "CLIP agree on every seed within 0.3 points, so what costs accuracy is alignment itself: a tenth of the negatives are of the same "
    "class. Weight: at 0.02 in place of 0.1 the difference is 0.0 points (5 other seeds). Scale: with 300 labels it is +0.3 points (4 "
    "other seeds, 0.0 to 0.5). The setting and the number of seeds were fixed before the run.",
)
