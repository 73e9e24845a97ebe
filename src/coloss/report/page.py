"""What stands on the page of a report: its charts with their views, its rows, its styles, put together from the records."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coloss.lab.records import ComparisonRecord, TrialRecord
from coloss.report import conflict_figures, curves, figures
from coloss.report.figure_parts import Figure
from coloss.report.palette import Style, arm_styles
from coloss.report.quantities import Quantity, describe_metric
from coloss.report.ranking import Row, rank_arms
from coloss.report.wording import metric_quantity


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        key: identifier in the page.
        title: what it shows, for a heading and for screen readers.
        group: the switch whose choice picks the view; charts with the same group change together.
        views: choice -> figure.
    """

    key: str
    title: str
    group: str
    views: dict[str, Figure]

    @property
    def height(self) -> int:
        """Pixels to keep free for it, so that the page does not jump when it is drawn."""
        return next(iter(self.views.values()))["layout"]["height"]


@dataclass(frozen=True)
class Conflicts:
    """The monitored gradients of one arm: charts, summary of each pair, SVG dash of each term."""

    arm: str
    heat: Chart
    norms: Chart
    dashes: dict[str, str]


@dataclass(frozen=True)
class Page:
    """Everything the template needs."""

    record: ComparisonRecord
    rows: list[Row]
    styles: dict[str, Style]
    quantity: Quantity
    finished: int
    planned: int
    ranking: Chart | None
    metric_curve: Chart | None
    term_curves: list[Chart]
    other_curves: list[Chart]
    conflicts: list[Conflicts]
    pairs: list[curves.PairConflict]
    cost: Chart | None
    other_metrics: list[tuple[Quantity, dict[str, list[float]]]]

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        single = [self.ranking, self.metric_curve, *self.term_curves, *self.other_curves]
        gradients = [chart for conflict in self.conflicts for chart in (conflict.heat, conflict.norms)]
        return [chart for chart in (*single, *gradients, self.cost) if chart is not None]


def build_page(record: ComparisonRecord, trials: Sequence[TrialRecord]) -> Page:
    """Put the page of a comparison together from its plan and its finished trials."""
    rows = rank_arms(record, trials)
    styles = arm_styles([arm.name for arm in record.arms], record.baseline)
    by_arm = {row.arm: [trial for trial in trials if trial.arm == row.arm] for row in rows}
    quantity = metric_quantity(record, rows)
    terms = [
        _curve_chart(f"term{number}", "terms", name, by_arm, styles, height=260)
        for number, name in enumerate(curves.logged_names(trials, "terms"))
    ]
    names = curves.logged_names(trials, "metrics")
    others = [
        _curve_chart(f"metric{number}", "metrics", name, by_arm, styles, height=260)
        for number, name in enumerate(names)
        if name != record.metric
    ]
    main = None
    if record.metric in names:
        main = _curve_chart(
            "curve",
            "metrics",
            record.metric,
            by_arm,
            styles,
            height=400,
            quantity=quantity,
            target=record.target,
        )
    return Page(
        record=record,
        rows=rows,
        styles=styles,
        quantity=quantity,
        finished=len(trials),
        planned=len(record.arms) * len(record.seeds),
        ranking=_ranking_chart(record, rows, styles, quantity),
        metric_curve=main,
        term_curves=terms,
        other_curves=others,
        conflicts=_conflicts(by_arm, styles),
        pairs=[pair for found in by_arm.values() for pair in curves.summarize_conflicts(found)],
        cost=_cost_chart(record, trials, styles, quantity),
        other_metrics=_other_metrics(record, by_arm),
    )


def _ranking_chart(
    record: ComparisonRecord, rows: list[Row], styles: dict[str, Style], quantity: Quantity
) -> Chart | None:
    views = {}
    if any(row.difference is not None for row in rows):
        views["difference"] = figures.ranking_figure(rows, styles, quantity, direction=record.direction)
    if any(math.isfinite(value) for row in rows for value in row.values.values()):
        views["value"] = figures.ranking_figure(
            rows, styles, quantity, direction=record.direction, differences=False
        )
    return Chart("ranking", f"{quantity.name} of each arm", "ranking", views) if views else None


def _curve_chart(
    key: str,
    group: curves.Group,
    name: str,
    by_arm: dict[str, list[TrialRecord]],
    styles: dict[str, Style],
    height: int,
    quantity: Quantity | None = None,
    target: float | None = None,
) -> Chart:
    views = {}
    for axis in ("seconds", "steps"):
        found = [
            curve for trials in by_arm.values() if (curve := curves.training_curve(trials, group, name, axis))
        ]
        if quantity is None:
            quantity = describe_metric(name, [value for curve in found for value in curve.mean])
        views[axis] = figures.curve_figure(found, styles, quantity, axis, height=height, target=target)
    title = quantity.axis if quantity and group == "metrics" else name
    return Chart(key, title, "axis", views)


def _conflicts(by_arm: dict[str, list[TrialRecord]], styles: dict[str, Style]) -> list[Conflicts]:
    found = []
    for arm, trials in by_arm.items():
        conflicts = curves.conflict_map(trials)
        if conflicts is None:
            continue
        key = styles[arm].key
        heat = Chart(
            f"heat-{key}", f"gradient cosines of {arm}", "", {"": conflict_figures.conflict_figure(conflicts)}
        )
        norms = Chart(
            f"norms-{key}",
            f"gradient norms of {arm}",
            "",
            {"": conflict_figures.norm_figure(conflicts, styles[arm])},
        )
        found.append(Conflicts(arm, heat, norms, conflict_figures.term_dashes(conflicts)))
    return found


def _cost_chart(
    record: ComparisonRecord,
    trials: Sequence[TrialRecord],
    styles: dict[str, Style],
    quantity: Quantity,
) -> Chart | None:
    if not any(math.isfinite(trial.metrics.get(record.metric, math.nan)) for trial in trials):
        return None
    kinds: list[figures.Costs] = ["training"]
    if any(trial.cost.prepare_seconds > 0 for trial in trials):
        kinds.append("preparation")
    if len({trial.cost.parameters for trial in trials}) > 1:
        kinds.append("parameters")
    sizes = [trial.cost.stored_bytes for trial in trials if trial.cost.stored_bytes]
    if sizes and max(sizes) > 1.02 * min(sizes):
        kinds.append("stored")
    views: dict[str, Figure] = {
        kind: figures.cost_figure(record, trials, styles, quantity, kind) for kind in kinds
    }
    return Chart("cost", f"{quantity.name} against cost", "cost", views)


def _other_metrics(
    record: ComparisonRecord, by_arm: dict[str, list[TrialRecord]]
) -> list[tuple[Quantity, dict[str, list[float]]]]:
    trials = [trial for found in by_arm.values() for trial in found]
    names = [
        name
        for name in dict.fromkeys(key for trial in trials for key in trial.metrics)
        if name != record.metric
    ]
    found = []
    for name in names:
        values = {
            arm: [t.metrics[name] for t in trials if name in t.metrics] for arm, trials in by_arm.items()
        }
        quantity = describe_metric(name, [value for row in values.values() for value in row])
        found.append((quantity, values))
    return found
