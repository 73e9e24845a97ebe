r"""A small language model that rewrites texts towards a wanted label, and can be trained through what classifiers make of its words.

The text-to-text part of data-free distillation (see `data_free_distillation`). All words of a text are written at once, as by a masked
language model, so that no gradient has to run through a chain of draws.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data import WordVocabulary
from coloss.errors import InputError
from coloss.metrics import predict
from coloss.nn import TokenEncoder, Words
from coloss.nn.causal_language_model import next_token_loss
from coloss.ops import gumbel_noise, soft_embed, straight_through_tokens
from coloss.train.method import Method
from coloss.train.state import State

PADDING, MASK = WordVocabulary.padding_id, WordVocabulary.mask_id
# Padding, the unknown word and the mask come before all words.
SPECIAL = 3


class Written(NamedTuple):
    """Texts that a rewriter wrote.

    Attributes:
        tokens: (batch, length, vocabulary), exactly one-hot, with the gradient of a soft choice; padding where the source has padding.
        logits: (batch, length, vocabulary), what the words were drawn from.
        read: (batch, length), the source as the rewriter saw it, words hidden.
    """

    tokens: Tensor
    logits: Tensor
    read: Tensor

    @property
    def ids(self) -> Tensor:
        """(batch, length), the words as numbers."""
        return self.tokens.argmax(-1)


class TextRewriter(nn.Module):
    r"""A masked language model that reads a text, partly hidden, and a wanted label, and offers words for every place.

    Logits of the word at a place are those of a transformer that reads label and text, plus $c W_y$: a preference of each label $y$ for
    each word. What a label adds is 0 at first; without labels the language model stands alone. With $c > 1$ preferences learn faster than
    the network does at one learning rate. A text keeps its length; padding, the unknown word and the mask are never written.

    Args:
        vocabulary_size: ids of the words as the classifiers know them, the three special ones included.
        num_labels: labels that can be asked for.
        length: longest text, in words.
        dim, depth, heads: of the transformer.
        hidden: share of the words of a source that are hidden, in [0, 1].
        preference_scale: $c > 0$.

    Returns:
        From `forward(texts, labels=None)`: logits (batch, length, vocabulary_size), $-\infty$ for what is never written.

    Raises:
        ValueError: if a value is out of range, or there is no word besides the special ones.

    Examples:
        >>> rewriter = TextRewriter(50, num_labels=3, length=6, dim=16, depth=1, heads=2)
        >>> texts, labels = torch.tensor([[7, 2, 9, 0]]), torch.tensor([1])
        >>> written = rewriter.write(texts, labels, generator=torch.Generator().manual_seed(0))
        >>> rewriter(texts, labels).shape, (written.ids >= 3).tolist()
        (torch.Size([1, 4, 50]), [[True, True, True, False]])
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_labels: int,
        length: int,
        dim: int = 32,
        depth: int = 1,
        heads: int = 4,
        *,
        hidden: float = 0.5,
        preference_scale: float = 10.0,
    ) -> None:
        super().__init__()
        if vocabulary_size <= SPECIAL:
            raise ValueError(f"vocabulary_size must be > {SPECIAL}, the special ids, got {vocabulary_size}")
        if num_labels < 1:
            raise ValueError(f"num_labels must be >= 1, got {num_labels}")
        if not 0 <= hidden <= 1:
            raise ValueError(f"hidden must be in [0, 1], got {hidden}")
        if not preference_scale > 0:
            raise ValueError(f"preference_scale must be > 0, got {preference_scale}")
        words = Words(vocabulary_size, dim, max_length=length)
        self.encoder = TokenEncoder(words, dim, depth, heads, pool="none")
        self.labels = nn.Embedding(num_labels, dim)
        nn.init.zeros_(self.labels.weight)
        self.output = nn.Linear(dim, vocabulary_size)
        self.preferences = nn.Parameter(torch.zeros(num_labels, vocabulary_size))
        self.num_labels, self.hidden, self.preference_scale = num_labels, hidden, preference_scale

    def forward(
        self, texts: Int[Tensor, "batch length"], labels: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch length vocabulary"]:
        tokens = self.encoder.tokenizer(texts)
        if labels is not None:
            tokens = tokens + self.labels(labels)[:, None]
        logits = self.output(self.encoder.forward_tokens(tokens, padding=texts == PADDING))
        if labels is not None:
            logits = logits + self.preference_scale * self.preferences[labels][:, None]
        special = torch.arange(logits.shape[-1], device=logits.device) < SPECIAL
        return logits.masked_fill(special, float("-inf"))

    def write(
        self,
        source: Int[Tensor, "batch length"],
        labels: Int[Tensor, " batch"],
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Written:
        """Draw a text for each source and label.

        Args:
            source: texts to rewrite, filled up with 0; words are hidden here.
            labels: wanted, in [0, num_labels).
            temperature: of the soft choice that gives the gradients; the draw itself is at temperature 1.
            generator: of all draws.
        """
        read = hide_words(source, self.hidden, generator)
        logits = self(read, labels)
        tokens = straight_through_tokens(logits, temperature, noise=gumbel_noise(logits, generator))
        nothing = F.one_hot(torch.zeros_like(source), logits.shape[-1]).to(tokens.dtype)
        return Written(torch.where((source == PADDING)[..., None], nothing, tokens), logits, read)


def hide_words(
    texts: Int[Tensor, "batch length"], share: float, generator: torch.Generator | None = None
) -> Int[Tensor, "batch length"]:
    """Texts with each word replaced by the mask with some probability; padding stays.

    Args:
        texts: ids, filled up with 0.
        share: probability in [0, 1].
        generator: of the draws.

    Examples:
        >>> hide_words(torch.tensor([[7, 8, 0]]), 1.0)
        tensor([[2, 2, 0]])
    """
    device = "cpu" if generator is None else generator.device
    drawn = torch.rand(texts.shape, generator=generator, device=device).to(texts.device)
    return texts.masked_fill((drawn < share) & (texts != PADDING), MASK)


class RewritingPretraining(Method):
    """Teaches a `TextRewriter` to restore texts of which some words are hidden, without labels.

    The stage before data-free distillation, on public text without unknown words. Targets are not looked at. As many words are hidden as
    the rewriter hides later (`rewriter.hidden`). Each sample stands for itself, so several processes train as one would, up to their draws.

    Examples:
        >>> from coloss import Budget, fit
        >>> rewriter = TextRewriter(20, num_labels=2, length=4, dim=16, depth=1, heads=2)
        >>> texts = torch.randint(3, 20, (64, 4))
        >>> run = fit(rewriter, (texts, texts), methods=[RewritingPretraining()], budget=Budget(steps=3))
        >>> sorted(run.history[-1].terms)
        ['rewriting']
    """

    replaces_objective = True
    reads_outputs = False

    def terms(self, state: State) -> dict[str, Tensor]:
        rewriter, texts = state.model, state.batch.inputs
        assert isinstance(rewriter, TextRewriter)
        logits = rewriter(hide_words(texts, rewriter.hidden, state.local_generator))
        return {"rewriting": next_token_loss(logits, texts.masked_fill(texts == PADDING, -100))}


def read_tokens(
    network: nn.Module,
    tokens: Float[Tensor, "batch length vocabulary"],
    embedding: nn.Embedding | None = None,
) -> Tensor:
    """What a network makes of one-hot tokens, with gradients to them: any network that embeds ids, as it is.

    The network is called with the ids of the tokens, and the output of its embedding is replaced by weights times table during the call.
    Masks that the network makes of the ids are those of the hard text, so that nothing after its end has a gradient.

    Args:
        network: called as `network(ids)`.
        tokens: one-hot over the vocabulary, such as of `coloss.ops.straight_through_tokens`.
        embedding: of the words in the network; None finds it, see `word_embedding`.

    Raises:
        InputError: if there is no embedding of this vocabulary, or more than one.

    Examples:
        >>> network = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
        >>> ids = torch.tensor([[3, 8, 0]])
        >>> tokens = F.one_hot(ids, 9).float().requires_grad_()
        >>> torch.equal(read_tokens(network, tokens), network(ids))
        True
    """
    embedding = word_embedding(network, tokens.shape[-1]) if embedding is None else embedding
    handle = embedding.register_forward_hook(lambda module, args, output: soft_embed(tokens, module.weight))
    try:
        return network(tokens.argmax(-1))
    finally:
        handle.remove()


def word_embedding(network: nn.Module, vocabulary_size: int, path: str | None = None) -> nn.Embedding:
    """The one `nn.Embedding` of a network that has as many rows as the vocabulary.

    Args:
        network: that reads words.
        vocabulary_size: rows.
        path: of the module in the network, where several have so many rows; None: there is one.

    Raises:
        InputError: if there is none, or more than one and no path, or the path names none of them.

    Examples:
        >>> word_embedding(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), 9)
        Embedding(9, 4)
    """
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary_size
    }
    if path is None and len(found) == 1:
        (path,) = found
    if path is None or path not in found:
        names = f": {', '.join(found)}" if found else ""
        raise InputError(
            f"{type(network).__name__} must have one nn.Embedding with the {vocabulary_size} rows of the vocabulary"
            f"{'' if path is None else f' at {path!r}'}, got {len(found)}{names}"
        )
    return found[path]


def distinct_share(ids: Int[Tensor, "texts length"], n: int = 2) -> float:
    """Different runs of n words among all runs of n words: near 0 for one slogan again and again, 1 where nothing is said twice.

    Args:
        ids: texts, filled up with 0.
        n: words in a run, >= 1.

    Returns:
        In (0, 1]; NaN if no text has n words.

    Raises:
        ValueError: if n is below 1.

    Source: distinct-n of Li et al. 2016, arXiv 1510.03055.

    Examples:
        >>> (
        ...     round(distinct_share(torch.tensor([[5, 5, 5, 5, 0]])), 3),
        ...     distinct_share(torch.tensor([[5, 6, 7, 8, 0]])),
        ... )
        (0.333, 1.0)
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    if ids.shape[1] < n:
        return float("nan")
    runs = ids.unfold(1, n, 1).flatten(0, 1)
    runs = runs[(runs != PADDING).all(1)]
    return len(runs.unique(dim=0)) / len(runs) if len(runs) else float("nan")


def write_texts(
    rewriter: TextRewriter,
    teacher: nn.Module,
    sources: Int[Tensor, "texts length"],
    *,
    min_confidence: float = 0.7,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "kept length"], Float[Tensor, "kept classes"]]:
    """Texts to keep, for any other student: one for each source, labels in turn; the doubtful and the repeated are left out.

    Args:
        rewriter: trained.
        teacher: reads each text once.
        sources: public texts as ids, at least one.
        min_confidence: probability in [0, 1) that the teacher's likeliest label must exceed.
        generator: of the draws.

    Returns:
        Texts, and the teacher's logits to distil from.

    Raises:
        InputError: if there is no source, or `min_confidence` is out of range.

    Examples:
        >>> rewriter = TextRewriter(30, num_labels=2, length=4, dim=16, heads=2)
        >>> teacher = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(32, 2))
        >>> texts, logits = write_texts(rewriter, teacher, torch.randint(3, 30, (10, 4)), min_confidence=0.0)
        >>> texts.shape[1], logits.shape[1]
        (4, 2)
    """
    if not 0 <= min_confidence < 1:
        raise InputError(f"min_confidence must be in [0, 1), got {min_confidence}")
    if not len(sources):
        raise InputError("sources must hold at least one text, got none")
    labels = torch.arange(len(sources)) % rewriter.num_labels
    device = next(rewriter.parameters()).device
    parts = []
    with torch.no_grad():
        for some, wanted in zip(sources.split(512), labels.split(512), strict=True):
            parts.append(rewriter.write(some.to(device), wanted.to(device), generator=generator).ids.cpu())
    texts = torch.cat(parts)
    # In the order of their first writing.
    _, group = torch.unique(texts, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(texts)).scatter_reduce(
        0, group, torch.arange(len(texts)), "amin"
    )
    texts = texts[first.sort().values]
    logits = predict(teacher, texts).outputs
    kept = logits.float().softmax(1).amax(1) > min_confidence
    return texts[kept], logits[kept]
