"""A small token encoder that fits the shape of the data at hand."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from coloss.nn.positions import PositionKind
from coloss.nn.token_encoder import TokenEncoder
from coloss.nn.tokenizers import ImagePatches, SignalPatches, TableColumns, Tokenizer


def token_encoder_for_shape(
    shape: Sequence[int],
    *,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    patch_size: int | None = None,
    categorical_cardinalities: Sequence[int] = (),
    positions: PositionKind = "sinusoidal",
    registers: int = 0,
    pool: Literal["mean", "cls", "none"] = "mean",
    mlp_ratio: float = 4.0,
    dropout: float = 0.0,
) -> TokenEncoder:
    """A `TokenEncoder` for images (channels, height, width), series (channels, steps) or table rows (columns,).

    Args:
        shape: of one sample, without the batch.
        dim, depth, heads, registers, pool, mlp_ratio, dropout: as for `TokenEncoder`.
        patch_size: side of an image patch, or steps of a window. None for the smallest from 2 on that divides the sample and makes at
            most 64 tokens of it.
        categorical_cardinalities: for table rows: categories of each of the last columns; the ones before are numeric.
        positions: as for the tokenizers. Columns get them on top of a learned vector of their own.

    Returns:
        An untrained encoder, its weights drawn from torch's global generator.

    Raises:
        ValueError: for a shape of another kind, or one that no patch size divides into at least two tokens.

    Examples:
        >>> for shape in ((1, 28, 28), (3, 140), (30,)):
        ...     token_encoder_for_shape(shape).tokenizer.grid
        (7, 7)
        (35,)
        (30,)
    """
    tokenizer: Tokenizer
    if len(shape) == 1:
        numeric = shape[0] - len(categorical_cardinalities)
        tokenizer = TableColumns(numeric, categorical_cardinalities, dim, positions=positions)
    elif categorical_cardinalities:
        raise ValueError(f"categorical_cardinalities must be empty for samples of shape {tuple(shape)}")
    elif len(shape) == 2:
        size = _patch_size(shape[1:]) if patch_size is None else patch_size
        tokenizer = SignalPatches(shape[1], size, shape[0], dim, positions=positions)
    elif len(shape) == 3:
        size = _patch_size(shape[1:]) if patch_size is None else patch_size
        tokenizer = ImagePatches((shape[1], shape[2]), size, shape[0], dim, positions=positions)
    else:
        raise ValueError(
            f"shape must be (columns,), (channels, steps) or (channels, height, width), got {tuple(shape)}"
        )
    return TokenEncoder(
        tokenizer, dim, depth, heads, registers=registers, pool=pool, mlp_ratio=mlp_ratio, dropout=dropout
    )


def token_backbone(splits: Any) -> TokenEncoder:
    """A small token encoder for the data of a task, in place of its default model: `coloss compare ... --model coloss.nn:token_backbone`.

    Args:
        splits: data with an `input_shape`, such as `coloss.data.Splits`.

    Examples:
        >>> from types import SimpleNamespace
        >>> token_backbone(SimpleNamespace(input_shape=(1, 8, 8))).out_features
        32
    """
    return token_encoder_for_shape(splits.input_shape, dim=32)


def _patch_size(sides: Sequence[int]) -> int:
    for size in range(2, max(sides)):
        tokens = math.prod(side // size for side in sides)
        if all(side % size == 0 for side in sides) and 2 <= tokens <= 64:
            return size
    raise ValueError(
        f"shape must be divisible into 2 to 64 patches, got {tuple(sides)}: give patch_size, or crop"
    )
