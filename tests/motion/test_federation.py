"""A whole federation: one client equals no federation, what leaves a client, kill and resume, the same apps elsewhere."""

import copy
import functools
import importlib.util
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import Killed, differing, weights

import coloss
from coloss import Budget
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.motion import (
    BlockDistillation,
    FederatedClient,
    FederatedRound,
    FederatedRun,
    FederatedTrainer,
    InProcessGrid,
    LocalTraining,
    ProximalTerm,
    add_adaptive_topology,
    assembled_model,
    federated_client_app,
    federated_flower,
    federated_server_app,
    initial_states,
    split_state,
    train_client,
)
from coloss.nn import Classifier, SkeletonEncoder
from coloss.ops import graph_partition
from coloss.train.checkpoint import checkpoints, load_checkpoint

pytest.importorskip("flwr", reason="needs the extra coloss[federated]")

PRIVATE = ("head", "norm", "topology")
PLAIN = partial(torch.optim.SGD, lr=0.1)


@functools.cache
def model(classes: int = 3) -> Classifier:
    """The same object each time: a federation never changes a client's model."""
    torch.manual_seed(2)
    encoder = SkeletonEncoder(graph_partition([-1, 0, 1]), widths=(4,), strides=(2,), kernel=3)
    net = Classifier(encoder, classes)
    add_adaptive_topology(net)
    return net


