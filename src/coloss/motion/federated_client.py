"""What a client of a federation does: training on its own data from the shared weights, evaluation on its own test data.

Plain functions of states, without a federated engine: an engine only carries what `train_client` gives back as shared.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import Batch, IndexedDataset, Loader
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier
from coloss.motion.federated_averaging import split_state
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.method import Method
from coloss.train.schedules import Schedule, value_at
from coloss.train.step import Objective

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_SEED_STRIDE = 1_000_003
"""Between the seeds of two rounds: neighbouring seeds of whole runs then share no stream."""


@dataclass(frozen=True)
class FederatedRound:
    """Where a federation stands: what the server tells a client along with the weights.

    Args:
        number: of the round, from 1.
        rounds: of the whole run.
        local_epochs: passes over its own data that each client makes in a round.
        seed: of everything random, for all clients.

    Raises:
        InputError: for values out of range.

    Examples:
        >>> FederatedRound(2, 4).progress(0.5)
        0.375
    """

    number: int
    rounds: int
    local_epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("local_epochs", self.local_epochs)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if not 1 <= self.number <= self.rounds:
            raise InputError(f"number must be in [1, {self.rounds}], got {self.number}")
        if self.seed < 0:
            raise InputError(f"seed must be >= 0, got {self.seed}")

    def progress(self, share: float) -> float:
        """Share of the whole run that is done after some share of this round's local training."""
        return (self.number - 1 + share) / self.rounds


LocalStep = Callable[[nn.Module, IndexedDataset, FederatedRound], Mapping[str, float]]
"""Trains a model in place on one client's data, for one round; gives back numbers to report."""


def _evaluate(model: nn.Module, data: IndexedDataset) -> Mapping[str, float]:
    return evaluate_classifier(model, data)


@dataclass(frozen=True)
class FederatedClient:
    """One participant: a model of its own, data that stay with it, and which parts of the model stay too.

    Args:
        name: letters, digits, `.`, `_` and `-`; of its folder and its metrics.
        model: as it is before the first round; never changed. Its shared part is replaced by the server's, its private part is where the
            client begins. Private parts may differ in shape between clients, such as heads for different classes.
        train: `(inputs, targets)`, or an `IndexedDataset`.
        test: likewise.
        private: what does not leave the client, as in `split_state`.
        evaluate: `(model, test data) -> metrics`; default: those of a classifier.

    Raises:
        InputError: for a name that is none, data without a sample, or private parts that the model does not have.

    Examples:
        >>> model = nn.Sequential()
        >>> model.add_module("head", nn.Linear(4, 3))
        >>> data = torch.randn(8, 4), torch.randint(3, (8,))
        >>> len(FederatedClient("clinic-1", model, data, data, private=("head",)).train)
        8
    """

    name: str
    model: nn.Module
    train: Any
    test: Any
    private: tuple[str, ...] = ("head",)
    evaluate: Callable[[nn.Module, IndexedDataset], Mapping[str, float]] = _evaluate

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise InputError(
                f"name must be letters, digits, '.', '_' and '-', beginning with one of the first two, got {self.name!r}"
            )
        for field in ("train", "test"):
            data = getattr(self, field)
            if not isinstance(data, IndexedDataset):
                object.__setattr__(self, field, IndexedDataset(*data))
            if not len(getattr(self, field)):
                raise InputError(f"client {self.name!r}: {field} must hold at least one sample, got 0")
        object.__setattr__(self, "private", tuple(self.private))
        try:
            split_state(self.model, self.private)
        except ValueError as error:
            raise InputError(f"client {self.name!r}: {error}") from error


def initial_states(client: FederatedClient) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The shared and private part of a client's model before the first round."""
    return split_state(client.model, client.private)


def _no_methods(at: FederatedRound) -> Sequence[Method]:
    return ()


