"""What self-supervised methods on skeletons share: two augmented views, an encoder that learns, and one that follows it slowly."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from coloss.data import View, crop_and_shear
from coloss.errors import InputError
from coloss.nn import ModuleEMA
from coloss.train import State, ViewMethod


class MomentumViewMethod(ViewMethod):
    """Base of methods in which an encoder and its projector learn from a copy of both that follows as a moving average.

    The copy follows after each optimizer step. Like the encoder in training it normalises by the batch that it sees (and drops out, where
    the encoder does): on running statistics its embeddings lie apart from the encoder's. It belongs to the method, and the model ships
    without it. For training without labels alone: with an objective the run is refused.

    Args:
        momentum: share of the copy that stays in a step, in [0, 1].
        views: as for `ViewMethod`.
        projector, view, in_features: as for `ViewMethod`; the default views are those of `crop_and_shear`.

    Attributes:
        target: the copy, a `ModuleEMA` of model and projector, from `setup` on.

    Raises:
        InputError: for a value out of range; in a run, beside an objective.
    """

    def __init__(
        self,
        *,
        momentum: float,
        views: int,
        projector: Sequence[int],
        view: View | None = None,
        in_features: int | None = None,
    ) -> None:
        if not 0 <= momentum <= 1:
            raise InputError(f"momentum must be in [0, 1], got {momentum}")
        chosen = view if view is not None else partial(crop_and_shear, views=views)
        super().__init__(views=views, projector=projector, view=chosen, in_features=in_features)
        self.momentum = momentum

    def setup(self, state: State) -> None:
        if state.objective is not None:
            raise InputError(
                f"{type(self).__name__} trains an encoder without labels: leave the objective out"
            )
        super().setup(state)
        self.target = ModuleEMA(nn.ModuleList([state.model, self.projector]), self.momentum)

    @torch.no_grad()
    def target_embeddings(self, inputs: Tensor) -> Tensor:
        """What the slow copy makes of inputs; without a graph."""
        copies = self.target.module
        encoder, projector = copies.children()
        copies.train()
        try:
            return projector(encoder(inputs))
        finally:
            copies.eval()

    def on_step(self, state: State) -> None:
        self.target.update()
