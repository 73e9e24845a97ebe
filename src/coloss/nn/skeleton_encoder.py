"""A small spatio-temporal graph network for clips of skeletons, and pooling of its maps by region."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.nn.graph_convolution import GraphConv, MultiScaleTemporalConv, RelationGraphConv, check_partition
from coloss.ops.precision import full_precision


class SkeletonBlock(nn.Module):
    """Graph convolution, then convolution over time, with a shortcut around both.

    Args:
        in_channels: of the maps.
        out_channels: of the result.
        partition: float (subsets, joints, joints).
        stride: in time.
        kernel: odd, frames of the temporal convolution of the plain block.
        graph: a `weighting` of `GraphConv`, or `relation` for `RelationGraphConv` with `MultiScaleTemporalConv`.
        dropout: after the temporal convolution of the plain block.
        residual: whether there is a shortcut.

    Examples:
        >>> from coloss.ops import graph_partition
        >>> block = SkeletonBlock(3, 16, graph_partition([-1, 0]), stride=2)
        >>> block(torch.rand(4, 3, 8, 2)).shape
        torch.Size([4, 16, 4, 2])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        partition: Float[Tensor, "subsets joints joints"],
        *,
        stride: int = 1,
        kernel: int = 9,
        graph: Literal["fixed", "importance", "additive", "relation"] = "importance",
        dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and >= 1, got {kernel}")
        self.graph: nn.Module
        if graph == "relation":
            self.graph = RelationGraphConv(in_channels, out_channels, partition)
            self.temporal: nn.Module = MultiScaleTemporalConv(out_channels, out_channels, stride)
        else:
            self.graph = GraphConv(in_channels, out_channels, partition, graph)
            self.temporal = nn.Sequential(
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
                nn.Conv2d(out_channels, out_channels, (kernel, 1), (stride, 1), (kernel // 2, 0)),
                nn.BatchNorm2d(out_channels),
                nn.Dropout(dropout),
            )
        self.shortcut: nn.Module | None = None
        if residual and (in_channels != out_channels or stride != 1):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, (stride, 1)), nn.BatchNorm2d(out_channels)
            )
        elif residual:
            self.shortcut = nn.Identity()

    def forward(
        self, maps: Float[Tensor, "batch channels frames joints"]
    ) -> Float[Tensor, "batch out_channels new_frames joints"]:
        """Maps with ceil(frames / stride) frames."""
        out = self.temporal(self.graph(maps))
        return torch.relu(out if self.shortcut is None else out + self.shortcut(maps))


