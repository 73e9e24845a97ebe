"""Four losses between the queries of a motion (or image, or point cloud) and a text, as functions of plain tensors, and hard negatives.

In a run of several processes all of them are those of the joined batch, unless `across_processes=False` (see `coloss.ops.distributed`).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from coloss.ops import full_precision, gather_with_gradient, gumbel_noise, is_distributed, without_autocast
from coloss.ops.distributed import rank, row_counts
from coloss.ops.loss_arguments import joint_groups, reduced_total, same_type

IGNORED = -100
"""Target of a place that does not count."""


class HardNegatives(NamedTuple):
    """Numbers of the drawn negatives in a batch: a motion for each text, a text for each motion; -1 where nothing may be drawn."""

    motion_of_text: Tensor
    text_of_motion: Tensor


def query_text_scores(
    queries: Float[Tensor, "motions queries dim"], texts: Float[Tensor, "texts dim"]
) -> Float[Tensor, "motions texts"]:
    """Cosine of each text and the query of each motion that is nearest to it: `max_k cos(h_bk, g_c)`.

    Args:
        queries: of any length, several to a motion.
        texts: of any length.

    Returns:
        Values in [-1, 1], at least float32; a vector of zeros has cosine 0 with everything.

    Raises:
        ValueError: if widths differ, or there is no query.

    Cost: O(motions * queries * texts * dim) time, memory of (motions * queries, texts).

    Examples:
        >>> query_text_scores(
        ...     torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[3.0, 0.0], [-1.0, -1.0]])
        ... )
        tensor([[ 1.0000, -0.7071]])
    """
    if queries.shape[2] != texts.shape[1]:
        raise ValueError(f"texts must have the width of queries, {queries.shape[2]}, got {texts.shape[1]}")
    if queries.shape[1] < 1:
        raise ValueError("queries must be at least 1 to a motion, got 0")
    first, second = same_type(queries, texts)
    with without_autocast(first.device):
        cosines = F.normalize(first, dim=2).flatten(0, 1) @ F.normalize(second, dim=1).T
    return cosines.unflatten(0, queries.shape[:2]).amax(1)


def contrastive_max_loss(
    queries: Float[Tensor, "batch queries dim"],
    texts: Float[Tensor, "batch dim"],
    scale: float | Float[Tensor, ""] = 1 / 0.07,
    *,
    groups: Shaped[Tensor, " batch"] | None = None,
    label_smoothing: float = 0.1,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """Cross-entropy of finding a motion's text among all texts and a text's motion among all motions, scored by the nearest query.

        s_bc = scale * max_k cos(h_bk, g_c)
        loss = mean over b of [CE(s_b., b) + CE(s_.b, b)] / 2

    The gradient of a pair reaches the one query that is nearest. Pairs off the diagonal whose texts are the same are left out; smoothing
    shares `label_smoothing` evenly among the candidates that stay.

    Args:
        queries: h, vectors of each motion's queries, of any length.
        texts: g, the text of each motion, of any length.
        scale: what the cosines are multiplied by, > 0; a tensor may be learned.
        groups: number of each text; other pairs of equal number are no negatives.
        label_smoothing: in [0, 1).
        across_processes: compare with the pairs of all processes of a run.

    Returns:
        A scalar >= 0 (0 for a batch of one), at least float32.

    Raises:
        ValueError: if numbers of rows or widths differ, or an option is out of range.

    Source: Li et al. 2023 (BLIP-2), arXiv 2301.12597, section 3.2; Li et al. 2024 (LaMP), arXiv 2410.07093.

    Examples:
        >>> h, g = torch.eye(2)[:, None], torch.eye(2)
        >>> contrastive_max_loss(h, g, 1.0, label_smoothing=0.0)  # log(1 + 1 / e)
        tensor(0.3133)
        >>> contrastive_max_loss(h, g, 1.0, groups=torch.tensor([5, 5]))
        tensor(0.)
    """
    _check_smoothing(label_smoothing)
    if len(queries) != len(texts):
        raise ValueError(f"texts must be one for each of {len(queries)} motions, got {len(texts)}")
    if groups is not None and groups.shape != (len(texts),):
        raise ValueError(f"groups must have shape ({len(texts)},), got {tuple(groups.shape)}")
    if not isinstance(scale, Tensor) and not 0 < scale < math.inf:
        raise ValueError(f"scale must be > 0 and finite, got {scale}")
    ring = across_processes and is_distributed()
    count = len(texts)
    if ring:
        start = sum(row_counts(texts)[: rank()])
        to_texts = query_text_scores(queries, gather_with_gradient(texts)) * scale
        to_motions = query_text_scores(gather_with_gradient(queries), texts).T * scale
    else:
        start = 0
        to_texts = query_text_scores(queries, texts) * scale
        to_motions = to_texts.T
    own = torch.arange(start, start + count, device=texts.device)
    kept = torch.ones_like(to_texts, dtype=torch.bool)
    if groups is not None:
        mine, all_groups = joint_groups(groups, groups, ring)
        kept = mine[:, None] != all_groups
        kept[torch.arange(count, device=texts.device), own] = True
    losses = [
        _smoothed_cross_entropy(scores, own, kept, label_smoothing) for scores in (to_texts, to_motions)
    ]
    return reduced_total((losses[0] + losses[1]).sum() / 2, _count(losses[0], count), "mean", ring)


@torch.no_grad()
def hard_negatives(
    scores: Float[Tensor, "batch batch"],
    groups: Shaped[Tensor, " batch"] | None = None,
    *,
    generator: torch.Generator | None = None,
    order: Int[Tensor, " batch"] | None = None,
) -> HardNegatives:
    """Draw for each text a motion, and for each motion a text, that look right and are wrong: likelier, the higher their score.

    Of motions for text c by softmax over b of s_bc, of texts for motion b by softmax over c of s_bc. The own partner and all with the
    same text have probability 0, exactly. The draw is the argmax of scores plus Gumbel noise, which no rounding of probabilities can empty.

    Args:
        scores: s, of each motion (row) and text (column); scaled as for the contrastive loss. What is minus infinity is never drawn.
        groups: number of each text; pairs of equal number are never drawn. None: all texts differ.
        generator: of the draw.
        order: place of each row in the order in which noise is drawn; None: as they stand.

    Returns:
        Row numbers; -1 where nothing may be drawn, as in a batch of one.

    Raises:
        ValueError: if `groups` or `order` have another length.

    Examples:
        >>> found = hard_negatives(torch.zeros(3, 3), torch.tensor([0, 0, 1]))
        >>> found.text_of_motion.tolist()[:2], hard_negatives(torch.zeros(1, 1)).motion_of_text
        ([2, 2], tensor([-1]))
    """
    count = len(scores)
    for name, given in (("groups", groups), ("order", order)):
        if given is not None and given.shape != (count,):
            raise ValueError(f"{name} must have shape ({count},), got {tuple(given.shape)}")
    barred = torch.eye(count, dtype=torch.bool, device=scores.device)
    if groups is not None:
        barred = barred | (groups[:, None] == groups)
    drawn = []
    for table in (scores.T, scores):
        noise = gumbel_noise(scores, generator)
        if order is not None:
            noise = noise[order][:, order]
        table = (full_precision(table) + noise).masked_fill(barred, -math.inf)
        if count:
            best = table.max(1)
            drawn.append(best.indices.masked_fill(best.values == -math.inf, -1))
        else:
            drawn.append(table.new_zeros(0).long())
    return HardNegatives(*drawn)


def matching_loss(
    logits: Float[Tensor, "pairs queries 2"],
    matches: Bool[Tensor, " pairs"],
    *,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """Cross-entropy of telling pairs of motion and text that belong together from those that do not; logits are averaged over queries.

    Args:
        logits: of each query for "does not match" and "matches".
        matches: True for the pairs that belong together.
        across_processes: the mean is over the pairs of all processes.

    Returns:
        A scalar, at least float32; 0 without pairs.

    Raises:
        ValueError: if numbers of pairs differ.

    Examples:
        >>> logits = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
        >>> matching_loss(logits, torch.tensor([True]))  # log(1 + 1 / e)
        tensor(0.3133)
    """
    if len(matches) != len(logits):
        raise ValueError(f"matches must be one for each of {len(logits)} pairs, got {len(matches)}")
    mean = full_precision(logits).mean(1)
    ring = across_processes and is_distributed()
    total = F.cross_entropy(mean, matches.long(), reduction="sum")
    return reduced_total(total, _count(total, len(logits)), "mean", ring)


def prefix_lm_loss(
    logits: Float[Tensor, "batch text vocabulary"],
    words: Int[Tensor, "batch words"],
    end_id: int,
    *,
    padding_id: int | None = 0,
    label_smoothing: float = 0.1,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """Cross-entropy of each next word of a text that is written after a prefix, and of its end; padding does not count.

    Args:
        logits: one row more than there are words: row 0 belongs to the token in front and predicts word 0.
        words: ids, filled up with padding at the end.
        end_id: what follows the last word.
        padding_id: None if there is no padding.
        label_smoothing: in [0, 1).
        across_processes: the mean is over the words of all processes.

    Returns:
        A scalar in nats per word, at least float32.

    Raises:
        ValueError: if `logits` has another number of rows, or an option is out of range.

    Examples:
        >>> words = torch.tensor([[3, 0]])
        >>> logits = torch.tensor(
        ...     [[[0.0, 0, 0, 9], [0, 9, 0, 0], [9, 0, 0, 0]]]
        ... )  # word 3, then the end; the last row is not asked
        >>> prefix_lm_loss(logits, words, end_id=1, label_smoothing=0.0) < 0.001
        tensor(True)
    """
    _check_smoothing(label_smoothing)
    if logits.shape[:2] != (len(words), words.shape[1] + 1):
        raise ValueError(
            f"logits must have shape ({len(words)}, {words.shape[1] + 1}, vocabulary), got {tuple(logits.shape)}"
        )
    return _token_loss(logits, next_words(words, end_id, padding_id), label_smoothing, across_processes)


def next_words(
    words: Int[Tensor, "batch words"], end_id: int, padding_id: int | None = 0
) -> Int[Tensor, "batch text"]:
    """What each place of a text predicts, from the token in front on: the words, then the end, then -100.

    Examples:
        >>> next_words(torch.tensor([[5, 6, 0], [7, 8, 9]]), end_id=1).tolist()
        [[5, 6, 1, -100], [7, 8, 9, 1]]
    """
    valid = torch.ones_like(words, dtype=torch.bool) if padding_id is None else words != padding_id
    targets = F.pad(words.masked_fill(~valid, IGNORED), (0, 1), value=IGNORED)
    return targets.scatter(1, valid.sum(1, keepdim=True), end_id)


def query_token_loss(
    logits: Float[Tensor, "batch queries codes"],
    codes: Int[Tensor, "batch tokens"],
    *,
    label_smoothing: float = 0.1,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """Cross-entropy of the motion's token i, told by query i; tokens of -100 (padding) and queries beyond the last token do not count.

    Args:
        logits: over the codes of a motion tokenizer, for each query.
        codes: of the motion's tokens, in time order, -100 where there is none; at most as many as queries.
        label_smoothing: in [0, 1).
        across_processes: the mean is over the tokens of all processes.

    Returns:
        A scalar in nats per token, at least float32; 0 if no token counts.

    Raises:
        ValueError: for more tokens than queries, a code that does not exist, or an option out of range.

    Examples:
        >>> query_token_loss(torch.zeros(1, 3, 4), torch.tensor([[2, -100]]))  # log 4
        tensor(1.3863)
    """
    _check_smoothing(label_smoothing)
    if len(codes) != len(logits) or codes.shape[1] > logits.shape[1]:
        raise ValueError(
            f"codes must have {len(logits)} rows of at most {logits.shape[1]} tokens, one for each query, got {tuple(codes.shape)}"
        )
    if codes.numel() and not torch.compiler.is_compiling():
        wrong = (codes != IGNORED) & ((codes < 0) | (codes >= logits.shape[2]))
        if bool(wrong.any()):
            raise ValueError(
                f"codes must be -100 or in 0 .. {logits.shape[2] - 1}, got {int(codes[wrong][0])}"
            )
    return _token_loss(logits[:, : codes.shape[1]], codes, label_smoothing, across_processes)


def _token_loss(logits: Tensor, targets: Tensor, smoothing: float, across_processes: bool) -> Tensor:
    flat, wanted = full_precision(logits).flatten(0, 1), targets.flatten()
    total = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    count = (wanted != IGNORED).sum().to(total.dtype)
    return reduced_total(total, count, "mean", across_processes and is_distributed())


def _smoothed_cross_entropy(scores: Tensor, own: Tensor, kept: Tensor, smoothing: float) -> Tensor:
    """Of each row with its own column, among the kept columns; what torch has would take the smoothed share to infinity at a masked one."""
    spread = (scores * kept).sum(1) / kept.sum(1)
    aim = (1 - smoothing) * scores.gather(1, own[:, None])[:, 0] + smoothing * spread
    return torch.logsumexp(scores.masked_fill(~kept, -math.inf), 1) - aim


def _count(like: Tensor, count: int) -> Tensor:
    return like.new_full((), count)


def _check_smoothing(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {value}")


# Its value belongs to a batch, whose samples are each other's negatives: gradient accumulation must join batches, not average over them.
contrastive_max_loss.batch_statistic = True  # type: ignore[attr-defined]