@dataclass(frozen=True)
class LocalTraining:
    """Training of one client for one round, by `coloss.fit`: any objective, any methods.

    The optimizer is new in each round, so momentum does not outlive a round, as is usual in federated averaging. The order of samples goes on
    from round to round: with an optimizer without memory (plain SGD), and a model and methods that draw nothing, R rounds of E epochs on a
    single client are `fit` with R E epochs, to the bit. Dropout and methods draw other numbers in each round, the same for all clients.

    Args:
        methods: gives fresh methods for a round, such as `lambda at: [BlockDistillation(["backbone.blocks.0"])]`; at their `setup` the model is
            the one just downloaded.
        objective: `(outputs, targets) -> loss`.
        optimizer: makes the optimizer from the list of parameters.
        batch_size: at least 1.
        learning_rate_schedule: factor on the learning rate, a function of the progress of the whole run, over all rounds.
        clip_norm: largest gradient norm.

    Raises:
        InputError: for a batch size below 1.

    Examples:
        >>> model = nn.Linear(4, 3)
        >>> data = IndexedDataset(torch.randn(8, 4), torch.randint(3, (8,)))
        >>> sorted(LocalTraining()(model, data, FederatedRound(1, 2)))
        ['train_cross_entropy']
    """

    methods: Callable[[FederatedRound], Sequence[Method]] = _no_methods
    objective: Objective = F.cross_entropy
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = partial(
        torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4
    )
    batch_size: int = 32
    learning_rate_schedule: Schedule | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be >= 1, got {self.batch_size}")

    def __call__(self, model: nn.Module, data: IndexedDataset, at: FederatedRound) -> dict[str, float]:
        """Train the model in place; the last logged loss terms, each as `train_<term>`."""
        size = min(self.batch_size, len(data))
        # As `fit` does it: a batch of one sample cannot train batch normalisation.
        loader = _LaterEpochs(data, size, drop_last=size > 1 and len(data) % size == 1, seed=at.seed)
        loader.first = (at.number - 1) * at.local_epochs
        schedule = self.learning_rate_schedule
        run = fit(
            model,
            loader,
            self.objective,
            list(self.methods(at)),
            budget=Budget(epochs=at.local_epochs),
            optimizer=self.optimizer,
            learning_rate_schedule=None
            if schedule is None
            else lambda share: value_at(schedule, at.progress(share)),
            clip_norm=self.clip_norm,
            fabric=_one_device(),
            log_every=max(len(loader), 1) * at.local_epochs,
            seed=at.seed + _SEED_STRIDE * (at.number - 1),
        )
        return {f"train_{name}": value for name, value in run.history[-1].terms.items()}


@functools.cache
def _one_device() -> "Fabric":
    """Made once: looking for its plugins takes longer than a small client's epoch."""
    from lightning_fabric import Fabric

    return Fabric(accelerator="auto", devices=1)


class _LaterEpochs(Loader):
    """A loader whose first epoch has a number of its own."""

    first = 0

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        return super().batches(self.first + epoch, skip)


def train_client(
    client: FederatedClient,
    shared: Mapping[str, Tensor],
    private: Mapping[str, Tensor] | None,
    local_step: LocalStep,
    at: FederatedRound,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """One client's part of one round.

    Args:
        client: who trains.
        shared: weights as downloaded.
        private: what the client kept from its last round; None for where it begins.
        local_step: trains the model in place.
        at: the round.

    Returns:
        `(shared, private, metrics)` after training, on the CPU: the first for the server, the second for the client alone, numbers of
        training.

    Raises:
        InputError: for weights that do not fit the client's model, or a metric that is no number.

    Examples:
        >>> data = torch.randn(8, 4), torch.randint(3, (8,))
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        >>> client = FederatedClient("a", model, data, data, private=("1",))
        >>> shared, private, _ = train_client(
        ...     client, initial_states(client)[0], None, LocalTraining(), FederatedRound(1, 1)
        ... )
        >>> sorted(shared), sorted(private)
        (['0.bias', '0.weight'], ['1.bias', '1.weight'])
    """
    model = assembled_model(client, shared, private)
    metrics = _numbers(client, local_step(model, client.train, at))
    trained = split_state(model, client.private)
    return ({n: v.cpu() for n, v in trained[0].items()}, {n: v.cpu() for n, v in trained[1].items()}, metrics)


def evaluate_client(
    client: FederatedClient, shared: Mapping[str, Tensor], private: Mapping[str, Tensor] | None
) -> dict[str, float]:
    """Metrics of the client's model, made of shared and private weights, on its test data.

    Args:
        client: whose data.
        shared: weights of the server.
        private: what the client keeps; None for where it begins.

    Raises:
        InputError: for weights that do not fit the client's model, or a metric that is no number.
    """
    return _numbers(client, client.evaluate(assembled_model(client, shared, private).eval(), client.test))


def _numbers(client: FederatedClient, metrics: Mapping[str, Any]) -> dict[str, float]:
    """A tensor of one number, as a local step may well report it, becomes that number: messages carry no other."""
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"client {client.name!r}: metric {name!r} must be a number, got {value!r}"
            ) from error
    return found


def assembled_model(
    client: FederatedClient, shared: Mapping[str, Tensor], private: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The client's model with shared and private weights in it; a copy.

    Args:
        client: gives the network.
        shared: weights of the server.
        private: what the client keeps; None for where it begins.

    Raises:
        InputError: for weights that do not fit.

    Examples:
        >>> data = torch.randn(8, 4), torch.randint(3, (8,))
        >>> client = FederatedClient("a", nn.Linear(4, 3), data, data, private=("bias",))
        >>> assembled_model(client, {"weight": torch.ones(3, 4)}).weight.sum().item()
        12.0
    """
    model = copy.deepcopy(client.model)
    own = initial_states(client)[1] if private is None else private
    state: dict[str, Any] = {**shared, **own}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"the weights do not fit the model of client {client.name!r}: {' '.join(str(error).split())}"
        ) from error
    return model
