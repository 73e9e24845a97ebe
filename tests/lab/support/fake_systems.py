"""Made-up systems whose claims come out as they are told, in milliseconds; run as a script, it measures one of them."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from coloss import Arm, Budget, Claim, Method, Task
from coloss.data import IndexedDataset, Splits
from coloss.lab.catalog import Entry

OFFSETS = {"plain": 0.0, "better": 0.1, "worse": -0.1, "equal": 0.0}
PAUSE = 0.0


def _points(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, 4, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    parts = [
        IndexedDataset(inputs[a:b], targets[a:b], torch.arange(a, b))
        for a, b in ((0, 40), (40, 50), (50, 60))
    ]
    return Splits("points", "classification", *parts, (4,), num_classes=2)


class Marked(Method):
    """Carries a number to be read off the trained run."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def terms(self, state):
        return {"nothing": state.outputs.sum() * 0.0}


def _score(run, setting):
    time.sleep(PAUSE)
    name = run.methods[0].name if run.methods else "plain"
    noise = torch.randn(1, generator=torch.Generator().manual_seed(setting.seed)).item()
    spread = 1.0 if name == "equal" else 0.01
    return {
        "score": OFFSETS[name] + spread * 0.1 * noise * (1 if run.methods else 0),
        "steps": run.steps,
        "odd": float("nan"),
    }


TASK = Task(
    name="points",
    kind="classification",
    title="two clouds of points",
    load=_points,
    model=lambda splits: nn.Linear(4, 2),
    objective=nn.functional.cross_entropy,
    objective_name="cross-entropy",
    validate=lambda model, splits: {},
    test=lambda model, splits: {"zero": 0.0},
    metric="zero",
    budget=Budget(steps=4),
)


def _claim(method, **changes):
    arms = (Arm("plain"), Arm(method, lambda setting: [Marked(method)]))
    fields = {"statement": f"{method} beats plain.", "metric": "score", "baseline": "plain", "method": method}
    return Claim(**(fields | {"task": TASK, "arms": arms, "measure": _score} | changes))


def _trial(setting):
    """All arms of a seed at once, and one that the claim does not name beforehand."""
    assert setting.smoke == (setting.budget.steps == 3)
    shift = torch.rand(1).item()
    return {
        "before": {"score": 1.0 + shift, "data": float(setting.splits is not None)},
        "after": {"score": 2.0 + shift},
        "beside": {"score": 3.0},
    }


def _train_to_nan(setting):
    class Nan(Method):
        def terms(self, state):
            return {"bad": state.outputs.sum() * float("nan")}

    return [Nan()]


CLAIMS = {
    "better": _claim("better"),
    "worse": _claim("worse", tried="A hammer."),
    "equal": _claim("equal"),
    "lower": _claim("worse", direction="lower"),
    "few": _claim("better", seeds=3),
    "many": _claim("better", seeds=7, budget=Budget(steps=2)),
    "trial": Claim(
        statement="After beats before.", metric="score", baseline="before", method="after", trial=_trial
    ),
    "trial-on-task": Claim(
        statement="As well.", metric="score", baseline="before", method="after", trial=_trial, task=TASK
    ),
    "trial-incomplete": Claim(
        statement="Less.", metric="score", baseline="before", method="missing", trial=_trial
    ),
    "wrong-metric": _claim("better", metric="scor"),
    "wrong-arm": _claim("better", baseline="plane"),
    "no-task": _claim("better", task=None),
    "nan-metric": _claim("better", metric="odd"),
    "nan-loss": _claim("better", arms=(Arm("plain"), Arm("better", _train_to_nan))),
}
SLUGS = [*CLAIMS, "without-claim"]


def entries():
    """A catalog of these systems."""
    return tuple(
        Entry(slug, slug, "", "jepa", ("loss",), (), f"fake_rooms.{slug}", "", has_claim=slug in CLAIMS)
        for slug in SLUGS
    )


def load_claim(slug):
    """Stands in for the import of a room."""
    return CLAIMS[slug]


def install():
    """Let the lab see these systems instead of its own."""
    import coloss.lab.catalog
    import coloss.lab.claims

    coloss.lab.catalog.catalog = entries
    coloss.lab.claims.load_claim = load_claim


if __name__ == "__main__":
    PAUSE = 0.3
    install()
    from coloss.lab import verify

    slug, folder, evidence = sys.argv[1:]
    verify(slug, folder=Path(folder), evidence=Path(evidence))
