"""The recipe from end to end: what it leaves in its folder, a run that was killed, a file judged again."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coloss.data import load
from coloss.distillation import (
    DistillationPlan,
    DistilledDataset,
    TrajectoryMatcher,
    distill_dataset,
    distillation_recipe,
    fresh_networks,
)
from coloss.errors import InputError
from coloss.train import Budget

TINY = DistillationPlan(
    experts=2,
    expert_epochs=3,
    max_start=2,
    steps=2,
    inner_batch=4,
    networks=2,
    network_steps=2,
    learn_labels=True,
)


SETS = ("distilled", "random", "kmeans", "means", "whole")


def distil(folder: Path, data: str = "iris:2", steps: int = 4, **options) -> dict[str, float]:
    return distill_dataset(data, folder, budget=Budget(steps=steps), plan=TINY, **options)


@pytest.fixture(scope="module", autouse=True)
def _one_rate() -> Iterator[None]:
    """How a rate is chosen is another module's matter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fresh_networks, "LEARNING_RATES", (0.1,))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("whole")
    shares: list[float] = []
    metrics = distil(folder, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    return folder, metrics


def test_the_file_holds_soft_labels_a_rate_and_where_it_comes_from(finished: tuple) -> None:
    folder, metrics = finished
    stored = DistilledDataset.load(folder / "distilled.npz")
    assert stored.images.shape == (6, 4)
    assert (stored.source, stored.seed, stored.images_per_class) == ("iris", 0, 2)
    assert torch.equal(stored.labels.argmax(1), torch.arange(3).repeat_interleave(2))
    assert (stored.labels < 1).all()
    assert stored.learning_rate == metrics["learning_rate"] > 0
    for name in SETS:
        low, high = metrics[f"{name}_accuracy_low"], metrics[f"{name}_accuracy_high"]
        assert low <= metrics[f"{name}_accuracy"] <= high
    assert json.loads((folder / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize("where", ["experts", "matching"])
def test_a_killed_run_goes_on_to_the_same_bits(
    finished: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    calls = 0

    def killed(original):
        def wrapped(*args, **options):
            nonlocal calls
            calls += 1
            if calls == (2 if where == "experts" else 3):
                raise KeyboardInterrupt
            return original(*args, **options)

        return wrapped

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if where == "experts":
            from coloss.distillation import distillation_recipe as recipe

            patched.setattr(recipe, "record_trajectory", killed(recipe.record_trajectory))
        else:
            patched.setattr(TrajectoryMatcher, "step", killed(TrajectoryMatcher.step))
        distil(tmp_path)
    assert not (tmp_path / "distilled.npz").exists()
    metrics = distil(tmp_path)
    folder, expected = finished
    assert metrics == expected
    one, other = (DistilledDataset.load(place / "distilled.npz") for place in (folder, tmp_path))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)
    assert one.learning_rate == other.learning_rate
    last = sorted((tmp_path / "matching").glob("step-*"))[-1]
    ours, theirs = (
        load_file(place / "matching" / last.name / "tensors.safetensors") for place in (folder, tmp_path)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_of_another_run_is_refused_and_damage_is_named(finished: tuple, tmp_path: Path) -> None:
    folder, _ = finished
    with pytest.raises(InputError, match="holds a run on 'iris' with seed 0: choose another folder"):
        distil(folder, seed=1)
    with pytest.raises(InputError, match="and other settings: choose another folder"):
        distil(folder, data="iris:1")
    with pytest.raises(InputError, match="has 4 steps already, more than 3"):
        distil(folder, steps=3)
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "expert-000.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"expert-000\.safetensors is damaged"):
        distil(tmp_path)


def test_a_distilled_file_in_place_of_data_is_judged_again(finished: tuple, tmp_path: Path) -> None:
    folder, expected = finished
    path = str(folder / "distilled.npz")
    metrics = distill_dataset(path, tmp_path, plan=TINY)
    # The plan's networks and steps are those of the run that made the file.
    assert metrics == {name: expected[name] for name in expected if name.split("_")[0] in SETS}
    assert len(metrics) == 3 * len(SETS)
    assert "learning_rate" not in metrics
    assert not (tmp_path / "experts").exists()
    with pytest.raises(InputError, match="takes no budget for a distilled file: it is judged, not distilled"):
        distill_dataset(path, tmp_path, plan=TINY, budget=Budget(steps=2))


def test_a_set_on_which_networks_diverge_scores_nothing_and_the_metrics_are_written(
    finished: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation_recipe, "evaluate_references", lambda *_, **options: {})
    folder, _ = finished
    wild = replace(DistilledDataset.load(folder / "distilled.npz"), learning_rate=1e38)
    metrics = distill_dataset(str(wild.save(tmp_path / "wild.npz")), tmp_path / "run", plan=TINY)
    assert metrics["distilled_accuracy"] == 0.0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


def test_the_matching_loss_stands_beside_that_of_a_student_at_rest(finished: tuple) -> None:
    _, metrics = finished
    assert metrics["matching_loss_at_rest"] == 2.0  # the end, and one point between


def test_experts_stop_at_the_last_epoch_that_is_matched(tmp_path: Path) -> None:
    plan = replace(TINY, experts=1, expert_epochs=9)
    one_step = replace(plan, outer_steps=1)
    distillation_recipe.distill_splits(load("iris"), one_step, lambda: nn.Linear(4, 3), folder=tmp_path)
    stored = load_file(tmp_path / "experts" / "expert-000.safetensors")
    assert len(stored["trajectory"]) == plan.max_start + plan.expert_steps == 4


def test_the_plan_reaches_the_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict = {}

    class Stopped(Exception):
        pass

    def matcher(*args, **options):
        given.update(options)
        raise Stopped

    monkeypatch.setattr(distillation_recipe, "TrajectoryMatcher", matcher)
    monkeypatch.setattr(distillation_recipe, "_expert", lambda number, *_: (torch.zeros(4, 1), 0.5))
    plan = replace(TINY, image_rate=0.5, clip=3.0, truncate=1)
    splits = load("iris")
    with pytest.raises(Stopped):
        distillation_recipe.distill_splits(splits, plan, lambda: nn.Linear(4, 3))
    assert (given["image_rate"], given["clip"], given["truncate"]) == (0.5, 3.0, 1)


def test_a_place_where_experts_cannot_be_kept_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "experts").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*expert-000\.safetensors"):
        distil(tmp_path)


@pytest.mark.parametrize(
    ("data", "budget", "message"),
    [
        ("iris:0", Budget(steps=1), "images per class must be >= 1, got 0"),
        ("iris:40", Budget(steps=1), "images_per_class is too large: per_class must be <= 30"),
        ("diabetes", Budget(steps=1), "data must have one class for each sample, got the regression set"),
        ("iris", Budget(epochs=1), "takes a budget in steps, like 500steps"),
    ],
)
def test_what_cannot_be_distilled_is_said(tmp_path: Path, data: str, budget: Budget, message: str) -> None:
    with pytest.raises(InputError, match=message):
        distill_dataset(data, tmp_path, budget=budget, plan=TINY)


def test_small_images_are_distilled_with_a_kmeans_start_and_augmentation(tmp_path: Path) -> None:
    plan = DistillationPlan(
        experts=1,
        expert_epochs=2,
        max_start=1,
        steps=2,
        start="kmeans",
        augmentation="shifted",
        momentum=0.9,
        perturbation=1.0,
        balanced=True,
        penalty=2.0,
        checkpoint=True,
        networks=1,
        network_steps=2,
    )
    metrics = distill_dataset("digits:3", tmp_path, budget=Budget(steps=2), plan=plan)
    stored = DistilledDataset.load(tmp_path / "distilled.npz")
    assert stored.images.shape == (30, 1, 8, 8)
    assert stored.momentum == 0.9
    assert stored.augmentation == "shifted"
    real = load("digits").train.inputs
    torch.testing.assert_close(stored.normalize(real).std(), torch.tensor(1.0), rtol=1e-3, atol=1e-3)
    assert "distilled_accuracy_low" not in metrics  # one network has no interval
    assert math.isfinite(metrics["matching_loss"])
