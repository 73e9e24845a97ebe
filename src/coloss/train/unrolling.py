r"""Training inside training: steps of SGD whose result is differentiable in the data, the learning rate and the start.

    velocity    v_{n+1} = momentum * v_n + grad_theta loss(theta_n, batch_n)
    parameters  theta_{n+1} = theta_n - lr * v_{n+1}

`torch.func.functional_call` runs a model with parameters given from outside; `FlatParameters` keeps them as one vector, which is
what trajectories of parameters are stored and compared as.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as recompute

from coloss.ops import without_autocast

Parameters = TypeVar("Parameters", Tensor, dict[str, Tensor])


class FlatParameters:
    """The trainable parameters of a model as one vector, and the model as a function of such a vector.

    The order is that of `model.named_parameters()`; frozen parameters and buffers stay with the model. A parameter that two layers
    share is there once.

    Args:
        model: kept, not copied; `load` alone writes to it.

    Attributes:
        names: of the parameters, in order.
        shapes: likewise.
        size: length of the vector.

    Raises:
        ValueError: if no parameter is trainable, or their types or devices differ.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> flat = FlatParameters(model)
        >>> vector = torch.tensor([1.0, 2.0, 3.0])
        >>> flat(vector, torch.tensor([[10.0, 1.0]]))  # 10 * 1 + 1 * 2 + 3
        tensor([[15.]])
        >>> flat.load(vector)
        >>> flat.vector(), model.bias.item()
        (tensor([1., 2., 3.]), 3.0)
    """

    def __init__(self, model: nn.Module) -> None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("model must have a trainable parameter, got none")
        kinds = sorted({f"{p.dtype} on {p.device}" for p in trainable.values()})
        if len(kinds) > 1:
            raise ValueError(f"parameters must be of one type on one device, got {', '.join(kinds)}")
        self.model = model
        self.names = tuple(trainable)
        self.shapes = tuple(p.shape for p in trainable.values())
        self.sizes = [p.numel() for p in trainable.values()]
        self.size = sum(self.sizes)

    def vector(self) -> Float[Tensor, " parameters"]:
        """A copy of the present values."""
        own = dict(self.model.named_parameters())
        return torch.cat([own[name].detach().flatten() for name in self.names])

    def unflatten(self, vector: Float[Tensor, " parameters"]) -> dict[str, Tensor]:
        """The parameters by name, as views of a vector, through which gradients flow.

        Raises:
            ValueError: if the vector has another length.

        Examples:
            >>> {
            ...     name: part.tolist()
            ...     for name, part in FlatParameters(nn.Linear(2, 1)).unflatten(torch.arange(3.0)).items()
            ... }
            {'weight': [[0.0, 1.0]], 'bias': [2.0]}
        """
        if vector.shape != (self.size,):
            raise ValueError(f"vector must have shape ({self.size},), got {tuple(vector.shape)}")
        parts = vector.split(self.sizes)  # one node for all parts: their gradients are joined, not summed
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes)}

    def __call__(self, vector: Float[Tensor, " parameters"], *inputs: Any) -> Any:
        """What the model returns for inputs with these parameters."""
        return functional_call(self.model, self.unflatten(vector), inputs)

    @torch.no_grad()
    def load(self, vector: Float[Tensor, " parameters"]) -> None:
        """Write a vector into the model."""
        own = dict(self.model.named_parameters())
        for name, part in self.unflatten(vector).items():
            own[name].copy_(part)


def unroll(
    parameters: Parameters,
    loss_fn: Callable[[Parameters, Any], Float[Tensor, ""]],
    batches: Iterable[Any],
    lr: Float[Tensor, ""] | float,
    *,
    momentum: float = 0.0,
    checkpoint: bool = False,
    truncate: int | None = None,
) -> list[Parameters]:
    """Parameters after each of some steps of SGD, as a differentiable function of the start, the data and the learning rate.

    Args:
        parameters: the start: a vector (`FlatParameters`), or tensors by name.
        loss_fn: `(parameters, batch) -> scalar`; what it draws must come from the batch, such as a seed, for it may run twice.
        batches: one for each step, of whatever kind.
        lr: the learning rate, a number or a scalar tensor.
        momentum: in [0, 1); the velocity starts at 0.
        checkpoint: keep the parameters and the velocity of each step alone, and compute the rest again in the backward pass. The
            gradient is the same, to the bit on a CPU.
        truncate: let gradients flow through the last so many steps alone, >= 1. Exact values, a biased gradient.

    Returns:
        Steps + 1 sets of parameters; the first is the start. Under `torch.no_grad()` none of them has a graph.

    Raises:
        ValueError: if momentum or truncate is out of range.

    Cost: with N steps, P parameters and A bytes of activations in a step, memory is O(N (P + A)); O(N P + A) with `checkpoint`, for
        one more forward and backward pass; with `truncate` N stands for those steps. Time is about three forward and backward
        passes a step. Runs in the precision of the parameters, outside any autocast.

    Examples:
        >>> data = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> path = unroll(torch.zeros(1), lambda theta, x: 0.5 * (theta - x).square().sum(), data, lr=0.5)
        >>> [theta.item() for theta in path]
        [0.0, 0.5, 1.75]
        >>> path[-1].sum().backward()  # theta_2 = 0.5 x_2 + 0.25 x_1
        >>> data.grad
        tensor([0.2500, 0.5000])
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if truncate is not None and truncate < 1:
        raise ValueError(f"truncate must be >= 1, got {truncate}")
    steps = list(batches)
    first = 0 if truncate is None else max(len(steps) - truncate, 0)
    leaves, form = tree_flatten(parameters)
    velocity: Sequence[Tensor] = ()
    path = [parameters]
    for number, batch in enumerate(steps):
        with_graph = torch.is_grad_enabled() and number >= first
        step = partial(_step, loss_fn, form, batch, lr, momentum, with_graph, len(leaves))
        if with_graph and checkpoint:
            moved = recompute(step, *leaves, *velocity, use_reentrant=False, preserve_rng_state=False)
        else:
            moved = step(*leaves, *velocity)
        leaves, velocity = list(moved[: len(leaves)]), moved[len(leaves) :] if momentum else ()
        path.append(tree_unflatten(leaves, form))
    return path


def _step(
    loss_fn: Callable[..., Tensor],
    form: Any,
    batch: Any,
    lr: Tensor | float,
    momentum: float,
    with_graph: bool,
    count: int,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """One step of SGD: parameters, and the velocity behind them."""
    theta, velocity = tensors[:count], tensors[count:]
    if not with_graph:
        theta = tuple(t.detach() for t in theta)
        velocity = tuple(v.detach() for v in velocity)
        lr = lr.detach() if isinstance(lr, Tensor) else lr
    with torch.enable_grad(), without_autocast(theta[0].device):
        theta = tuple(t if t.requires_grad else t.detach().requires_grad_() for t in theta)
        loss = loss_fn(tree_unflatten(theta, form), batch)
        gradients = torch.autograd.grad(loss, theta, create_graph=with_graph, materialize_grads=True)
    if not with_graph:
        theta = tuple(t.detach() for t in theta)
    if velocity:
        gradients = tuple(torch.add(g, v, alpha=momentum) for g, v in zip(gradients, velocity))
    return (*(t - lr * g for t, g in zip(theta, gradients)), *gradients)
