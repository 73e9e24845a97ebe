"""Networks that read a set of paired samples and give a quantile of what their mutual information may be."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.jepa.rank_gaussian import gaussian_copula_information, rank_gaussianise
from coloss.nn.set_attention import (
    InducedSetAttentionBlock,
    MultiheadAttentionBlock,
    MultiheadAttentionPooling,
    SetAttentionBlock,
)
from coloss.ops import without_autocast


class CellMIRegressor(nn.Module):
    """Attention over rows and over columns of two tables: the same answer for any order of samples, of columns, and of X and Y.

    Columns are rank-Gaussianised, and every number becomes a vector of its own (a cell). A cell looks at the cells of its row, half of the
    heads at those of its own table and half at those of the other, and, where `depth` > 1, at its column through a few learned points in
    between. Columns are pooled by attention over rows, look at each other in the same two ways, and are pooled again. The head also gets what
    correlations tell of the numbers and of their distances from the middle (|x| with y, x with |y|, |x| with |y|: trends that turn round, and common
    scales), the sizes of the tables, and the level; and the result is added to the information in the plain correlations:

        q(tau) = gaussian copula information + head(pooled, statistics, tau)

    So what it must learn is what correlations miss, and how sure one can be.

    Nothing depends on the number of columns or samples, so there is no largest table; beyond what it was trained on it extrapolates.

    Args:
        width: size of a cell's vector; divisible by `heads`.
        depth: times that rows are looked at, >= 1; columns are looked at in between.
        heads: attention heads, an even number.
        inducing: learned points through which a column is seen, >= 1.

    Attributes:
        sizes: the arguments, to build it again.

    Returns:
        From `forward(x, y, valid=None, tau=None)`, x (sets, samples, dim_x), y (sets, samples, dim_y), `valid` True for samples that are
        there, `tau` one level in [0, 1] for each set (None: the median): nats, one number for each set. It may be below 0.

    Raises:
        ValueError: for impossible sizes.

    Cost:
        O(samples * columns * (columns + inducing) * width) for each set and block.

    Source:
        The two-dimensional attention that MIST, arXiv 2511.18945, speaks of, in a form of ours; the statistics beside the samples, and
        telling the sides apart by who looks at whom, are ours as well.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> network = CellMIRegressor(width=16, depth=1, heads=2, inducing=4).eval()
        >>> x, y = torch.rand(5, 50, 2), torch.rand(5, 50, 3)
        >>> network(x, y).shape, torch.allclose(network(x, y), network(y.flip(2), x), atol=1e-5)
        (torch.Size([5]), True)
    """

    def __init__(self, width: int = 32, depth: int = 1, heads: int = 2, inducing: int = 8) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        if heads < 2 or heads % 2:
            raise ValueError(f"heads must be even, half for each side, got {heads}")
        self.heads = heads
        self.sizes = {"width": width, "depth": depth, "heads": heads, "inducing": inducing}
        self.cell = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.across = nn.ModuleList(
            MultiheadAttentionBlock(width, heads, mlp_ratio=1.0) for _ in range(depth)
        )
        self.down = nn.ModuleList(
            InducedSetAttentionBlock(width, heads, inducing, mlp_ratio=1.0) for _ in range(depth - 1)
        )
        self.column_pooling = MultiheadAttentionPooling(width, heads)
        self.columns = MultiheadAttentionBlock(width, heads)
        self.pooling = MultiheadAttentionPooling(width, heads)
        self.head = _QuantileHead(width)

    def forward(
        self,
        x: Float[Tensor, "sets samples dim_x"],
        y: Float[Tensor, "sets samples dim_y"],
        valid: Bool[Tensor, "sets samples"] | None = None,
        tau: Float[Tensor, " sets"] | None = None,
    ) -> Float[Tensor, " sets"]:
        x, y = rank_gaussianise(x, valid), rank_gaussianise(y, valid)
        values = torch.cat([x, y], 2)
        sets, samples, columns = values.shape
        cells = self.cell(torch.stack([values, values.square() - 1, values.abs()], -1).to(self.dtype))
        sides = self._sides(x.shape[2], y.shape[2])
        rows_there = None if valid is None else valid.repeat_interleave(columns, 0)
        for number, across in enumerate(self.across):
            if number > 0:
                by_column = self.down[number - 1](cells.transpose(1, 2).flatten(0, 1), rows_there)
                cells = by_column.unflatten(0, (sets, columns)).transpose(1, 2)
            rows = cells.flatten(0, 1)
            cells = across(rows, rows, sides).unflatten(0, (sets, samples))
        by_column = cells.transpose(1, 2).flatten(0, 1)
        pooled = self.column_pooling(by_column, rows_there).view(sets, columns, -1)
        pooled = self.pooling(self.columns(pooled, pooled, sides)).squeeze(1)
        return self.head(pooled, x, y, valid, tau)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.pooling.seeds.dtype

    def _sides(self, dim_x: int, dim_y: int) -> Tensor:
        """Who may look at whom: the first half of the heads at the own side, the second at the other."""
        side = torch.arange(dim_x + dim_y, device=self.pooling.seeds.device) < dim_x
        same = side == side.unsqueeze(1)
        return torch.stack([same, ~same]).repeat_interleave(self.heads // 2, 0).unsqueeze(0)


class SetMIRegressor(nn.Module):
    """The published layout: a sample is one padded row [x; y; 0 ...], and attention runs over samples alone.

    Rows -> perceptron -> set attention (quadratic in samples) -> induced set attention -> pooling to 10 vectors -> set attention ->
    pooling to one. The order of columns and of the sides matters, and nothing marks where X ends; `CellMIRegressor` is without either.
    Masks are explicit at every stage, and columns are rank-Gaussianised; so padding changes nothing, unlike in the released code.

    Args:
        max_dim: most columns of X and Y together.
        width: size of a row's vector; divisible by `heads`.
        heads: attention heads, >= 1.
        inducing: learned points of the induced blocks, >= 1.
        full, induced: number of quadratic and of induced blocks, >= 0.
        dropout: in the set blocks, in [0, 1).

    Returns:
        From `forward(x, y, valid=None, tau=None)`: as for `CellMIRegressor`.

    Raises:
        ValueError: for impossible sizes, and for more than `max_dim` columns: nothing is cut off silently.

    Cost:
        O(samples^2 * width) for each set, by the quadratic blocks.

    Source:
        MIST, arXiv 2511.18945; the statistics given to the head are ours, as in `CellMIRegressor`.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> network = SetMIRegressor(max_dim=8, width=16, heads=2, inducing=4).eval()
        >>> network(torch.rand(5, 50, 2), torch.rand(5, 50, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        max_dim: int = 64,
        width: int = 256,
        heads: int = 16,
        inducing: int = 32,
        *,
        full: int = 2,
        induced: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, least in (("max_dim", max_dim, 2), ("full", full, 0), ("induced", induced, 0)):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.max_dim = max_dim
        self.row = nn.Sequential(
            nn.Linear(max_dim, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, width)
        )
        blocks: list[nn.Module] = [SetAttentionBlock(width, heads, dropout=dropout) for _ in range(full)]
        for _ in range(induced):
            blocks.append(InducedSetAttentionBlock(width, heads, inducing, dropout=dropout))
        self.blocks = nn.ModuleList(blocks)
        self.pooling = MultiheadAttentionPooling(width, heads, 10)
        self.pooled, self.last_pooling = (
            SetAttentionBlock(width, heads),
            MultiheadAttentionPooling(width, heads),
        )
        self.head = _QuantileHead(width)

    def forward(
        self,
        x: Float[Tensor, "sets samples dim_x"],
        y: Float[Tensor, "sets samples dim_y"],
        valid: Bool[Tensor, "sets samples"] | None = None,
        tau: Float[Tensor, " sets"] | None = None,
    ) -> Float[Tensor, " sets"]:
        columns = x.shape[2] + y.shape[2]
        if columns > self.max_dim:
            raise ValueError(f"x and y must have at most max_dim = {self.max_dim} columns, got {columns}")
        x, y = rank_gaussianise(x, valid), rank_gaussianise(y, valid)
        rows = nn.functional.pad(torch.cat([x, y], 2), (0, self.max_dim - columns))
        rows = self.row(rows.to(self.pooling.seeds.dtype))
        for block in self.blocks:
            rows = block(rows, valid)
        pooled = self.last_pooling(self.pooled(self.pooling(rows, valid)))
        return self.head(pooled.squeeze(1), x, y, valid, tau)


class _QuantileHead(nn.Module):
    """A pooled set, what is known of it by formula, and a level as one quantile."""

    # Training ends here, and the log would run on.
    most_samples = 300

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width + 11, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU()
        )
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, pooled: Tensor, x: Tensor, y: Tensor, valid: Tensor | None, tau: Tensor | None
    ) -> Tensor:
        with without_autocast(x.device):
            anchor = gaussian_copula_information(x, y, valid)
            sizes = rank_gaussianise(x.abs(), valid), rank_gaussianise(y.abs(), valid)
            mixed = torch.stack(
                [
                    gaussian_copula_information(sizes[0], y, valid),
                    gaussian_copula_information(x, sizes[1], valid),
                ]
            )
            both = gaussian_copula_information(*sizes, valid)
        low, high = mixed.amin(0), mixed.amax(0)
        samples = x.shape[1] if valid is None else valid.sum(1)
        counts = torch.as_tensor(samples, dtype=anchor.dtype, device=anchor.device).expand(len(anchor))
        level = torch.full_like(anchor, 0.5) if tau is None else tau.to(anchor)
        dims = sorted((x.shape[2], y.shape[2]))
        known = torch.stack(
            [
                anchor,
                anchor.clamp(min=1e-4).sqrt(),
                low,
                high,
                both,
                counts.clamp(1, self.most_samples).log() - 4.5,
                torch.full_like(anchor, math.log(dims[0])),
                torch.full_like(anchor, math.log(dims[1])),
                2 * level - 1,
                # The logit of a level, bounded: where its ends need resolution.
                torch.logit(level, eps=0.005) / 3,
                (math.pi * level).cos(),
            ],
            1,
        )
        correction = self.last(self.layers(torch.cat([pooled, known.to(pooled)], 1))).squeeze(1)
        return anchor + correction.to(anchor)
