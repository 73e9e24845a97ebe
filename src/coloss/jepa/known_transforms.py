"""Random views of images that say how they were made: each comes with the parameters of its rotation, shift, crop, colour or blur.

A transform here is a `ParamTransform`: called on a batch it gives the changed images and one row of parameters for each. From
several views of one image and their parameters follow actions, what happened between a view and the next (`relative_actions`): the
input of action-conditioned prediction (`coloss.jepa.SeqJEPA`), and the target when one asks what an encoder knows about a change
(`coloss.jepa.evaluate_equivariance`).

Everything is batched; no loop runs over samples. Units differ by transform (radians, shares of a side, factors), so differences of
parameters are divided by the spread of each parameter, which is known from the ranges. Published code for seq-JEPA divides by
the norm over the views of a sequence instead, which makes the same turn a larger action in one sequence than in another.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from coloss.ops import (
    canonical_quaternion,
    full_precision,
    quaternion_inverse,
    quaternion_product,
    without_autocast,
)

Images = Float[Tensor, "batch channels height width"]
Views = Float[Tensor, "batch channels view_height view_width"]
ActionKind = Literal["difference", "quaternion"]


@runtime_checkable
class ParamTransform(Protocol):
    """What a random change with known parameters looks like; any object with these three is one.

    A transform whose views of one sample depend on one another (an eye that does not look twice at a place) also has
    `draw_sequence(inputs, count, generator)`, which gives (batch, count, ...) and (batch, count, parameters).

    Attributes:
        names: of the parameters.
        spread: standard deviation of each over its draws, > 0: the unit in which differences are measured.

    Examples:
        >>> isinstance(Rotations(60), ParamTransform)
        True
    """

    names: tuple[str, ...]
    spread: tuple[float, ...]

    def __call__(
        self, inputs: Tensor, /, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Float[Tensor, "batch parameters"]]:
        """The changed inputs, one draw for each, and the parameters of each."""
        ...


class KnownTransform:
    """Base of transforms that draw their parameters from ranges and can also be told them.

    Args:
        ranges: name -> lowest and highest value; draws are uniform. A range of one value gives no parameter: it is left out.

    Attributes:
        names: of the parameters that vary; `spread`: (high - low) / sqrt(12) of each.

    Raises:
        ValueError: if a range is empty or not finite, or none varies.

    Examples:
        >>> class Gain(KnownTransform):
        ...     def apply(self, images, parameters):
        ...         return images * parameters[:, :1, None, None]
        >>> images, parameters = Gain({"gain": (0.5, 2.0)})(torch.ones(3, 1, 2, 2))
        >>> bool((images[:, 0, 0, 0] == parameters[:, 0]).all())
        True
    """

    def __init__(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        for name, (low, high) in ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"{name} must range from low to high, both finite, got {low} to {high}")
        varying = {name: bounds for name, bounds in ranges.items() if bounds[0] < bounds[1]}
        if not varying:
            raise ValueError(f"one of {', '.join(ranges)} must vary, got {dict(ranges)}")
        self.names: tuple[str, ...] = tuple(varying)
        self.ranges = varying
        self.spread: tuple[float, ...] = tuple((high - low) / 12**0.5 for low, high in varying.values())

    def draw(
        self, images: Images, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch parameters"]:
        """Parameters for each image, at least float32."""
        low, high = zip(*self.ranges.values())
        return _uniform(low, high, images, generator)

    def apply(self, images: Images, parameters: Float[Tensor, "batch parameters"]) -> Views:
        """The images changed by given parameters; each subclass says how."""
        raise TypeError(f"{type(self).__name__} must define apply(images, parameters)")

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Float[Tensor, "batch parameters"]]:
        if images.ndim != 4:
            raise ValueError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
        parameters = self.draw(images, generator)
        return self.apply(images, parameters), parameters


class Rotations(KnownTransform):
    """Images turned about their centre, with the angle in radians, positive counter-clockwise; zero outside.

    Args:
        degrees: angles are uniform in [-degrees, degrees], in (0, 180]. A digit 6 turned by more than 90 is a 9.

    Raises:
        ValueError: for a range out of bounds.

    Examples:
        >>> images, angles = Rotations(60)(torch.rand(5, 1, 8, 8))
        >>> images.shape, angles.shape, bool((angles.abs() <= math.pi / 3).all())
        (torch.Size([5, 1, 8, 8]), torch.Size([5, 1]), True)
    """

    def __init__(self, degrees: float = 60.0) -> None:
        if not 0 < degrees <= 180:
            raise ValueError(f"degrees must be in (0, 180], got {degrees}")
        super().__init__({"angle": (-math.radians(degrees), math.radians(degrees))})

    def apply(self, images: Images, parameters: Float[Tensor, "batch 1"]) -> Images:
        cosine, sine = parameters[:, 0].cos(), parameters[:, 0].sin()
        # affine_grid measures both sides from -1 to 1, so a rotation of an oblong image needs the ratio of its sides.
        ratio = images.shape[2] / images.shape[3]
        zero = torch.zeros_like(cosine)
        return _resample(images, [cosine, -sine * ratio, zero, sine / ratio, cosine, zero])


class Shifts(KnownTransform):
    """Images moved down and to the right, by shares of their height and width; zero where nothing comes from.

    Args:
        share: both are uniform in [-share, share], in (0, 1].

    Raises:
        ValueError: for a range out of bounds.

    Examples:
        >>> images, shifts = Shifts(0.25)(torch.rand(5, 1, 8, 8))
        >>> images.shape, shifts.shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5, 2]))
    """

    def __init__(self, share: float = 0.2) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        super().__init__({"down": (-share, share), "right": (-share, share)})

    def apply(self, images: Images, parameters: Float[Tensor, "batch 2"]) -> Images:
        down, right = parameters.unbind(1)
        one, zero = torch.ones_like(down), torch.zeros_like(down)
        return _resample(images, [one, zero, -2 * right, zero, one, -2 * down])


class RandomCrops(KnownTransform):
    """Parts of images, enlarged; parameters are top, left, height and width as shares of the sides.

    The area's share is uniform in `area`, the logarithm of width / height (in pixels) uniform between those of `ratio`, cut where
    a side would not fit; the position uniform among those inside. `spread` is measured on 10,000 draws for a square image.

    Args:
        area: smallest and largest share of the area, in (0, 1].
        ratio: smallest and largest width / height, > 0.
        size: (height, width) of the views; None for that of the images.

    Raises:
        ValueError: for a range out of bounds.

    Examples:
        >>> images, boxes = RandomCrops((0.3, 1.0), size=(6, 6))(torch.rand(5, 3, 8, 8))
        >>> images.shape, bool((boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6).all())
        (torch.Size([5, 3, 6, 6]), True)
    """

    def __init__(
        self,
        area: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        size: tuple[int, int] | None = None,
    ) -> None:
        if not 0 < area[0] <= area[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"area must rise in (0, 1] and ratio in (0, inf), got {area} and {ratio}")
        if area == (1, 1) and ratio == (1, 1):
            raise ValueError("area or ratio must vary, got (1, 1) for both")
        if size is not None and min(size) < 1:
            raise ValueError(f"size must be at least 1 x 1, got {size}")
        self.area, self.ratio, self.size = area, ratio, size
        self.names = ("top", "left", "height", "width")
        drawn = self.draw(torch.zeros(10_000, 1, 1, 1), torch.Generator().manual_seed(0))
        self.spread = tuple(parameter_spread(drawn).tolist())

    def draw(self, images: Images, generator: torch.Generator | None = None) -> Float[Tensor, "batch 4"]:
        low = (self.area[0], math.log(self.ratio[0]), 0.0, 0.0)
        high = (self.area[1], math.log(self.ratio[1]), 1.0, 1.0)
        area, log_ratio, down, right = _uniform(low, high, images, generator).unbind(1)
        # In shares of the sides, an oblong image makes a square part oblong the other way.
        ratio = log_ratio.exp() * (images.shape[2] / images.shape[3])
        height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
        return torch.stack([down * (1 - height), right * (1 - width), height, width], dim=1)

    def apply(self, images: Images, parameters: Float[Tensor, "batch 4"]) -> Views:
        top, left, height, width = parameters.unbind(1)
        zero = torch.zeros_like(top)
        matrix = [width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1]
        return _resample(images, matrix, self.size)


class TransformChain:
    """Several known transforms, one after the other; their parameters stand side by side.

    If the first has a `draw_sequence`, so has the chain: its views depend on one another, the rest changes each by itself.

    Args:
        transforms: at least one; none but the first with a `draw_sequence`, which needs the images as they are.

    Raises:
        ValueError: if there are none, or a later one has a `draw_sequence`.

    Examples:
        >>> chain = TransformChain([Rotations(30), Shifts(0.1)])
        >>> images, parameters = chain(torch.rand(5, 1, 8, 8))
        >>> chain.names, parameters.shape
        (('angle', 'down', 'right'), torch.Size([5, 3]))
    """

    def __init__(self, transforms: Sequence[ParamTransform]) -> None:
        if not transforms:
            raise ValueError("transforms must hold at least one transform, got 0")
        for place, transform in enumerate(transforms):
            if place and hasattr(transform, "draw_sequence"):
                name = type(transform).__name__
                raise ValueError(
                    f"transforms must have a draw_sequence in the first place alone, got {name} at place {place}"
                )
        self.transforms = tuple(transforms)
        self.names = tuple(name for transform in transforms for name in transform.names)
        self.spread = tuple(value for transform in transforms for value in transform.spread)
        if hasattr(transforms[0], "draw_sequence"):
            self.draw_sequence = self._in_order

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Float[Tensor, "batch parameters"]]:
        found = []
        for transform in self.transforms:
            images, parameters = transform(images, generator)
            found.append(parameters)
        return images, torch.cat(found, dim=1)

    def _in_order(
        self, images: Tensor, count: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        views, parameters = draw_views(self.transforms[0], images, count, generator)
        if len(self.transforms) > 1:
            changed = TransformChain(self.transforms[1:])(views.flatten(0, 1), generator)
            views, others = (part.unflatten(0, (len(images), count)) for part in changed)
            parameters = torch.cat([parameters, others], dim=2)
        return views, parameters


def draw_views(
    transform: ParamTransform,
    inputs: Float[Tensor, "batch *shape"],
    count: int,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "batch count ..."], Float[Tensor, "batch count parameters"]]:
    """Several views of each sample and their parameters, in the order in which they are seen.

    Args:
        transform: draws each view by itself, in one call for all; or, with a `draw_sequence`, each after those before it.
        inputs: samples.
        count: views of each, >= 1.
        generator: decides every choice.

    Raises:
        ValueError: if count < 1, or there are not as many parameters as names.

    Examples:
        >>> views, angles = draw_views(Rotations(60), torch.rand(5, 1, 8, 8), 4)
        >>> views.shape, angles.shape
        (torch.Size([5, 4, 1, 8, 8]), torch.Size([5, 4, 1]))
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    in_order = getattr(transform, "draw_sequence", None)
    if in_order is not None:
        views, parameters = in_order(inputs, count, generator)
    else:
        views, parameters = transform(inputs.repeat_interleave(count, dim=0), generator)
        views, parameters = (part.unflatten(0, (len(inputs), count)) for part in (views, parameters))
    if parameters.shape != (len(inputs), count, len(transform.names)):
        expected = (len(inputs), count, len(transform.names))
        raise ValueError(f"transform must give parameters {expected}, got {tuple(parameters.shape)}")
    return views, parameters


