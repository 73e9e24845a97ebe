"""Teaches a query transformer what texts and motions have to do with each other, by four losses in one step (LaMP, second stage).

Li et al. 2024, arXiv 2410.07093. With a frozen motion encoder's tokens as memory M of the queries, U_m what the queries read, U_t the text read
alone, h and g their projections:

    contrastive       texts and motions of a batch find each other by  s = scale * max_k cos(h_k, g)
    matching          true pairs against pairs with a hard negative, read by queries and words together
    captioning        the next word, after what the queries read
    token_prediction  the code of motion token i, told by query i from the text's word embeddings alone
    total             their sum

Set right, against the released code: a true pair, or one with the same text, is never drawn as a negative, and does not count as one in the
contrastive loss; padding is neither memory nor target; a batch of one works. The scale is learned as its logarithm, from 1 / 0.07 on and up
to 100, as in CLIP; the released code multiplies by log(1 / 0.07) = 2.66 and learns that: `scale=2.66` starts there.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.data.dataset import IndexedDataset
from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.motion.language_motion_losses import (
    IGNORED,
    contrastive_max_loss,
    hard_negatives,
    matching_loss,
    prefix_lm_loss,
    query_text_scores,
    query_token_loss,
)
from coloss.motion.language_motion_model import LanguageMotionModel
from coloss.nn import Frozen
from coloss.ops import dealt_places, gather_with_gradient, is_distributed, own_place
from coloss.train.method import Method
from coloss.train.schedules import Schedule
from coloss.train.state import State

Term = Literal["contrastive", "matching", "captioning", "token_prediction"]

TERMS: tuple[Term, ...] = get_args(Term)
"""The four losses."""

_LARGEST_SCALE = 100.0


class MotionTokens(NamedTuple):
    """A motion as its frozen encoder gives it: vectors float (clips, tokens, dim), and code numbers int64 (clips, tokens), -1 at padding."""

    vectors: Tensor
    codes: Tensor


@torch.no_grad()
def read_motion_tokens(
    tokenizer: Any,
    features: Float[Tensor, "clips frames numbers"],
    lengths: Int[Tensor, " clips"] | None = None,
) -> MotionTokens:
    """Encoder outputs and codes of clips, without gradient.

    Args:
        tokenizer: in evaluation mode; gives `encode(features, lengths)`, vectors (clips, tokens, dim), and `tokens(features, lengths)`,
            codes (clips, tokens) or (clips, tokens, levels), of which the first level is taken: `MotionVQVAE`, or one of your own.
        features: normalised.
        lengths: frames of each clip; None where all are full.

    Examples:
        >>> from coloss.motion.motion_tokenizer import MotionVQVAE
        >>> tokenizer = MotionVQVAE(9, 8, 1, codes=16, code_dim=4).eval()
        >>> found = read_motion_tokens(tokenizer, torch.randn(2, 12, 9), torch.tensor([12, 4]))
        >>> found.vectors.shape, (found.codes < 0).tolist()
        (torch.Size([2, 3, 4]), [[False, False, False], [False, True, True]])
    """
    vectors, codes = tokenizer.encode(features, lengths), tokenizer.tokens(features, lengths)
    return MotionTokens(vectors, codes if codes.ndim == 2 else codes[..., 0])


def encode_motions(tokenizer: nn.Module, data: IndexedDataset, *, chunk: int = 256) -> IndexedDataset:
    """The same clips and texts with every clip encoded once, which saves most of the time where frames are not drawn anew in each epoch.

    Args:
        tokenizer: as for `read_motion_tokens`; it is used in evaluation mode.
        data: inputs features (clips, frames, numbers), or (features, lengths), as `TextMotion.dataset` makes them.
        chunk: clips encoded at a time, >= 1.

    Returns:
        Inputs are vectors (clips, tokens, dim), with the further extra `codes`; ids and the other extras stay.

    Raises:
        ValueError: for a chunk below 1.

    Examples:
        >>> from coloss.motion.motion_tokenizer import MotionVQVAE
        >>> data = IndexedDataset(torch.randn(5, 12, 9), extras={"words": torch.randint(1, 7, (5, 4))})
        >>> found = encode_motions(MotionVQVAE(9, 8, 1, codes=16, code_dim=4), data)
        >>> found.inputs.shape, sorted(found.extras)
        (torch.Size([5, 3, 4]), ['codes', 'words'])
    """
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    features, lengths = _clips(data.inputs)
    like = next(tokenizer.parameters(), features)
    parts = []
    with evaluation_mode(tokenizer):
        for start in range(0, len(features), chunk):
            rows = slice(start, start + chunk)
            found = read_motion_tokens(
                tokenizer, features[rows].to(like.device), None if lengths is None else lengths[rows]
            )
            parts.append([part.to(features.device) for part in found])
    vectors, codes = (torch.cat(column) for column in zip(*parts, strict=True))
    return IndexedDataset(vectors, ids=data.ids, extras=data.extras | {"codes": codes})


def drawn_captions(
    words: Int[Tensor, "clips captions words"],
    counts: Int[Tensor, " clips"],
    uniform: Float[Tensor, " clips"],
) -> Int[Tensor, "clips words"]:
    """Of each clip's captions the one that a number in [0, 1) falls to, all of them having equal shares.

    Args:
        words: ids of the captions.
        counts: how many of them each clip has, at least 1 and the first ones.
        uniform: the numbers.

    Examples:
        >>> words = torch.tensor([[[1], [2], [3]], [[4], [0], [0]]])
        >>> drawn_captions(words, torch.tensor([3, 1]), torch.tensor([0.4, 0.9])).tolist()
        [[2], [4]]
    """
    chosen = (uniform.to(counts.device) * counts).long().clamp(max=words.shape[1] - 1)
    return words[torch.arange(len(words), device=words.device), chosen]


class LanguageMotionPretraining(Method):
    """Trains a `LanguageMotionModel` by its four losses, in place of an objective.

    What a batch holds, as `TextMotion.dataset` and `encode_motions` make it (all widths equal throughout):

        inputs            features (batch, frames, numbers) or (features, lengths), with a tokenizer; without: vectors (batch, tokens, dim)
        codes             without a tokenizer: int64 (batch, tokens), -1 at padding
        words             int64 (batch, words), or (batch, captions, words), of which one caption of each clip is drawn
        caption_counts    int64 (batch), how many of these captions a clip has; all, if it is not there
        groups            int64 (batch), equal for clips whose texts mean the same; equal word ids count as the same text in any case

    Args:
        num_codes: of the motion tokenizer.
        tokenizer: frozen motion encoder, see `read_motion_tokens`, which reads every batch anew; None: the data hold what it gave.
        losses: those of the four to use. What is left out costs nothing, but that matching needs the contrastive scores to draw negatives.
        weights: of terms, 1 by default: numbers or schedules.
        scale: of cosines at the start, > 0; learned, see above.
        label_smoothing: of all losses but matching, in [0, 1).
        across_processes: False compares with and draws from each process's own rows.

    Attributes:
        match_head, code_head: used in training only; `log_scale`: of the cosines.

    Raises:
        InputError: for a value out of range; in a run, for another model, data without words or codes, or accumulated micro-batches.
        ValueError: in a run, for more tokens than queries.

    Cost:
        All four: the queries read twice, the text once alone and once behind the queries, and three times the batch jointly.

    Several processes take the steps of one with the joined batch (dropout apart), also in which negatives are drawn: memories and texts are
    gathered with gradients.

    Source: Li et al. 2024, arXiv 2410.07093; Li et al. 2023 (BLIP-2), arXiv 2301.12597.

    Examples:
        >>> import coloss
        >>> model = LanguageMotionModel(30, motion_dim=6, max_tokens=4, dim=16, layers=2, heads=2)
        >>> motions, words = torch.randn(12, 4, 6), torch.randint(1, 30, (12, 5))
        >>> data = IndexedDataset(motions, extras={"words": words, "codes": torch.randint(9, (12, 4))})
        >>> run = coloss.fit(
        ...     model, data, None, [LanguageMotionPretraining(9)], budget=coloss.Budget(steps=2), batch_size=6
        ... )
        >>> sorted(run.history[-1].terms)
        ['captioning', 'contrastive', 'matching', 'token_prediction']
    """

    replaces_objective = True
    reads_outputs = False
    batch_statistic = True

    def __init__(
        self,
        num_codes: int,
        *,
        tokenizer: nn.Module | None = None,
        losses: Sequence[Term] = TERMS,
        weights: dict[str, Schedule] | None = None,
        scale: float = 1 / 0.07,
        label_smoothing: float = 0.1,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        if num_codes < 1:
            raise InputError(f"num_codes must be >= 1, got {num_codes}")
        for name in (*losses, *(weights or {})):
            if name not in TERMS:
                raise InputError(f"losses must be of {', '.join(TERMS)}, got {name!r}")
        if not losses:
            raise InputError("losses must name at least one of the four, got none")
        if not 0 < scale <= _LARGEST_SCALE:
            raise InputError(f"scale must be in (0, {_LARGEST_SCALE:g}], got {scale}")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.num_codes, self.losses, self.label_smoothing = num_codes, frozenset(losses), label_smoothing
        self.across_processes, self.first_scale = across_processes, float(scale)
        self.tokenizer = None if tokenizer is None else Frozen(tokenizer)
        self.term_weights = dict(weights or {})
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.match_head: nn.Linear | None = None
        self.code_head: nn.Linear | None = None

    def setup(self, state: State) -> None:
        model = _model(state)
        with torch.no_grad():
            self.log_scale.fill_(math.log(self.first_scale))
        self.match_head = state.like_model(nn.Linear(model.dim, 2)) if "matching" in self.losses else None
        self.code_head = (
            state.like_model(nn.Linear(model.dim, self.num_codes))
            if "token_prediction" in self.losses
            else None
        )

    def on_batch(self, state: State) -> None:
        """The motions become their tokens' vectors, and one caption of each clip stays: what the model and other methods see."""
        with torch.no_grad():
            # The parameter, not only what is read of it: beyond the limit it would get no gradient, and so never come back.
            self.log_scale.clamp_(max=math.log(_LARGEST_SCALE))
        motion = self._motion(state.batch)
        words = self._captions(state, len(motion.codes))
        extras = {**state.batch.extras, "codes": motion.codes, "words": words}
        state.batch = replace(state.batch, inputs=motion.vectors, extras=extras)

    def terms(self, state: State) -> dict[str, Tensor]:
        if state.graph_is_cut:
            raise InputError(
                "the pairs of a step must be read together: use accumulate=1 and a larger batch_size"
            )
        model = _model(state)
        network = model.transformer
        motion = MotionTokens(state.batch.inputs, state.batch.extras["codes"])
        words = state.batch.extras["words"]
        valid = motion.codes >= 0
        found: dict[str, Tensor] = {}
        memory = model.motion_memory(motion.vectors.to(model.motion_projection.weight.dtype), valid)
        reading = network.read_memory(memory, valid)
        if self.losses & {"contrastive", "matching"}:
            queries = model.motion_head(reading.queries)
            texts = model.text_head(network.read_text(words)[:, 0])
            groups = self._groups(state.batch, words)
            if "contrastive" in self.losses:
                found["contrastive"] = contrastive_max_loss(
                    queries,
                    texts,
                    self.scale(),
                    groups=groups,
                    label_smoothing=self.label_smoothing,
                    across_processes=self.across_processes,
                )
            if "matching" in self.losses:
                found["matching"] = self._matching(state, memory, valid, words, queries, texts, groups)
        if "captioning" in self.losses:
            logits = network.word_logits(network.continue_text(words, reading.key_values))
            found["captioning"] = prefix_lm_loss(
                logits,
                words,
                network.end_id,
                padding_id=network.padding_id,
                label_smoothing=self.label_smoothing,
                across_processes=self.across_processes,
            )
        if self.code_head is not None:
            told = self.code_head(model.read_text_by_queries(words))
            found["token_prediction"] = query_token_loss(
                told,
                motion.codes.masked_fill(~valid, IGNORED),
                label_smoothing=self.label_smoothing,
                across_processes=self.across_processes,
            )
        return self._reaching_all(found, model)

    def scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by at present, at most 100."""
        return self.log_scale.clamp(max=math.log(_LARGEST_SCALE)).exp()

    def _motion(self, batch: Batch) -> MotionTokens:
        motions, lengths = _clips(batch.inputs)
        if self.tokenizer is not None:
            return read_motion_tokens(self.tokenizer.module, motions, lengths)
        return MotionTokens(motions, _extra(batch, "codes", motions.shape[:2]))

    def _captions(self, state: State, count: int) -> Tensor:
        """One text for each clip (batch, words)."""
        words = _extra(state.batch, "words", (count,))
        if words.ndim == 2:
            return words
        counts = state.batch.extras.get("caption_counts", words.new_full((count,), words.shape[1]))
        return drawn_captions(words, counts, self._uniform(state, words))

    def _uniform(self, state: State, rows: Tensor) -> Tensor:
        """A number in [0, 1) for each of this process's rows: those that one process would draw for the joined batch."""
        places = dealt_places(rows, self.across_processes)
        generator = state.generator if self.across_processes else state.local_generator
        drawn = torch.rand(sum(map(len, places)), generator=generator, device=generator.device).cpu()
        return drawn[places[own_place(places)]]

    def _groups(self, batch: Batch, words: Tensor) -> Tensor:
        """Numbers of the texts' meanings, equal for equal ones; of the joined batch where rows are compared across processes."""
        given = batch.extras.get("groups")
        rows = _own_rows(dealt_places(words, self.across_processes)).to(words.device)
        if self._joined():
            words = gather_with_gradient(words)
            given = None if given is None else gather_with_gradient(given)
        found = _same_rows(words)
        if given is not None:
            found = _merged(found, _same_rows(given[:, None]))
        return found[rows]

    def _joined(self) -> bool:
        return self.across_processes and is_distributed()

    def _matching(
        self,
        state: State,
        memory: Tensor,
        valid: Tensor,
        words: Tensor,
        queries: Tensor,
        texts: Tensor,
        groups: Tensor,
    ) -> Tensor:
        network, count = _model(state).transformer, len(words)
        every_memory, every_valid, every_words = memory, valid, words
        places = dealt_places(words, self.across_processes)
        order, own = torch.cat(places).to(words.device), _own_rows(places).to(words.device)
        with torch.no_grad():
            if self._joined():
                queries, texts, groups = (gather_with_gradient(each) for each in (queries, texts, groups))
            scores = query_text_scores(queries, texts) * self.scale()
            generator = state.generator if self.across_processes else state.local_generator
            drawn = hard_negatives(scores, groups, generator=generator, order=order)
            motions, others = drawn.motion_of_text[own], drawn.text_of_motion[own]
        if self._joined():
            every_memory, every_valid, every_words = (
                gather_with_gradient(each) for each in (memory, valid, words)
            )
        with_motion, with_text = motions >= 0, others >= 0
        joint_words = torch.cat([words, words[with_motion], every_words[others[with_text]]])
        joint_memory = torch.cat([memory, every_memory[motions[with_motion]], memory[with_text]])
        joint_valid = torch.cat([valid, every_valid[motions[with_motion]], valid[with_text]])
        assert self.match_head is not None
        logits = self.match_head(network(joint_words, joint_memory, joint_valid).queries)
        matches = torch.arange(len(joint_words), device=words.device) < count
        return matching_loss(logits, matches, across_processes=self.across_processes)

    def _reaching_all(self, found: dict[str, Tensor], model: LanguageMotionModel) -> dict[str, Tensor]:
        """A zero with a graph to every parameter, also those that the chosen losses leave out: data-parallel training waits for all."""
        everything = [*model.parameters(), *self.parameters()]
        reached = torch.cat([p.flatten()[:0] for p in everything if p.requires_grad]).sum()
        return {name: term + reached for name, term in found.items()}


