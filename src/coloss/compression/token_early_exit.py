"""Tokens that are classified well enough leave a stack of blocks early; the others go on, packed together.

Any blocks and any per-token heads. After each head but the last, `coloss.ops.select_confident_tokens` says which tokens are final (or a rule
of your own, `select`); blocks after it see the others alone, and each token keeps the logits of the last head that saw it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn import TokenLogits, TransformerBlock
from coloss.ops import PackedTokens, drop_tokens, restore_tokens, select_confident_tokens, token_probabilities

Select: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Probabilities (batch, classes, tokens) and active tokens (batch, tokens) to those that become final."""


class EarlyExitOutputs(NamedTuple):
    """What `TokenEarlyExit` gives.

    Attributes:
        stages: of each head: logits (batch, classes, tokens) of all tokens as they stand after it, a final token's being those of the last
            head that saw it, padding's zero; and of a query head its presence logits. Gradients reach every head that wrote a column.
        active_counts: tokens that each layer worked on.
        exit_stages: number of the last head that saw each token, from 0; -1 for padding.
    """

    stages: tuple[TokenLogits, ...]
    active_counts: Int[Tensor, "layers batch"]
    exit_stages: Int[Tensor, "batch tokens"]

    @property
    def final(self) -> TokenLogits:
        """After the last head."""
        return self.stages[-1]


