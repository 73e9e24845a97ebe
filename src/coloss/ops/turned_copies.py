"""Several known versions of each sample (an image turned by quarters), and classes that say both what a sample is and which version.

The versions of one sample stand beside each other: sample i in version j is row `i * M + j` of M versions. The joint class of class y in
version j is `y * M + j`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from .precision import full_precision

Transformation = Callable[[Tensor], Tensor]


def rotate4(images: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "copies channels side side"]:
    """Each image turned by 0, 90, 180 and 270 degrees counter-clockwise, the four beside each other.

    Args:
        images: square.

    Returns:
        4 * batch images; rows 0, 4, 8 ... are the images as they were.

    Raises:
        ValueError: if the images are not square.

    Examples:
        >>> copies = rotate4(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
        >>> copies[1].tolist(), copies[2].tolist()
        ([[[2.0, 4.0], [1.0, 3.0]]], [[[4.0, 3.0], [2.0, 1.0]]])
    """
    return transform_copies(images, [_same, *quarter_turns()])


def quarter_turns() -> tuple[Transformation, Transformation, Transformation]:
    """The three functions that turn a batch of square images by 90, 180 and 270 degrees.

    Examples:
        >>> quarter, half, _ = quarter_turns()
        >>> image = torch.rand(1, 3, 8, 8)
        >>> torch.equal(half(image), quarter(quarter(image)))
        True
    """
    one, two, three = (partial(_turned, turns=turns) for turns in (1, 2, 3))
    return one, two, three


def transform_copies(
    inputs: Float[Tensor, "batch *shape"], transformations: Sequence[Transformation]
) -> Float[Tensor, "copies *shape"]:
    """Each sample under each of several transformations, those of a sample beside each other.

    Args:
        inputs: samples in the first dimension.
        transformations: functions of a batch that keep its shape, such as `lambda series: series.flip(-1)`; at least one.

    Returns:
        batch * M samples for M transformations.

    Raises:
        ValueError: if there is no transformation, or one changes the shape.

    Examples:
        >>> series = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> transform_copies(series, [lambda x: x, lambda x: x.flip(-1)]).tolist()
        [[[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]]]
    """
    if not transformations:
        raise ValueError("transformations must hold at least one function, got none")
    copies = [transformation(inputs) for transformation in transformations]
    for number, copy in enumerate(copies):
        if copy.shape != inputs.shape:
            raise ValueError(
                f"transformations must keep the shape {tuple(inputs.shape)}, got {tuple(copy.shape)} from number {number}"
            )
    return torch.stack(copies, 1).flatten(0, 1)


def joint_labels(targets: Integer[Tensor, " batch"], copies: int) -> Int[Tensor, " rows"]:
    """Joint class of each sample in each of its versions, in the order of `rotate4` and `transform_copies`.

    Args:
        targets: class numbers.
        copies: M, versions of each sample, >= 1.

    Returns:
        `targets * M + j` for j = 0 ... M - 1, those of a sample beside each other, int64.

    Raises:
        ValueError: if `copies` < 1.

    Examples:
        >>> joint_labels(torch.tensor([2, 0]), 4).tolist()
        [8, 9, 10, 11, 0, 1, 2, 3]
    """
    _check_copies(copies)
    # Not in the type of the targets: joint classes may be beyond what 8 bits hold.
    return (targets.long().unsqueeze(1) * copies + torch.arange(copies, device=targets.device)).flatten()


def marginal_logits(
    joint_logits: Float[Tensor, "*batch joint"],
    copies: int,
    reduce: Literal["logsumexp", "sum"] = "logsumexp",
) -> Float[Tensor, "*batch classes"]:
    """Logits of the classes alone, from logits of joint classes.

    Args:
        joint_logits: of N * M joint classes.
        copies: M, versions of each sample, >= 1.
        reduce: `"logsumexp"` adds the probabilities of a class's versions, which is what "this class, in any version" means; `"sum"` adds
            their logits, as HSAKD's code does, and may prefer another class.

    Returns:
        N logits, at least float32.

    Raises:
        ValueError: if M does not divide the number of joint classes, or `reduce` is unknown.

    Source:
        Yang et al., 2021 (HSAKD), arXiv 2107.13715, for `"sum"`.

    Examples:
        >>> logits = torch.tensor([[5.0, -6.0, 1.0, 1.0]])  # two classes in two versions
        >>> [int(marginal_logits(logits, 2, reduce).argmax()) for reduce in ("logsumexp", "sum")]
        [0, 1]
    """
    _check_copies(copies)
    if joint_logits.ndim == 0 or joint_logits.shape[-1] == 0 or joint_logits.shape[-1] % copies:
        raise ValueError(
            f"joint_logits must have a multiple of copies = {copies} classes in the last dimension, got {tuple(joint_logits.shape)}"
        )
    if reduce not in ("logsumexp", "sum"):
        raise ValueError(f'reduce must be "logsumexp" or "sum", got {reduce!r}')
    slots = full_precision(joint_logits).unflatten(-1, (-1, copies))
    return slots.logsumexp(-1) if reduce == "logsumexp" else slots.sum(-1)


def _check_copies(copies: int) -> None:
    if copies < 1:
        raise ValueError(f"copies must be >= 1, got {copies}")


def _same(inputs: Tensor) -> Tensor:
    return inputs


def _turned(images: Tensor, turns: int) -> Tensor:
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"images must be square (batch, channels, side, side) to be turned, got shape {tuple(images.shape)}"
        )
    return images.rot90(turns, (2, 3))
