"""Linear maps on state dicts: shrink, grow, prune or blend a network's weights axis by axis, from one rule for each parameter name.

A width of a network is made by some weights and read by others. If F (new x old) says how its new units are made from the old ones,

    where it is made (rows of a weight, biases, embeddings):    W' = F W
    where it is read (columns of a weight):                     W' = W rownorm(F^T)

where rownorm divides each row by its sum. An F that averages groups shrinks: rows are averaged, columns summed. Its reverse
T = rownorm(F^T) copies each group's unit to all its members and grows: rows are copied, columns copied and divided by the number of copies,
so that all readers see what they saw; F T = I. Layers of a stack are mixed by a matrix of their own, parameter by parameter.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coloss.errors import InputError
from coloss.train.axis_map import Axis, AxisMap


@dataclass(frozen=True)
class StateMap:
    """A linear map of state dicts, by parameter names: one `Axis` or None for each dimension, and a mixing of the layers of a stack.

    Args:
        rules: by pattern, what each dimension of the tensor holds; None leaves a dimension as it is, no entry at all the tensor. A pattern
            is a whole name, or its end after a dot, so that `h.{layer}.weight` also means `transformer.h.3.weight`; the longest one counts.
        stacks: by the name in braces, what makes the new layers from the old ones. Tensors that are no floating point numbers are
            taken from the layer that counts most.

    Raises:
        ValueError: for a pattern with more than one pair of braces.

    Examples:
        >>> halve = AxisMap.averaging([[0, 1], [2, 3]])
        >>> rules = {
        ...     "{layer}.weight": (Axis((halve,)), Axis((halve,), "read")),
        ...     "{layer}.bias": (Axis((halve,)),),
        ... }
        >>> shrink = StateMap(rules, {"layer": AxisMap.averaging([[0, 1]])})
        >>> large = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> {name: tuple(value.shape) for name, value in shrink(large.state_dict()).items()}
        {'0.weight': (2, 2), '0.bias': (2,)}
    """

    rules: Mapping[str, tuple[Axis | None, ...]]
    stacks: Mapping[str, AxisMap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern in self.rules:
            if pattern.count("{") > 1:
                raise ValueError(f"rules must have at most one pair of braces each, got {pattern!r}")

    def __call__(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Map a whole state dict.

        Returns:
            The new one. Its tensors may share memory with the old ones and with one another where nothing is computed: `load_state_dict`
            copies; clone them before changing one in place.

        Raises:
            InputError: if a tensor has no rule, does not fit its rule, or a layer of a stack is missing.
        """
        return dict(self.view(state))

    def view(self, state: Mapping[str, Any]) -> "MappedState":
        """The new state as a mapping that computes a tensor when it is asked for, and keeps none: for state dicts read lazily.

        Raises:
            InputError: as above; a tensor that does not fit is found when it is asked for.
        """
        return MappedState(self, state)

    def __matmul__(self, first: "StateMap") -> "StateMap":
        """`first`, then this one, as one map.

        Raises:
            ValueError: if the two have other patterns or stacks, or sizes that do not fit.
        """
        if self.rules.keys() != first.rules.keys() or self.stacks.keys() != first.stacks.keys():
            raise ValueError("first must have the same patterns and stacks, got other ones")
        rules = {
            pattern: tuple(
                None
                if after is None or before is None
                else Axis(tuple(b @ a for b, a in zip(after.maps, before.maps, strict=True)), after.side)
                for after, before in zip(axes, first.rules[pattern], strict=True)
            )
            for pattern, axes in self.rules.items()
        }
        return StateMap(rules, {name: stack @ first.stacks[name] for name, stack in self.stacks.items()})

    def reversed(self) -> "StateMap":
        """The map back, each axis reversed: growing for a map that shrinks."""
        return StateMap(
            {
                pattern: tuple(_each(axis, AxisMap.reversed) for axis in axes)
                for pattern, axes in self.rules.items()
            },
            {name: stack.reversed() for name, stack in self.stacks.items()},
        )

    def of_gradients(self) -> "StateMap":
        """What happens to gradients, and to averages of them such as Adam's first moment, when the map keeps the function.

        A unit's copies share its gradient, and the columns that read it all see the same input: made and read change places. Gradients of
        stacked layers are mixed as the layers are, for which there is no such reason: copied layers do not keep the function.
        `of_gradients().reversed()` is `reversed().of_gradients()`.
        """
        return StateMap(
            {
                pattern: tuple(_each(axis, AxisMap.swapped) for axis in axes)
                for pattern, axes in self.rules.items()
            },
            self.stacks,
        )


