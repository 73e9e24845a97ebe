"""What self-supervised methods on views share: views of a batch, one forward pass over all of them, a projector, embeddings."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data.dataset import IndexedDataset
from coloss.data.stacking import View, default_views, repeated, stacked_views
from coloss.errors import InputError
from coloss.metrics import (
    alignment,
    extract_features,
    feature_standard_deviation,
    lidar,
    rankme,
    uniformity,
)
from coloss.nn.projector import projection_head
from coloss.train.feature_source import FeatureSource, second_look
from coloss.train.method import Method
from coloss.train.state import State

# Samples that the meters of embeddings look at, how many of them in views, and in how many.
_METERED, _VIEWED, _VIEWS = 4096, 256, 10


class ViewMethod(Method):
    """Base of methods that compare random views of each sample; a subclass says in `view_terms` what is made of their embeddings.

    Without an objective the batch becomes all views of its samples, V times as many rows, in one forward pass (targets and ids are
    repeated). With an objective the batch stays, and the views take a second forward pass of their own, which leaves no trace in
    outputs, tapped features or batch-norm statistics. A second method of this kind in a run without objective takes the views that
    the first one made. The projector belongs to the method, so the model ships as it was built. Other methods find the embeddings
    (rows, D), view by view, in `state.batch.extras["embeddings"]` and V in `["embedding_views"]`, where several methods write, of the last.

    Args:
        views: V, views of each sample from `default_views`, >= 1.
        projector: widths of its hidden layers and, last, of the embeddings.
        view: in place of the default views: `view(inputs, generator=...)` gives (V, N, ...), or a list of V tensors of one shape (see
            `coloss.data.MultiView`). `views` is then left unused.
        tap: module path of the features (with ":input" for what goes in); None: the model's output, or beside an objective the
            input of its classifier.
        in_features: length of a feature vector, where the module does not declare it.

    Attributes:
        projector: from `setup` on.

    Raises:
        InputError: for a value out of range; in a run, for features that are no vectors, or views that do not fit.

    Cost:
        V forward and backward passes of the encoder for each sample.

    Examples:
        >>> import coloss, torch
        >>> from coloss.nn import MLP
        >>> class Agreement(ViewMethod):
        ...     def view_terms(self, embeddings, state):
        ...         return {"disagreement": (embeddings[0] - embeddings[1]).square().mean()}
        >>> images = torch.rand(64, 1, 8, 8)
        >>> run = coloss.fit(MLP(64, [32]), (images,), methods=[Agreement()], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms), run.model(images).shape
        (['disagreement'], torch.Size([64, 32]))
    """

    batch_statistic = True

    def __init__(
        self,
        *,
        views: int = 2,
        projector: Sequence[int] = (128, 64),
        view: View | None = None,
        tap: str | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        if views < 1:
            raise InputError(f"views must be >= 1, got {views}")
        if not projector or min(projector) < 1:
            raise InputError(f"projector must hold widths >= 1, at least one, got {list(projector)}")
        self.view = view if view is not None else partial(default_views, views=views)
        self.widths, self.in_features = tuple(projector), in_features
        self.source = FeatureSource(tap)
        self._count = 0

    def view_terms(self, embeddings: Float[Tensor, "views samples ..."], state: State) -> dict[str, Tensor]:
        """The named scalar loss terms of the projected embeddings of V views of N samples."""
        raise TypeError(f"{type(self).__name__} must define view_terms(embeddings, state)")

    def new_projector(self, in_features: int) -> nn.Module:
        """The network between features and loss; gives embeddings with samples in the first dimension."""
        return projection_head(in_features, self.widths)

    def setup(self, state: State) -> None:
        self.source.setup(state)
        width = self.source.required_width(state, self.in_features)
        self.projector = state.like_model(self.new_projector(width))

    def on_batch(self, state: State) -> None:
        if state.objective is not None:
            return
        batch = state.batch
        if "views" in batch.extras:
            self._count = batch.extras["views"]
            return
        views = self._views(state)
        state.batch = replace(
            batch,
            inputs=views.flatten(0, 1),
            targets=repeated(batch.targets, len(views)),
            ids=repeated(batch.ids, len(views)),
            extras={**batch.extras, "views": len(views)},
        )

    def terms(self, state: State) -> dict[str, Tensor]:
        if state.objective is None:
            features = self.source.read(state)
        else:
            with second_look(state):
                state.outputs = state.model(self._views(state).flatten(0, 1))
                features = self.source.read(state)
        if len(features) % self._count:
            raise InputError(
                f"the model must give one feature vector for each row, got {len(features)} for {self._count} views"
            )
        embeddings = self.projector(features)
        left = {"embeddings": embeddings.detach().flatten(1), "embedding_views": self._count}
        state.batch = replace(state.batch, extras={**state.batch.extras, **left})
        return self.view_terms(embeddings.unflatten(0, (self._count, -1)), state)

    @torch.no_grad()
    def report(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Meters of the projected embeddings, to choose among runs of one method without labels.

        Args:
            model: the trained model.
            data: the training data. At most 4,096 samples are embedded as they are, in eval mode, and 10 random views of 256 of them.

        Returns:
            `embedding_rankme`, `embedding_std` (`feature_standard_deviation`), `embedding_uniformity` and `embedding_scale` (root mean
            square distance to the mean) of the samples; `embedding_lidar` and `embedding_alignment` of the views. NaN for embeddings that
            are not finite; nothing for data that are no `IndexedDataset` of single tensors.
        """
        if not isinstance(data, IndexedDataset) or not isinstance(data.inputs, Tensor):
            return {}
        generator = torch.Generator().manual_seed(0)
        inputs = data.inputs[torch.randperm(len(data), generator=generator)[:_METERED]]
        rows = self._embedded(model, inputs)
        views: list[Tensor] = []
        while len(views) < _VIEWS:
            views.extend(stacked_views(self.view, inputs[:_VIEWED], generator))
        seen = self._embedded(model, torch.cat(views[:_VIEWS])).unflatten(0, (_VIEWS, -1))
        names = ("rankme", "std", "uniformity", "scale", "lidar", "alignment")
        if len(rows) < 2 or not bool(rows.isfinite().all() and seen.isfinite().all()):
            return {f"embedding_{name}": math.nan for name in names}
        values = (
            rankme(rows),
            feature_standard_deviation(rows),
            uniformity(rows),
            rows.double().var(0, correction=0).sum().sqrt(),
            lidar(seen.transpose(0, 1)),
            alignment(seen[0], seen[1]),
        )
        return {f"embedding_{name}": float(value) for name, value in zip(names, values)}

    def _embedded(self, model: nn.Module, inputs: Tensor) -> Tensor:
        features = extract_features(model, inputs, self.source.place).features
        return extract_features(self.projector, features).features

    def sample_ids(self, state: State) -> Int[Tensor, " samples"] | None:
        """Ids of the samples that the views of this step were made of; None where the data give none."""
        ids = state.batch.ids
        return ids if ids is None or state.objective is not None else ids[: len(ids) // self._count]

    def check_views(self, views: Tensor) -> None:
        """Refuse stacked views that the method cannot use; a subclass says which."""

    def _views(self, state: State) -> Tensor:
        views = stacked_views(self.view, state.batch.inputs, state.local_generator)
        self.check_views(views)
        self._count = len(views)
        return views
