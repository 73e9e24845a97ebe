"""From recordings of different bodies to a recogniser for each of their owners, without the recordings in one place, in one call."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from coloss.data import Skeleton
from coloss.data.skeleton import COMMON
from coloss.errors import InputError
from coloss.metrics import extract_features, knn_probe
from coloss.motion.federated_averaging import split_state
from coloss.motion.federated_client import FederatedClient, FederatedRound, LocalTraining
from coloss.motion.federated_diagnostics import block_agreement, link_agreement
from coloss.motion.federated_flower import federated_client_app, federated_server_app
from coloss.motion.federated_methods import BlockDistillation
from coloss.motion.federated_skeletons import (
    Division,
    SkeletonShard,
    skeleton_classifier,
    skeleton_clients,
    skeleton_shards,
)
from coloss.motion.federated_trainer import FederatedRun, FederatedTrainer
from coloss.nn import Classifier
from coloss.train import Budget, load_model, save_model
from coloss.train.run_folder import claim_folder, read_run, source_name, write_metrics

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

PRIVATE = ("head", "norm")
_SETTINGS: dict[str, Any] = {
    "frames": 32,
    "limit": 300,
    "widths": [16, 32, 64],
    "kernel": 9,
    "rate": 1e-2,
    "baseline_rate": 2e-2,
    "batch_size": 32,
    "distilled": 2,
    "distillation": 0.3,
    "local_epochs": 1,
}
"""`distilled`: how many early blocks are compared with those of the model as downloaded, at the weight `distillation`; 0 leaves that out.
`rate`, `baseline_rate`: of AdamW with weight decay 1e-2, for FSAR and for FedAvg beside it, the best of those looked at on other clips than the test's (see
the claim). `limit`: training clips of a client. The rest: of the network."""
_ROUNDS = 40
_LAST = 5


def train_fsar(
    data: str = "bandai+hdm05+msr-action3d",
    folder: str | Path = "runs/fsar",
    *,
    by: Division = "dataset",
    baseline: bool = True,
    settings: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains a recogniser of actions for each of several owners of recordings, in a federation; this is behind `coloss run fsar`.

    All clients are in this process, with Flower's messages between them and the server: adaptive topologies, distillation of early blocks, and
    heads and batch norms that stay with each client. FedAvg with the same private heads and batch norms is trained beside it at its own rate, to
    compare accuracy and steadiness after as many rounds, each of which takes FSAR 1.5 times as long. A run that was stopped goes on in its folder after the last whole round.

    Args:
        data: names or files of motion joined by `+`, see `skeleton_shards`; one client for each.
        folder: for `model-<client>.safetensors`, `run.json`, `metrics.json` and the state of every round; `load_fsar` reads it.
        by: `"class"` deals the classes of one set to three clients instead.
        baseline: whether FedAvg is trained too; that doubles the time.
        settings: replace the recipe's own, see the source of this module: `frames`, `limit`, `widths`, `kernel`, `rate`, `baseline_rate`,
            `batch_size`, `distilled`, `distillation`, `local_epochs`.
        budget: in epochs of each client; default: 40.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        On test clips, of `fsar` and `fedavg`: `<arm>_<client>_accuracy`, `<arm>_mean_accuracy`, `<arm>_worst_accuracy` and `<arm>_round_std`, the
        standard deviation of a client's accuracy over the last 5 rounds. `raw_knn_mean_accuracy` and `untrained_knn_mean_accuracy` of a vote of
        20 neighbours on raw coordinates and on features of the untrained encoder. Of two or more clients, `cka_block_<k>` (how alike their
        models see the same clips) and `private_matrix_cosine`.

    Raises:
        InputError: without Flower (`coloss[federated]`), for a budget that is not in epochs, unknown settings or values out of range, data that
            do not fit together, or a folder that holds another run.

    Examples:
        >>> import tempfile
        >>> metrics = train_fsar(folder=tempfile.mkdtemp(), budget=Budget(epochs=2))  # doctest: +SKIP
        >>> 0 <= metrics["fsar_worst_accuracy"] <= metrics["fsar_mean_accuracy"]  # doctest: +SKIP
        True
    """
    folder, chosen = Path(folder), _checked(settings)
    rounds = _rounds(budget, chosen["local_epochs"])
    names = [source_name(part) for part in data.split("+")]
    shards = skeleton_shards(names, by=by, frames=chosen["frames"], limit=chosen["limit"], seed=seed)
    skeleton = shards[0].skeleton
    run: dict[str, Any] = {
        "data": "+".join(names),
        "seed": seed,
        "by": by,
        "baseline": baseline,
        "rounds": rounds,
        "settings": chosen,
        "parents": list(skeleton.parents),
        "clients": {shard.name: list(shard.classes) for shard in shards},
    }
    claim_folder(folder, run)
    arms: tuple[Literal["fsar", "fedavg"], ...] = ("fsar", "fedavg") if baseline else ("fsar",)
    metrics: dict[str, float] = {}
    for number, arm in enumerate(arms):
        found = FederatedTrainer(
            _clients(shards, chosen, seed, adaptive=arm == "fsar"),
            _local_training(chosen, distil=arm == "fsar", rate="rate" if arm == "fsar" else "baseline_rate"),
            rounds,
            chosen["local_epochs"],
            seed=seed,
            folder=folder / "rounds" / arm,
        ).run(None if progress is None else partial(_report, progress, number, len(arms)))
        metrics |= {f"{arm}_{name}": value for name, value in found.summary(last=_LAST).items()}
        if arm == "fsar":
            for shard in shards:
                save_model(found.model(shard.name), folder / f"model-{shard.name}.safetensors")
            metrics |= _diagnosed(found, shards)
    metrics |= neighbour_accuracy(shards, _clients(shards, chosen, seed, adaptive=False))
    write_metrics(folder, metrics)
    return metrics


