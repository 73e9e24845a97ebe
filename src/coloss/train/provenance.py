"""What something was computed from, as short texts and numbers that can be stored beside it and compared."""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coloss.data.dataset import IndexedDataset
from coloss.nn import Frozen
from coloss.ops import accumulation_dtype, without_autocast

_SKETCHED = 8
# Bytes that are hashed at a time.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Provenance:
    """What stored outputs were made of; None where it is not known.

    Args:
        teacher: sha256 of the network's state.
        data: sha256 of the data set's ids and inputs, in the order of ids.
        augmentation_seed: None if the inputs were not augmented.
        versions: different augmentations of each sample.

    Examples:
        >>> Provenance().teacher is None
        True
    """

    teacher: str | None = None
    data: str | None = None
    augmentation_seed: int | None = None
    versions: int = 1


def teacher_fingerprint(teacher: nn.Module) -> str:
    """The sha256 of a network's parameters, buffers and extra state, by name; wrapping it in `Frozen` changes nothing.

    The code of the network is not seen: two networks of equal state and other activations have one fingerprint. Extra state counts where it
    is a tensor or plain JSON, and is left out otherwise.

    Examples:
        >>> network = nn.Linear(2, 1)
        >>> before = teacher_fingerprint(network)
        >>> _ = network.bias.data.add_(1)
        >>> len(before), before == teacher_fingerprint(network)
        (64, False)
    """
    module = teacher.module if isinstance(teacher, Frozen) else teacher
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            add_to_digest(digest, name, value.detach().cpu())
        elif (text := _json(value)) is not None:
            digest.update(f"{name} {text}".encode())
    return digest.hexdigest()


def input_sketch(inputs: Any) -> tuple[Float[Tensor, "rows tensors 8"], Float[Tensor, "rows tensors"]]:
    r"""Eight numbers for each tensor of a sample that tell inputs apart, whatever device and precision they are in; and the size of each.

    Sums of $\operatorname{sign}(x) \log(1 + |x|)$ over the numbers of a sample with random signs, over the root of their count: by the logarithm
    a column of large numbers does not hide columns of small ones. What is not finite counts as 0; whole numbers (token ids, pixels) are
    scrambled instead, so that a difference of one counts as much as any. A change of one number among n moves the sketch by 1 / sqrt(n) of what a
    like change of all of them would.

    Args:
        inputs: a tensor, or nested tensors, samples in the first dimension.

    Returns:
        The sketch, and for each sample and tensor the root mean square of what was summed.

    Examples:
        >>> sketch, size = input_sketch(torch.ones(2, 16))
        >>> sketch.shape, size.exp().flatten().tolist(), torch.equal(sketch[0], sketch[1])
        (torch.Size([2, 1, 8]), [2.0, 2.0], True)
    """
    parts = [_numbers(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    sketches, sizes = [], []
    for numbers in parts:
        count = max(numbers.shape[1], 1)
        with without_autocast(numbers.device):
            sketches.append(
                numbers @ _signs(numbers.shape[1], numbers.dtype, numbers.device) / math.sqrt(count)
            )
        sizes.append((numbers.square().sum(1) / count).sqrt())
    return torch.stack(sketches, 1).float(), torch.stack(sizes, 1).float()


def data_fingerprint(dataset: IndexedDataset) -> str:
    """The sha256 of a data set's ids and inputs, in the order of ids.

    Examples:
        >>> one, other = IndexedDataset(torch.eye(2)), IndexedDataset(torch.eye(2).flip(0), ids=[1, 0])
        >>> data_fingerprint(one) == data_fingerprint(other)
        True
    """
    digest = hashlib.sha256()
    ids, order = dataset.ids.sort()
    add_to_digest(digest, "ids", ids.cpu())
    for some in order.split(4096):
        for leaf in tree_leaves(dataset.take(some).inputs):
            add_to_digest(digest, "inputs", leaf.cpu())
    return digest.hexdigest()


def add_to_digest(digest: Any, name: str, value: Tensor) -> None:
    """Add a tensor on the CPU, its name, type and shape to a hash of `hashlib`."""
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    for part in value.contiguous().reshape(-1).view(torch.uint8).split(_CHUNK):
        digest.update(part.numpy())


def _numbers(leaf: Tensor) -> Tensor:
    leaf = leaf.detach().reshape(len(leaf), -1)
    wide = accumulation_dtype(leaf.device)
    if leaf.is_floating_point():
        values = torch.where(leaf.isfinite(), leaf, 0).to(wide)
        return values.sign() * values.abs().log1p()
    return ((leaf.long() * 2_654_435_761) % 65_537 - 32_768).to(wide) / 32_768


@lru_cache(maxsize=8)
def _signs(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    draws = torch.randint(2, (count, _SKETCHED), generator=torch.Generator().manual_seed(0))
    return (2 * draws - 1).to(device, dtype)


def _json(value: Any) -> str | None:
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return None