def token_multiply_adds(
    active_counts: Int[Tensor, "layers *batch"],
    dim: int,
    mlp_ratio: float = 4.0,
    key_value_share: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Multiply-adds of transformer layers that worked on so many tokens each.

    `sum over layers of (2 + 2 g) n d^2 + 2 n^2 d + 2 r n d^2` for n tokens of size d and an MLP of width r d: projections, attention, MLP.
    Norms, biases and heads are not counted, nor what masks leave out of attention.

    Args:
        active_counts: n, of each layer.
        dim: d.
        mlp_ratio: r.
        key_value_share: g, heads of keys and values over heads of queries.

    Returns:
        The sum over layers, float64.

    Examples:
        >>> token_multiply_adds(torch.tensor([10, 5]), dim=8).tolist()  # 7,680 + 1,600 and 3,840 + 400
        13520.0
    """
    n = active_counts.double()
    return (n * (2 + 2 * key_value_share + 2 * mlp_ratio) * dim**2 + 2 * n**2 * dim).sum(0)


class TokenEarlyExit(nn.Module):
    """Blocks with a head after some of them, and tokens that are done there left out of the rest.

    Args:
        blocks: modules `(tokens, key_padding_mask) -> tokens`; also `coloss.nn.TransformerBlock` and `nn.TransformerEncoderLayer` (batch
            first) as they are. A block with the attribute `takes_positions = True` is called as `(tokens, key_padding_mask, positions)`, with
            the positions (batch, tokens) that `forward` was given, of the tokens that are left, in their order; without any, with each token's
            place in the full sequence, or None where nothing was left out.
        heads: modules `(tokens, key_padding_mask) -> TokenLogits`, one for each stage, such as `LinearTokenHead` and
            `SegmentationQueryHead`.
        exit_after: how many blocks are done before each head, rising; the last is the number of blocks.
        threshold: confidence above which a token is final, in [0, 1]; 1 lets all of them through. Of a linear head the confidence is the
            largest softmax, of a query head softmax times sigmoid: tune it for each.
        keep_per_class: candidates of each predicted class that go on nevertheless, see `select_confident_tokens`.
        select: another rule, in place of threshold and `keep_per_class`.
        gather: False computes all tokens and hides final ones from the attention of others: the same outputs, and no time saved.

    Attributes:
        threshold, keep_per_class, select, gather: as given; may be set between calls. They are no part of the state dict.

    Returns:
        From `forward(tokens, key_padding_mask=None, positions=None)`: `EarlyExitOutputs`. Nothing is kept from one call to the next.

    Raises:
        ValueError: for values out of range, or numbers of blocks, heads and stages that do not fit.

    Cost:
        Of each layer, that of the largest number of active tokens in the batch: one sample alone is packed tightly. After every stage but the
        last the program waits for the device to learn whether tokens leave, unless the threshold is 1; where they do, it waits again for that
        number, and in evaluation mode for whether any are left. In evaluation mode a batch without active tokens stops there;
        in training the rest runs on one masked token, so that every parameter has a gradient on every process.

    Source:
        Tang et al. 2023, arXiv 2308.01045.

    Examples:
        >>> from coloss.nn import LinearTokenHead
        >>> blocks = [TransformerBlock(8, 2) for _ in range(4)]
        >>> heads = [LinearTokenHead(8, 3) for _ in range(2)]
        >>> network = TokenEarlyExit(blocks, heads, exit_after=(2, 4), threshold=0.5, keep_per_class=0).eval()
        >>> found = network(torch.randn(1, 20, 8))
        >>> found.final.logits.shape, found.active_counts[:2, 0].tolist()
        (torch.Size([1, 3, 20]), [20, 20])
        >>> left = int((found.exit_stages == 0).sum())
        >>> found.active_counts[2:, 0].tolist() == [20 - left] * 2
        True
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        heads: Iterable[nn.Module],
        exit_after: Sequence[int],
        threshold: float = 0.9,
        keep_per_class: int = 5,
        *,
        select: Select | None = None,
        gather: bool = True,
    ) -> None:
        super().__init__()
        self.blocks, self.heads = nn.ModuleList(blocks), nn.ModuleList(heads)
        self.exit_after = check_exits(exit_after, len(self.blocks))
        if len(self.heads) != len(self.exit_after):
            raise ValueError(
                f"heads must be as many as exit_after, {len(self.exit_after)}, got {len(self.heads)}"
            )
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        if keep_per_class < 0:
            raise ValueError(f"keep_per_class must be >= 0, got {keep_per_class}")
        self.threshold, self.keep_per_class = threshold, keep_per_class
        self.select, self.gather = select, gather

    def multiply_adds(
        self,
        active_counts: Int[Tensor, "layers *batch"],
        dim: int,
        mlp_ratio: float = 4.0,
        key_value_share: float = 1.0,
    ) -> Float[Tensor, "*batch"]:
        """Of blocks and heads that worked on so many tokens: `token_multiply_adds` and what each head's own `multiply_adds(n)` says.

        With a threshold of 1 and no rule of its own the last head alone is needed, and counted.
        """
        total = token_multiply_adds(active_counts, dim, mlp_ratio, key_value_share)
        first = len(self.heads) - 1 if self.select is None and self.threshold == 1 else 0
        for head, layers in list(zip(self.heads, self.exit_after, strict=True))[first:]:
            counted = getattr(head, "multiply_adds", None)
            if counted is not None:
                seen = active_counts[layers - 1]
                total = total + total.new_tensor(
                    [counted(n) if n else 0 for n in seen.reshape(-1).tolist()]
                ).reshape(seen.shape)
        return total

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        key_padding_mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "#batch tokens"] | None = None,
    ) -> EarlyExitOutputs:
        padding = key_padding_mask
        active = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if padding is None else ~padding
        exits = active.long() - 1
        packed: PackedTokens | None = None
        places = positions
        stages: list[TokenLogits] = []
        counts: list[Tensor] = []
        for done, block in enumerate(self.blocks, 1):
            tokens = _run(block, tokens, padding, places)
            counts.append(active.sum(1))
            if done != self.exit_after[len(stages)]:
                continue
            exits = exits.masked_fill(active, len(stages))
            found = self.heads[len(stages)](tokens, padding)
            stages.append(_written(found, packed, active, stages))
            if done == len(self.blocks):
                break
            finished = self._finished(stages[-1], active)
            if finished is None:
                continue
            active = active & ~finished
            if not self.training and not active.any():
                break
            if self.gather:
                tokens, packed = self._repack(tokens, packed, active)
                padding = ~packed.valid
                places = packed.indices
                if positions is not None:
                    places = positions.expand(len(tokens), -1).gather(1, places)
            else:
                padding = ~active
            # A softmax over nothing would be NaN: in a sample that is done, everything sees everything, to no effect.
            padding = padding & ~padding.all(1, keepdim=True)
        nothing = torch.zeros_like(counts[0])
        counts += [nothing] * (len(self.blocks) - len(counts))
        stages += stages[-1:] * (len(self.heads) - len(stages))
        return EarlyExitOutputs(tuple(stages), torch.stack(counts), exits)

    def _finished(self, stage: TokenLogits, active: Tensor) -> Tensor | None:
        """Tokens that become final, or None where none does."""
        if self.select is None and self.threshold == 1:
            return None
        with torch.no_grad():
            probabilities = token_probabilities(*stage)
            if self.select is not None:
                finished = self.select(probabilities, active) & active
            else:
                finished = select_confident_tokens(probabilities, active, self.threshold, self.keep_per_class)
            return finished if finished.any() else None

    def _repack(
        self, tokens: Tensor, packed: PackedTokens | None, active: Tensor
    ) -> tuple[Tensor, PackedTokens]:
        least = 1 if self.training else 0
        if packed is None:
            packed = drop_tokens(tokens, active, least=least)
        else:
            inner = drop_tokens(tokens, active.gather(1, packed.indices) & packed.valid, least=least)
            packed = inner._replace(indices=packed.indices.gather(1, inner.indices))
        return packed.tokens, packed


