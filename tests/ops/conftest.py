"""What the tests of `coloss.ops` share: meters of tensor sizes."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation inside the context produces."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


class Kept:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts the numbers that autograd still keeps of what ran inside the context."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[Kept] = weakref.WeakSet()
        super().__init__(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> "SavedTensors":
        super().__enter__()
        return self

    @property
    def numel(self) -> int:
        return sum(kept.tensor.numel() for kept in self._alive)

    def _pack(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        self._alive.add(kept)
        return kept


@pytest.fixture
def largest_tensor() -> type[LargestTensor]:
    return LargestTensor


@pytest.fixture
def saved_tensors() -> type[SavedTensors]:
    return SavedTensors


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
