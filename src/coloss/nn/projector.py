"""The network between an encoder's features and a loss on embeddings; it exists in training only."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from coloss.nn.batch_norm import SyncBatchNorm1d


def projection_head(in_features: int, widths: Sequence[int]) -> nn.Sequential:
    """The network between features and the loss: linear, batch norm and ReLU for each hidden width, then linear alone.

    Batch norm takes its statistics over all processes.

    Args:
        in_features: length of a feature vector, >= 1.
        widths: of the hidden layers and, last, of the embeddings; at least one, each >= 1.

    Raises:
        ValueError: for no width or one below 1.

    Examples:
        >>> projection_head(64, (128, 16))[-1]
        Linear(in_features=128, out_features=16, bias=True)
    """
    if not widths or min(in_features, *widths) < 1:
        raise ValueError(f"widths must be at least one, each >= 1, got {in_features} -> {list(widths)}")
    layers: list[nn.Module] = []
    for before, after in pairwise([in_features, *widths[:-1]]):
        layers += [nn.Linear(before, after, bias=False), SyncBatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear([in_features, *widths][-2], widths[-1]))
