"""From files of motion to a recogniser for each owner: resumption, what is stored, the Flower apps, what is refused."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from contract import differing, weights
from shard_files import ARM, write_pair, write_shard

from coloss import Budget
from coloss.data import Skeleton, load_motion
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.motion import (
    InProcessGrid,
    clip_inputs,
    federated_trial,
    fsar_client_app,
    fsar_server_app,
    load_fsar,
    skeleton_shards,
    train_fsar,
)
from coloss.train.checkpoint import checkpoints, load_checkpoint

pytest.importorskip("flwr", reason="needs the extra coloss[federated]")

SMALL = {"frames": 6, "limit": 10, "widths": [4], "kernel": 3, "distilled": 1}


@pytest.fixture
def data(tmp_path) -> str:
    return write_pair(tmp_path)


def test_a_killed_run_goes_on_and_what_it_stored_is_the_same(data, tmp_path):
    def train(folder, **options):
        return train_fsar(data, tmp_path / folder, settings=SMALL, budget=Budget(epochs=2), seed=1, **options)

    whole = train("whole")
    # What a kill leaves in round 2 of FedAvg, its last client done: both clients are a round ahead of the server.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/rounds/fedavg/server/step-00000002")
    (tmp_path / "killed/metrics.json").unlink()
    shares: list[float] = []
    assert train("killed", progress=shares.append) == whole
    assert shares == [1.0]
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text()) == whole
    assert all(math.isfinite(value) for value in whole.values())
    assert {"fsar_one_accuracy", "fsar_round_std", "fedavg_worst_accuracy", "cka_block_1"} <= whole.keys()
    assert {"raw_knn_mean_accuracy", "untrained_knn_mean_accuracy"} <= whole.keys()

    models, others = (load_fsar(tmp_path / name) for name in ("whole", "killed"))
    assert not differing(weights(models["two"][0]), weights(others["two"][0]))
    model, classes = models["two"]
    clips = load_motion(data.split("+")[1]).part(2)
    right = model(clip_inputs(clips, 6)).argmax(1) == torch.from_numpy(clips.labels["action"])
    assert right.float().mean().item() == pytest.approx(whole["fsar_two_accuracy"])
    assert classes[3] == "action 3"
    with pytest.raises(InputError, match="choose another folder"):
        train_fsar(data, tmp_path / "whole", settings=SMALL, budget=Budget(epochs=3), seed=1)

    # The apps for machines of their own give the same weights.
    app = fsar_client_app(data, settings=SMALL, seed=1)
    grid = InProcessGrid(app, [{"partition-id": 0}, {"client": data.split("+")[1]}])
    server = fsar_server_app(2, 2, settings=SMALL, seed=1, skeleton=ARM)
    shared = grid.run_server(server).state.array_records["arrays"].to_torch_state_dict()
    stored = weights(models["one"][0])
    assert not differing(dict(shared), {name: stored[name] for name in shared})
    with pytest.raises(InputError, match="client must be one of"):
        InProcessGrid(app, [{"client": "x"}]).run_server(fsar_server_app(1, 1, settings=SMALL, skeleton=ARM))


@pytest.mark.skipif(
    "COLOSS_FLOWER_SIMULATION" not in os.environ, reason="takes a minute: set COLOSS_FLOWER_SIMULATION=1"
)
def test_flowers_own_simulation_gives_the_same_weights(data, tmp_path):
    pytest.importorskip("ray", reason="Flower's simulation needs flwr[simulation]")
    settings = {"settings": SMALL, "seed": 1}
    app = fsar_client_app(data, **settings)
    grid = InProcessGrid(app, [{"partition-id": 0}, {"partition-id": 1}])
    context = grid.run_server(fsar_server_app(2, 2, skeleton=ARM, **settings))
    # In a process of its own: type checks of tests cannot be sent to Ray's workers.
    script = f"""
