"""The trial behind LaMP's claim: one generator of motion tokens, and what it is told about the sentence."""

from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import Batch, IndexedDataset, WordVocabulary
from coloss.metrics.generation import frechet_distance, multimodal_distance, r_precision
from coloss.motion.generic_text import GenericTextEncoder, movement_sentences, train_generic_text
from coloss.motion.language_motion import TERMS, LanguageMotionPretraining, Term, encode_motions
from coloss.motion.language_motion_model import LanguageMotionModel
from coloss.motion.masked_tokens import MaskedTokenTraining, MaskedTokenTransformer
from coloss.motion.motion_captions import ACTIONS, STYLES, compose_captions
from coloss.motion.motion_evaluator import TextMotionEvaluator, TextMotionMatching
from coloss.motion.motion_tokenizer import MotionTokenizerTraining, MotionVQVAE
from coloss.motion.text_motion_data import MotionSplit, TextMotion, load_text_motion
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.method import Method
from coloss.train.schedules import cosine
from coloss.train.task import Setting

Source = Literal["generic", "lamp"]

M = TypeVar("M", bound=nn.Module)

FRAMES, TOKENS, CODES, WIDTH, MAX_WORDS = 32, 8, 128, 64, 12
GUIDANCE, REPEATS, VOCABULARY = 1.0, 4, 1000


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each stage."""

    tokenizer: int = 500
    pretraining: int = 100
    generator: int = 300
    judge: int = 300
    language: int = 300


@dataclass(frozen=True)
class Telling:
    """What an arm's generator is told of a sentence.

    Args:
        source: "generic": the language model's vector; "lamp": that of the class token of LaMP's text pass.
        losses: of LaMP's pretraining.
        learning_rate: of the generator, at its height.
        causal: whether a motion token sees those before it alone.
        seeds: how many seeds the arm is measured with, from seed 0 on; None: all.
    """

    source: Source
    losses: tuple[Term, ...] = TERMS
    learning_rate: float = 2e-3
    causal: bool = True
    seeds: int | None = None


ARMS: dict[str, Telling] = {
    "generic text": Telling("generic"),
    "lamp": Telling("lamp"),
    "lamp, contrastive loss alone": Telling("lamp", ("contrastive",), seeds=2),
}
"""The arms of the claim; the last only stands beside the two that it compares."""


@dataclass(frozen=True)
class Yardstick:
    """What all seeds stand on: clips, the judge with its words, and the language model that saw no motion with its own."""

    train: TextMotion
    test: TextMotion
    judge: TextMotionEvaluator
    judge_words: WordVocabulary
    generic: GenericTextEncoder
    generic_words: WordVocabulary


@dataclass(frozen=True)
class Ground(Yardstick):
    """What all arms of a seed stand on: a tokenizer, too.

    Attributes:
        encoded: the training clips as the tokenizer reads them.
    """

    tokenizer: MotionVQVAE
    encoded: IndexedDataset


@dataclass
class TextFeatures:
    """A frozen text encoder with its words: sentences to vectors."""

    words: WordVocabulary
    encoder: GenericTextEncoder | LanguageMotionModel

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> Float[Tensor, "sentences dim"]:
        ids = self.words.encode(sentences)
        if isinstance(self.encoder, GenericTextEncoder):
            return self.encoder(ids)
        return self.encoder.transformer.read_text(ids)[:, 0]


class ToldSentence(nn.Module):
    """Condition vectors of sentences by number: frozen features behind a small trained network, the same for every arm."""

    features: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)
        dim = features.shape[1]
        self.network = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, batch: Batch) -> Tensor:
        return self.network(self.features[batch.targets])


def common_ground(
    split: MotionSplit = "compositional", steps: Steps = Steps(), limit: int | None = None, seed: int = 0
) -> Ground:
    """The yardstick, and a tokenizer of the training clips with this seed."""
    shared = yardstick(split, steps, limit)
    tokenizer, encoded = _train_tokenizer(shared.train, steps.tokenizer, seed)
    given = {field.name: getattr(shared, field.name) for field in fields(shared)}
    return Ground(**given, tokenizer=tokenizer, encoded=encoded)


@lru_cache(maxsize=2)
def yardstick(split: MotionSplit, steps: Steps, limit: int | None) -> Yardstick:
    """Clips of part 2 brought to 32 frames, a judge, and a language model.

    The judge is trained on all clips with sentences of all templates, test clips included: it is the yardstick, and no arm sees it. The language
    model reads KIT's sentences and, as often, the training sentences. With a limit there are at most so many clips of each part, and five times as
    many of KIT's sentences.
    """
    clips = load_text_motion(
        "bandai", split=split, parts=(2,), frames=FRAMES, max_words=MAX_WORDS, limit=limit
    )
    train, test = clips.part(0), clips.part(2)
    said = [sentence for sentences in dict.fromkeys(train.captions) for sentence in sentences]
    written = [*movement_sentences()][: None if limit is None else 5 * limit]
    said = said * max(1, len(written) // len(said))
    words = WordVocabulary.of_texts([*said, *written], VOCABULARY, MAX_WORDS)
    generic = train_generic_text(
        words.encode([*written, *said]), len(words), dim=WIDTH, budget=Budget(steps=steps.language)
    ).cpu()
    judge, judge_words = _train_judge(clips, steps.judge)
    return Yardstick(train, test, judge, judge_words, generic, words)


def _train_judge(clips: TextMotion, steps: int) -> tuple[TextMotionEvaluator, WordVocabulary]:
    features, lengths = clips.padded()
    rows, texts = [], []
    for row, group in enumerate(clips.groups.tolist()):
        pair = ACTIONS[group // len(STYLES)], STYLES[group % len(STYLES)]
        for held_out in (False, True):
            sentences = compose_captions(*pair, held_out=held_out)
            # Two sentences of either kind for each clip, other ones from clip to clip.
            for shift in (0, 5):
                rows.append(row)
                texts.append(sentences[(row + shift) % len(sentences)])
    vocabulary = WordVocabulary.of_texts(texts, VOCABULARY, MAX_WORDS)
    words, index = vocabulary.encode(texts), torch.tensor(rows)
    pairs = IndexedDataset(
        (features[index], lengths[index], words, (words != vocabulary.padding_id).sum(1)),
        extras={"groups": clips.groups[index]},
    )
    sizes = {"conv_width": WIDTH, "motion_hidden": WIDTH, "text_hidden": WIDTH, "word_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = TextMotionEvaluator(features.shape[2], len(vocabulary), 32, **sizes)
    judge = _fitted(judge, pairs, TextMotionMatching(), steps, 2e-3, seed=0, clip_norm=None)
    return judge, vocabulary


def _train_tokenizer(train: TextMotion, steps: int, seed: int) -> tuple[MotionVQVAE, IndexedDataset]:
    data, joints = train.dataset(), train.feature_groups["positions"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MotionVQVAE(data.inputs[0].shape[2], WIDTH, 2, codes=CODES, code_dim=32)
    method = MotionTokenizerTraining((joints.start, joints.stop))
    model = _fitted(model, data, method, steps, 2e-3, seed=seed, batch_size=32, clip_norm=None)
    return model, encode_motions(model, data)


def pretrain(ground: Ground, losses: tuple[Term, ...], steps: int, seed: int) -> LanguageMotionModel:
    """LaMP's second stage on the training clips and their sentences."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageMotionModel(
            len(ground.train.vocabulary),
            ground.tokenizer.code_dim,
            max_tokens=TOKENS,
            dim=WIDTH,
            layers=3,
            max_words=MAX_WORDS,
        )
    method = LanguageMotionPretraining(CODES, losses=losses)
    return _fitted(model, ground.encoded, method, steps, 2e-3, seed=seed, batch_size=32)


