"""A trained LaMP, ready to use: motion from sentences, sentences about motion, and finding one by the other."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data import MotionClips, Skeleton, WordVocabulary
from coloss.data.image_text import words_of
from coloss.errors import InputError, suggest_names
from coloss.metrics.inference import evaluation_mode
from coloss.motion.clip_files import at_rate
from coloss.motion.generic_text import GenericTextEncoder
from coloss.motion.language_motion_model import LanguageMotionCondition, LanguageMotionModel
from coloss.motion.length_predictor import LengthPredictor
from coloss.motion.masked_tokens import PAPER_GENERATOR, SMALL_GENERATOR, MaskedTokenTransformer
from coloss.motion.motion_captioner import MotionCaptioner
from coloss.motion.motion_evaluator import PAPER_EVALUATOR, SMALL_EVALUATOR, TextMotionEvaluator
from coloss.motion.motion_representation import (
    FeatureNormalizer,
    feature_groups,
    motion_features,
    recover_joints,
)
from coloss.motion.motion_tokenizer import PAPER_TOKENIZER, SMALL_TOKENIZER, MotionVQVAE
from coloss.motion.text_motion_folder import published_rest
from coloss.train import load_model
from coloss.train.run_folder import read_run

LampSize = Literal["small", "paper"]

LAMP_SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "small": {
        "tokenizer": SMALL_TOKENIZER,
        "evaluator": SMALL_EVALUATOR,
        "text": {"dim": 96, "depth": 2, "heads": 4},
        "pretraining": {"dim": 96, "layers": 4, "heads": 4, "embedding_dim": 64},
        "generator": {name: value for name, value in SMALL_GENERATOR.items() if name != "max_tokens"},
        "condition": {"dim": 96},
    },
    "paper": {
        "tokenizer": PAPER_TOKENIZER,
        "evaluator": PAPER_EVALUATOR,
        "text": {"dim": 768, "depth": 12, "heads": 12},
        "pretraining": {
            "dim": 768,
            "layers": 12,
            "heads": 12,
            "embedding_dim": 512,
            "memory_dim": 1408,
            "feed_forward": 3072,
        },
        "generator": {name: value for name, value in PAPER_GENERATOR.items() if name != "max_tokens"},
        "condition": {"dim": 768},
    },
}
"""Sizes of all networks: for a thousand clips and a CPU, and the authors' (whose query transformer and captioner begin with published weights of
language models, which are not here: all begin at random)."""


_AT_ONCE = 128
"""Clips or sentences that a network gets at once."""


class Lamp(nn.Module):
    """All networks of LaMP together, with what is known of the clips and words they were trained on; `load_lamp` reads one.

    Args:
        run: description, plain JSON values, as `run.json` of a trained model holds it.

    Attributes:
        tokenizer, evaluator, generic_text, condition, generator, length_predictor, captioner: the networks; `condition.model` is the pretrained
            `LanguageMotionModel`, also `language_motion`.
        normalizer, tokenizer_normalizer: of features, for the evaluator and the tokenizer.
        vocabulary: words that the training sentences have.
        skeleton: of the clips, or None; `fps`: frames per second.
        sentences: one training sentence for each group of clips.

    Raises:
        InputError: for a description that is none.

    Examples:
        >>> lamp = load_lamp("runs/lamp-bandai")  # doctest: +SKIP
        >>> wave = lamp.generate("a person waves both hands happily", seconds=4)  # doctest: +SKIP
        >>> lamp.retrieve_clips("someone waves", wave)  # doctest: +SKIP
        [('a person waves both hands happily', 0.61)]
    """

    def __init__(self, run: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            motion, sizes = run["motion"], run["sizes"]
            self.vocabulary = WordVocabulary(run["words"], run["max_words"])
            self.sentences: tuple[str, ...] = tuple(run["sentences"])
            self.fps, self.num_joints = float(motion["fps"]), int(motion["num_joints"])
            self.rotations, self.contact_step = bool(motion["rotations"]), motion["contact_step"]
            self.max_frames = int(motion["max_frames"])
            self.composed = bool(motion["composed"])
            numbers, words = int(motion["numbers"]), len(self.vocabulary)
            self.skeleton = None if motion["skeleton"] is None else skeleton_of(motion["skeleton"])
            self.tokenizer = MotionVQVAE(numbers, **sizes["tokenizer"])
            tokens = self.max_frames // self.tokenizer.frames_per_token
            self.evaluator = TextMotionEvaluator(numbers, words, **sizes["evaluator"])
            self.generic_text = GenericTextEncoder(words, max_words=run["max_words"], **sizes["text"])
            pretrained = LanguageMotionModel(
                words,
                self.tokenizer.code_dim,
                max_tokens=tokens,
                max_words=run["max_words"],
                **sizes["pretraining"],
            )
            self.condition = LanguageMotionCondition(pretrained, **sizes["condition"])
            self.generator = new_generator(run)
            self.length_predictor = LengthPredictor(pretrained.embedding_dim, tokens)
            self.captioner = MotionCaptioner.on(
                LanguageMotionModel(
                    words,
                    self.tokenizer.code_dim,
                    max_tokens=tokens,
                    max_words=run["max_words"],
                    **sizes["pretraining"],
                ),
                GenericTextEncoder(words, max_words=run["max_words"], **sizes["text"]),
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"this is no description of a LaMP ({error!r} in run.json)") from error
        self.normalizer = FeatureNormalizer(torch.zeros(numbers), torch.ones(numbers))
        self.tokenizer_normalizer = FeatureNormalizer(torch.zeros(numbers), torch.ones(numbers))

    @property
    def language_motion(self) -> LanguageMotionModel:
        """The pretrained model."""
        return self.condition.model

    def word_ids(
        self, texts: Sequence[str], *, allow_unknown: bool = False
    ) -> Int[Tensor, "texts max_words"]:
        """Ids of sentences' words.

        Raises:
            InputError: for a sentence without words or with more than the model takes, and for words that no training sentence has, unless
                they are allowed and then read as "unknown".
        """
        for text in texts:
            words = words_of(text)
            if not 1 <= len(words) <= self.vocabulary.max_words:
                raise InputError(
                    f"text must have 1 to {self.vocabulary.max_words} words, got {len(words)}: {shorten(repr(text), 60)}"
                )
            unknown = [word for word in dict.fromkeys(words) if word not in self.vocabulary.words]
            if unknown and not allow_unknown:
                near = suggest_names(unknown[0], list(self.vocabulary.words[3:]))
                raise InputError(
                    f"text must hold words that the model was trained with, it has never seen {', '.join(map(repr, unknown))}{near}"
                )
        return self.vocabulary.encode(texts)

    @torch.no_grad()
    def generate(
        self,
        texts: str | Sequence[str],
        *,
        seconds: float | None = None,
        steps: int = 10,
        guidance: float = 2.0,
        seed: int = 0,
        allow_unknown: bool = False,
    ) -> MotionClips:
        """A motion for each sentence.

        Args:
            texts: a sentence or several.
            seconds: how long, > 0, rounded to whole tokens; None: drawn by the length predictor.
            steps: of iterative decoding.
            guidance: how much more than the sentence alone asks for; 1 for none.
            seed: of all draws.
            allow_unknown: see `word_ids`.

        Returns:
            The clips, in metres (or the training data's unit), named by their sentences; from above the origin, facing +z.

        Raises:
            InputError: for unknown words, seconds out of range, or a model of a folder whose skeleton is not known.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        words = self.word_ids(texts, allow_unknown=allow_unknown)
        draws = torch.Generator().manual_seed(seed)
        longest = self.length_predictor.longest
        with evaluation_mode(self):
            if seconds is None:
                tokens = self.length_predictor.sample(
                    self.language_motion.embed_text(words), temperature=0.5, generator=draws
                )
            else:
                per_token = self.tokenizer.frames_per_token / self.fps
                if not 0 < seconds <= longest * per_token + 1e-9:
                    raise InputError(f"seconds must be in (0, {longest * per_token:g}], got {seconds:g}")
                tokens = torch.full((len(texts),), max(1, round(seconds / per_token)))
            codes = self.generator.generate(
                self.condition(words), tokens, steps=steps, guidance=guidance, generator=draws
            )
            features = self.decode(codes)
        skeleton = self.skeleton_of_clips()
        joints = recover_joints(features, self.num_joints, root=skeleton.root)
        frames = (tokens * self.tokenizer.frames_per_token).tolist()
        return MotionClips.from_list(
            [clip[:count].numpy() for clip, count in zip(joints, frames)], skeleton, self.fps, names=texts
        )

    def decode(self, codes: Int[Tensor, "clips tokens"]) -> Float[Tensor, "clips frames numbers"]:
        """Features, not normalised, of tokens; after a clip's end they mean nothing."""
        return self.tokenizer_normalizer.restore(self.tokenizer.decode(codes))

    def features_of(self, clips: MotionClips) -> tuple[Tensor, ...]:
        """Features of somebody's clips as the model takes them: at its frame rate, whole tokens, not longer than it knows (their middle).

        Args:
            clips: of the model's skeleton, y up, in its unit (metres for a model trained on metres).

        Raises:
            InputError: for clips of another skeleton, too short, or in another unit (bodies of less than a tenth or more than ten times the
                size of those trained on).
        """
        skeleton, per_token = self.skeleton_of_clips(), self.tokenizer.frames_per_token
        if clips.skeleton.parents != skeleton.parents:
            raise InputError(
                f"clips must have the model's skeleton of {skeleton.num_joints} joints, got one of {clips.skeleton.num_joints}"
                + (" with other parents" if clips.skeleton.num_joints == skeleton.num_joints else "")
            )
        rest = published_rest(skeleton) if self.rotations else None
        found = []
        for index in range(len(clips)):
            joints = torch.from_numpy(at_rate(clips.clip(index), clips.fps, self.fps))
            if len(joints) <= per_token:
                raise InputError(
                    f"clips must last longer than {per_token / self.fps:.2g} seconds, {clips.names[index]!r} lasts {len(joints) / self.fps:.2g}"
                )
            try:
                features = motion_features(
                    joints,
                    skeleton,
                    fps=self.fps,
                    contact_step=self.contact_step,
                    rotations=self.rotations,
                    rest=rest,
                )
            except InputError as error:
                raise InputError(f"{clips.names[index]}: {error}") from error
            self._check_size(features, clips.names[index])
            kept = min(len(features), self.max_frames) // per_token * per_token
            start = (len(features) - kept) // 2
            found.append(features[start : start + kept])
        return tuple(found)

    def _check_size(self, features: Tensor, name: str) -> None:
        places = feature_groups(self.num_joints, rotations=self.rotations)["positions"]
        found, known = (
            float(each[..., places].unflatten(-1, (-1, 3)).norm(dim=-1).mean())
            for each in (features, self.normalizer.mean)
        )
        if known > 0 and not known / 10 < found < 10 * known:
            raise InputError(
                f"clips must be in the model's unit (metres, for a model trained on metres), the body of {name!r} is {found / known:.3g} times as large as those trained on: scale it"
            )

    @torch.no_grad()
    def read(
        self, features: Sequence[Float[Tensor, "_ numbers"]]
    ) -> tuple[Float[Tensor, "clips tokens code_dim"], Tensor]:
        """What the tokenizer's encoder makes of clips, and which tokens are theirs (clips, tokens)."""
        padded, lengths = _padded([self.tokenizer_normalizer(clip) for clip in features])
        with evaluation_mode(self.tokenizer):
            vectors = self.tokenizer.encode(padded, lengths)
        return vectors, torch.arange(vectors.shape[1]) < lengths[:, None] // self.tokenizer.frames_per_token

    @torch.no_grad()
    def embed_clips(self, clips: MotionClips) -> Float[Tensor, "clips embedding"]:
        """Unit vectors of clips, near those of the sentences that fit them."""
        with evaluation_mode(self):
            return torch.cat(
                [
                    self.language_motion.embed_motion(*self.read(part))
                    for part in _portions(self.features_of(clips))
                ]
            )

    @torch.no_grad()
    def embed_texts(
        self, texts: Sequence[str], *, allow_unknown: bool = False
    ) -> Float[Tensor, "texts embedding"]:
        """Unit vectors of sentences."""
        return self._embed_words(self.word_ids(texts, allow_unknown=allow_unknown))

    def _embed_words(self, ids: Tensor) -> Tensor:
        with evaluation_mode(self):
            return torch.cat([self.language_motion.embed_text(part) for part in ids.split(_AT_ONCE)])

    def retrieve_clips(
        self, text: str, clips: MotionClips, count: int = 5, *, allow_unknown: bool = False
    ) -> list[tuple[str, float]]:
        """Names of the clips that fit a sentence best, with their cosines, the best first.

        Raises:
            InputError: see `word_ids` and `features_of`.
        """
        scores = self.embed_clips(clips) @ self.embed_texts([text], allow_unknown=allow_unknown)[0]
        return _best(scores, clips.names, count)

    def retrieve_texts(
        self, clips: MotionClips, texts: Sequence[str] | None = None, count: int = 5
    ) -> list[list[tuple[str, float]]]:
        """For each clip the sentences that fit it best, with their cosines; of `sentences` where none are given."""
        if texts is None:  # too long a sentence is cut, as it was in training
            texts, ids = self.sentences, self.vocabulary.encode(self.sentences)
        else:
            ids = self.word_ids(texts, allow_unknown=True)
        scores = self.embed_clips(clips) @ self._embed_words(ids).T
        return [_best(row, texts, count) for row in scores]

    def caption(self, clips: MotionClips, *, beams: int = 5) -> list[str]:
        """A sentence about each clip."""
        found = []
        for part in _portions(self.features_of(clips)):
            ids = self.captioner.write(*self.read(part), max_words=self.vocabulary.max_words, beams=beams)
            found += self.vocabulary.decode(ids)
        return found

    def skeleton_of_clips(self) -> Skeleton:
        """The skeleton of the clips that the model knows.

        Raises:
            InputError: if the folder that it was trained on did not tell.
        """
        if self.skeleton is None:
            raise InputError("the model's clips had no known skeleton: train it with skeleton= to use joints")
        return self.skeleton


def new_generator(run: Mapping[str, Any], *, causal: bool = True) -> MaskedTokenTransformer:
    """A generator of a run's size, with new weights.

    Args:
        run: with `sizes` of tokenizer, condition and generator, and `max_frames` of `motion`.
        causal: see `MaskedTokenTransformer`.

    Examples:
        >>> sizes = {part: LAMP_SIZES["small"][part] for part in ("tokenizer", "condition", "generator")}
        >>> new_generator({"sizes": sizes, "motion": {"max_frames": 64}}).max_tokens
        16
    """
    sizes, motion = run["sizes"], run["motion"]
    tokenizer = sizes["tokenizer"]
    return MaskedTokenTransformer(
        tokenizer["codes"],
        sizes["condition"]["dim"],
        max_tokens=motion["max_frames"] // 2 ** tokenizer["down"],
        causal=causal,
        **sizes["generator"],
    )


def load_lamp(folder: str | Path) -> Lamp:
    """The model that `train_lamp` stored, in evaluation mode.

    Args:
        folder: of the run.

    Raises:
        InputError: if there is no such run, it is not finished, or damaged.

    Examples:
        >>> lamp = load_lamp("runs/lamp-bandai")  # doctest: +SKIP
        >>> clips = lamp.generate("a person walks proudly and turns left")  # doctest: +SKIP
        >>> clips.clip(0).shape, lamp.caption(clips)  # doctest: +SKIP
        ((84, 21, 3), ['a person walks proudly and turns left'])
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder} holds no trained LaMP: train one with coloss run lamp --out {folder}")
    lamp = Lamp(read_run(folder))
    load_model(lamp, folder / "model.safetensors")
    return lamp.eval()


def skeleton_record(skeleton: Skeleton) -> dict[str, Any]:
    """A skeleton in plain JSON values.

    Examples:
        >>> skeleton_of(skeleton_record(Skeleton((-1, 0), ("hip", "knee")))).names
        ('hip', 'knee')
    """
    record: dict[str, Any] = {field.name: getattr(skeleton, field.name) for field in fields(skeleton)}
    plain: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in record.items()
    }
    plain["parts"] = {name: list(part) for name, part in skeleton.parts.items()}
    return plain


def skeleton_of(record: Mapping[str, Any]) -> Skeleton:
    """The skeleton that `skeleton_record` wrote down."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    values["parts"] = {name: tuple(part) for name, part in record["parts"].items()}
    return Skeleton(**values)


def _padded(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(clip) for clip in clips])
    filled = torch.zeros(len(clips), int(lengths.max()), clips[0].shape[1])
    for row, clip in enumerate(clips):
        filled[row, : len(clip)] = clip
    return filled, lengths


def _portions(clips: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [clips[start : start + _AT_ONCE] for start in range(0, len(clips), _AT_ONCE)]


def _best(scores: Tensor, names: Sequence[str], count: int) -> list[tuple[str, float]]:
    if count < 1:
        raise InputError(f"count must be >= 1, got {count}")
    order = np.argsort(-scores.numpy(), kind="stable")[:count]
    return [(names[place], float(scores[place])) for place in order]
