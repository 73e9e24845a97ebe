"""The same walks over scores and frequencies by Triton kernels, where these take the case; by tiles of PyTorch elsewhere.

Kernels serve float32 tensors on CUDA devices where Triton can be imported, as it can with CUDA builds of PyTorch on Linux; coloss does not
depend on it, and it is imported at the first such call. A tile size given by the caller, few scores (kept for the backward pass),
listed or dense masks and other types take the tiles.

The kernels have been checked in Triton's interpreter and compiled for compute capabilities 8.0 and 9.0; they have never yet run on a
GPU, so nothing is known of their speed.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import score_tiles
from ..frequencies import FrequencyWalk
from ..score_tiles import Softmax, Tiles

MOST_DIMENSIONS = 512
MOST_FREQUENCIES = 64


def logsumexps(tiles: Tiles, columns: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `score_tiles.logsumexps`; kernels keep no tile."""
    if not takes(tiles):
        return score_tiles.logsumexps(tiles, columns)
    from . import scores

    return *scores.logsumexps(tiles, columns), None


def add_softmax_slopes(
    tiles: Tiles,
    rows: Softmax,
    columns: Softmax | None,
    for_x: Tensor,
    for_y: Tensor | None,
    kept: Tensor | None = None,
) -> None:
    """As `score_tiles.add_softmax_slopes`."""
    if kept is not None or not takes(tiles):
        score_tiles.add_softmax_slopes(tiles, rows, columns, for_x, for_y, kept)
        return
    from . import scores

    scores.add_softmax_slopes(tiles, rows, columns, for_x, for_y)


def margin_sum(
    tiles: Tiles, function: str, for_x: Tensor | None, for_y: Tensor | None, mutual: bool = False
) -> tuple[Tensor, Tensor]:
    """As `score_tiles.margin_sum`."""
    if not takes(tiles):
        return score_tiles.margin_sum(tiles, function, for_x, for_y, mutual)
    from . import scores

    return scores.margin_sum(tiles, function, for_x, for_y, mutual)


def frequency_walk(like: Tensor, samples: int, step: float, steps: int) -> FrequencyWalk:
    """Sums and slopes of rows of angles, see `coloss.ops.frequencies`."""
    if not (_ready(like) and steps <= MOST_FREQUENCIES):
        return FrequencyWalk(like, samples, step, steps)
    from .slices import KernelWalk

    return KernelWalk(like, samples, step, steps)


def takes(tiles: Tiles) -> bool:
    """Whether kernels serve these scores."""
    mask, columns = tiles.mask, tiles.columns
    plain = tiles.side is None and mask.ignore is None and mask.pairs is None
    size = 0 < tiles.x.shape[1] <= MOST_DIMENSIONS and len(tiles.x) > 0 and len(columns) > 0
    return plain and size and columns.dtype == tiles.x.dtype and _ready(tiles.x)


def _ready(x: Tensor) -> bool:
    return x.dtype == torch.float32 and _device_is_served(x.device) and _triton_is_installed()


@cache
def _device_is_served(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