def clips(rows: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % classes
    return torch.randn(rows, 3, 6, 3, generator=generator) + targets.view(-1, 1, 1, 1), targets


def right(net, data) -> dict[str, float]:
    with torch.no_grad():
        return {"accuracy": (net(data.inputs).argmax(1) == data.targets).float().mean().item()}


def one_step(net, data, at: FederatedRound) -> dict[str, float]:
    """A local step as short as can be: one batch, drawn by seed and round."""
    generator = torch.Generator().manual_seed(100 * at.seed + at.number)
    batch = data.take(torch.randperm(len(data), generator=generator)[:8])
    loss = F.cross_entropy(net.train()(batch.inputs), batch.targets)
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.1 * parameter.grad
    return {"loss": loss.item()}


def client(name: str, rows: int = 17, classes: int = 3, seed: int = 0, **options) -> FederatedClient:
    options = {"private": PRIVATE, "model": model(classes), "evaluate": right} | options
    return FederatedClient(
        name, train=clips(rows, classes, seed), test=clips(9, classes, seed + 50), **options
    )


def pair() -> list[FederatedClient]:
    return [client("a"), client("b", rows=10, classes=5, seed=1)]


def local(methods=lambda at: [], optimizer=PLAIN) -> LocalTraining:
    return LocalTraining(methods, optimizer=optimizer, batch_size=8)


def everything(run):
    return {f"shared.{n}": v for n, v in run.shared.items()} | {
        f"{name}.{n}": v for name, kept in run.private.items() for n, v in kept.items()
    }


def test_one_client_is_training_without_a_federation():
    one = client("a", private=("head", "topology"))  # batch norm statistics are averaged, too
    run = FederatedTrainer([one], local(), rounds=2, local_epochs=2, seed=3).run()
    alone = copy.deepcopy(one.model)
    coloss.fit(
        alone, one.train, F.cross_entropy, budget=Budget(epochs=4), optimizer=PLAIN, batch_size=8, seed=3
    )
    assert not differing(weights(alone), weights(run.model("a")))
    assert differing(weights(one.model), weights(alone)), "training changed nothing"


def test_a_round_is_the_mean_of_what_clients_make_of_the_same_weights():
    first, second = pair()
    run = FederatedTrainer([first, second], one_step, rounds=1).run()
    start = initial_states(first)[0]
    found = [train_client(c, start, None, one_step, FederatedRound(1, 1)) for c in (first, second)]
    name = "backbone.blocks.0.graph.project.weight"
    mean = (17 * found[0][0][name].double() + 10 * found[1][0][name].double()) / 27
    torch.testing.assert_close(run.shared[name].double(), mean, rtol=0, atol=1e-7)
    assert not differing(run.private["b"], found[1][1])


class Spy(InProcessGrid):
    """Keeps everything that passes."""

    def push_messages(self, messages):
        messages = list(messages)
        self.passed = [*getattr(self, "passed", []), *messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        self.passed += replies
        return replies


def test_private_parts_are_in_no_message_and_differ_between_clients():
    clients = pair()
    kept = set(initial_states(clients[0])[1])
    assert any("private_matrix" in name for name in kept)
    app = federated_client_app(lambda context: clients[context.node_config["partition-id"]], one_step)
    grid = Spy(app, [{"partition-id": 0}, {"partition-id": 1}])
    context = grid.run_server(federated_server_app(lambda context: initial_states(clients[0])[0], 2, 2))
    sent = {
        name
        for message in grid.passed
        for record in message.content.array_records.values()
        for name in record
    }
    assert len(grid.passed) == 16
    assert sent == set(context.state.array_records["arrays"])
    assert not sent & kept
    assert any("shared_matrix" in name for name in sent)
    private = [dict(c.state.array_records["private"].to_torch_state_dict()) for c in grid.contexts.values()]
    name = "backbone.blocks.0.graph.topology.private_matrix"
    assert private[0][name].abs().sum() > 0
    assert not torch.equal(private[0][name], private[1][name])
    assert private[0]["head.weight"].shape != private[1]["head.weight"].shape


def test_aggregation_leaves_the_private_part_alone():
    one = client("a")
    trainer = FederatedTrainer([one, client("b", seed=1)], lambda model, data, at: {}, rounds=1)
    run = trainer.run()
    assert not differing(run.private["a"], initial_states(one)[1])
    assert not differing(run.shared, initial_states(one)[0]), "nobody trained, nothing changed"
    assert not differing(weights(one.model), weights(run.model("a")))


def test_fedprox_with_mu_0_is_fedavg():
    one = client("a", rows=8)
    shared, first = initial_states(one)[0], FederatedRound(1, 1)
    plain, none = (
        train_client(one, shared, None, local(lambda at, m=methods: m), first)
        for methods in ([], [ProximalTerm(0.0, PRIVATE)])
    )
    assert not differing(plain[0] | plain[1], none[0] | none[1])


def test_each_round_draws_numbers_of_its_own():
    drawn = []

    class Draw(torch.nn.Module):
        def forward(self, x):
            drawn.append(torch.rand(3))
            return x

    net = torch.nn.Sequential(Draw(), torch.nn.Linear(2, 2))
    data = IndexedDataset(torch.randn(4, 2), torch.arange(4) % 2)
    for number in (1, 2, 1):
        LocalTraining()(net, data, FederatedRound(number, 2))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_bfloat16_travels():
    net = torch.nn.Linear(2, 3).bfloat16()
    data = torch.randn(4, 2).bfloat16(), torch.arange(4) % 3
    one = FederatedClient("a", net, data, data, ("bias",), right)
    run = FederatedTrainer([one], lambda model, data, at: {}, rounds=2).run()
    assert not differing(weights(run.model("a")), weights(net))
    assert run.model("a").weight.dtype == torch.bfloat16


def test_a_metric_may_be_a_tensor_of_one_number():
    one, first = client("a"), FederatedRound(1, 1)
    shared = initial_states(one)[0]
    for value in (torch.tensor(0.5), 0.5):
        assert train_client(one, shared, None, lambda m, d, at, v=value: {"loss": v}, first)[2] == {
            "loss": 0.5
        }
    with pytest.raises(InputError, match="client 'a': metric 'loss' must be a number, got tensor"):
        train_client(one, shared, None, lambda m, d, at: {"loss": torch.zeros(2)}, first)


def test_a_server_that_waits_says_so_and_does_not_wait_for_what_cannot_come(caplog, monkeypatch):
    grid = InProcessGrid(lambda m, c: m, [{}])
    with pytest.raises(InputError, match=r"clients must be in \[1, 1\], the nodes of this grid, got 2"):
        grid.run_server(federated_server_app(lambda context: {}, 1, 2))

    class Late:
        seen = [[1], [1], [1], [1, 2]]

        def get_node_ids(self):
            return self.seen.pop(0)

    monkeypatch.setattr(federated_flower.time, "sleep", lambda seconds: None)
    federated_flower._await_nodes(Late(), 2)
    assert [record.getMessage() for record in caplog.records] == ["waiting for 2 nodes, 1 are there"]
    assert not Late.seen


def test_the_teacher_is_the_model_as_downloaded():
    seen = []

    class Look(BlockDistillation):
        def setup(self, state):
            super().setup(state)
            seen.append(weights(self.teacher.module))

    first, second = (client("a", rows=8, seed=seed) for seed in (0, 1))
    at = FederatedRound(2, 2)
    own = train_client(first, initial_states(first)[0], None, one_step, at)
    others = train_client(second, initial_states(first)[0], None, one_step, at)
    step = local(lambda at: [Look(["backbone.blocks.0"])])
    _, _, metrics = train_client(first, others[0], own[1], step, at)
    assert not differing(seen[0], weights(assembled_model(first, others[0], own[1])))
    assert "train_block_distillation" in metrics


@pytest.fixture(scope="module")
def whole():
    return FederatedTrainer(pair(), one_step, rounds=3, seed=1).run()


@pytest.mark.parametrize("kill", ["client", "server"])
def test_a_killed_run_goes_on_to_the_bit(kill, whole, tmp_path):
    calls = []

    def killed(model, data, at):
        calls.append(at.number)
        if kill == "client" and len(calls) == 4:  # the second client of round 2, the first is done
            raise Killed
        return one_step(model, data, at)

    def stop(share):
        if kill == "server" and share > 0.5:
            raise Killed

    with pytest.raises(Killed):
        FederatedTrainer(pair(), killed, rounds=3, seed=1, folder=tmp_path).run(stop)
    if kill == "client":
        # The first client is a round ahead of the server: what it kept is that of the server's round.
        short = FederatedTrainer(pair(), one_step, rounds=1, seed=1, folder=tmp_path).run()
        assert [path.name for path in checkpoints(tmp_path / "clients/a")] == [
            "step-00000001",
            "step-00000002",
        ]
        kept = load_checkpoint(tmp_path / "clients/a/step-00000001")[0]
        assert len(short.history) == 1
        assert not differing(short.private["a"], kept)
    shares = []
    again = FederatedTrainer(pair(), one_step, rounds=3, seed=1, folder=tmp_path).run(shares.append)
    assert not differing(everything(whole), everything(again))
    assert again.history == whole.history
    assert shares == ([2 / 3, 1.0] if kill == "client" else [1.0])
    if kill == "server":
        return
    longer = FederatedTrainer(pair(), one_step, rounds=4, seed=1, folder=tmp_path).run()
    assert [entry["round"] for entry in longer.history] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="rounds must be >= 4, which the folder holds, got 2"):
        FederatedTrainer(pair(), one_step, rounds=2, seed=1, folder=tmp_path).run()
    with pytest.raises(InputError, match="choose another folder"):
        FederatedTrainer(pair(), one_step, rounds=3, seed=2, folder=tmp_path).run()


def test_the_summary_worked_by_hand():
    scores = [{"a": 0.5, "b": 0.0}, {"a": 0.5, "b": 0.25}, {"a": 0.75, "b": 0.25}]
    history = [
        {"round": n, "clients": {k: {"accuracy": v} for k, v in row.items()}} for n, row in enumerate(scores)
    ]
    run = FederatedRun({}, {}, history, tuple(pair()))
    found = run.summary(last=2)
    assert found == {
        "a_accuracy": 0.75,
        "b_accuracy": 0.25,
        "mean_accuracy": 0.5,
        "worst_accuracy": 0.25,
        "round_std": 0.0625,
    }
    with pytest.raises(InputError, match="a has no 'loss'"):
        run.summary("loss")
    with pytest.raises(InputError, match="name must be one of a, b, got 'c'"):
        run.model("c")


def test_only_the_last_rounds_are_evaluated():
    run = FederatedTrainer([client("a")], lambda model, data, at: {}, rounds=2, evaluated=1).run()
    assert ["accuracy" in entry["clients"]["a"] for entry in run.history] == [False, True]


def test_a_client_that_fails_is_left_out_of_the_round(caplog):
    from flwr.app import Error, Message

    clients = pair()
    app = federated_client_app(lambda context: clients[context.node_config["partition-id"]], one_step)

    def flaky(message, context):
        if context.node_id == 2 and message.metadata.group_id == "1":
            return Message(Error(0, "out of battery"), reply_to=message)
        return app(message, context)

    server = federated_server_app(lambda context: initial_states(clients[0])[0], 2, 2)
    context = InProcessGrid(flaky, [{"partition-id": 0}, {"partition-id": 1}]).run_server(server)
    history = json.loads(context.state.config_records["history"]["json"])
    assert [sorted(entry["clients"]) for entry in history] == [["a"], ["a", "b"]]
    assert "node 2 failed to train in round 1: out of battery" in caplog.text
    gone = InProcessGrid(lambda m, c: Message(Error(0, "gone"), reply_to=m), [{}])
    with pytest.raises(RuntimeError, match="no client could train in round 1"):
        gone.run_server(federated_server_app(lambda context: initial_states(clients[0])[0], 1, 1))


def test_the_grid_is_one_of_flower_and_copies_what_it_carries():
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.serverapp import Grid

    def answer(message, context):
        message.content.config_records["config"]["n"] += 1
        return Message(message.content, reply_to=message)

    grid = InProcessGrid(answer, [{}, {}], run_config={"lr": 0.1})
    assert isinstance(grid, Grid)
    assert grid.contexts[2].run_config == {"lr": 0.1}
    found = []

    def server(grid, context):
        content = RecordDict({"config": ConfigRecord({"n": 0})})
        made = [grid.create_message(content, "query", node, "1") for node in grid.get_node_ids()]
        numbers = grid.push_messages(made)
        found.extend(reply.content.config_records["config"]["n"] for reply in grid.pull_messages(numbers))
        assert grid.pull_messages(numbers) == []
        with pytest.raises(InputError, match=r"dst_node_id must be in \[1, 2\], got 7"):
            grid.push_messages([grid.create_message(content, "query", 7, "1")])

    grid.run_server(server)
    assert found == [1, 1], "a client sees what another did to its message"


def test_what_cannot_work_is_refused():
    for clients, options, message in (
        ([], {}, "clients must be one at least"),
        ([client("a"), client("a")], {}, "names of their own, got a, a"),
        (pair(), {"rounds": 0}, "rounds must be >= 1, got 0"),
        (pair(), {"local_epochs": 0}, "local_epochs must be >= 1, got 0"),
        (pair(), {"seed": -1}, "seed must be >= 0, got -1"),
        (
            [client("a", private=("norm",)), client("b", classes=5, private=("norm",))],
            {},
            r"'head.bias' is \(3,\) for a and \(5,\) for b: make it private",
        ),
    ):
        with pytest.raises(InputError, match=message):
            FederatedTrainer(clients, one_step, **options)
    with pytest.raises(InputError, match=r"evaluated must be in \[1, 2\], got 3"):
        federated_server_app(lambda context: {}, 2, 1, evaluated=3)
    with pytest.raises(InputError, match="name must be letters"):
        client("../a")
    with pytest.raises(InputError, match="client 'a': private must name parts"):
        client("a", private=("hat",))
    with pytest.raises(InputError, match="do not fit the model of client 'a'"):
        assembled_model(client("a"), {"weight": torch.zeros(1)})
    for field in ("train", "test"):
        with pytest.raises(InputError, match=f"client 'a': {field} must hold at least one sample, got 0"):
            FederatedClient(
                "a", model(), **{"train": clips(6, 3, 0), "test": clips(6, 3, 0), field: clips(0, 3, 0)}
            )
    with pytest.raises(InputError, match="batch_size must be >= 1"):
        LocalTraining(batch_size=0)


def test_without_flower_there_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'coloss\[federated\]'"):
        FederatedTrainer(pair())


def test_data_may_be_given_as_a_data_set():
    data = IndexedDataset(*clips(6, 3, 0))
    assert FederatedClient("a", model(), data, data).train is data
    assert set(split_state(model(), ("head",))[1]) == {"head.weight", "head.bias"}
