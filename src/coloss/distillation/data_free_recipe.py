"""From a classification of texts to a small classifier that never saw one of them, in one call, by stages that go on after a stop."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from coloss.data import IndexedDataset, WordVocabulary, load_raw
from coloss.data.image_text import words_of
from coloss.data.sources import labelled
from coloss.data.splitting import split_rows
from coloss.distillation.data_free_distillation import (
    DataFreeDistillation,
    student_and_rewriter_adamw,
)
from coloss.distillation.token_generator import (
    PADDING,
    RewritingPretraining,
    TextRewriter,
    distinct_share,
    write_texts,
)
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier, predict
from coloss.nn import Classifier, TokenEncoder, Words
from coloss.train import Budget, cosine, fit, save_model
from coloss.train.atomic_text import write_atomically
from coloss.train.provenance import teacher_fingerprint
from coloss.train.run_folder import claim_folder, write_metrics

LENGTH, PUBLIC_LENGTH = 16, 10
"""Words that classifiers read, and words of a public text."""

PUBLIC = "ud-english-ewt"
"""Sentences of the English Web Treebank: weblogs, newsgroups, emails, reviews and questions."""

STUDENT_RATE, REWRITER_RATE = 1e-2, 1e-2
"""Learning rates that were best on real validation questions in the experiment of `data_free_trial`."""


@dataclass(frozen=True)
class TextTask:
    """A classification of texts, as word ids.

    Attributes:
        vocabulary: words of the training texts, in alphabetical order, so that their numbers say nothing of how frequent they are.
        train, validation, test: ids (texts, length) with class numbers.
        num_classes: how many there are.
    """

    vocabulary: WordVocabulary
    train: IndexedDataset
    validation: IndexedDataset
    test: IndexedDataset
    num_classes: int


def text_task(
    data: str, seed: int = 0, *, classes: int | None = None, length: int = LENGTH, min_count: int = 3
) -> TextTask:
    """Word ids of a text classification of the catalog.

    Args:
        data: its name, such as "banking77" or "sst2".
        seed: of the division, and of the classes.
        classes: keep so many, drawn by seed; None keeps all.
        length: words that are read of a text, >= 1.
        min_count: how often a word must occur in the training texts to be known.

    Raises:
        UnknownNameError: if there is no such data set.
        InputError: if it is no classification of texts, or has fewer classes than wanted.

    Examples:
        >>> task = text_task("banking77", classes=5)
        >>> task.num_classes, task.train.inputs.shape[1], int(task.test.targets.max())
        (5, 16, 4)
    """
    rows = labelled(data)
    if rows.form != "text" or rows.kind != "classification":
        raise InputError(
            f"data must be a classification of texts, got {data!r}, which holds {rows.form} for {rows.kind}"
        )
    texts, targets = list(rows.inputs), torch.tensor(rows.targets).long()
    found = int(targets.max()) + 1
    if classes is not None and not 2 <= classes <= found:
        raise InputError(f"classes must be in [2, {found}], got {classes}")
    parts = [torch.from_numpy(part) for part in split_rows(rows.targets, rows.parts, len(texts), seed)]
    if classes is not None:
        kept = torch.randperm(found, generator=torch.Generator().manual_seed(seed))[:classes].sort().values
        parts = [part[torch.isin(targets[part], kept)] for part in parts]
        targets = torch.searchsorted(kept, targets)
    counts = Counter(word for row in parts[0].tolist() for word in words_of(texts[row]))
    vocabulary = WordVocabulary(sorted(word for word, count in counts.items() if count >= min_count), length)
    train, validation, test = (
        IndexedDataset(vocabulary.encode([texts[row] for row in part.tolist()]), targets[part], part)
        for part in parts
    )
    return TextTask(vocabulary, train, validation, test, found if classes is None else classes)


def public_texts(
    vocabulary: WordVocabulary, length: int = PUBLIC_LENGTH, *, fewest: int = 3
) -> Int[Tensor, "texts length"]:
    """Sentences of the English Web Treebank in the words of a vocabulary; words that it lacks are left out.

    Args:
        vocabulary: of the teacher.
        length: words that are kept of a sentence.
        fewest: known words that a sentence must have.

    Raises:
        DataNotFoundError: if the data set is not there.
        InputError: if no sentence is left.

    Examples:
        >>> texts = public_texts(WordVocabulary(["a", "of", "the", "to"]), length=5)
        >>> texts.shape[1], bool((texts[:, :3] > 2).all())
        (5, True)
    """
    numbers = {word: number for number, word in enumerate(vocabulary.words)}
    rows = [
        [numbers[word] for word in words_of(text) if word in numbers][:length]
        for text in load_raw(PUBLIC)["table"]["words"]
    ]
    rows = [row + [PADDING] * (length - len(row)) for row in rows if len(row) >= fewest]
    if not rows:
        raise InputError(
            f"vocabulary must hold words of public texts, got none with {fewest} of its {len(vocabulary)} words"
        )
    return torch.tensor(rows)


def small_text_classifier(
    vocabulary_size: int, num_classes: int, dim: int = 48, length: int = LENGTH
) -> Classifier:
    """One transformer block over word ids, and a linear layer.

    Examples:
        >>> small_text_classifier(50, 3, dim=8)(torch.tensor([[7, 9, 0]])).shape
        torch.Size([1, 3])
    """
    return Classifier(TokenEncoder(Words(vocabulary_size, dim, max_length=length), dim, 1, 2), num_classes)


@dataclass(frozen=True)
class DataFreeLengths:
    """Steps of the stages, and batches.

    Attributes:
        teacher, rewriter: steps of their training.
        student: steps of the student; a round of new texts every `student_steps` of them.
        batch_size: texts of a round.
        student_steps: of the student for each round.
    """

    teacher: int = 800
    rewriter: int = 600
    student: int = 1600
    batch_size: int = 64
    student_steps: int = 4


def train_text_teacher(task: TextTask, steps: int, *, seed: int = 0, folder: Path | None = None) -> nn.Module:
    """The network to compress, trained on the task's own texts; nothing after it sees them."""
    return fit(
        _seeded(
            seed,
            lambda: small_text_classifier(
                len(task.vocabulary), task.num_classes, length=task.vocabulary.max_words
            ),
        ),
        task.train,
        F.cross_entropy,
        budget=Budget(steps=steps),
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        learning_rate_schedule=cosine(warmup=0.1),
        seed=seed,
        checkpoint_dir=folder,
        resume=folder is not None,
    ).model


