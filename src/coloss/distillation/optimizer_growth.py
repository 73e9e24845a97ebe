"""What becomes of an optimizer's averages when a model is grown or shrunk by a `StateMap`.

The V-cycle starts each stage with a fresh optimizer, as the paper does. For growth that is to go on without a stop, averages of gradients
can be carried over. If the map keeps the function, gradients of the grown model are the small one's with the two sides exchanged: a unit's
copies share its gradient (divided), columns that read copies all get the full one. Averages of gradients (Adam's `exp_avg`, SGD's
`momentum_buffer`) follow exactly; averages of squares (`exp_avg_sq`) follow exactly in growing, their root being mapped, and in shrinking
on the assumption that merged gradients agree. Where depth grows the function is not kept, and the copies are a guess. Each parameter
keeps its own count of steps; where layers are mixed, it is the largest of theirs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.train.state_map import StateMap

_GRADIENTS = ("exp_avg", "momentum_buffer")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")


def map_optimizer_state(
    state_map: StateMap,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    new_optimizer: torch.optim.Optimizer,
    new_model: nn.Module,
) -> None:
    """Give the optimizer of a grown or shrunk model the averages that the other one's optimizer has gathered.

    Args:
        state_map: which made the new model's weights from the old one's.
        optimizer: Adam, AdamW or SGD of the old model; stays as it is.
        model: the old model.
        new_optimizer: of the same kind, not stepped yet; its learning rates and other options stay.
        new_model: the new model.

    Raises:
        InputError: if the optimizer keeps something else, or has seen only some of a stack's layers.

    Examples:
        >>> from coloss.train import Axis, AxisMap
        >>> twice = AxisMap.averaging([[0, 1]]).reversed()
        >>> grow = StateMap({"weight": (None, Axis((twice,), "read"))})
        >>> small, large = nn.Linear(1, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = large.load_state_dict(grow(small.state_dict()))
        >>> old, new = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (small, large))
        >>> small(torch.ones(1, 1)).sum().backward()
        >>> old.step()
        >>> map_optimizer_state(grow, old, small, new, large)
        >>> new.state[large.weight]["momentum_buffer"]  # both inputs are 1
        tensor([[1., 1.]])
    """
    gathered: dict[str, dict[str, Tensor]] = {}
    steps: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in _GRADIENTS + _SQUARES:
                if value is not None:
                    gathered.setdefault(key, {})[name] = value
            elif key == "step":
                steps[name] = value
            else:
                raise InputError(
                    f"optimizer must keep averages of gradients alone (Adam, SGD), got {key!r} of {name!r}"
                )
    gradients = state_map.of_gradients()
    mapped = {
        key: _squared(gradients(_rooted(values))) if key in _SQUARES else gradients(values)
        for key, values in gathered.items()
    }
    counted = state_map.view(steps)
    with_steps = set(counted)
    for name, parameter in new_model.named_parameters():
        entries = {
            key: values[name].to(parameter).clone() for key, values in mapped.items() if name in values
        }
        for key, value in entries.items():
            if value.shape != parameter.shape:
                raise InputError(
                    f"new_model must be what state_map gives, got {tuple(parameter.shape)} for {name!r}, {key} {tuple(value.shape)}"
                )
        if name in with_steps:
            most = max((steps[source] for source in counted.sources(name)), key=float)
            entries["step"] = most.clone() if isinstance(most, Tensor) else most
        if entries:
            new_optimizer.state[parameter] = entries


def _rooted(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.sqrt() for name, value in values.items()}


def _squared(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.square() for name, value in values.items()}
