r"""Trains a classifier on the metric that will judge it: F scores, balanced accuracy, MCC, or any formula of confusion counts.

AnyLoss: Han, Moniz and Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", KDD 2024, arXiv 2405.14745.

With p_i the predicted probability of the positive class, y_i the label, L the amplification, S and S' the sums of y and s:

    s_i  = 1 / (1 + exp(-L (p_i - 1/2)))                              soft decision, L = 73 in the paper
    TP = sum y s     FP = sum (1 - y) s     FN = sum y (1 - s)     TN = sum (1 - y) (1 - s)
    F_b  = (1 + b^2) TP / (b^2 S + S')        balanced accuracy = (TP / S + TN / (N - S)) / 2        ...
    loss = 1 - metric(TP, FP, FN, TN)         ds / dlogit = L s (1 - s) p (1 - p)

N and S are of the batch (the authors' Keras code takes N of the whole training set). The paper is binary. With more classes,
decisions are amplified by a softmax of L p / 2, for two classes the same thing, and the metrics of each class against the rest are
averaged over the classes that occur (`average="macro"`): an extension of ours.

When it helps: decisions at the threshold 1/2 (of the largest probability) are judged by a metric that cross-entropy does not aim
at and classes are rare; above all where the metric is a formula of one's own, such as a profit. When not: try class weights, with two
classes also a tuned threshold, first: for balanced accuracy and macro F1 they gave as much or more here, for nothing. Not
where probabilities are used: those of a metric's network are pushed to both sides of 1/2 and mean nothing. Not in batches of
fewer samples than a few times 1 / (share of positives): F1 of a batch without positives has no gradient, and the mean over small
batches is another aim than the metric of the set. Soft labels (smoothing, mixup) make soft counts, which is another metric.

The slope vanishes away from p = 1/2 (at L = 73 and p = 1/4 by 10^8): a network that is confidently wrong stays so. Start from
small logits, let L grow (the default of `MetricObjective`), or keep cross-entropy beside it (`replace_objective=False`).

Measured here (linear classifiers, digit 8 and thinned malignant tumours, 10 seeds, mean balanced accuracy at threshold 1/2):
trained on balanced accuracy with L from 5 to 73 0.923, with L = 73 throughout 0.860, on F1 0.899, on cross-entropy 0.884; on
cross-entropy with class weights 0.936, with a threshold tuned by cross-validation 0.931. F1 is no better for being trained on
(0.851 against 0.845 with cross-entropy, within the noise). Ten classes with a long tail (`coloss compare digits --imbalance 0.05
--metric macro_f1`, 8 seeds): macro F1 0.872, cross-entropy 0.765, cross-entropy with class weights 0.908.

The loss belongs to the whole batch. On several processes counts are summed over all of them, so that a step is that of one process
with the joined batch; `fit(accumulate=k)` joins the micro-batches. It keeps no state.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from coloss.classification.confusion_metrics import Metric, find_metric
from coloss.classification.metric_losses import (
    Average,
    as_identifier,
    averaged_score,
    batch_counts,
    metric_name,
)
from coloss.data import import_callable
from coloss.errors import InputError
from coloss.train import Claim, Method, Schedule, Setting, State, System, value_at


def amplification_schedule(start: float = 5.0, end: float = 73.0, share: float = 1.0) -> Schedule:
    """Amplification that grows geometrically from `start` to `end` over the first `share` of training.

    A low start lets every sample pull; a high end judges decisions as the metric does. Ours, not the paper's.

    Args:
        start: L at the beginning, > 0.
        end: L at the end, > 0.
        share: of the training, in (0, 1], after which L stays at `end`.

    Returns:
        A function of progress in [0, 1].

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> schedule = amplification_schedule(4.0, 64.0)
        >>> [round(schedule(progress), 6) for progress in (0.0, 0.5, 1.0)]
        [4.0, 16.0, 64.0]
    """
    for name, value in (("start", start), ("end", end)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return lambda progress: start * (end / start) ** min(max(progress, 0.0) / share, 1.0)


class MetricObjective(Method):
    """Train on 1 - metric of each batch instead of cross-entropy, or beside it.

    Adds the term `<metric>_loss`, for more than two classes with the macro average; logs the amplification, and with two classes the
    share of samples that are predicted positive (F1 has a flat bad optimum at 1: watch it).

    Args:
        metric: a name as for `metric_loss`, an import path `package.module:function`, or a function of `ConfusionCounts`.
        amplification: L > 0, or a schedule of progress.
        start_amplification: L at the beginning, from where it grows to `amplification` over the training (`amplification_schedule`);
            None keeps it constant, as published. Has no part in it where `amplification` is a schedule.
        average, positive: as for `metric_loss`.
        replace_objective: train on this loss alone; False adds it to the run's objective, which is what moves a network that is
            confidently wrong.
        weight: of the term: a number >= 0, or a schedule of progress.

    Raises:
        InputError: for a value out of range or an unknown metric; at a step, if the model's outputs are no logits that fit the targets.

    Cost: O(batch * classes), a few times that of cross-entropy; on several processes one collective of four numbers for each class.

    Source: Han, Moniz and Chawla, 2024, arXiv 2405.14745.

    Examples:
        >>> import torch, coloss
        >>> inputs = torch.randn(64, 4)
        >>> data = (inputs, (inputs[:, 0] > 1).long())
        >>> method = MetricObjective(metric="balanced_accuracy")
        >>> run = coloss.fit(torch.nn.Linear(4, 2), data, methods=[method], budget=coloss.Budget(epochs=2))
        >>> sorted(run.history[-1].terms)
        ['balanced_accuracy_loss']
    """

    batch_statistic = True

    def __init__(
        self,
        *,
        metric: str | Metric = "f1",
        amplification: Schedule = 73.0,
        start_amplification: float | None = 5.0,
        average: Average | None = None,
        positive: int = 1,
        replace_objective: bool = True,
        weight: Schedule = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("amplification", amplification), ("start_amplification", start_amplification)):
            if value is not None and not callable(value) and not 0 < value < float("inf"):
                raise InputError(f"{name} must be > 0 and finite, got {value}")
        if average not in (None, "binary", "macro", "micro"):
            raise InputError(f"average must be binary, macro or micro, got {average!r}")
        if not callable(weight) and not 0 <= weight < float("inf"):
            raise InputError(f"weight must be >= 0 and finite, or a schedule, got {weight}")
        if isinstance(metric, str):
            self.metric: Metric = import_callable(metric) if ":" in metric else find_metric(metric)
            self.term = f"{as_identifier(metric.partition(':')[2] or metric)}_loss"
        else:
            self.metric, self.term = metric, f"{metric_name(metric)}_loss"
        self.amplification = amplification
        if not callable(amplification) and start_amplification is not None:
            self.amplification = amplification_schedule(start_amplification, amplification)
        self.average, self.positive = average, positive
        self.replaces_objective = replace_objective
        self.term_weights: Mapping[str, Schedule] = {self.term: weight}

    def terms(self, state: State) -> dict[str, Tensor]:
        logits, targets = state.outputs, state.batch.targets
        if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
            found = f"{type(logits).__name__} and {type(targets).__name__}"
            raise InputError(f"a metric of decisions needs logits and targets as tensors, got {found}")
        amplification = value_at(self.amplification, state.progress)
        try:
            counts, average = batch_counts(
                logits, targets, -100, amplification, self.average, self.positive, True, True
            )
            loss = 1 - averaged_score(counts, self.metric, average, None)
        except ValueError as error:
            raise InputError(str(error)) from error
        state.log({"amplification": amplification})
        if average == "binary":
            everything = counts.predicted + counts.rejected
            state.log({"predicted_positive": (counts.predicted / everything).detach()})
        return {self.term: loss}


SYSTEM = System(
    slug="anyloss",
    title="AnyLoss: Transforming Classification Metrics into Loss Functions",
    paper="Han, Moniz and Chawla, 2024, arXiv 2405.14745",
    family="classification",
    acts_on=("loss",),
    api=(
        "coloss.classification.MetricObjective",
        "coloss.classification.MetricLoss",
        "coloss.classification.metric_loss",
        "coloss.classification.soft_confusion",
        "coloss.classification.ConfusionCounts",
        "coloss.classification.all_reduce_counts",
        "coloss.classification.find_metric",
        "coloss.classification.amplify",
        "coloss.classification.amplify_classes",
        "coloss.classification.amplification_schedule",
    ),
    method="coloss.classification.MetricObjective",
    kinds=("classification", "multilabel"),
)


def _measure(setting: Setting) -> Mapping[str, Mapping[str, float]]:
    """One seed of all arms."""
    from coloss.classification.rare_positives import compare_decisions, cross_entropy, weighted_cross_entropy

    def on(metric: str, start: float | None = 5.0) -> Callable[[], Sequence[Method]]:
        return lambda: [MetricObjective(metric=metric, start_amplification=start)]

    return compare_decisions(
        setting.seed,
        {"cross-entropy": cross_entropy, "cross-entropy, class weights": weighted_cross_entropy},
        {
            "balanced accuracy": on("balanced_accuracy"),
            "balanced accuracy, constant L": on("balanced_accuracy", None),
            "f1": on("f1"),
        },
        steps=3 if setting.smoke else 500,
        folds=2 if setting.smoke else 5,
    )


CLAIM = Claim(
    statement="Linear classifiers for two problems with rare positives (the digit 8, 10%; malignant tumours thinned to a twentieth of the "
    "benign) decide with a higher mean balanced accuracy on test data when trained on 1 - balanced accuracy, L growing from 5 to 73, than "
    "on cross-entropy, both with the threshold 1/2. (No claim against cross-entropy with a tuned threshold or with class weights: both are "
    "measured beside it.)",
    metric="balanced_accuracy",
    baseline="cross-entropy",
    method="balanced accuracy",
    seeds=10,
    trial=_measure,
)
