"""One encoder for each stream of a skeleton (joints, bones, their motion), side by side in one network that takes joints."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import skeleton_streams
from coloss.errors import InputError
from coloss.nn import SkeletonEncoder, projection_head

STREAMS = ("joint", "bone", "motion", "bone_motion")
"""The streams of `coloss.data.skeleton_streams`."""


class StreamEncoder(nn.Module):
    """Features of several streams of the same clip, each by an encoder of its own, one behind the other.

    Args:
        encoder: takes clips (clips, channels, frames, joints[, persons]) and gives (clips, width). It serves the first stream; the others
            get copies of it, which begin with the same weights and see other numbers. A `coloss.nn.SkeletonEncoder` is told who is present
            by the joints, also in streams of motion.
        streams: names of `coloss.data.skeleton_streams`, distinct, at least one.
        parents: of each joint, -1 at the root.
        width: length of the encoder's feature vectors, where it has no `out_features`.

    Attributes:
        encoders: by stream.
        out_features: of all streams together.

    Raises:
        InputError: for unknown or repeated streams, or an encoder of unknown width.

    Cost:
        That of the encoder once for each stream.

    Examples:
        >>> from coloss.nn import SkeletonEncoder
        >>> from coloss.ops import graph_partition
        >>> parents = [-1, 0, 1]
        >>> model = StreamEncoder(SkeletonEncoder(graph_partition(parents)), ("joint", "bone"), parents)
        >>> model(torch.rand(5, 3, 8, 3)).shape
        torch.Size([5, 128])
    """

    def __init__(
        self, encoder: nn.Module, streams: Sequence[str], parents: Sequence[int], width: int | None = None
    ) -> None:
        super().__init__()
        check_streams(streams)
        width = width if width is not None else getattr(encoder, "out_features", None)
        if not isinstance(width, int):
            raise InputError(
                f"{type(encoder).__name__} does not declare the width of its features: give width"
            )
        self.streams, self.parents = tuple(streams), tuple(parents)
        self.encoders = nn.ModuleDict(
            {stream: copy.deepcopy(encoder) if number else encoder for number, stream in enumerate(streams)}
        )
        self.out_features = width * len(self.streams)

    def forward(
        self, clips: Float[Tensor, "clips channels frames joints *persons"]
    ) -> Float[Tensor, "clips features"]:
        found = skeleton_streams(clips, self.parents)
        features = []
        for stream in self.streams:
            encoder = self.encoders[stream]
            if isinstance(encoder, SkeletonEncoder):
                # Who stands still is 0 in a stream of motion, and there all the same.
                features.append(encoder(found[stream], encoder.present(clips)))
            else:
                features.append(encoder(found[stream]))
        return torch.cat(features, 1)


class StreamHeads(nn.Module):
    """A projection head for each stream, on features that hold one stream behind the other.

    Args:
        streams: number of streams, >= 1.
        in_features: of one stream.
        widths: of the hidden layers and, last, of the embeddings (see `coloss.nn.projection_head`).

    Returns:
        From `forward`, for (rows, streams x in_features): (rows, streams, widths[-1]).

    Examples:
        >>> StreamHeads(3, 8, (16, 4))(torch.rand(5, 24)).shape
        torch.Size([5, 3, 4])
    """

    def __init__(self, streams: int, in_features: int, widths: Sequence[int]) -> None:
        super().__init__()
        if streams < 1:
            raise ValueError(f"streams must be >= 1, got {streams}")
        self.heads = nn.ModuleList([projection_head(in_features, widths) for _ in range(streams)])

    def forward(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows streams dim"]:
        parts = features.chunk(len(self.heads), 1)
        return torch.stack([head(part) for head, part in zip(self.heads, parts, strict=True)], 1)


def check_streams(streams: Sequence[str]) -> None:
    """Refuse streams that do not exist, or twice the same.

    Raises:
        InputError: for them.

    Examples:
        >>> check_streams(["joint", "bones"])
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: streams must be distinct ones of joint, bone, motion, bone_motion, at least one, got ['joint', 'bones']
    """
    if not streams or len(set(streams)) != len(streams) or not set(streams) <= set(STREAMS):
        raise InputError(
            f"streams must be distinct ones of {', '.join(STREAMS)}, at least one, got {list(streams)}"
        )
