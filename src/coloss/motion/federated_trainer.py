"""A whole federation in one process, on the apps that also run it across machines."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor, nn

from coloss.errors import InputError
from coloss.motion.federated_client import (
    FederatedClient,
    FederatedRound,
    LocalStep,
    LocalTraining,
    assembled_model,
    initial_states,
)
from coloss.motion.federated_flower import federated_client_app, federated_server_app, kept_part
from coloss.motion.federated_grid import InProcessGrid, require_flower
from coloss.train.run_folder import claim_folder


@dataclass(frozen=True)
class FederatedRun:
    """What a federation left.

    Attributes:
        shared: the server's tensors, bfloat16 as float32.
        private: what each client keeps after the last round, by name.
        history: for each round `{"round": number, "clients": {name: metrics}}`.
        clients: who took part.
    """

    shared: dict[str, Tensor]
    private: dict[str, dict[str, Tensor]]
    history: list[dict[str, Any]]
    clients: tuple[FederatedClient, ...]

    def model(self, name: str) -> nn.Module:
        """A client's model, shared and private weights together, in evaluation mode.

        Raises:
            InputError: for a name that no client has.
        """
        found = next((client for client in self.clients if client.name == name), None)
        if found is None:
            raise InputError(
                f"name must be one of {', '.join(client.name for client in self.clients)}, got {name!r}"
            )
        return assembled_model(found, self.shared, self.private[name]).eval()

    def summary(self, metric: str = "accuracy", last: int = 5) -> dict[str, float]:
        """How well and how steadily the clients did.

        Args:
            metric: of those that clients report.
            last: rounds over which steadiness is taken, >= 1.

        Returns:
            `<client>_<metric>`, `mean_<metric>` and `worst_<metric>` after the last round, and `round_std`: the standard deviation of a
            client's metric over the last rounds that were evaluated, averaged over clients.

        Raises:
            InputError: if `last` is out of range, or a client did not report the metric in the last round.
        """
        if last < 1:
            raise InputError(f"last must be >= 1, got {last}")
        rows = [
            {name: found[metric] for name, found in entry["clients"].items() if metric in found}
            for entry in self.history
        ]
        final = rows[-1]
        names = [client.name for client in self.clients]
        missing = [name for name in names if name not in final]
        if missing:
            raise InputError(f"metric must be one that every client reports, {missing[0]} has no {metric!r}")
        series = {name: [row[name] for row in rows if name in row][-last:] for name in names}
        return {
            **{f"{name}_{metric}": final[name] for name in names},
            f"mean_{metric}": fmean(final[name] for name in names),
            f"worst_{metric}": min(final[name] for name in names),
            "round_std": fmean(pstdev(values) for values in series.values()),
        }


class FederatedTrainer:
    """Federated training of several clients in this process: FedAvg on what they share, everything else stays with each.

    Runs the apps of `federated_client_app` and `federated_server_app` on an `InProcessGrid`, so all that passes between server and clients is a
    Flower message. The shared tensors begin as the first client's. Deterministic: the same clients and seed give the same bits. With one client
    it is training without a federation, round after round.

    Args:
        clients: with distinct names; the shared parts of their models have the same names and shapes.
        local_step: trains a model in place for one round, for all clients alike.
        rounds: at least 1.
        local_epochs: passes of each client over its data in a round.
        seed: of everything random.
        folder: for the state after each round; a run that was stopped, by a kill too, goes on there and ends with the same bits.
        evaluated: evaluate after this many last rounds only; default: after every round.

    Raises:
        InputError: for no clients, names that repeat, shared parts that differ, values out of range, or if Flower is not installed.

    Cost: the clients' training, one after another; a message costs a copy of the shared tensors.

    Examples:
        >>> import torch
        >>> data = torch.randn(16, 4), torch.randint(2, (16,))
        >>> clients = [
        ...     FederatedClient(name, nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), data, data, ("1",))
        ...     for name in "ab"
        ... ]
        >>> run = FederatedTrainer(clients, LocalTraining(), rounds=2).run()
        >>> len(run.history), sorted(run.summary())
        (2, ['a_accuracy', 'b_accuracy', 'mean_accuracy', 'round_std', 'worst_accuracy'])
    """

    def __init__(
        self,
        clients: Sequence[FederatedClient],
        local_step: LocalStep | None = None,
        rounds: int = 15,
        local_epochs: int = 1,
        *,
        seed: int = 0,
        folder: str | Path | None = None,
        evaluated: int | None = None,
    ) -> None:
        require_flower()
        if not clients:
            raise InputError("clients must be one at least, got none")
        names = [client.name for client in clients]
        if len(set(names)) != len(names):
            raise InputError(f"clients must have names of their own, got {', '.join(names)}")
        FederatedRound(1, rounds, local_epochs, seed)
        shapes = [{n: tuple(v.shape) for n, v in initial_states(client)[0].items()} for client in clients]
        for client, shape in zip(clients, shapes, strict=True):
            for name in sorted(shape.keys() | shapes[0].keys()):
                if shape.get(name) != shapes[0].get(name):
                    raise InputError(
                        f"the shared parts of all clients must be alike, {name!r} is {shapes[0].get(name)} for {names[0]} and "
                        f"{shape.get(name)} for {client.name}: make it private"
                    )
        self.clients = tuple(clients)
        self.local_step = local_step or LocalTraining()
        self.rounds, self.local_epochs, self.seed, self.evaluated = rounds, local_epochs, seed, evaluated
        self.folder = None if folder is None else Path(folder)

    def run(self, progress: Callable[[float], None] | None = None) -> FederatedRun:
        """Train all rounds that are not done yet.

        Args:
            progress: called after each round with the share that is done.

        Raises:
            InputError: if the folder holds another run, or more rounds.
        """
        server, private = None, None
        if self.folder is not None:
            names = [client.name for client in self.clients]
            claim_folder(
                self.folder, {"data": "+".join(names), "seed": self.seed, "local_epochs": self.local_epochs}
            )
            server, private = self.folder / "server", self.folder / "clients"
        client_app = federated_client_app(
            lambda context: self.clients[int(context.node_config["partition-id"])],
            self.local_step,
            folder=private,
        )
        server_app = federated_server_app(
            lambda context: initial_states(self.clients[0])[0],
            self.rounds,
            len(self.clients),
            local_epochs=self.local_epochs,
            seed=self.seed,
            evaluated=self.evaluated,
            folder=server,
            report=progress,
        )
        count = len(self.clients)
        grid = InProcessGrid(
            client_app, [{"partition-id": index, "num-partitions": count} for index in range(count)]
        )
        context = grid.run_server(server_app)
        history = json.loads(str(context.state.config_records["history"]["json"]))
        kept: dict[str, dict[str, Tensor]] = {}
        for client, own in zip(self.clients, grid.contexts.values(), strict=True):
            # A run that was killed may have left a client a round ahead of the server.
            found = kept_part(own, private, client, len(history))
            kept[client.name] = initial_states(client)[1] if found is None else found
        return FederatedRun(
            shared=dict(context.state.array_records["arrays"].to_torch_state_dict()),
            private=kept,
            history=history,
            clients=self.clients,
        )
