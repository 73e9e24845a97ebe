"""Watches what a contrastive loss makes of its embeddings while a network trains, and changes nothing in training."""

import math

import torch
from torch import Tensor, nn

from coloss.contrastive.temperature_report import temperature_report
from coloss.errors import InputError
from coloss.metrics import alignment, tolerance, uniformity
from coloss.ops import effective_rank, gram_singular_values
from coloss.train import Method, Schedule, State, value_at


class EmbeddingMonitor(Method):
    """Logs how even, how tolerant, how aligned and how many-dimensional the embeddings of a batch are, every so many steps.

    It reads what a method on views (`NTXent`, or any `coloss.train.ViewMethod`) leaves in the batch: give it after that method. Into the
    run's history, loggers and report go, of the first view, `batch_uniformity` (0 is one point, lower is more even), `batch_rank`
    (effective rank, not centred) and with class targets `batch_tolerance`; of the first two views `batch_alignment`; and
    `batch_effective_negatives` of NT-Xent at the run's temperature. NaN where a value is not finite. These are random views of one batch,
    good to see a course and a collapse; to compare runs, use `coloss.metrics.evaluate_encoder`. Training is bit for bit what it is without
    it. Each process logs its own rows.

    Args:
        every: steps between looks, >= 1.
        temperature: for the effective negatives: a number > 0, or a schedule; None takes that of the run's first method that has one
            (`NTXent.temperature`), and without any logs no effective negatives.

    Raises:
        InputError: for a value out of range; in a run, if no method has left embeddings.

    Cost:
        A look: O(rows^2 * dim), and a copy of single numbers from the device.

    Source:
        Wang and Liu 2021, arXiv 2012.09740; Wang and Isola 2020, arXiv 2005.10242.

    Examples:
        >>> import coloss
        >>> from coloss.contrastive import NTXent
        >>> from coloss.nn import MLP
        >>> images, classes = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
        >>> watched = [NTXent(), EmbeddingMonitor(every=1)]
        >>> run = coloss.fit(
        ...     MLP(64, [32]), (images, classes), methods=watched, budget=coloss.Budget(epochs=2)
        ... )
        >>> for name in sorted(run.history[-1].metrics):
        ...     print(name)
        batch_alignment
        batch_effective_negatives
        batch_rank
        batch_tolerance
        batch_uniformity
    """

    def __init__(self, *, every: int = 50, temperature: Schedule | None = None) -> None:
        super().__init__()
        if every < 1:
            raise InputError(f"every must be >= 1, got {every}")
        if temperature is not None and not callable(temperature) and not 0 < temperature < math.inf:
            raise InputError(f"temperature must be > 0 and finite, or a schedule, got {temperature}")
        self.every, self.temperature = every, temperature

    @torch.no_grad()
    def on_step(self, state: State) -> None:
        if state.step % self.every:
            return
        extras = state.batch.extras
        embeddings, count = extras.get("embeddings"), extras.get("embedding_views", 1)
        if not isinstance(embeddings, Tensor):
            raise InputError(
                "EmbeddingMonitor finds no embeddings: give it after a method on views, such as NTXent"
            )
        views = embeddings.detach().float().unflatten(0, (count, -1))
        state.log(self._measured(views, _classes(state, views.shape[1]), self._temperature(state)))

    def _temperature(self, state: State) -> float | None:
        schedule = self.temperature
        if schedule is None:
            known = (getattr(method, "temperature", None) for method in state.methods if method is not self)
            schedule = next(
                (value for value in known if isinstance(value, int | float) or callable(value)), None
            )
        return None if schedule is None else value_at(schedule, state.progress)

    def _measured(self, views: Tensor, classes: Tensor | None, temperature: float | None) -> dict[str, float]:
        count, samples = views.shape[:2]
        several = count > 1
        names = ["batch_uniformity", "batch_rank"]
        names += ["batch_tolerance"] * (classes is not None) + ["batch_alignment"] * several
        names += ["batch_effective_negatives"] * (several and temperature is not None)
        found = dict.fromkeys(names, math.nan)
        if not bool(views.isfinite().all()):
            return found
        first = views[0]
        found["batch_uniformity"] = float(uniformity(first))
        found["batch_rank"] = float(effective_rank(gram_singular_values(first)))
        if classes is not None:
            found["batch_tolerance"] = float(tolerance(first, classes))
        if several:
            found["batch_alignment"] = float(alignment(first, views[1]))
        if several and temperature is not None and samples > 1:
            (row,) = temperature_report(first, views[1], temperatures=(temperature,)).rows
            found["batch_effective_negatives"] = row.effective_negatives
        return found


def _is_schedule(value: object) -> bool:
    return isinstance(value, int | float) or (callable(value) and not isinstance(value, nn.Module))


def _classes(state: State, samples: int) -> Tensor | None:
    """The class of each sample of the first view; None where targets are no classes."""
    targets = state.batch.targets
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        return None
    return targets[:samples] if len(targets) >= samples else None