from flwr.simulation import run_simulation
from coloss.data import Skeleton
from coloss.motion import fsar_client_app, fsar_server_app
client = fsar_client_app({data!r}, **{settings!r})
server = fsar_server_app(2, 2, skeleton=Skeleton((-1, 0, 1)), folder={str(tmp_path / "server")!r}, **{settings!r})
run_simulation(server, client, 2, backend_config={{"client_resources": {{"num_cpus": 1}}}})
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=os.environ | {"FLWR_TELEMETRY_ENABLED": "0"}
    )
    there = load_checkpoint(checkpoints(tmp_path / "server")[-1])[0]
    assert not differing(dict(context.state.array_records["arrays"].to_torch_state_dict()), there)


def test_what_cannot_work_is_refused(data, tmp_path):
    other = write_shard(tmp_path / "leg.npz", 2, 0, Skeleton((-1, 0)))
    for given, options, message in (
        (data, {"budget": Budget(steps=3)}, "budget must be in epochs of each client.*got steps"),
        (data, {"settings": {"lr": 1}}, "settings must be of frames.*got 'lr'"),
        (data, {"settings": {"distilled": 4}}, r"distilled must be in \[0, 3\]"),
        (data, {"settings": {"rate": 0.0}}, "rate must be > 0"),
        (data, {"settings": {"baseline_rate": -1.0}}, "baseline_rate must be > 0"),
        (data, {"settings": {"frames": 0}}, "frames must be >= 1, got 0"),
        (data, {"settings": {"frames": "8"}}, "frames must be a whole number, got '8'"),
        (data, {"settings": {"kernel": 4}}, "kernel must be odd, got 4"),
        (data, {"settings": {"widths": "16"}}, "widths must be a list of numbers, got '16'"),
        (data, {"settings": {"widths": [1.5]}}, "widths must be a whole number, got 1.5"),
        (data, {"settings": {"rate": "x"}}, "rate must be a number, got 'x'"),
        (data, {"settings": {"distillation": -1.0}}, "distillation must be >= 0 and finite, got -1.0"),
        (data, {"settings": {"limit": 0}}, "limit must be >= 1, got 0"),
        (data, {"by": "class"}, "takes one data set, got 2"),
        (f"{data}+{other}", {}, "data must share one skeleton"),
        (f"{other}+{other}", {}, "distinct names"),
        (other, {"by": "class"}, "two classes of 2, got 3 parts"),
    ):
        with pytest.raises(InputError, match=message):
            train_fsar(given, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists(), "a run that could not begin holds its folder"
    with pytest.raises(InputError, match="holds no"):
        load_fsar(tmp_path / "nowhere")


def test_the_claim_runs(data, monkeypatch):
    one = data.split("+")[0]
    monkeypatch.setattr(
        federated_trial, "skeleton_shards", lambda names, **options: skeleton_shards(one, **options)
    )
    monkeypatch.setattr(federated_trial, "NETWORK", {"widths": (4, 4), "kernel": 3})
    found = verify("fsar", smoke=True, seeds=1)
    assert {
        *(
            "fsar",
            "fedavg, local batch norm",
            "fedavg, local batch norm, 12 rounds",
            "adaptive topology alone",
        ),
        *("fedavg", "no federation", "neighbours"),
    } == found["arms"].keys()
    assert 0 <= found["method"]["mean"] <= 1


def test_the_first_rounds_of_a_longer_run_are_a_shorter_run(data, monkeypatch):
    monkeypatch.setattr(federated_trial, "NETWORK", {"widths": (4,), "kernel": 3})
    monkeypatch.setattr(federated_trial, "ROUNDS", 1)
    shards = skeleton_shards(data.split("+")[0], frames=6)
    shorter, longer = (
        federated_trial._federated(shards, ("norm",), False, rounds, 0.1, federated_trial._nothing, 0)
        for rounds in (1, 2)
    )
    assert longer.history[:1] == shorter.history
    assert "one_accuracy" in shorter.summary()
