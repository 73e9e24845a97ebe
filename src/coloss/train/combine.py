"""Turning named loss terms into one update: weighted sums, uncertainty weighting, Jacobian descent."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coloss.errors import InputError, suggest_names
from coloss.ops import distributed
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State


class WeightedSum(nn.Module):
    """Sum of the terms, each times a number or a schedule.

    total = sum_i weight_i(progress) * term_i. A term not named in `weights` takes the default weight of the method that made
    it (`Method.term_weights`), else 1.

    Args:
        weights: term name -> number or schedule of progress in [0, 1].

    Raises:
        InputError: at the first step, if a name in `weights` is no term of the run.

    Examples:
        >>> state = State(nn.Identity())
        >>> terms = {"cross_entropy": torch.tensor(2.0), "kd": torch.tensor(10.0)}
        >>> WeightedSum({"kd": 0.5})(state, terms)
        tensor(7.)
    """

    def __init__(self, weights: Mapping[str, Schedule] | None = None):
        super().__init__()
        self.weights = dict(weights or {})
        self._resolved: dict[str, Schedule] | None = None

    def _resolve(self, state: State, terms: Mapping[str, Tensor]) -> dict[str, Schedule]:
        defaults: dict[str, Schedule] = {}
        for method in state.methods:
            defaults.update(method.term_weights)
        known = {*terms, *state.terms, *defaults}
        for name in self.weights:
            if name not in known:
                raise InputError(f"no loss term named {name!r} to weigh{suggest_names(name, sorted(known))}")
        return defaults | self.weights

    def weight(self, name: str, state: State) -> float:
        """The weight of one term at the present progress; `forward` must have seen the terms once."""
        assert self._resolved is not None
        return value_at(self._resolved.get(name, 1.0), state.progress)

    def forward(self, state: State, terms: Mapping[str, Tensor]) -> Tensor:
        if self._resolved is None:
            self._resolved = self._resolve(state, terms)
        total: Tensor | None = None
        for name, term in terms.items():
            schedule = self._resolved.get(name, 1.0)
            part = term if schedule == 1.0 else value_at(schedule, state.progress) * term
            total = part if total is None else total + part
        if total is None:
            raise InputError("there is no loss: give an objective, or a method that adds terms")
        return total


class UncertaintyWeighting(nn.Module):
    """Weights learned with the network, one log-variance s_i for each term.

    total = sum_i exp(-s_i) * term_i / 2 + s_i / 2, the Gaussian likelihood with homoscedastic noise.

    Args:
        terms: the names of the terms, so that their parameters exist before the optimizer does.

    Raises:
        InputError: if the run has a term not named here, or lacks one that is.

    Source: Kendall, Gal and Cipolla, 2018, arXiv:1705.07115, equation 7.

    Examples:
        >>> combine = UncertaintyWeighting(["a", "b"])
        >>> combine(State(nn.Identity()), {"a": torch.tensor(2.0), "b": torch.tensor(4.0)}).item()
        3.0
    """

    def __init__(self, terms: Sequence[str]):
        super().__init__()
        if not terms or len(set(terms)) != len(terms):
            raise InputError(f"terms must be distinct names, at least one, got {list(terms)}")
        self.names = list(terms)
        self.log_variances = nn.Parameter(torch.zeros(len(terms)))

    def forward(self, state: State, terms: Mapping[str, Tensor]) -> Tensor:
        if set(terms) != set(self.names):
            raise InputError(
                f"UncertaintyWeighting was made for terms {self.names}, the run has {sorted(terms)}"
            )
        values = torch.stack([terms[name] for name in self.names])
        return 0.5 * (torch.exp(-self.log_variances) * values + self.log_variances).sum()


class JacobianDescent(nn.Module):
    """One aggregated gradient from the terms' separate gradients, by any aggregator of `torchjd`.

    The rows of the Jacobian are the gradients of the terms (times their weights) on all trainable parameters, averaged over
    processes. Takes over the backward pass. Under gradient accumulation the Jacobian is averaged over the micro-batches first, and
    aggregated once.

    Args:
        aggregator: for instance `torchjd.aggregation.UPGrad()`.
        weights: as for `WeightedSum`.

    Cost: one backward pass and one gradient's memory for each term.

    Source: Quinton and Rey, 2024, arXiv:2406.16232.

    Examples:
        >>> from torchjd.aggregation import UPGrad
        >>> import coloss
        >>> data = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> def objective(outputs, targets):
        ...     return {
        ...         "cross_entropy": nn.functional.cross_entropy(outputs, targets),
        ...         "size": outputs.square().mean(),
        ...     }
        >>> run = coloss.fit(
        ...     nn.Linear(4, 3),
        ...     data,
        ...     objective,
        ...     combine=JacobianDescent(UPGrad()),
        ...     budget=coloss.Budget(steps=3),
        ... )
        >>> run.steps
        3
    """

    accumulates = True

    def __init__(self, aggregator: Any, weights: Mapping[str, Schedule] | None = None):
        super().__init__()
        self.aggregator = aggregator
        self._weighted = WeightedSum(weights)

    def forward(self, state: State, terms: Mapping[str, Tensor]) -> Tensor:
        return self._weighted(state, terms)

    def backward(self, state: State, terms: Mapping[str, Tensor]) -> None:
        from torchjd import autojac

        self._weighted(state, terms)  # checks the names
        share = 1.0 / state.micro_batches
        rows = [share * self._weighted.weight(name, state) * term for name, term in terms.items()]
        autojac.backward(rows, inputs=state.trainable)
        if state.micro_batch + 1 < state.micro_batches:
            return
        reached = [parameter for parameter in state.trainable if getattr(parameter, "jac", None) is not None]
        if distributed.world_size() > 1:
            for parameter in reached:
                torch.distributed.all_reduce(parameter.jac)  # type: ignore[attr-defined]
                parameter.jac /= distributed.world_size()  # type: ignore[attr-defined]
        autojac.jac_to_grad(reached, self.aggregator)
