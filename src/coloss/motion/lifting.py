"""Networks that lift a 2-D pose of one image to 3-D: a residual MLP, and graph convolutions beside MLPs over channels and joints.

All take images (batch, joints, 2) in units of half the image's width (`coloss.motion.screen_coordinates`) and give poses
(batch, joints, 3) in metres, in camera axes, relative to the root, which is exactly 0: what they predict for it is subtracted.
`coloss.motion.HopGraphFormer` is one more.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.nn.graph_convolution import GraphConv
from coloss.ops import graph_partition


def check_image(image: Tensor, joints: int, channels: int = 2) -> None:
    """Refuse images of another number of joints than a lifter was built for.

    Raises:
        InputError: naming both.

    Examples:
        >>> check_image(torch.zeros(4, 17, 2), 21)
        Traceback (most recent call last):
        coloss.errors.InputError: image must be (batch, 21, 2), got (4, 17, 2)
    """
    if image.ndim != 3 or image.shape[1:] != (joints, channels):
        raise InputError(f"image must be (batch, {joints}, {channels}), got {tuple(image.shape)}")


def check_root(root: int | None, joints: int) -> None:
    """Refuse a root that is none of the joints.

    Raises:
        InputError: naming both.

    Examples:
        >>> check_root(None, 3)
    """
    if root is not None and not 0 <= root < joints:
        raise InputError(f"root must be one of the {joints} joints or None, got {root}")


def relative_to_root(
    pose: Float[Tensor, "batch joints axes"], root: int | None
) -> Float[Tensor, "batch joints axes"]:
    """The pose moved so that its root is 0; as it is for `root=None`.

    Examples:
        >>> relative_to_root(torch.tensor([[[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]]), 0)
        tensor([[[ 0.,  0.,  0.],
                 [ 0., -1., -2.]]])
    """
    return pose if root is None else pose - pose[:, root, None]


class ResidualLifter(nn.Module):
    """The plain strong baseline: an MLP over all joints at once, in residual blocks of two layers.

    Each layer is linear -> batch norm -> ReLU -> dropout.

    Args:
        joints: number of joints, >= 1.
        width: of the hidden layers, >= 1. The authors take 1,024.
        blocks: residual blocks, >= 0.
        dropout: probability in [0, 1). The authors take 0.5.
        root: joint that the pose is relative to; None predicts all joints as they come.

    Returns:
        From `forward`: (batch, joints, 3).

    Raises:
        InputError: for a value out of range, or an image of another number of joints.

    Source: Martinez et al., 2017, arXiv 1705.03098.

    Examples:
        >>> ResidualLifter(17, width=64)(torch.randn(4, 17, 2)).shape
        torch.Size([4, 17, 3])
    """

    def __init__(
        self,
        joints: int,
        width: int = 256,
        blocks: int = 2,
        *,
        dropout: float = 0.0,
        root: int | None = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("joints", joints, 1), ("width", width, 1), ("blocks", blocks, 0)):
            if value < least:
                raise InputError(f"{name} must be >= {least}, got {value}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {dropout}")
        check_root(root, joints)
        self.joints, self.root = joints, root

        def layer(inputs: int) -> list[nn.Module]:
            # The norm cancels a bias.
            return [
                nn.Linear(inputs, width, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Dropout(dropout),
            ]

        self.stem = nn.Sequential(*layer(2 * joints))
        self.blocks = nn.ModuleList(nn.Sequential(*layer(width), *layer(width)) for _ in range(blocks))
        self.head = nn.Linear(width, 3 * joints)

    def forward(self, image: Float[Tensor, "batch joints 2"]) -> Float[Tensor, "batch joints 3"]:
        check_image(image, self.joints)
        hidden = self.stem(image.flatten(1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return relative_to_root(self.head(hidden).unflatten(1, (self.joints, 3)), self.root)


class GraphMLPLifter(nn.Module):
    """Graph convolutions over joints, then MLPs over channels and over joints in parallel (the network of UAO, GUMLP).

    Each block, on features x of (batch, joints, width), with L for layer norms over channels:

        x <- x + graph_convolution(L x)          four subsets: itself, nearer to the root, farther, the partner on the other side
        x <- x + channel_mlp(L x) + joint_mlp(L x)

    The channel MLP narrows (width -> width / 2 -> width / 2 -> width), the joint MLP widens (joints -> 3 -> 6 -> 6 -> 3 -> 1 times joints);
    their middle layers are residual. Which norm the authors' "over joints" means is not said; here each joint's channels are normalised.

    Args:
        parents: of each joint, -1 at the root.
        mirror: partner of each joint on the other side, itself on the middle line.
        width: of the features, even. The authors take 512.
        blocks: >= 1. The authors take 3.
        drop_path: share of samples, in [0, 1), for which a block's branch is left out in training; rises linearly over the blocks, as the
            authors' 0 to 0.2 does.
        root: joint that the pose is relative to; default: the one whose parent is -1.

    Returns:
        From `forward`: (batch, joints, 3).

    Raises:
        InputError: for a value out of range, a skeleton that is none, or an image of another number of joints.

    Source: Wang et al., 2025, arXiv 2402.02339, section 3 (network).

    Examples:
        >>> GraphMLPLifter((-1, 0, 0), mirror=(0, 2, 1), width=16)(torch.randn(4, 3, 2)).shape
        torch.Size([4, 3, 3])
    """

    def __init__(
        self,
        parents: Sequence[int],
        mirror: Sequence[int],
        width: int = 128,
        blocks: int = 3,
        *,
        drop_path: float = 0.0,
        root: int | None = None,
    ) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise InputError(f"width must be even and >= 2, got {width}")
        if blocks < 1:
            raise InputError(f"blocks must be >= 1, got {blocks}")
        if not 0 <= drop_path < 1:
            raise InputError(f"drop_path must be in [0, 1), got {drop_path}")
        self.joints = len(parents)
        self.root = [*parents].index(-1) if root is None else root
        check_root(self.root, self.joints)
        try:
            partition = graph_partition(parents, "symmetric", mirror=mirror)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.stem = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, width))
        shares = [drop_path * index / max(blocks - 1, 1) for index in range(blocks)]
        self.blocks = nn.ModuleList(_GraphMLPBlock(width, partition, share) for share in shares)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Sequential(nn.Linear(width, width // 2), nn.GELU())
        self.head = nn.Linear(width // 2, 3)

    def forward(self, image: Float[Tensor, "batch joints 2"]) -> Float[Tensor, "batch joints 3"]:
        check_image(image, self.joints)
        features = self.stem(image)
        for block in self.blocks:
            features = block(features)
        return relative_to_root(self.head(self.hidden(self.norm(features))), self.root)


class _GraphMLPBlock(nn.Module):
    def __init__(self, width: int, partition: Tensor, drop_path: float) -> None:
        super().__init__()
        joints = partition.shape[-1]
        self.drop_path = drop_path
        self.graph_norm, self.channel_norm, self.joint_norm = (nn.LayerNorm(width) for _ in range(3))
        self.graph = GraphConv(width, width, partition, weighting="fixed")
        self.channels = _Narrowed((width, width // 2, width))
        self.over_joints = _Narrowed((joints, 3 * joints, 6 * joints, 3 * joints, joints))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.graph_norm(x).mT[:, :, None]
        x = x + self._dropped(self.graph(maps)[:, :, 0].mT)
        mixed = self.channels(self.channel_norm(x)) + self.over_joints(self.joint_norm(x).mT).mT
        return x + self._dropped(mixed)

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class _Narrowed(nn.Module):
    """Linear layers of some widths with GELU between, and one more at the middle width, added to its input."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        middle = len(widths) // 2
        self.before = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:middle], widths[1 : middle + 1]))
        self.middle = nn.Linear(widths[middle], widths[middle])
        self.after = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[middle:-1], widths[middle + 1 :]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.before:
            x = nn.functional.gelu(layer(x))
        x = x + nn.functional.gelu(self.middle(x))
        for number, layer in enumerate(self.after):
            x = layer(x) if number == len(self.after) - 1 else nn.functional.gelu(layer(x))
        return x
