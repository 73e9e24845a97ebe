"""AdamS for a few weights beside the optimizer of a run, which keeps all others: no loop has to know of it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coloss.compression.adam_s import AdamS
from coloss.errors import InputError


class SecondOptimizer:
    """Steps some weights by AdamS whenever another optimizer steps, and hides their gradients from it.

    Right before the other's step (after the gradients are final and clipped; after its closure, if it has one) AdamS makes its own, and the
    gradients of its weights are taken away: the other optimizer leaves alone what has none. So the other must take final gradients, once
    a step: no LBFGS, and no fused one under a `GradScaler`.

    Args:
        adam: over the weights, all in one group.
        weights: by name; the names are those of the stored state.
        learning_rate: base rate; None: the other's. Both follow the other's schedule: the present rate of the weights' group over its
            `initial_lr`, which `fit` and torch's schedulers set; without it, over the rate that the other was made with.

    Raises:
        InputError: in a step of the other, if the weights have several rates, a closure is called twice, or the gradients are still scaled.

    Examples:
        >>> weight, bias = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(1))
        >>> adam = AdamS([{"params": [weight], "sparse": True}], total_steps=10, correct_second_moment=True)
        >>> optimizer = torch.optim.SGD([weight, bias], lr=0.1)
        >>> SecondOptimizer(adam, {"weight": weight}, learning_rate=0.01).attach(optimizer)
        >>> weight.grad, bias.grad = torch.ones(1, 4), torch.ones(1)
        >>> optimizer.step()
        >>> weight.data, bias.data, weight.grad is None
        (tensor([[0.9900, 0.9900, 0.9900, 0.9900]]), tensor([0.9000]), True)
    """

    def __init__(self, adam: AdamS, weights: Mapping[str, nn.Parameter], learning_rate: float | None = None):
        self.adam, self.weights, self.learning_rate = adam, dict(weights), learning_rate
        self.first: torch.optim.Optimizer | None = None
        self._hook: Any = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Go beside an optimizer, from its next step on; a second call with the same one does nothing.

        Raises:
            InputError: for an AdamS, or an optimizer that lacks one of the weights; with `learning_rate`, if the weights' group has a rate
                of its own and no `initial_lr`.
        """
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        if optimizer is self.first:
            return
        if isinstance(optimizer, AdamS):
            raise InputError(
                "the run's optimizer must not be AdamS, the method brings its own: give AdamW or another for the other weights"
            )
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, weight in self.weights.items():
            if id(weight) not in held:
                raise InputError(
                    f"the run's optimizer must hold the weights of all chosen layers, got none of {name}"
                )
        for group in self._groups(optimizer) if self.learning_rate is not None else ():
            if "initial_lr" not in group and group["lr"] != optimizer.defaults["lr"]:
                raise InputError(
                    f'a group of the run\'s optimizer with a rate of its own must have group["initial_lr"], the rate that a schedule '
                    f"starts from, got lr {float(group['lr'])} only"
                )
        self.detach()
        self.first = optimizer
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Leave the other optimizer to itself."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.first = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state of AdamS by name: `<weight>.mu` and so on."""
        for path, weight in self.weights.items():
            for name, value in self.adam.state.get(weight, {}).items():
                yield f"{path}.{name}", torch.as_tensor(value)

    def load(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Put the state back in place of the present one; gives what does not fit, in words."""
        complaints = []
        # A state from before the first step has no tensors.
        self.adam.state.clear()
        for key, value in tensors.items():
            path, name = key.rsplit(".", 1)
            weight = self.weights.get(path)
            if weight is None:
                complaints.append(f"{key} is of no chosen layer")
            elif name == "step":
                self.adam.state[weight][name] = int(value)
            elif value.shape != weight.shape:
                complaints.append(f"{key} has shape {tuple(value.shape)}, the weight {tuple(weight.shape)}")
            else:
                # A copy, since steps write into it.
                self.adam.state[weight][name] = value.detach().clone().to(weight.device)
        return complaints

    def _before_step(
        self, optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if getattr(optimizer, "found_inf", None) is not None:
            raise InputError(
                "the run's optimizer must not be fused under a GradScaler, which leaves it to unscale gradients and to skip steps: make it "
                "with fused=False"
            )
        closure = named.get("closure") or (arguments[1] if len(arguments) > 1 else None)
        if closure is None:
            self._step(optimizer)
            return None

        calls: list[bool] = []

        def gradients_then_step() -> Any:
            if calls:
                raise InputError(
                    f"the run's optimizer must call its closure once a step, got a second call from {type(optimizer).__name__}"
                )
            calls.append(True)
            loss = closure()
            self._step(optimizer)
            return loss

        return arguments[:1], {**named, "closure": gradients_then_step}

    def _groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        own = {id(weight) for weight in self.weights.values()}
        return [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        groups = self._groups(optimizer)
        rates = {float(group["lr"]) for group in groups}
        if len(rates) > 1:
            raise InputError(f"the chosen weights must have one learning rate, got {sorted(rates)}")
        rate = rates.pop()
        if self.learning_rate is not None:
            rate *= self.learning_rate / float(groups[0].get("initial_lr", optimizer.defaults["lr"]))
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        for weight in self.weights.values():
            weight.grad = None
