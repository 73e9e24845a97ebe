"""Short tables of codewords for real values: the best table, the nearest entries, and how an index into a table is learned.

K-means on a line has an exact solution: clusters are intervals of the sorted values, and dynamic programming finds the best cuts. Learning
the index k of each value v goes through logits M; with c the codewords, j = argmax M and g = dL/dv the two rules for dL/dM are

    soft       v = sum_k s_k c_k,  s = softmax(M / T)       g s_k (c_k - v) / T                       grows with the distance of c_k
    proximal   v = c_j                                      g s_k sign(c_k - c_j) h^2 / |c_k - c_j|   shrinks with it, 0 at k = j

where h is the mean gap between neighbouring codewords.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from coloss.ops.precision import accumulation_dtype, full_precision

_POINTS = 256
_CLOSEST = 0.1


class CodedValues(NamedTuple):
    """Values as indices into tables.

    Attributes:
        table: (groups, codes) rising codewords of each group.
        codes: (groups, values) index of each value's nearest codeword.
    """

    table: Tensor
    codes: Tensor


def kmeans_1d(
    values: Float[Tensor, "groups values"],
    codes: int,
    *,
    weights: Float[Tensor, "groups values"] | None = None,
    start: Float[Tensor, "groups codes"] | None = None,
    iterations: int = 100,
) -> CodedValues:
    """Codewords of least squared error for each of several groups of numbers.

    Up to 256 values in a group are solved exactly, by dynamic programming over the sorted values. Of more values 256 buckets of equal
    count are, and Lloyd's rounds on all values go on from there. A group with no more distinct values than codes gets exactly these, the
    last of them repeated. A codeword that loses its last value is placed at the far end of the cluster with the largest squared error.

    Args:
        values: finite numbers; groups are independent of one another.
        codes: codewords of each group, in 1..256.
        weights: finite and >= 0, of each value's squared error; 0 leaves a value out, as padding of shorter groups.
        start: (groups, `codes`) codewords that Lloyd's rounds begin with, in place of the exact solution.
        iterations: Lloyd's rounds at most.

    Returns:
        Rising tables, at least float32, and the nearest codeword of every value.

    Raises:
        ValueError: if `codes` is not in 1..256, a value or a weight is not finite, a weight is negative, `start` has another shape, or there
            are no values.

    Cost: a sort, O(groups 256^2 codes) for the exact solution, O(groups codes log values) for each of Lloyd's rounds.

    Source: Wang and Song 2011, "Ckmeans.1d.dp", The R Journal 3(2); Lloyd 1982.

    Examples:
        >>> table, codes = kmeans_1d(torch.tensor([[0.0, 0.1, 1.0, 1.1, 5.0]]), 3)
        >>> table, codes
        (tensor([[0.0500, 1.0500, 5.0000]]), tensor([[0, 0, 1, 1, 2]], dtype=torch.uint8))
    """
    if not 1 <= codes <= 256:
        raise ValueError(f"codes must be in 1..256, got {codes}")
    if values.shape[1] == 0:
        raise ValueError("values must hold at least one in each group, got none")
    if not values.isfinite().all():
        raise ValueError("values must be finite, got NaN or infinity")
    if weights is not None and not bool((good := (weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"weights must be finite and >= 0, got {float(weights[~good][0])}")
    if start is not None and start.shape != (len(values), codes):
        raise ValueError(
            f"start must have {codes} codewords for each of {len(values)} groups, got {tuple(start.shape)}"
        )
    values = full_precision(values)
    if not len(values):
        return CodedValues(values.new_zeros(0, codes), torch.zeros_like(values, dtype=torch.uint8))
    line = _Line.of(values, weights)
    centres = line.best_cuts(codes) if start is None else start.to(line.x.dtype).sort(1).values - line.offset
    table = line.distinct(codes, line.settle(centres, iterations)) + line.offset
    # Exactly the values themselves where a cluster holds copies of one: the offset must not round them.
    table = _snapped(table.to(values.dtype), values, weights)
    return CodedValues(table, nearest_codes(values, table))


def nearest_codes(
    values: Float[Tensor, "groups values"], table: Float[Tensor, "groups codes"]
) -> UInt8[Tensor, "groups values"]:
    """Index of each value's nearest codeword; of two as near, and of equal ones, the first.

    Args:
        values: numbers.
        table: rising codewords of each group, at most 256.

    Cost: O(values log codes).

    Examples:
        >>> nearest_codes(torch.tensor([[-1.0, 0.5, 0.6, 9.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    """
    table = full_precision(table)
    # Halves before the sum, which could overflow.
    borders = table[:, 1:] / 2 + table[:, :-1] / 2
    return torch.searchsorted(borders.contiguous(), values.to(borders.dtype).contiguous()).to(torch.uint8)


def proximal_code_weights(
    codewords: Float[Tensor, "*shape codes"],
    current: Float[Tensor, "*shape 1"],
    spacing: Float[Tensor, "*sizes"] | float,
) -> Float[Tensor, "*shape codes"]:
    """How strongly a value's gradient speaks for each codeword: the nearer to the current one, the more.

        phi_k = sign(d_k) h^2 / max(|d_k|, h / 10),   d_k = c_k - c_j

    Args:
        codewords: c.
        current: c_j, the codeword of the present index.
        spacing: h, the mean gap between neighbouring codewords; broadcast.

    Returns:
        phi, in the units of the codewords; 0 at the current one.

    Source: reconstructed from a figure's caption of Yvinec et al. 2023, arXiv 2309.17361, which says that the weight must decrease with
        distance; the form is this project's.

    Examples:
        >>> proximal_code_weights(torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([0.0]), 1.0)
        tensor([-1.0000,  0.0000,  1.0000,  0.5000])
    """
    apart = codewords - current
    spacing = torch.as_tensor(spacing, dtype=codewords.dtype, device=codewords.device)
    size = torch.maximum(apart.abs(), _CLOSEST * spacing)
    return apart.sign() * spacing.square() / size.where(size > 0, 1.0)


def codebook_lookup(
    logits: Float[Tensor, "*shape codes"],
    codewords: Float[Tensor, "*others codes"],
    gradient: Literal["soft", "proximal"] = "proximal",
    *,
    temperature: float = 1.0,
    spacing: Float[Tensor, "*sizes"] | float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Values that logits choose from a table, with a gradient for both.

    Args:
        logits: M, one for each value and codeword; -inf where a value may not take a codeword.
        codewords: c, broadcast against the logits.
        gradient: "soft" mixes codewords by softmax(M / temperature), with the true gradient. "proximal" takes the codeword of the largest
            logit, the first of equal ones; its gradient reaches the chosen codeword, and the logits by `proximal_code_weights` times
            the softmax.
        temperature: T > 0.
        spacing: h, for "proximal"; broadcast against the codewords.

    Returns:
        One value for each row of logits.

    Raises:
        ValueError: for another gradient, or a temperature that is not > 0.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> value = codebook_lookup(logits, torch.tensor([0.0, 1.0, 2.0]))
        >>> value.sum().backward()
        >>> value, logits.grad
        (tensor([0.], grad_fn=<_ProximalBackward>), tensor([[0.0000, 0.2447, 0.0450]]))
    """
    if gradient not in ("soft", "proximal"):
        raise ValueError(f'gradient must be "soft" or "proximal", got {gradient!r}')
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    logits, codewords = full_precision(logits), full_precision(codewords)
    if gradient == "soft":
        return ((logits / temperature).softmax(-1) * codewords).sum(-1)
    spacing = torch.as_tensor(spacing, dtype=codewords.dtype, device=codewords.device)
    return _Proximal.apply(logits, codewords.expand(logits.shape), spacing, temperature)


def nearest_codeword(
    values: Float[Tensor, "*shape"], codewords: Float[Tensor, "*others codes"]
) -> Float[Tensor, "*shape"]:
    """Each value's nearest codeword; the gradient passes to the value as if nothing had happened, and to the codeword.

    Args:
        values: latent numbers.
        codewords: broadcast against `values[..., None]`.

    Examples:
        >>> value = torch.tensor([0.4], requires_grad=True)
        >>> found = nearest_codeword(value, torch.tensor([0.0, 1.0]))
        >>> found.sum().backward()
        >>> found.item(), value.grad
        (0.0, tensor([1.]))
    """
    values, codewords = full_precision(values), full_precision(codewords)
    codewords = codewords.expand(*values.shape, codewords.shape[-1])
    codes = (values.detach()[..., None] - codewords.detach()).abs().argmin(-1, keepdim=True)
    chosen = codewords.gather(-1, codes).squeeze(-1)
    return chosen + (values - values.detach())


class _Proximal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, codewords: Tensor, spacing: Tensor, temperature: float) -> Tensor:
        codes = logits.argmax(-1, keepdim=True)
        current = codewords.gather(-1, codes)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, codewords, codes, current, spacing)
        return current.squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        logits, codewords, codes, current, spacing = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        shares = (logits / ctx.temperature).softmax(-1)
        to_logits = gradient * shares * proximal_code_weights(codewords, current, spacing)
        to_codewords = torch.zeros_like(to_logits).scatter_(-1, codes, gradient)
        return to_logits, to_codewords, None, None


class _Line(NamedTuple):
    """Sorted numbers of each group about their mean, prefix sums of weight, first and second moment, and how many of them count."""

    x: Tensor
    sums: Tensor
    counted: Tensor
    offset: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None) -> "_Line":
        x = values.to(accumulation_dtype(values.device))
        w = torch.ones_like(x) if weights is None else weights.to(x.dtype)
        # What is left out becomes a copy of a value that counts, so that it is no distinct value of its own.
        least = x.masked_fill(w == 0, torch.inf).amin(1, keepdim=True)
        x = x.where(w > 0, least.where(least.isfinite(), 0.0))
        offset = (w * x).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        x, order = (x - offset).sort(1)
        w = w.gather(1, order)
        sums = torch.stack([w, w * x, w * x * x]).cumsum(2)
        return cls(x.contiguous(), torch.nn.functional.pad(sums, (1, 0)), (w > 0).cumsum(1), offset)

    def best_cuts(self, codes: int) -> Tensor:
        """Centres of the best cuts between buckets of equal count, one value each where there are few; what is left out does not count."""
        groups, count = self.x.shape
        points = max(min(count, _POINTS), 1)
        steps = torch.arange(points + 1, device=self.x.device)
        wanted = (steps * self.counted[:, -1:] + points // 2) // points
        places = (torch.searchsorted(self.counted, wanted) + 1).where(wanted > 0, 0).clamp(max=count)
        places[:, -1] = count
        sums = self.sums.gather(2, places.expand(3, -1, -1))
        size = max(1, 2**24 // (points + 1) ** 2)
        cuts = torch.cat([self._cuts(sums[:, rows], codes) for rows in torch.arange(groups).split(size)])
        return self._centres(places.gather(1, cuts))[0]

    @staticmethod
    def _cuts(sums: Tensor, codes: int) -> Tensor:
        """(groups, codes + 1) places of the cuts of least squared error, each cluster one bucket at least where they suffice."""
        weight, first, second = sums.unsqueeze(2) - sums.unsqueeze(3)
        places = sums.shape[-1]
        inside = torch.ones(places, places, dtype=torch.bool, device=sums.device).triu(1)
        cost = (second - first.square() / weight.where(weight > 0, 1.0)).clamp(min=0)
        cost = cost.masked_fill(~inside, torch.inf)
        best, froms = cost[:, 0], []
        for _ in range(min(codes, places - 1) - 1):
            least = (best.unsqueeze(2) + cost).min(1)
            best = least.values
            froms.append(least.indices)
        cut = torch.full((cost.shape[0], 1), places - 1, device=sums.device)
        cuts = [cut]
        for before in reversed(froms):
            cut = before.gather(1, cut)
            cuts.insert(0, cut)
        # More codes than buckets: the last cut again, which are empty clusters.
        cuts += [cuts[-1]] * (codes - len(cuts))
        return torch.cat([torch.zeros_like(cut), *cuts], 1)

    def _centres(self, cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the values between neighbouring cuts; weight and squared error of each cluster."""
        ends = self.sums.gather(2, cuts.expand(3, -1, -1))
        weight, first, second = ends.diff(dim=2)
        last = self.x.shape[1] - 1
        low = self.x.gather(1, cuts[:, :-1].clamp(max=last))
        high = self.x.gather(1, (cuts[:, 1:] - 1).clamp(min=0))
        full = weight > 0
        mean = (first / weight.where(full, 1.0)).clamp(low, high.maximum(low))
        error = (second - first.square() / weight.where(full, 1.0)).where((high > low) & full, 0.0)
        return mean, weight, error

    def settle(self, centres: Tensor, iterations: int) -> Tensor:
        """Lloyd's rounds until nothing moves."""
        before = None
        for _ in range(iterations):
            borders = (centres[:, 1:] + centres[:, :-1]) / 2
            inner = torch.searchsorted(self.x, borders.contiguous(), right=True)
            ends = torch.zeros_like(inner[:, :1]) if inner.shape[1] else inner.new_zeros(len(self.x), 1)
            cuts = torch.cat([ends, inner, torch.full_like(ends, self.x.shape[1])], 1)
            mean, weight, error = self._centres(cuts)
            centres = mean.where(weight > 0, centres)
            dead = weight == 0
            reseeded = dead.any(1) & (error > 0).any(1)
            if reseeded.any():
                largest = error.argmax(1, keepdim=True)
                far = self.x.gather(1, (cuts.gather(1, largest + 1) - 1).clamp(min=0))
                place = dead.int().argmax(1, keepdim=True)
                centres = centres.where(~reseeded[:, None], centres.scatter(1, place, far)).sort(1).values
            elif before is not None and torch.equal(cuts, before):
                break
            before = cuts
        return centres

    def distinct(self, codes: int, centres: Tensor) -> Tensor:
        """The values themselves in groups where they are few enough."""
        new = torch.ones_like(self.x, dtype=torch.bool)
        new[:, 1:] = self.x.diff(dim=1) != 0
        rank = new.cumsum(1) - 1
        few = rank[:, -1:] < codes
        own = self.x[:, -1:].repeat(1, codes).scatter(1, rank.clamp(max=codes - 1), self.x)
        return own.where(few, centres).sort(1).values


def _snapped(table: Tensor, values: Tensor, weights: Tensor | None) -> Tensor:
    """Codewords within rounding of all their values become the value nearest to them."""
    if weights is not None:
        least = values.masked_fill(weights == 0, torch.inf).amin(1, keepdim=True)
        values = values.where(weights > 0, least.where(least.isfinite(), 0.0))
    ordered = values.sort(1).values.contiguous()
    place = torch.searchsorted(ordered, table.contiguous())
    last = values.shape[1] - 1
    above, below = ordered.gather(1, place.clamp(max=last)), ordered.gather(1, (place - 1).clamp(0, last))
    nearest = above.where((above - table).abs() <= (table - below).abs(), below)
    close = (nearest - table).abs() <= 4 * torch.finfo(table.dtype).eps * ordered.abs().amax(1, keepdim=True)
    return nearest.where(close, table).sort(1).values
