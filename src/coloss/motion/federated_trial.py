"""What is measured of FSAR: three owners of recordings of different bodies, federated in several ways from the same weights."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from coloss.data import IndexedDataset
from coloss.metrics import accuracy, predict
from coloss.motion.federated_client import FederatedRound, LocalTraining
from coloss.motion.federated_methods import BlockDistillation
from coloss.motion.federated_recipe import neighbour_accuracy
from coloss.motion.federated_skeletons import SkeletonShard, skeleton_clients, skeleton_shards
from coloss.motion.federated_trainer import FederatedRun, FederatedTrainer
from coloss.train import Method, Setting

FRAMES, CLIPS, TEST_CLIPS = 8, 120, 200
"""Frames of a clip; clips of each client to train and to test on, at most."""

ROUNDS, ROUNDS_ALONE, LAST = 12, 18, 5
"""Training takes 1.5 times as long in a round of FSAR as in one of FedAvg (processor time, evaluation apart), so FedAvg has 18 for 12; rounds over
which steadiness is taken."""

BESIDE_SEEDS = 2
"""The arms beside those that are compared are measured with this many seeds, to keep a measurement short."""

RATE, RATE_ALONE, DISTILLATION = 1e-2, 2e-2, 0.3
NETWORK: dict[str, Any] = {"widths": (16, 32), "kernel": 5}
BLOCKS = ["backbone.blocks.0", "backbone.blocks.1"]

_LOCAL_NORM = ("head", "norm")


def fsar_against_fedavg(setting: Setting) -> dict[str, dict[str, float]]:
    """Test accuracy of every arm: mean over the three clients, of the worst client, of each; and how far it moves over the last rounds.

    "fsar" and "fedavg, local batch norm" keep heads and batch norms on the clients, and take equally long. "fedavg, local batch norm, 12 rounds" is
    the latter when it has had as many rounds as "fsar". The arms beside them, of the first seeds alone, have as many too. "neighbours" are votes
    without a federation: on raw coordinates, and on the untrained encoder's features.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    seed, smoke = setting.seed, setting.smoke
    shards = skeleton_shards(
        ("hdm05", "msr-action3d") if smoke else ("bandai", "hdm05", "msr-action3d"),
        frames=FRAMES,
        limit=12 if smoke else CLIPS,
        test_limit=12 if smoke else TEST_CLIPS,
        seed=seed,
    )
    rounds, more = (1, 1) if smoke else (ROUNDS, ROUNDS_ALONE)

    def arm(
        private: Sequence[str] = _LOCAL_NORM,
        *,
        topology: bool = False,
        rounds: int = rounds,
        rate: float = RATE_ALONE,
        methods: Any = _nothing,
    ) -> FederatedRun:
        return _federated(shards, private, topology, rounds, rate, methods, seed)

    alone = arm(rounds=more)
    runs = {
        "fsar": arm(topology=True, rate=RATE, methods=_distilled),
        "fedavg, local batch norm": alone,
        # Nothing in its training knows how many rounds are to come.
        "fedavg, local batch norm, 12 rounds": replace(alone, history=alone.history[:rounds]),
    }
    if seed < BESIDE_SEEDS:
        runs["adaptive topology alone"] = arm(topology=True, rate=RATE)
        runs["fedavg"] = arm(("head",))
        runs["no federation"] = arm(("head", "backbone"))
    neighbours = neighbour_accuracy(shards, skeleton_clients(shards, seed=seed, **NETWORK))
    return {name: run.summary(last=LAST) for name, run in runs.items()} | {
        "neighbours": {
            "mean_accuracy": neighbours["raw_knn_mean_accuracy"],
            "untrained_mean_accuracy": neighbours["untrained_knn_mean_accuracy"],
        },
    }


def _nothing(at: FederatedRound) -> list[Method]:
    return []


def _distilled(at: FederatedRound) -> list[Method]:
    return [BlockDistillation(BLOCKS, DISTILLATION)] if at.number > 1 else []


def _right(model: torch.nn.Module, data: IndexedDataset) -> dict[str, float]:
    found = predict(model, data)
    return {"accuracy": float(accuracy(found.outputs, found.targets))}


def _federated(
    shards: list[SkeletonShard],
    private: Sequence[str],
    topology: bool,
    rounds: int,
    rate: float,
    methods: Any,
    seed: int,
) -> FederatedRun:
    clients = skeleton_clients(
        shards,
        private=private,
        topology=topology,
        seed=seed,
        evaluate=_right,
        **NETWORK,
    )
    local = LocalTraining(
        methods, optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=1e-2), batch_size=32
    )
    # From LAST rounds before the end of the shortest run on.
    evaluated = min(LAST + rounds - min(rounds, ROUNDS), rounds)
    return FederatedTrainer(clients, local, rounds, seed=seed, evaluated=evaluated).run()