def check_exits(exit_after: Sequence[int], depth: int) -> tuple[int, ...]:
    """The stages as a tuple, refused if they do not rise to the number of blocks.

    Raises:
        ValueError: naming what was given.

    Examples:
        >>> check_exits([2, 4], 4)
        (2, 4)
    """
    exits = tuple(exit_after)
    rising = all(first < second for first, second in zip((0, *exits), exits, strict=False))
    if not exits or not rising or exits[-1] != depth:
        raise ValueError(f"exit_after must rise from 1 or more to the number of blocks, {depth}, got {exits}")
    return exits


def spread_exits(depth: int, stages: int = 3) -> tuple[int, ...]:
    """Stages at equal distances: fewer where there are fewer blocks than stages.

    Examples:
        >>> spread_exits(6), spread_exits(4), spread_exits(2)
        ((2, 4, 6), (1, 3, 4), (1, 2))
    """
    return tuple(sorted({max(round(depth * stage / stages), 1) for stage in range(1, stages + 1)}))


def _run(block: nn.Module, tokens: Tensor, padding: Tensor | None, positions: Tensor | None) -> Tensor:
    if getattr(block, "takes_positions", False):
        return block(tokens, padding, positions)
    if isinstance(block, TransformerBlock):
        return block(tokens, None if padding is None else ~padding[:, None, None])
    if isinstance(block, nn.TransformerEncoderLayer):
        return block(tokens, src_key_padding_mask=padding)
    return block(tokens, padding)


def _written(
    found: TokenLogits, packed: PackedTokens | None, active: Tensor, stages: Sequence[TokenLogits]
) -> TokenLogits:
    """The stage before with the columns of active tokens written anew; a sample without any keeps its presence, too."""
    logits = found.logits.transpose(1, 2)
    before = stages[-1] if stages else None
    canvas = None if before is None else before.logits.transpose(1, 2)
    if packed is not None:
        assert canvas is not None
        logits = restore_tokens(packed._replace(tokens=logits), canvas)
    else:
        logits = torch.where(active[..., None], logits, 0.0 if canvas is None else canvas)
    presence = found.presence
    if presence is not None and before is not None and before.presence is not None:
        presence = torch.where(active.any(1)[:, None, None], presence, before.presence)
    return TokenLogits(logits.transpose(1, 2), presence)