class SkeletonEncoder(nn.Module):
    """Clips of one or more skeletons to one vector each: normalised joints, blocks, a mean over frames, joints and persons present.

    A person is present in a clip if any of his coordinates is not 0, or as the caller says. Persons that are not are left out of the
    statistics of every normalisation and of the mean; a clip with nobody has a vector of 0, and none of them, or no clips at all, leave the
    statistics as they were.

    Args:
        partition: float (subsets, joints, joints), see `coloss.ops.graph_partition`.
        in_channels: 3 for one stream, 12 for four.
        widths: channels of each block.
        strides: in time, of each block.
        kernel: frames of the plain blocks' temporal convolutions.
        graph: of the blocks, see `SkeletonBlock`.
        dropout: of the plain blocks.

    Attributes:
        blocks: `nn.Sequential`; tap `"blocks.0"` and so on for maps.
        stride: product of the strides: frames of the input to a frame of the last map.
        out_features: `widths[-1]`.

    Raises:
        ValueError: for impossible widths, or clips with another number of channels or joints.

    Cost:
        With 20 joints, 32 frames and the default widths about 5 million multiply-adds for each clip.

    Examples:
        >>> from coloss.ops import graph_partition
        >>> encoder = SkeletonEncoder(graph_partition([-1, 0, 1]))
        >>> encoder(torch.rand(5, 3, 32, 3)).shape, encoder.maps(torch.rand(5, 3, 32, 3)).shape
        (torch.Size([5, 64]), torch.Size([5, 64, 8, 3]))
    """

    def __init__(
        self,
        partition: Float[Tensor, "subsets joints joints"],
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        strides: Sequence[int] = (1, 2, 2),
        *,
        kernel: int = 9,
        graph: Literal["fixed", "importance", "additive", "relation"] = "importance",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_partition(partition)
        if not widths or len(widths) != len(strides) or min(widths) < 1 or min(strides) < 1:
            raise ValueError(
                f"widths and strides must be as many numbers >= 1, got {tuple(widths)} and {tuple(strides)}"
            )
        self.in_channels, self.joints = in_channels, partition.shape[-1]
        self.norm = nn.BatchNorm1d(in_channels * self.joints)
        self.blocks = nn.Sequential()
        channels = in_channels
        for number, (width, stride) in enumerate(zip(widths, strides)):
            self.blocks.append(
                SkeletonBlock(
                    channels,
                    width,
                    partition,
                    stride=stride,
                    kernel=kernel,
                    graph=graph,
                    dropout=dropout,
                    residual=number > 0,
                )
            )
            channels = width
        self.strides = tuple(strides)
        self.stride = math.prod(self.strides)
        self.out_features = channels

    def present(self, clips: Tensor) -> Bool[Tensor, "clips persons"]:
        """Which persons are in each clip."""
        five = self._with_persons(clips)
        return (five != 0).flatten(1, 3).any(1)

    def maps(
        self, clips: Tensor, present: Bool[Tensor, "clips persons"] | None = None
    ) -> Float[Tensor, "people width new_frames joints"]:
        """The last maps, before any mean, of every person: (clips x persons, width, frames / stride, joints), the persons of a clip together;
        0 for persons that are not there.

        Args:
            clips: (clips, channels, frames, joints) or (clips, channels, frames, joints, persons).
            present: which persons are there; `present(clips)` by default. Give it for streams of motion, in which one who stands still
                is 0, too.
        """
        five = self._with_persons(clips)
        people = five.permute(0, 4, 1, 2, 3).flatten(0, 1)
        here = self._presence(clips, present).flatten()
        if not bool(here.any()):
            frames = people.shape[2]
            for stride in self.strides:
                frames = -(-frames // stride)
            return people.new_zeros(len(people), self.out_features, frames, self.joints)
        if bool(here.all()):
            return self._network(people)
        found = self._network(people[here])
        out = found.new_zeros(len(people), *found.shape[1:])
        out[here] = found
        return out

    def forward(
        self, clips: Tensor, present: Bool[Tensor, "clips persons"] | None = None
    ) -> Float[Tensor, "clips width"]:
        """One vector for each clip.

        Args:
            clips: (clips, channels, frames, joints) or (clips, channels, frames, joints, persons).
            present: as for `maps`.
        """
        here = self._presence(clips, present)
        pooled = self.maps(clips, here).mean((2, 3)).view(*here.shape, self.out_features)
        return pooled.sum(1) / here.sum(1, keepdim=True).clamp_min(1).to(pooled.dtype)

    def _presence(self, clips: Tensor, present: Tensor | None) -> Tensor:
        if present is None:
            return self.present(clips)
        five = self._with_persons(clips)
        if present.shape != (len(five), five.shape[4]):
            raise ValueError(f"present must be {(len(five), five.shape[4])}, got {tuple(present.shape)}")
        return present

    def _network(self, people: Tensor) -> Tensor:
        # One normalisation for each channel of each joint, over clips and frames.
        flat = self.norm(people.transpose(2, 3).flatten(1, 2))
        return self.blocks(flat.unflatten(1, (self.in_channels, self.joints)).transpose(2, 3))

    def _with_persons(self, clips: Tensor) -> Tensor:
        if (
            clips.ndim not in (4, 5)
            or clips.shape[1] != self.in_channels
            or clips.shape[3] != self.joints
            or not clips.shape[2]
        ):
            raise ValueError(
                f"clips must be (clips, {self.in_channels} channels, frames, {self.joints} joints) or that with persons, "
                f"got {tuple(clips.shape)}"
            )
        return clips[..., None] if clips.ndim == 4 else clips


def masked_pool(
    maps: Float[Tensor, "batch channels *grid"], mask: Bool[Tensor, "*batch_and_grid"]
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]:
    """Mean of the maps inside a region, and outside of it; 0 where a region is empty.

    Args:
        maps: any grid of positions, say frames and joints.
        mask: bool, True inside: (grid) for all samples alike, or (batch, grid).

    Returns:
        Inside and outside, (batch, channels) each.

    Raises:
        ValueError: if the mask is of another shape.

    Examples:
        >>> inside, outside = masked_pool(
        ...     torch.arange(4.0).view(1, 1, 4), torch.tensor([True, True, False, False])
        ... )
        >>> inside, outside
        (tensor([[0.5000]]), tensor([[2.5000]]))
    """
    grid = maps.shape[2:]
    if mask.shape not in (grid, (len(maps), *grid)):
        raise ValueError(f"mask must be {tuple(grid)} or {(len(maps), *grid)}, got {tuple(mask.shape)}")
    # In full precision: sums and counts of large grids overflow float16.
    flat = full_precision(maps.flatten(2))
    inside = mask.expand(len(maps), *grid).flatten(1)[:, None]
    counts = inside.sum(2)
    # Products with the mask would carry a NaN or infinity from one region into the other.
    within = flat.masked_fill(~inside, 0).sum(2) / counts.clamp_min(1)
    without = flat.masked_fill(inside, 0).sum(2) / (flat.shape[2] - counts).clamp_min(1)
    return within.to(maps.dtype), without.to(maps.dtype)
