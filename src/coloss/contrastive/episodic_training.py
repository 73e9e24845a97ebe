r"""Few-shot training by prototypes, with two terms more: triplets with prototypes, and the score of neighbourhoods (ICNN).

Mauricio Mendez-Ruiz, Jorge Gonzalez-Zapata, Ivan Reyes-Amezcua, Daniel Flores-Araiza, Francisco Lopez-Tiro, Andres Mendez-Vazquez, Gilberto
Ochoa-Ruiz 2023, "SuSana Distancia is all you need: Enforcing class separability in metric learning via two novel distance-based loss functions
for few-shot image classification", arXiv 2305.09062.

RECONSTRUCTED: the equations of the paper could not be read. The prototypical loss is that of Snell et al. 2017; the other two, their weights
and the soft form of the score are our reading of the abstract and of the group's earlier score (arXiv 2107.06992), which may differ.

In an episode of N classes with K support and Q query samples each, c_k the mean of the support embeddings of class k:

    prototypical  = mean_x -log softmax_k( -d(f(x), c_k) )[y]                                   over the queries x
    proto_triplet = mean_x 1 / (N - 1) sum_{k != y} max(0, d(f(x), c_y) - d(f(x), c_k) + margin)
    icnn          = -log( icnn_score(all embeddings of the episode) )                           see `coloss.metrics.icnn_score`
    loss          = prototypical + a1 proto_triplet + a2 icnn

When it helps: the neighbourhood score is worth having as a measure of any labelled embedding, and as a loss it did what it promises. Measured
(`coloss verify proto-triplet-icnn`: omniglot at 14x14 pixels, 20-way 1-shot, unseen alphabets, 600 training episodes, five seeds), accuracy
with the prototypical loss and ICNN was 58.0 %, with the prototypical loss alone 56.7 %, higher with each seed; score and silhouette
of unseen characters rose as well, a little (0.374 from 0.369).

When not: the Proto-Triplet term beside the prototypical loss alone cost 0.6 points, and in the claim, which has both terms, +0.7 points have
an interval from -0.3 to +1.7. The gain with ICNN alone was seen in a context arm, and is no claim. With 120 training episodes both terms
together cost half a point: short training is where not to use them.

At test time nothing of this is needed but prototypes and distances: `coloss.metrics.evaluate_episodes`. Distributed: a batch is one episode,
whose rows the processes share; its embeddings are gathered, and the loss is that of one process. There is no state beside the network.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import silhouette_score
from torch import Tensor

from coloss.contrastive.episode_losses import Anchor, ICNNLoss, Mining, ProtoTripletLoss
from coloss.contrastive.unseen_retrieval import character_encoder, omniglot_by_alphabet
from coloss.data import EpisodeSampler, Loader
from coloss.errors import InputError
from coloss.metrics import evaluate_episodes, extract_features, icnn_score
from coloss.ops import full_precision, gather_with_gradient, prototypes, prototypical_logits, world_size
from coloss.ops.class_prototypes import PrototypeMetric
from coloss.ops.distributed import row_counts
from coloss.train import (
    Budget,
    Claim,
    FeatureSource,
    Method,
    Schedule,
    Setting,
    State,
    System,
    cosine,
    fit,
    linear,
)


class EpisodicTraining(Method):
    """Makes each batch a few-shot episode: prototypical loss, Proto-Triplet and ICNN terms.

    The first `shots` samples of each class in a batch are its support, the rest its queries, as `coloss.data.EpisodeSampler` lays them out.
    Classes with no more than `shots` samples in the batch are left out; a batch in which fewer than two are left costs nothing. Adds the
    terms `prototypical`, `proto_triplet` and `icnn` (the last two unless their weight is 0), and logs the accuracy of the
    queries (`episode_accuracy`) and the share of triplets that cost something (`active_triplets`).

    Args:
        shots: support samples of each class, >= 1.
        triplet_weight: a1, a number >= 0 or a schedule.
        icnn_weight: a2, likewise; by default it rises from 0 to 1, as neighbourhoods mean nothing at first.
        metric: "sqeuclidean" or "cosine".
        temperature: of the prototypical loss, > 0.
        margin: of the triplets; None: 1 for squared distances, 0.2 for cosines.
        mining: "all" other classes, or the "hardest" alone.
        anchor: of the triplets, "query" or "prototype".
        k: neighbours of the score; None: size of the smallest class in the episode less one, so that a score of 1 can be reached.
        soft: the score with all others as neighbours, weighted; False: the k nearest.
        tap: module path of the embeddings; None: the model's output, or beside an objective the input of its classifier.

    Raises:
        InputError: for a value out of range; in a run, for targets that are no class numbers.

    Source:
        Our reading of Mendez-Ruiz et al. 2023, arXiv 2305.09062; Snell et al. 2017, arXiv 1703.05175.

    Examples:
        >>> import coloss
        >>> from coloss.data import EpisodeSampler, IndexedDataset, Loader
        >>> from coloss.nn import MLP
        >>> data = IndexedDataset(torch.randn(60, 4), torch.arange(60) % 6)
        >>> sampler = EpisodeSampler(data.targets, ways=3, shots=1, queries=4, episodes=5)
        >>> run = coloss.fit(
        ...     MLP(4, [16], 8),
        ...     Loader(data, None, sampler=sampler),
        ...     methods=[EpisodicTraining(shots=1)],
        ...     budget=coloss.Budget(epochs=1),
        ... )
        >>> sorted(run.history[-1].terms)
        ['icnn', 'proto_triplet', 'prototypical']
    """

    batch_statistic = True

    def __init__(
        self,
        *,
        shots: int = 1,
        triplet_weight: Schedule = 1.0,
        icnn_weight: Schedule = linear(0.0, 1.0),
        metric: PrototypeMetric = "sqeuclidean",
        temperature: float = 1.0,
        margin: float | None = None,
        mining: Mining = "all",
        anchor: Anchor = "query",
        k: int | None = None,
        soft: bool = True,
        tap: str | None = None,
    ) -> None:
        super().__init__()
        if shots < 1:
            raise InputError(f"shots must be >= 1, got {shots}")
        for name, weight in (("triplet_weight", triplet_weight), ("icnn_weight", icnn_weight)):
            if not callable(weight) and not 0 <= weight < math.inf:
                raise InputError(f"{name} must be >= 0 and finite, or a schedule, got {weight}")
        if metric not in ("sqeuclidean", "cosine"):
            raise InputError(f'metric must be "sqeuclidean" or "cosine", got {metric!r}')
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be > 0 and finite, got {temperature}")
        if margin is None:
            margin = 0.2 if metric == "cosine" else 1.0
        try:
            self.triplets = ProtoTripletLoss(margin, mining, anchor, metric=metric)
            self.icnn = ICNNLoss(k, soft=soft)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.shots, self.metric, self.temperature = shots, metric, temperature
        self.source = FeatureSource(tap)
        self.term_weights = {"proto_triplet": triplet_weight, "icnn": icnn_weight}

    def setup(self, state: State) -> None:
        self.source.setup(state)

    def terms(self, state: State) -> dict[str, Tensor]:
        targets = state.batch.targets
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            raise InputError("an episode needs one class index for each sample as targets")
        embeddings = _whole(full_precision(self.source.read(state)))
        classes, labels, sizes = _whole(targets).unique(return_inverse=True, return_counts=True)
        order = labels.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = (
            torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[labels[order]]
        )
        kept = (sizes > self.shots).nonzero().flatten()
        wanted = [name for name, weight in self.term_weights.items() if callable(weight) or weight > 0]
        if len(kept) < 2 or not bool(embeddings.isfinite().all()):
            # NaN where an embedding is not finite: the loop then names term and step.
            nothing = 0 * embeddings.sum()
            return {name: nothing for name in ("prototypical", *wanted)}
        here = torch.isin(labels, kept)
        embeddings, labels, place = embeddings[here], torch.searchsorted(kept, labels[here]), place[here]
        support = place < self.shots
        centres = prototypes(embeddings[support], labels[support], len(kept))
        queries, answers = embeddings[~support], labels[~support]
        logits = prototypical_logits(queries, centres, self.metric, self.temperature)
        terms = {"prototypical": F.cross_entropy(logits, answers)}
        logged = {"episode_accuracy": (logits.argmax(1) == answers).double().mean()}
        if "proto_triplet" in wanted:
            terms["proto_triplet"] = self.triplets(queries, answers, centres)
            logged["active_triplets"] = torch.tensor(self.triplets.active)
        if "icnn" in wanted:
            rows = F.normalize(embeddings, dim=1) if self.metric == "cosine" else embeddings
            terms["icnn"] = self.icnn(rows, labels)
        state.log(logged)
        return terms


def _whole(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order in which a `Loader` dealt them out."""
    joined = gather_with_gradient(rows)
    if world_size() == 1 or len(set(row_counts(rows))) > 1:
        return joined
    return joined.unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)


