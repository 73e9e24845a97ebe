"""What Fabric's strategies and precisions ask of a run: what they would get wrong, and how a batch reaches them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.train.step import TrainingStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def check_strategy(fabric: "Fabric", step: TrainingStep, folder: Path | None, joins: bool) -> None:
    """Refuse what sharded weights would silently get wrong."""
    strategy = type(fabric.strategy).__name__
    if strategy not in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
        return
    if folder is not None:
        raise InputError(
            f"checkpoint_dir works on one device and with ddp, not with {strategy}: store the weights with fabric.save"
        )
    if step.taker is not None:
        raise InputError(
            f"{type(step.taker).__name__} needs whole gradients, which {strategy} shards: use strategy ddp"
        )
    if joins:
        raise InputError(
            f"accumulate > 1 with a batch statistic needs whole weights, which {strategy} shards: use strategy ddp"
        )


def input_conversion(fabric: "Fabric", step: TrainingStep) -> Callable[[Batch], Batch]:
    """How a batch reaches device and precision; nothing is done where nothing is needed."""
    from lightning_fabric.plugins import Precision

    precision = fabric.strategy.precision
    if getattr(precision, "scaler", None) is not None and (step.taker is not None or step._gradient_hooks):
        raise InputError(
            "precision 16-mixed scales gradients, which a method of this run edits: use bf16-mixed or 32-true"
        )
    same_precision = type(precision) is Precision
    if same_precision and fabric.device.type == "cpu":
        return lambda batch: batch

    def convert(batch: Batch) -> Batch:
        batch = batch.to(fabric.device)
        if not same_precision:
            batch = Batch(precision.convert_input(batch.inputs), batch.targets, batch.ids, batch.extras)
        return batch

    return convert
