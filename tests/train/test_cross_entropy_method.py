"""The cross-entropy search: it finds the best of a separable problem, never collapses, survives failures and interruption."""

import math

import pytest
import torch

from coloss.errors import InputError
from coloss.train import Choice, Number, SearchTrial, cross_entropy_search

TOY = {f"axis {number}": Choice(["good", "bad"]) for number in range(6)}


def count_bad(setting):
    return sum(value == "bad" for value in setting.values())


def test_a_separable_toy_converges():
    found = cross_entropy_search(TOY, count_bad, rounds=8, seed=1)
    assert found.score == 0 and set(found.best.values()) == {"good"}
    assert all(law.probabilities[0] > 0.9 for law in found.law.values())
    assert found.rounds == 8 and len(found.history) == 160


def test_every_kind_of_axis():
    space = {
        "rate": Number(1e-5, 1.0, log=True),
        "share": Number(-1.0, 1.0),
        "layers": Number(1, 64, log=True, integer=True),
        "heads": Number(1, 9, integer=True),
    }

    def objective(setting):
        return -(
            (math.log10(setting["rate"]) + 3) ** 2
            + (setting["share"] - 0.4) ** 2
            + math.log(setting["layers"] / 8) ** 2
            + (setting["heads"] - 5) ** 2
        )

    found = cross_entropy_search(space, objective, rounds=10, direction="higher")
    assert found.score > -0.2 and found.best["heads"] == 5 and 5 <= found.best["layers"] <= 12
    for trial in found.history:
        assert 1e-5 <= trial.setting["rate"] <= 1 and -1 <= trial.setting["share"] <= 1
        assert isinstance(trial.setting["layers"], int) and 1 <= trial.setting["layers"] <= 64


def test_the_law_moves_as_the_formula_says():
    """One round, worked by hand from its own draws."""
    space = {"x": Number(0.0, 10.0), "kind": Choice("abc")}
    found = cross_entropy_search(
        space, lambda s: s["x"], samples=10, elite=0.3, smoothing=0.6, rounds=1, least_probability=0
    )
    elite = sorted(found.history, key=lambda trial: trial.score)[:3]
    places = torch.tensor([trial.setting["x"] / 10 for trial in elite], dtype=torch.float64)
    assert found.law["x"].mean == pytest.approx(0.6 * places.mean().item() + 0.4 * 0.5)
    assert found.law["x"].deviation == pytest.approx(0.6 * places.std(correction=0).item() + 0.4 * 0.5)
    shares = [sum(trial.setting["kind"] == kind for trial in elite) / 3 for kind in "abc"]
    assert found.law["kind"].probabilities == pytest.approx([0.6 * share + 0.4 / 3 for share in shares])


def test_one_elite_setting_does_not_end_the_search():
    space = TOY | {"x": Number(0.0, 1.0)}
    found = cross_entropy_search(space, lambda s: s["x"], samples=3, elite=0.01, smoothing=1.0, rounds=12)
    assert found.law["x"].deviation >= 0.02
    for name in TOY:
        assert min(found.law[name].probabilities) >= 0.02 - 1e-12
        assert sum(found.law[name].probabilities) == pytest.approx(1)


def test_failing_trials_never_win_nor_move_the_law():
    def objective(setting):
        return math.nan if setting["axis 0"] == "good" else float(count_bad(setting))

    found = cross_entropy_search(TOY, objective, rounds=8)
    assert found.best["axis 0"] == "bad" and found.score == 1 and found.law["axis 0"].probabilities[1] > 0.9
    nothing = cross_entropy_search(TOY, lambda _: math.nan, samples=4, rounds=2)
    assert nothing.best is None and math.isnan(nothing.score)
    assert nothing.law["axis 0"].probabilities == (0.5, 0.5)
    assert cross_entropy_search(TOY, lambda _: -math.inf, direction="higher", rounds=1).best is None


def test_an_interrupted_search_goes_on_as_if_it_had_not_been():
    space = TOY | {"x": Number(1e-3, 1.0, log=True)}

    def objective(setting):
        return count_bad(setting) + setting["x"]

    whole = cross_entropy_search(space, objective, samples=6, rounds=4, seed=5)
    saved, calls = [], []

    def breaks(setting):
        calls.append(setting)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return objective(setting)

    with pytest.raises(KeyboardInterrupt):
        cross_entropy_search(
            space, breaks, samples=6, rounds=4, seed=5, on_trial=lambda t: saved.append(vars(t))
        )
    assert len(saved) == 9  # plain dicts, as they come from JSON
    rest = []
    again = cross_entropy_search(
        space, lambda s: rest.append(s) or objective(s), samples=6, rounds=4, seed=5, history=saved
    )
    assert again == whole and len(rest) == 24 - 9
    with pytest.raises(InputError, match="history must come from a search with these arguments"):
        cross_entropy_search(space, objective, samples=6, rounds=4, seed=6, history=saved)


def test_patience_ends_it():
    found = cross_entropy_search(TOY, lambda _: 1.0, rounds=9, patience=2)
    assert found.rounds == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "samples must be >= 2, got 1"),
        ({"elite": 0.0}, r"elite must be in \(0, 1\], got 0.0"),
        ({"smoothing": 1.5}, "smoothing must be in"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"patience": 0}, "patience must be >= 1"),
        ({"least_deviation": 0.0}, "least_deviation must be > 0"),
        ({"space": {}}, "space must have at least one axis"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy_search(**{"space": TOY, "objective": count_bad} | arguments)


def test_bad_axes_are_refused():
    for build, message in (
        (lambda: Choice([]), "values must be different"),
        (lambda: Choice([1, 1]), "values must be different"),
        (lambda: Number(1.0, 1.0), "low must be < high"),
        (lambda: Number(0.0, 1.0, log=True), "low must be > 0"),
        (lambda: Number(0.5, 2.0, integer=True), "whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    assert SearchTrial(0, {"a": 1}, 2.0).score == 2.0
