r"""Adam whose decay pulls only the losers of every n:m group to zero, so that the final pruning has nothing left to take.

Huang, Hu, Zhu, Chen 2025, "CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models",
arXiv 2509.25996, algorithm 1. The forward pass stays dense. With mask m (1 for the n greatest |w| of each m neighbours, made anew every
`mask_every` steps), step t = 0 ... T-1, gradient g and learning rate gamma_t:

    mu_t   = b1 mu_{t-1} + (1-b1) g                          raw gradients only
    alpha  = t / T                                           the ramp
    mu~_t  = (1-alpha) mu_t + alpha * decay * sign(w)        where m = 0;   mu_t where m = 1
    v_t    = b2 v_{t-1} + (1-b2) mu~_t^2                     of mu~, not of g, for kept weights too
    w     <- w - gamma_t * mu~_t/(1-b1^{t+1}) / (sqrt(v_t/(1-b2^{t+1})) + eps)

The decay stands inside the preconditioner: as alpha grows, every loser moves by about gamma towards 0 per step, whatever `decay` is. `decay`
sets when the pull wins over the gradient, the learning rate how far it reaches (`coloss.compression.decay_budget`) and how near to zero it
ends: at a constant rate losers hop between about plus and minus gamma, so let the rate fall. (1-alpha) also quietens the gradient of
losers: they do not come back late.

Not the same as Adam at equal learning rate: v is made of mu, whose first value is (1-b1) g, so that the first step is 1/(1-b1) times the
learning rate, and later ones are longer than Adam's where gradients are noisy. For the same reason losers without gradient fall by up
to 7 rates in the first steps however small alpha is, and by sqrt(3) at the end of the ramp. Warm the rate up and tune it anew, or take
`correct_second_moment`, which squares mu~/(1-b1^{t+1}).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.errors import InputError
from coloss.ops import nm_mask

_KEPT = ("mu", "v", "mask", "master")
"""Entries of the state whose type is not the parameter's."""


