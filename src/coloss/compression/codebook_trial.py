"""How the claim of learned codebooks is measured: one trained network for each seed, and every way to give its weights two bits."""

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coloss.compression.code_search import CodeSearch
from coloss.compression.codebook import Codebook, kmeans_codebook
from coloss.compression.codebook_learning import learn_codebook
from coloss.compression.compressed_file import compress_model, load_compressed
from coloss.compression.layer_reconstruction import LayerProblem, LayerReconstruction
from coloss.data import load
from coloss.metrics import evaluate_classifier
from coloss.nn import MLP, Classifier
from coloss.ops import nearest_codes
from coloss.train import Budget, Setting, Task

BITS, GROUPS = 2, 4
LAYERS = ("backbone.layers.0", "backbone.layers.3", "head")
STEPS = 300
RATES: dict[str, float] = {"soft": 0.2, "proximal": 0.2, "ste_nearest": 0.01}
_SEARCHED = {f"learned, {name.replace('_', ' ')}": name for name in RATES}
ARMS = ("uniform", "k-means, one table", "k-means", "k-means, tables solved", *_SEARCHED)


def task() -> Task:
    """Digits with two hidden layers of 64."""
    return Task(
        name="digits-two-bits",
        kind="classification",
        title="digits with two hidden layers of 64, all layers at two bits after training",
        load=lambda seed: load("digits", seed=seed),
        model=lambda splits: Classifier(MLP(64, (64, 64)), splits.num_classes),
        objective=nn.functional.cross_entropy,
        objective_name="cross-entropy",
        validate=lambda model, splits: evaluate_classifier(model, splits.validation),
        test=lambda model, splits: evaluate_classifier(model, splits.test),
        metric="output_error",
        direction="lower",
        budget=Budget(epochs=15),
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=1e-2),
    )


def measure_codebooks(setting: Setting) -> dict[str, dict[str, float]]:
    """Train once, compress in every way, judge on test data."""
    trained = setting.fit(setting.new_model()).model.eval()
    return judge_arms(setting, trained, setting.splits.test, RATES)


def judge_arms(
    setting: Setting, trained: nn.Module, data: Any, rates: dict[str, float], arms: tuple[str, ...] = ARMS
) -> dict[str, dict[str, float]]:
    """Metrics of every arm on some data."""
    train = setting.splits.train
    calibration = train.take(
        torch.randperm(len(train), generator=torch.Generator().manual_seed(setting.seed))[:512]
    ).inputs
    steps = setting.budget.steps if setting.smoke else None
    before = evaluate_classifier(trained, data)["accuracy"]
    found = {}
    for arm in arms:
        model = copy.deepcopy(trained)
        books, moved = {}, [0.0, 0.0]
        for problem in LayerReconstruction(model, calibration, LAYERS, reference=trained):
            codebook, changed, jump = _codebook(arm, problem, rates, STEPS if steps is None else steps)
            books[problem.path] = codebook
            moved[0] += changed * codebook.codes.numel()
            moved[1] += changed * codebook.codes.numel() * jump
            weight: Any = problem.layer.weight
            with torch.no_grad():
                weight.copy_(codebook.dequantize())
        found[arm] = _judge(setting, model, trained, books, data) | {
            "accuracy_before": before,
            "share_of_codes_changed": moved[0] / sum(book.codes.numel() for book in books.values()),
            "mean_code_jump": moved[1] / moved[0] if moved[0] else 0.0,
        }
    return found


def _judge(
    setting: Setting, model: nn.Module, trained: nn.Module, books: dict[str, Codebook], data: Any
) -> dict[str, float]:
    errors = []
    for problem in LayerReconstruction(model, data.all().inputs, LAYERS, reference=trained):
        weight: Any = problem.layer.weight
        errors.append(problem.moments().relative_error(weight))
    compressed = compress_model(model, {f"{path}.weight": book.stored() for path, book in books.items()})
    with tempfile.TemporaryDirectory() as folder:
        path = compressed.save(Path(folder) / "model.coloss")
        size = path.stat().st_size
        restored = load_compressed(path).load_into(setting.new_model())
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    return {
        "output_error": sum(errors) / len(errors),
        "accuracy": evaluate_classifier(model, data)["accuracy"],
        "accuracy_from_file": evaluate_classifier(restored, data)["accuracy"],
        "stored_bytes": float(compressed.nbytes),
        "file_bytes": float(size),
        "bits_per_stored_number": 8 * compressed.nbytes / weights,
        "code_bits_per_weight": sum(b.nbits() for b in books.values())
        / sum(b.codes.numel() for b in books.values()),
    }


def _codebook(
    arm: str, problem: LayerProblem, rates: dict[str, float], steps: int
) -> tuple[Codebook, float, float]:
    weight: Any = problem.layer.weight
    weight = weight.detach()
    if arm == "uniform":
        return uniform_codebook(weight, BITS), 0.0, 0.0
    if arm.startswith("k-means") and not arm.endswith("solved"):
        return kmeans_codebook(weight, BITS, 1 if arm.endswith("one table") else GROUPS), 0.0, 0.0
    search = CodeSearch(steps=0)
    if arm in _SEARCHED:
        name: Any = _SEARCHED[arm]
        search = CodeSearch(name, steps=steps, code_rate=rates[name])
    learned = learn_codebook(problem.layer, problem.moments(), bits=BITS, groups=GROUPS, search=search)
    return learned.codebook, learned.changed, learned.jump


def uniform_codebook(weight: Tensor, bits: int) -> Codebook:
    """Equally spaced codewords about zero, at the scale of least squared error in the weight among a hundred.

    Examples:
        >>> uniform_codebook(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), 2).table.tolist()
        [[-3.0, -1.0, 1.0, 3.0]]
    """
    levels = torch.arange(2**bits, device=weight.device) - (2**bits - 1) / 2
    scales = torch.linspace(0.01, 1, 100, device=weight.device) * weight.abs().max() / levels[-1]
    tables = (levels * scales[:, None]).half().to(weight.dtype)
    values = weight.reshape(1, -1).expand(100, -1)
    codes = nearest_codes(values, tables)
    best = int((tables.gather(1, codes.long()) - values).square().sum(1).argmin())
    group = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
    return Codebook.of(codes[best].reshape(weight.shape), tables[best, None], group, dtype=weight.dtype)
