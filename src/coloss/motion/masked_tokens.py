"""A transformer that fills in hidden tokens of a sequence, given a vector such as a sentence's embedding: the generator of LaMP and MoMask.

LaMP (Li et al. 2024, arXiv 2410.07093) takes MoMask's masked transformer (Guo et al. 2024, arXiv 2312.00063) and lets each token attend to those
before it alone: a softmax matrix that is lower triangular with a positive diagonal has full rank, where attention to all may lose it with
depth. So p(m_i | text, m_<i), with some of the m hidden; `attention_ranks` measures both kinds side by side.

The released code means to do so and does not: its mask is a float tensor of ones below the diagonal, which is added to the scores and forbids
nothing, and its padding mask is never handed on. Here both forbid (a test changes later tokens and looks at the logits before).

Tokens are 0 .. num_codes - 1 for codes, num_codes for a hidden one, -1 for padding after a sequence's end. Blocks are pre-norm
(`coloss.nn.Transformer`), the authors' post-norm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.data import Batch
from coloss.errors import InputError
from coloss.motion.iterative_decoding import iterative_decode
from coloss.nn import PositionTable, Transformer
from coloss.ops import all_reduce_mean, full_precision
from coloss.train.method import Method
from coloss.train.state import State

PAPER_GENERATOR: Mapping[str, Any] = {
    "dim": 512,
    "depth": 8,
    "heads": 8,
    "mlp_ratio": 2.0,
    "dropout": 0.2,
    "max_tokens": 49,
}
"""The authors' sizes. Train with AdamW at 2e-4, weight decay 1e-5; decode in 10 steps (MoMask's code: 18) with guidance 4."""

SMALL_GENERATOR: Mapping[str, Any] = {
    "dim": 96,
    "depth": 4,
    "heads": 4,
    "mlp_ratio": 2.0,
    "dropout": 0.1,
    "max_tokens": 16,
}
"""Sizes for about a thousand clips and a CPU: 500 steps of 64 clips; decode in 8 steps with guidance 2."""


class MaskedTokenTransformer(nn.Module):
    """Logits for every place of a token sequence, from the tokens that show and one condition vector, which stands before them.

    Args:
        num_codes: kinds of tokens.
        condition_dim: size of the condition vector.
        dim: size of a token inside; even.
        depth: number of transformer blocks.
        heads: attention heads; divides `dim`.
        causal: True lets each token attend to itself, those before it and the condition; False to all.
        mlp_ratio: width of each block's two-layer network in multiples of `dim`.
        dropout: probability in [0, 1) inside the blocks.
        max_tokens: longest sequence.

    Attributes:
        mask_id: the token that means "hidden", `num_codes`.

    Returns:
        From `forward(tokens, condition=None)` or `forward((tokens, condition))`: logits (sequences, tokens, num_codes). No condition is
        the same as one of zeros. Logits at padding mean nothing.

    Raises:
        ValueError: for a size out of range, a token outside [-1, num_codes], too many tokens, or a condition of another size.

    Source:
        Li et al. 2024, arXiv 2410.07093, section 3.3; Guo et al. 2024, arXiv 2312.00063, section 3.2.

    Examples:
        >>> model = MaskedTokenTransformer(8, condition_dim=4, dim=16, depth=2, heads=2, max_tokens=6).eval()
        >>> tokens = torch.tensor([[3, 8, 8, 1], [8, 8, -1, -1]])
        >>> logits = model(tokens, torch.randn(2, 4))
        >>> logits.shape, model.generate(torch.randn(2, 4), lengths=torch.tensor([5, 3]), steps=3).shape
        (torch.Size([2, 4, 8]), torch.Size([2, 5]))
    """

    def __init__(
        self,
        num_codes: int,
        condition_dim: int,
        *,
        dim: int = 512,
        depth: int = 8,
        heads: int = 8,
        causal: bool = True,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        max_tokens: int = 49,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_codes", num_codes),
            ("condition_dim", condition_dim),
            ("max_tokens", max_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not dim * mlp_ratio >= 1:
            raise ValueError(f"mlp_ratio must be >= 1 / {dim}, one over dim, got {mlp_ratio}")
        self.num_codes, self.condition_dim, self.max_tokens, self.causal = (
            num_codes,
            condition_dim,
            max_tokens,
            causal,
        )
        self.mask_id = num_codes
        self.embedding = nn.Embedding(num_codes + 1, dim)
        self.condition = nn.Linear(condition_dim, dim)
        self.positions = PositionTable((max_tokens + 1,), dim, "sinusoidal")
        self.transformer = Transformer(dim, depth, heads, mlp_ratio=mlp_ratio, dropout=dropout)
        self.head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Linear(dim, num_codes)
        )

    def forward(
        self,
        tokens: Int[Tensor, "sequences tokens"] | Sequence[Tensor],
        condition: Float[Tensor, "sequences condition"] | None = None,
    ) -> Float[Tensor, "sequences tokens num_codes"]:
        if not isinstance(tokens, Tensor):
            tokens, condition = tokens
        return self.head(self.transformer(self.embed(tokens, condition), self.allowed(tokens))[:, 1:])

    def embed(
        self,
        tokens: Int[Tensor, "sequences tokens"],
        condition: Float[Tensor, "sequences condition"] | None = None,
    ) -> Float[Tensor, "sequences condition_and_tokens dim"]:
        """What the transformer gets: the condition, then the tokens, each with its position."""
        if tokens.shape[1] > self.max_tokens:
            raise ValueError(f"tokens must be at most {self.max_tokens}, got {tokens.shape[1]}")
        if tokens.numel() and not (int(tokens.min()) >= -1 and int(tokens.max()) <= self.num_codes):
            raise ValueError(
                f"tokens must be in [-1, {self.num_codes}], got {int(tokens.min())} to {int(tokens.max())}"
            )
        weight = self.condition.weight
        if condition is None:
            condition = weight.new_zeros(len(tokens), self.condition_dim)
        if condition.shape != (len(tokens), self.condition_dim):
            raise ValueError(
                f"condition must have shape {(len(tokens), self.condition_dim)}, got {tuple(condition.shape)}"
            )
        first = self.condition(condition.to(weight.dtype))
        following = self.embedding(tokens.clamp(min=0))
        return self.positions(torch.cat([first[:, None], following.to(first.dtype)], 1))

    def allowed(
        self, tokens: Int[Tensor, "sequences tokens"]
    ) -> Bool[Tensor, "sequences 1 queries condition_and_tokens"]:
        """True where a place (third dimension; the condition first) may attend to another (fourth)."""
        keys = F.pad(tokens >= 0, (1, 0), value=True)[:, None, None, :]
        places = keys.shape[-1]
        order = torch.ones(places, places, dtype=torch.bool, device=tokens.device)
        return keys & (order.tril() if self.causal else order)

    @torch.no_grad()
    def generate(
        self,
        condition: Float[Tensor, "sequences condition"],
        lengths: Int[Tensor, " sequences"] | int,
        *,
        steps: int = 10,
        guidance: float = 4.0,
        temperature: float = 1.0,
        top_share: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "sequences tokens"]:
        """Tokens for conditions, by `iterative_decode`; -1 after a sequence's end. Call it in evaluation mode.

        Args:
            condition: one vector for each sequence.
            lengths: tokens of each, >= 1, or of all.
            steps, guidance, temperature, top_share, generator: see `iterative_decode`.
        """
        if isinstance(lengths, int):
            lengths = torch.full((len(condition),), lengths)
        return iterative_decode(
            lambda tokens: self(tokens, condition),
            lengths.to(condition.device),
            steps,
            mask_id=self.mask_id,
            unconditional=self,
            guidance=guidance,
            temperature=temperature,
            top_share=top_share,
            generator=generator,
        )


class MaskedTokens(NamedTuple):
    """Tokens of which some are to be guessed.

    Attributes:
        tokens: what the model sees.
        chosen: True where it must guess.
    """

    tokens: Tensor
    chosen: Tensor


def mask_tokens(
    tokens: Int[Tensor, "sequences tokens"],
    num_codes: int,
    *,
    random_share: float = 0.1,
    kept_share: float = 0.108,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Choose tokens to be guessed, few or all of a sequence, and hide most of them.

    For each sequence of n tokens, u ~ U(0, 1) and max(1, round(n cos(pi u / 2))) tokens are chosen. Of the chosen 10% become random codes,
    79.2% the mask token, 10.8% stay (the paper's text says 80, 10 and 10).

    Args:
        tokens: codes, -1 for padding, which is never chosen.
        num_codes: kinds of codes; the mask token is `num_codes`.
        random_share, kept_share: of the chosen, at least 0 and together at most 1.
        generator: of all draws.

    Raises:
        ValueError: for shares out of range.

    Source:
        Chang et al. 2022 (MaskGIT), arXiv 2202.04200, for the cosine; shares of MoMask's code.

    Examples:
        >>> found = mask_tokens(torch.tensor([[5, 2, 7, -1]]), 8, random_share=0.0, kept_share=0.0)
        >>> bool(found.chosen.any()), bool(found.chosen[0, 3]), found.tokens[found.chosen].unique()
        (True, False, tensor([8]))
    """
    if not (random_share >= 0 and kept_share >= 0 and random_share + kept_share <= 1):
        raise ValueError(
            f"random_share and kept_share must be >= 0 and at most 1 together, got {random_share} and {kept_share}"
        )
    device = tokens.device if generator is None else generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device).to(tokens.device)

    there = tokens >= 0
    lengths = there.sum(1)
    number = (lengths * torch.cos(uniform(len(tokens)) * (math.pi / 2))).round().clamp(min=1)
    order = uniform(*tokens.shape).masked_fill(~there, 2.0)
    chosen = (order.argsort(1).argsort(1) < number[:, None]) & there
    fate = uniform(*tokens.shape)
    others = (uniform(*tokens.shape) * num_codes).long().clamp(max=num_codes - 1).to(tokens.dtype)
    changed = torch.where(fate < random_share, others, num_codes)
    changed = torch.where(fate >= 1 - kept_share, tokens, changed)
    return MaskedTokens(torch.where(chosen, changed, tokens), chosen)


