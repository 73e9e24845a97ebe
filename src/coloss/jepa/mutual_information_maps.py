"""Changes of coordinates that leave mutual information as it is, to make familiar distributions look unfamiliar.

`asinh`, `half_cube` and `wiggly` act on each coordinate and keep its order, so an estimator that sees ranks does not notice them.
`rotate`, `spiral` and `mirror` change what ranks see, and are harder.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.jepa.mutual_information_families import PairedSamples

Points = Float[Tensor, "samples dim"]


def half_cube(points: Points) -> Points:
    """Each coordinate as `sign(x) |x|^(3/2)`: longer tails.

    Examples:
        >>> half_cube(torch.tensor([[-4.0, 9.0]]))
        tensor([[-8., 27.]])
    """
    return points * points.abs().sqrt()


def wiggly(points: Points) -> Points:
    """Each coordinate as `x + 0.4 sin x + 0.2 sin(1.7 x + 1)`: stretched here, squeezed there, always rising.

    Examples:
        >>> bool((wiggly(torch.linspace(-9, 9, 500)[:, None]).diff(dim=0) > 0).all())
        True
    """
    return points + 0.4 * points.sin() + 0.2 * (1.7 * points + 1).sin()


def rotate(points: Points, generator: torch.Generator | None = None) -> Points:
    """All points turned (or turned and reflected) at random about the origin: no coordinate is as it was.

    Examples:
        >>> turned = rotate(torch.eye(3), torch.Generator().manual_seed(0))
        >>> torch.allclose(turned @ turned.T, torch.eye(3), atol=1e-6)
        True
    """
    dim = points.shape[1]
    normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    factor, triangle = torch.linalg.qr(normal)
    return points @ (factor * triangle.diagonal().sign()).to(points)


def spiral(points: Points, speed: float | None = None) -> Points:
    """Coordinates 1 and 2, 3 and 4 ... turned by an angle that grows with the distance from the origin: `speed |x|^2`.

    The distance stays, so turning back by the same angle undoes it. A last coordinate without partner, and so one coordinate alone,
    stays as it is.

    Args:
        points: of moderate size; far out, the angle is large and the result chaotic.
        speed: radians for each unit of squared distance; None for 1 / dim.

    Examples:
        >>> spiral(torch.tensor([[1.0, 0.0]]), speed=torch.pi / 2).round(decimals=4).abs()
        tensor([[0., 1.]])
    """
    dim = points.shape[1]
    angle = (speed if speed is not None else 1 / dim) * points.square().sum(1, keepdim=True)
    even = dim - dim % 2
    first, second = points[:, 0:even:2], points[:, 1:even:2]
    turned = torch.stack(
        [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], 2
    )
    return torch.cat([turned.flatten(1), points[:, even:]], 1)


def mirror(points: Points, generator: torch.Generator | None = None) -> Points:
    """Each coordinate made positive by `exp(asinh x)`, then given a random sign: a trend becomes a V, and correlations vanish.

    The signs are independent of everything else, so they add nothing to what the points share with other variables, and the size of a
    coordinate still tells all that it told before.

    Examples:
        >>> points = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> seen = mirror(points, torch.Generator().manual_seed(1))
        >>> torch.equal(seen.abs().argsort(0), points.argsort(0))
        True
    """
    return points.asinh().exp() * (1 - 2 * torch.randint(2, points.shape, generator=generator))


Map = Callable[[PairedSamples, torch.Generator | None], PairedSamples]


def _each_side(
    change: Callable[[Tensor], Tensor], draw: PairedSamples, generator: torch.Generator | None
) -> PairedSamples:
    return PairedSamples(change(draw.x), change(draw.y), draw.information)


def _turned(draw: PairedSamples, generator: torch.Generator | None) -> PairedSamples:
    return PairedSamples(rotate(draw.x, generator), rotate(draw.y, generator), draw.information)


def _one_mirrored(draw: PairedSamples, generator: torch.Generator | None) -> PairedSamples:
    if torch.rand((), generator=generator) < 0.5:
        return PairedSamples(mirror(draw.x, generator), draw.y, draw.information)
    return PairedSamples(draw.x, mirror(draw.y, generator), draw.information)


# Maps of the published meta-distribution, and after them `rotation` and `mirror`, which are ours, and `spiral`.
MAPS: dict[str, Map] = {
    "base": lambda draw, generator: draw,
    "asinh": partial(_each_side, torch.asinh),
    "half-cube": partial(_each_side, half_cube),
    "wiggly": partial(_each_side, wiggly),
    "rotation": _turned,
    "mirror": _one_mirrored,
    "spiral": partial(_each_side, spiral),
}
