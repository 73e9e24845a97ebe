"""How long to train: epochs, steps or seconds."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Exactly one limit on training; seconds count training only, evaluation excluded.

    Args:
        epochs: passes over the training data, > 0.
        steps: optimizer steps, > 0.
        seconds: wall time of training steps, > 0. Runs limited in seconds are comparable in cost, not bit for bit.

    Raises:
        ValueError: if not exactly one limit is given, or it is not > 0.

    Examples:
        >>> Budget(steps=100).progress(step=25, epoch_share=0.0, seconds=3.0)
        0.25
    """

    epochs: float | None = None
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = self.as_dict()
        if len(given) != 1:
            raise ValueError(f"budget must be exactly one of epochs, steps, seconds, got {given or 'none'}")
        name, value = next(iter(given.items()))
        if not 0 < value < math.inf:
            raise ValueError(f"budget {name} must be > 0 and finite, got {value}")

    def as_dict(self) -> dict[str, float]:
        """The limit as {"steps": 100}."""
        limits = {"epochs": self.epochs, "steps": self.steps, "seconds": self.seconds}
        return {name: value for name, value in limits.items() if value is not None}

    def part(self, share: float) -> "Budget":
        """Some share of it, for one of several stages; a step at least.

        Raises:
            ValueError: if the share is not in (0, 1].

        Examples:
            >>> Budget(steps=100).part(0.6), Budget(seconds=10).part(0.5).seconds
            (Budget(epochs=None, steps=60, seconds=None), 5.0)
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if self.steps is not None:
            return Budget(steps=max(round(self.steps * share), 1))
        return Budget(**{name: value * share for name, value in self.as_dict().items()})  # type: ignore[arg-type]

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "60s", "2m", "300steps" or "20epochs".

        Raises:
            ValueError: if the text is none of these.

        Examples:
            >>> Budget.parse("2m"), Budget.parse("300steps").steps
            (Budget(epochs=None, steps=None, seconds=120.0), 300)
        """
        compact = text.strip().lower().replace(" ", "")
        for suffix, name, factor in _UNITS:
            if compact.endswith(suffix):
                try:
                    value = float(compact[: -len(suffix)]) * factor
                except ValueError:
                    break
                if name == "steps":
                    if not math.isfinite(value) or value != int(value):
                        break
                    return cls(steps=int(value))
                return cls(epochs=value) if name == "epochs" else cls(seconds=value)
        raise ValueError(f"budget must look like 60s, 2m, 300steps or 20epochs, got {text!r}")

    def progress(self, step: int, epoch_share: float, seconds: float) -> float:
        """Share of the budget spent, in [0, 1]; `epoch_share` counts epochs with fractions."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        if self.epochs is not None:
            return min(epoch_share / self.epochs, 1.0)
        assert self.seconds is not None
        return min(seconds / self.seconds, 1.0)


_UNITS = (
    ("epochs", "epochs", 1.0),
    ("epoch", "epochs", 1.0),
    ("steps", "steps", 1.0),
    ("step", "steps", 1.0),
    ("min", "seconds", 60.0),
    ("m", "seconds", 60.0),
    ("s", "seconds", 1.0),
)