def pretrain_rewriter(
    public: Int[Tensor, "texts length"],
    vocabulary_size: int,
    num_labels: int,
    steps: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    folder: Path | None = None,
) -> TextRewriter:
    """A rewriter that knows public texts in the teacher's vocabulary; it sees nothing of the task but the number of labels."""
    model = fit(
        _seeded(seed + 1, lambda: TextRewriter(vocabulary_size, num_labels, public.shape[1])),
        IndexedDataset(public),
        methods=[RewritingPretraining()],
        budget=Budget(steps=steps),
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        learning_rate_schedule=cosine(warmup=0.1),
        seed=seed,
        checkpoint_dir=folder,
        resume=folder is not None,
    ).model
    assert isinstance(model, TextRewriter)
    return model


def distill_without_data(
    data: str = "banking77",
    folder: str | Path = "runs/dfkd-t3-banking77",
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    teacher: nn.Module | None = None,
    lengths: DataFreeLengths | None = None,
    student_dim: int = 24,
) -> dict[str, float]:
    """Trains a small text classifier on texts that a rewriter makes up; this is behind `coloss run dfkd-t3`.

    Stages: the teacher on the task's texts (or your own); the rewriter on public sentences in the teacher's vocabulary; rewriter and student
    in turn; a set of written texts to keep. After the first stage nothing of the task is used but the vocabulary and the number of classes,
    until the shipped student is tested. On banking77 itself that is not strictly data-free: the default temperature, weight of the disagreement
    and learning rates were chosen on real validation questions of it.

    The folder gets `teacher.safetensors`, `student.safetensors`, `rewriter.safetensors`, `texts.csv` (text, label, confidence: the written
    texts with what the teacher reads in them, for other students), `metrics.json`, `run.json` and checkpoints. The same folder goes on where
    a stopped run ended. The student is used again by `load_model(small_text_classifier(len(task.vocabulary), task.num_classes, student_dim),
    folder / "student.safetensors")` with `task = text_task(data, seed)`, on `task.vocabulary.encode(["where is my card?"])`.

    Args:
        data: a classification of texts of the catalog: "banking77", "sst2", ...
        folder: of the results.
        budget: of the student; default: 1,600 steps. Only a number of steps.
        seed: of everything random.
        progress: called with the share done.
        teacher: your own, on ids of `text_task(data, seed).vocabulary`; None trains one.
        lengths: of the stages; default: `DataFreeLengths()`.
        student_dim: width of the student; the teacher's is 48.

    Returns:
        `accuracy` and what else `coloss.metrics.evaluate_classifier` gives on test texts, `teacher_accuracy`, `agreement` (share of test texts
        on which both name the same class), `queries`, `distinct_2` of the written texts, and `texts_kept`.

    Raises:
        InputError: if data are no classification of texts, the budget is not in steps, or the folder holds another run, which one with
            another teacher is.

    Source: reconstructed after Bai et al. 2023, arXiv 2311.01689.

    Examples:
        >>> import tempfile
        >>> few = DataFreeLengths(teacher=5, rewriter=5, student=8)
        >>> metrics = distill_without_data("banking77", tempfile.mkdtemp(), lengths=few)
        >>> metrics["queries"], 0 <= metrics["agreement"] <= 1
        (128.0, True)
    """
    lengths = lengths or DataFreeLengths()
    if budget is not None and budget.steps is None:
        raise InputError(f"budget must be a number of steps, got {budget}")
    student_steps = lengths.student if budget is None or budget.steps is None else budget.steps
    task, folder = text_task(data, seed), Path(folder)
    run = {"data": data, "seed": seed, "student_steps": student_steps, "student_dim": student_dim}
    own = None if teacher is None else teacher_fingerprint(teacher)
    claim_folder(folder, run | {"own_teacher": own, "lengths": vars(lengths)})
    report = progress or (lambda share: None)
    if teacher is None:
        teacher = train_text_teacher(
            task, lengths.teacher, seed=seed, folder=folder / "checkpoints" / "teacher"
        )
    save_model(teacher, folder / "teacher.safetensors")
    report(0.3)
    public, words = public_texts(task.vocabulary), len(task.vocabulary)
    order = torch.randperm(len(public), generator=torch.Generator().manual_seed(seed))
    rewriter = pretrain_rewriter(
        public[order],
        words,
        task.num_classes,
        lengths.rewriter,
        batch_size=lengths.batch_size,
        seed=seed,
        folder=folder / "checkpoints" / "rewriter",
    )
    report(0.5)
    method = DataFreeDistillation(teacher, rewriter, student_steps=lengths.student_steps)
    student = fit(
        _seeded(
            seed + 2,
            lambda: small_text_classifier(words, task.num_classes, student_dim, task.vocabulary.max_words),
        ),
        IndexedDataset(public[order]),
        methods=[method],
        budget=Budget(steps=student_steps),
        batch_size=lengths.batch_size,
        optimizer=student_and_rewriter_adamw(rewriter, STUDENT_RATE, REWRITER_RATE),
        learning_rate_schedule=cosine(warmup=0.05),
        seed=seed,
        checkpoint_dir=folder / "checkpoints" / "student",
        checkpoint_every=200,
        resume=True,
        progress=lambda share, terms: report(0.5 + 0.5 * share),
    ).model
    save_model(student, folder / "student.safetensors")
    save_model(rewriter, folder / "rewriter.safetensors")
    written, answers = write_texts(
        rewriter, teacher, public[order][:4000], generator=torch.Generator().manual_seed(seed)
    )
    confidence, label = answers.softmax(1).max(1)
    names = labelled(data).class_names or tuple(map(str, range(task.num_classes)))
    table = pd.DataFrame(
        {
            "text": task.vocabulary.decode(written),
            "label": [names[number] for number in label.tolist()],
            "confidence": confidence.tolist(),
        }
    )
    write_atomically(folder / "texts.csv", table.to_csv(index=False))
    found = dict(evaluate_classifier(student, task.test))
    metrics = (
        found
        | judge_student(student, teacher, task.test)
        | {
            "queries": float(method.queries),
            "distinct_2": distinct_share(method.texts.cpu()),
            "texts_kept": float(len(written)),
        }
    )
    write_metrics(folder, metrics)
    return metrics


def judge_student(student: nn.Module, teacher: nn.Module, texts: IndexedDataset) -> dict[str, float]:
    """Accuracy of the teacher, and how often the student names the teacher's class."""
    ours, theirs = (predict(network, texts).outputs.argmax(1) for network in (student, teacher))
    targets = texts.targets
    assert isinstance(targets, Tensor)
    return {
        "teacher_accuracy": (theirs == targets).double().mean().item(),
        "agreement": (ours == theirs).double().mean().item(),
    }


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
