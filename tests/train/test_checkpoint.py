"""A run that stops anywhere and goes on ends as if it had never stopped."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from example_methods import ExtraHead, Shrink
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from coloss.errors import InputError
from coloss.train import (
    Budget,
    ConflictMonitor,
    Method,
    UncertaintyWeighting,
    cosine,
    fit,
    load_model,
    save_model,
)
from coloss.train.checkpoint import checkpoints, load_checkpoint


class Stop(Exception):
    pass


class StopAt(Method):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise Stop


class Noisy(Dataset):
    """Augments with the global random state, as user data sets do."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        return self.data[0][index] + 0.1 * torch.randn(6), self.data[1][index]


def go(new_model, data, *extra, **options):
    model = new_model()
    options = {
        "budget": Budget(steps=17),
        "batch_size": 40,
        "log_every": 3,
        "learning_rate_schedule": cosine(),
    } | options
    return fit(
        model,
        data,
        F.cross_entropy,
        [ExtraHead(), Shrink(), *extra],
        combine=UncertaintyWeighting(["cross_entropy", "extra"]),
        monitor=ConflictMonitor(every=4),
        evaluate=lambda m: (
            {"loss": F.cross_entropy(m(data[0]), data[1])} if isinstance(data, tuple) else {"zero": 0.0}
        ),
        **options,
    )


def same(first, second):
    for a, b in ((first.model, second.model), *zip(first.methods, second.methods)):
        left, right = a.state_dict(), b.state_dict()
        assert list(left) == list(right)
        for name in left:
            equal = (
                torch.equal(left[name], right[name])
                if isinstance(left[name], torch.Tensor)
                else left[name] == right[name]
            )
            assert equal, name
    assert first.metrics == second.metrics
    assert [(p.step, p.epoch, p.terms, p.metrics) for p in first.history] == [
        (p.step, p.epoch, p.terms, p.metrics) for p in second.history
    ]
    assert first.conflicts == second.conflicts


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("every", [1, 3])
def test_stop_and_go_on(new_model, data, tmp_path, stop, every):
    whole = go(new_model, data)
    with pytest.raises(Stop):
        go(new_model, data, StopAt(stop), checkpoint_dir=tmp_path, checkpoint_every=every)
    on = go(new_model, data, StopAt(-1), checkpoint_dir=tmp_path, checkpoint_every=every, resume=True)
    whole.methods = whole.methods[:2]
    on.methods = on.methods[:2]
    same(whole, on)


@pytest.mark.parametrize("stop", [2, 4, 5, 9])
def test_torch_loader_with_random_augmentation_goes_on(new_model, data, tmp_path, stop):
    def loader():
        return DataLoader(Noisy(data), batch_size=33, shuffle=True)

    whole = go(new_model, loader())
    with pytest.raises(Stop):
        go(new_model, loader(), StopAt(stop), checkpoint_dir=tmp_path, checkpoint_every=2)
    on = go(new_model, loader(), StopAt(-1), checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), on.model.parameters()))


def test_finished_run_is_not_trained_again(new_model, data, tmp_path):
    first = go(new_model, data, checkpoint_dir=tmp_path)
    again = go(new_model, data, checkpoint_dir=tmp_path, resume=True)
    same(first, again)
    assert again.steps == 17


def _slow_run(folder, delay, result):
    """In a process of its own: train slowly, so that a kill can hit any moment of it, and leave the final weights."""
    torch.set_num_threads(1)

    class Slow(Method):
        def on_batch(self, state):
            time.sleep(delay)

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(130, 6, generator=generator)
    data = inputs, (inputs[:, 0] > 0).long()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    run = go(lambda: model, data, Slow(), checkpoint_dir=folder, checkpoint_every=1, resume=True)
    weights = {name: value.tolist() for name, value in run.model.state_dict().items()}
    history = [(p.step, p.epoch, p.terms, p.metrics) for p in run.history]
    head = run.methods[0].state_dict()
    head = {
        name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in head.items()
    }
    result.write_text(json.dumps([weights, head, run.metrics, history]))


@pytest.mark.parametrize("part", range(4))
def test_kill_nine_at_random_moments(tmp_path, part):
    """20 random SIGKILLs in all, five for each part; after them the run ends bit-identical to one that was left alone."""
    context = multiprocessing.get_context("fork")

    def start(folder, delay, result):
        process = context.Process(target=_slow_run, args=(tmp_path / folder, delay, tmp_path / result))
        process.start()
        return process

    def reached():
        found = checkpoints(tmp_path / "killed")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    start("alone", 0.0, "alone.json").join()
    chance = random.Random(part)
    for _ in range(5):
        goal = reached() + chance.randint(1, 3)
        process = start("killed", 0.01, "killed.json")
        while reached() < goal and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.02))  # anywhere within the step, writing a checkpoint included
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert 5 <= reached() < 17
    assert not (tmp_path / "killed.json").exists()
    start("killed", 0.0, "killed.json").join()
    assert (tmp_path / "killed.json").read_text() == (tmp_path / "alone.json").read_text()


def test_checkpoints_are_plain_files_and_few(new_model, data, tmp_path):
    go(new_model, data, checkpoint_dir=tmp_path, checkpoint_every=2)
    found = checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-00000016", "step-00000017"]
    assert sorted(file.name for file in found[-1].iterdir()) == ["state.json", "tensors.safetensors"]
    tensors, values = load_checkpoint(found[-1])
    assert values["step"] == 17
    assert "step/model.0.weight" in tensors


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _truncate(folder / "tensors.safetensors"),
        lambda folder: _truncate(folder / "state.json"),
        lambda folder: (folder / "tensors.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text("{}"),
    ],
)
def test_damaged_checkpoint_is_named(new_model, data, tmp_path, damage):
    go(new_model, data, checkpoint_dir=tmp_path)
    damage(checkpoints(tmp_path)[-1])
    with pytest.raises(InputError, match=r"checkpoint .*step-00000017 is damaged .* delete that folder"):
        go(new_model, data, checkpoint_dir=tmp_path, resume=True)


def test_checkpoint_of_another_run_is_refused(new_model, data, tmp_path):
    go(new_model, data, checkpoint_dir=tmp_path)
    with pytest.raises(InputError, match="holds checkpoints of a run already: pass resume=True"):
        go(new_model, data, checkpoint_dir=tmp_path)
    with pytest.raises(InputError, match="is of another run"):
        fit(
            nn.Linear(6, 2),
            data,
            F.cross_entropy,
            budget=Budget(steps=2),
            checkpoint_dir=tmp_path,
            resume=True,
        )


def test_state_that_is_not_json_is_refused(new_model, data, tmp_path):
    class Odd(Method):
        def get_extra_state(self):
            return {"thing": object()}

        def set_extra_state(self, state):
            pass

    with pytest.raises(InputError, match="must be a tensor or plain JSON, got dict"):
        fit(new_model(), data, F.cross_entropy, [Odd()], budget=Budget(steps=1), checkpoint_dir=tmp_path)


def test_model_file_round_trip_and_errors(new_model, tmp_path):
    tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    path = save_model(tied, tmp_path / "deep" / "model.safetensors")
    other = load_model(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), path)
    assert torch.equal(other[1].weight, tied[0].weight)
    with pytest.raises(InputError, match="does not fit this model"):
        load_model(new_model(), path)
    _truncate(path)
    with pytest.raises(InputError, match="cannot read the model"):
        load_model(tied, path)
    with pytest.raises(InputError, match="cannot read the model"):
        load_model(tied, tmp_path / "absent.safetensors")
