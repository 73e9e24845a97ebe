"""What self-supervised methods on skeletons share: two augmented views, an encoder that learns, and one that follows it slowly."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import View, shear, temporal_crop
from coloss.errors import InputError
from coloss.nn import ModuleEMA
from coloss.train import State, ViewMethod

if TYPE_CHECKING:
    from coloss.data.skeleton_views import Clips


def crop_and_shear(
    clips: "Clips",
    views: int = 2,
    generator: torch.Generator | None = None,
    *,
    padding: float = 1 / 6,
    amplitude: float = 0.5,
) -> Float[Tensor, "views clips channels frames joints *persons"]:
    """Random views of clips: a window at random in the clip continued by its mirror image in time, then a shear of space.

    One draw for each clip and view, batched.

    Args:
        clips: (clips, 3, frames, joints) or that with persons.
        views: of each clip, >= 1.
        generator: decides every choice.
        padding: share of the frames that the clip is continued by at each end, in [0, 1).
        amplitude: of the shear, >= 0.

    Returns:
        (views, clips, ...).

    Raises:
        ValueError: for a value out of range, or other than 3 channels.

    Examples:
        >>> crop_and_shear(torch.rand(5, 3, 12, 4), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 5, 3, 12, 4])
    """
    if views < 1:
        raise ValueError(f"views must be >= 1, got {views}")
    if not 0 <= padding < 1:
        raise ValueError(f"padding must be in [0, 1), got {padding}")
    repeated = clips.repeat(views, *[1] * (clips.ndim - 1))
    cropped = temporal_crop(repeated, int(padding * clips.shape[2]), generator)
    return shear(cropped, amplitude, generator).unflatten(0, (views, len(clips)))


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
