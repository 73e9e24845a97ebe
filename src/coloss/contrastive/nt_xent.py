"""The plain contrastive loss on views that every other of this family is measured against: NT-Xent, and SupCon where labels are used.

Both also in their hard form, against the most similar negatives alone (see `coloss.contrastive.temperature` for when that is of use).
"""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from coloss.data import View
from coloss.errors import InputError
from coloss.metrics import uniformity
from coloss.ops import (
    all_reduce_mean,
    full_precision,
    hard_supervised_contrastive_loss,
    rank,
    supervised_contrastive_loss,
    world_size,
)
from coloss.train import Schedule, State, ViewMethod, value_at

# Uniformity above which embeddings count as one point (0), and steps between looks.
_COLLAPSED = -0.2
_LOOK_EVERY = 20


def nt_xent_loss(
    views: Float[Tensor, "views samples dim"],
    temperature: float | Float[Tensor, "*temperatures"] = 0.5,
    *,
    ids: Shaped[Tensor, " samples"] | None = None,
    hard: int | None = None,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""Softmax cost of finding, for each view, the other views of its sample among all other rows.

    Cosine similarities; each of the $VN$ rows is an anchor once, itself left out of its candidates. With several positives (more than two
    views, or equal ids) their costs are averaged.

    Args:
        views: embeddings of V >= 2 views of N samples, of any length.
        temperature: $\tau > 0$: a number, or a scalar tensor that may be learned.
        ids: of samples: rows of equal id (labels, duplicates) are positives of each other. None: all samples differ.
        hard: negatives >= 1 that each row keeps, the most similar ones; None keeps all. The row itself, its other views and rows of
            equal id are never among them.
        chunk_size, across_processes: as for `coloss.ops.supervised_contrastive_loss`.

    Returns:
        A scalar, at least float32; 0 for no samples. It can be differentiated once.

    Raises:
        ValueError: if there are fewer than two views, or ids of another length; for a value out of range.

    Cost:
        $O(V^2 N^2 D)$ time; memory of the embeddings, their gradient and two tiles, with `hard` of $2 V N$ `hard` numbers more.

    Source:
        Chen et al. 2020 (SimCLR), arXiv 2002.05709, equation 1; Khosla et al. 2020 (SupCon), arXiv 2004.11362, for ids; Wang and Liu
        2021, arXiv 2012.09740, section 3.4, for `hard`.

    Examples:
        >>> round(nt_xent_loss(torch.eye(2).repeat(2, 1, 1), temperature=1.0).item(), 4)  # log(e + 2) - 1
        0.5514
    """
    if len(views) < 2:
        raise ValueError(f"views must hold at least two views of each sample, got {len(views)}")
    if ids is not None and ids.shape != views.shape[1:2]:
        raise ValueError(f"ids must have shape ({views.shape[1]},), got {tuple(ids.shape)}")
    if ids is None:
        # Samples of other processes are others.
        ids = torch.arange(views.shape[1], device=views.device) + (rank() << 40)
    rows = F.normalize(full_precision(views).flatten(0, 1), dim=1)
    labels = ids.repeat(len(views))
    if hard is not None:
        return hard_supervised_contrastive_loss(
            rows, labels, hard, temperature, chunk_size=chunk_size, across_processes=across_processes
        )
    return supervised_contrastive_loss(
        rows, labels, temperature, chunk_size=chunk_size, across_processes=across_processes
    )


class NTXent(ViewMethod):
    """Self-supervised training by NT-Xent on views (SimCLR), or by SupCon where it may see the labels.

    Adds the term `nt_xent`; see `ViewMethod` for how views are made and what happens beside an objective.

    With `hard_share` below 1 each row is held against its most similar negatives only (hard contrastive loss). Where these are more
    similar than the other views of its sample, as at a random start or with strong views, that loss falls when all embeddings draw
    together, and training ends in one point. Three things stand against it: all negatives are kept for `hard_warmup` of the run (or as
    the given schedule says); with `hard_safeguard` they are kept in every step in which drawing together would pay, which is where the
    derivative of the hard loss by its temperature is below 0; and a warning is given, once, if the uniformity of the batch, looked at
    every 20 steps, is above -0.2 (0 is one point). `hard_steps` in the run's history is the share of steps that used the hard loss.

    Args:
        temperature: tau > 0, or a schedule of progress.
        labels: take the other samples of a class for positives too (SupCon); the batch must have class targets.
        hard_share: share of the rows of other samples, in (0, 1], that a row is held against; rounded up, and counted over all
            processes. A schedule of progress, such as `coloss.train.linear(1.0, 0.1)`, is followed as it is, without `hard_warmup`.
        hard_warmup: share of the training, in [0, 1), that keeps all negatives first.
        hard_safeguard: see above; costs one more backward pass of the loss, not of the encoder.
        scale_by_temperature: multiply the loss by tau, so that tau does not change the size of gradients: for fair sweeps.
        weight: of the term: a number >= 0, or a schedule.
        views, projector, view, tap, in_features: as for `ViewMethod`.

    Raises:
        InputError: for a value out of range; in a run, if there are no class targets for `labels`, or a schedule leaves its range.
        UserWarning: if embeddings collapse under the hard loss.

    Source:
        Chen et al. 2020, arXiv 2002.05709; Khosla et al. 2020, arXiv 2004.11362; Wang and Liu 2021, arXiv 2012.09740. The
        length of the warm-up and the safeguard are this project's.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> images = torch.rand(64, 1, 8, 8)
        >>> run = coloss.fit(MLP(64, [32]), (images,), methods=[NTXent()], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms)
        ['nt_xent']
    """

    def __init__(
        self,
        *,
        temperature: Schedule = 0.5,
        labels: bool = False,
        hard_share: Schedule = 1.0,
        hard_warmup: float = 0.3,
        hard_safeguard: bool = True,
        scale_by_temperature: bool = False,
        weight: Schedule = 1.0,
        views: int = 2,
        projector: Sequence[int] = (128, 64),
        view: View | None = None,
        tap: str | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(views=views, projector=projector, view=view, tap=tap, in_features=in_features)
        if not callable(temperature) and not 0 < temperature < math.inf:
            raise InputError(f"temperature must be > 0 and finite, or a schedule, got {temperature}")
        if not callable(hard_share) and not 0 < hard_share <= 1:
            raise InputError(f"hard_share must be in (0, 1], or a schedule, got {hard_share}")
        if not 0 <= hard_warmup < 1:
            raise InputError(f"hard_warmup must be in [0, 1), got {hard_warmup}")
        if not callable(weight) and not 0 <= weight < math.inf:
            raise InputError(f"weight must be >= 0 and finite, or a schedule, got {weight}")
        if view is None and views < 2:
            raise InputError(f"views must be >= 2, got {views}")
        self.temperature, self.labels = temperature, labels
        self.hard_share, self.hard_warmup, self.hard_safeguard = hard_share, hard_warmup, hard_safeguard
        self.scale_by_temperature = scale_by_temperature
        self._warned = False
        self.term_weights = {"nt_xent": weight}

    def check_views(self, views: Tensor) -> None:
        if len(views) < 2:
            raise InputError(f"view must give at least two views, got {len(views)}")

    def view_terms(self, embeddings: Float[Tensor, "views samples dim"], state: State) -> dict[str, Tensor]:
        temperature = value_at(self.temperature, state.progress)
        ids = self._ids(embeddings, state)
        loss, hard = None, self._hard(embeddings, state)
        if hard is not None:
            loss = self._hard_loss(embeddings, temperature, ids, hard)
        if self.hard_share != 1:
            state.log({"hard_steps": float(loss is not None)})
        if loss is None:
            loss = nt_xent_loss(embeddings, temperature, ids=ids)
        return {"nt_xent": loss * temperature if self.scale_by_temperature else loss}

    def _hard_loss(
        self, embeddings: Tensor, temperature: float, ids: Tensor | None, hard: int
    ) -> Tensor | None:
        """The hard loss; None where the safeguard finds that it would fall if all embeddings drew together."""
        if not self.hard_safeguard:
            return nt_xent_loss(embeddings, temperature, ids=ids, hard=hard)
        # To bring all similarities nearer to 1 by a factor is to raise the temperature by it.
        heat = full_precision(embeddings[0, :0]).new_tensor(temperature).requires_grad_()
        loss = nt_xent_loss(embeddings, heat, ids=ids, hard=hard)
        (slope,) = torch.autograd.grad(loss, heat, retain_graph=True)
        return None if all_reduce_mean(slope) < 0 else loss

    def _hard(self, embeddings: Tensor, state: State) -> int | None:
        """Negatives that each row keeps at this step; None for all."""
        progress = state.progress
        share = value_at(self.hard_share, progress)
        if not 0 < share <= 1:
            raise InputError(f"hard_share must stay in (0, 1], got {share} at progress {progress:.3g}")
        if share == 1 or (not callable(self.hard_share) and progress < self.hard_warmup):
            return None
        if state.step % _LOOK_EVERY == 0 and not self._warned:
            self._look(embeddings[0].detach(), state.step)
        views, samples = embeddings.shape[:2]
        everywhere = all_reduce_mean(torch.tensor(float(samples), device=embeddings.device)) * world_size()
        return max(1, math.ceil(share * views * (round(everywhere.item()) - 1) - 1e-9))

    def _look(self, rows: Tensor, step: int) -> None:
        """Warn where the rows are close to one point."""
        if len(rows) < 2 or not bool(rows.isfinite().all()):
            return
        value = float(uniformity(rows))
        if value > _COLLAPSED:
            self._warned = True
            message = f"embeddings collapse under the hard loss: uniformity {value:.2g} at step {step}, 0 is one point"
            warnings.warn(
                f"{message}; keep hard_safeguard, or raise hard_share or hard_warmup",
                UserWarning,
                stacklevel=2,
            )

    def _ids(self, embeddings: Tensor, state: State) -> Tensor | None:
        """What tells samples apart: their classes, or their ids where the data give any, so that no sample is its own negative."""
        samples = embeddings.shape[1]
        if not self.labels:
            return self.sample_ids(state)
        targets = state.batch.targets
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            raise InputError("labels=True needs one class index for each sample as targets")
        return targets[:samples]
