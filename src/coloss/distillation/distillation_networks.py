"""Small networks without batch norm, and augmentations by name: what trajectories of parameters can be matched with."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import small_image_views
from coloss.distillation.expert_trajectories import Augment
from coloss.errors import InputError, suggest_names
from coloss.nn import MLP
from coloss.nn.convolution import convolution


def instance_norm_network(
    in_channels: int, num_classes: int, size: tuple[int, int], width: int = 32, depth: int = 3
) -> nn.Module:
    """The network of dataset distillation: convolution, instance norm, ReLU, average pooling; `depth` times, then one linear layer.

    Args:
        in_channels: of the images.
        num_classes: logits.
        size: (height, width) of the images, at least 2 ** depth.
        width: channels of every stage; the authors have 128.
        depth: stages, each of which halves the image.

    Raises:
        ValueError: if an argument is below 1 or the images are too small.

    Source:
        Gidaris, Komodakis, 2018, arXiv 1804.09458, as used by Cazenavette et al., 2022.

    Examples:
        >>> instance_norm_network(3, 10, (32, 32), width=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    for name, value in (
        ("in_channels", in_channels),
        ("num_classes", num_classes),
        ("width", width),
        ("depth", depth),
    ):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    height, across = (side // 2**depth for side in size)
    if min(height, across) < 1:
        raise ValueError(f"size must be at least {2**depth} for depth {depth}, got {size}")
    stages: list[nn.Module] = []
    for stage in range(depth):
        stages += [
            convolution(2, width if stage else in_channels, width, 3),
            # Statistics of one image and channel; a 1 x 1 map would have none.
            nn.GroupNorm(width, width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(width * height * across, num_classes))


def distillation_network(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The default network for a kind of input: `instance_norm_network` for images of 16 pixels a side or more, else a perceptron.

    Args:
        input_shape: of one sample.
        num_classes: logits.

    Examples:
        >>> distillation_network((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    shape = tuple(input_shape)
    if len(shape) == 3 and min(shape[1:]) >= 16:
        return instance_norm_network(shape[0], num_classes, (shape[1], shape[2]))
    return MLP(torch.Size(shape).numel(), [64], num_classes, norm=None)


def shifted_views(
    images: Float[Tensor, "batch channels height width"], generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """Images turned, scaled and shifted a little at random, 0 (the mean of normalised images) outside; differentiable.

    Examples:
        >>> shifted_views(torch.ones(2, 1, 16, 16), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 16, 16])
    """
    return small_image_views(
        images, 1, generator, rotation=0.25, scaling=0.15, shift=0.15, gain=0.0, noise=0.0, occlusion=0
    )[0]


def mirrored_views(
    images: Float[Tensor, "batch channels height width"], generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """As `shifted_views`, and half of the images mirrored left and right.

    Examples:
        >>> mirrored_views(torch.ones(2, 3, 16, 16), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 16, 16])
    """
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    flipped = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return shifted_views(flipped, generator)


AUGMENTATIONS: dict[str, Augment | None] = {
    "none": None,
    "shifted": shifted_views,
    "mirrored": mirrored_views,
}


def named_augmentation(name: str) -> Augment | None:
    """An augmentation by the name that a distilled file keeps: "none", "shifted" or "mirrored".

    Raises:
        InputError: if there is none of that name.

    Examples:
        >>> named_augmentation("none") is None
        True
    """
    if name not in AUGMENTATIONS:
        raise InputError(
            f"augmentation must be {', '.join(AUGMENTATIONS)}, got {name!r}{suggest_names(name, AUGMENTATIONS)}"
        )
    return AUGMENTATIONS[name]


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network initialised by a seed; the global random state is left as it was.

    Examples:
        >>> one, other = (seeded(lambda: nn.Linear(2, 1), 0) for _ in range(2))
        >>> torch.equal(one.weight, other.weight)
        True
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
