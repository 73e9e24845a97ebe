r"""Contrastive losses against all samples of a data set, estimated from small batches, with a temperature for each sample.

Equations and sources: `coloss.contrastive.individual_temperatures`. Everything is kept as logarithms, so that temperatures of 0.005
are safe in float32.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops import full_precision, is_distributed, negative_logsumexp, straight_through
from coloss.ops.loss_arguments import reduced
from coloss.train import SampleTable, Schedule, cosine, value_at

GammaSchedule = Literal["constant", "cosine"]


def log_mean_contrast(
    queries: Float[Tensor, "queries dim"],
    positives: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    temperature: float | Float[Tensor, "*temperatures"],
    *,
    query_ids: Shaped[Tensor, " queries"],
    key_ids: Shaped[Tensor, " keys"],
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> tuple[Float[Tensor, " queries"], Int[Tensor, " queries"]]:
    r"""How much each query's negatives outdo its positive: log of the mean of $e^{h_{ik}/\tau_i}$, with the number of negatives.

    $h_{ik} = q_i \cdot k_k - q_i \cdot p_i$ over the keys $k$ of other ids. Multiplied by $\tau_i$ this is the mini-batch form of the
    global contrastive loss; it lies between the mean (large $\tau$) and the maximum (small $\tau$) of $h_{ik}$.

    Args:
        queries: unit vectors.
        positives: the positive of each query, unit vectors.
        keys: unit vectors that hold the negatives.
        temperature: $\tau > 0$: a number, a scalar tensor, or one value for each query; tensors get their gradient.
        query_ids, key_ids: keys of a query's own id are no negatives.
        chunk_size, across_processes: as for `coloss.ops.negative_logsumexp`.

    Returns:
        The logarithms, 0 where there is no negative; and the numbers of negatives.

    Raises:
        ValueError: if shapes disagree or an option is out of range.

    Examples:
        >>> rows, ids = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
        >>> log_mean_contrast(rows, rows, rows, 0.5, query_ids=ids, key_ids=ids)  # all h are -1
        (tensor([-2., -2., -2., -2.]), tensor([2, 2, 2, 2]))
    """
    if positives.shape != queries.shape:
        raise ValueError(f"positives must have shape {tuple(queries.shape)}, got {tuple(positives.shape)}")
    logs, count = negative_logsumexp(
        queries,
        keys,
        temperature,
        query_ids=query_ids,
        key_ids=key_ids,
        chunk_size=chunk_size,
        across_processes=across_processes,
    )
    own = (full_precision(queries) * full_precision(positives)).sum(1)
    found = logs - own / temperature - count.clamp(min=1).to(logs.dtype).log()
    return torch.where(count > 0, found, 0.0).to(logs.dtype), count


class GlobalContrastiveLoss(nn.Module):
    r"""The contrast of each sample with the whole data set, from small batches (SogCLR); with a temperature for each sample: iSogCLR.

    Keeps, by sample id, a moving average of the mean exponential contrast, and where `individual` a temperature with the moving average
    of its gradient. In training mode each call updates those of its samples; in eval mode it only reads them. It reports the objective,
    $\tau \log s + \tau\rho$ (the second with individual temperatures), and has the gradient $\tau (g/s) \nabla \log g$, whose expectation is
    that of the objective over the whole data set.

    Args:
        temperature: of all samples, or where they begin, > 0.
        gamma: weight of the new batch in the moving average, in (0, 1]; 1 is the mini-batch loss. A sample's first visit takes 1.
        gamma_schedule: `"cosine"` falls from 1 to `gamma` over the first half of training (`set_progress` says where training is).
        individual: learn a temperature for each sample.
        rho: radius of the robust weighting, >= 0: larger means lower temperatures.
        temperature_learning_rate: step of the temperatures, >= 0.
        temperature_gradient_share: weight of the newest gradient in its moving average, in (0, 1].
        temperature_bounds: lowest and highest temperature.
        largest_gradient: the gradient of a temperature is clamped to this size.
        bimodal: two encoders: each side contrasts with the other side, and has a table of its own. Otherwise two views of one
            encoder, where each row contrasts with all others.
        num_samples: of the data set, where ids count its samples from 0; None takes any ids, see `SampleTable`.
        dtype: of the tables.

    Attributes:
        tables: the state by sample id, of the two views together, or of each side.

    Returns:
        From `forward(first, second, ids)`: a scalar, the mean over all rows; 0 where nothing has a negative.

    Raises:
        InputError: for a value out of range.

    Cost:
        $O(B^2 D)$ time, with individual temperatures two more matrix products; one number for each sample and table, three with
        individual temperatures.

    Examples:
        >>> loss = GlobalContrastiveLoss(individual=True)
        >>> views, ids = torch.randn(2, 4, 8), torch.tensor([3, 14, 15, 92])
        >>> loss(views[0], views[1], ids).shape, len(loss.tables[0])
        (torch.Size([]), 4)
    """

    batch_statistic = True

    def __init__(
        self,
        temperature: float = 0.1,
        gamma: float = 0.9,
        *,
        gamma_schedule: GammaSchedule = "constant",
        individual: bool = False,
        rho: float = 0.3,
        temperature_learning_rate: float = 0.01,
        temperature_gradient_share: float = 0.9,
        temperature_bounds: tuple[float, float] = (0.05, 0.7),
        largest_gradient: float = 3.0,
        bimodal: bool = False,
        num_samples: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        low, high = temperature_bounds
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be > 0 and finite, got {temperature}")
        for name, share in (("gamma", gamma), ("temperature_gradient_share", temperature_gradient_share)):
            if not 0 < share <= 1:
                raise InputError(f"{name} must be in (0, 1], got {share}")
        for name, size in (("rho", rho), ("temperature_learning_rate", temperature_learning_rate)):
            if not 0 <= size < math.inf:
                raise InputError(f"{name} must be >= 0 and finite, got {size}")
        if gamma_schedule not in ("constant", "cosine"):
            raise InputError(f'gamma_schedule must be "constant" or "cosine", got {gamma_schedule!r}')
        if not largest_gradient > 0:
            raise InputError(f"largest_gradient must be > 0, got {largest_gradient}")
        if individual and not 0 < low <= temperature <= high < math.inf:
            raise InputError(
                f"temperature_bounds must hold the temperature {temperature} and be > 0, got {temperature_bounds}"
            )
        self.temperature, self.individual, self.rho = temperature, individual, rho
        self.temperature_learning_rate = temperature_learning_rate
        self.temperature_gradient_share = temperature_gradient_share
        self.temperature_bounds, self.largest_gradient = (low, high), largest_gradient
        self.bimodal = bimodal
        self._gamma: Schedule = decaying_gamma(gamma) if gamma_schedule == "cosine" else gamma
        self.set_progress(0.0)
        initial = {"log_average": 0.0} | ({"temperature": temperature, "gradient": 0.0} if individual else {})
        self.tables = nn.ModuleList(
            SampleTable(initial, num_samples=num_samples, dtype=dtype) for _ in range(1 + bimodal)
        )

    def set_progress(self, progress: float) -> None:
        """Say which share of training is done, for the schedule of gamma."""
        self.gamma = value_at(self._gamma, progress)

    def forward(
        self,
        first: Float[Tensor, "batch dim"],
        second: Float[Tensor, "batch dim"],
        ids: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        if ids.shape != first.shape[:1]:
            raise ValueError(f"ids must have shape ({len(first)},), got {tuple(ids.shape)}")
        pair = torch.stack([F.normalize(full_precision(rows), dim=1) for rows in (first, second)])
        if not self.bimodal:
            return self._side(0, pair, pair.flip(0), pair.flatten(0, 1), ids)
        sides = [
            self._side(side, pair[side : side + 1], pair[1 - side :][:1], pair[1 - side], ids)
            for side in (0, 1)
        ]
        return torch.stack(sides).mean()

    def temperatures(self, ids: Int[Tensor, " batch"], side: int = 0) -> Float[Tensor, " batch"]:
        """Temperature of some samples, that of the start where they were never seen."""
        if not self.individual:
            return torch.full((len(ids),), self.temperature, device=ids.device)
        return self._table(side).read(ids)[0]["temperature"]

    def stats(self) -> dict[str, float]:
        """What has become of the temperatures of all samples seen: mean, quantiles, and the share at a bound.

        Returns:
            `mean`, `low`, `median`, `high` (quantiles 0.05, 0.5, 0.95) and `at_bounds`; of the second side with the ending `_second`. NaN
            where no sample was seen; of one temperature for all, that.
        """
        found: dict[str, float] = {}
        for side, ending in zip(range(len(self.tables)), ("", "_second")):
            table = self._table(side)
            values = table.column("temperature") if self.individual else self.temperatures(table.ids)
            found |= {f"{name}{ending}": value for name, value in self._spread(values).items()}
        return found

    def _spread(self, temperatures: Tensor) -> dict[str, float]:
        names = ("mean", "low", "median", "high", "at_bounds")
        if not len(temperatures):
            return dict.fromkeys(names, math.nan)
        low, high = self.temperature_bounds
        quantiles = temperatures.quantile(temperatures.new_tensor([0.05, 0.5, 0.95]))
        at_bounds = (temperatures <= low) | (temperatures >= high)
        values = [temperatures.mean(), *quantiles, at_bounds.float().mean()]
        return dict(zip(names, torch.stack([value.double() for value in values]).tolist(), strict=True))

    def _table(self, side: int) -> SampleTable:
        table = self.tables[side]
        assert isinstance(table, SampleTable)
        return table

    def _side(self, side: int, anchors: Tensor, positives: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
        """The mean loss of the rows of one table: (views, samples, dim) anchors with the positive of each, against (keys, dim)."""
        views, samples = anchors.shape[:2]
        known, seen = self._table(side).read(ids)
        known = {name: value.to(anchors.dtype) for name, value in known.items()}
        temperature = known.get("temperature", anchors.new_full((samples,), self.temperature))
        of_rows = temperature.repeat(views)
        adapts = self.individual and self.training
        with torch.set_grad_enabled(adapts or torch.is_grad_enabled()):
            log_mean, count = log_mean_contrast(
                anchors.flatten(0, 1),
                positives.flatten(0, 1),
                keys,
                of_rows.requires_grad_(adapts),
                query_ids=ids.repeat(views),
                key_ids=ids.repeat(len(keys) // max(samples, 1)),
            )
            slope = torch.autograd.grad(log_mean.sum(), of_rows, retain_graph=True)[0] if adapts else None
        log_mean, count = log_mean.unflatten(0, (views, samples)), count[:samples]
        log_average = torch.where(
            seen, _log_blend(known["log_average"], log_mean, self.gamma), log_mean
        ).detach()
        ratio = torch.exp(log_mean - log_average)
        if self.training:
            updated = {"log_average": log_average.logsumexp(0) - math.log(views)}
            if slope is not None:
                # d(tau log s)/d tau, the last term being tau / s times the batch's share of ds/d tau.
                gradient = log_average + self.rho + ratio.detach() * temperature * slope.view(views, samples)
                updated |= self._stepped(known, gradient.mean(0))
            self._table(side).write(ids[count > 0], {name: new[count > 0] for name, new in updated.items()})
        temperature = temperature.detach()
        value = temperature * (log_average + (self.rho if self.individual else 0.0))
        loss = torch.where(count > 0, straight_through(value, temperature * ratio), 0.0)
        return reduced(loss.flatten(), (count > 0).repeat(views), "mean", is_distributed())

    def _stepped(self, known: Mapping[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
        """One step of the temperatures, along the moving average of their gradient."""
        share = self.temperature_gradient_share
        gradient = gradient.clamp(-self.largest_gradient, self.largest_gradient)
        smoothed = (1 - share) * known["gradient"] + share * gradient
        moved = known["temperature"] - self.temperature_learning_rate * smoothed
        return {"temperature": moved.clamp(*self.temperature_bounds), "gradient": smoothed}


def decaying_gamma(final: float = 0.8, until: float = 0.5) -> Callable[[float], float]:
    """A moving-average weight that falls by a cosine from 1 to its final value over the first part of training.

    Args:
        final: in (0, 1].
        until: share of training at which it is reached, in (0, 1].

    Raises:
        InputError: for a value out of range.

    Source:
        Wei et al. 2024 (FastCLIP), arXiv 2407.01445.

    Examples:
        >>> gamma = decaying_gamma(0.8)
        >>> [round(gamma(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.9, 0.8, 0.8]
    """
    for name, value in (("final", final), ("until", until)):
        if not 0 < value <= 1:
            raise InputError(f"{name} must be in (0, 1], got {value}")
    fall = cosine(1.0, final)
    return lambda progress: fall(progress / until)


def _log_blend(old: Tensor, new: Tensor, share: float) -> Tensor:
    """log((1 - share) e^old + share e^new)."""
    if share == 1:
        return new
    return torch.logaddexp(old + math.log1p(-share), new + math.log(share))