def masked_token_loss(
    logits: Float[Tensor, "sequences tokens num_codes"],
    tokens: Int[Tensor, "sequences tokens"],
    chosen: Bool[Tensor, "sequences tokens"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the true tokens at the places that were chosen; 0 for none.

    Args:
        logits: of a model that saw `mask_tokens(tokens).tokens`.
        tokens: the true ones.
        chosen: places to count; under several processes the mean is over those of all.

    Examples:
        >>> logits = torch.zeros(1, 2, 4)
        >>> masked_token_loss(logits, torch.tensor([[3, -1]]), torch.tensor([[True, False]]))  # log 4
        tensor(1.3863)
    """
    targets = torch.where(chosen, tokens, -100).long()
    # Chosen first: what does not count must not reach the gradient as 0 * NaN.
    counted = torch.where(chosen[..., None], full_precision(logits), 0.0)
    total = F.cross_entropy(counted.flatten(0, 1), targets.flatten(), reduction="sum")
    number = all_reduce_mean(chosen.sum().to(total.dtype))
    return total / torch.where(number > 0, number, 1.0)


class MaskedTokenTraining(Method):
    """Trains a `MaskedTokenTransformer` in `fit`: hides tokens, drops some conditions, scores the guesses.

    The run's inputs are tokens, its targets condition vectors (or whatever `condition` makes them of), and the term `masked_tokens` stands in
    for an objective. Logs `masked_accuracy`, the share of chosen tokens guessed right, 0 for none. Masks are drawn by each process for its own
    sequences, so several processes do not repeat the run of one. Under gradient accumulation micro-batches weigh alike, whatever their numbers of
    chosen tokens.

    Args:
        num_codes: of the model.
        condition: makes the condition vectors of a batch, such as a text encoder with a trained layer; a module's parameters are trained
            along. None: the batch's targets.
        condition_dropout: probability in [0, 1] of a condition to be replaced by zeros, for guidance.
        random_share, kept_share: see `mask_tokens`.

    Raises:
        ValueError: for a number out of range, or tokens outside [-1, num_codes) in a batch; `InputError` for a batch without condition, or a
            model with another number of codes.

    Examples:
        >>> import coloss
        >>> model = MaskedTokenTransformer(8, 4, dim=16, depth=1, heads=2, max_tokens=5)
        >>> data = (torch.randint(8, (16, 5)), torch.randn(16, 4))
        >>> run = coloss.fit(model, data, None, [MaskedTokenTraining(8)], budget=coloss.Budget(steps=2))
        >>> list(run.history[-1].terms)
        ['masked_tokens']
    """

    replaces_objective = True

    def __init__(
        self,
        num_codes: int,
        *,
        condition: Callable[[Batch], Tensor] | None = None,
        condition_dropout: float = 0.1,
        random_share: float = 0.1,
        kept_share: float = 0.108,
    ) -> None:
        super().__init__()
        if num_codes < 1:
            raise ValueError(f"num_codes must be >= 1, got {num_codes}")
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout must be in [0, 1], got {condition_dropout}")
        self.num_codes, self.condition, self.condition_dropout = num_codes, condition, condition_dropout
        self.truth: Tensor | None = None
        self.chosen: Tensor | None = None
        self.random_share, self.kept_share = random_share, kept_share
        self._hide(torch.zeros(1, 1, dtype=torch.int64), None)  # checks the shares now

    def on_batch(self, state: State) -> None:
        batch, generator = state.batch, state.local_generator
        tokens = batch.inputs
        self._check_codes(getattr(state.model, "num_codes", self.num_codes))
        if tokens.numel() and not (int(tokens.min()) >= -1 and int(tokens.max()) < self.num_codes):
            raise ValueError(
                f"tokens must be in [-1, {self.num_codes}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        condition = batch.targets if self.condition is None else self.condition(batch)
        if not isinstance(condition, Tensor) or not condition.is_floating_point():
            raise InputError(
                "targets must be condition vectors (or give condition=), "
                f"got {getattr(condition, 'dtype', type(condition).__name__)}"
            )
        kept = torch.rand(len(tokens), generator=generator, device=generator.device) >= self.condition_dropout
        masked = self._hide(tokens, generator)
        self.truth, self.chosen = tokens, masked.chosen
        # Chosen, not multiplied: a dropped condition that is not finite leaves no trace.
        condition = torch.where(kept.to(condition.device)[:, None], condition, 0.0)
        state.batch = replace(batch, inputs=(masked.tokens, condition))

    def _check_codes(self, given: int) -> None:
        # With fewer, the mask token is one of the model's codes, and not the one that it generates from.
        if given != self.num_codes:
            raise InputError(f"num_codes must be the model's {given}, got {self.num_codes}")

    def _hide(self, tokens: Tensor, generator: torch.Generator | None) -> MaskedTokens:
        return mask_tokens(
            tokens,
            self.num_codes,
            random_share=self.random_share,
            kept_share=self.kept_share,
            generator=generator,
        )

    def terms(self, state: State) -> dict[str, Tensor]:
        assert self.truth is not None
        assert self.chosen is not None
        self._check_codes(state.outputs.shape[-1])
        right = (state.outputs.detach().argmax(-1) == self.truth) & self.chosen
        state.log({"masked_accuracy": right.sum() / self.chosen.sum().clamp(min=1)})
        return {"masked_tokens": masked_token_loss(state.outputs, self.truth, self.chosen)}

    def finish(self, state: State) -> None:
        self.truth = self.chosen = None
