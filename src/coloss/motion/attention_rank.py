"""How much rank the attention of a masked-token transformer keeps, layer by layer: causal beside bidirectional.

A row of attention weights is a softmax over the places that a place may attend to. Where each may attend to itself and those before it, the matrix
is lower triangular with a positive diagonal, so its determinant is a positive product and its rank is full, whatever the scores; where all may
attend to all it can be of any rank down to 1. A full rank says little by itself, as singular values may be tiny: the effective rank, the
exponential of their entropy (`coloss.ops.effective_rank`), says how many directions are really used.

Measured once by a script, on tokens of Bandai-Namco's 210 test clips of the given split, half of them hidden, 17 places with the condition (action
and style), `SMALL_GENERATOR` of 4 layers trained for 200 steps of 64 clips (AdamW at 1e-3); effective rank from the first layer to the last, means
over 3 seeds of generator and tokenizer:

    attention matrices      causal 4.2, 5.8, 6.7, 6.9    bidirectional 3.0, 4.0, 4.5, 3.8    (untrained 8.3 to 8.2, and 4.9 to 4.6)
    what attention adds     causal 5.8, 5.2, 4.8, 4.0    bidirectional 4.5, 4.0, 3.4, 2.5    (untrained 6.7 to 6.1, and 4.7 to 4.0)
    tokens after the layer  causal 9.3, 9.3, 8.7, 7.9    bidirectional 9.2, 9.1, 8.4, 7.5    (untrained 8.8 to 8.9, and 8.7 to 8.6)

In each seed the last layer's are larger with causal attention: matrices by 2.6 to 3.5, what is added by 1.4 to 1.6, tokens by 0.3 to 0.5. With 8
layers (one seed) the last has 7.2 and 3.1, 3.9 and 2.2, 7.2 and 6.7; with all tokens hidden the last of 4 layers has 6.1 and 2.3, 2.6 and 1.7. So
causal matrices have the larger effective rank, untrained ones too, and the tokens, which also go round attention by the residual path, hardly any.
Both guess hidden tokens alike: 49% and 50% of them right at the last step of training. Full rank in theory is not full rank in effect: with all
tokens hidden a causal first layer has 1.5 to 3.5.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.metrics import evaluation_mode
from coloss.motion.masked_tokens import MaskedTokenTransformer
from coloss.nn import TransformerBlock
from coloss.ops import accumulation_dtype, effective_rank


class AttentionRanks(NamedTuple):
    """Mean ranks of each layer, from the first; float64 (layers,).

    Attributes:
        weights_effective: effective rank of attention matrices, over heads and sequences.
        weights_numerical: number of their singular values above `tolerance` times the largest.
        outputs_effective: effective rank of what attention adds to a sequence's tokens (places x dim).
        outputs_numerical: likewise.
        stream_effective: effective rank of the tokens after the layer.
        places: mean number of places of a sequence, the condition's among them: the largest rank there can be.
    """

    weights_effective: Tensor
    weights_numerical: Tensor
    outputs_effective: Tensor
    outputs_numerical: Tensor
    stream_effective: Tensor
    places: float


def attention_weights(
    queries: Float[Tensor, "*batch queries dim"],
    keys: Float[Tensor, "*batch keys dim"],
    allowed: Bool[Tensor, "*others queries keys"] | None = None,
) -> Float[Tensor, "*batch queries keys"]:
    """The matrix softmax(Q K^T / sqrt(dim)) over the keys that are allowed, which no fused attention shows.

    Args:
        queries: Q.
        keys: K.
        allowed: False where a query may not attend to a key; broadcast. A query that may attend to none has a row of zeros.

    Examples:
        >>> attention_weights(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 3).tril().bool())
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])
    """
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    if allowed is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.where(allowed.any(-1, keepdim=True), weights, 0.0)


@torch.no_grad()
def attention_ranks(
    model: MaskedTokenTransformer,
    tokens: Int[Tensor, "sequences tokens"],
    condition: Float[Tensor, "sequences condition"] | None = None,
    *,
    tolerance: float = 1e-3,
) -> AttentionRanks:
    """Ranks of a model's attention matrices and outputs in each layer, on some sequences, in evaluation mode.

    Args:
        model: on the tokens' device; causal or not.
        tokens: as the model takes them, hidden and padded places included; padding counts nowhere.
        condition: likewise.
        tolerance: of the numerical ranks, in (0, 1).

    Raises:
        ValueError: for a tolerance out of range, or no sequences.

    Cost:
        One forward pass without fused attention, and a singular value decomposition in float64 for each sequence, layer and head, on
        the CPU.

    Source:
        Dong, Cordonnier, Loukas 2021, arXiv 2103.03404 (loss of rank with depth); Li et al. 2024, arXiv 2410.07093 (causal attention).

    Examples:
        >>> sizes = {"dim": 16, "depth": 3, "heads": 2, "max_tokens": 8}
        >>> model = MaskedTokenTransformer(8, 4, **sizes)
        >>> ranks = attention_ranks(model, torch.randint(8, (4, 8)))
        >>> ranks.weights_effective.shape, ranks.places
        (torch.Size([3]), 9.0)
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
    if not len(tokens):
        raise ValueError("tokens must hold at least one sequence, got none")
    found: list[list[Tensor]] = []
    with evaluation_mode(model):
        there = torch.nn.functional.pad(tokens >= 0, (1, 0), value=True)
        allowed = model.allowed(tokens) & there[:, None, :, None]
        stream = model.embed(tokens, condition)
        for block in model.transformer.blocks:
            assert isinstance(block, TransformerBlock)
            matrices: list[Tensor] = []

            def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                wide = accumulation_dtype(queries.device)
                weights = attention_weights(queries.to(wide), keys.to(wide), allowed)
                matrices.append(weights)  # noqa: B023
                return weights.to(values) @ values

            attended = block.attention(block.attention_norm(stream), attend=attend)
            stream = stream + attended
            stream = stream + block.mlp(block.mlp_norm(stream))
            kept = [torch.where(there[..., None], x, 0.0) for x in (attended, stream)]
            weights, outputs, after = (torch.linalg.svdvals(x.cpu().double()) for x in (matrices[0], *kept))
            found.append(
                [
                    effective_rank(weights).mean(),
                    _numerical(weights, tolerance),
                    effective_rank(outputs).mean(),
                    _numerical(outputs, tolerance),
                    effective_rank(after).mean(),
                ]
            )
    columns = [torch.stack(column) for column in zip(*found)]
    places = there.sum().item() / len(there)
    return AttentionRanks(columns[0], columns[1], columns[2], columns[3], columns[4], places)


def _numerical(values: Tensor, tolerance: float) -> Tensor:
    return (values > tolerance * values.amax(-1, keepdim=True)).sum(-1).double().mean()