class MappedState(Mapping[str, Any]):
    """A state dict seen through a `StateMap`; see `StateMap.view`."""

    def __init__(self, state_map: StateMap, state: Mapping[str, Any]) -> None:
        self._map, self._state = state_map, state
        self._plan: dict[str, tuple[str, list[tuple[float, str]]]] = {}
        stacks: dict[tuple[str, str, str], dict[int, str]] = {}
        for name, (pattern, match) in _matches(state, state_map.rules).items():
            stack = _stack(pattern)
            if stack is None or stack not in state_map.stacks:
                self._plan[name] = (pattern, [(1.0, name)])
                continue
            start, end = match.span("layer")
            stacks.setdefault((pattern, name[:start], name[end:]), {})[int(match["layer"])] = name
        for (pattern, before, after), layers in stacks.items():
            mixing = state_map.stacks[str(_stack(pattern))].made
            if sorted(layers) != list(range(mixing.shape[1])):
                raise InputError(
                    f"{pattern!r} must have layers 0 to {mixing.shape[1] - 1} in the state, got {sorted(layers)}"
                )
            for layer, row in enumerate(mixing.tolist()):
                sources = [(share, layers[number]) for number, share in enumerate(row) if share]
                self._plan[f"{before}{layer}{after}"] = (pattern, sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)

    def sources(self, name: str) -> list[str]:
        """Names of the old tensors that a new one is made from: several where layers are mixed."""
        return [source for _, source in self._plan[name][1]]

    def __getitem__(self, name: str) -> Any:
        pattern, sources = self._plan[name]
        axes = self._map.rules[pattern]
        if (
            len(sources) != 1
            or sources[0][0] != 1.0
            or any(axis is not None and not axis.identity for axis in axes)
        ):
            return self._computed(name, axes, sources)
        value = self._state[sources[0][1]]
        if isinstance(value, Tensor):
            _check(name, axes, value)
        return value

    def _computed(self, name: str, axes: tuple[Axis | None, ...], sources: list[tuple[float, str]]) -> Any:
        shares = [share for share, _ in sources]
        first = self._state[max(sources)[1]] if sources else None
        if not isinstance(first, Tensor):
            raise InputError(f"{name!r} must be a tensor to be mapped, got {type(first).__name__}")
        if not first.is_floating_point():
            if any(axis is not None and not axis.identity for axis in axes):
                raise InputError(f"{name!r} must hold floating point numbers to be mapped, got {first.dtype}")
            return first
        dtype = first.dtype
        if shares == [1.0]:
            value = _wide(first)
        else:
            value = sum(share * _wide(self._state[source]) for share, source in sources)  # type: ignore[assignment]
        _check(name, axes, value)
        for dim, axis in enumerate(axes):
            if axis is not None:
                value = axis(value, dim)
        return value.to(dtype)


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file as a mapping that reads one when it is asked for.

    Args:
        path: of the file.

    Raises:
        InputError: if it cannot be read.

    Examples:
        >>> import tempfile
        >>> from coloss.train import save_model
        >>> path = save_model(torch.nn.Linear(2, 1), Path(tempfile.mkdtemp()) / "model.safetensors")
        >>> sorted(LazyTensors(path)), LazyTensors(path)["weight"].shape
        (['bias', 'weight'], torch.Size([1, 2]))
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read the model {path}: {error}") from error
        self._names = list(self._file.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)


