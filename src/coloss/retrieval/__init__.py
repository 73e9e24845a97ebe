"""Retrieval: queries find documents by their scores."""

from coloss.metrics import (
    pooled_auc as pooled_auc,
)
from coloss.metrics import (
    roc_curve_pooled as roc_curve_pooled,
)
from coloss.metrics import (
    threshold_at_fpr as threshold_at_fpr,
)

from .joined_scores import JoinedScores as JoinedScores
from .joined_scores import joined_scores as joined_scores
from .mann_whitney import MannWhitneyLoss as MannWhitneyLoss
from .mann_whitney import MannWhitneyRetrieval as MannWhitneyRetrieval
from .mann_whitney import mann_whitney_loss as mann_whitney_loss
from .threshold_report import ThresholdReport as ThresholdReport
from .threshold_report import threshold_report as threshold_report

__all__ = [
    "JoinedScores",
    "MannWhitneyLoss",
    "MannWhitneyRetrieval",
    "ThresholdReport",
    "joined_scores",
    "mann_whitney_loss",
    "pooled_auc",
    "roc_curve_pooled",
    "threshold_at_fpr",
    "threshold_report",
]
