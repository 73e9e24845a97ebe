"""What a comparison found, in one plain sentence."""

from collections.abc import Sequence

from coloss.lab.records import ComparisonRecord
from coloss.metrics.statistics import mean_interval
from coloss.report.quantities import Quantity, count, describe_metric
from coloss.report.ranking import Row


def metric_quantity(record: ComparisonRecord, rows: Sequence[Row]) -> Quantity:
    """Decide how the comparison's metric is written, from all the values it took."""
    return describe_metric(record.metric, [value for row in rows for value in row.values.values()])


def headline(record: ComparisonRecord, rows: Sequence[Row]) -> str:
    """Say in one sentence whether a method beat the baseline, by how much and how sure that is.

    The arm spoken of is the best one whose interval excludes 0; without one, the best one that was compared.

    Args:
        record: the plan.
        rows: what `rank_arms` gave for it.

    Returns:
        Plain text; names of arms stand as they are, so a page must escape them.

    Examples:
        >>> from coloss.lab.records import ArmRecord
        >>> plan = ComparisonRecord(
        ...     title="t",
        ...     task="digits",
        ...     arms=[ArmRecord(name="plain")],
        ...     baseline="plain",
        ...     seeds=[0],
        ...     budget={"epochs": 1},
        ...     metric="accuracy",
        ... )
        >>> headline(plan, [])
        'No trial has finished yet.'
    """
    ran = [row for row in rows if row.values]
    if not ran:
        return "No trial has finished yet."
    quantity = metric_quantity(record, rows)
    methods = [row for row in rows if row.arm != record.baseline]
    if not methods:
        return _alone(ran[0], quantity)
    compared = [row for row in methods if row.difference is not None]
    if not compared:
        return _not_compared(record, rows)
    better = [row for row in compared if row.verdict == "better"]
    best = better[0] if better else compared[0]
    if best.verdict == "not separable":
        return _not_separable(record, best, methods, quantity)
    amount, evidence = quantity.amount(best.difference), _evidence(best, quantity)
    if better or len(methods) == 1:
        return f"{best.arm} is {amount} {best.verdict} than {record.baseline}{evidence}"
    none = "No method beats" if len(compared) == len(methods) else "No method that could be compared beats"
    return f"{none} {record.baseline}: the closest, {best.arm}, is {amount} worse{evidence}"


def tally(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Count the verdicts of the arms beside the baseline: better, not separable, worse, not compared."""
    order = ("better", "not separable", "worse", "not compared")
    counts = [(verdict, sum(row.verdict == verdict for row in rows)) for verdict in order]
    return [(verdict, number) for verdict, number in counts if number]


def seeds(number: int) -> str:
    """Write a number of seeds.

    Examples:
        >>> seeds(1), seeds(5)
        ('1 seed', '5 seeds')
    """
    return f"{number} seed" if number == 1 else f"{number} seeds"


def budget_text(budget: dict[str, float]) -> str:
    """Write a budget, such as "30 s" or "20 epochs".

    Examples:
        >>> budget_text({"epochs": 20.0}), budget_text({"seconds": 30.0})
        ('20 epochs', '30 s')
    """
    parts = []
    for unit, amount in budget.items():
        name = {"seconds": "s", "epochs": "epoch", "steps": "step"}.get(unit, unit)
        plural = "s" if name in ("epoch", "step") and amount != 1 else ""
        parts.append(f"{count(amount)} {name}{plural}")
    return ", ".join(parts)


def _evidence(row: Row, quantity: Quantity) -> str:
    number = seeds(len(row.differences))
    if row.interval is None:
        return f" with {number}."
    low, high = sorted(abs(bound) for bound in row.interval)
    return f": 95% interval {quantity.number(low)} to {quantity.number(high)}, {number}."


def _not_separable(record: ComparisonRecord, best: Row, methods: Sequence[Row], quantity: Quantity) -> str:
    sign = 1 if record.direction == "higher" else -1
    number = len(best.differences)
    gain = sign * (best.difference or 0.0)
    if quantity.number(gain) == quantity.number(0.0):
        lead = f"{best.arm} and {record.baseline} are level"
    else:
        lead = (
            f"{best.arm} is {quantity.amount(gain)} {'ahead of' if gain > 0 else 'behind'} {record.baseline}"
        )
    if best.interval is None:
        return f"Not separable with {seeds(number)}: {lead}; an interval needs at least two seeds."
    low, high = (
        quantity.number(bound, signed=True) for bound in sorted(sign * bound for bound in best.interval)
    )
    word = "better than" if any(row.verdict == "worse" for row in methods) else "separable from"
    opening = "Not separable" if len(methods) == 1 else f"No method is {word} the baseline"
    return f"{opening} with {seeds(number)}: {lead}, 95% interval {low} to {high}."


def _alone(row: Row, quantity: Quantity) -> str:
    values = list(row.values.values())
    if row.failed:
        return f"{row.arm} gave no finite {quantity.name} in {row.failed} of {seeds(len(values))}."
    text = f"{row.arm} reaches {quantity.value(row.mean)} {quantity.name}"
    interval = mean_interval(values).interval
    if interval is None:
        return f"{text} with {seeds(1)}."
    low, high = (quantity.number(bound) for bound in interval)
    return f"{text}: 95% interval {low} to {high}, {seeds(len(values))}."


def _not_compared(record: ComparisonRecord, rows: Sequence[Row]) -> str:
    baseline = next((row for row in rows if row.arm == record.baseline), None)
    metric = record.metric.replace("_", " ")
    if baseline is None or not baseline.values:
        return f"Nothing to compare yet: no trial of the baseline {record.baseline} has finished."
    if baseline.failed:
        runs = f"{baseline.failed} of {seeds(len(baseline.values))}"
        return f"Nothing to compare: the baseline {record.baseline} gave no finite {metric} in {runs}."
    if any(row.values for row in rows if row.arm != record.baseline):
        shared = f"every seed it shares with {record.baseline}"
        return f"Nothing to compare: no method has a finite {metric} on {shared}."
    return f"Nothing to compare yet: only the baseline {record.baseline} has finished trials."
