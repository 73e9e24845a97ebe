"""A text-motion evaluator to train on one's own data: the yardstick of generated motion, after Guo et al.

Motion and sentence become vectors whose distance is small where they belong together: convolutions and a recurrent network for motion, a recurrent
network over learned word vectors for text (the original's are GloVe with parts of speech). Frechet distance, R-precision and the other
measures of `coloss.metrics.generation` stand on these vectors. Numbers from different evaluators cannot be compared: name yours beside them.

    loss = mean over pairs that belong together of d^2 + mean over others of max(0, margin - d)^2,        d = |text - motion|

Clips with the same caption count as belonging to each other's texts nowhere: such pairs are left out, where the original, which compares each text
with its neighbour's motion in the batch, pushes them apart. Recurrent networks run on packed sequences in the order given: the original sorts by
length, so that texts must be sorted alike by the caller.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from coloss.errors import InputError
from coloss.ops import all_reduce_mean, gather_with_gradient, rank, without_autocast
from coloss.train.method import Method
from coloss.train.state import State

PAPER_EVALUATOR: Mapping[str, Any] = {
    "embed_dim": 512,
    "conv_width": 512,
    "motion_hidden": 1024,
    "text_hidden": 512,
    "word_dim": 300,
}
"""Sizes of Guo et al. 2022."""

SMALL_EVALUATOR: Mapping[str, Any] = {
    "embed_dim": 64,
    "conv_width": 64,
    "motion_hidden": 64,
    "text_hidden": 64,
    "word_dim": 32,
}
"""Sizes for about a thousand clips and a CPU; 64 dimensions leave the Frechet distance of 210 clips at full rank."""


class TextMotionEmbeddings(NamedTuple):
    """Vectors of paired motions and texts, each (pairs, embed_dim)."""

    motion: Tensor
    text: Tensor


class TextMotionEvaluator(nn.Module):
    """Embeds motion features and sentences in one space.

    Motion: twice a convolution of 4 frames with stride 2, a bidirectional GRU with a learned first state, its last states through a small
    network. Text: word vectors, the same kind of GRU and network.

    Args:
        in_dim: numbers of a frame, normalised.
        vocabulary: word ids are 0 .. vocabulary - 1.
        embed_dim: size of a vector.
        conv_width, motion_hidden, text_hidden, word_dim: sizes inside; hidden ones are of each direction.
        drop_last: numbers at the end of a frame that are not looked at: the four foot contacts.

    Returns:
        From `forward((features, lengths, words, word_lengths))`: `TextMotionEmbeddings`.

    Raises:
        ValueError: for a size out of range, other widths, other than one length for each clip or sentence, a length that is too short or beyond
            the padding, or a word outside the vocabulary.

    Source:
        Guo et al. 2022, "Generating Diverse and Natural 3D Human Motions from Text", CVPR 2022, section 4.

    Examples:
        >>> evaluator = TextMotionEvaluator(131, vocabulary=60, **SMALL_EVALUATOR)
        >>> motion = evaluator.embed_motion(torch.randn(2, 64, 131), torch.tensor([64, 40]))
        >>> text = evaluator.embed_text(torch.randint(60, (2, 9)), torch.tensor([9, 5]))
        >>> motion.shape, text.shape
        (torch.Size([2, 64]), torch.Size([2, 64]))
    """

    def __init__(
        self,
        in_dim: int,
        vocabulary: int,
        embed_dim: int = 512,
        *,
        conv_width: int = 512,
        motion_hidden: int = 1024,
        text_hidden: int = 512,
        word_dim: int = 300,
        drop_last: int = 4,
    ) -> None:
        super().__init__()
        if not 0 <= drop_last < in_dim:
            raise ValueError(f"drop_last must be in [0, {in_dim}), got {drop_last}")
        for name, value in (
            ("vocabulary", vocabulary),
            ("embed_dim", embed_dim),
            ("conv_width", conv_width),
            ("motion_hidden", motion_hidden),
            ("text_hidden", text_hidden),
            ("word_dim", word_dim),
        ):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.in_dim, self.vocabulary, self.drop_last = in_dim, vocabulary, drop_last
        self.first = nn.Conv1d(in_dim - drop_last, conv_width, 4, stride=2, padding=1)
        self.second = nn.Conv1d(conv_width, conv_width, 4, stride=2, padding=1)
        self.movement = nn.Linear(conv_width, conv_width)
        self.dropout = nn.Dropout(0.2)
        self.motion = _LastStates(conv_width, motion_hidden, embed_dim)
        self.words = nn.Embedding(vocabulary, word_dim)
        self.word = nn.Linear(word_dim, text_hidden)
        self.text = _LastStates(text_hidden, text_hidden, embed_dim)

    def forward(self, inputs: Sequence[Tensor]) -> TextMotionEmbeddings:
        features, lengths, words, word_lengths = inputs
        return TextMotionEmbeddings(
            self.embed_motion(features, lengths), self.embed_text(words, word_lengths)
        )

    def embed_motion(
        self, features: Float[Tensor, "clips frames numbers"], lengths: Int[Tensor, " clips"] | None = None
    ) -> Float[Tensor, "clips embed_dim"]:
        """Vectors of clips.

        Args:
            features: normalised; what fills up a clip does not matter.
            lengths: frames of each clip, >= 4; None where all are full.
        """
        if features.shape[2] != self.in_dim:
            raise ValueError(f"features must have {self.in_dim} numbers a frame, got {features.shape[2]}")
        lengths = _lengths(lengths, features, 4)
        x = _cut(features[..., : self.in_dim - self.drop_last].transpose(1, 2), lengths)
        x = _cut(self.dropout(F.leaky_relu(self.first(x), 0.2)), lengths // 2)
        x = _cut(self.dropout(F.leaky_relu(self.second(x), 0.2)), lengths // 4)
        return self.motion(self.movement(x.transpose(1, 2)), lengths // 4)

    def embed_text(
        self, words: Int[Tensor, "texts words"], lengths: Int[Tensor, " texts"] | None = None
    ) -> Float[Tensor, "texts embed_dim"]:
        """Vectors of sentences.

        Args:
            words: word ids; whatever stands after a sentence's end is not looked at, but must be in the vocabulary.
            lengths: words of each sentence, >= 1; None where all are full.
        """
        if words.numel() and not (int(words.min()) >= 0 and int(words.max()) < self.vocabulary):
            raise ValueError(
                f"words must be in [0, {self.vocabulary}), got {int(words.min())} to {int(words.max())}"
            )
        return self.text(self.word(self.words(words)), _lengths(lengths, words, 1))


def margin_contrastive_loss(
    text: Float[Tensor, "pairs dim"],
    motion: Float[Tensor, "pairs dim"],
    ids: Shaped[Tensor, " pairs"] | None = None,
    *,
    margin: float = 10.0,
) -> Float[Tensor, ""]:
    """Cost of paired vectors that are apart, and of others that are nearer than a margin.

    `mean_i d_ii^2 + mean_{i, j: id_i != id_j} max(0, margin - d_ij)^2` with Euclidean distances d. The second mean is over all texts and
    motions of the batch (and of all processes), where the original takes one motion for each text.

    Args:
        text: one vector for each pair.
        motion: likewise.
        ids: caption or class of each pair: those with one id are no negatives of each other. None: all differ.
        margin: > 0.

    Returns:
        A scalar, at least float32; a mean over nothing is 0.

    Raises:
        ValueError: for a margin that is not > 0.

    Source:
        Hadsell, Chopra, LeCun 2006; margin 10 as in the evaluator of Guo et al. 2022.

    Examples:
        >>> text = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> margin_contrastive_loss(text, text, margin=6.0)
        tensor(1.)
        >>> margin_contrastive_loss(text, text, torch.tensor([7, 7]), margin=6.0)
        tensor(0.)
    """
    if not margin > 0:
        raise ValueError(f"margin must be > 0, got {margin}")
    with without_autocast(text.device):
        wide = torch.promote_types(torch.promote_types(text.dtype, motion.dtype), torch.float32)
        text, motion = text.to(wide), motion.to(wide)
        own = torch.arange(len(text), device=text.device)
        ranks = gather_with_gradient(torch.full_like(own, rank()))
        own = own + (ranks < rank()).sum()
        everyone = gather_with_gradient(motion)
        names = own if ids is None else ids
        apart = names[:, None] != gather_with_gradient(names)
        apart[torch.arange(len(own)), own] = False
        distances = torch.cdist(text, everyone, compute_mode="donot_use_mm_for_euclid_dist")
        together = _mean_over_all((text - motion).square().sum(1), torch.ones_like(own, dtype=torch.bool))
        return together + _mean_over_all((margin - distances).clamp(min=0).square(), apart)


class TextMotionMatching(Method):
    """Trains a `TextMotionEvaluator` in `fit`, on inputs (features, lengths, words, word lengths); no targets are needed.

    The term is `contrastive`. Pairs with the same `extras["groups"]`, or without it with the same words, are no negatives of each other.

    Args:
        margin: > 0.

    Raises:
        ValueError: for a margin that is not > 0; `InputError` where the model gives no `TextMotionEmbeddings`.

    Examples:
        >>> import coloss
        >>> from coloss.data import IndexedDataset
        >>> features, words = torch.randn(16, 8, 9), torch.randint(5, (16, 3))
        >>> pairs = IndexedDataset((features, torch.full((16,), 8), words, torch.full((16,), 3)))
        >>> evaluator = TextMotionEvaluator(9, 5, 8, conv_width=8, motion_hidden=8, text_hidden=8, word_dim=4)
        >>> run = coloss.fit(evaluator, pairs, None, [TextMotionMatching()], budget=coloss.Budget(steps=2))
        >>> list(run.history[-1].terms)
        ['contrastive']
    """

    replaces_objective = True
    batch_statistic = True

    def __init__(self, margin: float = 10.0) -> None:
        super().__init__()
        if not margin > 0:
            raise ValueError(f"margin must be > 0, got {margin}")
        self.margin = margin

    def terms(self, state: State) -> dict[str, Tensor]:
        found = state.outputs
        if not isinstance(found, TextMotionEmbeddings):
            raise InputError(f"the model must give TextMotionEmbeddings, got {type(found).__name__}")
        ids = state.batch.extras.get("groups")
        if ids is None:
            _, _, words, lengths = state.batch.inputs
            ids = _text_ids(words, lengths)
        return {"contrastive": margin_contrastive_loss(found.text, found.motion, ids, margin=self.margin)}


class _LastStates(nn.Module):
    """A bidirectional GRU with a learned first state, and a small network on the last states of both directions."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first_state = nn.Parameter(torch.randn(2, 1, hidden))
        self.gru = nn.GRU(inputs, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(
            nn.Linear(2 * hidden, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, outputs),
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not len(x):
            return self.head(x.new_zeros(0, 2 * self.gru.hidden_size))
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        start = self.first_state.to(x.dtype).expand(-1, len(x), -1).contiguous()
        _, last = self.gru(packed, start)
        return self.head(torch.cat([last[0], last[1]], 1))


def _cut(x: Tensor, lengths: Tensor) -> Tensor:
    """Zeros after each clip's end (last dimension), as if it stood alone."""
    there = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
    return torch.where(there[:, None], x, 0.0)


def _lengths(lengths: Tensor | None, padded: Tensor, least: int) -> Tensor:
    if lengths is None:
        lengths = torch.full((len(padded),), padded.shape[1], device=padded.device)
    if lengths.shape != padded.shape[:1]:
        raise ValueError(f"lengths must have shape ({len(padded)},), got {tuple(lengths.shape)}")
    if len(lengths) and not (least <= int(lengths.min()) and int(lengths.max()) <= padded.shape[1]):
        raise ValueError(
            f"lengths must be in [{least}, {padded.shape[1]}], got {int(lengths.min())} to {int(lengths.max())}"
        )
    return lengths.to(padded.device)


def _text_ids(words: Tensor, lengths: Tensor) -> Tensor:
    """A number for each text that is the same for the same words, on every process."""
    places = torch.arange(words.shape[1], device=words.device)
    kept = torch.where(places < lengths.to(words.device)[:, None], words, -1)
    joined = gather_with_gradient(kept)
    ids = torch.unique(joined, dim=0, return_inverse=True)[1]
    ranks = gather_with_gradient(torch.full((len(words),), rank(), device=words.device))
    return ids[ranks == rank()]


def _mean_over_all(values: Float[Tensor, "*shape"], counted: Bool[Tensor, "*shape"]) -> Tensor:
    number = all_reduce_mean(counted.sum().to(values.dtype))
    return torch.where(counted, values, 0.0).sum() / torch.where(number > 0, number, 1.0)
