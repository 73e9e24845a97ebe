"""Trains encoders of skeletons without labels or negatives, and lets joint, motion and bone streams tell each other who is alike.

Guo, Liu, Liu and others, 2023, arXiv 2307.07791 (ACL; in its second version CMCS). An online network (encoder f, projector g, predictor q)
and its moving average see two views x and x' of each clip. With y = f(x), z = g(y), p = q(z), a bar for the average's outputs, and
D(a, b) = 2 - 2 cos(a, b):

    byol        = D(p, sg z'_bar) + D(p', sg z_bar)                                 attraction across views, as BYOL
    cross_model = D(p, p') - ( D(p, sg z_bar) + D(p', sg z'_bar) ) / 2              the online outputs attract, each repels the average's
    votes       = Y_ij = [ streams that find i and j alike >= 2 ]                   see `coloss.motion.neighbour_voting`
    byol with Y = mean over pairs with Y_ij of D(p_i, sg z'_bar_j), in both directions; Y always holds the diagonal
    loss        = sum over streams of byol + lambda cross_model

**What is reconstructed.** The authors published two figures and a command line, no source and no value of lambda. The attraction across
views and the votes are drawn plainly. The sign and scale of `cross_model`, how similarities become votes (here: among the k most similar
of the row, in both directions) and lambda are a reading. It may not be the paper's method.

When it helps: BYOL where negatives do harm, as in small sets with many clips of a kind; votes in large batches, in which a clip has others
of its kind. When not: small batches, in which nobody but the clip itself is voted for (watch `positives`); large lambda, which drives the
predictions away from their own average (watch `own_distance`).

Measured on MSR Action3D across persons (about 233 clips of 12 frames to train on, 275 to test on, 100 steps of batch 32, three streams, widths
8 and 32, frozen linear probe and 5 nearest neighbours, means of 5 seeds):

    BYOL, repulsion and votes    0.493   0.337      its interval against BYOL, -0.062 to +0.031, holds 0
    BYOL                         0.508   0.357
    untrained encoder            0.494   0.281
    trained with labels          0.616   0.590      what this encoder can learn in as many steps
    raw coordinates              0.631   0.585

This budget is too small to tell: BYOL betters the untrained encoder in the linear probe by 0.015 (on 4 seeds of 5), its neighbours more
(0.36 against 0.28), and labels show that the encoder could learn far more. It does not collapse (`embedding_std` 0.80), and in batches of
32 clips of 20 actions few others are voted for (`positives` 1.8 for each clip, itself included). The paper's gains are reported on 40,000
clips and 300 epochs; nothing here speaks for or against them. For a few hundred clips take raw coordinates.

Distributed: votes are over the clips of all processes and pairs are counted over all of them, so that two processes take the steps of
one, as far as the encoder's own layers allow it (batch norms of `coloss.nn.SkeletonEncoder` see their own process alone). Each process
draws the views of its own clips. A checkpoint holds the slow copy, both heads and all randomness.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import View
from coloss.errors import InputError
from coloss.motion.momentum_prediction import byol_loss, cross_model_loss
from coloss.motion.momentum_views import MomentumViewMethod
from coloss.motion.neighbour_voting import (
    cosine_similarity_matrix,
    nearest_mask,
    neighbour_votes,
    soft_positive_loss,
)
from coloss.motion.skeleton_pretraining_trial import Pretraining, compare_pretraining, pretraining_task
from coloss.motion.stream_encoder import StreamEncoder, StreamHeads, check_streams
from coloss.ops import gather_with_gradient, rank
from coloss.train import Budget, Claim, Schedule, Setting, State, System


class SkeletonBYOL(MomentumViewMethod):
    """Self-supervised training of an encoder on two views without negatives, for one stream of a skeleton or several.

    Adds the term `byol`, summed over streams; reports `embedding_std` (that of the targets' unit vectors times sqrt(d): 1 is spread evenly,
    0 is one point) and `own_distance`, D(p, z) of the same view. For several streams, or one that is not the joints, the model becomes a
    `StreamEncoder` and ships as such.

    Args:
        momentum: share of the slow network that stays in a step, in [0, 1].
        streams: names of `coloss.data.skeleton_streams`; ("joint",) takes the inputs as they are, whatever they are.
        parents: of each joint, -1 at the root; needed for other streams.
        projector: widths of its hidden layers and, last, of the embeddings.
        predictor: width of its hidden layer.
        view: in place of `crop_and_shear`: gives two views, see `coloss.train.ViewMethod`.
        in_features: length of the encoder's feature vector (of one stream), where it does not declare it.

    Attributes:
        projector, predictor: from `setup` on.

    Raises:
        InputError: for a value out of range; in a run, beside an objective, or for other than two views.

    Cost:
        Two forward and backward passes of each stream's encoder for each clip, and two forward passes of its slow copy.

    Source:
        Grill et al., 2020, arXiv 2006.07733.

    Examples:
        >>> import coloss
        >>> from coloss.nn import SkeletonEncoder
        >>> from coloss.ops import graph_partition
        >>> encoder = SkeletonEncoder(graph_partition([-1, 0, 1]), widths=(8,), strides=(1,))
        >>> method = SkeletonBYOL(projector=(16, 8), predictor=16)
        >>> run = coloss.fit(
        ...     encoder, (torch.rand(32, 3, 8, 3),), methods=[method], budget=coloss.Budget(steps=2)
        ... )
        >>> sorted(run.history[-1].terms)
        ['byol']
    """

    def __init__(
        self,
        *,
        momentum: float = 0.996,
        streams: Sequence[str] = ("joint",),
        parents: Sequence[int] | None = None,
        projector: Sequence[int] = (256, 64),
        predictor: int = 256,
        view: View | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(momentum=momentum, views=2, projector=projector, view=view, in_features=in_features)
        check_streams(streams)
        if predictor < 1:
            raise InputError(f"predictor must be >= 1, got {predictor}")
        if tuple(streams) != ("joint",) and parents is None:
            raise InputError(f"streams {', '.join(streams)} need the parents of the joints, got none")
        self.streams, self.parents, self.hidden = tuple(streams), parents, predictor

    @classmethod
    def for_setting(cls, setting: Setting, **parameters: Any) -> "SkeletonBYOL":
        """Build it for a task of the lab, with the skeleton of its data."""
        skeleton = getattr(setting.splits, "skeleton", None)
        return cls(**({"parents": skeleton.parents} if skeleton is not None else {}) | parameters)

    def setup(self, state: State) -> None:
        if self.streams != ("joint",):
            assert self.parents is not None
            state.model = StreamEncoder(state.model, self.streams, self.parents, self.in_features)
        super().setup(state)
        self.predictor = state.like_model(
            StreamHeads(len(self.streams), self.widths[-1], (self.hidden, self.widths[-1]))
        )

    def new_projector(self, in_features: int) -> nn.Module:
        streams = len(self.streams)
        return StreamHeads(streams, self.in_features or in_features // streams, self.widths)

    def check_views(self, views: Tensor) -> None:
        if len(views) != 2:
            raise InputError(f"view must give two views, got {len(views)}")

    def view_terms(
        self, embeddings: Float[Tensor, "views clips streams dim"], state: State
    ) -> dict[str, Tensor]:
        self.check_views(embeddings)
        targets = self.target_embeddings(state.batch.inputs).view_as(embeddings)
        predictions = self.predictor(embeddings.flatten(0, 1).flatten(1)).view_as(embeddings)
        # Of the second view's targets as the first view's predictions should be.
        crossed = targets.flip(0)
        spread = torch.nn.functional.normalize(targets.float(), dim=-1).std(1, correction=0)
        state.log(
            {
                "embedding_std": spread.mean() * targets.shape[-1] ** 0.5,
                "own_distance": byol_loss(predictions.detach(), targets),
            }
        )
        return self.stream_terms(predictions, crossed, state)

    def stream_terms(
        self,
        predictions: Float[Tensor, "views clips streams dim"],
        crossed: Float[Tensor, "views clips streams dim"],
        state: State,
    ) -> dict[str, Tensor]:
        """The named terms of predictions and of the targets that they are to meet, those of the other view."""
        return {"byol": 2 * len(self.streams) * byol_loss(predictions, crossed)}


class SkeletonACL(SkeletonBYOL):
    """`SkeletonBYOL` with a repulsion between the two models, and with positives that streams vote on.

    Adds the term `cross_model` beside `byol`, and reports `positives`: pairs that count as positive, for each clip. Without repulsion and
    votes it is `SkeletonBYOL` to the bit.

    Args:
        cross_model: lambda, weight of `cross_model_loss`: a number >= 0 or a schedule; 0 leaves it out. Keep it small (0.05 to 0.3).
        votes: streams that must agree on a further positive, in [1, streams]; 0 for no votes.
        neighbours: k >= 1: a stream votes for the pairs in which each view's prediction has the other's target among its k nearest of
            the batch.
        votes_from: share of the training after which votes count, in [0, 1): a young encoder does not know who is alike.
        streams: as for `SkeletonBYOL`; here three by default, as published.
        momentum, parents, projector, predictor, view, in_features: as for `SkeletonBYOL`.

    Raises:
        InputError: for a value out of range; in a run, beside an objective, or for other than two views.

    Cost:
        That of `SkeletonBYOL`: no further forward pass. Votes take O(N^2 d) for each stream and N clips, those of all processes.

    Source:
        A reading of Guo et al., 2023, arXiv 2307.07791; see the head of this module for what is inferred.

    Examples:
        >>> import coloss
        >>> from coloss.nn import SkeletonEncoder
        >>> from coloss.ops import graph_partition
        >>> parents = [-1, 0, 1]
        >>> encoder = SkeletonEncoder(graph_partition(parents), widths=(8,), strides=(1,))
        >>> method = SkeletonACL(parents=parents, projector=(16, 8), predictor=16)
        >>> clips = torch.rand(32, 3, 8, 3)
        >>> run = coloss.fit(encoder, (clips,), methods=[method], budget=coloss.Budget(steps=2))
        >>> sorted(run.history[-1].terms), run.model(clips).shape
        (['byol', 'cross_model'], torch.Size([32, 24]))
    """

    def __init__(
        self,
        *,
        cross_model: Schedule = 0.1,
        votes: int = 2,
        neighbours: int = 10,
        votes_from: float = 0.0,
        streams: Sequence[str] = ("joint", "motion", "bone"),
        momentum: float = 0.996,
        parents: Sequence[int] | None = None,
        projector: Sequence[int] = (256, 64),
        predictor: int = 256,
        view: View | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(
            momentum=momentum,
            streams=streams,
            parents=parents,
            projector=projector,
            predictor=predictor,
            view=view,
            in_features=in_features,
        )
        if not callable(cross_model) and not cross_model >= 0:
            raise InputError(f"cross_model must be >= 0, or a schedule, got {cross_model}")
        if not 0 <= votes <= len(self.streams):
            raise InputError(f"votes must be in [0, {len(self.streams)}], the number of streams, got {votes}")
        if neighbours < 1:
            raise InputError(f"neighbours must be >= 1, got {neighbours}")
        if not 0 <= votes_from < 1:
            raise InputError(f"votes_from must be in [0, 1), got {votes_from}")
        self.votes, self.neighbours, self.votes_from = votes, neighbours, votes_from
        self.repels = callable(cross_model) or cross_model > 0
        self.term_weights = {"cross_model": cross_model}

    def stream_terms(
        self,
        predictions: Float[Tensor, "views clips streams dim"],
        crossed: Float[Tensor, "views clips streams dim"],
        state: State,
    ) -> dict[str, Tensor]:
        terms = super().stream_terms(predictions, crossed, state)
        streams = len(self.streams)
        if self.votes and state.progress >= self.votes_from:
            terms["byol"] = self._voted(predictions, crossed, state)
        if self.repels:
            own = crossed.flip(0)
            terms["cross_model"] = streams * cross_model_loss(*predictions, *own)
        return terms

    def _voted(self, predictions: Tensor, crossed: Tensor, state: State) -> Tensor:
        """BYOL's loss with the positives that the streams agree on, over the clips of all processes."""
        # (views, streams, clips, dim)
        queries, keys = predictions.transpose(1, 2), crossed.transpose(1, 2)
        gathered = gather_with_gradient(keys.permute(2, 0, 1, 3).contiguous()).permute(1, 2, 0, 3)
        similar = cosine_similarity_matrix(queries.detach(), gathered)
        own = torch.arange(queries.shape[2], device=queries.device) + (rank() << 40)
        positives = neighbour_votes(
            list(similar.transpose(0, 1)), partial(nearest_mask, k=self.neighbours), self.votes
        )
        positives = positives | (own[:, None] == gather_with_gradient(own)[None])
        state.log({"positives": positives.sum() / max(len(positives), 1)})
        pairs = zip(queries.flatten(0, 1), gathered.flatten(0, 1), strict=True)
        losses = [soft_positive_loss(p, z, positives, across_processes=True) for p, z in pairs]
        return torch.stack(losses).sum()


