"""Several random versions of the same samples: images, feature vectors, series. Each a function of its generator alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from coloss.ops import without_autocast

Images = Float[Tensor, "batch channels height width"]


class MultiView:
    """Several views of a batch, each by its own function: say two large crops and four small ones.

    Args:
        views: each called as `view(inputs, generator=generator)` and returns the changed inputs, of whatever shape.

    Raises:
        ValueError: if there are none.

    Examples:
        >>> def shifted(inputs, generator):
        ...     return inputs + torch.rand(1, generator=generator)
        >>> one, two = MultiView([shifted, shifted])(torch.zeros(3), torch.Generator().manual_seed(0))
        >>> one.shape, bool((one == two).all())
        (torch.Size([3]), False)
    """

    def __init__(self, views: Sequence[Callable[..., Tensor]]) -> None:
        if not views:
            raise ValueError("views must hold at least one function, got 0")
        self.views = tuple(views)

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """One result for each view, in order."""
        return [view(inputs, generator=generator) for view in self.views]


def random_views(
    images: Images,
    count: int = 2,
    generator: torch.Generator | None = None,
    *,
    size: tuple[int, int] | None = None,
    crop: tuple[float, float] = (0.5, 1.0),
    rotation: float = 10.0,
    translation: float = 0.1,
    flip: bool = True,
    jitter: float = 0.4,
    grey: float = 0.2,
    erasing: float = 0.25,
) -> Float[Tensor, "views batch channels out_height out_width"]:
    """Random crops of images, turned, shifted, mirrored, recoloured and partly erased, by kornia.

    All views of all images are made in one call, each with its own random choices.

    Args:
        images: (batch, channels, height, width), in [0, 1].
        count: views of each image, >= 1.
        generator: decides every choice; torch's global random state is neither used nor changed if it is given.
        size: (height, width) of the views; that of the images by default.
        crop: smallest and largest share of the area that a crop keeps, in (0, 1].
        rotation: largest angle in degrees, >= 0.
        translation: largest shift as a share of the side, in [0, 1].
        flip: mirror left and right with probability 1/2.
        jitter: strength of changes of brightness and contrast, and for three channels of saturation and (a quarter of it) hue, in
            [0, 1]; applied with probability 0.8.
        grey: probability to lose the colours (three channels only).
        erasing: probability to blacken a rectangle.

    Returns:
        (count, batch, channels, *size), in [0, 1].

    Raises:
        ValueError: if count < 1 or a range is violated.

    Source: kornia.augmentation; the composition follows Chen et al. 2020 (SimCLR), arXiv 2002.05709, section 3.

    Examples:
        >>> images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> views = random_views(images, count=2, generator=torch.Generator().manual_seed(1))
        >>> views.shape
        torch.Size([2, 4, 3, 16, 16])
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    if not 0 < crop[0] <= crop[1] <= 1:
        raise ValueError(f"crop must be 0 < smallest <= largest <= 1, got {crop}")
    if rotation < 0:
        raise ValueError(f"rotation must be >= 0, got {rotation}")
    for name, value in [
        ("translation", translation),
        ("jitter", jitter),
        ("grey", grey),
        ("erasing", erasing),
    ]:
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    augmentation = _image_augmentation(
        size or (images.shape[2], images.shape[3]),
        crop,
        rotation,
        translation,
        flip,
        jitter,
        grey if images.shape[1] == 3 else 0.0,
        erasing,
        images.shape[1] == 3,
    )
    if images.shape[0] == 0:
        return images.new_empty(count, 0, images.shape[1], *(size or images.shape[2:]))
    repeated = images.repeat(count, 1, 1, 1)
    # In half precision places would be off by pixels.
    with seeded_globally(generator, images.device), without_autocast(images.device):
        changed = augmentation(repeated)
    return changed.clamp(0, 1).unflatten(0, (count, images.shape[0]))