def relative_actions(
    parameters: Float[Tensor, "batch views parameters"],
    kind: ActionKind = "difference",
    spread: Sequence[float] | None = None,
) -> Float[Tensor, "batch steps parameters"]:
    """What happened between each view and the next.

        difference    a_t = (l_{t+1} - l_t) / spread, entry by entry
        quaternion    a_t = inverse(q_t) q_{t+1} of the first four entries (x, y, z, w), one sign for each rotation; the rest as above

    Args:
        parameters: l_1 ... l_V of each sample's views.
        kind: a rotation in space is no difference of its four numbers, hence the second one.
        spread: of each parameter, > 0 (`ParamTransform.spread`, or `parameter_spread` of your data): brings radians, pixels
            and factors to one scale. Those of a quaternion are not used. None for 1.

    Returns:
        (batch, views - 1, parameters), at least float32.

    Raises:
        ValueError: for an unknown kind, too few parameters for a quaternion, or a spread that does not fit.

    Source:
        Ghaemi, Muller, Bakhtiari, 2025 (seq-JEPA), arXiv 2505.03176.

    Examples:
        >>> relative_actions(torch.tensor([[[0.0, 5.0], [1.0, 3.0]]]), spread=(0.5, 2.0))
        tensor([[[ 2., -1.]]])
        >>> quarter = [0.0, 0.0, 0.5**0.5, 0.5**0.5]
        >>> relative_actions(torch.tensor([[quarter, quarter]]), "quaternion")
        tensor([[[0., 0., 0., 1.]]])
    """
    if kind not in ("difference", "quaternion"):
        raise ValueError(f'kind must be "difference" or "quaternion", got {kind!r}')
    count = parameters.shape[-1]
    if kind == "quaternion" and count < 4:
        raise ValueError(f"parameters must begin with a quaternion of four numbers, got {count}")
    if spread is not None and (len(spread) != count or not all(value > 0 for value in spread)):
        raise ValueError(f"spread must hold {count} numbers > 0, got {list(spread)}")
    values = full_precision(parameters)
    before, after = values[:, :-1], values[:, 1:]
    differences = after - before
    if spread is not None:
        differences = differences / differences.new_tensor(list(spread))
    if kind == "difference":
        return differences
    turns = quaternion_product(quaternion_inverse(before[..., :4]), after[..., :4])
    return torch.cat([canonical_quaternion(turns), differences[..., 4:]], dim=-1)


