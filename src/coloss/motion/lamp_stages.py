"""The stages of LaMP's training: what each network learns from, in which order, and for how long."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import Batch, IndexedDataset
from coloss.metrics.inference import evaluation_mode
from coloss.motion.generic_text import train_generic_text
from coloss.motion.lamp_methods import DrawnCaption, GenericCondition, OfDrawnCaption, TurnTerm
from coloss.motion.lamp_model import Lamp, LampSize, new_generator
from coloss.motion.language_motion import LanguageMotionPretraining, encode_motions
from coloss.motion.masked_tokens import MaskedTokenTraining, MaskedTokenTransformer
from coloss.motion.motion_captioner import caption_loss
from coloss.motion.motion_evaluator import TextMotionMatching
from coloss.motion.motion_representation import FeatureNormalizer
from coloss.motion.motion_tokenizer import MotionTokenizerTraining
from coloss.motion.text_motion_data import TextMotion
from coloss.train import Budget, fit
from coloss.train.method import Method
from coloss.train.schedules import Schedule, cosine

TOKENIZER_BIAS: Mapping[LampSize, float] = {"small": 2.0, "paper": 5.0}
"""How much more turn, travel, height and contacts weigh in the tokenizer's loss; see `FeatureNormalizer`."""

TURN_WEIGHT: Mapping[LampSize, float] = {"small": 1.0, "paper": 0.0}
"""Weight of the turn alone, on top: the turn is one of 131 numbers and nearly always near 0, so the loss as published falls for long without it.
Share of their turn that the tokenizer gave back of Bandai-Namco's test clips that turn, one seed: 98% with this term after 500 steps, 0.1%
without; without it but with a bias of 5, 0.4% after 1000. Joints relative to the root were 45, 50 and 50 mm off, the root 158, 332 and 405."""


