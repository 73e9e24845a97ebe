"""Trains encoders of skeletons by contrast, with harder positives made of two clips: body parts of one in a time window of another.

Chen, Liu and others, 2022, arXiv 2207.03065 (SkeleMixCLR), on MoCo for skeletons (SkeletonCLR, its baseline and its case of no mixes). A
slow copy of encoder and head makes the keys k_i of one view of each clip; a queue Q holds keys of earlier batches. Another view x_i gives
the query q_i; mixed with the clip i' = i + n it gives two more, p_i from what was pasted and c_i from the rest, by pooling the encoder's last
map inside and outside of the region:

    instance = L(q_i; k_i; Q)                                                  L(q; k; Q) = -log e^{q.k/tau} / ( e^{q.k/tau} + sum_j e^{q.Q_j/tau} )
    mix      = sum over mixes of ( L(p_i; k_i'; Q and sg c_i) + L(c_i; k_i; Q and sg p_i) ) / 2
    loss     = instance + mix

The other region of the same mixed clip is a hard negative, since convolutions carry context over the border.

Differences from the published code: the queue begins empty instead of with random rows, takes batches of any size, and a clip's own
earlier keys are no negatives; every shift n is drawn, so two clips suffice; the mask falls on whole blocks of the encoder's stride; absent
persons do not enter means; statistics of batch norms (for use after training) come from ordinary clips alone; parts are those of the data's
skeleton.

When it helps: encoders with convolutions over a body whose parts are known, and many clips. When not: short clips (few blocks to paste), small
encoders that see the whole clip at every position. A mix costs as much as one more ordinary query, so compare with that.

Measured on MSR Action3D across persons (about 233 clips of 12 frames to train on, 275 to test on, 200 steps of batch 64, widths 8 and 32, frozen
linear probe and 5 nearest neighbours, means of 5 seeds):

    one query and one mix      0.368   0.267      its interval against two queries, -0.050 to +0.045, holds 0
    two ordinary queries       0.371   0.269      the same compute
    untrained encoder          0.366   0.224
    trained with labels        0.579   0.577      what this encoder can learn in as many steps
    raw coordinates            0.631   0.585

This budget is too small to tell: either arm betters the untrained encoder in the linear probe on 3 seeds of 5 (its neighbours are better,
0.27 against 0.22), while labels show that the encoder could learn far more. The paper's gains are reported on 40,000 clips and 300 epochs;
nothing here speaks for or against them. For a few hundred clips take raw coordinates.

Distributed: every process puts the keys of all into its queue, so queues stay equal, and without mixes two processes take the steps of one,
as far as the encoder's own layers allow it. Views and mixes are drawn by each process among its own clips. A checkpoint holds the slow
copy, the head, the queue and all randomness.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coloss.data import View
from coloss.data.stacking import repeated
from coloss.errors import InputError
from coloss.motion.mixed_clips import (
    Parts,
    mixed_region_loss,
    queue_contrast_loss,
    region_features,
    skeleton_mix,
)
from coloss.motion.momentum_views import MomentumViewMethod
from coloss.motion.skeleton_pretraining_trial import Pretraining, compare_pretraining, pretraining_task
from coloss.nn import FeatureQueue
from coloss.ops.precision import full_precision
from coloss.train import Budget, Claim, Schedule, Setting, State, System
from coloss.train.feature_source import second_look


class Step(NamedTuple):
    """What one step of contrast compares with.

    Attributes:
        keys: unit vectors of the batch's clips, made by the slow copy.
        negatives: unit vectors of earlier batches.
        ids, negative_ids: of the clips that they belong to, or None.
    """

    keys: Tensor
    negatives: Tensor
    ids: Tensor | None
    negative_ids: Tensor | None


class SkeletonCLR(MomentumViewMethod):
    """Self-supervised training by contrast with a queue of keys that a slow copy of the encoder made (MoCo on skeletons).

    Adds the term `instance`. The batch becomes one view of each clip (or several, see `queries`); another view goes to the slow copy and
    gives the key. Where an earlier method of the run made views, their last is the key's and the others are queries. Keys of a clip's
    own earlier views are no negatives, where the data number their samples.

    Args:
        queries: ordinary views of each clip that look for the key, >= 1; their losses are averaged.
        queue: keys of earlier batches that are kept, >= 1. It begins empty.
        temperature: tau > 0.
        momentum: share of the slow copy that stays in a step, in [0, 1].
        projector: widths of its hidden layers and, last, of the embeddings.
        view: in place of `crop_and_shear`: gives queries + 1 views, see `coloss.train.ViewMethod`.
        in_features: length of the encoder's feature vector, where it does not declare it.

    Attributes:
        projector, queue: from `setup` on.

    Raises:
        InputError: for a value out of range; in a run, beside an objective, or for fewer than two views.

    Cost:
        One forward and backward pass of the encoder for each query, and one forward pass of the copy.

    Source:
        Li et al., 2021, arXiv 2104.14141 (SkeletonCLR, the baseline of CrosSCLR); He et al., 2020, arXiv 1911.05722.

    Examples:
        >>> import coloss
        >>> from coloss.nn import SkeletonEncoder
        >>> from coloss.ops import graph_partition
        >>> encoder = SkeletonEncoder(graph_partition([-1, 0, 1]), widths=(8,), strides=(1,))
        >>> method = SkeletonCLR(projector=(16, 8), queue=20)
        >>> run = coloss.fit(
        ...     encoder,
        ...     (torch.rand(32, 3, 8, 3),),
        ...     methods=[method],
        ...     batch_size=16,
        ...     budget=coloss.Budget(epochs=2),
        ... )
        >>> sorted(run.history[-1].terms), len(method.queue)
        (['instance'], 20)
    """

    def __init__(
        self,
        *,
        queries: int = 1,
        queue: int = 512,
        temperature: float = 0.2,
        momentum: float = 0.99,
        projector: Sequence[int] = (64, 64),
        view: View | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(
            momentum=momentum, views=queries + 1, projector=projector, view=view, in_features=in_features
        )
        if queries < 1:
            raise InputError(f"queries must be >= 1, got {queries}")
        if queue < 1:
            raise InputError(f"queue must be >= 1, got {queue}")
        if not temperature > 0:
            raise InputError(f"temperature must be > 0, got {temperature}")
        self.queue_size, self.temperature = queue, temperature
        self._key_views, self._queries = torch.empty(0), 0

    def setup(self, state: State) -> None:
        super().setup(state)
        # Keys are kept in full precision, also where the model works in half.
        like = full_precision(next(self.projector.parameters()))
        self.queue = FeatureQueue(self.queue_size, self.widths[-1]).to(like)

    def check_views(self, views: Tensor) -> None:
        if len(views) < 2:
            raise InputError(f"view must give at least two views, queries and a key, got {len(views)}")

    def on_batch(self, state: State) -> None:
        batch = state.batch
        if "views" in batch.extras:
            self._count = batch.extras["views"]
            views = batch.inputs.unflatten(0, (self._count, -1))
            self.check_views(views)
            self._key_views, self._queries = views[-1], self._count - 1
            return
        views = self._views(state)
        self._key_views, self._queries = views[-1], len(views) - 1
        self._count = self._queries
        state.batch = replace(
            batch,
            inputs=views[:-1].flatten(0, 1),
            targets=repeated(batch.targets, self._count),
            ids=repeated(batch.ids, self._count),
            extras={**batch.extras, "views": self._count},
        )

    def view_terms(self, embeddings: Float[Tensor, "views clips dim"], state: State) -> dict[str, Tensor]:
        keys = F.normalize(full_precision(self.target_embeddings(self._key_views)), dim=1)
        ids = self.sample_ids(state)
        step = Step(keys, self.queue(), ids, None if ids is None else self.queue.row_ids())
        losses = [
            queue_contrast_loss(
                queries,
                step.keys,
                step.negatives,
                self.temperature,
                query_ids=step.ids,
                negative_ids=step.negative_ids,
            )
            for queries in embeddings[: self._queries]
        ]
        terms = {"instance": torch.stack(losses).mean()} | self.further_terms(step, state)
        self.queue.enqueue(keys, ids)
        return terms

    def further_terms(self, step: Step, state: State) -> dict[str, Tensor]:
        """Terms beside `instance`, on the same keys and negatives."""
        return {}


class SkeleMixCLR(SkeletonCLR):
    """`SkeletonCLR` with clips mixed of two, whose pasted region and whose rest look for the keys of the clips that they came from.

    Adds the term `mix` beside `instance`. The encoder must have `maps(clips)`, its last maps (clips x persons, width, blocks, joints), and
    `stride`, the frames of a block, as `coloss.nn.SkeletonEncoder` does. Batch-norm statistics for use after training are those of
    ordinary clips alone. Without mixes it is `SkeletonCLR` to the bit.

    Args:
        mixes: R, mixed clips made of each clip, each with parts and window of its own, >= 0. Published: 1, and 3 for "SkeleMixCLR+".
        parts: joints of each body part, by name or in a list; needed for mixes > 0. `for_setting` takes those of the data's skeleton.
        n_parts: fewest and most parts that are pasted.
        blocks: shortest and longest window, in blocks of `stride` frames; None for 7/16 to 11/16 of the clip, as published.
        per_clip: draw parts and window for each clip, instead of once for the batch as published.
        weight: of the term `mix`: a number >= 0 or a schedule.
        queries, queue, temperature, momentum, projector, view, in_features: as for `SkeletonCLR`.

    Raises:
        InputError: for a value out of range; in a run, for an encoder without maps, frames that the stride does not divide, a batch of one
            clip, or as for `SkeletonCLR`.

    Cost:
        That of `SkeletonCLR`, and one forward and backward pass of the encoder for each mix: one mix costs what one more query does.

    Source:
        Chen et al., 2022, arXiv 2207.03065.

    Examples:
        >>> import coloss
        >>> from coloss.nn import SkeletonEncoder
        >>> from coloss.ops import graph_partition
        >>> encoder = SkeletonEncoder(graph_partition([-1, 0, 1, 2]), widths=(8,), strides=(2,))
        >>> method = SkeleMixCLR(parts=[[0, 1], [2], [3]], n_parts=(1, 2), projector=(16, 8), queue=20)
        >>> run = coloss.fit(
        ...     encoder,
        ...     (torch.rand(32, 3, 8, 4),),
        ...     methods=[method],
        ...     batch_size=16,
        ...     budget=coloss.Budget(epochs=2),
        ... )
        >>> sorted(run.history[-1].terms)
        ['instance', 'mix']
    """

    def __init__(
        self,
        *,
        mixes: int = 1,
        parts: Parts | None = None,
        n_parts: tuple[int, int] = (2, 3),
        blocks: tuple[int, int] | None = None,
        per_clip: bool = False,
        weight: Schedule = 1.0,
        queries: int = 1,
        queue: int = 512,
        temperature: float = 0.2,
        momentum: float = 0.99,
        projector: Sequence[int] = (64, 64),
        view: View | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(
            queries=queries,
            queue=queue,
            temperature=temperature,
            momentum=momentum,
            projector=projector,
            view=view,
            in_features=in_features,
        )
        if mixes < 0:
            raise InputError(f"mixes must be >= 0, got {mixes}")
        if mixes and parts is None:
            raise InputError("parts must be given to be mixed, got none: name the joints of each body part")
        if not callable(weight) and not weight >= 0:
            raise InputError(f"weight must be >= 0, or a schedule, got {weight}")
        self.mixes, self.parts, self.n_parts, self.blocks = mixes, parts or (), n_parts, blocks
        self.per_clip = per_clip
        self.term_weights = {"mix": weight}

    @classmethod
    def for_setting(cls, setting: Setting, **parameters: Any) -> "SkeleMixCLR":
        """Build it for a task of the lab, with the parts of the skeleton of its data."""
        skeleton = getattr(setting.splits, "skeleton", None)
        known = {"parts": skeleton.parts} if skeleton is not None and skeleton.parts else {}
        return cls(**(known | parameters))

    def setup(self, state: State) -> None:
        if self.mixes and not (
            callable(getattr(state.model, "maps", None))
            and isinstance(getattr(state.model, "stride", None), int)
        ):
            raise InputError(
                f"the encoder must have maps(clips) and an integer stride to pool regions, {type(state.model).__name__} has not: "
                "see coloss.nn.SkeletonEncoder"
            )
        super().setup(state)

    def further_terms(self, step: Step, state: State) -> dict[str, Tensor]:
        if not self.mixes:
            return {}
        clips = state.batch.inputs.unflatten(0, (self._count, -1))[0]
        losses = [self._mixed(clips, step, state) for _ in range(self.mixes)]
        return {"mix": torch.stack(losses).sum()}

    def _mixed(self, clips: Tensor, step: Step, state: State) -> Tensor:
        encoder: Any = state.model
        try:
            mixed = skeleton_mix(
                clips,
                self.parts,
                self.n_parts,
                self.blocks or _published_blocks(clips.shape[2] // encoder.stride),
                encoder.stride,
                state.local_generator,
                per_clip=self.per_clip,
            )
        except ValueError as error:
            raise InputError(f"clips cannot be mixed: {error}") from error
        if bool(mixed.mask.flatten(-2).all(-1).any()):
            raise InputError(
                "n_parts and blocks must leave something of a clip outside, got all parts over all of its frames"
            )
        with second_look(state), second_look(State(self.projector)):
            regions = region_features(encoder.maps(mixed.clips), mixed.mask, mixed.clips)
            inside, outside = self.projector(torch.cat(regions)).chunk(2)
        return mixed_region_loss(
            inside,
            outside,
            step.keys,
            mixed.partner,
            step.negatives,
            self.temperature,
            ids=step.ids,
            negative_ids=step.negative_ids,
        )


def _published_blocks(total: int) -> tuple[int, int]:
    """7 to 11 of 16 blocks, for a clip of so many."""
    shortest = max(7 * total // 16, 1)
    return shortest, max(11 * total // 16, shortest)


SYSTEM = System(
    slug="skelemixclr",
    title="Contrastive Learning from Spatio-Temporal Mixed Skeleton Sequences for Self-Supervised Skeleton-Based Action Recognition",
    paper="Chen et al. 2022, arXiv 2207.03065",
    family="motion",
    acts_on=("batch", "model", "loss"),
    api=(
        "coloss.motion.SkeleMixCLR",
        "coloss.motion.SkeletonCLR",
        "coloss.motion.skeleton_mix",
        "coloss.motion.mix_contrastive_loss",
        "coloss.motion.mixed_region_loss",
        "coloss.motion.queue_contrast_loss",
        "coloss.motion.region_features",
        "coloss.nn.masked_pool",
        "coloss.nn.FeatureQueue",
        "coloss.motion.evaluate_skeleton_encoder",
    ),
    method="coloss.motion.SkeleMixCLR",
    kinds=("self-supervised",),
    compare="msr-action3d-ssl --methods skelemixclr,skelemixclr:mixes=0:queries=2",
)

_SHARED: dict[str, Any] = {"queue": 128, "momentum": 0.97, "temperature": 0.2, "projector": (64, 64)}


def _two_queries(setting: Setting, view: View) -> SkeletonCLR:
    return SkeletonCLR(queries=2, view=partial(view, views=3), **_SHARED)


def _query_and_mix(setting: Setting, view: View) -> SkeleMixCLR:
    return SkeleMixCLR(parts=setting.splits.skeleton.parts, blocks=(2, 4), view=view, **_SHARED)


_ARMS = {
    "SkeletonCLR, two queries": Pretraining(_two_queries, 0.5, 5e-3),
    "SkeleMixCLR": Pretraining(_query_and_mix, 0.5, 5e-3),
}


CLAIM = Claim(
    statement="An encoder of skeletons, trained on MSR Action3D without labels by contrast of ordinary and mixed clips, gives frozen features "
    "from which a linear probe recognises more actions of other persons than one trained by contrast of two ordinary views, at the same "
    "number of steps and encoder passes.",
    metric="linear",
    baseline="SkeletonCLR, two queries",
    method="SkeleMixCLR",
    task=pretraining_task(Budget(steps=200)),
    trial=partial(compare_pretraining, arms=_ARMS),
    tried="Before the measurement, for both arms alike, on the validation persons of seeds 100, 101 and 102 (60, 59 and 60 clips, means): shear "
    "0, 0.1 and 0.5 at learning rate 5e-3, and shear 0.1 at 2e-3. Linear probe 0.280, 0.408, 0.414 and 0.370 for two queries, 0.291, 0.381, "
    "0.397 and 0.347 for mixes (untrained 0.387); each arm has its best. The encoder was chosen by what labels make of it on the persons of seeds 100 and "
    "101: with graph weights along bones alone it did not learn the actions (probe 0.564), with a weight for every pair of joints it did "
    "(0.740). Queue 128, momentum 0.97, temperature 0.2 and windows of 2 to 4 of 6 blocks were set beforehand for both and not searched.",
)
