"""A federation on Flower: a client app and a server app.

The same two apps run in one process (`InProcessGrid`: deterministic, without network or Ray), in Flower's simulation and on Flower's network of
machines. For the latter two, a project of one's own holds

    # app.py
    client_app = federated_client_app(my_client, LocalTraining(), folder="private")   # my_client(context) -> FederatedClient
    server_app = federated_server_app(my_weights, rounds=15, clients=3)               # my_weights(context) -> shared tensors

    # pyproject.toml, besides [project]
    [tool.flwr.app]
    publisher = "me"
    [tool.flwr.app.components]
    clientapp = "app:client_app"
    serverapp = "app:server_app"

and `flwr run .` starts it (`flower-supernode --node-config 'client="hdm05"'` on each client's machine says whose it is).

Messages to a client hold `arrays` (the shared tensors) and `config` (`server-round`, `rounds`, `local-epochs`, `seed`); replies hold
`arrays` (training only), `metrics` (with `num-examples`) and `config` (`client`, its name). Flower's arrays do not know bfloat16: such a tensor
travels, and is averaged, as float32, and the client's model takes it in its own type. What a client keeps lives in its context's state, or
in files on its own machine: it is in no message.

Flower is the optional extra `coloss[federated]`; it is imported when one of these is called.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coloss.errors import InputError
from coloss.motion.federated_averaging import fedavg
from coloss.motion.federated_client import (
    FederatedClient,
    FederatedRound,
    LocalStep,
    evaluate_client,
    train_client,
)
from coloss.motion.federated_grid import InProcessGrid, require_flower
from coloss.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

_ARRAYS, _CONFIG, _METRICS, _EXAMPLES = "arrays", "config", "metrics", "num-examples"


def federated_client_app(
    client_of: Callable[["Context"], FederatedClient],
    local_step: LocalStep,
    *,
    folder: str | Path | None = None,
) -> "ClientApp":
    """A Flower client app that trains and evaluates; what its client keeps is in no message.

    Args:
        client_of: the client of a node, told by its context (`node_config` and `run_config`); called for each message, so it should keep what is
            slow to load.
        local_step: trains the model in place for one round, such as `LocalTraining`.
        folder: on the client's machine, for what it keeps after each round (of the last two rounds, under its name); a run that is killed then
            goes on at the last round that the server finished. Without it that is in the memory of the node.

    Raises:
        InputError: if Flower is not installed.

    Examples:
        >>> app = federated_client_app(lambda context: None, lambda model, data, at: {})
        >>> type(app).__name__
        'ClientApp'
    """
    require_flower()
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()
    place = None if folder is None else Path(folder)

    @app.train()
    def train(message: Message, context: "Context") -> Message:
        client, at, shared = client_of(context), _round(message), _tensors(message)
        private = kept_part(context, place, client, at.number - 1)
        shared, private, metrics = train_client(client, shared, private, local_step, at)
        _keep(context, place, client, at.number, private)
        content = RecordDict(
            {
                _ARRAYS: _record(shared),
                _METRICS: MetricRecord({_EXAMPLES: len(client.train), **metrics}),
                _CONFIG: ConfigRecord({"client": client.name}),
            }
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: "Context") -> Message:
        client, at = client_of(context), _round(message)
        metrics = evaluate_client(client, _tensors(message), kept_part(context, place, client, at.number))
        content = RecordDict(
            {
                _METRICS: MetricRecord({_EXAMPLES: len(client.test), **metrics}),
                _CONFIG: ConfigRecord({"client": client.name}),
            }
        )
        return Message(content, reply_to=message)

    return app


def _round(message: "Message") -> FederatedRound:
    config = message.content.config_records[_CONFIG]
    names = ("server-round", "rounds", "local-epochs", "seed")
    return FederatedRound(*(int(config[name]) for name in names))  # type: ignore[arg-type]


def _tensors(message: "Message") -> dict[str, Tensor]:
    return dict(message.content.array_records[_ARRAYS].to_torch_state_dict())


def _record(tensors: Mapping[str, Tensor]) -> "ArrayRecord":
    from flwr.app import ArrayRecord

    return ArrayRecord(
        {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in tensors.items()}
    )


def kept_part(
    context: "Context", folder: Path | None, client: FederatedClient, last: int
) -> dict[str, Tensor] | None:
    """What the client kept after its newest round that is not later than `last`; None before the first.

    Args:
        context: of the client's node.
        folder: where clients keep it; None: in the context's state, which has the newest only.
        client: whose.
        last: number of a round.
    """
    if folder is None:
        record = context.state.array_records.get("private")
        return None if record is None else dict(record.to_torch_state_dict())
    found = [path for path in checkpoints(folder / client.name) if int(path.name.partition("-")[2]) <= last]
    return load_checkpoint(found[-1])[0] if found else None


def _keep(
    context: "Context",
    folder: Path | None,
    client: FederatedClient,
    number: int,
    private: dict[str, Tensor],
) -> None:
    if folder is None:
        context.state["private"] = _record(private)
    else:
        save_checkpoint(folder / client.name, number, private, {"client": client.name})


def federated_server_app(
    initial: Callable[["Context"], Mapping[str, Tensor]],
    rounds: int,
    clients: int,
    *,
    local_epochs: int = 1,
    seed: int = 0,
    evaluated: int | None = None,
    folder: str | Path | None = None,
    report: Callable[[float], None] | None = None,
) -> "ServerApp":
    """A Flower server app: in each round all clients train from the shared weights, then evaluate their mean.

    A client that answers with an error is left out of that round, with a warning. The mean is `fedavg` by numbers of training samples, in the
    order of the clients' names, so that it does not depend on who answers first. Afterwards `context.state` holds the shared tensors under
    `"arrays"` and the history as JSON under `"history"`.

    Args:
        initial: the shared tensors before the first round.
        rounds: at least 1.
        clients: how many nodes must be there before the first round; all that are there take part.
        local_epochs: passes of each client over its data in a round.
        seed: sent to all clients.
        evaluated: evaluate after this many last rounds only; default: after every round.
        folder: for the shared tensors and the history after each round; a run goes on from there, with more rounds if now there are more.
        report: called with the share of rounds that is done.

    Raises:
        InputError: for values out of range, or if Flower is not installed; when it runs, for a folder that holds more rounds, or more clients than
            an `InProcessGrid` has nodes.

    Examples:
        >>> app = federated_server_app(lambda context: {}, rounds=2, clients=1)
        >>> type(app).__name__
        'ServerApp'
    """
    require_flower()
    from flwr.app import ConfigRecord
    from flwr.serverapp import ServerApp

    FederatedRound(1, rounds, local_epochs, seed)
    if clients < 1:
        raise InputError(f"clients must be >= 1, got {clients}")
    if evaluated is not None and not 1 <= evaluated <= rounds:
        raise InputError(f"evaluated must be in [1, {rounds}], got {evaluated}")
    place = None if folder is None else Path(folder)
    app = ServerApp()

    @app.main()
    def main(grid: "Grid", context: "Context") -> None:
        stored = checkpoints(place) if place is not None else []
        shared: dict[str, Tensor]
        history: list[dict[str, Any]]
        if stored:
            shared, values = load_checkpoint(stored[-1])
            history = values["history"]
        else:
            shared, history = dict(initial(context)), []
        if len(history) > rounds:
            raise InputError(f"rounds must be >= {len(history)}, which the folder holds, got {rounds}")
        _await_nodes(grid, clients)
        for number in range(len(history) + 1, rounds + 1):
            config = {
                "server-round": number,
                "rounds": rounds,
                "local-epochs": local_epochs,
                "seed": seed,
            }
            replies = _exchange(grid, "train", shared, config)
            states = [
                reply.content.array_records[_ARRAYS].to_torch_state_dict() for reply in replies.values()
            ]
            weights = [_metrics(reply)[_EXAMPLES] for reply in replies.values()]
            shared = fedavg(states, weights)
            entry: dict[str, Any] = {"round": number, "clients": {}}
            for name, reply in replies.items():
                found = _metrics(reply)
                entry["clients"][name] = {"examples": found.pop(_EXAMPLES), **found}
            if evaluated is None or number > rounds - evaluated:
                for name, reply in _exchange(grid, "evaluate", shared, config).items():
                    found = _metrics(reply)
                    found.pop(_EXAMPLES)
                    entry["clients"].setdefault(name, {}).update(found)
            history.append(entry)
            if place is not None:
                save_checkpoint(place, number, shared, {"history": history})
            if report is not None:
                report(number / rounds)
        context.state[_ARRAYS] = _record(shared)
        context.state["history"] = ConfigRecord({"json": json.dumps(history)})

    return app


def _await_nodes(grid: "Grid", clients: int) -> None:
    there = len(list(grid.get_node_ids()))
    if there >= clients:
        return
    if isinstance(grid, InProcessGrid):
        raise InputError(f"clients must be in [1, {there}], the nodes of this grid, got {clients}")
    logging.getLogger(__name__).warning("waiting for %s nodes, %s are there", clients, there)
    while len(list(grid.get_node_ids())) < clients:
        time.sleep(1)


def _exchange(
    grid: "Grid", kind: str, shared: Mapping[str, Tensor], config: Mapping[str, int]
) -> dict[str, "Message"]:
    """Send the shared tensors to every node; replies by the client's name, in the order of names."""
    from flwr.app import ConfigRecord, Message, RecordDict

    content = RecordDict({_ARRAYS: _record(shared), _CONFIG: ConfigRecord(dict(config))})
    group = str(config["server-round"])
    messages = [
        Message(content, dst_node_id=node, message_type=kind, group_id=group)
        for node in sorted(grid.get_node_ids())
    ]
    found: dict[str, Message] = {}
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            logging.getLogger(__name__).warning(
                "node %s failed to %s in round %s: %s",
                reply.metadata.src_node_id,
                kind,
                group,
                reply.error.reason,
            )
            continue
        name = str(reply.content.config_records[_CONFIG]["client"])
        if name in found:
            raise InputError(f"clients must have names of their own, two nodes are {name!r}")
        found[name] = reply
    if not found:
        raise RuntimeError(f"no client could {kind} in round {group}: see the clients' logs")
    return {name: found[name] for name in sorted(found)}


def _metrics(reply: "Message") -> dict[str, Any]:
    return dict(reply.content.metric_records[_METRICS])
