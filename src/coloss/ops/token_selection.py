"""Which tokens are classified well enough to stop, and how the others are packed together and put back."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.ops.precision import full_precision
from coloss.ops.token_masks import gather_tokens, mask_to_padded_indices


def token_probabilities(
    logits: Float[Tensor, "batch classes tokens"],
    presence: Float[Tensor, "batch classes 2"] | None = None,
) -> Float[Tensor, "batch classes tokens"]:
    """How likely each class is at each token, from the logits of a per-token classifier.

    A linear classifier: `softmax over classes`. A query head: `softmax(presence)[..., 0] * sigmoid(logits)`, which does not sum to one.

    Args:
        logits: one for each class and token.
        presence: of a query head: logits of "this class is in the sample" and "it is not".

    Returns:
        In [0, 1], at least float32.

    Examples:
        >>> logits = torch.tensor([[[0.0, 9.0], [0.0, -9.0]]])
        >>> token_probabilities(logits)[0, 0].round(decimals=2)
        tensor([0.5000, 1.0000])
        >>> token_probabilities(logits, torch.zeros(1, 2, 2))[0, 0].round(decimals=2)
        tensor([0.2500, 0.5000])
    """
    logits = full_precision(logits)
    if presence is None:
        return logits.softmax(1)
    return full_precision(presence).softmax(-1)[..., :1] * logits.sigmoid()


@torch.no_grad()
def select_confident_tokens(
    probabilities: Float[Tensor, "batch classes tokens"] | Float[Tensor, "batch tokens"],
    active: Bool[Tensor, "batch tokens"],
    threshold: float,
    keep_per_class: int = 5,
    *,
    predicted: Int[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """Tokens whose prediction is final: confident ones, but for the most confident few of every class.

    Token n with confidence v = max over classes of P(class, n) and predicted class y is a candidate if it is active and v > threshold. Of
    the candidates of each class the `keep_per_class` with the largest v go on, so that easy classes stay there as context for the others;
    ties go to the earlier token. The rest is final.

    Args:
        probabilities: of each class at each token, in [0, 1]; or, with `predicted`, the confidence alone.
        active: False for tokens that were final before, and for padding.
        threshold: in [0, 1]; 1 makes no token final. Not a calibrated probability: tune it for each kind of head.
        keep_per_class: candidates of each class that go on, >= 0.
        predicted: class of each token, >= 0, where `probabilities` holds confidences.

    Returns:
        True for the tokens that become final now; a subset of `active`.

    Raises:
        ValueError: for a threshold outside [0, 1], `keep_per_class` < 0, or shapes that do not fit. A NaN is no confidence: its token
            stays active.

    Cost:
        One sort of each row; no loop over classes and nothing that waits for the device.

    Source:
        Tang et al. 2023, arXiv 2308.01045, section 3.2.

    Examples:
        >>> confidence, predicted = torch.tensor([[0.95, 0.99, 0.2, 0.97]]), torch.tensor([[0, 0, 1, 1]])
        >>> active = torch.ones(1, 4, dtype=torch.bool)
        >>> select_confident_tokens(confidence, active, 0.9, keep_per_class=1, predicted=predicted)
        tensor([[ True, False, False, False]])
        >>> select_confident_tokens(confidence, active, 0.9, keep_per_class=0, predicted=predicted)
        tensor([[ True,  True, False,  True]])
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if keep_per_class < 0:
        raise ValueError(f"keep_per_class must be >= 0, got {keep_per_class}")
    if probabilities.ndim != (3 if predicted is None else 2):
        expected = "(batch, classes, tokens)" if predicted is None else "(batch, tokens) with predicted"
        raise ValueError(f"probabilities must be {expected}, got shape {tuple(probabilities.shape)}")
    confidence = probabilities
    if predicted is None:
        confidence, predicted = probabilities.max(1)
    for name, given in (("active", active), ("predicted", predicted)):
        if given.shape != confidence.shape:
            raise ValueError(f"{name} must have shape {tuple(confidence.shape)}, got {tuple(given.shape)}")
    candidate = active & (confidence > threshold)
    if keep_per_class == 0 or candidate.shape[1] == 0:
        return candidate
    # The bits of non-negative floats are in the order of the floats: class and falling confidence in one whole number.
    bits = confidence.float().masked_fill(~candidate, 0.0).view(torch.int32).to(torch.int64)
    last = torch.iinfo(torch.int32).max
    group = predicted.to(torch.int64).masked_fill(~candidate, last)
    key, order = ((group << 31) + (last - bits)).sort(dim=1, stable=True)
    place = torch.arange(key.shape[1], device=key.device).expand_as(key)
    starts = torch.ones_like(key, dtype=torch.bool)
    starts[:, 1:] = (key[:, 1:] >> 31) != (key[:, :-1] >> 31)
    rank = place - place.masked_fill(~starts, 0).cummax(1).values
    kept = torch.zeros_like(candidate).scatter_(1, order, rank < keep_per_class)
    return candidate & ~kept


