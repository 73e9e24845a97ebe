"""Do the loss terms pull in the same direction? Cosines and norms of their gradients on shared parameters."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn

from coloss.train.state import State


@dataclass(frozen=True)
class Conflict:
    """Gradient cosines ("first|second" -> cosine) and norms by term, at one step."""

    step: int
    cosine: dict[str, float]
    norm: dict[str, float]


@dataclass
class ConflictMonitor:
    """Watches how the gradients of the loss terms relate, every `every` steps.

    For each pair of terms: the cosine of their gradients, taken over the parameters that both reach (NaN when there are none
    or a gradient is zero). For each term: its gradient norm over parameters that at least two terms reach. Terms are unweighted.

    Args:
        every: steps between two looks, >= 1.
        parameters: chooses the parameters to look at, `model -> iterable of parameters`; default: all trainable ones.

    Raises:
        ValueError: if `every` < 1.

    Cost: one extra backward pass for each term, on the steps it looks; nothing on the others.

    Examples:
        >>> import coloss
        >>> monitor = ConflictMonitor(every=1)
        >>> def opposed(outputs, targets):
        ...     return {"up": outputs.mean(), "down": -outputs.mean()}
        >>> data = (torch.randn(8, 4), torch.zeros(8))
        >>> run = coloss.fit(nn.Linear(4, 1), data, opposed, monitor=monitor, budget=coloss.Budget(steps=1))
        >>> round(run.conflicts[0].cosine["up|down"], 6)
        -1.0
    """

    every: int = 50
    parameters: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None
    found: list[Conflict] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be >= 1, got {self.every}")

    def is_due(self, state: State, terms: dict[str, Tensor]) -> bool:
        """Tell whether this step is one to look at: every k-th, with at least two terms."""
        return state.step % self.every == 0 and len(terms) >= 2

    def look(self, state: State, terms: dict[str, Tensor]) -> None:
        """Measure now, if it is due; the graph is kept."""
        if not self.is_due(state, terms):
            return
        chosen = state.trainable if self.parameters is None else list(self.parameters(state.model))
        gradients = {
            name: state.gradients(term, chosen) for name, term in terms.items() if term.requires_grad
        }
        reach = [sum(found is not None for found in column) for column in zip(*gradients.values())]
        shared = [count >= 2 for count in reach]
        norm = {
            name: _norm([g for g, keep in zip(found, shared) if keep]) for name, found in gradients.items()
        }
        cosine = {
            f"{first}|{second}": _cosine(gradients[first], gradients[second])
            for first, second in combinations(gradients, 2)
        }
        self.found.append(Conflict(state.step, cosine, norm))

    def summary(self) -> dict[str, dict[str, float]]:
        """For each pair of terms: the mean cosine and the share of looks at which the gradients opposed each other."""
        pairs: dict[str, list[float]] = {}
        for conflict in self.found:
            for pair, value in conflict.cosine.items():
                if value == value:
                    pairs.setdefault(pair, []).append(value)
        return {
            pair: {
                "mean_cosine": sum(values) / len(values),
                "share_in_conflict": sum(value < 0 for value in values) / len(values),
            }
            for pair, values in pairs.items()
        }


def _norm(gradients: Sequence[Tensor | None]) -> float:
    squares = [g.double().square().sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _cosine(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    both = [(a.double(), b.double()) for a, b in zip(first, second) if a is not None and b is not None]
    if not both:
        return float("nan")
    dot = torch.stack([(a * b).sum() for a, b in both]).sum()
    scale = (
        torch.stack([a.square().sum() for a, _ in both]).sum()
        * torch.stack([b.square().sum() for _, b in both]).sum()
    )
    return float(dot / scale.sqrt()) if scale > 0 else float("nan")
