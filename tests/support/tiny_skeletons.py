"""What the tests of training without labels on skeletons share: a small encoder, one without batch norms, clips and views."""

import torch
from torch import Tensor, nn

from coloss.nn import SkeletonEncoder
from coloss.ops import graph_partition

PARENTS = (-1, 0, 1, 0)


def encoder() -> SkeletonEncoder:
    return SkeletonEncoder(graph_partition(PARENTS), widths=(4,), strides=(2,), kernel=3)


class Flat(nn.Module):
    """Clips to features without a batch norm, so that processes can be compared."""

    out_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 5)

    def forward(self, clips: Tensor) -> Tensor:
        return self.linear(clips.flatten(1)).tanh()


def shifted(clips: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.stack([clips, 0.8 * clips + 0.1])


def clips(count: int = 24, frames: int = 4) -> Tensor:
    return torch.randn(count, 3, frames, 4, generator=torch.Generator().manual_seed(0))
