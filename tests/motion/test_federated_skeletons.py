"""Shards of motion for clients, and where the clients' models agree; without a federated engine."""

import math

import numpy as np
import pytest
import torch
from contract import differing, weights
from shard_files import write_pair

from coloss.data import MotionClips, Skeleton
from coloss.errors import InputError
from coloss.motion import clip_inputs, skeleton_clients, skeleton_shards
from coloss.motion.federated_diagnostics import block_agreement, link_agreement
from coloss.nn import GraphConv


@pytest.fixture
def data(tmp_path) -> str:
    return write_pair(tmp_path)


def test_shards_of_files(data):
    one, two = skeleton_shards(data, frames=6, limit=10, seed=0)
    assert (one.name, two.name, two.classes) == ("one", "two", tuple(f"action {n}" for n in range(4)))
    assert one.train.inputs.shape == (10, 3, 6, 3)
    assert one.test.inputs.shape == (8, 3, 6, 3)
    assert (one.train.inputs[:, :, 0, 0] == 0).all(), "the root begins at the origin"
    again = skeleton_shards([data.split("+")[1]], frames=6, limit=10, seed=0)[0]
    assert torch.equal(again.train.inputs, two.train.inputs), "a client's clips depend on who else is there"


def test_shards_by_class(data):
    first, second = skeleton_shards(data.split("+")[1], by="class", parts=2, frames=6)
    assert (first.name, first.classes, second.classes) == (
        "two-1",
        ("action 0", "action 2"),
        ("action 1", "action 3"),
    )
    whole = skeleton_shards(data.split("+")[1], frames=6)[0]
    assert len(first.train) + len(second.train) == len(whole.train)
    last = second.train.inputs[second.train.targets == 1][:, 1, :, 2].mean()
    assert last == pytest.approx(3, abs=0.2), "target 1 of the second client is action 3"


def test_unseen_joints_do_not_enter_and_an_unseen_root_is_refused():
    clip = np.ones((4, 2, 3), np.float32)
    clip[:, 1] = np.nan
    found = clip_inputs(MotionClips.from_list([clip], Skeleton((-1, 0)), 15), 4)
    assert (found == 0).all()
    clip[:, 0] = np.nan
    with pytest.raises(InputError, match="'0' never does"):
        clip_inputs(MotionClips.from_list([clip], Skeleton((-1, 0)), 15), 4)


def test_all_clients_begin_with_the_same_shared_weights(data):
    shards = skeleton_shards(data, frames=6)
    one, two = (c.model for c in skeleton_clients(shards, topology=True, widths=(4,), kernel=3, seed=5))
    assert not differing(weights(one.backbone), weights(two.backbone))
    assert [m.head.out_features for m in (one, two)] == [3, 4]
    assert any(isinstance(module, GraphConv) for module in one.modules())


def test_agreement_between_clients(data):
    clients = skeleton_clients(skeleton_shards(data, frames=6), topology=True, widths=(4, 4), kernel=3)
    models = {client.name: client.model for client in clients}
    probe = clients[0].test.all().inputs
    same = block_agreement(models, probe, ["backbone.blocks.0", "backbone.blocks.1"])
    assert list(same.values()) == pytest.approx([1, 1]), "before training all clients see the same"
    layer = "backbone.blocks.0.graph.topology"
    for sign, model in zip((1, -1), models.values()):
        with torch.no_grad():
            model.get_submodule(layer).private_matrix.fill_(sign)
    assert link_agreement(models)["private_matrix"] == pytest.approx(-1)
    assert math.isnan(link_agreement(models)["shared_matrix"]), "all of them are 0"
    with pytest.raises(ValueError, match="two at least"):
        block_agreement({"a": clients[0].model}, probe, ["backbone"])
    with pytest.raises(ValueError, match="two at least"):
        link_agreement({})
    with pytest.raises(ValueError, match="'a' has none"):
        link_agreement(dict.fromkeys("ab", torch.nn.Linear(1, 1)))
