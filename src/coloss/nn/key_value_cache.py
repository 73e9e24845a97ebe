"""Keys and values of a causal language model's layers, as its weights give them and as its attention uses them."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValues(NamedTuple):
    """Keys and values of one layer, each (batch, key_value_heads, tokens, head_dim); keys neither normalised nor turned by positions."""

    keys: Tensor
    values: Tensor


class KeyValueCache:
    """What the layers of a `CausalLanguageModel` attend to: keys as they are used (normalised, turned by their positions), and values.

    Attributes:
        layers: (keys, values) of each layer; empty before the first token.
        valid: bool (batch, tokens), False for padding.

    Examples:
        >>> from coloss.nn import CausalLanguageModel
        >>> model = CausalLanguageModel(10, dim=8, depth=2, heads=2)
        >>> cache = KeyValueCache()
        >>> logits = model(torch.tensor([[1, 2, 3]]), cache=cache)
        >>> len(cache), cache.layers[0][0].shape
        (3, torch.Size([1, 2, 3, 4]))
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.valid: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.valid is None else self.valid.shape[1]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens' keys and values to a layer's; a cache that stores them in another way is a subclass with its own.

        Args:
            layer: its number; layers come in order when the first tokens do.
            keys: (batch, key_value_heads, new tokens, head_dim), as they are used; `valid` counts the new tokens already.
            values: likewise.

        Returns:
            Keys and values of all tokens so far, which the new ones attend to.
        """
        if layer == len(self.layers):
            self.layers.append((keys, values))
        else:
            before = self.layers[layer]
            self.layers[layer] = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        return self.layers[layer]