class AdamS(torch.optim.Optimizer):
    """Steps of Adam that also pull the small weights of every n:m group to zero, at one pace for all of them.

    Args:
        params: parameter groups. `sparse=True` in a group puts its weights in scope: all with two dimensions or more, inputs in the
            second (linear layers, convolutions); `coloss.compression.nm_parameter_groups` makes such groups. Weights of other groups
            get the same steps without decay.
        lr: learning rate, >= 0; also per group, as the options below.
        nm: n of each m neighbours along the inputs are kept; inputs behind the last whole group are left alone.
        decay: strength of the pull beside the gradient, >= 0.
        total_steps: T of the ramp, >= 1. None: set `group["ramp"]`, in [0, 1], before each step, as one sets a learning rate.
        mask_every: steps between new masks, >= 1; the first is made at step 0.
        betas: of the two averages, in [0, 1).
        eps: added to the denominator, >= 0.
        correct_second_moment: correct mu~ for its start at zero before it is squared; the first step is then the learning rate.

    State of each parameter: `mu`, `v`, `step`; `mask` (bool) for those in scope; `master`, a float32 copy, for half-precision ones: steps
    of 1e-5 are lost in bfloat16.

    Raises:
        InputError: for values out of range, if no group is in scope (this would be Adam under another name), or a weight in scope has one
            dimension, fewer than m inputs, or is sharded: the mask of a flattened shard would be of the wrong weights; in `step`, if
            such a weight changed its shape, or a gradient is sparse.

    Cost:
        About twice Adam's arithmetic, one byte more for each weight in scope, and a sort of its groups every `mask_every` steps. No
            `fused` or `capturable` form; new masks wait for the device, once for each weight.

    Source:
        Huang et al. 2025, arXiv 2509.25996, algorithm 1.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0, 0.1, -0.1]]))
        >>> optimizer = AdamS([{"params": [weight], "sparse": True}], lr=0.01, decay=1.0, total_steps=100)
        >>> for step in range(100):
        ...     optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 100)
        ...     weight.grad = torch.zeros_like(weight)
        ...     _ = optimizer.step()
        >>> weight.data[:, :2], bool((weight.data[:, 2:].abs() < 1e-3).all())
        (tensor([[ 1., -2.]]), True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        nm: tuple[int, int] = (2, 4),
        decay: float = 1e-6,
        total_steps: int | None,
        mask_every: int = 10,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        correct_second_moment: bool = False,
    ):
        defaults = {
            "lr": lr,
            "nm": tuple(nm),
            "decay": decay,
            "total_steps": total_steps,
            "mask_every": mask_every,
            "betas": tuple(betas),
            "eps": eps,
            "correct_second_moment": correct_second_moment,
            "sparse": False,
            "ramp": 0.0,
        }
        super().__init__(params, defaults)
        if not any(group["sparse"] for group in self.param_groups):
            raise InputError(
                "params must have a group with sparse=True, whose weights lose n:m places (see nm_parameter_groups), got none"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; calls the closure first, if there is one, and returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets: dict[tuple[Any, ...], list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter, group)
                    key = (state["step"], parameter.device, parameter.dtype)
                    buckets.setdefault(key, []).append(parameter)
            for (count, *_), parameters in buckets.items():
                self._step_together(group, count, parameters)
        return loss

    def masks(self) -> dict[torch.nn.Parameter, Bool[Tensor, "..."]]:
        """The present masks of the weights in scope, True where a weight stays; empty before the first step."""
        found: dict[Any, Tensor] = {p: state["mask"] for p, state in self.state.items() if "mask" in state}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back. Masks stay boolean, and averages of half-precision weights float32."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            for name, value in state_dict["state"].get(place, {}).items():
                if name in _KEPT:
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)
                elif name == "step":
                    self.state[parameter][name] = int(value)

    def _state_of(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise InputError("AdamS takes dense gradients: use nn.Embedding(sparse=False)")
        state = self.state[parameter]
        if not state:
            if group["sparse"]:
                _check_shape(parameter, group["nm"][1])
            value = _full(parameter)
            state["step"] = 0
            state["mu"] = torch.zeros_like(value, memory_format=torch.preserve_format)
            state["v"] = torch.zeros_like(value, memory_format=torch.preserve_format)
            if value is not parameter:
                state["master"] = value
        if state["mu"].shape != parameter.shape:
            raise InputError(
                f"a weight's shape must not change after the first step, got {tuple(parameter.shape)} after "
                f"{tuple(state['mu'].shape)} (sharded weights are not supported: use ddp)"
            )
        if "master" in state:
            # Where somebody else wrote to the weight, the weight counts.
            same = state["master"].to(parameter.dtype) == parameter
            state["master"] = torch.where(same, state["master"], parameter.detach().float())
        if group["sparse"] and ("mask" not in state or state["step"] % group["mask_every"] == 0):
            n, m = group["nm"]
            state["mask"] = nm_mask(state.get("master", parameter.detach()), n, m, dim=1)
        return state

    def _step_together(self, group: dict[str, Any], count: int, parameters: list[torch.nn.Parameter]) -> None:
        first, second = group["betas"]
        states = [self.state[parameter] for parameter in parameters]
        means, squares = [state["mu"] for state in states], [state["v"] for state in states]
        weights: list[Tensor] = [
            state.get("master", parameter) for state, parameter in zip(states, parameters, strict=True)
        ]
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        gradients = [gradient.to(mean.dtype) for gradient, mean in zip(gradients, means, strict=True)]
        torch._foreach_lerp_(means, gradients, 1 - first)
        pulled = means
        if group["sparse"] and (ramp := _ramp(group, count)) > 0:
            goals = torch._foreach_sign([weight.detach() for weight in weights])
            torch._foreach_mul_(goals, group["decay"])
            goals = torch._foreach_lerp(means, goals, ramp)
            pulled = [
                torch.where(state["mask"], mean, goal)
                for state, mean, goal in zip(states, means, goals, strict=True)
            ]
        first_correction, second_correction = 1 - first ** (count + 1), 1 - second ** (count + 1)
        if group["correct_second_moment"]:
            pulled = list(torch._foreach_div(pulled, first_correction))
            first_correction = 1.0
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, pulled, pulled, 1 - second)
        sizes = torch._foreach_div(squares, second_correction)
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, group["eps"])
        torch._foreach_addcdiv_(weights, pulled, sizes, -float(group["lr"]) / first_correction)
        for state, parameter, weight in zip(states, parameters, weights, strict=True):
            state["step"] += 1
            if weight is not parameter:
                parameter.copy_(weight)


def _ramp(group: dict[str, Any], count: int) -> float:
    total = group["total_steps"]
    return min(1.0, max(0.0, group["ramp"] if total is None else count / total))


def _full(parameter: torch.nn.Parameter) -> Float[Tensor, "..."]:
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.detach().float() if half else parameter


def _check_group(group: dict[str, Any]) -> None:
    n, m = group["nm"]
    total = group["total_steps"]
    rules = {
        "lr must be >= 0": (group["lr"] >= 0, group["lr"]),
        "nm must be (n, m) with 1 <= n <= m": (1 <= n <= m, group["nm"]),
        "decay must be >= 0": (group["decay"] >= 0, group["decay"]),
        "total_steps must be >= 1 or None": (total is None or total >= 1, total),
        "mask_every must be >= 1": (group["mask_every"] >= 1, group["mask_every"]),
        "betas must be in [0, 1)": (all(0 <= beta < 1 for beta in group["betas"]), group["betas"]),
        "eps must be >= 0": (group["eps"] >= 0, group["eps"]),
    }
    for rule, (holds, value) in rules.items():
        if not holds:
            raise InputError(f"{rule}, got {value}")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise InputError(f"params must be real floating-point tensors, got {parameter.dtype}")
        if group["sparse"]:
            _check_shape(parameter, m)


def _check_shape(parameter: Tensor, m: int) -> None:
    if hasattr(parameter, "placements"):
        raise InputError("a weight with sparse=True must be whole, got a sharded one: use ddp")
    if parameter.ndim < 2 or parameter.shape[1] < m:
        raise InputError(
            f"a weight with sparse=True must have two dimensions and at least m={m} inputs in the second, got shape "
            f"{tuple(parameter.shape)} (a bias belongs into another group; flattened shards of FSDP are not supported)"
        )
