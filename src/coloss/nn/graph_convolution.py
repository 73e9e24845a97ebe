"""Layers for skeletons: convolutions over a graph of joints, and over time at several scales.

Maps are (batch, channels, frames, joints). Adjacency matrices are [subset, receiving joint, giving joint], as
`coloss.ops.graph_partition` makes them.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

Maps = Float[Tensor, "batch channels frames joints"]
Weighting = Literal["fixed", "importance", "additive"]


class GraphConv(nn.Module):
    """A graph convolution: for each subset of neighbours a linear map of the channels, weighted by the adjacency and summed.

        out[u] = sum over subsets k and joints v of A_k[u, v] W_k x[v]

    Args:
        in_channels: of the maps.
        out_channels: of the result.
        partition: float (subsets, joints, joints), see `coloss.ops.graph_partition`.
        weighting: `fixed` leaves A as it is; `importance` multiplies each entry by a learnt factor that begins at 1 (Yan, Xiong, Lin,
            2018), so that only bones of the graph pass anything; `additive` learns A itself, beginning at the partition.

    Attributes:
        partition: buffer.
        weighting: how the adjacency is learnt.

    Raises:
        ValueError: for a partition of another shape or an unknown weighting.

    Cost:
        subsets x frames x joints x (in x out + joints x out) multiply-adds for each sample.

    Examples:
        >>> from coloss.ops import graph_partition
        >>> layer = GraphConv(3, 16, graph_partition([-1, 0, 1]))
        >>> layer(torch.rand(2, 3, 8, 3)).shape
        torch.Size([2, 16, 8, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        partition: Float[Tensor, "subsets joints joints"],
        weighting: Weighting = "importance",
    ) -> None:
        super().__init__()
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}, got {weighting!r}")
        check_partition(partition)
        self.weighting = weighting
        self.out_channels = out_channels
        self.register_buffer("partition", partition.clone())
        self.partition: Tensor
        self.project = nn.Conv2d(in_channels, out_channels * len(partition), 1)
        if weighting == "importance":
            self.importance = nn.Parameter(torch.ones_like(partition))
        elif weighting == "additive":
            self.learnt = nn.Parameter(partition.clone())

    def adjacency(self) -> Float[Tensor, "subsets joints joints"]:
        """The matrices in use."""
        if self.weighting == "importance":
            return self.partition * self.importance
        return self.learnt if self.weighting == "additive" else self.partition

    def forward(self, maps: Maps) -> Float[Tensor, "batch out_channels frames joints"]:
        """Maps with the same frames and joints."""
        values = self.project(maps).unflatten(1, (len(self.partition), self.out_channels))
        return torch.einsum("kuv,nkctv->nctu", self.adjacency().to(values.dtype), values)


