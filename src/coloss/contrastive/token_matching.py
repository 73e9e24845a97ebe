"""How well the patches of an image and the words of a caption go together, when a patch may serve few words."""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coloss.ops import full_precision, gather_with_gradient, hardest_keys, is_distributed, rank, sinkhorn
from coloss.ops.distributed import row_counts
from coloss.ops.loss_arguments import reduced

Solver = Literal["hungarian", "sinkhorn", "max"]

# Scores between patches and words that are held at once by default.
_SCORES = 2**22
_FORBIDDEN = -1e4


@torch.no_grad()
def match_tokens(
    scores: Float[Tensor, "*batch patches words"],
    word_mask: Bool[Tensor, "*batch words"] | None = None,
    patch_mask: Bool[Tensor, "*batch patches"] | None = None,
    *,
    capacity: int = 1,
    solver: Solver = "hungarian",
    epsilon: float = 0.05,
    iterations: int = 5,
) -> Float[Tensor, "*batch patches words"]:
    r"""Assign words to patches so that the matched scores are high in all, and no patch serves more than a few words.

    Args:
        scores: similarity of each patch and word.
        word_mask: True for words that count; padding gets no patch.
        patch_mask: True for patches that count.
        capacity: words that a patch may serve, >= 1; from the number of words on each word gets its best patch.
        solver: `"hungarian"` solves the assignment exactly, on the CPU; words beyond the patches' room stay without a patch.
            `"sinkhorn"` shares words out softly and in batches, patches near their capacity. `"max"` gives each word its best patch,
            without capacity.
        epsilon: of `"sinkhorn"`: near 0 it is hard.
        iterations: of `"sinkhorn"`.

    Returns:
        The assignment, at least float32, without gradient: columns of words sum to 1, to 0 for words without a patch.

    Raises:
        ValueError: for a capacity < 1 or an unknown solver, or scores that are NaN or infinite.

    Cost:
        `"hungarian"`: $O(\min(P, M)^2 \max(P, M))$ for each matrix, one after the other; the others O(P M) in batches.

    Source:
        The idea: Nie et al. 2023 (LightCLIP), arXiv 2312.00674; each word's best patch: Yao et al. 2022 (FILIP), arXiv 2111.07783.

    Examples:
        >>> scores = torch.tensor([[0.9, 0.8], [0.1, 0.7]])  # both words like the first patch best
        >>> match_tokens(scores).tolist(), match_tokens(scores, capacity=2).tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]])
    """
    if capacity < 1:
        raise ValueError(f"capacity must be >= 1, got {capacity}")
    if solver not in ("hungarian", "sinkhorn", "max"):
        raise ValueError(f'solver must be "hungarian", "sinkhorn" or "max", got {solver!r}')
    scores = full_precision(scores)
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite, got NaN or infinite ones")
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if word_mask is not None:
        allowed &= word_mask.unsqueeze(-2)
    if patch_mask is not None:
        allowed &= patch_mask.unsqueeze(-1)
    if not scores.numel():
        return torch.zeros_like(scores)
    if solver == "sinkhorn":
        # Words share themselves out over patches. A word that has no patch, or is none, counts for nothing.
        given = scores.masked_fill(~allowed, -math.inf).transpose(-1, -2)
        return sinkhorn(given, epsilon, iterations, capacity=float(capacity)).transpose(-1, -2)
    if solver == "max" or capacity >= scores.shape[-1]:
        best = scores.masked_fill(~allowed, _FORBIDDEN).argmax(-2, keepdim=True)
        return torch.zeros_like(scores).scatter_(-2, best, 1.0) * allowed
    flat, keep = (part.flatten(0, -3) if part.ndim > 2 else part[None] for part in (scores, allowed))
    assigned = np.zeros(flat.shape, dtype=bool)
    for matrix, open_pairs, found in zip(flat.double().cpu().numpy(), keep.cpu().numpy(), assigned):
        patches, words = np.flatnonzero(open_pairs.any(1)), np.flatnonzero(open_pairs.any(0))
        # A patch that may serve several words stands in as many rows.
        rows, columns = linear_sum_assignment(
            matrix[np.ix_(patches, words)].repeat(capacity, axis=0), maximize=True
        )
        found[patches[rows // capacity], words[columns]] = True
    return torch.from_numpy(assigned).to(scores).view(scores.shape)


def token_similarity(
    patches: Float[Tensor, "images patches dim"],
    words: Float[Tensor, "texts words dim"],
    word_mask: Bool[Tensor, "texts words"] | None = None,
    patch_mask: Bool[Tensor, "images patches"] | None = None,
    *,
    capacity: int = 1,
    solver: Solver = "hungarian",
    chunk_size: int | None = None,
) -> Float[Tensor, "images texts"]:
    r"""The mean score of the matched words of every image and every text.

    $S_{ij} = \sum_{pm} A^{ij}_{pm} \langle V_{ip}, W_{jm} \rangle / \sum_{pm} A^{ij}_{pm}$ with the assignment $A$ of `match_tokens`, which
    is not differentiated: gradients flow through the scores that it selects.

    Args:
        patches: $V$, unit vectors for cosines.
        words: $W$, likewise.
        word_mask: True for words that count.
        patch_mask: True for patches that count.
        capacity, solver: as for `match_tokens`.
        chunk_size: images at a time, >= 1; by default so many as keep about 4 million scores. Several chunks are made again in the
            backward pass.

    Returns:
        One score for each image and text, at least float32; 0 for a text without words.

    Raises:
        ValueError: if widths differ, or a value is out of range.

    Cost:
        $O(B^2 P M D)$ time and, for `"hungarian"`, $B^2$ assignments on the CPU; memory of one chunk of scores.

    Examples:
        >>> token_similarity(torch.eye(3)[None], torch.eye(3)[None, :2])
        tensor([[1.]])
    """
    if patches.shape[2] != words.shape[2]:
        raise ValueError(f"words must have width {patches.shape[2]}, got {words.shape[2]}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    images, texts = len(patches), len(words)
    if patch_mask is None:
        patch_mask = patches.new_ones(patches.shape[:2], dtype=torch.bool)
    if word_mask is None:
        word_mask = words.new_ones(words.shape[:2], dtype=torch.bool)
    size = chunk_size or max(1, _SCORES // max(1, texts * patches.shape[1] * words.shape[1]))

    def chunk(some: Tensor, some_mask: Tensor) -> Tensor:
        scores = torch.einsum("ipd,jmd->ijpm", full_precision(some), full_precision(words))
        every = word_mask.expand(len(some), *word_mask.shape)
        seen = some_mask.unsqueeze(1).expand(-1, texts, -1)
        return _matched_mean(scores, every, seen, capacity, solver)

    parts = list(zip(patches.split(size), patch_mask.split(size)))
    again = images > size and torch.is_grad_enabled()
    return torch.cat(
        [checkpoint(chunk, *part, use_reentrant=False) if again else chunk(*part) for part in parts]
    )


def token_contrastive_loss(
    patches: Float[Tensor, "pairs patches dim"],
    words: Float[Tensor, "pairs words dim"],
    images: Float[Tensor, "pairs joint"],
    texts: Float[Tensor, "pairs joint"],
    word_mask: Bool[Tensor, "pairs words"] | None = None,
    temperature: float | Float[Tensor, ""] = 0.07,
    *,
    candidates: int = 8,
    capacity: int = 1,
    solver: Solver = "hungarian",
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """InfoNCE both ways on the token similarity of each pair, against the candidates that look most alike as a whole.

    Args:
        patches: unit vectors, row i of pair i.
        words: likewise.
        images: embeddings of whole images, which choose the candidates; not differentiated.
        texts: likewise.
        word_mask: True for words that count.
        temperature: > 0: a number, or a scalar tensor that may be learned.
        candidates: texts that each image (and images that each text) is compared with, its own among them, >= 2. From the number of
            pairs on it is all of them.
        capacity, solver: as for `match_tokens`.
        across_processes: candidates from all processes of a run, whose tokens are then gathered.

    Returns:
        A scalar, at least float32; 0 for no pairs.

    Raises:
        ValueError: if shapes disagree or a value is out of range.

    Cost:
        O(B k P M D) time, and for `"hungarian"` 2 B k assignments on the CPU; memory of the gathered tokens and B k P M scores, made
        again in the backward pass.

    Examples:
        >>> tokens, pairs = torch.eye(4)[:, None], torch.eye(4)
        >>> loss = token_contrastive_loss(tokens, tokens, pairs, pairs, temperature=1.0, candidates=4)
        >>> round(loss.item(), 4)  # log(1 + 3 / e)
        0.7437
    """
    if candidates < 2:
        raise ValueError(f"candidates must be >= 2, got {candidates}")
    if not len(patches) == len(words) == len(images) == len(texts):
        counts = [len(part) for part in (patches, words, images, texts)]
        raise ValueError(f"patches, words, images and texts must be of as many pairs, got {counts}")
    if word_mask is None:
        word_mask = words.new_ones(words.shape[:2], dtype=torch.bool)
    ring = across_processes and is_distributed()
    start = sum(row_counts(patches)[: rank()]) if ring else 0
    every_patch, every_word, every_mask = (
        gather_with_gradient(part) if ring else part for part in (patches, words, word_mask.byte())
    )
    total, own = len(every_patch), torch.arange(start, start + len(patches), device=patches.device)
    k = min(candidates, total) - 1
    losses = []
    for queries, keys, to_text in ((images, texts, True), (texts, images, False)):
        others = own[:, None]
        if k > 0:
            ids = own, own
            _, found = hardest_keys(queries, keys, k, ids=ids, across_processes=ring)
            others = torch.cat([others, found], 1)
        # Less than k others are left to nobody: there are total - 1 of them.
        row = own[:, None].expand_as(others)
        of_image, of_text = (row, others) if to_text else (others, row)
        scores = _of_pairs(every_patch, every_word, every_mask.bool(), of_image, of_text, capacity, solver)
        losses.append((scores / temperature).logsumexp(1) - scores[:, 0] / temperature)
    return reduced((losses[0] + losses[1]) / 2, None, "mean", ring)


def _of_pairs(
    patches: Tensor,
    words: Tensor,
    mask: Tensor,
    image: Int[Tensor, "rows candidates"],
    text: Int[Tensor, "rows candidates"],
    capacity: int,
    solver: Solver,
) -> Tensor:
    """Token similarity of listed pairs."""

    def chunk(some_image: Tensor, some_text: Tensor) -> Tensor:
        scores = torch.einsum(
            "npd,nmd->npm", full_precision(patches[some_image]), full_precision(words[some_text])
        )
        return _matched_mean(scores, mask[some_text], None, capacity, solver)

    size = max(1, _SCORES // max(1, patches.shape[1] * words.shape[1]))
    parts = list(zip(image.flatten().split(size), text.flatten().split(size)))
    again = len(parts) > 1 and torch.is_grad_enabled()
    found = [checkpoint(chunk, *part, use_reentrant=False) if again else chunk(*part) for part in parts]
    return torch.cat(found).view(image.shape)


def _matched_mean(
    scores: Tensor, word_mask: Tensor, patch_mask: Tensor | None, capacity: int, solver: Solver
) -> Tensor:
    assigned = match_tokens(scores.detach(), word_mask, patch_mask, capacity=capacity, solver=solver)
    return (assigned * scores).sum((-1, -2)) / assigned.sum((-1, -2)).clamp(min=1e-6)
