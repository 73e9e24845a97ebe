"""Brings features of one network to the shape of another's, so that they can be compared."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Layout: TypeAlias = Literal["vector", "tokens", "maps"]


class ShapeAdapter(nn.Module):
    """A linear regressor from a student's features to a teacher's, with as many channels and positions.

    One linear map is applied to the channels of each position (a 1 x 1 convolution); positions are averaged down
    (adaptive pooling) or interpolated (linear). Features are laid out as

        vector  (batch, channels)
        tokens  (batch, positions, channels); any number of positions
        maps    (batch, channels, height, width), or (batch, channels, steps)

    and go from any layout to any: a vector is a map of one position, and tokens are maps read row by row, so for
    that their number must be a square (leave a class token out: tap a module after which it is gone).

    Args:
        student_shape: of the features that come in, batch dimension included (its size does not matter).
        teacher_shape: of the features that go out.
        student_layout: by default by the number of dimensions: 2 vector, 3 tokens, 4 maps. Say "maps" for series of channels.
        teacher_layout: likewise.

    Attributes:
        regressor: `nn.Linear` from the student's channels to the teacher's.

    Returns:
        From `forward(features)`: features of the teacher's layout, channels and positions; with `positions`, other positions than in
        `teacher_shape`. The student's positions may vary from call to call.

    Raises:
        ValueError: for shapes that fit no layout, tokens that must become a map and are no square, or, from `forward`, features
            of other channels or layout than said.

    Source: Romero et al. 2015, arXiv 1412.6550, section 2.2 (a convolutional regressor on the student's features).

    Examples:
        >>> import torch
        >>> maps_to_tokens = ShapeAdapter((1, 8, 6, 6), (1, 16, 32))
        >>> maps_to_tokens(torch.rand(5, 8, 6, 6)).shape
        torch.Size([5, 16, 32])
        >>> ShapeAdapter((1, 8), (1, 32))(torch.rand(5, 8)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        student_layout: Layout | None = None,
        teacher_layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.student_layout = feature_layout(student_shape, student_layout, "student")
        self.teacher_layout = feature_layout(teacher_shape, teacher_layout, "teacher")
        channels = _channels(student_shape, self.student_layout)
        # A map of one position or of several dimensions.
        self.spatial_dimensions = max(
            len(shape) - 2 if layout == "maps" else 0
            for shape, layout in (
                (student_shape, self.student_layout),
                (teacher_shape, self.teacher_layout),
            )
        )
        if self.student_layout == self.teacher_layout == "maps" and len(student_shape) != len(teacher_shape):
            raise ValueError(
                f"student and teacher maps must have as many dimensions, got {tuple(student_shape)} and {tuple(teacher_shape)}"
            )
        self.positions = _positions(teacher_shape, self.teacher_layout)
        self.regressor = nn.Linear(channels, _channels(teacher_shape, self.teacher_layout))
        self._grid(self.positions)
        self._grid(_positions(student_shape, self.student_layout))

    def forward(
        self, features: Float[Tensor, "batch ..."], positions: Sequence[int] | None = None
    ) -> Float[Tensor, "batch ..."]:
        found = feature_layout(features.shape, self.student_layout, "student")
        channels = _channels(features.shape, found)
        if channels != self.regressor.in_features:
            raise ValueError(
                f"student features must have {self.regressor.in_features} channels as the adapter was made for, got shape {tuple(features.shape)}"
            )
        wanted = self._grid(tuple(positions) if positions is not None else self.positions)
        maps = _channels_last_to_first(features, self.student_layout)
        given = self._grid(maps.shape[2:])
        if given:
            maps = maps.flatten(2).unflatten(2, given)
        smaller = tuple(min(pair) for pair in zip(given, wanted))
        # Resizing and the linear map commute, so that the map is taken of the fewer positions.
        maps = self._project(_resized(maps, smaller))
        maps = _resized(maps, wanted)
        if self.teacher_layout == "vector":
            return maps
        if self.teacher_layout == "tokens":
            return maps.flatten(2).transpose(1, 2)
        return maps

    def _project(self, maps: Tensor) -> Tensor:
        return self.regressor(maps.movedim(1, -1)).movedim(-1, 1)

    def _grid(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Positions as dimensions of a map: tokens become rows and columns where the other side has them."""
        if len(positions) == 1 and self.spatial_dimensions == 2:
            side = math.isqrt(positions[0])
            if side * side != positions[0]:
                raise ValueError(
                    f"tokens that become a map, or are made of one, must be a square number, got {positions[0]}"
                )
            return (side, side)
        return tuple(positions)


def feature_layout(shape: Sequence[int], layout: Layout | None = None, name: str = "features") -> Layout:
    """What the dimensions of a feature are: as said, or by their number.

    Args:
        shape: batch dimension included.
        layout: as said; None goes by the number of dimensions: 2 vector, 3 tokens, 4 maps.
        name: what errors call the features.

    Raises:
        ValueError: for an unknown layout, or one that does not fit the number of dimensions.

    Examples:
        >>> feature_layout((4, 16, 32)), feature_layout((4, 16, 100), "maps")
        ('tokens', 'maps')
    """
    fits: dict[Layout, tuple[int, ...]] = {"vector": (2,), "tokens": (3,), "maps": (3, 4)}
    if layout is None:
        usual: dict[int, Layout] = {2: "vector", 3: "tokens", 4: "maps"}
        layout = usual.get(len(shape))
        if layout is None:
            raise ValueError(
                f"{name} must be (batch, channels), (batch, positions, channels) or (batch, channels, height, width), got {tuple(shape)}"
            )
    if layout not in fits:
        raise ValueError(f"{name} must be laid out as one of {', '.join(fits)}, got {layout!r}")
    if len(shape) not in fits[layout]:
        wanted = " or ".join(map(str, fits[layout]))
        raise ValueError(
            f"{name} laid out as {layout} must have {wanted} dimensions, got shape {tuple(shape)}"
        )
    return layout


def channels_first(
    features: Float[Tensor, "batch ..."], layout: Layout | None = None
) -> Float[Tensor, "batch channels *positions"]:
    """Features with channels in the second dimension, as losses on maps take them: tokens are transposed, the rest stays.

    Args:
        features: of any layout.
        layout: see `feature_layout`.

    Examples:
        >>> import torch
        >>> channels_first(torch.zeros(5, 16, 32)).shape
        torch.Size([5, 32, 16])
    """
    return _channels_last_to_first(features, feature_layout(features.shape, layout))


def _channels_last_to_first(features: Tensor, layout: Layout) -> Tensor:
    return features.transpose(1, 2) if layout == "tokens" else features


def _channels(shape: Sequence[int], layout: Layout) -> int:
    return shape[-1] if layout == "tokens" else shape[1]


def _positions(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    return {"vector": (), "tokens": tuple(shape[1:2]), "maps": tuple(shape[2:])}[layout]


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (batch, channels, *positions) of another size: the mean of each where none is left."""
    present = tuple(maps.shape[2:])
    if present == tuple(size):
        return maps
    if not size:
        return maps.flatten(2).mean(2)
    if not present:
        return maps.view(*maps.shape, *[1] * len(size)).expand(*maps.shape, *size)
    smaller = [min(pair) for pair in zip(present, size, strict=True)]
    if smaller != list(present):
        pool: Callable[..., Tensor] = F.adaptive_avg_pool1d if len(size) == 1 else F.adaptive_avg_pool2d
        maps = pool(maps, smaller)
    if smaller != list(size):
        maps = F.interpolate(maps, list(size), mode="linear" if len(size) == 1 else "bilinear")
    return maps
