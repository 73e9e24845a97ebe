"""Facts about training with heads on the way: losses, phases, loops, resuming, processes, a language model, the recipe and the claim."""

import math
from dataclasses import replace

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from torch import nn

import coloss
from coloss import Budget, TrainingStep
from coloss.compression import (
    DynamicTokenPruning,
    EarlyExitLanguageModel,
    EarlyExitSegmenter,
    TrainedRankPruning,
    evaluate_segmenter,
    load_token_pruning,
    segmentation_loss,
    train_token_pruning,
)
from coloss.compression.dynamic_token_pruning_trial import KEEP, THRESHOLD, random_exit
from coloss.data import IndexedDataset, load_segmentation
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.lab.language_tasks import language_task
from coloss.nn import CausalLanguageModel, next_token_loss
from coloss.ops import select_confident_tokens
from coloss.train import Setting


def new_segmenter(head="linear"):
    torch.manual_seed(1)
    return EarlyExitSegmenter((4, 6), 2, 3, dim=8, depth=3, heads=2, head=head)


def scenes(count=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 4, 6, generator=generator)
    targets = (3 * images.mean(1)).long().clamp(max=2)
    targets[:, 0, 0] = -100
    return IndexedDataset(images, targets)


def new_language_model():
    torch.manual_seed(1)
    return CausalLanguageModel(7, 8, 3, 2)


