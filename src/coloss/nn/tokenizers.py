"""Turns images, signals, tables and word ids into sequences of tokens with positions, for `TokenEncoder`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn.positions import PositionKind, PositionTable


class Tokenizer(nn.Module):
    """The base of every tokenizer; a subclass maps a batch to tokens of shape (batch, tokens, dim).

    A subclass defines `forward(inputs)`, which returns tokens with their positions added, and, where a batch
    holds samples of different length, `padding(inputs)`. Tokens begin at the scale of their positions: small
    with learned ones, which is what small networks learn fastest from, and near 1 with sine-cosine ones.

    Args:
        grid: number of tokens along each axis, for positions.
        dim: size of a token.
        positions: `"learned"`, `"sinusoidal"` or `None`.

    Attributes:
        grid: tokens along each axis.
        num_tokens: tokens of a sample (the most, where samples vary).
        dim: size of a token.
        positions: the `PositionTable`; `positions.table` is what a predictor of hidden tokens needs.

    Raises:
        ValueError: for an empty grid or `dim` below 1.

    Examples:
        >>> import torch
        >>> class Points(Tokenizer):
        ...     def __init__(self, dim):
        ...         super().__init__((100,), dim, positions=None)
        ...         self.project = torch.nn.Linear(3, dim)
        ...
        ...     def forward(self, points):
        ...         return self.positions(self.project(points))
        >>> Points(8)(torch.rand(2, 100, 3)).shape
        torch.Size([2, 100, 8])
    """

    def __init__(self, grid: Sequence[int], dim: int, positions: PositionKind = "learned") -> None:
        super().__init__()
        if not grid or min(grid) < 1:
            raise ValueError(f"a tokenizer must make at least one token along each axis, got {tuple(grid)}")
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        self.grid = tuple(grid)
        self.num_tokens = math.prod(grid)
        self.dim = dim
        self.positions = PositionTable(grid, dim, positions)

    def padding(self, inputs: Any) -> Bool[Tensor, "batch tokens"] | None:
        """True for each token that only fills up a shorter sample; `None` when no sample is short."""
        return None


class ImagePatches(Tokenizer):
    """One token for each square patch of an image: its pixels through a linear layer, plus a position.

    The same map as a convolution whose kernel and stride are the patch. Tokens are in row-major order.

    Args:
        image_size: height and width in pixels, or one number for both.
        patch_size: height and width of a patch, or one number for both; divides the image.
        in_channels: channels of an image.
        dim: size of a token.
        positions: `"learned"`, `"sinusoidal"` (over rows and columns; needs `dim` divisible by 4) or `None`.

    Attributes:
        grid: (rows, columns) of patches.
        projection: the linear layer, of `in_channels * patch height * patch width` inputs.

    Returns:
        From `forward`: (batch, rows * columns, dim). `patches` gives the raw values, (batch, tokens, values).

    Raises:
        ValueError: when patches do not divide the image, or for inputs of another shape.

    Source: Dosovitskiy et al. 2021, arXiv 2010.11929 section 3.1.

    Examples:
        >>> import torch
        >>> from coloss.nn import ImagePatches
        >>> tokenizer = ImagePatches(8, 2, in_channels=1, dim=32)
        >>> tokenizer(torch.rand(5, 1, 8, 8)).shape, tokenizer.grid
        (torch.Size([5, 16, 32]), (4, 4))
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_channels: int,
        dim: int,
        *,
        positions: PositionKind = "learned",
    ) -> None:
        image = (image_size, image_size) if isinstance(image_size, int) else image_size
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if min(patch) < 1 or image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(f"patch_size must divide image_size {image}, got {patch}")
        super().__init__((image[0] // patch[0], image[1] // patch[1]), dim, positions)
        self.shape = (in_channels, *image)
        self.patch_size = patch
        self.projection = _projection(in_channels * patch[0] * patch[1], dim, positions)

    def patches(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens values"]:
        """The values of each patch, channel by channel, row by row."""
        if tuple(images.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"images must have shape (batch, {expected}), got {tuple(images.shape)}")
        batch, channels = images.shape[:2]
        (rows, columns), (height, width) = self.grid, self.patch_size
        blocks = images.reshape(batch, channels, rows, height, columns, width)
        return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * height * width)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.positions(self.projection(self.patches(images)))


class SignalPatches(Tokenizer):
    """One token for each window of a series with one or more channels, plus its position in time.

    Args:
        length: time steps of the longest series.
        patch_size: time steps in a window; divides the length of every series.
        channels: values per time step.
        dim: size of a token.
        positions: `"learned"`, `"sinusoidal"` (needs an even `dim`) or `None`.

    Attributes:
        projection: the linear layer, of `channels * patch_size` inputs.

    Returns:
        From `forward`: (batch, length / patch_size, dim); a batch of shorter series gives fewer tokens,
        counted from the first position. `patches` gives the raw values.

    Raises:
        ValueError: when windows do not divide the length, for too long a series, or for other channels.

    Examples:
        >>> import torch
        >>> from coloss.nn import SignalPatches
        >>> tokenizer = SignalPatches(140, 10, channels=1, dim=32)
        >>> tokenizer(torch.rand(5, 1, 140)).shape, tokenizer(torch.rand(5, 1, 60)).shape
        (torch.Size([5, 14, 32]), torch.Size([5, 6, 32]))
    """

    def __init__(
        self,
        length: int,
        patch_size: int,
        channels: int,
        dim: int,
        *,
        positions: PositionKind = "learned",
    ) -> None:
        if patch_size < 1 or length % patch_size:
            raise ValueError(f"patch_size must divide length {length}, got {patch_size}")
        super().__init__((length // patch_size,), dim, positions)
        self.length = length
        self.patch_size = patch_size
        self.channels = channels
        self.projection = _projection(channels * patch_size, dim, positions)

    def patches(self, series: Float[Tensor, "batch channels length"]) -> Float[Tensor, "batch tokens values"]:
        """The values of each window, channel by channel."""
        batch, channels, length = series.shape
        if channels != self.channels:
            raise ValueError(f"series must have {self.channels} channels, got {channels}")
        if length > self.length or length % self.patch_size:
            raise ValueError(
                f"series must have a multiple of {self.patch_size} steps up to {self.length}, got {length}"
            )
        windows = series.reshape(batch, channels, length // self.patch_size, self.patch_size)
        return windows.transpose(1, 2).flatten(2)

    def forward(self, series: Float[Tensor, "batch channels length"]) -> Float[Tensor, "batch tokens dim"]:
        return self.positions(self.projection(self.patches(series)))


class TableColumns(Tokenizer):
    """One token for each column of a table, numeric columns first, then categorical ones.

    A numeric value `x` in column `j` becomes `x w_j + b_j`, a category `c` becomes `E_j[c] + b_j`, and a
    missing value becomes `m_j + b_j`, where `w_j`, `b_j`, `m_j` and the rows of `E_j` are learned vectors.
    Missing is NaN anywhere, and in a categorical column also any code below 0 (pandas writes -1) or at or
    above the column's cardinality (a category never seen in training).

    Args:
        numeric: number of numeric columns; scale them to about unit variance.
        categorical_cardinalities: number of categories of each categorical column, whose codes are 0, 1, ...
        dim: size of a token.
        positions: position vectors on top of `b_j`; `None`, `"learned"` or `"sinusoidal"`.

    Returns:
        From `forward`, for rows of shape (batch, columns), codes stored as floats: (batch, columns, dim).

    Raises:
        ValueError: for a table without columns, a cardinality below 1, or another number of columns.

    Source: Gorishniy et al. 2021, arXiv 2106.11959 section 3.3.

    Examples:
        >>> import torch
        >>> from coloss.nn import TableColumns
        >>> tokenizer = TableColumns(2, [3], dim=8)
        >>> tokenizer(torch.tensor([[0.5, float("nan"), 2.0]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        numeric: int,
        categorical_cardinalities: Sequence[int],
        dim: int,
        *,
        positions: PositionKind = None,
    ) -> None:
        cardinalities = tuple(categorical_cardinalities)
        columns = numeric + len(cardinalities)
        if numeric < 0 or columns < 1:
            raise ValueError(
                f"a table must have at least one column, got numeric={numeric} and no categories"
            )
        if any(cardinality < 1 for cardinality in cardinalities):
            raise ValueError(f"categorical_cardinalities must be >= 1, got {cardinalities}")
        super().__init__((columns,), dim, positions)
        std = _token_std(positions)
        self.numeric = numeric
        self.weight = _vectors(numeric, dim, std)
        self.categories = _vectors(sum(cardinalities), dim, std)
        self.missing = nn.Parameter(nn.init.trunc_normal_(torch.empty(columns, dim), std=std))
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(columns, dim), std=std))
        sizes = torch.tensor(cardinalities, dtype=torch.long)
        self.register_buffer("cardinalities", sizes, persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)

    cardinalities: Tensor
    offsets: Tensor

    def forward(self, rows: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch columns dim"]:
        if rows.shape[1] != self.num_tokens:
            raise ValueError(f"rows must have {self.num_tokens} columns, got {rows.shape[1]}")
        numbers, codes = rows[:, : self.numeric], rows[:, self.numeric :]
        missing = rows.isnan()
        missing[:, self.numeric :] |= (codes < 0) | (codes >= self.cardinalities)
        parts = []
        if self.weight is not None:
            # Zeros in place of NaN keep the gradient of the weight finite.
            parts.append(numbers.masked_fill(missing[:, : self.numeric], 0)[:, :, None] * self.weight)
        if self.categories is not None:
            indices = codes.masked_fill(missing[:, self.numeric :], 0).long() + self.offsets
            parts.append(self.categories[indices])
        values = torch.cat(parts, dim=1)
        return self.positions(torch.where(missing[:, :, None], self.missing, values) + self.bias)


class Words(Tokenizer):
    """One token for each word (or sub-word) id, plus its position in the text.

    Args:
        vocabulary_size: number of ids; ids are 0 .. vocabulary_size - 1.
        dim: size of a token.
        max_length: the longest text, in ids; shorter batches give fewer tokens.
        padding_id: the id that fills up shorter texts, which nothing attends to; `None` for none.
        positions: `"learned"`, `"sinusoidal"` or `None`.

    Attributes:
        embedding: `nn.Embedding`; a language model ties its output layer to `embedding.weight`.

    Returns:
        From `forward`, for ids of shape (batch, length): (batch, length, dim).

    Raises:
        ValueError: for an impossible size, a padding id outside the vocabulary, or too long a text.

    Examples:
        >>> import torch
        >>> from coloss.nn import Words
        >>> tokenizer = Words(100, 16, max_length=32)
        >>> ids = torch.tensor([[5, 8, 3], [7, 0, 0]])
        >>> tokenizer(ids).shape, tokenizer.padding(ids).tolist()
        (torch.Size([2, 3, 16]), [[False, False, False], [False, True, True]])
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int,
        max_length: int,
        padding_id: int | None = 0,
        *,
        positions: PositionKind = "learned",
    ) -> None:
        if vocabulary_size < 1:
            raise ValueError(f"vocabulary_size must be >= 1, got {vocabulary_size}")
        if padding_id is not None and not 0 <= padding_id < vocabulary_size:
            raise ValueError(f"padding_id must be in 0 .. {vocabulary_size - 1} or None, got {padding_id}")
        super().__init__((max_length,), dim, positions)
        self.padding_id = padding_id
        self.embedding = nn.Embedding(vocabulary_size, dim)
        nn.init.trunc_normal_(self.embedding.weight, std=_token_std(positions))

    def padding(self, ids: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length"] | None:
        """True where an id is `padding_id`; `None` when there is no such id."""
        return None if self.padding_id is None else ids == self.padding_id

    def forward(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        if ids.shape[1] > self.num_tokens:
            raise ValueError(f"texts must have at most {self.num_tokens} ids, got {ids.shape[1]}")
        return self.positions(self.embedding(ids))


def _vectors(count: int, dim: int, std: float) -> nn.Parameter | None:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(count, dim), std=std)) if count else None


def _projection(values: int, dim: int, positions: PositionKind) -> nn.Linear:
    # Values of unit variance give tokens of the scale of the positions, whatever the patch size.
    layer = nn.Linear(values, dim)
    nn.init.trunc_normal_(layer.weight, std=_token_std(positions) * values**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def _token_std(positions: PositionKind) -> float:
    # Level with the position vectors: learned ones begin at 0.02, sine-cosine ones have unit scale.
    return 1.0 if positions == "sinusoidal" else 0.02
