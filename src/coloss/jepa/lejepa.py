"""Trains an encoder without labels: views of one sample must agree, and embeddings must look like a standard normal cloud.

LeJEPA: Balestriero, LeCun, 2025, arXiv 2511.08544, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics".

Agreement alone is satisfied by a constant. Instead of a teacher, stop-gradients or negatives, one statistic keeps the embeddings
spread: projected on any direction they must follow N(0, 1). With z[v, n] in R^D the projected embedding of view v of sample n:

    invariance  = mean over v, n, d of ( mean_u z[u, n, d] - z[v, n, d] )^2          u over the global views, by default all
    sigreg      = mean over v, s of T( a_s . z[v, 1], ..., a_s . z[v, N] )            a_s: S random unit vectors, new at every step
    T(x)        = N * integral of | mean_n exp(i t x_n) - exp(-t^2 / 2) |^2 exp(-t^2 / 2) dt        (`coloss.ops.epps_pulley`)
    loss        = (1 - weight) * invariance + weight * sigreg

T is taken for each view alone and then averaged; over all views in one heap it would test their mixture, and published weights are for
the former. Under the goal the mean of T is 1.05, not 0. T is a sum over N samples (a mean times N), so the balance of the two terms
depends on the batch size: tune `weight` (0.01 to 0.1) again when that changes much, and keep N >= 64, for T is noisy below.

When it helps: a new kind of data, where you can write down changes that do not matter (views), few labels, no wish to tune. One
weight, no schedules, and collapse cannot go unnoticed. `SIGReg` also serves alone, on any embeddings that should be spread evenly. When
not: views that change what you will ask for later; features that are good already. Measured on 1,200 digits of 8 x 8 pixels, 400 steps,
probes with 100 labels, test accuracy of 5 nearest neighbours and of a linear probe:

    LeJEPA, weight 0.05   0.89   0.90
    invariance alone      0.62   0.79      the baseline of the claim: it shows that collapse is controlled, not a rank among rivals
    untrained encoder     0.83   0.85      random features serve a linear probe well, so it hardly notices collapse
    raw pixels            0.92   0.89

Distributed: every process draws the same slices, and the means inside T run over all processes before they are squared, as does batch
norm in the projector; so data-parallel training takes the steps of one process with the joined batch, as far as the encoder's own
layers allow it. A checkpoint holds the projector and the state of all randomness.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import View
from coloss.errors import InputError, UnknownNameError, suggest_names
from coloss.jepa.univariate import UNIVARIATE
from coloss.metrics import evaluate_encoder, extract_features
from coloss.ops import (
    effective_rank,
    epps_pulley,
    full_precision,
    gram_singular_values,
    random_directions,
    sliced_statistic,
)
from coloss.train.budget import Budget
from coloss.train.encoder_task import digits_encoder_task
from coloss.train.loop import Fit
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.system import Arm, Claim, System
from coloss.train.task import Setting
from coloss.train.view_method import ViewMethod


def invariance_loss(
    views: Float[Tensor, "views samples dim"], global_views: int | None = None
) -> Float[Tensor, ""]:
    """Squared distance of each view's embedding to the mean over the global views of its sample.

        mean over v, n, d of ( mean_{u <= global_views} z[u, n, d] - z[v, n, d] )^2

    The gradient flows through the mean as well: there is no target that stands still.

    Args:
        views: z, embeddings of V views of N samples.
        global_views: how many of the first views define the mean, in [1, V]; None for all.

    Returns:
        A scalar >= 0, at least float32; 0 for no samples.

    Raises:
        ValueError: if there is no view, or `global_views` is out of range.

    Source:
        LeJEPA, arXiv 2511.08544, section 5.

    Examples:
        >>> invariance_loss(torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]]))
        tensor(0.5000)
    """
    count = views.shape[0]
    if count == 0:
        raise ValueError("views must hold at least one view, got 0")
    if global_views is not None and not 1 <= global_views <= count:
        raise ValueError(f"global_views must be in [1, {count}], got {global_views}")
    embeddings = full_precision(views)
    centre = embeddings[:global_views].mean(0)
    return (embeddings - centre).square().sum() / max(embeddings.numel(), 1)


class SIGReg(nn.Module):
    """How far embeddings are from a standard normal cloud, seen along random directions that are new at every call.

    Directions are the same on every process: they come from `generator`, or else from a count of calls that is part of the state
    dict, so that a resumed run goes on with the directions it would have had.

    Args:
        num_slices: directions per call, >= 1. Redrawing covers many over training, so they need not grow with the dimension.
        knots: points of the quadrature of `epps_pulley`, >= 2.
        t_max: its upper end, > 0.
        univariate: the one-dimensional test; see `coloss.jepa.univariate`. `knots` and `t_max` belong to `epps_pulley` alone.
        chunk_size: directions projected on at once; None for what a cache holds. Changes memory and speed, not the value.

    Returns:
        From `forward(embeddings, generator=None)`, embeddings (..., N, D): a scalar, averaged over directions and leading dimensions
        such as views. It can be differentiated once.

    Raises:
        ValueError: for a value out of range.

    Cost:
        O(N S (D + K)) time for S slices and K knots, with `epps_pulley` little more than the projections; O(N (D + chunk)) memory.

    Source:
        LeJEPA, arXiv 2511.08544, definition 2 and algorithm 1; quadrature on [0, 3] with 17 knots as in the authors' library.

    Examples:
        >>> sigreg = SIGReg(num_slices=256)
        >>> normal = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        >>> bool(sigreg(normal) < 2), sigreg(torch.zeros(512, 8)) / 512
        (True, tensor(0.4020))
    """

    def __init__(
        self,
        num_slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        univariate: Callable[[Tensor], Tensor] = epps_pulley,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if num_slices < 1:
            raise ValueError(f"num_slices must be >= 1, got {num_slices}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
        if univariate is epps_pulley:
            univariate = partial(epps_pulley, t_max=t_max, knots=knots)
            univariate(torch.zeros(1, 1))  # checks both now, not at the first step
        self.num_slices, self.univariate, self.chunk_size = num_slices, univariate, chunk_size
        self.calls = 0

    def forward(
        self, embeddings: Float[Tensor, "*views samples dim"], generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        if generator is None:
            generator = torch.Generator().manual_seed(self.calls)
            self.calls += 1
        points = full_precision(embeddings)
        directions = random_directions(
            points.shape[-1], self.num_slices, generator, points.dtype, points.device
        )
        return sliced_statistic(points, directions, self.univariate, self.chunk_size)

    def get_extra_state(self) -> dict[str, int]:
        # Not a buffer: data-parallel training would send it to every process at every step.
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def lejepa_loss(
    views: Float[Tensor, "views samples dim"],
    *,
    global_views: int | None = None,
    weight: float = 0.05,
    sigreg: Callable[..., Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The whole objective, for a training loop of your own.

        (1 - weight) * invariance_loss(views, global_views) + weight * sigreg(views, generator)

    Args:
        views: projected embeddings of V views of N samples. End the projector with a linear layer: a norm there would hide collapse.
        global_views: how many of the first views define the mean of a sample; None for all.
        weight: lambda, in [0, 1].
        sigreg: a `SIGReg`, kept by the caller so that its slices differ from step to step; None draws 1024 slices from `generator`.
        generator: of the slices, in the same state on every process; None leaves them to `sigreg`, or without one to torch's global
            generator.

    Returns:
        The loss, and its two unweighted terms "invariance" and "sigreg".

    Raises:
        ValueError: for a weight out of range, or as `invariance_loss`.

    Source:
        LeJEPA, arXiv 2511.08544, section 5.

    Examples:
        >>> loss, terms = lejepa_loss(torch.randn(4, 64, 16), sigreg=SIGReg(64))
        >>> bool(loss == 0.95 * terms["invariance"] + 0.05 * terms["sigreg"])
        True
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    if sigreg is None:
        if generator is None:
            generator = torch.default_generator
        sigreg = SIGReg()
    terms = {"invariance": invariance_loss(views, global_views), "sigreg": sigreg(views, generator)}
    return (1 - weight) * terms["invariance"] + weight * terms["sigreg"], terms


class LeJEPA(ViewMethod):
    """Self-supervised training on views, or an auxiliary loss on views beside an objective; see `ViewMethod` for how views are made.

    Args:
        weight: lambda, the share of SIGReg: a number in [0, 1] or a schedule of progress.
        views: V, views of each sample from `default_views`, >= 1.
        projector: widths of its hidden layers and, last, of the embeddings.
        num_slices: random directions per step, >= 1.
        view, tap, in_features: as for `ViewMethod`.
        global_views: how many of the first views define the mean of a sample; None for all.
        scale: factor on both terms, a number >= 0 or a schedule: how much they count beside an objective.
        univariate: the one-dimensional test of SIGReg.

    Attributes:
        projector: from `setup` on; `sigreg`: the regulariser.

    Raises:
        InputError: for a value out of range, features that are no vectors, or views that do not fit.

    Cost:
        V forward and backward passes of the encoder for each sample; SIGReg adds little (see there).

    Source:
        LeJEPA, arXiv 2511.08544.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> images = torch.rand(64, 1, 8, 8)
        >>> run = coloss.fit(MLP(64, [32]), (images,), methods=[LeJEPA()], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms), run.model(images).shape
        (['invariance', 'sigreg'], torch.Size([64, 32]))
    """

    def __init__(
        self,
        *,
        weight: Schedule = 0.05,
        views: int = 4,
        projector: Sequence[int] = (128, 16),
        num_slices: int = 256,
        view: View | None = None,
        global_views: int | None = None,
        tap: str | None = None,
        in_features: int | None = None,
        scale: Schedule = 1.0,
        univariate: Callable[[Tensor], Tensor] = epps_pulley,
    ) -> None:
        super().__init__(views=views, projector=projector, view=view, tap=tap, in_features=in_features)
        if not callable(weight) and not 0 <= weight <= 1:
            raise InputError(f"weight must be in [0, 1], or a schedule, got {weight}")
        if not callable(scale) and not scale >= 0:
            raise InputError(f"scale must be >= 0, or a schedule, got {scale}")
        if num_slices < 1:
            raise InputError(f"num_slices must be >= 1, got {num_slices}")
        if global_views is not None and not 1 <= global_views <= (views if view is None else global_views):
            raise InputError(f"global_views must be in [1, views = {views}], got {global_views}")
        self.global_views = global_views
        self.sigreg = SIGReg(num_slices, univariate=univariate)
        self.term_weights = {
            "invariance": lambda progress: (1 - value_at(weight, progress)) * value_at(scale, progress),
            "sigreg": lambda progress: value_at(weight, progress) * value_at(scale, progress),
        }

    def check_views(self, views: Tensor) -> None:
        if len(views) < (self.global_views or 1):
            raise InputError(
                f"view must give at least global_views = {self.global_views} views, got {len(views)}"
            )

    def view_terms(self, embeddings: Float[Tensor, "views samples dim"], state: State) -> dict[str, Tensor]:
        return {
            "invariance": invariance_loss(embeddings, self.global_views),
            "sigreg": self.sigreg(embeddings, state.generator),
        }

    @classmethod
    def for_setting(cls, setting: Setting, *, univariate: str = "epps_pulley", **parameters: Any) -> "LeJEPA":
        """Build it for a task of the lab; `univariate` names a function of `coloss.jepa.univariate`."""
        if univariate not in UNIVARIATE:
            raise UnknownNameError(
                f"no univariate test named {univariate!r}{suggest_names(univariate, UNIVARIATE)} "
                f"(there are {', '.join(UNIVARIATE)})"
            )
        return cls(univariate=UNIVARIATE[univariate], **parameters)


SYSTEM = System(
    slug="lejepa",
    title="LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics",
    paper="Balestriero, LeCun, 2025, arXiv 2511.08544",
    family="jepa",
    acts_on=("batch", "loss"),
    api=(
        "coloss.jepa.LeJEPA",
        "coloss.jepa.lejepa_loss",
        "coloss.jepa.SIGReg",
        "coloss.jepa.invariance_loss",
        "coloss.jepa.pretrain_lejepa",
    ),
    method="coloss.jepa.LeJEPA",
    kinds=("self-supervised", "classification"),
    recipe="coloss.jepa.pretrain_lejepa",
)


def _measure(fit: Fit, setting: Setting) -> dict[str, float]:
    """RankMe of features and embeddings on the training images, the embeddings' scale, and what raw pixels are worth."""
    raw = evaluate_encoder(nn.Flatten(), setting.splits, labels=100)
    features, _ = extract_features(fit.model, setting.splits.train)
    found = {
        "raw_knn": raw["knn"],
        "raw_linear_probe": raw["linear_probe"],
        "rankme_features": _rankme(features),
    }
    for method in fit.methods:
        if isinstance(method, LeJEPA):
            embeddings, _ = extract_features(method.projector, features)
            found |= {
                "rankme_embeddings": _rankme(embeddings),
                "embedding_std": float(embeddings.std(0).mean()),
            }
    return found


def _rankme(embeddings: Tensor) -> float:
    return float(effective_rank(gram_singular_values(embeddings), eps=1e-7))


CLAIM = Claim(
    statement="On 1,200 digits without labels, an encoder trained with SIGReg (weight 0.05) serves 5-nearest-neighbour classification "
    "with 100 labels better on test images than the same encoder trained on invariance alone (weight 0), which may collapse.",
    metric="knn",
    baseline="invariance only",
    method="lejepa",
    task=digits_encoder_task(Budget(steps=400)),
    arms=(
        Arm("invariance only", lambda setting: [LeJEPA(weight=0.0, num_slices=64)]),
        Arm("lejepa", lambda setting: [LeJEPA(weight=0.05, num_slices=64)]),
        Arm("untrained"),
    ),
    measure=_measure,
)