class RelationGraphConv(nn.Module):
    """A graph convolution whose adjacency is refined for each channel and each clip (CTR-GC; Chen and others, 2021).

        a = mean over time of A_k x,  b = mean over time of B_k x           (both of `reduced` channels)
        R_k[u, v] = alpha W_k tanh(a[u] - b[v]) + PA_k[u, v]                (a matrix for each output channel)
        out = relu(BN(sum_k R_k V_k x) + shortcut(x))

    `PA` is learnt and begins at the partition; `alpha` begins at 0 and the gain of the normalisation at 1e-6, so a new layer is its
    shortcut.

    Args:
        in_channels: of the maps.
        out_channels: of the result.
        partition: float (subsets, joints, joints); `directed` in the papers.
        reduced: channels of the relation; an eighth of `in_channels`, but 8 for fewer than 64, by default.

    Raises:
        ValueError: for a partition of another shape.

    Cost:
        The relations take batch x out_channels x joints^2 numbers for each subset.

    Examples:
        >>> from coloss.ops import graph_partition
        >>> layer = RelationGraphConv(12, 16, graph_partition([-1, 0, 1], "directed"))
        >>> layer(torch.rand(2, 12, 8, 3)).shape
        torch.Size([2, 16, 8, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        partition: Float[Tensor, "subsets joints joints"],
        reduced: int | None = None,
    ) -> None:
        super().__init__()
        check_partition(partition)
        subsets = len(partition)
        self.subsets, self.out_channels = subsets, out_channels
        self.reduced = max(in_channels // 8, 8) if reduced is None else reduced
        self.giving = nn.Conv2d(in_channels, subsets * self.reduced, 1)
        self.receiving = nn.Conv2d(in_channels, subsets * self.reduced, 1)
        self.values = nn.Conv2d(in_channels, subsets * out_channels, 1)
        self.relation = nn.Conv2d(subsets * self.reduced, subsets * out_channels, 1, groups=subsets)
        self.learnt = nn.Parameter(partition.clone())
        self.alpha = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm2d(out_channels)
        nn.init.constant_(self.norm.weight, 1e-6)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels)
            )

    def adjacency(self, maps: Maps) -> Float[Tensor, "batch subsets out_channels joints joints"]:
        """The matrices of each clip and channel, [receiving, giving]."""
        receiving = self.receiving(maps).mean(2)
        giving = self.giving(maps).mean(2)
        difference = torch.tanh(receiving[..., :, None] - giving[..., None, :])
        relation = self.relation(difference).unflatten(1, (self.subsets, self.out_channels))
        return self.alpha * relation + self.learnt[:, None].to(relation.dtype)

    def forward(self, maps: Maps) -> Float[Tensor, "batch out_channels frames joints"]:
        """Maps with the same frames and joints."""
        values = self.values(maps).unflatten(1, (self.subsets, self.out_channels))
        mixed = torch.einsum("nkcuv,nkctv->nctu", self.adjacency(maps), values)
        return torch.relu(self.norm(mixed) + self.shortcut(maps))


class MultiScaleTemporalConv(nn.Module):
    """Four branches over time, each a quarter of the channels: kernel 5, kernel 5 with dilation 2, the largest of 3, and a 1x1.

    Each begins with a 1x1 convolution, normalisation and (but for the last) ReLU.

    Args:
        in_channels: of the maps.
        out_channels: a multiple of 4.
        stride: in time.

    Raises:
        ValueError: if the channels cannot be shared among four branches, or for a stride below 1.

    Examples:
        >>> MultiScaleTemporalConv(16, 32, stride=2)(torch.rand(2, 16, 9, 3)).shape
        torch.Size([2, 32, 5, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels % 4:
            raise ValueError(f"out_channels must be a multiple of 4, got {out_channels}")
        if stride < 1:
            raise ValueError(f"stride must be >= 1, got {stride}")
        width = out_channels // 4

        def entry() -> list[nn.Module]:
            return [nn.Conv2d(in_channels, width, 1), nn.BatchNorm2d(width), nn.ReLU()]

        def over_time(dilation: int) -> nn.Conv2d:
            return nn.Conv2d(
                width, width, (5, 1), (stride, 1), padding=(2 * dilation, 0), dilation=(dilation, 1)
            )

        self.branches = nn.ModuleList(
            [
                nn.Sequential(*entry(), over_time(1), nn.BatchNorm2d(width)),
                nn.Sequential(*entry(), over_time(2), nn.BatchNorm2d(width)),
                nn.Sequential(*entry(), nn.MaxPool2d((3, 1), (stride, 1), (1, 0)), nn.BatchNorm2d(width)),
                nn.Sequential(nn.Conv2d(in_channels, width, 1, (stride, 1)), nn.BatchNorm2d(width)),
            ]
        )

    def forward(self, maps: Maps) -> Float[Tensor, "batch out_channels new_frames joints"]:
        """Maps with ceil(frames / stride) frames."""
        return torch.cat([branch(maps) for branch in self.branches], 1)


def check_partition(partition: Tensor) -> None:
    """Refuse what is no stack of adjacency matrices.

    Raises:
        ValueError: naming the shape.

    Examples:
        >>> check_partition(torch.zeros(3, 2))
        Traceback (most recent call last):
        ...
        ValueError: partition must be (subsets, joints, joints), got (3, 2)
    """
    if partition.ndim != 3 or partition.shape[1] != partition.shape[2] or not len(partition):
        raise ValueError(f"partition must be (subsets, joints, joints), got {tuple(partition.shape)}")