class PackedTokens(NamedTuple):
    """The tokens that a mask keeps, side by side, as many places for each sample as the fullest one needs.

    Attributes:
        tokens: one vector for each place.
        indices: where each came from; 0 in places that only fill up.
        valid: False in those.
    """

    tokens: Float[Tensor, "batch kept dim"]
    indices: Int[Tensor, "batch kept"]
    valid: Bool[Tensor, "batch kept"]


def drop_tokens(
    tokens: Float[Tensor, "batch tokens dim"], keep: Bool[Tensor, "batch tokens"], *, least: int = 0
) -> PackedTokens:
    """Pack the tokens to keep together, in their order, so that later layers cost what these cost.

    Args:
        tokens: one vector for each token.
        keep: True for those that go on.
        least: places at least, >= 0 and at most the number of tokens; 1 spares layers an empty sequence.

    Returns:
        The packed tokens; places that only fill up repeat token 0 and must be masked with `valid`.

    Raises:
        ValueError: for `least` out of range.

    Cost:
        As `mask_to_padded_indices`: the program waits for the device to learn the largest count.

    Examples:
        >>> tokens = torch.arange(8.0).reshape(2, 4, 1)
        >>> packed = drop_tokens(
        ...     tokens, torch.tensor([[False, True, False, True], [False, False, True, False]])
        ... )
        >>> packed.tokens[..., 0].tolist(), packed.valid.tolist()
        ([[1.0, 3.0], [6.0, 4.0]], [[True, True], [True, False]])
        >>> restore_tokens(packed, torch.zeros_like(tokens))[..., 0].tolist()
        [[0.0, 1.0, 0.0, 3.0], [0.0, 0.0, 6.0, 0.0]]
    """
    if not 0 <= least <= tokens.shape[1]:
        raise ValueError(f"least must be in [0, {tokens.shape[1]}], got {least}")
    most = int(keep.sum(1).max()) if keep.numel() else 0
    indices, valid = mask_to_padded_indices(keep, max(most, least))
    return PackedTokens(gather_tokens(tokens, indices), indices, valid)


def restore_tokens(
    packed: PackedTokens, canvas: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "batch tokens dim"]:
    """Write packed tokens back to their places; the other places keep what the canvas holds.

    Args:
        packed: from `drop_tokens`, with the same or other vectors in it.
        canvas: what stands at places that were dropped; it is not changed.

    Returns:
        A new canvas. Gradients flow to packed vectors in use and to the canvas elsewhere.

    Examples:
        >>> tokens = torch.rand(2, 5, 3)
        >>> packed = drop_tokens(tokens, torch.rand(2, 5) > 0.5)
        >>> torch.equal(restore_tokens(packed, tokens), tokens)
        True
    """
    size = canvas.shape[1]
    # Places that only fill up are written to a row of their own behind the canvas.
    places = packed.indices.masked_fill(~packed.valid, size)[..., None].expand(-1, -1, canvas.shape[2])
    longer = torch.nn.functional.pad(canvas, (0, 0, 0, 1))
    return longer.scatter(1, places, packed.tokens.to(canvas.dtype))[:, :size]