def train_generator(
    ground: Ground, features: TextFeatures, how: Telling, steps: int, seed: int
) -> tuple[MaskedTokenTransformer, ToldSentence]:
    """A generator with its condition, on the training clips with all their sentences."""
    sentences = list(dict.fromkeys(s for several in ground.train.captions for s in several))
    number = {sentence: place for place, sentence in enumerate(sentences)}
    pairs = [(row, number[s]) for row, several in enumerate(ground.train.captions) for s in several]
    rows, numbers = torch.tensor(pairs).T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        told = ToldSentence(features(sentences))
        model = MaskedTokenTransformer(
            CODES, WIDTH, dim=WIDTH, depth=2, heads=4, causal=how.causal, max_tokens=TOKENS
        )
    method = MaskedTokenTraining(CODES, condition=told)
    data = IndexedDataset(ground.encoded.extras["codes"][rows], numbers)
    model = _fitted(model, data, method, steps, how.learning_rate, seed=seed, batch_size=48)
    return model, told.cpu().eval()


@torch.no_grad()
def judge_motions(
    ground: Ground,
    motions: list[Float[Tensor, "clips frames numbers"]],
    seed: int,
) -> dict[str, float]:
    """Mean over several sets of motions, each made from the test clips' sentences, of what the judge says."""
    text = ground.judge.embed_text(*_judged_words(ground))
    real = ground.judge.embed_motion(ground.test.padded()[0])
    draws = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for motion in motions:
        seen = ground.judge.embed_motion(motion)
        metrics = r_precision(text, seen, ground.test.groups, generator=draws)
        metrics["fid"] = float(frechet_distance(seen, real))
        metrics["multimodal_distance"] = float(multimodal_distance(text, seen))
        for name, value in metrics.items():
            found[name] = found.get(name, 0.0) + value / len(motions)
    return found