def parameter_spread(parameters: Float[Tensor, "*sequences parameters"]) -> Float[Tensor, " parameters"]:
    """Standard deviation of each parameter over all samples and views, for data whose ranges are not known.

    Args:
        parameters: of a whole data set; one number for each parameter in the last dimension.

    Returns:
        At least float32; 1 for a parameter that does not vary, so that dividing by it is safe.

    Raises:
        ValueError: if there is no row.

    Examples:
        >>> parameter_spread(torch.tensor([[[0.0, 100.0]], [[2.0, 300.0]]]))
        tensor([  1., 100.])
    """
    rows = full_precision(parameters).reshape(-1, parameters.shape[-1])
    if not len(rows):
        raise ValueError("parameters must hold at least one row, got 0")
    found = rows.std(0, correction=0)
    # The deviation of equal numbers may be the rounding of their mean.
    return torch.where((rows.amax(0) > rows.amin(0)) & (found > 0), found, 1)


def _resample(images: Images, matrix: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
    """Bilinear samples at A p + b for each position p in [-1, 1]^2 of the result; A and b are given row by row."""
    values = full_precision(images)
    height, width = size or images.shape[2:]
    affine = torch.stack(list(matrix), dim=1).to(values).view(-1, 2, 3)
    # In half precision places would be off by pixels, and views no longer be what their parameters say.
    with without_autocast(values.device):
        grid = F.affine_grid(affine, [len(images), images.shape[1], height, width], align_corners=False)
        return F.grid_sample(values, grid, align_corners=False).to(images.dtype)


def _uniform(
    low: Sequence[float], high: Sequence[float], images: Tensor, generator: torch.Generator | None
) -> Float[Tensor, "batch parameters"]:
    """Draws between bounds, one row for each image; on the generator's device first, so that a seed means the same anywhere."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    device = generator.device if generator is not None else images.device
    share = torch.rand(len(images), len(low), generator=generator, device=device, dtype=dtype)
    share = share.to(images.device)
    bottom, top = share.new_tensor(list(low)), share.new_tensor(list(high))
    return bottom + (top - bottom) * share
