"""Turns vectors into entries of a learned table (VQ-VAE), the table following the vectors as a moving average; several levels if wanted.

Why not the package `vector-quantize-pytorch`, which does the same and much more: it draws its replacements for dead codes from torch's global
generator, and under several processes lets each draw from its own rows. Here every draw is a function of the saved state (a seed and the number
of batches seen), so a resumed run is the same to the bit, and processes that share a batch make the codebook of one process.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.ops.distributed import all_reduce_mean, gather_with_gradient, is_distributed, rank, world_size
from coloss.ops.gradients import straight_through
from coloss.ops.precision import without_autocast

Start = Literal["data", "normal"]

_DISTANCES = 1 << 24  # rows times codes that are compared at once


class Quantized(NamedTuple):
    """What a quantiser makes of vectors.

    Attributes:
        quantized: nearest codes, of the shape and type of the vectors, with the vectors' gradient (straight through); 0 at padding.
        indices: int64, number of each vector's code, -1 at padding. From `ResidualVectorQuantizer` a last dimension holds the levels,
            -1 also where a level was left out.
        commitment: mean squared difference between the numbers of a vector and of its code, whose gradient draws vectors to codes; the mean
            over levels that took part. In training it counts the vectors of all processes, as `coloss.ops.latent_prediction_loss` does; in
            evaluation mode each process counts its own.
        perplexity: exponential of the entropy of the codes' use in this batch, between 1 and the number of codes, 0 for no vectors; over
            processes as the commitment; one for each level from `ResidualVectorQuantizer`.
    """

    quantized: Tensor
    indices: Tensor
    commitment: Tensor
    perplexity: Tensor


class VectorQuantizerEMA(nn.Module):
    """The nearest of a table's codes for each vector; in training the codes follow the means of their vectors.

    With c_j vectors of a batch nearest to code z_j and s_j their sum, each forward pass in training mode gives the codes as they were, then

        N_j <- d N_j + (1 - d) c_j,    M_j <- d M_j + (1 - d) s_j,    z_j = M_j / N_j       decay d

    and every code with N_j below `reset_below` becomes a random vector of the batch (N_j = 1, M_j = that vector), another for each code; from
    a batch of fewer vectors than codes, one with noise of deviation 0.01 / sqrt(dim). Codes get no gradient. With d = 0 a pass is one step of
    k-means.

    Args:
        num_codes: entries of the table.
        dim: size of a vector.
        decay: d in [0, 1].
        reset_below: smallest N_j of a code that is kept, in [0, 1]; 0 keeps all. Above 1 a code would be replaced as soon as it is new.
        start: `"data"` takes the codes from the first batch in training, drawn as for a reset; `"normal"` leaves standard normal ones.
        seed: of the draws from batches.

    Attributes:
        codes: (num_codes, dim) buffer; `counts`, `sums`, `initialized` and `draws` are buffers, too.

    Returns:
        From `forward(inputs, valid=None, generator=None)`, for inputs (..., dim) and `valid` (...), False at padding: `Quantized`. The
        generator stands in for the seed. Padding, and vectors with NaN or infinity, never enter the codes; the latter do reach the
        commitment loss, which is then not finite, and their indices mean nothing.

    Raises:
        ValueError: for a size or a number out of range, or inputs of another width.

    Cost:
        O(vectors num_codes dim) time; memory of the vectors and of some 16 million distances. Under several processes all count and sum
        together, in the order in which `coloss.data.Loader` deals samples out. Codes and their statistics stay in float32 when the module
        is made in or cast to half precision, and under autocast. Each micro-batch of accumulated gradients is a batch of its own.

    Source:
        van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937, appendix A.1; reset as in Zhang et al. 2023 (T2M-GPT), arXiv 2301.06052.

    Examples:
        >>> quantizer = VectorQuantizerEMA(num_codes=4, dim=2, decay=0.9)
        >>> found = quantizer(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
        >>> found.indices.sort().values, found.perplexity, found.commitment
        (tensor([0, 1, 2, 3]), tensor(4.), tensor(0.))
        >>> quantizer.eval().lookup(found.indices).shape
        torch.Size([4, 2])
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor
    draws: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        decay: float = 0.99,
        reset_below: float = 1.0,
        *,
        start: Start = "data",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("num_codes", num_codes), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        if not 0 <= reset_below <= 1:
            raise ValueError(f"reset_below must be in [0, 1], got {reset_below}")
        if start not in get_args(Start):
            raise ValueError(f'start must be "data" or "normal", got {start!r}')
        self.num_codes, self.dim, self.decay, self.reset_below = num_codes, dim, decay, reset_below
        self.seed = seed
        # The averages' steps are finer than half precision's digits, which may be the default where a model is made.
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        codes = torch.randn(num_codes, dim, dtype=wide)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(num_codes, dtype=wide))
        self.register_buffer("sums", codes.clone())
        self.register_buffer("initialized", torch.tensor(start == "normal"))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        inputs: Float[Tensor, "*batch dim"],
        valid: Bool[Tensor, "*batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        _check_inputs(inputs, valid, self.dim)
        with without_autocast(inputs.device):
            rows = inputs.flatten(0, -2).to(self.codes.dtype) if inputs.ndim > 1 else inputs[None]
            there = rows.new_ones(len(rows), dtype=torch.bool) if valid is None else valid.reshape(-1)
            batch = None
            if self.training:
                batch = _Batch(rows.detach(), there, inputs, generator or self._generator())
                self._initialize(batch)
            indices = self._nearest(rows.detach())
            codes = self.codes[indices]
            # Chosen, not multiplied: padding must not reach the gradient as 0 * NaN.
            apart = torch.where(there[:, None], rows - codes, 0.0)
            vectors, counts = there.sum().to(rows.dtype), _counts(indices[there], self.codes)
            if batch is not None:
                vectors = all_reduce_mean(vectors)
                counts = self._update(batch, indices)
            commitment = apart.square().sum() / (vectors.clamp(min=1 / world_size()) * self.dim)
            hard = torch.where(there[:, None], codes, 0.0).to(inputs.dtype)
            soft = torch.where(there[:, None], rows, 0.0).to(inputs.dtype)
            return Quantized(
                straight_through(hard, soft).view_as(inputs),
                torch.where(there, indices, -1).view(inputs.shape[:-1]),
                commitment,
                _perplexity(counts),
            )

    def lookup(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """The codes of these numbers; zeros for -1.

        Raises:
            ValueError: for a number outside [-1, num_codes).
        """
        if indices.numel() and not (int(indices.min()) >= -1 and int(indices.max()) < self.num_codes):
            raise ValueError(
                f"indices must be in [-1, {self.num_codes}), got {int(indices.min())} to {int(indices.max())}"
            )
        return torch.where(indices[..., None] >= 0, self.codes[indices.clamp(min=0)], 0.0)

    @torch.no_grad()
    def nearest(self, inputs: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        """Number of each vector's nearest code, of equally near ones the first; nothing is updated.

        Raises:
            ValueError: for inputs of another width, or that are not finite.
        """
        _check_inputs(inputs, None, self.dim)
        if not bool(inputs.isfinite().all()):
            raise ValueError("inputs must be finite, got NaN or infinity")
        with without_autocast(inputs.device):
            rows = inputs.reshape(-1, self.dim).to(self.codes.dtype)
            return self._nearest(rows).view(inputs.shape[:-1])

    def _nearest(self, rows: Tensor) -> Tensor:
        # About their own centre the codes' products are smallest, and so is the rounding in them.
        centre = self.codes.mean(0)
        codes = self.codes - centre
        lengths = codes.square().sum(1) / 2
        parts = rows.split(max(_DISTANCES // self.num_codes, 1))
        return torch.cat([torch.addmm(lengths, part - centre, codes.T, alpha=-1).argmin(1) for part in parts])

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + int(self.draws))

    @torch.no_grad()
    def _initialize(self, batch: "_Batch") -> None:
        self.draws += 1
        if bool(self.initialized) or not batch.count:
            return
        self.codes.copy_(batch.draw(self.num_codes))
        self.sums.copy_(self.codes)
        self.counts.fill_(1)
        self.initialized.fill_(True)

    @torch.no_grad()
    def _update(self, batch: "_Batch", indices: Tensor) -> Tensor:
        """Move the codes; give back how often each was used."""
        used = indices[batch.kept]
        counts, sums = _counts(used, self.codes), torch.zeros_like(self.sums)
        sums.index_add_(0, used, batch.rows)
        if is_distributed():
            joined = all_reduce_mean(torch.cat([counts[:, None], sums], 1)) * world_size()
            counts, sums = joined[:, 0], joined[:, 1:]
        if not batch.count:
            return counts
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        moved = ((counts > 0) & (self.counts > 0))[:, None]
        self.codes.copy_(torch.where(moved, self.sums / self.counts[:, None], self.codes))
        dead = self.counts < self.reset_below
        if bool(dead.any()):
            drawn = batch.draw(self.num_codes)
            self.codes.copy_(torch.where(dead[:, None], drawn, self.codes))
            self.sums.copy_(torch.where(dead[:, None], drawn, self.sums))
            self.counts.masked_fill_(dead, 1.0)
        return counts

    def _apply(self, fn: Any, recurse: bool = True) -> "VectorQuantizerEMA":
        # A cast to half precision would freeze the averages: their steps are finer than its digits.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.is_floating_point() and moved.element_size() < 4 <= tensor.element_size()
            return tensor.to(moved.device) if half else moved

        return super()._apply(move, recurse)


class ResidualVectorQuantizer(nn.Module):
    """Several codebooks, each for what those before it left over; the code of a vector is the sum over levels.

        r_1 = m,    z_l = nearest code of level l to r_l,    r_{l+1} = r_l - z_l,    quantised m = sum_l z_l

    In training, with probability `dropout` only the first levels take part, a number of them drawn evenly from 1 to all: then few levels
    suffice for a coarse result.

    Args:
        num_codes: entries of each level's table.
        dim: size of a vector.
        levels: number of tables, >= 1.
        dropout: probability in [0, 1].
        decay, reset_below, start: of each level, see `VectorQuantizerEMA`.
        seed: of all draws.

    Attributes:
        levels: `nn.ModuleList` of `VectorQuantizerEMA`.

    Returns:
        From `forward(inputs, valid=None, generator=None)`: `Quantized`, with a dimension of levels last in `indices` and in
        `perplexity`. The gradient passes once, not once for each level.

    Raises:
        ValueError: for a number out of range.

    Source:
        Zeghidour et al. 2021 (SoundStream), arXiv 2107.03312; Guo et al. 2024 (MoMask), arXiv 2312.00063, for the dropout of levels.

    Examples:
        >>> quantizer = ResidualVectorQuantizer(num_codes=8, dim=4, levels=3).eval()
        >>> found = quantizer(torch.randn(2, 5, 4))
        >>> found.indices.shape, torch.equal(quantizer.lookup(found.indices), found.quantized)
        (torch.Size([2, 5, 3]), True)
    """

    draws: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        levels: int = 3,
        *,
        dropout: float = 0.2,
        decay: float = 0.99,
        reset_below: float = 1.0,
        start: Start = "data",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels must be >= 1, got {levels}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        self.dim, self.num_codes, self.dropout, self.seed = dim, num_codes, dropout, seed
        self.levels = nn.ModuleList(
            VectorQuantizerEMA(
                num_codes, dim, decay, reset_below, start=start, seed=(seed + 1) * 1009 + level
            )
            for level in range(levels)
        )
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        inputs: Float[Tensor, "*batch dim"],
        valid: Bool[Tensor, "*batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        _check_inputs(inputs, valid, self.dim)
        active = self._active(generator)
        with without_autocast(inputs.device):
            rows = left = inputs.to(self._first.codes.dtype)
            found: list[Quantized] = []
            total = torch.zeros_like(left)
            for level in list(self.levels)[:active]:
                found.append(level(left, valid, generator))
                code = found[-1].quantized.detach()
                left, total = left - code, total + code
            missing = len(self.levels) - active
            soft = rows if valid is None else torch.where(valid[..., None], rows, 0.0)
            none = torch.full_like(found[0].indices, -1)
            return Quantized(
                straight_through(total.to(inputs.dtype), soft.to(inputs.dtype)),
                torch.stack([*(one.indices for one in found), *[none] * missing], -1),
                torch.stack([one.commitment for one in found]).mean(),
                torch.stack(
                    [*(one.perplexity for one in found), *[torch.zeros_like(found[0].perplexity)] * missing]
                ),
            )

    def lookup(self, indices: Int[Tensor, "*batch levels"]) -> Float[Tensor, "*batch dim"]:
        """The sum of the codes of these numbers over levels; -1 adds nothing.

        Raises:
            ValueError: for another number of levels, or a number outside [-1, num_codes).
        """
        if indices.shape[-1] != len(self.levels):
            raise ValueError(f"indices must have {len(self.levels)} levels last, got {tuple(indices.shape)}")
        codes = [level.lookup(indices[..., n]) for n, level in enumerate(self.levels)]  # type: ignore[operator]
        return sum(codes[1:], codes[0])

    @property
    def _first(self) -> VectorQuantizerEMA:
        level = self.levels[0]
        assert isinstance(level, VectorQuantizerEMA)
        return level

    def _active(self, generator: torch.Generator | None) -> int:
        if not self.training:
            return len(self.levels)
        if generator is None:
            generator = torch.Generator().manual_seed((self.seed + 1) * 7_368_787 + int(self.draws))
        self.draws += 1
        drawn = torch.rand(2, generator=generator, device=generator.device).tolist()
        return 1 + int(drawn[1] * len(self.levels)) if drawn[0] < self.dropout else len(self.levels)


class _Batch:
    """The vectors of all processes that may enter a codebook, to draw from."""

    def __init__(self, rows: Tensor, there: Tensor, inputs: Tensor, generator: torch.Generator) -> None:
        self.kept = (there & rows.isfinite().all(1)).nonzero().squeeze(1)
        self.rows, self.generator, self.keys = rows[self.kept], generator, None
        self.count = len(self.rows)
        if is_distributed():
            # Processes take turns in dealing out a batch: sample i of rank r is number i * processes + r of it.
            per_sample = max(rows.shape[0] // max(inputs.shape[0], 1), 1) if inputs.ndim > 1 else 1
            sample = torch.div(self.kept, per_sample, rounding_mode="floor") * world_size() + rank()
            self.keys = (sample << 32) + self.kept % per_sample
            self.all_keys = gather_with_gradient(self.keys).sort().values
            self.count = len(self.all_keys)

    def draw(self, number: int) -> Tensor:
        """Random rows in random order, different ones where there are enough, else with a little noise."""
        device, generator = self.generator.device, self.generator
        order = torch.randperm(self.count, generator=generator, device=device).to(self.rows.device)
        picks = order.repeat(math.ceil(number / self.count))[:number]  # too few are repeated
        if self.keys is None:
            drawn = self.rows[picks]
        else:
            wanted = self.all_keys[picks]
            places = torch.searchsorted(self.keys, wanted).clamp(max=max(len(self.keys) - 1, 0))
            drawn = self.rows.new_zeros(number, self.rows.shape[1])
            if len(self.keys):
                own = self.keys[places] == wanted
                drawn = torch.where(own[:, None], self.rows[places], drawn)
            drawn = all_reduce_mean(drawn) * world_size()
        if self.count < number:
            noise = torch.randn(drawn.shape, generator=generator, device=device).to(drawn)
            drawn = drawn + 0.01 * drawn.shape[1] ** -0.5 * noise
        return drawn


def _counts(indices: Tensor, codes: Tensor) -> Tensor:
    return torch.bincount(indices, minlength=len(codes)).to(codes.dtype)


def _perplexity(counts: Tensor) -> Tensor:
    total = counts.sum()
    entropy = torch.special.entr(counts / total.clamp(min=1)).sum()
    return torch.where(total > 0, entropy.exp(), 0.0)


def _check_inputs(inputs: Tensor, valid: Tensor | None, dim: int) -> None:
    if not inputs.ndim or inputs.shape[-1] != dim:
        raise ValueError(f"inputs must have width {dim}, got shape {tuple(inputs.shape)}")
    if valid is not None and valid.shape != inputs.shape[:-1]:
        raise ValueError(f"valid must have shape {tuple(inputs.shape[:-1])}, got {tuple(valid.shape)}")