@torch.no_grad()
def generate(
    ground: Ground,
    model: MaskedTokenTransformer,
    told: ToldSentence,
    features: TextFeatures,
    seed: int,
    guidance: float = GUIDANCE,
) -> list[Float[Tensor, "clips frames numbers"]]:
    """Sets of motions from the test clips' sentences."""
    conditions = told.network(features(judged_sentences(ground)))
    draws = torch.Generator().manual_seed(seed)
    return [
        ground.tokenizer.decode(
            model.generate(conditions, TOKENS, steps=TOKENS, guidance=guidance, generator=draws)
        )
        for _ in range(REPEATS)
    ]


def judged_sentences(ground: Ground) -> list[str]:
    """One sentence for each test clip, of templates that training never saw."""
    return [several[row % len(several)] for row, several in enumerate(ground.test.captions)]


def compare_conditions(setting: Setting) -> dict[str, dict[str, float]]:
    """One seed of the claim: a tokenizer, LaMP's pretraining with each choice of losses, and a generator for each arm.

    Clips and sentences of the 20 held-out pairs of action and style are seen by the judge alone. "clips as tokens" is what the judge says of
    the test clips after the tokenizer, the best that a generator can reach; "real clips" of the clips themselves.
    """
    seed = setting.seed
    steps = Steps(2, 2, 2, 2, 2) if setting.smoke else Steps()
    ground = common_ground("compositional", steps, 40 if setting.smoke else None, seed)
    models: dict[tuple[Term, ...], LanguageMotionModel] = {}
    found = {}
    for name, how in ARMS.items():
        if how.seeds is not None and seed >= how.seeds:
            continue
        if how.source == "lamp" and how.losses not in models:
            models[how.losses] = pretrain(ground, how.losses, steps.pretraining, seed)
        features = (
            TextFeatures(ground.generic_words, ground.generic)
            if how.source == "generic"
            else TextFeatures(ground.train.vocabulary, models[how.losses])
        )
        model, told = train_generator(ground, features, how, steps.generator, seed)
        motions = generate(ground, model, told, features, seed)
        found[name] = judge_motions(ground, motions, seed)
    real = ground.test.padded()[0]
    with torch.no_grad():
        again = ground.tokenizer.decode(ground.tokenizer.tokens(real))
    found["clips as tokens"] = judge_motions(ground, [again], seed)
    found["real clips"] = judge_motions(ground, [real], seed)
    return found


def _judged_words(ground: Ground) -> tuple[Tensor, Tensor]:
    words = ground.judge_words.encode(judged_sentences(ground))
    return words, (words != ground.judge_words.padding_id).sum(1)


def _fitted(
    model: M,
    data: IndexedDataset,
    method: Method,
    steps: int,
    rate: float,
    *,
    seed: int,
    batch_size: int = 64,
    clip_norm: float | None = 1.0,
) -> M:
    """The model after training, on the CPU and in evaluation mode."""
    fit(
        model,
        data,
        None,
        [method],
        budget=Budget(steps=steps),
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.99), weight_decay=0.01),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=clip_norm,
        seed=seed,
    )
    return model.cpu().eval()
