"""Training views of clips: a random stretch of each, brought back to its number of frames, and seen from a little aside."""

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.data import rotate_joints
from coloss.train.method import Method
from coloss.train.state import State


def random_stretches(
    clips: Float[Tensor, "clips channels frames joints *persons"],
    shortest: float = 0.5,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "clips channels frames joints *persons"]:
    """A random stretch of each clip, interpolated to the frames that the clip has.

    Args:
        clips: positions, or anything else that may be interpolated in time.
        shortest: least share of a clip, in (0, 1]; the share is drawn evenly up to 1, and so is where it begins.
        generator: draws on its own device.

    Raises:
        ValueError: for a share out of range.

    Examples:
        >>> clip = torch.arange(9.0).view(1, 1, 9, 1)
        >>> found = random_stretches(clip, 0.5, torch.Generator().manual_seed(0)).flatten()
        >>> bool((found.diff() > 0.4).all()), len(found)
        (True, 9)
    """
    if not 0 < shortest <= 1:
        raise ValueError(f"shortest must be in (0, 1], got {shortest}")
    count, frames = len(clips), clips.shape[2]
    device = torch.device("cpu") if generator is None else generator.device
    draws = torch.rand(count, 2, generator=generator, device=device).to(clips.device)
    share = shortest + (1 - shortest) * draws[:, 0]
    last = frames - 1
    begin = last * (1 - share) * draws[:, 1]
    at = begin[:, None] + share[:, None] * torch.arange(frames, device=clips.device)
    below = at.floor().long().clamp(0, max(last - 1, 0))
    above = (below + 1).clamp_max(last)
    rest = [1] * (clips.ndim - 3)
    mix = (at - below).to(clips.dtype).view(count, 1, frames, *rest)

    def taken(frame: Tensor) -> Tensor:
        return clips.gather(2, frame.view(count, 1, frames, *rest).expand_as(clips))

    lower = taken(below)
    return lower + mix * (taken(above) - lower)


class ClipCrops(Method):
    """Shows a recogniser another stretch of every clip at each step, turned a little about each axis.

    Args:
        shortest: least share of a clip, in (0, 1]; 1 leaves clips whole.
        degrees: largest angle about each axis, >= 0; 17 are 0.3 radians.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> import coloss
        >>> from torch import nn
        >>> data = (torch.randn(8, 3, 6, 4), torch.randint(2, (8,)))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(72, 2))
        >>> run = coloss.fit(
        ...     model,
        ...     data,
        ...     nn.functional.cross_entropy,
        ...     [ClipCrops()],
        ...     budget=coloss.Budget(steps=2),
        ... )
        >>> run.steps
        2
    """

    def __init__(self, shortest: float = 0.5, degrees: float = 17.0) -> None:
        super().__init__()
        if not 0 < shortest <= 1:
            raise ValueError(f"shortest must be in (0, 1], got {shortest}")
        if not degrees >= 0:
            raise ValueError(f"degrees must be >= 0, got {degrees}")
        self.shortest, self.degrees = shortest, degrees

    def on_batch(self, state: State) -> None:
        clips = random_stretches(state.batch.inputs, self.shortest, state.local_generator)
        state.batch.inputs = rotate_joints(clips, self.degrees, generator=state.local_generator)
