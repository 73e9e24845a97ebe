"""Watches the effective rank of embeddings while a network trains, and warns when they collapse. Changes nothing in training."""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.metrics import feature_standard_deviation, rank_meters
from coloss.ops import gather_with_gradient, world_size
from coloss.train.feature_source import FeatureSource
from coloss.train.method import Method
from coloss.train.state import State


class CollapseWarning(UserWarning):
    """Embeddings use few directions, or hardly differ; the message holds the numbers.

    Examples:
        >>> issubclass(CollapseWarning, UserWarning)
        True
    """


class EffectiveRankMonitor(Method):
    """Rank, spread and scale of the newest embeddings, every so many steps of a run or whenever you ask.

    In a loop of your own: `update(embeddings)` at every step, `compute()` when you want to know. As a method of a run it does both by
    itself after the optimizer step, at every `every`-th one, with the rows of as many steps before as fill its buffer. Training is bit
    for bit what it is without it. The values do not enter the run's history: they are in `found`, and in checkpoints with it.

    Those rows are embeddings of random views by weights of several steps. That is good enough to notice collapse; to choose among runs,
    compute `rankme` on a fresh pass without random views. Over several processes the rows of all are gathered, so each holds the same
    values (and all must call `update`).

    Args:
        capacity: newest rows kept, >= 2; at least 10 times their length for a value near that of the whole data.
        every: steps between looks, >= 1.
        source: what to watch: a module path (with ":input" for what goes in), or None for the embeddings that a method of the run
            leaves in `state.batch.extras["embeddings"]` (LeJEPA: its projector's output), else the model's output, or where there is an
            objective the input of its classifier.
        min_rank_share: warn when RankMe falls below this share of what is possible (the smaller of rows and dimensions), in [0, 1];
            0 for never. Features of a classifier tend to as many directions as there are classes, which is no fault: lower it there.
        min_spread: warn when the standard deviation of unit-length rows falls below this share of 1 / sqrt(dimensions), its value for
            directions spread evenly; >= 0, 0 for never.
        min_scale: warn when the root mean square distance of a row to the mean falls below this, >= 0, 0 for never; it is about 1 for
            rows of unit length spread evenly, and sqrt(dimensions) for a standard normal cloud. A cloud that shrinks to a point
            keeps its rank.

    Attributes:
        found: (step, values) of each look of a run.

    Raises:
        InputError: for a value out of range, or a source that is no module or gives no vectors.

    Cost:
        A look: O(rows * dimensions^2). On the steps before it, a copy of the embeddings to the CPU in float32.

    Source:
        Garrido et al., 2023 (RankMe), arXiv 2210.02885; Chen and He 2021 (SimSiam), arXiv 2011.10566, for the spread.

    Examples:
        >>> monitor = EffectiveRankMonitor()
        >>> for _ in range(4):
        ...     monitor.update(torch.randn(100, 8))
        >>> values = monitor.compute()
        >>> values["rows"], 7 < values["rankme"] < 8
        (400.0, True)
    """

    def __init__(
        self,
        *,
        capacity: int = 2048,
        every: int = 50,
        source: str | None = None,
        min_rank_share: float = 0.1,
        min_spread: float = 0.1,
        min_scale: float = 0.1,
    ) -> None:
        super().__init__()
        if capacity < 2:
            raise InputError(f"capacity must be >= 2, got {capacity}")
        if every < 1:
            raise InputError(f"every must be >= 1, got {every}")
        if not 0 <= min_rank_share <= 1:
            raise InputError(f"min_rank_share must be in [0, 1], got {min_rank_share}")
        for name, value in (("min_spread", min_spread), ("min_scale", min_scale)):
            if not value >= 0:
                raise InputError(f"{name} must be >= 0, got {value}")
        self.capacity, self.every = capacity, every
        self.min_rank_share, self.min_spread, self.min_scale = min_rank_share, min_spread, min_scale
        self.named = source is not None
        self.source = FeatureSource(source)
        self.newest = _NewestRows(capacity)
        self.found: list[tuple[int, dict[str, float]]] = []
        self._alarmed = False

    @torch.no_grad()
    def update(self, embeddings: Float[Tensor, "rows dim"]) -> None:
        """Take in rows; the oldest beyond `capacity` are dropped.

        Raises:
            InputError: if they are no matrix, or their length differs from that of the rows before.
        """
        if embeddings.ndim != 2:
            raise InputError(f"embeddings must be (rows, dim), got shape {tuple(embeddings.shape)}")
        self.newest.add(gather_with_gradient(embeddings.detach()[-self.capacity :].float()).cpu())

    def compute(self) -> dict[str, float]:
        """The numbers of the rows kept; warns if they tell of collapse, once until they recover.

        Returns:
            "rows"; "rankme" and, centred, "rankme_centered", "entropy_rank", "participation_ratio"; "stable_rank";
            "feature_std" (of rows of unit length); "scale" (root mean square distance to the mean); "collapsed" (0 or 1).
            NaN for everything but "rows" and "collapsed" when there are fewer than 2 rows or a value is not finite.
        """
        rows = self.newest.rows
        values = {"rows": float(len(rows))}
        if len(rows) < 2 or not bool(rows.isfinite().all()):
            return values | dict.fromkeys(_NAMES, math.nan) | {"collapsed": 0.0}
        values |= rank_meters(rows) | {
            "feature_std": float(feature_standard_deviation(rows)),
            "scale": float(rows.double().var(0, correction=0).sum().sqrt()),
        }
        faults = self._faults(values, *rows.shape)
        if faults and not self._alarmed:
            warnings.warn(f"embeddings collapse: {', '.join(faults)}", CollapseWarning, stacklevel=2)
        self._alarmed = bool(faults)
        return values | {"collapsed": float(bool(faults))}

    def setup(self, state: State) -> None:
        self.source.setup(state)

    def on_step(self, state: State) -> None:
        left = -state.step % self.every
        embeddings = self._embeddings(state)
        # Only the last steps before a look fill the buffer. Processes must agree on when to gather, so several do so at every step.
        if world_size() > 1 or left * len(embeddings) <= self.capacity:
            self.update(embeddings)
        if left == 0:
            self.found.append((state.step, self.compute()))

    def get_extra_state(self) -> dict[str, Any]:
        return {"found": [list(look) for look in self.found], "alarmed": self._alarmed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.found = [(step, values) for step, values in state["found"]]
        self._alarmed = state["alarmed"]

    def _embeddings(self, state: State) -> Tensor:
        left_by_a_method = state.batch.extras.get("embeddings")
        if not self.named and isinstance(left_by_a_method, Tensor):
            return left_by_a_method
        return self.source.read(state).detach()

    def _faults(self, values: dict[str, float], rows: int, dim: int) -> list[str]:
        possible, even = min(rows, dim), 1 / math.sqrt(dim)
        limits = (
            ("rankme", self.min_rank_share * possible, f"of {possible} possible"),
            ("feature_std", self.min_spread * even, f"of {even:.3g} for even directions"),
            ("scale", self.min_scale, ""),
        )
        return [
            f"{name} is {values[name]:.3g} {note}".rstrip() + f" (limit {limit:.3g})"
            for name, limit, note in limits
            if values[name] < limit
        ]


_NAMES = (
    "rankme",
    "rankme_centered",
    "entropy_rank",
    "participation_ratio",
    "stable_rank",
    "feature_std",
    "scale",
)


class _NewestRows(nn.Module):
    """The newest rows on the CPU, part of the state dict but no buffer: data-parallel training sends buffers around at every step."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.rows = torch.zeros(0, 0)

    def add(self, rows: Tensor) -> None:
        if len(self.rows) and rows.shape[1] != self.rows.shape[1]:
            raise InputError(
                f"embeddings must have length {self.rows.shape[1]} as before, got {rows.shape[1]}"
            )
        kept = torch.cat([self.rows, rows]) if len(self.rows) else rows
        self.rows = kept[-self.capacity :].clone()

    def get_extra_state(self) -> Tensor:
        return self.rows

    def set_extra_state(self, state: Tensor) -> None:
        self.rows = state.cpu().clone()