@dataclass(frozen=True)
class Stage:
    """How one network is trained.

    Args:
        steps: optimizer steps in a run without a budget.
        batch_size: clips of a step.
        learning_rate: of AdamW at its height.
        weight_decay: of weights with more than one dimension.
        betas: of AdamW.
        minutes: on one CPU core ("small") or a GPU ("paper"), about; for the progress that is shown and the shares of a budget of time.

    Examples:
        >>> groups = (
        ...     Stage(100, 32, 1e-3, weight_decay=0.05)
        ...     .optimizer(list(nn.Linear(3, 2).parameters()))
        ...     .param_groups
        ... )
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.05), (1, 0.0)]
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    minutes: float = 1.0

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW without decay of biases and norms."""
        wide = [parameter for parameter in parameters if parameter.ndim > 1]
        narrow = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [
            {"params": wide, "weight_decay": self.weight_decay},
            {"params": narrow, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.learning_rate, betas=self.betas
        )


STAGES: Mapping[LampSize, Mapping[str, Stage]] = {
    "small": {
        "tokenizer": Stage(1000, 32, 2e-3, minutes=1.6),
        "evaluator": Stage(300, 64, 1e-3, minutes=0.4),
        "text": Stage(200, 64, 2e-3, 0.05, minutes=0.1),
        "pretraining": Stage(300, 64, 1e-3, 0.05, minutes=3.9),
        "generator": Stage(1000, 64, 2e-3, 1e-5, minutes=3.1),
        "length": Stage(200, 64, 1e-3, minutes=0.1),
        "captioner": Stage(300, 64, 1e-3, 0.05, minutes=0.9),
        "generic text generator": Stage(1000, 64, 2e-3, 1e-5, minutes=2.2),
        "bidirectional generator": Stage(1000, 64, 2e-3, 1e-5, minutes=3.1),
    },
    "paper": {
        "tokenizer": Stage(75_000, 256, 5e-4, minutes=20),
        "evaluator": Stage(50_000, 32, 1e-4, minutes=5),
        "text": Stage(20_000, 64, 1e-4, 0.05, minutes=3),
        "pretraining": Stage(75_000, 64, 1e-4, 0.05, minutes=40),
        "generator": Stage(75_000, 64, 2e-4, 1e-5, minutes=15),
        "length": Stage(20_000, 64, 1e-4, minutes=1),
        "captioner": Stage(150_000, 32, 1e-4, 0.05, minutes=40),
        "generic text generator": Stage(75_000, 64, 2e-4, 1e-5, minutes=15),
        "bidirectional generator": Stage(75_000, 64, 2e-4, 1e-5, minutes=15),
    },
}
"""What each stage takes. "small": ten minutes on one CPU core, and eight more for the two to compare with and the measures;
"paper": the authors' steps and rates, as far as they are known."""


@dataclass
class LampTraining:
    """Trains the parts of a `Lamp` stage by stage; a stage that was finished in the run's folder is read from its last checkpoint.

    Args:
        lamp: with new weights; trained in place.
        motion: the clips; its training part is learned from.
        run: description of the run.
        folder: for checkpoints.
        budget: of all stages together.
        progress: called with the share of the whole run that is done.

    Examples:
        >>> training = LampTraining(lamp, motion, run, folder, Budget(steps=3000))  # doctest: +SKIP
        >>> training.tokenizer()  # doctest: +SKIP
    """

    lamp: Lamp
    motion: TextMotion
    run: Mapping[str, Any]
    folder: Path
    budget: Budget
    progress: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        self.stages = STAGES[self.run["size"]]
        self.seed: int = self.run["seed"]
        self.train = self.motion.part(0)
        self.done = 0.0

    def tokenizer(self) -> None:
        """Motion to tokens and back."""
        size, positions = self.run["size"], self.motion.feature_groups["positions"]
        normalizer = FeatureNormalizer.of(
            self.train.features, self.motion.feature_groups, bias=TOKENIZER_BIAS[size]
        )
        self.lamp.tokenizer_normalizer.load_state_dict(normalizer.state_dict())
        self.lamp.normalizer.load_state_dict(self.motion.normalizer.state_dict())
        methods: list[Method] = [MotionTokenizerTraining((positions.start, positions.stop))]
        if TURN_WEIGHT[size]:
            methods.append(TurnTerm(TURN_WEIGHT[size]))
        self._fit(
            "tokenizer",
            self.lamp.tokenizer,
            self.train.dataset(self.lamp.tokenizer_normalizer),
            None,
            methods,
        )
        self.encoded = encode_motions(self.lamp.tokenizer, self.train.dataset(self.lamp.tokenizer_normalizer))

    def evaluator(self) -> None:
        """The yardstick, which no other network learns from."""
        padding = self.lamp.vocabulary.padding_id
        data = self.train.dataset()

        def arrange(batch: Batch, words: Tensor) -> Batch:
            return replace(batch, inputs=(*batch.inputs, words, (words != padding).sum(1)))

        self._fit("evaluator", self.lamp.evaluator, data, None, [DrawnCaption(arrange), TextMotionMatching()])

    def text(self) -> None:
        """A language model of the training sentences, without motion."""
        stage, sentences = (
            self.stages["text"],
            list(dict.fromkeys(sentence for captions in self.train.captions for sentence in captions)),
        )
        encoder = train_generic_text(
            self.lamp.vocabulary.encode(sentences),
            len(self.lamp.vocabulary),
            **self.run["sizes"]["text"],
            budget=self._budget("text"),
            batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            checkpoint_dir=self.folder / "checkpoints" / "text",
            progress=self._progress("text"),
            seed=self.seed,
        )
        self.lamp.generic_text.load_state_dict(encoder.cpu().state_dict())
        self._finished("text")

    def pretraining(self) -> None:
        """Texts and motions, by four losses."""
        model = self.lamp.language_motion.requires_grad_(True)
        method = LanguageMotionPretraining(self.lamp.tokenizer.codes)
        self._fit("pretraining", model, self.encoded, None, [method])
        self.lamp.condition.model.requires_grad_(False)
        self.lamp.condition.text_memory.load_state_dict(model.text_memory.state_dict())  # type: ignore[union-attr]

    def generator(self) -> None:
        """Motion tokens from LaMP's text features."""
        self._generator("generator", self.lamp.generator, self.lamp.condition)

    def rivals(self) -> dict[str, tuple[MaskedTokenTransformer, nn.Module]]:
        """Generators and their conditions to compare with: the generic text encoder's features; attention to all tokens."""
        dim = self.lamp.generator.condition_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            generic = GenericCondition(_copy(self.lamp.generic_text), dim)
            both_ways = _copy(self.lamp.condition)
            both_ways.output.reset_parameters()
            both_ways.text_memory.load_state_dict(self.lamp.language_motion.text_memory.state_dict())
            found: dict[str, tuple[MaskedTokenTransformer, nn.Module]] = {
                "generic_text": (new_generator(self.run), generic),
                "bidirectional": (new_generator(self.run, causal=False), both_ways),
            }
        for name, stage in (
            ("generic_text", "generic text generator"),
            ("bidirectional", "bidirectional generator"),
        ):
            self._generator(stage, *found[name])
        return found

    def length(self) -> None:
        """How long the motion of a sentence is."""
        predictor = self.lamp.length_predictor
        words, counts = self.train.caption_words()
        rows = torch.arange(len(words))[:, None].expand(words.shape[:2])
        there = torch.arange(words.shape[1]) < counts[:, None]
        with torch.no_grad(), evaluation_mode(self.lamp.language_motion):
            texts = torch.cat(
                [self.lamp.language_motion.embed_text(chunk) for chunk in words[there].split(512)]
            )
        tokens = self.train.lengths // self.lamp.tokenizer.frames_per_token
        data = IndexedDataset(texts, tokens[rows[there]] - predictor.shortest)
        self._fit("length", predictor, data, F.cross_entropy, [])

    def captioner(self) -> None:
        """Sentences from motion: the pretrained model and the language model go on from where they are, as copies."""
        captioner = self.lamp.captioner
        captioner.motion_model.load_state_dict(self.lamp.language_motion.state_dict())
        captioner.language_model.language_model.load_state_dict(  # type: ignore[union-attr, operator]
            self.lamp.generic_text.language_model.state_dict()
        )

        def arrange(batch: Batch, words: Tensor) -> Batch:
            valid = batch.extras["codes"] >= 0
            return replace(batch, inputs=(batch.inputs, words, valid), targets=words)

        self._fit(
            "captioner",
            captioner,
            self.encoded,
            partial(caption_loss, captioner=captioner),
            [DrawnCaption(arrange)],
        )

    def _generator(self, stage: str, model: MaskedTokenTransformer, condition: nn.Module) -> None:
        kept = {name: self.encoded.extras[name] for name in ("words", "caption_counts")}
        data = IndexedDataset(self.encoded.extras["codes"], ids=self.encoded.ids, extras=kept)

        def arrange(batch: Batch, words: Tensor) -> Batch:
            return replace(batch, extras=batch.extras | {"drawn": words})

        method = MaskedTokenTraining(self.lamp.tokenizer.codes, condition=OfDrawnCaption(condition))
        self._fit(stage, model, data, None, [DrawnCaption(arrange), method])
        condition.cpu()

    def _fit(
        self, stage: str, model: nn.Module, data: IndexedDataset, objective: Any, methods: list[Method]
    ) -> None:
        how = self.stages[stage]
        fit(
            model,
            data,
            objective,
            methods,
            budget=self._budget(stage),
            batch_size=how.batch_size,
            optimizer=how.optimizer,
            learning_rate_schedule=self._schedule(stage),
            clip_norm=1.0,
            checkpoint_dir=self.folder / "checkpoints" / stage.replace(" ", "-"),
            checkpoint_every=max(50, how.steps // 50),
            resume=True,
            progress=self._progress(stage),
            seed=self.seed,
        )
        model.cpu()
        self._finished(stage)

    def _schedule(self, stage: str) -> Schedule:
        if self.run["size"] == "paper" and stage in ("tokenizer", "generator"):
            return _falling_in_steps
        return cosine(warmup=0.05)

    def _budget(self, stage: str) -> Budget:
        if self.budget.seconds is not None:  # a step of one stage takes ten times that of another
            return self.budget.part(self._part(stage))
        total = sum(how.steps for how in self.stages.values())
        return self.budget.part(self.stages[stage].steps / total)

    def _progress(self, stage: str) -> Callable[[float, dict[str, float]], None] | None:
        if self.progress is None:
            return None
        start, part, report = self.done, self._part(stage), self.progress
        return lambda share, terms: report(start + part * min(share, 1.0))

    def _finished(self, stage: str) -> None:
        self.done += self._part(stage)

    def _part(self, stage: str) -> float:
        """Share of the whole run's time; a twentieth is left for the evaluation."""
        return 0.95 * self.stages[stage].minutes / sum(how.minutes for how in self.stages.values())


def _falling_in_steps(progress: float) -> float:
    """Warm-up over a fortieth, then a tenth from half of the run on, and a hundredth from five sixths on: the authors' schedule."""
    if progress < 1 / 40:
        return 40 * progress
    return 1.0 if progress < 0.5 else 0.1 if progress < 5 / 6 else 0.01


def _copy(module: Any) -> Any:
    from copy import deepcopy

    return deepcopy(module)
