"""How near written sentences come to given ones: shared words (BLEU, ROUGE-L) and shared meaning (the core of BERTScore)."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.ops import full_precision, without_autocast


class MatchScores(NamedTuple):
    """Precision, recall and F1 of each pair of texts, each (pairs)."""

    precision: Tensor
    recall: Tensor
    f1: Tensor


def overlap_scores(candidates: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """BLEU-1, BLEU-4 and ROUGE-L of sentences against one or several references each.

    Words are what stands between spaces. BLEU is that of the whole corpus, without smoothing: 0 where no 4 words in a row are found anywhere.
    ROUGE-L is the mean F measure of the longest common subsequence, with the best reference.

    Args:
        candidates: sentences to be judged.
        references: for each of them a sentence, or several.

    Returns:
        `bleu@1`, `bleu@4` and `rouge_l`, in [0, 1].

    Raises:
        ValueError: if numbers differ, there is none, or a candidate has no reference.

    Source: Papineni et al. 2002; Lin 2004; computed by torchmetrics, which splits words for ROUGE at everything but letters and digits.

    Examples:
        >>> found = overlap_scores(["a person walks"], [["a person walks slowly", "someone goes"]])
        >>> {name: round(score, 3) for name, score in found.items()}  # short by one word
        {'bleu@1': 0.717, 'bleu@4': 0.0, 'rouge_l': 0.857}
    """
    from torchmetrics.functional.text import bleu_score, rouge_score

    listed = [[given] if isinstance(given, str) else list(given) for given in references]
    if not candidates or len(candidates) != len(listed):
        raise ValueError(
            f"references must be one for each of at least one candidate, got {len(listed)} for {len(candidates)}"
        )
    if not all(listed):
        raise ValueError("references must hold at least one sentence for each candidate, got none for one")
    found = {f"bleu@{n}": float(bleu_score(list(candidates), listed, n_gram=n)) for n in (1, 4)}
    rouge = rouge_score(list(candidates), listed, accumulate="best", rouge_keys="rougeL")
    return found | {"rouge_l": float(rouge["rougeL_fmeasure"])}


def inverse_document_frequencies(references: Sequence[Sequence[int]]) -> dict[int, float]:
    """Weight of each token: `log((M + 1) / (m + 1))` for a token that is in m of M reference texts.

    Tokens that are in none weigh log(M + 1): look them up with that as default.

    Examples:
        >>> {token: round(weight, 2) for token, weight in inverse_document_frequencies([[7, 8], [7]]).items()}
        {7: 0.0, 8: 0.41}
    """
    counts = Counter(token for text in references for token in set(text))
    return {token: math.log((len(references) + 1) / (count + 1)) for token, count in sorted(counts.items())}


def token_match_scores(
    candidates: Float[Tensor, "pairs words dim"],
    references: Float[Tensor, "pairs others dim"],
    candidate_valid: Bool[Tensor, "pairs words"] | None = None,
    reference_valid: Bool[Tensor, "pairs others"] | None = None,
    *,
    candidate_weights: Float[Tensor, "pairs words"] | None = None,
    reference_weights: Float[Tensor, "pairs others"] | None = None,
    baseline: float = 0.0,
) -> MatchScores:
    """The core of BERTScore, on token vectors of any encoder: each token is matched to the nearest one of the other text.

        P = sum_i w_i max_j cos(x_i, y_j) / sum_i w_i      over the candidate's tokens
        R = sum_j v_j max_i cos(x_i, y_j) / sum_j v_j      over the reference's
        F1 = 2 P R / (P + R), 0 where one is not above 0 and the other is;  each rescaled to (value - b) / (1 - b)

    Args:
        candidates: x, token vectors of the texts to be judged.
        references: y, of the texts they are held against.
        candidate_valid, reference_valid: False for padding; None: all count.
        candidate_weights, reference_weights: w and v, such as inverse document frequencies, >= 0; None: all equal. A text whose weights are
            all 0 is weighed evenly.
        baseline: b < 1, the value of texts that have nothing to do with each other.

    Returns:
        Each (pairs), at least float32; 0 (before rescaling) where a text has no token.

    Raises:
        ValueError: for a baseline >= 1, a negative weight, or shapes that do not fit.

    Source: Zhang et al. 2020, arXiv 1904.09675, section 3.

    Examples:
        >>> x, y = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
        >>> token_match_scores(x, y)
        MatchScores(precision=tensor([0.5000]), recall=tensor([1.]), f1=tensor([0.6667]))
    """
    if not -math.inf < baseline < 1:
        raise ValueError(f"baseline must be < 1 and finite, got {baseline}")
    if candidates.shape[0] != references.shape[0] or candidates.shape[2] != references.shape[2]:
        raise ValueError(
            f"references must be one text for each candidate, of equal width, got {tuple(references.shape)} for {tuple(candidates.shape)}"
        )
    shares = [
        _shares(vectors, valid, weights)
        for vectors, valid, weights in (
            (candidates, candidate_valid, candidate_weights),
            (references, reference_valid, reference_weights),
        )
    ]
    x, y = (F.normalize(full_precision(vectors), dim=2) for vectors in (candidates, references))
    with without_autocast(x.device):
        cosines = x @ y.to(x.dtype).transpose(1, 2)
    found = []
    for dim, own, other in ((2, 0, 1), (1, 1, 0)):
        missing = (shares[other] < 0)[:, None] if dim == 2 else (shares[other] < 0)[..., None]
        best = cosines.masked_fill(missing, -torch.inf).amax(dim) if cosines.shape[dim] else None
        if best is None:
            found.append(x.new_zeros(len(x)))
        else:
            best = best.masked_fill((best == -torch.inf) | (shares[own] < 0), 0.0)
            found.append((best * shares[own].clamp(min=0)).sum(1))
    precision, recall = found
    # Of values on either side of 0 a harmonic mean has no bounds; it nears 0 where one of them does.
    mixed = precision * recall <= 0
    f1 = torch.where(mixed, 0.0, 2 * precision * recall / torch.where(mixed, 1.0, precision + recall))
    return MatchScores(*((value - baseline) / (1 - baseline) for value in (precision, recall, f1)))


class TokenMatchScorer:
    """A BERTScore with a text encoder of one's own: give it to `caption_score`.

    Weights are inverse document frequencies in the references of a call; the baseline is the mean F1 of its different references, each paired
    with the one that stands half of them further on, so that 0 means "as unlike as two of the references".

    Args:
        encode: texts to token vectors: a list of texts -> (vectors (texts, words, dim), valid (texts, words), token ids (texts, words)).
        weighted: whether rare words count more.
        rescaled: whether the baseline is taken off.

    Returns:
        From `scorer(candidates, references)`: F1 of each pair, (pairs). Values of different encoders cannot be compared.

    Raises:
        ValueError: if numbers of texts differ.

    Examples:
        >>> def encode(texts):
        ...     ids = torch.tensor([[len(word) for word in text.split()] for text in texts])
        ...     return F.one_hot(ids, 9).float(), ids > 0, ids
        >>> scorer = TokenMatchScorer(encode, weighted=False, rescaled=False)
        >>> scorer(["a person walks", "a person goes"], ["a person walks", "a person walks"])
        tensor([1.0000, 0.6667])
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Any], *, weighted: bool = True, rescaled: bool = True
    ) -> None:
        self.encode, self.weighted, self.rescaled = encode, weighted, rescaled

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> Float[Tensor, " pairs"]:
        if len(candidates) != len(references):
            raise ValueError(
                f"references must be one for each of {len(candidates)} candidates, got {len(references)}"
            )
        texts, others = self.encode(candidates), self.encode(references)
        weights = {}
        if self.weighted:
            _, valid, ids = others
            rows = [row[keep].tolist() for row, keep in zip(ids, valid)]
            weights, unseen = inverse_document_frequencies(rows), math.log(len(rows) + 1)
        sides = []
        for vectors, valid, ids in (texts, others):
            table = None
            if self.weighted:
                table = vectors.new_tensor(
                    [[weights.get(token, unseen) for token in row] for row in ids.tolist()]
                )
            sides.append((vectors, valid, table))
        f1 = _f1(sides[0], sides[1])
        # References often stand in the order of what they say: a neighbour is no other text.
        rows = list({text: row for row, text in enumerate(references)}.values())
        if not self.rescaled or len(rows) < 2:
            return f1
        turned = rows[len(rows) // 2 :] + rows[: len(rows) // 2]
        first, second = (
            tuple(None if part is None else part[chosen] for part in sides[1]) for chosen in (turned, rows)
        )
        baseline = float(_f1(first, second).mean())
        return (f1 - baseline) / (1 - baseline) if baseline < 1 else f1


def caption_score(
    captioner: Callable[[Any], Sequence[str]],
    scorer: Callable[[Sequence[str], Sequence[str]], Tensor],
    motions: Any,
    texts: Sequence[str],
) -> float:
    """How well motions say what they were made from: they are described in words, and the words compared with the text (LaMP-BertScore).

    Args:
        captioner: writes a sentence for each of the motions.
        scorer: a value for each pair (written sentence, given text), such as `TokenMatchScorer`.
        motions: what the captioner takes.
        texts: what each motion should show.

    Returns:
        The mean over motions. It is only as good as captioner and scorer: name both beside it, with the value of real motions.

    Raises:
        ValueError: if the captioner does not write one sentence for each text.

    Source: Li et al. 2024 (LaMP), arXiv 2410.07093.

    Examples:
        >>> same = lambda written, given: torch.tensor([float(a == b) for a, b in zip(written, given)])
        >>> caption_score(
        ...     lambda motions: ["a person walks", "a person runs"], same, None, ["a person walks"] * 2
        ... )
        0.5
    """
    written = list(captioner(motions))
    if not texts or len(written) != len(texts):
        raise ValueError(
            f"captioner must write one sentence for each of at least one text, got {len(written)} for {len(texts)}"
        )
    return float(scorer(written, list(texts)).mean())


def _shares(vectors: Tensor, valid: Tensor | None, weights: Tensor | None) -> Tensor:
    """Each token's share of its text's weight, -1 for padding."""
    there = vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if valid is None else valid
    raw = full_precision(vectors).new_ones(vectors.shape[:2]) if weights is None else full_precision(weights)
    if raw.shape != there.shape or there.shape != vectors.shape[:2]:
        raise ValueError(
            f"masks and weights must have shape {tuple(vectors.shape[:2])}, got {tuple(raw.shape)}"
        )
    if bool((raw[there] < 0).any()):
        raise ValueError(f"weights must be >= 0, got {float(raw[there].min())}")
    raw = raw.masked_fill(~there, 0.0)
    total = raw.sum(1, keepdim=True)
    count = there.sum(1, keepdim=True).clamp(min=1)
    even = there.to(raw.dtype) / count
    return torch.where(total > 0, raw / torch.where(total > 0, total, 1.0), even).masked_fill(~there, -1.0)


def _f1(candidates: Sequence[Any], references: Sequence[Any]) -> Tensor:
    return token_match_scores(
        candidates[0],
        references[0],
        candidates[1],
        references[1],
        candidate_weights=candidates[2],
        reference_weights=references[2],
    ).f1
