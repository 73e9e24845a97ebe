"""Edits of gradients: on their way through a tensor, and between the gradients of two losses."""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .precision import accumulation_dtype, full_precision

# Entries whose products are held in float64 at once: 32 MiB for each of the two factors.
_INNER_PRODUCT_BLOCK = 2**22


def straight_through(
    forward_value: Float[Tensor, "*shape"], surrogate: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """A hard value in the forward pass that passes its gradient to a smooth surrogate unchanged.

    The result equals `forward_value` bit for bit, infinities included; the whole incoming gradient goes to
    `surrogate`, none to `forward_value`.

    Args:
        forward_value: for example rounded, binarised or masked values.
        surrogate: the differentiable tensor it was made from, same shape.

    Returns:
        The values of `forward_value`.

    Raises:
        ValueError: on unequal shapes.

    Source:
        Bengio, Leonard, Courville 2013, arXiv 1308.3432.

    Examples:
        >>> x = torch.tensor([0.4, 1.7], requires_grad=True)
        >>> y = straight_through(x.round(), x)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 2.0], [1.0, 1.0])
    """
    if forward_value.shape != surrogate.shape:
        shape = tuple(forward_value.shape)
        raise ValueError(
            f"surrogate must have the shape {shape} of forward_value, got {tuple(surrogate.shape)}"
        )
    return _StraightThrough.apply(forward_value, surrogate)


def scale_gradient(x: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """The same values, with the gradient multiplied by a factor on its way back.

    Args:
        x: any tensor.
        factor: finite; 1 changes nothing, 0 stops the gradient, a negative value reverses it.

    Returns:
        The values of `x`.

    Raises:
        ValueError: if `factor` is not finite.

    Examples:
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale_gradient(x, 0.1).sum().backward()
        >>> x.grad
        tensor([0.1000, 0.1000])
    """
    if not math.isfinite(factor):
        raise ValueError(f"factor must be finite, got {factor}")
    return _ScaleGradient.apply(x, factor)


def reverse_gradient(x: Float[Tensor, "*shape"], strength: float = 1.0) -> Float[Tensor, "*shape"]:
    """The same values, with the gradient turned round: what precedes climbs the loss that follows.

    Args:
        x: features that enter an adversary, such as a domain classifier.
        strength: >= 0, multiplies the reversed gradient.

    Returns:
        The values of `x`.

    Raises:
        ValueError: if `strength` is negative or not finite.

    Source:
        Ganin, Lempitsky 2015, arXiv 1409.7495.

    Examples:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be >= 0 and finite, got {strength}")
    return _ScaleGradient.apply(x, -strength)


def gradient_cosine(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Float[Tensor, ""]:
    r"""Cosine of the angle between two gradients, each given as a list over parameters.

    $\langle g_1, g_2 \rangle / (\|g_1\| \|g_2\|)$ over all entries together: negative where two losses pull
    the parameters apart. 0 when either gradient is zero.

    Args:
        first: one tensor for each parameter; `None` stands for zero.
        second: likewise, in the same order.

    Returns:
        A scalar in [-1, 1], without a gradient.

    Raises:
        ValueError: if the lists differ in length or two entries in shape.

    Cost:
        One pass over the entries; no copy of the gradients.

    Examples:
        >>> gradient_cosine([torch.ones(2), None], [torch.ones(2), torch.ones(2)])
        tensor(0.7071)
    """
    _check_pairs(first, second, "second")
    everywhere = [True] * len(first)
    product = _inner_product(first, second, everywhere)
    lengths = [_inner_product(g, g, everywhere).sqrt() for g in (first, second)]
    length = lengths[0] * lengths[1]
    cosine = torch.where(length == 0, 0.0, product / length)
    return cosine.clamp(-1, 1).to(torch.get_default_dtype())


def project_conflicting(
    main: Sequence[Tensor | None],
    auxiliary: Sequence[Tensor | None],
    over: Literal["all", "shared"] | Sequence[bool] = "all",
) -> tuple[list[Tensor | None], Bool[Tensor, ""]]:
    r"""Sum of two gradients in which the auxiliary one no longer works against the main one.

    Where $\langle g_1, g_2 \rangle < 0$, the auxiliary gradient is replaced by its part orthogonal to the
    main one, $g_2' = g_2 - \frac{\langle g_1, g_2 \rangle}{\|g_1\|^2} g_1$; else $g_2' = g_2$. The main
    gradient $g_1$ is never changed. The result is $g_1 + g_2'$.

    `over` says which entries form the vectors of inner product, norm and correction. With `"all"`, the
    published form, entries that only the main loss reaches (its own head) are also corrected: in a conflict
    they take a larger step, $(1 + |c|) g_1$. With `"shared"` only entries that both losses reach take part,
    and the rest is added unchanged.

    Args:
        main: gradient $g_1$, one tensor for each parameter; `None` stands for zero.
        auxiliary: gradient $g_2$, in the same order.
        over: `"all"`, `"shared"`, or one flag for each entry.

    Returns:
        The merged list (`None` where both are `None`; an entry that is not changed may be the input tensor
        itself), and a bool scalar that tells whether the two were in conflict.

    Raises:
        ValueError: if the lists differ in length, two entries in shape, or `over` is neither.

    Cost:
        Two passes over the entries and one new list of gradients; the host never waits for the device. Inner
        products are accumulated in float64, in blocks.

    Source:
        Yang et al. 2024 (DHKD), arXiv 2411.08937; the one-sided form of Yu et al. 2020 (PCGrad), arXiv
        2001.06782.

    Examples:
        >>> main, auxiliary = [torch.tensor([1.0, 0.0])], [torch.tensor([-2.0, 3.0])]
        >>> project_conflicting(main, auxiliary)
        ([tensor([1., 3.])], tensor(True))
    """
    _check_pairs(main, auxiliary, "auxiliary")
    taking_part = _entries_over(main, auxiliary, over)
    product = _inner_product(main, auxiliary, taking_part)
    conflicted = product < 0
    # A conflict implies that the main gradient is not zero, so the discarded 0 / 0 does no harm.
    coefficient = torch.where(conflicted, product / _inner_product(main, main, taking_part), 0.0)
    merged = [
        _merge(first, second, 1 - coefficient if used else None)
        for first, second, used in zip(main, auxiliary, taking_part)
    ]
    return merged, conflicted


def surrogate_gradient(
    x: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    value: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    r"""A scalar whose gradient with respect to a tensor is the one given: for losses that are known by their gradient alone.

    $\sum_i g_i x_i$ with $g$ the `gradient`, held constant. The number itself means nothing, so another one may be put in its place,
    for logs and stopping rules to read; the gradient stays.

    Args:
        x: logits, or whatever the gradient belongs to.
        gradient: $g$, the same shape; computed in at least float32 where it is small against `x`.
        value: what the scalar shows; by default the sum.

    Returns:
        A scalar, at least float32. Its second derivatives are 0, whatever the loss behind the gradient.

    Raises:
        ValueError: on unequal shapes.

    Examples:
        >>> x = torch.tensor([3.0, -1.0], requires_grad=True)
        >>> loss = surrogate_gradient(x, torch.tensor([0.5, 2.0]), value=torch.tensor(7.0))
        >>> loss.backward()
        >>> loss.item(), x.grad
        (7.0, tensor([0.5000, 2.0000]))
    """
    if gradient.shape != x.shape:
        raise ValueError(f"gradient must have the shape {tuple(x.shape)} of x, got {tuple(gradient.shape)}")
    linear = (full_precision(x) * gradient.detach()).sum()
    return linear if value is None else straight_through(value.detach().to(linear.dtype), linear)


def needs_gradient(*inputs: Tensor) -> bool:
    """Whether autograd will follow an operation on these tensors, so that slopes are worth computing on the way.

    Inside the `forward` of an autograd function the answer is lost: ask before, and pass it in.

    Args:
        inputs: tensors that enter the operation.

    Returns:
        True when gradients are recorded and an input requires one.

    Examples:
        >>> x = torch.ones(2, requires_grad=True)
        >>> with torch.no_grad():
        ...     inside = needs_gradient(x)
        >>> needs_gradient(x), inside
        (True, False)
    """
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def first_order_only(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for the `backward` of an autograd function whose second derivative is not available.

    An attempt to differentiate its gradients again raises an error that names the public function. PyTorch's own
    `once_differentiable` stays silent where the incoming gradient is a constant, as it is for a loss, and a
    gradient penalty would then miss a term without notice.

    Args:
        name: public name of the function, for the message.

    Returns:
        The decorator, to stand below `@staticmethod`.

    Examples:
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...
        ...     @staticmethod
        ...     @first_order_only("double")
        ...     def backward(ctx, gradient):
        ...         return 2 * gradient
        >>> x = torch.ones((), requires_grad=True)
        >>> torch.autograd.grad(Double.apply(x), x)
        (tensor(2.),)
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def guarded(ctx: Any, *incoming: Tensor | None) -> Any:
            second_order = torch.is_grad_enabled()
            with torch.no_grad():
                gradients = backward(ctx, *incoming)
            if not second_order:
                return gradients
            if isinstance(gradients, Tensor):
                return _guard(gradients, name)
            return tuple(None if g is None else _guard(g, name) for g in gradients)

        return guarded

    return decorate


def _guard(gradient: Tensor, name: str) -> Tensor:
    return _NoSecondDerivative.apply(gradient.detach().requires_grad_(), name)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name} can be differentiated only once, and a second derivative was asked for"
        )


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(forward_value: Tensor, surrogate: Tensor) -> Tensor:
        return forward_value.view_as(forward_value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _check_pairs(first: Sequence[Tensor | None], second: Sequence[Tensor | None], name: str) -> None:
    if len(first) != len(second):
        raise ValueError(f"{name} must have {len(first)} entries like the first list, got {len(second)}")
    for index, (a, b) in enumerate(zip(first, second)):
        if a is not None and b is not None and a.shape != b.shape:
            raise ValueError(f"{name}[{index}] must have the shape {tuple(a.shape)}, got {tuple(b.shape)}")


def _entries_over(
    main: Sequence[Tensor | None],
    auxiliary: Sequence[Tensor | None],
    over: Literal["all", "shared"] | Sequence[bool],
) -> list[bool]:
    if over == "all":
        return [True] * len(main)
    if over == "shared":
        return [a is not None and b is not None for a, b in zip(main, auxiliary)]
    if isinstance(over, str) or len(over) != len(main):
        raise ValueError(f'over must be "all", "shared" or {len(main)} flags, got {over!r}')
    return list(over)


@torch.no_grad()
def _inner_product(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], entries: Sequence[bool]
) -> Float[Tensor, ""]:
    """Exact to rounding of the sum: products of float32 numbers are exact in float64.

    A loop over entries, which have unequal shapes, and over blocks, which bounds the float64 copies.
    """
    pairs = [(a, b) for a, b, used in zip(first, second, entries) if used and a is not None and b is not None]
    present = [g for g in (*first, *second) if g is not None]
    device = present[0].device if present else torch.device("cpu")
    total = torch.zeros((), dtype=accumulation_dtype(device), device=device)
    for a, b in pairs:
        wide = accumulation_dtype(a.device)
        blocks = zip(a.flatten().split(_INNER_PRODUCT_BLOCK), b.flatten().split(_INNER_PRODUCT_BLOCK))
        for left, right in blocks:
            total += torch.dot(left.to(wide), right.to(wide)).to(device)
    return total


@torch.no_grad()
def _merge(first: Tensor | None, second: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """`factor * first + second` in one new tensor; `factor` None stands for 1."""
    if first is None:
        return second
    if factor is None:
        return first if second is None else first + second
    wide = full_precision(first)
    scale = factor.to(first.device, wide.dtype)
    if second is None:
        return (wide * scale).to(first.dtype)
    return torch.addcmul(full_precision(second), wide, scale).to(first.dtype)
