"""How many bytes of activations a training step keeps for its backward pass: the part of its memory that grows with batch and depth."""

from typing import Any

import torch
from torch import Tensor, nn


class SavedActivations:
    """Counts the bytes that autograd holds for backward passes, and remembers the most that were held at once.

    Counted is every tensor that an operation saves for its backward pass, from the forward pass until its graph is freed. Each storage
    counts once and in full, however many operations save views of it. Parameters are not counted, wherever they are; buffers are not where
    their module is given. The figure depends on shapes alone, not on the machine or its allocator, and needs no GPU: tensors on the device
    "meta" count as others do. What it leaves out: weights, their gradients, the optimizer's state, sparse tensors, and tensors that are held
    by something else than the graph.

    Args:
        modules: whose buffers (such as running statistics) are not counted.

    Attributes:
        held: bytes held now.
        peak: the most bytes held at once since the meter was entered.

    Examples:
        >>> model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Tanh(), nn.Linear(100, 1, bias=False))
        >>> with SavedActivations(model) as meter:
        ...     loss = model(torch.randn(10, 100)).sum()
        >>> meter.peak  # the input and the output of tanh, float32
        8000
        >>> loss.backward()
        >>> meter.held
        0
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.held = 0
        self.peak = 0
        self._modules = modules
        self._users: dict[int, int] = {}
        self._skipped: set[int] = set()
        self._hooks: Any = None

    def __enter__(self) -> "SavedActivations":
        self.peak = self.held
        tensors = [t for module in self._modules for t in (*module.parameters(), *module.buffers())]
        self._skipped = {_storage(tensor) for tensor in tensors if tensor.layout == torch.strided}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._hooks = None

    def _pack(self, tensor: Tensor) -> Any:
        source = tensor._base if tensor._base is not None else tensor
        if isinstance(source, nn.Parameter):
            return tensor
        if tensor.layout != torch.strided:
            return tensor.detach()
        size = tensor.untyped_storage().nbytes()
        if size == 0:
            return tensor.detach()
        key = _storage(tensor)
        if key in self._skipped:
            return tensor
        users = self._users.get(key, 0)
        self._users[key] = users + 1
        if users == 0:
            self.held += size
            self.peak = max(self.peak, self.held)
        # Without its graph: an output that an operation saves would otherwise hold the graph that holds it.
        return _Held(tensor.detach(), self, key, size)

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            self.held -= size


class _Held:
    """One saved tensor, for as long as its graph holds it; meanwhile no other storage can have its key."""

    __slots__ = ("key", "meter", "size", "tensor")

    def __init__(self, tensor: Tensor, meter: SavedActivations, key: int, size: int) -> None:
        self.tensor, self.meter, self.key, self.size = tensor, meter, key, size

    def __del__(self) -> None:
        self.meter._release(self.key, self.size)


def _unpack(packed: Any) -> Tensor:
    return packed.tensor if isinstance(packed, _Held) else packed


def _storage(tensor: Tensor) -> int:
    # Not the address of the data, which all tensors on the device "meta" share.
    return tensor.untyped_storage()._cdata