def texts(count=16):
    ids = torch.randint(7, (count, 9), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def test_every_head_has_its_loss_on_all_tokens_as_they_stand_after_it():
    model, batch = new_segmenter(), scenes().all()
    step = TrainingStep(model, segmentation_loss, [DynamicTokenPruning(threshold=0.4, prune_from=0)])
    terms = step(batch)
    assert model.early_exit.threshold == 0.4
    stages = model.stages(batch.inputs).stages
    for name, stage in zip(("exit_1", "exit_2", "segmentation"), stages, strict=True):
        torch.testing.assert_close(terms[name], segmentation_loss(model.read_out(stage), batch.targets))
    assert not torch.equal(stages[0].logits, stages[1].logits)


def test_tokens_leave_in_the_last_part_of_the_run_and_the_model_that_ships_leaves_them_out():
    seen = []

    class Watch(coloss.Method):
        def on_step(self, state):
            seen.append(state.model.early_exit.threshold)

    run = coloss.fit(
        new_segmenter(),
        scenes(),
        segmentation_loss,
        [DynamicTokenPruning(threshold=0.4, keep_per_class=1, prune_from=0.5), Watch()],
        budget=Budget(steps=4),
        batch_size=8,
        log_every=1,
    )
    assert seen == [1.0, 1.0, 0.4, 0.4]
    assert run.model.early_exit.threshold == 0.4 and run.model.early_exit.keep_per_class == 1
    shares = [point.metrics.get("token_layer_share") for point in run.history]
    assert shares[:2] == [None, None] and 0 < shares[2] < 1
    report = run.methods[0].report(run.model, scenes())
    assert 0 < report["multiply_adds_share"] < 1


def test_a_rule_of_ones_own_is_followed_from_the_first_step_and_its_share_is_told():
    model = new_segmenter()
    model.early_exit.select = lambda probabilities, active: torch.ones_like(active)
    with pytest.raises(InputError, match=r"prune_from must be 0 for a model .*\(select\), got 0.5"):
        TrainingStep(model, segmentation_loss, [DynamicTokenPruning(prune_from=0.5)])
    rule = [DynamicTokenPruning(threshold=1.0, prune_from=0.0)]
    run = coloss.fit(model, scenes(), segmentation_loss, rule, budget=Budget(steps=1), log_every=1)
    assert run.history[-1].metrics["token_layer_share"] == pytest.approx(1 / 3)


def test_candidates_that_go_on_are_the_models_own_unless_asked_for():
    for given, expected in ((None, 2), (7, 7)):
        model = EarlyExitSegmenter((4, 6), 2, 3, dim=8, depth=3, heads=2, keep_per_class=2)
        TrainingStep(model, segmentation_loss, [DynamicTokenPruning(keep_per_class=given)])
        assert model.early_exit.keep_per_class == expected


def test_loops_take_the_same_steps():
    batches = list(zip(*(part.split(8) for part in texts()), strict=True))
    check_loops(
        new_language_model,
        lambda: DynamicTokenPruning(threshold=0.3, prune_from=0.0, objective=next_token_loss),
        batches,
        next_token_loss,
        epochs=1,
    )


def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path):
    check_resume(
        new_language_model,
        lambda: DynamicTokenPruning(threshold=0.25, prune_from=0.5),
        texts(),
        tmp_path,
        next_token_loss,
        steps=4,
        kill_at=3,
        checkpoint_every=2,
    )


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Though the images of one process have more unlabelled pixels than those of the other."""

    def train(fabric):
        data, found = scenes(), {}
        data.targets[:3, :3] = -100
        for head in ("linear", "query"):
            torch.manual_seed(1)
            model = new_segmenter(head).double()
            coloss.fit(
                model,
                (data.inputs.double(), data.targets),
                segmentation_loss,
                [DynamicTokenPruning(threshold=0.3, keep_per_class=1, prune_from=0.0)],
                budget=Budget(steps=1),
                batch_size=16,
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
                fabric=fabric,
            )
            found |= {f"{head}.{name}": value for name, value in model.state_dict().items()}
        return found

    check_two_processes(train, tmp_path)


def test_it_runs_on_the_labs_language_task_with_another_method_and_the_model_stays_the_same_object():
    task = language_task("tiny-shakespeare", limit=8)
    setting = Setting.of(task, 0, Budget(steps=3))
    model = setting.new_model()
    paths = set(model.state_dict())
    method = DynamicTokenPruning.for_setting(setting, threshold=0.1, prune_from=0.5)
    rank = TrainedRankPruning(layers=["transformer.blocks.0.mlp.0"], energy=0.5, every=2, decompose=False)
    run = setting.fit(model, methods=[rank, method])
    assert run.model is model and isinstance(model, EarlyExitLanguageModel)
    assert paths < set(model.state_dict()) and model.early_exit.keep_per_class == 0
    weight = model.transformer.blocks[0].mlp[0].weight
    assert torch.linalg.matrix_rank(weight) < min(weight.shape)
    judged = {name: float(value) for name, value in task.test(run.model, setting.splits).items()}
    assert math.isfinite(judged["nll"])
    assert method.report(run.model, setting.splits.train)["token_layer_share"] <= 1


def test_bad_input_is_refused():
    for arguments, message in (
        ({"threshold": 1.5}, "threshold must be in"),
        ({"prune_from": -0.1}, "prune_from must be in"),
        ({"keep_per_class": -1}, "keep_per_class must be >= 0"),
    ):
        with pytest.raises(InputError, match=message):
            DynamicTokenPruning(**arguments)
    for model, arguments, message in (
        (nn.Linear(2, 2), {}, "model must be a CausalLanguageModel or have early_exit"),
        (new_language_model(), {"exit_after": (2, 1)}, "exit_after must rise"),
        (new_language_model(), {"keep_per_class": 3}, "keep_per_class must be 0 in a language model"),
        (new_segmenter(), {"exit_after": (2, 3)}, "exit_after must be left out"),
    ):
        with pytest.raises(InputError, match=message):
            TrainingStep(model, next_token_loss, [DynamicTokenPruning(**arguments)])
    with pytest.raises(InputError, match="needs an objective"):
        TrainingStep(new_segmenter(), None, [DynamicTokenPruning()])


class Stopped(Exception):
    """Ends a recipe in its midst."""


def test_the_recipe_trains_stores_and_goes_on(tmp_path, monkeypatch):
    splits = load_segmentation(shrink=6)
    splits = replace(
        splits, train=splits.train.subset(torch.arange(16)), test=splits.test.subset(torch.arange(8))
    )
    monkeypatch.setattr(
        "coloss.compression.dynamic_token_pruning_recipe.load_segmentation", lambda *_, **__: splits
    )
    sizes = {"dim": 8, "depth": 3, "heads": 2, "exit_after": [1, 2, 3], "patch_size": 5}
    settings = {
        "threshold": 0.1,
        "keep_per_class": 0,
        "shrink": 6,
        "sizes": sizes,
        "budget": Budget(steps=10),
    }

    def stop(share):
        if share > 0.85:
            raise Stopped

    monkeypatch.setattr("coloss.train.loop.REPORT_SECONDS", -1.0)
    whole = train_token_pruning("camvid", tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        train_token_pruning("camvid", tmp_path, **settings, progress=stop)
    told = []
    metrics = train_token_pruning("camvid", tmp_path, **settings, progress=told.append)
    assert metrics == whole and min(told) > 0.8
    assert 0 < metrics["multiply_adds_share"] < 1 and 0 <= metrics["mean_iou"] <= 1
    model = load_token_pruning(tmp_path)
    assert model.early_exit.threshold == 0.1
    stored = load_token_pruning(tmp_path / "whole").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert evaluate_segmenter(model, splits.test)["mean_iou"] == metrics["mean_iou"]
    with pytest.raises(InputError, match="choose another folder"):
        train_token_pruning("camvid", tmp_path, **(settings | {"threshold": 0.4}))
    with pytest.raises(InputError, match="the network cannot be made"):
        train_token_pruning("camvid", tmp_path / "other", **(settings | {"sizes": {"depth": 5}}))
    with pytest.raises(InputError):
        load_token_pruning(tmp_path / "nothing")


def test_the_random_rule_lets_as_many_tokens_go_as_are_confident_or_as_it_was_told():
    generator = torch.Generator().manual_seed(0)
    probabilities = (4 * torch.randn(5, 3, 40, generator=generator)).softmax(1)
    active = torch.rand(5, 40, generator=generator) < 0.8
    confident = select_confident_tokens(probabilities, active, THRESHOLD, KEEP)
    found = random_exit(generator)(probabilities, active)
    assert torch.equal(found.sum(1), confident.sum(1)) and not torch.equal(found, confident)
    assert not (found & ~active).any()
    told = random_exit(generator, torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 0, 6]]))
    assert [told(probabilities, active).sum(1).tolist() for _ in range(3)] == [
        [1, 2, 3, 4, 5],
        [0, 0, 0, 0, 6],
        [1, 2, 3, 4, 5],
    ]


def test_the_claim_runs():
    found = verify("dtop", smoke=True, seeds=1)
    assert {"unpruned", "early exit", "random exit"} <= set(found["arms"])
    assert found["metric"] in found["arms"]["early exit"]["metrics"]
    assert "boundary_correlation" not in found["arms"]["random exit"]["metrics"]