SYSTEM = System(
    slug="proto-triplet-icnn",
    title="SuSana Distancia is all you need: Enforcing class separability in metric learning via two novel distance-based loss functions",
    paper="Mendez-Ruiz et al. 2023, arXiv 2305.09062",
    family="contrastive",
    acts_on=("loss", "evaluation"),
    api=(
        "coloss.contrastive.EpisodicTraining",
        "coloss.contrastive.ProtoTripletLoss",
        "coloss.contrastive.proto_triplet_loss",
        "coloss.contrastive.ICNNLoss",
        "coloss.metrics.icnn_score",
        "coloss.metrics.icnn_factors",
        "coloss.metrics.evaluate_episodes",
        "coloss.ops.prototypes",
        "coloss.ops.prototypical_logits",
    ),
    method="coloss.contrastive.EpisodicTraining",
    kinds=("classification",),
)


EPISODES = 600


def _compare(setting: Setting) -> dict[str, dict[str, float]]:
    arms: dict[str, dict[str, Any]] = {
        "prototypical": {"triplet_weight": 0.0, "icnn_weight": 0.0},
        "prototypical + triplet + icnn": {},
        "prototypical + triplet": {"icnn_weight": 0.0},
        "prototypical + icnn": {"triplet_weight": 0.0},
    }
    splits, count = omniglot_by_alphabet(setting.seed), 3 if setting.smoke else EPISODES
    assert isinstance(splits.train.targets, Tensor)
    found = {}
    for name, weights in arms.items():
        sampler = EpisodeSampler(splits.train.targets, ways=20, shots=1, queries=5, episodes=count)
        model = fit(
            character_encoder(setting.seed),
            Loader(splits.train, None, sampler=sampler, seed=setting.seed),
            methods=[EpisodicTraining(shots=1, **weights)],
            budget=Budget(steps=count),
            optimizer=partial(torch.optim.AdamW, lr=2e-3),
            learning_rate_schedule=cosine(warmup=0.05),
            log_every=1000,
            seed=setting.seed,
        ).model
        draws = torch.Generator().manual_seed(setting.seed)
        episodes = 10 if setting.smoke else 600
        accuracy, interval, _ = evaluate_episodes(
            model, splits.test, 20, 1, episodes=episodes, generator=draws
        )
        assert interval is not None
        features, targets = extract_features(model, splits.test)
        found[name] = {
            "accuracy": accuracy,
            "half_interval": (interval[1] - interval[0]) / 2,
            "icnn_score": float(icnn_score(features, targets)),
            "silhouette": float(silhouette_score(features.numpy(), targets.numpy())),
        }
    return found


CLAIM = Claim(
    statement="On omniglot at 14x14 pixels, an encoder trained on 20-way 1-shot episodes of four alphabets classifies episodes of the four "
    "others more accurately with the (reconstructed) Proto-Triplet and ICNN losses beside the prototypical one than with that alone.",
    metric="accuracy",
    baseline="prototypical",
    method="prototypical + triplet + icnn",
    trial=_compare,
    tried="Code: the triplet term equals a plain loop, its slope is the one worked by hand, and the prototypical term equals its "
    "formula. Scale: first measured with 120 training episodes in place of the 600 that the card of this claim asks for, both terms lost "
    "(-0.5 points, -0.87 to -0.13: contradicted); with 400, two seeds, they were ahead. The number is now the card's. Parts: ICNN alone "
    "gains with every seed at both lengths, triplets alone lose. The equations are reconstructed: the verdict is on our reading, not on "
    "the authors' losses.",
)