SYSTEM = System(
    slug="skeleton-acl",
    title="Joint Adversarial and Collaborative Learning for Self-Supervised Action Recognition",
    paper="Guo et al. 2023, arXiv 2307.07791",
    family="motion",
    acts_on=("batch", "model", "loss"),
    api=(
        "coloss.motion.SkeletonACL",
        "coloss.motion.SkeletonBYOL",
        "coloss.motion.BYOL",
        "coloss.motion.byol_loss",
        "coloss.motion.cross_model_loss",
        "coloss.motion.neighbour_votes",
        "coloss.motion.soft_positive_loss",
        "coloss.motion.StreamEncoder",
        "coloss.motion.evaluate_skeleton_encoder",
    ),
    method="coloss.motion.SkeletonACL",
    kinds=("self-supervised",),
    compare="msr-action3d-ssl --methods skeleton-acl,skelemixclr",
)

_STREAMS = ("joint", "motion", "bone")
_SHARED: dict[str, Any] = {"streams": _STREAMS, "momentum": 0.97, "projector": (128, 64), "predictor": 128}


def _plain(setting: Setting, view: View) -> SkeletonBYOL:
    return SkeletonBYOL(parents=setting.splits.skeleton.parents, view=view, **_SHARED)


def _repelled(setting: Setting, view: View) -> SkeletonACL:
    parents = setting.splits.skeleton.parents
    return SkeletonACL(
        cross_model=0.1, votes=2, neighbours=3, votes_from=0.3, parents=parents, view=view, **_SHARED
    )