@contextmanager
def seeded_globally(generator: torch.Generator | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run code that draws from torch's global random state as if it drew from a generator.

    Within the context the global state of the CPU (and of a CUDA device) is seeded from one draw of the generator; afterwards it is as
    before. Without a generator the draw comes from the global state, which moves on by that draw.

    Args:
        generator: decides the seed.
        device: where the code runs.

    Examples:
        >>> with seeded_globally(torch.Generator().manual_seed(0)):
        ...     first = torch.rand(2)
        >>> with seeded_globally(torch.Generator().manual_seed(0)):
        ...     second = torch.rand(2)
        >>> bool((first == second).all())
        True
    """
    device = torch.device(device)
    where = generator.device if generator is not None else "cpu"
    seed = int(torch.randint(2**62, (1,), generator=generator, device=where))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: it would reseed every GPU, of which only `device` is put back.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@lru_cache(maxsize=32)
def _image_augmentation(
    size: tuple[int, int],
    crop: tuple[float, float],
    rotation: float,
    translation: float,
    flip: bool,
    jitter: float,
    grey: float,
    erasing: float,
    coloured: bool,
) -> Any:
    # kornia takes a fraction of a second to import, which data without images need not spend.
    from kornia import augmentation as kornia

    steps: list[Any] = [kornia.RandomResizedCrop(size, scale=crop, ratio=(3 / 4, 4 / 3))]
    if rotation or translation:
        steps.append(kornia.RandomAffine(rotation, (translation, translation), p=1.0))
    if flip:
        steps.append(kornia.RandomHorizontalFlip(p=0.5))
    if jitter:
        saturation, hue = (jitter, jitter / 4) if coloured else (0.0, 0.0)
        steps.append(kornia.ColorJiggle(jitter, jitter, saturation, hue, p=0.8))
    if grey:
        steps.append(kornia.RandomGrayscale(p=grey))
    if erasing:
        steps.append(kornia.RandomErasing(p=erasing))
    return kornia.AugmentationSequential(*steps)


def small_image_views(
    images: Images,
    views: int = 4,
    generator: torch.Generator | None = None,
    *,
    rotation: float = 0.35,
    scaling: float = 0.25,
    shift: float = 0.3,
    gain: float = 0.2,
    noise: float = 0.1,
    occlusion: int = 3,
) -> Float[Tensor, "views batch channels height width"]:
    """Random views of tiny images such as the 8 x 8 digits: turned, scaled, shifted, brightened, noisy, with a blackened square.

    Each view of each image is sampled bilinearly at A p + b for the pixel position p in [-1, 1]^2, A a rotation by an angle in
    [-rotation, rotation] divided by a scale in [1 - scaling, 1 + scaling], b in [-shift, shift]^2; zero outside. Then it is multiplied by
    a gain in [1 - gain, 1 + gain], one square is set to zero, and Gaussian noise is added. All draws are uniform besides the noise.

    Args:
        images: (batch, channels, height, width).
        views: views of each image, >= 1.
        generator: decides every choice.
        rotation: in radians, >= 0.
        scaling: in [0, 1).
        shift: in half sides of the image (0.3 of an 8 x 8 image is 1.2 pixels), >= 0.
        gain: in [0, 1].
        noise: standard deviation, >= 0.
        occlusion: side of the square in pixels, >= 0 and at most the smaller side; 0 for none.

    Returns:
        (views, batch, channels, height, width); noise takes values out of [0, 1], nothing is clamped.

    Raises:
        ValueError: if a range is violated.

    Source: the augmentations are those of the digits experiment with LeJEPA (Balestriero, LeCun 2025, arXiv 2511.08544).

    Examples:
        >>> images = torch.ones(5, 1, 8, 8)
        >>> small_image_views(images, views=4, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 5, 1, 8, 8])
    """
    batch, _, height, width = images.shape
    if views < 1:
        raise ValueError(f"views must be >= 1, got {views}")
    for name, value in [("rotation", rotation), ("shift", shift), ("noise", noise)]:
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not 0 <= scaling < 1 or not 0 <= gain <= 1:
        raise ValueError(f"scaling must be in [0, 1) and gain in [0, 1], got {scaling} and {gain}")
    if not 0 <= occlusion <= min(height, width):
        raise ValueError(f"occlusion must be in [0, {min(height, width)}], got {occlusion}")
    if batch == 0:
        return images.new_empty(views, *images.shape)
    count = views * batch
    repeated = images.repeat(views, 1, 1, 1)
    angle, scale, across, down, brightness, left, top = _uniform((7, count), images, generator).unbind(0)
    angle, scale = (2 * angle - 1) * rotation, 1 + (2 * scale - 1) * scaling
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    across, down = (2 * across - 1) * shift, (2 * down - 1) * shift
    # affine_grid measures both sides from -1 to 1, so a rotation of an oblong image needs the ratio of its sides.
    ratio = height / width
    matrix = torch.stack([cosine, -sine * ratio, across, sine / ratio, cosine, down], dim=1).view(count, 2, 3)
    # In half precision places would be off by pixels.
    with without_autocast(images.device):
        grid = functional.affine_grid(matrix, list(repeated.shape), align_corners=False)
        changed = functional.grid_sample(repeated, grid, align_corners=False)
    changed = changed * (1 + (2 * brightness - 1) * gain).view(count, 1, 1, 1)
    if occlusion:
        row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        top_row = (top * (height - occlusion + 1)).long().view(count, 1)
        left_column = (left * (width - occlusion + 1)).long().view(count, 1)
        rows = (row >= top_row) & (row < top_row + occlusion)
        columns = (column >= left_column) & (column < left_column + occlusion)
        changed = changed.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0.0)
    changed = changed + noise * _normal(changed.shape, images, generator)
    return changed.unflatten(0, (views, batch))


def vector_views(
    vectors: Float[Tensor, "batch features"],
    views: int = 2,
    generator: torch.Generator | None = None,
    *,
    noise: float = 0.1,
    scaling: float = 0.1,
    masking: float = 0.2,
) -> Float[Tensor, "views batch features"]:
    """Random views of feature vectors: scaled, noisy, with some features set to zero.

    view = m * (s x + noise e), with s uniform in [1 - scaling, 1 + scaling] for each view of a sample, e standard normal, and each
    feature kept (m = 1) with probability 1 - masking.

    Args:
        vectors: (batch, features); standardised ones, so that 0 is the mean of each feature.
        views: views of each sample, >= 1.
        generator: decides every choice.
        noise: standard deviation, >= 0.
        scaling: in [0, 1].
        masking: probability to lose a feature, in [0, 1).

    Raises:
        ValueError: if a range is violated.

    Examples:
        >>> vectors = torch.ones(3, 10)
        >>> views = vector_views(
        ...     vectors, generator=torch.Generator().manual_seed(0), noise=0.0, scaling=0.0, masking=0.5
        ... )
        >>> views.shape, views.unique().tolist()
        (torch.Size([2, 3, 10]), [0.0, 1.0])
    """
    repeated = _repeated(vectors, views, noise, scaling, masking)
    factors = 1 + (2 * _uniform((*repeated.shape[:2], 1), vectors, generator) - 1) * scaling
    kept = _uniform(repeated.shape, vectors, generator) >= masking
    return (repeated * factors + noise * _normal(repeated.shape, vectors, generator)) * kept


def series_views(
    series: Float[Tensor, "batch channels steps"],
    views: int = 2,
    generator: torch.Generator | None = None,
    *,
    noise: float = 0.1,
    scaling: float = 0.1,
    masking: float = 0.2,
) -> Float[Tensor, "views batch channels steps"]:
    """Random views of series: each channel scaled, noise added, and one span of time set to zero in all channels.

    Args:
        series: (batch, channels, steps); standardised ones, so that 0 is the mean of each channel.
        views: views of each sample, >= 1.
        generator: decides every choice.
        noise: standard deviation, >= 0.
        scaling: the factor of a channel is uniform in [1 - scaling, 1 + scaling], in [0, 1].
        masking: share of the steps in the span (rounded), at a uniform position, in [0, 1).

    Raises:
        ValueError: if a range is violated.

    Examples:
        >>> views = series_views(
        ...     torch.ones(3, 2, 10), generator=torch.Generator().manual_seed(0), noise=0.0, scaling=0.0
        ... )
        >>> views.shape, (views == 0).sum(-1).unique().tolist()
        (torch.Size([2, 3, 2, 10]), [2])
    """
    repeated = _repeated(series, views, noise, scaling, masking)
    steps = series.shape[2]
    factors = 1 + (2 * _uniform((*repeated.shape[:3], 1), series, generator) - 1) * scaling
    length = math.floor(masking * steps + 0.5)
    start = (_uniform((*repeated.shape[:2], 1, 1), series, generator) * (steps - length + 1)).floor()
    step = torch.arange(steps, device=series.device)
    masked = (step >= start) & (step < start + length)
    return (repeated * factors + noise * _normal(repeated.shape, series, generator)).masked_fill(masked, 0.0)


def _repeated(inputs: Tensor, views: int, noise: float, scaling: float, masking: float) -> Tensor:
    if views < 1:
        raise ValueError(f"views must be >= 1, got {views}")
    if noise < 0:
        raise ValueError(f"noise must be >= 0, got {noise}")
    if not 0 <= scaling <= 1 or not 0 <= masking < 1:
        raise ValueError(f"scaling must be in [0, 1] and masking in [0, 1), got {scaling} and {masking}")
    return inputs.unsqueeze(0).expand(views, *inputs.shape)


def _uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.rand(*shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.randn(*shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