def _model(state: State) -> LanguageMotionModel:
    if not isinstance(state.model, LanguageMotionModel):
        raise InputError(f"the model must be a LanguageMotionModel, got {type(state.model).__name__}")
    return state.model


def _clips(inputs: Any) -> tuple[Tensor, Tensor | None]:
    """Motions, and how long each is if that was given."""
    if isinstance(inputs, Tensor):
        return inputs, None
    if isinstance(inputs, tuple | list) and len(inputs) == 2:
        return inputs[0], inputs[1]
    raise InputError(f"inputs must be motions, or (motions, lengths), got {type(inputs).__name__}")


def _extra(batch: Batch, name: str, rows: Sequence[int]) -> Tensor:
    found = batch.extras.get(name)
    if not isinstance(found, Tensor) or tuple(found.shape[: len(rows)]) != tuple(rows):
        shape = tuple(found.shape) if isinstance(found, Tensor) else found
        raise InputError(
            f"the batch must have the extra {name!r}, a tensor for {tuple(rows)} clips and tokens, got {shape}"
        )
    return found


def _same_rows(rows: Tensor) -> Tensor:
    """Number of each row, equal for equal ones."""
    return rows.unique(dim=0, return_inverse=True)[1]


def _merged(first: Tensor, second: Tensor) -> Tensor:
    """Numbers that are equal where either of two numberings has equal ones, followed to the end."""
    merged = first.clone()
    while True:
        low = torch.full_like(merged, len(merged)).scatter_reduce(0, second, merged, "amin")[second]
        low = torch.full_like(merged, len(merged)).scatter_reduce(0, first, low, "amin")[first]
        if torch.equal(low, merged):
            return merged
        merged = low


def _own_rows(places: list[Tensor]) -> Tensor:
    """Numbers of this process's rows where those of all stand process after process."""
    numbers = torch.arange(sum(map(len, places))).split([len(place) for place in places])
    return numbers[own_place(places)]
