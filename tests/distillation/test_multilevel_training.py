"""`coloss run multilevel-training`: its stages, its curve, resumption after a kill, what it refuses, and its claim."""

import csv
import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import coloss.distillation.cycle_training as cycle_training
from coloss import Budget
from coloss.data.dataset import IndexedDataset
from coloss.distillation import CurvePoint, flops_to_reach, train_multilevel, two_level_cycle
from coloss.distillation.cycle_training import held_out_loss, single_stage, train_in_stages
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.nn import CausalLanguageModel
from coloss.train import load_model

TINY = {"dim": 8, "depth": 2, "heads": 2}


@pytest.fixture(scope="module")
def poem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "poem.txt.gz"
    path.write_bytes(gzip.compress(b"the cat sat on the mat, the rat sat on the cat. " * 60))
    return path


def run(poem: Path, folder: Path, **options: object) -> dict[str, float]:
    return train_multilevel(poem, folder, budget=Budget(steps=16), **(TINY | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(poem: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], list[float]]:
    """A run that was not disturbed: its folder, its numbers, and how it came on."""
    shares: list[float] = []
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(poem, folder, progress=shares.append), shares


def test_the_run_leaves_a_model_a_curve_and_honest_numbers(
    poem: Path, whole: tuple[Path, dict[str, float], list[float]]
) -> None:
    folder, found, shares = whole
    assert shares[0] > 0 and shares == sorted(shares) and shares[-1] <= 1
    assert found["scratch_flops"] * 0.8 < found["flops"] <= found["scratch_flops"]
    assert json.loads((folder / "metrics.json").read_text())["test_loss"] == found["test_loss"]
    characters = len(set("the cat sat on the mat, the rat sat on the cat. "))
    model = load_model(
        CausalLanguageModel(characters, dim=8, depth=2, heads=2, context=64),
        folder / "model.safetensors",
    )
    assert isinstance(model, CausalLanguageModel)
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, stages in (("v-cycle", ["0", "1", "2"]), ("scratch", ["0"])):
        of_run = [row for row in rows if row["run"] == name]
        assert list(dict.fromkeys(row["stage"] for row in of_run)) == stages
        flops = [float(row["flops"]) for row in of_run]
        assert flops == sorted(flops)
    assert float(rows[0]["validation_loss"]) < 6
    # All is there: nothing is trained again, and nothing changes.
    assert run(poem, folder) == found


def test_a_killed_run_goes_on_to_the_same_weights(
    poem: Path,
    whole: tuple[Path, dict[str, float], list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed, numbers, _ = whole
    fit, calls = cycle_training.fit, []

    class Killed(Exception):
        pass

    def dying(model: torch.nn.Module, *args: object, **options: object) -> object:
        calls.append(model)
        if len(calls) == 3:
            # Dies between two checkpoints of the last stage.
            options = options | {"progress": None}
            ended = 0

            def evaluate(model: torch.nn.Module) -> dict[str, float]:
                nonlocal ended
                ended += 1
                if ended == 6:
                    raise Killed
                return {"validation_loss": held_out_loss(model, validation)}

            validation = options["evaluate"].__closure__[0].cell_contents  # type: ignore[attr-defined]
            options["evaluate"] = evaluate
        return fit(model, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(cycle_training, "fit", dying)
        with pytest.raises(Killed):
            run(poem, tmp_path / "killed")
    names = {path.name for path in (tmp_path / "killed" / "v-cycle").iterdir()}
    assert "stage-1.safetensors" in names and "stage-2.safetensors" not in names
    resumed = run(poem, tmp_path / "killed")
    first, second = (load_file(folder / "model.safetensors") for folder in (undisturbed, tmp_path / "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name: value for name, value in resumed.items() if "seconds" not in name} == {
        name: value for name, value in numbers.items() if "seconds" not in name
    }


def test_another_run_bad_data_and_bad_budgets_are_refused(poem: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="choose another folder"):
        run(poem, tmp_path / "run")
    with pytest.raises(
        InputError, match="budget must be in steps or epochs, whose FLOPs are known, got 5 seconds"
    ):
        train_multilevel(poem, tmp_path / "a", budget=Budget(seconds=5.0), **TINY)
    with pytest.raises(InputError, match="must leave steps for each stage"):
        train_multilevel(poem, tmp_path / "b", budget=Budget(steps=1), **TINY)
    with pytest.raises(InputError, match="name must be that of a running text"):
        train_multilevel("iris", tmp_path / "c")
    with pytest.raises(InputError, match="heads must divide dim 8, got 3"):
        two_level_cycle(5, 10, dim=8, heads=3)
    with pytest.raises(InputError, match="must leave depth whole"):
        two_level_cycle(5, 10, depth=3)


def test_epochs_are_counted_in_steps_of_the_large_model(poem: Path, tmp_path: Path) -> None:
    train_multilevel(poem, tmp_path / "run", budget=Budget(epochs=4), **TINY)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["steps"] == 4 * ((round(48 * 60 * 0.9) - 1) // 64 // 16)


def test_flops_to_reach_reads_the_curve_of_the_model_that_ships() -> None:
    curve = [
        CurvePoint(0, 0, 0.0, 0.0, 4.0),
        CurvePoint(0, 9, 9.0, 0.0, 1.0),
        CurvePoint(1, 0, 9.0, 0.0, 2.0),
    ]
    curve += [CurvePoint(1, 1, 19.0, 0.0, 1.0)]
    assert flops_to_reach(curve, 1.5) == 14.0
    assert flops_to_reach(curve, 1.5, last_stage_only=False) == 7.5
    assert flops_to_reach(curve, 2.0) == 9.0
    assert flops_to_reach(curve, 0.5) == math.inf


def test_each_stage_has_its_own_order_and_rises_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[int, list[float]]] = []
    fit = cycle_training.fit

    def watching(*args: object, **options: object) -> object:
        schedule = options["learning_rate_schedule"]
        met.append((options["seed"], [schedule(share) for share in (0.0, 0.25, 0.5, 1.0)]))  # type: ignore[operator, arg-type]
        return fit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cycle_training, "fit", watching)
    ids = torch.arange(40).remainder(5).view(10, 4)
    windows = IndexedDataset(ids, ids)
    cycle = two_level_cycle(5, 8, dim=8, depth=2, heads=2, context=4, batch_size=4)
    options = {"learning_rate": 0.01, "warmup_steps": 2, "batch_size": 4}
    found = train_in_stages(cycle.new_model, cycle.stages, windows, windows, **options)  # type: ignore[arg-type]
    assert len({seed for seed, _ in met}) == 3
    assert met[1][1] == [0.0, 0.5, 1.0, 0.0]  # 4 steps, of which 2 rise
    assert [point.step for point in found.curve] == [0, 1, 0, 4, 0, *[cycle.steps[2]]]
    alone = train_in_stages(cycle.new_model, single_stage(cycle.new_model, 8), windows, windows, **options)  # type: ignore[arg-type]
    assert alone.flops >= found.flops


def test_stages_without_steps_are_left_out_and_a_run_without_stages_is_refused(tmp_path: Path) -> None:
    ids = torch.arange(40).remainder(5).view(10, 4)
    windows = IndexedDataset(ids, ids)
    options = {"learning_rate": 0.01, "batch_size": 4}
    made = two_level_cycle(5, 8, dim=8, depth=2, heads=2, context=4, batch_size=4)
    made.steps = [0, 2, 3]
    first, again = (
        train_in_stages(made.new_model, made.stages, windows, windows, folder=tmp_path, **options)  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert {point.stage for point in first.curve} == {1, 2}
    assert again.curve == first.curve and again.model.depth == 2
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    with pytest.raises(InputError, match="stages must give at least one stage to train, got none"):
        train_in_stages(made.new_model, lambda finished: iter(()), windows, windows, **options)  # type: ignore[arg-type]


def test_every_step_has_a_whole_batch() -> None:
    ids = torch.arange(40).remainder(5).view(10, 4)
    seen: list[int] = []

    class Watching(CausalLanguageModel):
        def forward(self, ids: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
            if self.training and torch.is_grad_enabled():
                seen.append(len(ids))
            return super().forward(ids, *rest, **options)  # type: ignore[arg-type]

    def new_model(level: int) -> CausalLanguageModel:
        return Watching(5, dim=8, depth=1, heads=2)

    windows = IndexedDataset(ids, ids)
    train_in_stages(new_model, single_stage(new_model, 5), windows, windows, learning_rate=0.01, batch_size=4)
    assert set(seen) == {4}


def test_the_claim_runs() -> None:
    found = verify("multilevel-training", smoke=True, seeds=1)
    assert found["method"]["name"] == "v-cycle"
    for arm in ("v-cycle", "scratch"):
        assert {"test_loss", "flops", "flops_share", "seconds"} <= found["arms"][arm]["metrics"].keys()
    metrics = {name: found["arms"][name]["metrics"]["flops"]["mean"] for name in ("v-cycle", "scratch")}
    assert metrics["v-cycle"] <= metrics["scratch"]
