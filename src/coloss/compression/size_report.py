"""What compression did to a model: bytes on disk, density, rank, bits, the metric before and after, multiply-adds, latency."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from coloss.compression.compressed_file import compress_model, load_compressed, tied_names
from coloss.compression.cost import CONVOLUTIONS, multiply_adds
from coloss.compression.stored_weights import LowRankWeight, StoredWeight
from coloss.errors import InputError
from coloss.metrics import evaluation_mode
from coloss.nn.operation_count import operation_counter
from coloss.train.checkpoint import split_state


@dataclass(frozen=True)
class WeightRow:
    """One tensor of the model.

    Attributes:
        name: in the state dict.
        kind: how it is stored, see `coloss.compression.stored_weights`.
        count: its entries.
        density: share of entries that are not zero.
        rank: of the factors, where it is stored by factors; else None.
        bits: stored bits for each entry, tables and masks included.
        nbytes: stored bytes.
    """

    name: str
    kind: str
    count: int
    density: float
    rank: int | None
    bits: float
    nbytes: int


@dataclass(frozen=True)
class CompressionReport:
    """Size, cost and worth of a model before and after compression.

    Attributes:
        bytes_before: size on disk of the plain weights of the model before, tied ones once; as `coloss.save_model` writes it where none are tied.
        bytes_after: size on disk of the compressed file, header included.
        density: share of the weights that are not zero, over all matrices and kernels.
        bits: stored bits for each entry of the restored state dict.
        metric_before, metric_after: what `evaluate` gave for the model before, and for the model as read back; None without it.
        largest_difference: between the outputs of the given model and of the one read back from the file; 0 where storage is exact.
        multiply_adds_before, multiply_adds_after: of one forward pass of `inputs`, as the modules run.
        multiply_adds_nonzero: of those after, the ones with a weight that is not zero: what a kernel that skips zeros would do.
        latency_before, latency_after: seconds of that forward pass, medians of the same process on the same threads.
        rows: one for each stored tensor.
    """

    bytes_before: int
    bytes_after: int
    density: float
    bits: float
    metric_before: float | None
    metric_after: float | None
    largest_difference: float
    multiply_adds_before: int
    multiply_adds_after: int
    multiply_adds_nonzero: int
    latency_before: float
    latency_after: float
    rows: tuple[WeightRow, ...]

    @property
    def ratio(self) -> float:
        """Size on disk after over before."""
        return self.bytes_after / self.bytes_before

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, with the ratio."""
        return {"ratio": self.ratio, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"size        {self.bytes_before:,} -> {self.bytes_after:,} bytes ({self.ratio:.1%})",
            f"weights     {self.density:.1%} not zero, {self.bits:.2f} bits each",
            f"multiply-adds {self.multiply_adds_before:,} -> {self.multiply_adds_after:,} "
            f"({self.multiply_adds_nonzero:,} with weights that are not zero)",
            f"latency     {self.latency_before * 1e3:.3f} -> {self.latency_after * 1e3:.3f} ms",
            f"outputs     differ by {self.largest_difference:.2g} at most after loading",
        ]
        if self.metric_before is not None and self.metric_after is not None:
            lines.insert(0, f"metric      {self.metric_before:.4f} -> {self.metric_after:.4f}")
        return "\n".join(lines)


