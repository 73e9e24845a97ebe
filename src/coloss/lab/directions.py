"""Whether a metric is better high or low, told by its name where nobody says."""

from coloss.metrics.statistics import Direction

_BETTER_LOW = {
    "nll",
    "ece",
    "mse",
    "mae",
    "rmse",
    "loss",
    "error",
    "perplexity",
    "brier",
    "uniformity",
    "alignment",
}


def metric_direction(metric: str) -> Direction:
    """Whether a metric is better high or low, by the words of its name.

    Examples:
        >>> metric_direction("accuracy"), metric_direction("nll"), metric_direction("test_error")
        ('higher', 'lower', 'lower')
    """
    return "lower" if _BETTER_LOW & set(metric.lower().replace("-", "_").split("_")) else "higher"
