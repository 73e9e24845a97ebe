"""Repetitions told by other means than the signal that a counter watches, so that counters can be checked: contacts of a foot, swings of a hand."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.motion.repetition_counter import SwingCounter


def foot_on_ground(
    ankle: Float[Tensor, "frames 3"],
    toe: Float[Tensor, "frames 3"],
    fps: float,
    *,
    up: int = 1,
    length: float = 1.0,
) -> Bool[Tensor, " frames"]:
    """Frames in which a foot stands: it is low and hardly moves along the ground.

    Low: ankle or toe within 0.05 lengths of its own lowest place (1% quantile). Hardly: the lower of the two is slower than 0.6 lengths a
    second, or than a third of its fastest (95% quantile), whichever is more.

    Args:
        ankle: positions.
        toe: likewise.
        fps: frames per second.
        up: the vertical axis.
        length: what a metre is in these units.

    Examples:
        >>> still = torch.zeros(5, 3)
        >>> foot_on_ground(still, still, 15).tolist()
        [True, True, True, True, True]
    """
    flat = [axis for axis in range(3) if axis != up]
    found = torch.zeros(len(ankle), dtype=torch.bool)
    for points in (ankle, toe):
        height = points[:, up]
        low = height < height.nanquantile(0.01) + 0.05 * length
        moved = torch.diff(points[:, flat], dim=0).norm(dim=-1) * fps
        speed = torch.cat([moved, moved[-1:]]) if len(moved) else torch.zeros(len(points))
        found |= low & (speed < max(0.6 * length, speed.nanquantile(0.95).item() / 3))
    return found


def count_strides(
    ankle: Float[Tensor, "frames 3"],
    toe: Float[Tensor, "frames 3"],
    fps: float,
    *,
    up: int = 1,
    length: float = 1.0,
) -> int:
    """Times a foot leaves the ground and comes down again: strides, each of two steps.

    A gap of one frame in a contact, or a contact of one frame, is taken for noise.

    Args:
        ankle: positions of one foot's ankle.
        toe: of its toe.
        fps: frames per second.
        up: the vertical axis.
        length: what a metre is in these units.

    Examples:
        >>> lifted = torch.tensor([0.0, 0, 0, 0.3, 0.4, 0.3, 0, 0, 0])
        >>> foot = torch.stack([lifted, lifted, lifted], 1)  # forward while it is up
        >>> count_strides(foot, foot, 15)
        1
    """
    contact = foot_on_ground(ankle, toe, fps, up=up, length=length).numpy().copy()
    for value in (False, True):
        for frame in range(1, len(contact) - 1):
            if contact[frame] == value and contact[frame - 1] != value and contact[frame + 1] != value:
                contact[frame] = not value
    rises = np.flatnonzero(np.diff(contact.astype(np.int8)) == 1)
    return int(len(rises) - (not contact[: rises[0] + 1].any() and not contact[0])) if len(rises) else 0


def count_swings(hand: Float[Tensor, "frames 3"], least: float = 0.08) -> int:
    """Times a hand goes to and fro along the line on which it moves most.

    The line is the first principal axis of its positions in the frames in which it is above the middle of its heights; ways along it count
    that are longer than `least` there and back.

    Args:
        hand: positions, y up, relative to a part of the body that keeps still (the shoulders).
        least: of a swing, in the unit of the positions.

    Examples:
        >>> times = torch.linspace(0, 3, 46)
        >>> across = -0.2 * torch.cos(2 * torch.pi * times)
        >>> hand = torch.stack([across, torch.zeros(46), torch.zeros(46)], 1)
        >>> count_swings(hand)
        3
    """
    raised = hand[:, 1] >= (hand[:, 1].min() + hand[:, 1].max()) / 2
    centred = hand - hand[raised].mean(0)
    axis = torch.linalg.svd(centred[raised], full_matrices=False)[2][0]
    signal = (centred @ axis)[raised]
    counter = SwingCounter(least)
    for value in signal.tolist():
        counter.update(value)
    return counter.count
