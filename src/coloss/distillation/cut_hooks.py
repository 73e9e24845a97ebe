"""The hooks by which a method meets a network's forward pass at its cuts; they hold neither the method nor a copy of the network."""

import inspect
import weakref
from typing import Any

from torch import nn


class CutHook:
    """A forward hook that hands a layer's output to `method.at_cut(number, output, further arguments)`.

    The further arguments are those that the layer was called with beside its features, which come first or bear the name of the first
    parameter of its `forward`. A copy of the network has none of the method's, nor has one whose method is gone.

    Args:
        method: a weak reference to it, or None.
        number: of the cut.

    Examples:
        >>> _ = nn.Identity().register_forward_hook(CutHook(None, 0), with_kwargs=True)
    """

    def __init__(self, method: "weakref.ref[Any] | None", number: int = 0) -> None:
        self.method, self.number = method, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        method = None if self.method is None else self.method()
        if method is None:
            return None
        if not args and kwargs:
            first = next(iter(inspect.signature(module.forward).parameters), "")
            features = first if first in kwargs else next(iter(kwargs))
            kwargs = {name: value for name, value in kwargs.items() if name != features}
        return method.at_cut(self.number, output, (args[1:], kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> "CutHook":
        return type(self)(None, self.number)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, self.number)


class PassHook(CutHook):
    """A forward pre-hook on the whole network: tells `method.at_pass` what the pass that begins was given.

    Examples:
        >>> _ = nn.Identity().register_forward_pre_hook(PassHook(None))
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # type: ignore[override]
        method = None if self.method is None else self.method()
        if method is not None:
            method.at_pass(args[0] if args else None)


def remove_cuts(model: nn.Module) -> None:
    """Take all of them out of a model.

    Examples:
        >>> model = nn.Identity()
        >>> _ = model.register_forward_hook(CutHook(None, 0), with_kwargs=True)
        >>> remove_cuts(model)
        >>> len(model._forward_hooks)
        0
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, CutHook)]:
                del hooks[key]  # type: ignore[attr-defined]
                module._forward_hooks_with_kwargs.pop(key, None)
