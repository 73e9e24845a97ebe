"""What each temperature would make of a batch of embeddings: which negatives it pushes, how hard its own class is hit, and which to take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from coloss.contrastive.temperature import effective_negatives, negative_weights, weight_entropy
from coloss.metrics import alignment, tolerance, uniformity
from coloss.ops import without_autocast
from coloss.ops.loss_arguments import same_type

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TEMPERATURES = (0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
NEAREST = (0.01, 0.05, 0.1)

# Similarities held at once.
_ENTRIES = 2**22
_COLUMNS = {
    "temperature": "temperature",
    "effective negatives": "effective_negatives",
    "of all": "effective_share",
    "nearest 1%": "nearest_1",
    "nearest 5%": "nearest_5",
    "nearest 10%": "nearest_10",
    "own class": "false_negative_pressure",
}


@dataclass(frozen=True)
class TemperatureRow:
    """One temperature's effect on a batch; means over its queries.

    Attributes:
        temperature: tau.
        entropy: of the push over negatives, in nats.
        effective_negatives: exponential of the entropy of each query.
        effective_share: of all negatives, in (0, 1]; 1 where all count alike.
        nearest_1, nearest_5, nearest_10: share of the push that falls on the nearest 1, 5 and 10 % of a query's negatives (at least one).
        false_negative_pressure: share of the push that falls on negatives of the query's own class; None without labels.
    """

    temperature: float
    entropy: float
    effective_negatives: float
    effective_share: float
    nearest_1: float
    nearest_5: float
    nearest_10: float
    false_negative_pressure: float | None


@dataclass(frozen=True)
class TemperatureReport:
    """A batch's answer to the question which temperature to take.

    Attributes:
        rows: one for each temperature, rising.
        queries: number of queries that have a negative.
        negatives: of a query, on average.
        own_class: share of the negatives that are of the query's class, on average; None without labels.
        uniformity: log of the mean Gaussian potential of the first view, see `coloss.metrics.uniformity`: 0 is one point, lower is more even.
        tolerance: mean similarity within classes of the first view; None without labels, NaN if no class has two samples.
        alignment: mean squared distance of the two views.
        recommendation: the temperature to take.
        reason: why, in words.

    Examples:
        >>> report = temperature_report(torch.eye(8), torch.eye(8), temperatures=(0.1, 1.0))
        >>> print(report.table().splitlines()[0])
        temperature  effective negatives  of all  nearest 1%  nearest 5%  nearest 10%
    """

    rows: tuple[TemperatureRow, ...]
    queries: int
    negatives: float
    own_class: float | None
    uniformity: float
    tolerance: float | None
    alignment: float
    recommendation: float
    reason: str

    def table(self) -> str:
        """The report as text: a line for each temperature, the numbers of the batch, the recommendation."""
        shown = {
            title: name
            for title, name in _COLUMNS.items()
            if name != "false_negative_pressure" or self.own_class is not None
        }
        lines = ["  ".join(shown)]
        for row in self.rows:
            cells = []
            for title, name in shown.items():
                value = getattr(row, name)
                cells.append(
                    f"{value:{len(title)}.{'4g' if name in ('temperature', 'effective_negatives') else '3f'}}"
                )
            lines.append("  ".join(cells))
        batch = [f"uniformity {self.uniformity:.3f}", f"alignment {self.alignment:.3f}"]
        if self.tolerance is not None and self.own_class is not None:
            batch += [f"tolerance {self.tolerance:.3f}", f"negatives of the own class {self.own_class:.3f}"]
        lines.append(f"this batch: {self.negatives:.4g} negatives, {', '.join(batch)}")
        return "\n".join([*lines, f"take {self.recommendation:g}: {self.reason}"])

    def figure(self) -> "Figure":
        """The shares of the table against the temperature, with the recommendation marked, as a Plotly figure."""
        from plotly.graph_objects import Figure, Scatter

        temperatures = [row.temperature for row in self.rows]
        figure = Figure()
        for title, name in _COLUMNS.items():
            values = [getattr(row, name) for row in self.rows]
            if name in ("temperature", "effective_negatives") or None in values:
                continue
            label = {"of all": "effective negatives, of all", "own class": "push on the own class"}.get(
                title, f"push on the {title}"
            )
            figure.add_trace(Scatter(x=temperatures, y=values, name=label, mode="lines+markers"))
        figure.add_vline(x=self.recommendation, line_dash="dot", annotation_text="recommended")
        batch = f"uniformity {self.uniformity:.2f}, alignment {self.alignment:.2f}"
        if self.tolerance is not None:
            batch += f", tolerance {self.tolerance:.2f}"
        figure.update_layout(
            title=f"What a temperature does to this batch ({batch})",
            xaxis={"title": "temperature", "type": "log", "tickvals": temperatures},
            yaxis={"title": "share", "range": [0, 1.02]},
        )
        return figure


def temperature_report(
    first: Float[Tensor, "samples dim"],
    second: Float[Tensor, "samples dim"],
    labels: Shaped[Tensor, " samples"] | None = None,
    temperatures: Sequence[float | int] = TEMPERATURES,
    *,
    ids: Shaped[Tensor, " samples"] | None = None,
    candidates: Literal["both", "other"] = "both",
) -> TemperatureReport:
    """The effective number of negatives, the nearest ones' share and the pressure on the own class, for one batch at many temperatures.

    Give embeddings after some training, in evaluation mode: at a random start all similarities are high, and say little.

    The recommendation is a rule of this project, not of the paper: the lowest of the given temperatures from which on no more of the push
    falls on suspected false negatives than halfway from their share in number to all of it. The lowest, since a low temperature
    separates better; no lower, since it would then be false negatives that are mostly pushed. Suspects are the negatives of the query's
    own class, or without labels the nearest 10 %. It says nothing of accuracy; where training is cheap, compare runs by a probe.

    Args:
        first, second: embeddings of two views of each sample (or of images and their captions), of any length.
        labels: class of each sample, numbers of any kind.
        temperatures: each > 0.
        ids: of samples; rows of equal id are no negatives of each other. None: all samples differ.
        candidates: "both": each row is a query, held against both views of the other samples (NT-Xent); "other": rows of `first` are
            queries, held against `second` (InfoNCE, CLIP).

    Returns:
        See `TemperatureReport`. Of this process's rows.

    Raises:
        ValueError: if shapes disagree, a value is not finite, no query has a negative, or an option is out of range.

    Cost:
        O(samples^2 * (dim + log samples + temperatures)) time. Similarities are made and sorted some rows at a time: memory of the
        embeddings and of some tens of MiB.

    Source:
        Wang and Liu 2021, arXiv 2012.09740, for all but the rule.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> centres = torch.eye(4, 8).repeat(16, 1)
        >>> first, second = (centres + 0.2 * torch.randn(64, 8, generator=generator) for _ in range(2))
        >>> report = temperature_report(first, second, torch.arange(4).repeat(16), (0.05, 0.2, 1.0))
        >>> report.recommendation, [round(row.false_negative_pressure, 2) for row in report.rows]
        (1.0, [0.99, 0.89, 0.4])
    """
    if first.shape != second.shape:
        raise ValueError(
            f"first and second must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    for name, values in (("labels", labels), ("ids", ids)):
        if values is not None and values.shape != first.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(first)},), got {tuple(values.shape)}")
    if not temperatures:
        raise ValueError("temperatures must hold at least one")
    for value in temperatures:
        if not 0 < value < math.inf:
            raise ValueError(f"temperatures must be > 0 and finite, got {value}")
    if candidates not in ("both", "other"):
        raise ValueError(f'candidates must be "both" or "other", got {candidates!r}')
    one, other = same_type(first.detach(), second.detach())
    aligned = float(alignment(one, other))  # refuses what is not finite
    samples = torch.arange(len(one), device=one.device) if ids is None else ids
    if candidates == "both":
        queries = keys = F.normalize(torch.cat([one, other]), dim=1)
        samples = samples.repeat(2)
        classes = None if labels is None else labels.repeat(2)
    else:
        queries, keys, classes = F.normalize(one, dim=1), F.normalize(other, dim=1), labels
    temperatures = sorted({float(value) for value in temperatures})
    sums, queried, negatives, alike = _summed(queries, keys, samples, classes, temperatures)
    if not queried:
        raise ValueError(f"first must hold at least two samples of different ids, got {len(first)}")
    rows = tuple(
        TemperatureRow(
            temperature=value,
            entropy=means[0],
            effective_negatives=means[1],
            effective_share=means[2],
            nearest_1=means[3],
            nearest_5=means[4],
            nearest_10=means[5],
            false_negative_pressure=means[6] if labels is not None else None,
        )
        for value, means in zip(temperatures, (sums / queried).tolist())
    )
    own_class = alike / queried if labels is not None else None
    recommendation, reason = _recommend(rows, own_class)
    return TemperatureReport(
        rows=rows,
        queries=queried,
        negatives=negatives / queried,
        own_class=own_class,
        uniformity=float(uniformity(one)),
        tolerance=float(tolerance(one, _as_classes(labels))) if labels is not None else None,
        alignment=aligned,
        recommendation=recommendation,
        reason=reason,
    )


def _summed(
    queries: Tensor, keys: Tensor, ids: Tensor, classes: Tensor | None, temperatures: Sequence[float]
) -> tuple[Tensor, int, float, float]:
    """Sums over queries that have a negative: (temperatures, 7) as in `TemperatureRow`; such queries; negatives; own class's shares."""
    sums = torch.zeros(len(temperatures), 7, dtype=torch.float64)
    queried, negatives, alike = 0, 0.0, 0.0
    for rows in torch.arange(len(queries), device=queries.device).split(max(1, _ENTRIES // len(keys))):
        excluded = ids[rows].unsqueeze(1) == ids
        rows, excluded = rows[~excluded.all(1)], excluded[~excluded.all(1)]
        if not len(rows):
            continue
        with without_autocast(queries.device):
            similarities = queries[rows] @ keys.T
        similarities, order = similarities.masked_fill_(excluded, -math.inf).sort(dim=1, descending=True)
        excluded = similarities == -math.inf
        count = (~excluded).sum(1)
        queried, negatives = queried + len(rows), negatives + float(count.sum())
        own = None
        if classes is not None:
            own = (classes[rows].unsqueeze(1) == classes[order]) & ~excluded
            alike += float((own.sum(1) / count).sum())
        for place, temperature in enumerate(temperatures):
            weights = negative_weights(similarities, temperature, excluded)
            entropy, effective = weight_entropy(weights), effective_negatives(weights)
            reached = weights.cumsum(1)
            found = [entropy, effective, effective / count]
            for share in NEAREST:
                last = (count * share - 1e-9).ceil().clamp(min=1).long() - 1
                found.append(reached.gather(1, last.unsqueeze(1)).squeeze(1))
            found.append(weights.new_zeros(len(rows)) if own is None else (weights * own).sum(1))
            sums[place] += torch.stack(found).sum(1).double().cpu()
    return sums, queried, negatives, alike


def _recommend(rows: Sequence[TemperatureRow], own_class: float | None) -> tuple[float, str]:
    """The lowest temperature from which on suspected false negatives get no more of the push than halfway from their share to all."""
    if own_class is None:
        suspects, share = "the nearest 10% of negatives", NEAREST[-1]
        pushes = [row.nearest_10 for row in rows]
    else:
        suspects, share = f"negatives of the query's own class, {own_class:.0%} in number,", own_class
        pushes = [row.false_negative_pressure or 0.0 for row in rows]
    limit = (1 + share) / 2
    place = len(rows)
    while place and pushes[place - 1] <= limit:
        place -= 1
    if place == len(rows):
        return rows[-1].temperature, (
            f"even there {suspects} get {pushes[-1]:.0%} of the push, above {limit:.0%}; try higher temperatures"
        )
    row = rows[place]
    reason = f"the lowest at which {suspects} get no more than {limit:.0%} of the push ({pushes[place]:.0%})"
    if place:
        reason += f"; at {rows[place - 1].temperature:g} they get {pushes[place - 1]:.0%}"
    else:
        reason += "; lower ones than those given may do as well"
    if row.effective_share > 0.9:
        reason += (
            f". {row.effective_share:.0%} of the negatives count alike there: a hard loss separates more"
        )
    return row.temperature, reason


def _as_classes(labels: Tensor) -> Tensor:
    return labels.unique(return_inverse=True)[1]
