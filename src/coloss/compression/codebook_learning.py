"""Learns a layer's codes and tables together, so that the layer's output stays what it was.

    min over I, C   || W x - C[I] x_q ||^2

The error is a quadratic form of the weight, so every step has its exact value over all calibration inputs (`OutputMoments`). Codes are chosen by
logits M, which begin at -(w - c_k)^2 / h^2 with h the mean gap of neighbouring codewords: at first each weight's nearest codeword leads. With
s = softmax(M / T), T falling, c_j the codeword of the largest logit, and g the error's gradient by the weight:

    gradient       weight in the error     dM_k                          dC_k
    soft           sum_k s_k c_k           g s_k (c_k - weight) / T      sum g s_k
    proximal       c_j                     g s_k phi(c_k - c_j)          sum g over weights with code k
    ste_nearest    nearest codeword        (of a latent weight:) g       sum g over weights with code k

phi shrinks with distance, see `coloss.ops.proximal_code_weights`. Both are followed by Adam with one second moment for all logits of the layer:
with one for each logit, as usual, every logit moves as fast as every other, and neither rule's weights would mean anything.

Codes of the least error met on the way are kept; their tables are then solved by least squares and rounded to float16.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coloss.compression.code_search import CodeLogits, LatentWeights
from coloss.compression.code_search import CodeSearch as CodeSearch
from coloss.compression.codebook import Codebook, check_weight, kmeans_codebook
from coloss.compression.layer_reconstruction import OutputMoments, check_kind
from coloss.errors import InputError
from coloss.ops.precision import full_precision, without_autocast

_LOOK_EVERY = 10
_WARM, _COLD = 1.0, 0.02


@dataclass(frozen=True)
class LearnedCodebook:
    """A codebook, and what learning it changed.

    Attributes:
        codebook: as it ships.
        kmeans_error: squared error of the layer's output over its squared size, with the tables and codes that learning began with.
        table_error: with those codes, and tables solved by least squares.
        error: of the codebook.
        changed: share of the weights whose code is another one than at first.
        jump: how many places of the table those codes moved, on average; 0 where none did.
    """

    codebook: Codebook
    kmeans_error: float
    table_error: float
    error: float
    changed: float
    jump: float


def learn_codebook(
    layer: nn.Module,
    inputs: Tensor | OutputMoments,
    targets: Tensor | None = None,
    *,
    bits: int = 2,
    groups: int = 1,
    scale_per_group: bool = False,
    search: CodeSearch | None = None,
) -> LearnedCodebook:
    """Codes and tables with which a layer's output is closest to what it should be.

    Args:
        layer: linear layer or convolution; left as it is.
        inputs: what it reads, or the moments of that (`OutputMoments`).
        targets: what it should give for them, bias included; None: what it gives now. Not with moments.
        bits, groups, scale_per_group: as for `kmeans_codebook`, which learning begins with.
        search: how; None: `CodeSearch()`.

    Returns:
        The codebook, with an error no larger than that of its beginning, tables in float16 included.

    Raises:
        InputError: for another kind of layer, targets or moments that do not fit, inputs or weights that are not finite, or values out of
            range.

    Cost: for each step a product of the weight with its inputs' second moments, and K numbers for each weight; for the tables K^2 products of
        rows, twice.

    Examples:
        >>> layer = nn.Linear(32, 16)
        >>> inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 4)
        >>> found = learn_codebook(layer, inputs, bits=2)
        >>> found.error < 0.5 * found.kmeans_error, found.codebook.nbits()
        (True, 1088)
    """
    search = search or CodeSearch()
    check_kind(layer)
    weight: Any = layer.weight
    check_weight(weight)
    with without_autocast(weight.device), torch.no_grad():
        if isinstance(inputs, Tensor):
            # Under autocast inputs may be of another type than the layer's.
            targets = layer(inputs.to(weight.dtype)) if targets is None else targets
            moments = OutputMoments.of(layer, inputs, targets)
        elif targets is not None:
            raise InputError("targets must be None with moments, which hold them already")
        else:
            moments = inputs
        moments.check_layer(layer)
        if moments.count == 0:
            raise InputError("inputs must hold at least one sample, got none")
        start = kmeans_codebook(weight.detach(), bits, groups, scale_per_group=scale_per_group)
        return _Learner(start, full_precision(weight.detach()).flatten(1), moments, search).run()


class _Learner:
    """One layer's codes and tables while they are learned. Rows are in the order of the weight."""

    def __init__(self, start: Codebook, rows: Tensor, moments: OutputMoments, search: CodeSearch) -> None:
        self.start, self.rows, self.moments, self.search = start, rows, moments, search
        self.group = start.group_of_row()
        self.first = start.row_codes().flatten(1).long()
        self.table = start.table.to(rows.dtype)
        self.scales = torch.ones(start.groups, dtype=rows.dtype, device=rows.device)
        if start.scales is not None:
            self.scales = start.scales.to(rows.dtype)
        gap = (self.table[:, -1:] - self.table[:, :1]) / max(self.table.shape[1] - 1, 1)
        # A table of one value has no gap; what is learned there does not matter, as long as it is finite.
        self.gap = gap.where(gap > 0, 1.0)

    def run(self) -> LearnedCodebook:
        candidates = [self._rounded(self.first, self.table)]
        if self.search.steps:
            candidates.append(self._rounded(*self._descend()))
        # The beginning itself is a candidate: rounding of solved tables may cost more than they gain.
        candidates.append((self.first, self.table))
        errors = [self._error(*candidate) for candidate in candidates]
        error = min(errors)
        codes, table = candidates[errors.index(error)]
        apart = (codes - self.first).abs()
        moved = apart > 0
        codebook = Codebook.of(
            codes.to(torch.uint8).reshape(self.start.codes.shape),
            table,
            self.group,
            scales=self.start.scales,
            dtype=self.start.dtype,
        )
        return LearnedCodebook(
            codebook,
            errors[-1],
            errors[0],
            error,
            float(moved.float().mean()),
            float(apart[moved].float().mean()) if moved.any() else 0.0,
        )

    def _tables(self, table: Tensor) -> Tensor:
        return self.scales[:, None] * table

    def _weight(self, codes: Tensor, table: Tensor) -> Tensor:
        return self._tables(table)[self.group].gather(1, codes)

    def _error(self, codes: Tensor, table: Tensor) -> float:
        return self.moments.relative_error(self._weight(codes, table))

    def _descend(self) -> tuple[Tensor, Tensor]:
        """Codes and table of the least error on the way."""
        search, rows, dtype = self.search, self.rows, self.rows.dtype
        gram = (self.moments.gram / self.moments.count).to(dtype)
        cross = (self.moments.cross / self.moments.count).to(dtype)
        size = gram.diagonal(dim1=1, dim2=2).mean()
        slope = 2 / size.where(size > 0, 1.0)
        table = self.table.clone()
        row_gap = self._tables(self.gap.expand(len(table), 1))[self.group]
        latent = search.gradient == "ste_nearest"
        mapping: LatentWeights | CodeLogits
        mapping = (
            LatentWeights(rows, row_gap)
            if latent
            else CodeLogits(self.first, rows, self._tables(table)[self.group], row_gap, search)
        )
        code_steps, table_steps = _Adam(mapping.values), _Adam(table, each=True)
        least, best = math.inf, (self.first, table.clone())
        for step in range(search.steps + 1):
            if step % _LOOK_EVERY == 0 or step == search.steps:
                codes = mapping.codes(self._tables(table)[self.group])
                error = self._error(codes, table)
                if error < least:
                    least, best = error, (codes, table.clone())
            if step == search.steps:
                break
            with torch.enable_grad():
                leaf, values = table.detach().requires_grad_(), mapping.values.detach().requires_grad_()
                temperature = _WARM * (_COLD / _WARM) ** (step / search.steps)
                weight = mapping.look_up(values, self._tables(leaf)[self.group], temperature)
            gradient = slope * (weight.detach().reshape(cross.shape) @ gram - cross).reshape(rows.shape)
            to_values, to_table = torch.autograd.grad(weight, [values, leaf], gradient)
            left = 1 - step / search.steps
            mapping.move(code_steps.direction(to_values), left * search.rate)
            table -= left * search.table_rate * self.gap * table_steps.direction(to_table)
            if bool((table.diff(dim=1) < 0).any()):
                order = table.argsort(dim=1, stable=True)
                table = table.gather(1, order)
                table_steps.mean = table_steps.mean.gather(1, order)
                table_steps.square = table_steps.square.gather(1, order)
                code_steps.mean = mapping.reorder(order[self._owner()], code_steps.mean)
            if isinstance(mapping, CodeLogits):
                code_steps.mean = mapping.recentre(self._tables(table)[self.group], code_steps.mean)
        return best

    def _rounded(self, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Best table for these codes, in float16, rising; codewords that nothing uses split the largest cluster."""
        codes = self._revived(codes, table)
        table = self._solved(codes, table).clamp(-65504.0, 65504.0).half().to(self.rows.dtype)
        order = table.argsort(dim=1, stable=True)
        rank = order.argsort(1)[self._owner()]
        return rank.gather(1, codes), table.gather(1, order)

    def _owner(self) -> Tensor:
        """Row of the table that each row of the weight reads."""
        return self.group if len(self.table) > 1 else torch.zeros_like(self.group)

    def _revived(self, codes: Tensor, table: Tensor) -> Tensor:
        """Codes in which every codeword is used, as far as there are distinct values."""
        owner, count = self._owner(), table.shape[1]
        rows = self.rows / self.scales[self.group][:, None]
        used = torch.bincount((owner[:, None] * count + codes).flatten(), minlength=table.numel())
        used = used.view_as(table)
        for line, dead in (used == 0).nonzero().tolist():
            members = (codes == used[line].argmax()) & (owner == line)[:, None]
            # Not above the greatest value, so that a cluster of equal values stays whole.
            codes = codes.where(~(members & (rows > rows[members].median())), dead)
            used[line] = torch.bincount(codes[owner == line].flatten(), minlength=count)
        return codes

    def _solved(self, codes: Tensor, table: Tensor) -> Tensor:
        """Least squares of the output error over the codewords; what the error does not depend on stays."""
        gram, cross = self.moments.gram, self.moments.cross
        groups, count = len(table), table.shape[1]
        normal = gram.new_zeros(groups, count, count)
        right = gram.new_zeros(groups, count)
        owner, scales, per = self._owner(), self.scales[self.group].to(gram.dtype), len(codes) // len(gram)
        size = max(1, 2**24 // (count * codes.shape[1]))
        for some in torch.arange(len(codes), device=codes.device).split(size):
            for part in (some // per).unique().tolist():
                own = some[some // per == part]
                chosen = (
                    nn.functional.one_hot(codes[own], count).to(gram.dtype).mT * scales[own][:, None, None]
                )
                normal.index_add_(0, owner[own], chosen @ gram[part] @ chosen.mT)
                right.index_add_(
                    0, owner[own], (chosen @ cross[part][own - part * per].unsqueeze(2)).squeeze(2)
                )
        now = table.to(gram.dtype)
        rest = right.unsqueeze(2) - normal @ now.unsqueeze(2)
        return (now + (torch.linalg.pinv(normal, hermitian=True, rtol=1e-9) @ rest).squeeze(2)).to(
            table.dtype
        )


class _Adam:
    """Adam's direction; one second moment for the whole tensor, unless `each` entry has its own."""

    def __init__(self, like: Tensor, each: bool = False) -> None:
        self.mean, self.each, self.steps = torch.zeros_like(like), each, 0
        self.square = torch.zeros_like(like) if each else like.new_zeros(())

    def direction(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        squares = gradient.square()
        self.mean = self.mean.lerp(gradient, 0.1)
        self.square = self.square.lerp(squares if self.each else squares.mean(), 0.001)
        mean = self.mean / (1 - 0.9**self.steps)
        size = (self.square / (1 - 0.999**self.steps)).sqrt()
        return mean / size.where(size > 0, 1.0)
