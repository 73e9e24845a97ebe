"""A network cut into blocks that learn each from a loss of its own, for a training loop of one's own."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

LossFunction = Callable[[Any, Any], Tensor]


class LocalBlocks(nn.Module):
    """Gradient-isolated blocks: each learns from a head of its own, and none sends a gradient to the one before.

    With blocks `f_k`, heads `a_k` and stop-gradient `sg`:

        x_k = f_k(sg(x_{k-1}))        L_k = loss(a_k(x_k), targets)        L_K = loss(x_K, targets)

    `local_backward` leaves the gradients of each `L_k` on the parameters and frees the block's graph before the next block runs, so that the
    activations of one block (and its head) are in memory at a time instead of those of all.

    Args:
        blocks: modules that follow one another, at least one. The last gives the output.
        heads: one for each block but the last. They exist in training only: `export` leaves them out.
        loss: `(output, targets) -> scalar`.

    Attributes:
        blocks, heads: `nn.ModuleList` of what was given.

    Returns:
        From `forward`: the output of the last block, as the blocks give it without cuts.

    Raises:
        ValueError: for no block, another number of heads, or blocks that share parameters with one another or with another one's head.

    Cost: in time, that of the heads on top of ordinary training; in memory, the largest block with its head instead of the sum.

    Source: Belilovsky et al. 2019, arXiv 1812.11446 (greedy training by blocks); Ma et al. 2024, arXiv 2402.17318.

    Examples:
        >>> import torch
        >>> blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3)]
        >>> network = LocalBlocks(blocks, [nn.Linear(8, 3)], nn.functional.cross_entropy)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> output, losses = network.local_backward(torch.randn(5, 4), torch.randint(3, (5,)))
        >>> optimizer.step()
        >>> output.shape, len(losses)
        (torch.Size([5, 3]), 2)
    """

    def __init__(self, blocks: Sequence[nn.Module], heads: Sequence[nn.Module], loss: LossFunction) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("blocks must hold at least one module, got none")
        if len(heads) != len(blocks) - 1:
            raise ValueError(
                f"heads must be one for each block but the last, {len(blocks) - 1}, got {len(heads)}"
            )
        seen: set[int] = set()
        for number, block in enumerate(blocks):
            own = {id(parameter) for parameter in block.parameters()}
            if own & seen:
                raise ValueError(f"blocks must not share parameters, but block {number} shares some")
            seen |= own
        for number, head in enumerate(heads):
            own = {id(parameter) for parameter in blocks[number].parameters()}
            if any(id(parameter) in seen - own for parameter in head.parameters()):
                raise ValueError(f"heads must not share parameters with other blocks, but head {number} does")
        self.blocks, self.heads = nn.ModuleList(blocks), nn.ModuleList(heads)
        self.loss = loss

    def forward(self, inputs: Any) -> Any:
        for block in self.blocks:
            inputs = block(inputs)
        return inputs

    def losses(self, inputs: Any, targets: Any) -> list[Tensor]:
        """The loss of each block, the last one's included; their sum has the gradients that `local_backward` leaves.

        Examples:
            >>> import torch
            >>> network = LocalBlocks(
            ...     [nn.Linear(2, 2), nn.Linear(2, 2)], [nn.Identity()], nn.functional.mse_loss
            ... )
            >>> len(network.losses(torch.ones(1, 2), torch.ones(1, 2)))
            2
        """
        found = []
        for block, head in zip(self.blocks, [*self.heads, None], strict=True):
            inputs = block(inputs)
            found.append(self.loss(inputs if head is None else head(inputs), targets))
            inputs = inputs.detach()
        return found

    def local_backward(self, inputs: Any, targets: Any) -> tuple[Any, list[Tensor]]:
        """Run forward and backward block by block, adding to the parameters' gradients.

        Args:
            inputs: of the first block.
            targets: for the loss.

        Returns:
            The output and the loss of each block, all without a graph.
        """
        found = []
        for block, head in zip(self.blocks, [*self.heads, None], strict=True):
            inputs = block(inputs)
            loss = self.loss(inputs if head is None else head(inputs), targets)
            loss.backward()
            found.append(loss.detach())
            inputs = inputs.detach()
            del loss  # with it goes the block's graph
        return inputs, found

    def export(self) -> nn.Sequential:
        """The blocks alone, not copies."""
        return nn.Sequential(*self.blocks)