def compression_report(
    model: nn.Module,
    inputs: Any,
    *,
    before: nn.Module | None = None,
    given: Mapping[str, StoredWeight] | None = None,
    path: str | Path | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> CompressionReport:
    """Store a model, read it back, and compare it with what it was.

    Args:
        model: as it ships. Left with the weights it has: the file's copy is loaded into it for the comparison, and taken out again.
        inputs: a batch that `model(inputs)` takes; for cost, latency and the difference of outputs.
        before: the model before compression; `model` itself where None.
        given: stored forms that cannot be read off the weights, see `compress_model`.
        path: where the file goes; None measures it in a temporary folder.
        evaluate: gives the metric of a model.
        notes: plain JSON for the file.

    Raises:
        InputError: if the model's output is no tensor, the file cannot be written, or `given` does not fit.

    Cost: five forward passes or as many as fit in a fifth of a second for each model, whichever are more; twice the model's memory.

    Examples:
        >>> from coloss.ops import nm_mask
        >>> layer = nn.Linear(256, 256)
        >>> _ = layer.weight.data.mul_(nm_mask(layer.weight, 1, 4))
        >>> report = compression_report(layer, torch.ones(1, 256))
        >>> report.density, report.ratio < 0.3, report.largest_difference
        (0.25, True, 0.0)
    """
    before = model if before is None else before
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.coloss" if path is None else path
        file = compress_model(model, given, notes).save(file)
        compressed = load_compressed(file)
        bytes_after = file.stat().st_size
        bytes_before = _plain_size(before, Path(folder) / "before.safetensors")
    kept = {name: t.clone() if isinstance(t, Tensor) else t for name, t in model.state_dict().items()}
    expected = _output(model, inputs)
    metric_before = None if evaluate is None else float(evaluate(before))
    try:
        compressed.load_into(model)
        restored = _output(model, inputs)
        metric_after = None if evaluate is None else float(evaluate(model))
        costs = _multiply_adds_nonzero(model, inputs)
    finally:
        model.load_state_dict(kept)
    matrices = [
        kept[name] for name in compressed.weights if isinstance(kept[name], Tensor) and kept[name].ndim > 1
    ]
    entries = sum(t.numel() for t in matrices)
    count = sum(kept[name].numel() for name in compressed.weights)
    rows = tuple(_row(name, stored, kept[name]) for name, stored in compressed.weights.items())
    return CompressionReport(
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        density=sum(_nonzero(t) for t in matrices) / entries if entries else 1.0,
        bits=8 * compressed.nbytes / count if count else 0.0,
        metric_before=metric_before,
        metric_after=metric_after,
        largest_difference=float((restored - expected).abs().max()) if expected.numel() else 0.0,
        multiply_adds_before=multiply_adds(before, inputs),
        multiply_adds_after=multiply_adds(model, inputs),
        multiply_adds_nonzero=costs,
        latency_before=_latency(before, inputs),
        latency_after=_latency(model, inputs),
        rows=rows,
    )


def _row(name: str, stored: StoredWeight, weight: Tensor) -> WeightRow:
    count = weight.numel()
    return WeightRow(
        name=name,
        kind=stored.kind,
        count=count,
        density=_nonzero(weight) / count if count else 1.0,
        rank=stored.left.shape[-1] if isinstance(stored, LowRankWeight) else None,
        bits=8 * stored.nbytes / count if count else 0.0,
        nbytes=stored.nbytes,
    )


def _nonzero(weight: Tensor) -> int:
    # Torch does not count in floats of eight bits.
    eight = weight.is_floating_point() and weight.element_size() == 1
    return int((weight.float() if eight else weight).count_nonzero())


def _plain_size(model: nn.Module, path: Path) -> int:
    tensors, values = split_state("", model.state_dict())
    tied = tied_names(tensors)
    plain = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items() if n not in tied}
    try:
        save_file(plain, path, metadata={"coloss": json.dumps(values)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    return path.stat().st_size


def _output(model: nn.Module, inputs: Any) -> Tensor:
    with evaluation_mode(model):
        output = model(inputs)
    if not isinstance(output, Tensor):
        raise InputError(f"model must give one tensor for inputs, got {type(output).__name__}")
    return output.detach().float()


def _latency(model: nn.Module, inputs: Any) -> float:
    with evaluation_mode(model):
        timer = Timer(
            "model(inputs)", globals={"model": model, "inputs": inputs}, num_threads=torch.get_num_threads()
        )
        return float(timer.blocked_autorange(min_run_time=0.2).median)


def _multiply_adds_nonzero(model: nn.Module, inputs: Any) -> int:
    """Count every layer at the share of its weights that are not zero; what is not a layer's product counts whole."""
    with evaluation_mode(model), operation_counter() as counter:
        model(inputs)
    total = counter.get_total_flops()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            key = ".".join(part for part in (type(model).__name__, name) if part)
            flops = sum(counter.get_flop_counts().get(key, {}).values())
            weight = module.weight.detach()
            total -= round(flops * (1 - int(weight.count_nonzero()) / max(weight.numel(), 1)))
    return total // 2