def interpolate_states(before: Mapping[str, Any], after: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Blend two states of one network by name: `(1 - alpha) before + alpha after`.

    Args:
        before: a state dict; what is no floating point tensor is taken from it, and every value is given on its device.
        after: another one with the same names and shapes.
        alpha: share of `after`, in [0, 1]; 0 gives `before` and 1 gives `after`, exactly.

    Raises:
        InputError: if names or shapes differ, or alpha is out of range.

    Examples:
        >>> interpolate_states({"weight": torch.zeros(2)}, {"weight": torch.ones(2)}, 0.25)
        {'weight': tensor([0.2500, 0.2500])}
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1], got {alpha}")
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise InputError(f"before and after must have the same names, got {odd[0]!r} in one of them")
    blended: dict[str, Any] = {}
    for name, value in before.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            blended[name] = value
            continue
        other = after[name]
        if other.shape != value.shape:
            raise InputError(
                f"before and after must have the same shapes, got {tuple(value.shape)} and {tuple(other.shape)} for {name!r}"
            )
        wide = _wide(value)
        blended[name] = torch.lerp(wide, other.to(wide.device, wide.dtype), alpha).to(value.dtype)
    return blended


def find_rules(state: Iterable[str], patterns: Iterable[str]) -> dict[str, str]:
    """The pattern that counts for each name of a state dict; see `StateMap`.

    Raises:
        InputError: if a name fits none.

    Examples:
        >>> find_rules(["model.h.0.weight"], ["weight", "h.{layer}.weight"])
        {'model.h.0.weight': 'h.{layer}.weight'}
    """
    return {name: pattern for name, (pattern, _) in _matches(state, patterns).items()}


def stack_depths(state: Iterable[str], patterns: Iterable[str]) -> dict[str, int]:
    """How many layers each stack of a state dict has, by the name in braces.

    Raises:
        InputError: if a name fits no pattern.

    Examples:
        >>> stack_depths(["h.0.weight", "h.1.weight"], ["h.{layer}.weight"])
        {'layer': 2}
    """
    depths: dict[str, int] = {}
    for pattern, match in _matches(state, patterns).values():
        stack = _stack(pattern)
        if stack is not None:
            depths[stack] = max(depths.get(stack, 0), int(match["layer"]) + 1)
    return depths


def _each(axis: Axis | None, change: Any) -> Axis | None:
    return None if axis is None else Axis(tuple(change(one) for one in axis.maps), axis.side)


def _check(name: str, axes: tuple[Axis | None, ...], value: Tensor) -> None:
    if not axes:
        return
    sizes = [None if axis is None else sum(one.old for one in axis.maps) for axis in axes]
    if len(sizes) != value.ndim or any(size not in (None, have) for size, have in zip(sizes, value.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputError(f"{name!r} must have the shape ({wanted}), got {tuple(value.shape)}")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _stack(pattern: str) -> str | None:
    found = re.search(r"\{(\w+)\}", pattern)
    return found[1] if found else None


def _matches(names: Iterable[str], patterns: Iterable[str]) -> dict[str, tuple[str, re.Match[str]]]:
    by_length = [(_matcher(pattern), pattern) for pattern in sorted(patterns, key=len, reverse=True)]
    found: dict[str, tuple[str, re.Match[str]]] = {}
    for name in names:
        for regex, pattern in by_length:
            match = regex.fullmatch(name)
            if match is not None:
                found[name] = (pattern, match)
                break
        else:
            raise InputError(f"no rule of the layout fits the tensor {name!r}: add one to it")
    return found


def _matcher(pattern: str) -> re.Pattern[str]:
    text = re.sub(r"\\\{\w+\\\}", r"(?P<layer>\\d+)", re.escape(pattern))
    return re.compile(rf"(?:.*\.)?{text}")
