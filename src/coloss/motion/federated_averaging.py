"""What clients of a federation share and what they keep, and the mean of what they share.

    shared, private = split_state(model, ("topology", "head", "norm"))       on each client, after its local training
    average = fedavg([shared of client 1, ..., shared of client C], [samples of client 1, ..., samples of client C])

Nothing here needs a federated engine.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coloss.motion.adaptive_topology import AdaptiveTopology
from coloss.ops import accumulation_dtype

PRIVATE_KINDS = ("topology", "norm")
"""Private parts that are found by their type; every other name is the path of a module or of one tensor."""

_MEAN, _VARIANCE = "running_mean", "running_var"


def split_state(
    model: nn.Module, private: Sequence[str] = ("topology", "head", "norm")
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's parameters and buffers in two parts: what a server may see, and what stays with the client.

    Args:
        model: of one client.
        private: what stays. `"topology"` is all of each `AdaptiveTopology` but its shared matrix, `"norm"` the parameters and
            running statistics of each batch norm (FedBN); any other name is the path of a submodule or tensor, with all that is under it:
            `"head"` keeps `head.weight` and leaves `header.weight`.

    Returns:
        `(shared, private)`, copies that do not follow the model, with the names of `model.state_dict()`; `shared | private` has them all.

    Raises:
        ValueError: for a name that the model has no part of.

    Examples:
        >>> model = nn.Sequential()
        >>> for name, part in {
        ...     "body": nn.Linear(2, 2),
        ...     "bn": nn.BatchNorm1d(2),
        ...     "head": nn.Linear(2, 3),
        ... }.items():
        ...     model.add_module(name, part)
        >>> shared, private = split_state(model, ("head", "norm"))
        >>> sorted(shared), "bn.running_var" in private
        (['body.bias', 'body.weight'], True)
    """
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    kept: set[str] = set()
    for part in private:
        found = _names_of(part, model, state)
        if not found:
            raise ValueError(
                f'private must name parts of the model ("topology", "norm" or paths), got {part!r}, which has no tensor'
            )
        kept |= found
    return (
        {name: value for name, value in state.items() if name not in kept},
        {name: value for name, value in state.items() if name in kept},
    )


def _names_of(part: str, model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    if part not in PRIVATE_KINDS:
        return {name for name in state if name == part or name.startswith(f"{part}.")}
    found = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if part == "topology" and isinstance(module, AdaptiveTopology):
            found |= {f"{prefix}{name}" for name in module.private_names}
        if part == "norm" and isinstance(module, _BatchNorm):
            found |= {f"{prefix}{name}" for name in module.state_dict()}
    return found


def fedavg(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of several models' tensors, as one model.

        mean = sum_c w_c x_c / sum_c w_c

    A running variance of batch norm is averaged together with its mean, by the law of total variance: the variance of all clients' samples
    as one set, sum_c w_c (v_c + (m_c - mean)^2) / sum_c w_c. The plain mean of variances would leave out what lies between clients.
    Whole numbers are rounded.

    Args:
        states: one of each client, same names and shapes, such as the shared part of `split_state`.
        weights: of each client, >= 0, not all 0; its number of samples, as a rule. A client of weight 0 is not looked at.

    Returns:
        New tensors in the clients' types. Sums are in float64. What is equal in all states stays to the bit, infinities too, and so does a single
        client. Infinities of both signs, or a NaN, give NaN.

    Raises:
        ValueError: for no state, weights out of range, or states whose names or shapes differ (such as heads for different classes: keep them
            private).

    Source: McMahan et al., 2017, arXiv 1602.05629, algorithm 1.

    Examples:
        >>> import torch
        >>> fedavg([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], [2, 1])["w"]
        tensor([2.])
        >>> states = [
        ...     {"running_mean": torch.tensor([m]), "running_var": torch.tensor([1.0])} for m in (-2.0, 2.0)
        ... ]
        >>> fedavg(states, [1, 1])["running_var"]
        tensor([5.])
    """
    if not states:
        raise ValueError("states must hold one model at least, got none")
    if len(weights) != len(states):
        raise ValueError(f"weights must be one for each of {len(states)} states, got {len(weights)}")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite, >= 0 and not all 0, got {list(weights)}")
    _check_alike(states)
    total = math.fsum(weights)
    taken = [(state, weight / total) for state, weight in zip(states, weights, strict=True) if weight]
    # Differences to the weightiest state are averaged, so that equal tensors and a single client stay exact.
    base = max(taken, key=lambda entry: entry[1])[0]
    # float64 does not hold all whole numbers: what need not be averaged is copied.
    same = {name for name, value in base.items() if all(_identical(s[name], value) for s, _ in taken)}
    means = {name: _mean([(_wide(s[name]), w) for s, w in taken], _wide(base[name])) for name in base}
    for name in base:
        if name.rpartition(".")[2] == _VARIANCE:
            sibling = name[: -len(_VARIANCE)] + _MEAN
            if sibling not in same:
                same.discard(name)
            spreads = [(_wide(s[name]) + (_wide(s[sibling]) - means[sibling]).square(), w) for s, w in taken]
            largest = max(spreads, key=lambda entry: entry[1])[0]
            means[name] = _mean(spreads, largest)
    return {
        name: base[name].detach().clone() if name in same else _narrow(value, base[name])
        for name, value in means.items()
    }


def _check_alike(states: Sequence[Mapping[str, Tensor]]) -> None:
    first = states[0]
    for number, state in enumerate(states[1:], 1):
        odd = sorted(first.keys() ^ state.keys())
        if odd:
            raise ValueError(f"states must have the same names, {odd[0]!r} is not in both 0 and {number}")
        for name, value in first.items():
            if value.shape != state[name].shape:
                raise ValueError(
                    f"states must have the same shapes, {name!r} has {tuple(value.shape)} in 0 and "
                    f"{tuple(state[name].shape)} in {number}: what differs between clients must be private"
                )
    for name in first:
        if name.rpartition(".")[2] == _VARIANCE and name[: -len(_VARIANCE)] + _MEAN not in first:
            raise ValueError(f"states must have the {_MEAN} that belongs to {name!r}")


def _identical(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _wide(value: Tensor) -> Tensor:
    dtype = accumulation_dtype(value.device)
    return value.detach().to(dtype.to_complex() if value.is_complex() else dtype)


def _mean(values: Sequence[tuple[Tensor, float]], base: Tensor) -> Tensor:
    mean = base.clone()
    for value, weight in values:
        gap = torch.where(base.isinf(), value, value - base)
        mean += weight * torch.where(value == base, 0, gap)
    return mean


def _narrow(value: Tensor, like: Tensor) -> Tensor:
    return (value if like.is_floating_point() or like.is_complex() else value.round()).to(like.dtype)
