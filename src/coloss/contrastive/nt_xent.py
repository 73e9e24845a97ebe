"""The plain contrastive loss on views that every other of this family is measured against: NT-Xent, and SupCon where labels are used."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from coloss.data import View
from coloss.errors import InputError
from coloss.ops import full_precision, rank, supervised_contrastive_loss
from coloss.train import Schedule, State, ViewMethod, value_at


def nt_xent_loss(
    views: Float[Tensor, "views samples dim"],
    temperature: float | Float[Tensor, "*temperatures"] = 0.5,
    *,
    ids: Shaped[Tensor, " samples"] | None = None,
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
        chunk_size, across_processes: as for `coloss.ops.supervised_contrastive_loss`.

    Returns:
        A scalar, at least float32; 0 for no samples. It can be differentiated once.

    Raises:
        ValueError: if there are fewer than two views, or ids of another length; for a value out of range.

    Cost:
        $O(V^2 N^2 D)$ time; memory of the embeddings, their gradient and two tiles.

    Source:
        Chen et al. 2020 (SimCLR), arXiv 2002.05709, equation 1; Khosla et al. 2020 (SupCon), arXiv 2004.11362, for ids.

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
    return supervised_contrastive_loss(
        rows,
        ids.repeat(len(views)),
        temperature,
        chunk_size=chunk_size,
        across_processes=across_processes,
    )


class NTXent(ViewMethod):
    """Self-supervised training by NT-Xent on views (SimCLR), or by SupCon where it may see the labels.

    Adds the term `nt_xent`; see `ViewMethod` for how views are made and what happens beside an objective.

    Args:
        temperature: tau > 0, or a schedule of progress.
        labels: take the other samples of a class for positives too (SupCon); the batch must have class targets.
        scale_by_temperature: multiply the loss by tau, so that tau does not change the size of gradients: for fair sweeps.
        weight: of the term: a number >= 0, or a schedule.
        views, projector, view, tap, in_features: as for `ViewMethod`.

    Raises:
        InputError: for a value out of range; in a run, if there are no class targets for `labels`.

    Source:
        Chen et al. 2020, arXiv 2002.05709; Khosla et al. 2020, arXiv 2004.11362.

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
        if not callable(weight) and not 0 <= weight < math.inf:
            raise InputError(f"weight must be >= 0 and finite, or a schedule, got {weight}")
        if view is None and views < 2:
            raise InputError(f"views must be >= 2, got {views}")
        self.temperature, self.labels = temperature, labels
        self.scale_by_temperature = scale_by_temperature
        self.term_weights = {"nt_xent": weight}

    def check_views(self, views: Tensor) -> None:
        if len(views) < 2:
            raise InputError(f"view must give at least two views, got {len(views)}")

    def view_terms(self, embeddings: Float[Tensor, "views samples dim"], state: State) -> dict[str, Tensor]:
        temperature = value_at(self.temperature, state.progress)
        loss = nt_xent_loss(embeddings, temperature, ids=self._ids(embeddings, state))
        return {"nt_xent": loss * temperature if self.scale_by_temperature else loss}

    def _ids(self, embeddings: Tensor, state: State) -> Tensor | None:
        """What tells samples apart: their classes or their ids."""
        samples = embeddings.shape[1]
        if not self.labels:
            return None
        targets = state.batch.targets
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            raise InputError("labels=True needs one class index for each sample as targets")
        return targets[:samples]
