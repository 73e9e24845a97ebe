"""Trains an encoder without labels by three plain moments of its embeddings: agree, keep a spread in each dimension, do not repeat.

VICReg: Bardes, Ponce, LeCun, 2022, ICLR, arXiv 2105.04906. It is what other regularisers of this family are measured against. With z[v, n]
in R^D the projected embedding of view v of sample n, N samples over all processes:

    invariance = mean over pairs of views, n, d of (z[u, n, d] - z[v, n, d])^2
    variance   = mean over v, d of relu(1 - sqrt(Var_n z[v, n, d] + 1e-4))                    unbiased variance
    covariance = 2 * mean over v of ( sum over i != j of C_v[i, j]^2 ) / D                    C_v: covariance of view v, over N - 1
    loss       = 25 invariance + 25 variance + 1 covariance

The factors are those of the authors' code with two views: variance averaged over the views, covariance summed. Other libraries sum the
variance as well, which doubles its weight. More than two views are averaged over, so weights carry over.

When it helps: where SIGReg does, with moments in place of whole distributions: cheaper, and three weights in place of one. When not: small
batches, whose variance is noise.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.data import View
from coloss.errors import InputError
from coloss.ops import full_precision, gather_with_gradient
from coloss.train.schedules import Schedule
from coloss.train.state import State
from coloss.train.view_method import ViewMethod


def vicreg_terms(
    views: Float[Tensor, "views samples dim"], *, eps: float = 1e-4, across_processes: bool = True
) -> dict[str, Tensor]:
    """The three unweighted terms of VICReg.

    Args:
        views: embeddings of V >= 2 views of N >= 2 samples.
        eps: added to each variance under the root, > 0.
        across_processes: take the moments over the rows of all processes.

    Returns:
        `invariance`, `variance` and `covariance`, scalars >= 0 of at least float32.

    Raises:
        ValueError: for fewer than 2 views or samples, or eps <= 0.

    Cost:
        O(V N D^2) time, O(D^2) memory beside the rows of all processes.

    Source:
        Bardes et al., 2022, arXiv 2105.04906, equations 1 to 6.

    Examples:
        >>> z = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[1.0, 0.0], [-1.0, 0.0]]])
        >>> {name: round(value.item(), 3) for name, value in vicreg_terms(z).items()}
        {'invariance': 0.5, 'variance': 0.248, 'covariance': 4.0}
    """
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    rows = full_precision(views).transpose(0, 1)
    rows = gather_with_gradient(rows.contiguous()) if across_processes else rows
    samples, count, dim = rows.shape
    if samples < 2 or count < 2:
        raise ValueError(f"views must hold at least 2 views of 2 samples, got {count} of {samples}")
    # The mean of (a - b)^2 over pairs is twice the unbiased variance over views.
    invariance = 2 * rows.var(1).mean()
    centred = rows - rows.mean(0)
    spread = (centred.square().sum(0) / (samples - 1) + eps).sqrt()
    variance = (1 - spread).relu().mean()
    covariances = torch.einsum("nvi,nvj->vij", centred, centred) / (samples - 1)
    off_diagonal = covariances.square().sum() - covariances.diagonal(dim1=1, dim2=2).square().sum()
    return {
        "invariance": invariance,
        "variance": variance,
        "covariance": 2 * off_diagonal.clamp(min=0) / (count * dim),
    }


class VICReg(ViewMethod):
    """Self-supervised training on views by variance, invariance and covariance; see `ViewMethod` for how views are made.

    Args:
        invariance, variance, covariance: weights of the terms, numbers >= 0 or schedules of progress.
        views: V >= 2, from `default_views`.
        projector: widths of its hidden layers and, last, of the embeddings.
        view, tap, in_features: as for `ViewMethod`.

    Raises:
        InputError: for a value out of range, features that are no vectors, or views that do not fit.

    Cost:
        V forward and backward passes of the encoder for each sample, and O(V N D^2) for embeddings of length D.

    Source:
        Bardes et al., 2022, arXiv 2105.04906.

    Examples:
        >>> import coloss
        >>> from coloss.nn import MLP
        >>> images = torch.rand(64, 1, 8, 8)
        >>> run = coloss.fit(MLP(64, [32]), (images,), methods=[VICReg()], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms)
        ['covariance', 'invariance', 'variance']
    """

    def __init__(
        self,
        *,
        invariance: Schedule = 25.0,
        variance: Schedule = 25.0,
        covariance: Schedule = 1.0,
        views: int = 2,
        projector: Sequence[int] = (128, 64),
        view: View | None = None,
        tap: str | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(views=views, projector=projector, view=view, tap=tap, in_features=in_features)
        if views < 2:
            raise InputError(f"views must be >= 2, got {views}")
        weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        for name, weight in weights.items():
            if not callable(weight) and not weight >= 0:
                raise InputError(f"{name} must be >= 0, or a schedule, got {weight}")
        self.term_weights = weights

    def check_views(self, views: Tensor) -> None:
        if len(views) < 2:
            raise InputError(f"view must give at least 2 views, got {len(views)}")

    def view_terms(self, embeddings: Float[Tensor, "views samples dim"], state: State) -> dict[str, Tensor]:
        return vicreg_terms(embeddings)
