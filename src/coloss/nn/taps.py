"""Reads tensors from inside a model by module path, without touching the model's code."""

import copy
import difflib
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

_INPUT = ":input"


class Taps(Mapping[str, Any]):
    """Values that submodules gave (or were given) in the last forward pass, by a name of your choice.

    A path is what `model.named_modules()` calls a submodule: `"backbone.stages.1"`; `""` is the model itself.
    A path with `:input` after it reads the first input of that submodule instead of its output. A submodule
    that runs several times in one pass leaves its last value.

    Taps are forward hooks: the model gains no parameter, no state-dict key and no submodule, and is as before
    after `close`. A copy of the model alone (`copy.deepcopy`) carries no taps; a copy of taps, or of an
    object that holds both, reads from its own copied model, and begins without values.

    Args:
        model: the model to read from.
        paths: name -> module path, or module path with `:input`.
        detach: cut every tensor from the graph.

    Returns:
        A read-only mapping from name to value. Values stay until the next forward pass or `clear`.

    Raises:
        ValueError: for a path that the model does not have, with close ones, or a name given twice.
        KeyError: on reading a name that was never given.
        RuntimeError: on reading a value before a forward pass has reached its submodule.

    Examples:
        >>> import torch
        >>> from coloss.nn import MLP, Classifier, Taps
        >>> model = Classifier(MLP(4, [8]), num_outputs=3)
        >>> with Taps(model, {"features": "backbone", "pre_head": "head:input"}) as taps:
        ...     logits = model(torch.rand(5, 4))
        >>> taps["features"].shape, taps["pre_head"] is taps["features"]
        (torch.Size([5, 8]), True)
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, str], *, detach: bool = False) -> None:
        self.model = model
        self.detach = detach
        self._paths: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        self._values = _Values()
        self._closed = False
        try:
            for name, path in paths.items():
                self.add(name, path)
        except ValueError:
            self.close()
            raise

    def add(self, name: str, path: str) -> None:
        """Taps one more place; its value is there after the next forward pass.

        Raises:
            ValueError: for an unknown path, a name already in use, or taps that are closed.

        Examples:
            >>> from torch import nn
            >>> from coloss.nn import Taps
            >>> taps = Taps(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), {})
            >>> taps.add("hidden", "0")
            >>> list(taps)
            ['hidden']
        """
        if self._closed:
            raise ValueError(f"taps must be open to add {name!r}, got closed taps")
        if name in self._paths:
            raise ValueError(f"a tap's name must be new, got {name!r} again")
        module = _find(self.model, path.removesuffix(_INPUT))
        capture = _Capture(weakref.ref(self._values), name, path.endswith(_INPUT), self.detach)
        self._handles.append(module.register_forward_hook(capture, with_kwargs=True))
        self._paths[name] = path

    def clear(self) -> None:
        """Forgets all values, and so frees the graph that they hold."""
        self._values.clear()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Keeps the present values safe from forward passes inside the block, and puts them back after it.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from coloss.nn import Taps
            >>> model = nn.Sequential(nn.Identity())
            >>> taps = Taps(model, {"seen": "0"})
            >>> _ = model(torch.tensor(1.0))
            >>> with taps.set_aside():
            ...     _ = model(torch.tensor(2.0))
            >>> taps["seen"]
            tensor(1.)
        """
        kept = dict(self._values)
        try:
            yield
        finally:
            self._values.clear()
            self._values.update(kept)

    def close(self) -> None:
        """Takes every hook out of the model. Values that were read stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._closed = True

    def __getitem__(self, name: str) -> Any:
        if name not in self._paths:
            raise KeyError(f"no tap is named {name!r}; there are {sorted(self._paths)}")
        if name not in self._values:
            raise RuntimeError(
                f"tap {name!r} has no value: no forward pass has reached {self._paths[name]!r}"
            )
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __enter__(self) -> "Taps":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Taps({self._paths})"


def find_classifier(model: nn.Module) -> str:
    """Path of the last `nn.Linear` in the order of registration, which in most classifiers is the head.

    Args:
        model: any module; `""` is returned when it is itself the linear layer.

    Returns:
        A path for `model.get_submodule` and `Taps`.

    Raises:
        ValueError: for a model without a linear layer.

    Examples:
        >>> from coloss.nn import MLP, Classifier, find_classifier
        >>> find_classifier(Classifier(MLP(4, [8]), num_outputs=3))
        'head'
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise ValueError(f"model must contain an nn.Linear, got {type(model).__name__} without one")
    return paths[-1]


class _Values(dict[str, Any]):
    """What the hooks write to; a copy begins empty, since graph tensors cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Values":
        return _Values()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Values, ()


class _Capture:
    """A forward hook that writes to the values of its taps for as long as those exist."""

    def __init__(self, values: Any, name: str, reads_input: bool, detach: bool) -> None:
        self.values = values
        self.name = name
        self.reads_input = reads_input
        self.detach = detach

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        values = None if self.values is None else self.values()
        if values is None:
            return
        value = output
        if self.reads_input:
            inputs = [*args, *kwargs.values()]
            if not inputs:
                raise ValueError(
                    f"tap {self.name!r} reads the first input of a module that was called without one"
                )
            value = inputs[0]
        values[self.name] = tree_map(_detach, value) if self.detach else value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Capture":
        # Lives on only if the same deepcopy also copies the Taps that hold these values.
        values = None if self.values is None else self.values()
        copied = None if values is None else weakref.ref(copy.deepcopy(values, memo))
        return _Capture(copied, self.name, self.reads_input, self.detach)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Capture, (None, self.name, self.reads_input, self.detach)


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _find(model: nn.Module, path: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if path in modules:
        return modules[path]
    known = [name for name in modules if name]
    close = difflib.get_close_matches(path, known, n=3, cutoff=0.4) or known[:3]
    raise ValueError(
        f"a tap's path must name a module of the model, got {path!r}; close ones: {', '.join(close)}"
    )