def _shipped(encoder: nn.Module, setting: Setting) -> nn.Module:
    return StreamEncoder(encoder, _STREAMS, setting.splits.skeleton.parents)


_ARMS = {
    "SkeletonBYOL": Pretraining(_plain, 0.1, 2e-3),
    "BYOL + repulsion + votes": Pretraining(_repelled, 0.0, 5e-3),
}


CLAIM = Claim(
    statement="An encoder of three streams of skeletons, trained on MSR Action3D without labels by BYOL with the repulsion between models "
    "and with positives that streams vote on, gives frozen features from which a linear probe recognises more actions of other persons "
    "than one trained by BYOL alone, at the same number of steps and forward passes.",
    metric="linear",
    baseline="SkeletonBYOL",
    method="BYOL + repulsion + votes",
    task=pretraining_task(Budget(steps=100), batch_size=32),
    trial=partial(compare_pretraining, arms=_ARMS, shipped=_shipped),
    tried="Before the measurement, for both arms alike, on the validation persons of seeds 100, 101 and 102 (60, 59 and 60 clips, means): shear "
    "0, 0.1 and 0.5 at learning rate 5e-3, and shear 0.1 at 2e-3. Linear probe 0.475, 0.486, 0.441 and 0.492 for BYOL, 0.497, 0.464, 0.480 and "
    "0.492 with repulsion and votes (untrained 0.525); each arm has its best. Momentum 0.97, lambda 0.1, 3 neighbours and votes from 0.3 of the "
    "training were set beforehand and not searched.",
)