def load_fsar(folder: str | Path) -> dict[str, tuple[Classifier, tuple[str, ...]]]:
    """The models that `train_fsar` stored, in evaluation mode, each with the names of its classes, by client.

    Args:
        folder: of the run. `clip_inputs` makes a model's input of clips in the layout it was trained on.

    Raises:
        InputError: if there is no such run, or it is damaged.

    Examples:
        >>> model, classes = load_fsar("runs/fsar-bandai+hdm05+msr-action3d")["hdm05"]  # doctest: +SKIP
        >>> clips = common_layout(load_motion("hdm05"))  # doctest: +SKIP
        >>> classes[model(clip_inputs(clips, 32))[0].argmax()]  # doctest: +SKIP
        'cartwheelLHandStart1Reps'
    """
    folder = Path(folder)
    run = read_run(folder)
    try:
        chosen, skeleton = run["settings"], Skeleton(tuple(run["parents"]))
        found = {
            name: (
                skeleton_classifier(
                    skeleton,
                    len(classes),
                    topology=True,
                    widths=chosen["widths"],
                    kernel=chosen["kernel"],
                    seed=run["seed"],
                ),
                tuple(classes),
            )
            for name, classes in run["clients"].items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no federation ({error!r} in run.json)") from error
    for name, (model, _) in found.items():
        load_model(model, folder / f"model-{name}.safetensors").eval()
    return found


def fsar_client_app(
    data: str = "bandai+hdm05+msr-action3d",
    *,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
) -> "ClientApp":
    """The Flower client app of this system, for Flower's simulation and for machines of their own.

    A node is the client named by `client` in its configuration, one of `data` (on a machine of its own, whose data only it needs to have), or
    else the one at the place `partition-id`, which a simulation gives.

    Args:
        data: names or files of all clients, as in `train_fsar`.
        settings: as in `train_fsar`, the same for all clients and the server.
        folder: on the client's machine, for what it keeps after each round; see `federated_client_app`.
        seed: the same for all clients and the server.

    Raises:
        InputError: without Flower, or for unknown settings; on a message, for a node that is no client.

    Examples:
        >>> type(fsar_client_app()).__name__
        'ClientApp'
    """
    chosen, names = _checked(settings), data.split("+")

    def client_of(context: "Context") -> FederatedClient:
        given = context.node_config.get("client")
        if given is None:
            given = names[int(context.node_config.get("partition-id", 0)) % len(names)]
        if given not in names:
            raise InputError(f"client must be one of {', '.join(names)}, got {given!r}")
        return _client_named(str(given), json.dumps(chosen), seed)

    return federated_client_app(client_of, _local_training(chosen, distil=True), folder=folder)


def fsar_server_app(
    clients: int = 3,
    rounds: int = _ROUNDS,
    *,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    skeleton: Skeleton = COMMON,
) -> "ServerApp":
    """The Flower server app of this system: the counterpart of `fsar_client_app`. It needs no data.

    Args:
        clients: nodes that must be there before the first round.
        rounds: at least 1.
        settings: as in `train_fsar`, the same for all clients and the server.
        folder: for the shared weights and the history after each round.
        seed: the same for all clients and the server.
        skeleton: of the clients' clips; default: the joints that the three named sets share.

    Raises:
        InputError: without Flower, for unknown settings or values out of range.

    Examples:
        >>> type(fsar_server_app()).__name__
        'ServerApp'
    """
    chosen = _checked(settings)

    def initial(context: "Context") -> dict[str, torch.Tensor]:
        model = skeleton_classifier(
            skeleton, 2, topology=True, widths=chosen["widths"], kernel=chosen["kernel"], seed=seed
        )
        return split_state(model, (*PRIVATE, "topology"))[0]

    return federated_server_app(
        initial, rounds, clients, local_epochs=chosen["local_epochs"], seed=seed, folder=folder
    )


def neighbour_accuracy(
    shards: list[SkeletonShard], untrained: list[FederatedClient] | None = None
) -> dict[str, float]:
    """Mean test accuracy over clients of a vote of 20 neighbours on raw coordinates, and on features of untrained encoders.

    Args:
        shards: of the clients.
        untrained: clients whose models' `backbone` is asked too, as it is before training.
    """
    raw, blank = [], []
    for number, shard in enumerate(shards):
        train, test = shard.train.all(), shard.test.all()
        raw.append(knn_probe(train.inputs, train.targets, test.inputs, test.targets).accuracy)
        if untrained is not None:
            backbone = untrained[number].model.get_submodule("backbone")
            sides = [extract_features(backbone, side) for side in (shard.train, shard.test)]
            blank.append(
                knn_probe(sides[0].features, train.targets, sides[1].features, test.targets).accuracy
            )
    found = {"raw_knn_mean_accuracy": float(sum(raw) / len(raw))}
    return found | ({"untrained_knn_mean_accuracy": float(sum(blank) / len(blank))} if blank else {})


def _checked(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(settings or {})
    unknown = sorted(given.keys() - _SETTINGS.keys())
    if unknown:
        raise InputError(f"settings must be of {', '.join(_SETTINGS)}, got {unknown[0]!r}")
    chosen = _SETTINGS | given
    for name in ("frames", "kernel", "batch_size", "local_epochs", "distilled", "limit"):
        if name != "limit" or chosen[name] is not None:
            chosen[name] = _whole(name, chosen[name])
    for name in ("rate", "baseline_rate", "distillation"):
        if isinstance(chosen[name], bool) or not isinstance(chosen[name], Real):
            raise InputError(f"{name} must be a number, got {chosen[name]!r}")
        chosen[name] = float(chosen[name])
    if isinstance(chosen["widths"], str) or not isinstance(chosen["widths"], Sequence):
        raise InputError(f"widths must be a list of numbers, got {chosen['widths']!r}")
    chosen["widths"] = [_whole("widths", width) for width in chosen["widths"]]
    for name in ("frames", "kernel", "batch_size", "local_epochs"):
        if chosen[name] < 1:
            raise InputError(f"{name} must be >= 1, got {chosen[name]}")
    if chosen["kernel"] % 2 == 0:
        raise InputError(f"kernel must be odd, got {chosen['kernel']}")
    if not chosen["widths"] or min(chosen["widths"]) < 1:
        raise InputError(f"widths must be numbers >= 1, one at least, got {chosen['widths']}")
    if not 0 <= chosen["distilled"] <= len(chosen["widths"]):
        raise InputError(
            f"distilled must be in [0, {len(chosen['widths'])}], the number of blocks, got {chosen['distilled']}"
        )
    for name in ("rate", "baseline_rate"):
        if not 0 < chosen[name] < math.inf:
            raise InputError(f"{name} must be > 0 and finite, got {chosen[name]}")
    if not 0 <= chosen["distillation"] < math.inf:
        raise InputError(f"distillation must be >= 0 and finite, got {chosen['distillation']}")
    return chosen


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    return int(value)


@functools.lru_cache(maxsize=8)
def _client_named(name: str, chosen_json: str, seed: int) -> FederatedClient:
    """One client with its data, loaded once in a process."""
    chosen = json.loads(chosen_json)
    shards = skeleton_shards([name], frames=chosen["frames"], limit=chosen["limit"], seed=seed)
    return _clients(shards, chosen, seed, adaptive=True)[0]


def _rounds(budget: Budget | None, local_epochs: int) -> int:
    if budget is None:
        return _ROUNDS
    if budget.epochs is None:
        raise InputError(
            f"budget must be in epochs of each client, such as 40epochs, got {next(iter(budget.as_dict()))}"
        )
    return max(round(budget.epochs / local_epochs), 1)


def _clients(
    shards: list[SkeletonShard], chosen: Mapping[str, Any], seed: int, *, adaptive: bool
) -> list[FederatedClient]:
    return skeleton_clients(
        shards,
        private=PRIVATE,
        topology=adaptive,
        widths=chosen["widths"],
        kernel=chosen["kernel"],
        seed=seed,
    )


def _local_training(chosen: Mapping[str, Any], *, distil: bool, rate: str = "rate") -> LocalTraining:
    blocks = [f"backbone.blocks.{number}" for number in range(chosen["distilled"] if distil else 0)]

    def methods(at: FederatedRound) -> list[BlockDistillation]:
        # What everyone downloads for the first round was never trained: there is nothing to keep near to.
        return [BlockDistillation(blocks, chosen["distillation"])] if blocks and at.number > 1 else []

    return LocalTraining(
        methods=methods,
        optimizer=partial(torch.optim.AdamW, lr=chosen[rate], weight_decay=1e-2),
        batch_size=chosen["batch_size"],
    )


def _diagnosed(found: FederatedRun, shards: list[SkeletonShard]) -> dict[str, float]:
    models = {shard.name: found.model(shard.name) for shard in shards}
    if len(models) < 2:
        return {}
    # The same number of clips of everyone, so that no client's own data dominate.
    count = min(64, *(len(shard.test) for shard in shards))
    probe = torch.cat([shard.test.all().inputs[:count] for shard in shards])
    depth = len(list(next(iter(models.values())).get_submodule("backbone.blocks").children()))
    agreement = block_agreement(models, probe, [f"backbone.blocks.{number}" for number in range(depth)])
    return {
        **{f"cka_block_{number}": value for number, value in enumerate(agreement.values(), 1)},
        "private_matrix_cosine": link_agreement(models)["private_matrix"],
    }


def _report(progress: Callable[[float], None], number: int, arms: int, share: float) -> None:
    progress((number + share) / arms)
