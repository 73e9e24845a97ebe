"""Writes sentences about motions: what a query transformer read of a motion, as the first "words" of a language model (LaMP-M2T).

The outputs of the queries go through a linear layer to the width of the language model's embeddings and stand before the text; the model goes on
in words. Trained are the linear layer and the query transformer, and of the language model what its owner leaves trainable (the authors add
low-rank updates to a frozen OPT-2.7B; such a model is given as a callable from embeddings to logits, with whatever updates it carries).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.motion.generic_text import GenericTextEncoder
from coloss.motion.language_motion_losses import prefix_lm_loss
from coloss.motion.language_motion_model import LanguageMotionModel
from coloss.nn import CausalLanguageModel
from coloss.nn.beam_decoding import beam_search

EmbeddingsToLogits = Callable[[Tensor, Tensor], Tensor]
"""Embeddings (rows, tokens, dim) and which of them count (rows, tokens), to next-token logits (rows, tokens, vocabulary)."""


class FromEmbeddings(nn.Module):
    """A `CausalLanguageModel` that is given the vectors of its tokens in place of their ids.

    For a model of the transformers library the same is `lambda vectors, valid: model(inputs_embeds=vectors, attention_mask=valid).logits`.

    Args:
        language_model: used as it is, with its own parameters.

    Returns:
        From `forward(vectors, valid=None)`: logits (batch, tokens, vocabulary).

    Examples:
        >>> model = CausalLanguageModel(10, dim=8, depth=1, heads=2)
        >>> ids = torch.tensor([[3, 1, 4]])
        >>> bool((FromEmbeddings(model)(model.embedding(ids)) == model(ids)).all())
        True
    """

    def __init__(self, language_model: CausalLanguageModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self, vectors: Float[Tensor, "batch tokens dim"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        # The output of a module's hook stands in for its own: the ids below are never looked up.
        hook = self.language_model.embedding.register_forward_hook(lambda module, inputs, output: vectors)
        try:
            ids = torch.zeros(vectors.shape[:2], dtype=torch.int64, device=vectors.device)
            return self.language_model(ids, valid)
        finally:
            hook.remove()


class MotionCaptioner(nn.Module):
    """A language model that goes on in words after what the queries read of a motion.

    Args:
        motion_model: pretrained `LanguageMotionModel`; trained along, unless its parameters are frozen.
        embedding: the language model's word embedding, `nn.Embedding`.
        language_model: from embeddings to logits, a module (its parameters are trained along) or any callable; see `EmbeddingsToLogits`.
        begin_id: token before a sentence.
        end_id: token after it.
        padding_id: of the word ids that fill up a shorter sentence.

    Attributes:
        prefix: the linear layer from a query's output to an embedding.
        embedding: the language model's.

    Returns:
        From `forward((motion tokens, words))` or `forward((motion tokens, words, valid))`: logits (batch, 1 + words, vocabulary), row j for
        word j; train them with `caption_loss`.

    Raises:
        InputError: for an id outside the embedding.

    Source: Li et al. 2024 (LaMP), arXiv 2410.07093; Li et al. 2023 (BLIP-2), arXiv 2301.12597.

    Examples:
        >>> motion_model = LanguageMotionModel(30, motion_dim=6, max_tokens=4, dim=16, layers=2, heads=2)
        >>> captioner = MotionCaptioner.on(motion_model, GenericTextEncoder(30, dim=8, depth=1, heads=2))
        >>> motions, words = torch.randn(2, 4, 6), torch.randint(1, 30, (2, 5))
        >>> captioner((motions, words)).shape, captioner.write(motions, max_words=3, beams=2).shape
        (torch.Size([2, 6, 32]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        motion_model: LanguageMotionModel,
        embedding: nn.Embedding,
        language_model: nn.Module | EmbeddingsToLogits,
        *,
        begin_id: int,
        end_id: int,
        padding_id: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("begin_id", begin_id), ("end_id", end_id), ("padding_id", padding_id)):
            if not 0 <= value < embedding.num_embeddings:
                raise InputError(f"{name} must be in 0 .. {embedding.num_embeddings - 1}, got {value}")
        self.motion_model, self.language_model = motion_model, language_model
        owned = isinstance(language_model, nn.Module) and any(
            module is embedding for module in language_model.modules()
        )
        # A module registered under two names would be saved twice.
        self._embedding = (embedding,) if owned else nn.ModuleList([embedding])
        self.prefix = nn.Linear(motion_model.dim, embedding.embedding_dim)
        nn.init.trunc_normal_(
            self.prefix.weight, std=float(embedding.weight.detach().std()) * motion_model.dim**-0.5
        )
        nn.init.zeros_(self.prefix.bias)
        self.begin_id, self.end_id, self.padding_id = begin_id, end_id, padding_id

    @classmethod
    def on(cls, motion_model: LanguageMotionModel, text: GenericTextEncoder) -> "MotionCaptioner":
        """A captioner on the small language model of a `GenericTextEncoder`, which is trained along."""
        model = text.language_model
        return cls(
            motion_model,
            model.embedding,
            FromEmbeddings(model),
            begin_id=text.begin_id,
            end_id=text.end_id,
            padding_id=text.padding_id,
        )

    @property
    def embedding(self) -> nn.Embedding:
        """The language model's word embedding."""
        return self._embedding[0]  # type: ignore[return-value]

    def read(
        self,
        motions: Float[Tensor, "batch tokens motion_dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries embedding"]:
        """The prefix of each motion."""
        return self.prefix(self.motion_model.read_motion(motions, valid).queries)

    def forward(self, inputs: Any) -> Float[Tensor, "batch text vocabulary"]:
        motions, words, *rest = inputs
        prefix = self.read(motions, *rest)
        ids = F.pad(words, (1, 0), value=self.begin_id)
        return self._logits(prefix, ids, F.pad(words != self.padding_id, (1, 0), value=True))

    @torch.no_grad()
    def write(
        self,
        motions: Float[Tensor, "batch tokens motion_dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        *,
        max_words: int = 16,
        beams: int = 5,
        prompt: Int[Tensor, " words"] | None = None,
        length_penalty: float = 1.0,
    ) -> Int[Tensor, "batch max_words"]:
        """Word ids of the likeliest sentence for each motion that a beam search finds; padding after its end.

        Args:
            motions: tokens of the motion encoder.
            valid: False for padding.
            max_words: longest sentence, the prompt not counted.
            beams: of the search.
            prompt: words that every sentence begins with, such as "a person"; they are not repeated in the result.
            length_penalty: see `beam_search`.

        Raises:
            ValueError: for a number out of range.
        """
        with evaluation_mode(self):
            prefix = self.read(motions, valid)
            repeated = prefix.repeat_interleave(beams, 0)
            first = torch.tensor([self.begin_id], device=prefix.device)
            start = first if prompt is None else torch.cat([first, prompt.to(prefix.device)])

            def next_logits(ids: Tensor) -> Tensor:
                logits = self._logits(repeated, ids, torch.ones_like(ids, dtype=torch.bool))[:, -1].clone()
                # What is no word is never written.
                logits[:, [self.begin_id, self.padding_id]] = -torch.inf
                return logits

            found = beam_search(
                next_logits,
                start.expand(len(prefix), -1),
                end_id=self.end_id,
                max_tokens=max_words + 1,
                beams=beams,
                length_penalty=length_penalty,
            ).ids[:, 0]
        words = found.masked_fill((found == self.end_id) | (found < 0), self.padding_id)
        return words[:, :max_words]

    def _logits(self, prefix: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        vectors = torch.cat([prefix, self.embedding(ids).to(prefix.dtype)], 1)
        count = prefix.shape[1]
        return self.language_model(vectors, F.pad(valid, (count, 0), value=True))[:, count:]


def caption_loss(
    logits: Float[Tensor, "batch text vocabulary"],
    words: Int[Tensor, "batch words"],
    captioner: MotionCaptioner,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Cost of the given sentences, with their ends, in nats per word; the prefix does not count.

    Args:
        logits: of the captioner.
        words: ids of the sentences.
        captioner: knows ids of end and padding.
        label_smoothing: in [0, 1).

    Examples:
        >>> motion_model = LanguageMotionModel(30, motion_dim=6, max_tokens=4, dim=16, layers=2, heads=2)
        >>> captioner = MotionCaptioner.on(motion_model, GenericTextEncoder(30, dim=8, depth=1, heads=2))
        >>> words = torch.randint(1, 30, (2, 5))
        >>> caption_loss(torch.zeros(2, 6, 32), words, captioner)  # log 32
        tensor(3.4657)
    """
    return prefix_lm_loss(
        logits,
        words,
        captioner.end_id,
        padding_id=captioner.padding_id,
        label_smoothing=label_smoothing,
    )
