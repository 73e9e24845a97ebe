"""The activation memory of one training step by number of blocks, beside backpropagation and checkpointing."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from coloss.distillation import (
    AugmentedLocalLearning,
    LocalLearning,
    MomentumLocalLearning,
    block_count_table,
)
from coloss.distillation.local_learning_trial import residual_classifier
from coloss.lab.benchmarks.measure import Report, silent
from coloss.lab.benchmarks.row import Row

HEADS: dict[str, Callable[[Tensor, int], LocalLearning]] = {
    "linear heads": lambda example, blocks: LocalLearning(example, blocks=blocks),
    "AugLocal": lambda example, blocks: AugmentedLocalLearning(example, blocks=blocks),
    "MAN": lambda example, blocks: MomentumLocalLearning(example, blocks=blocks),
}


def measure(
    report: Report = silent,
    *,
    depth: int = 16,
    blocks: Sequence[int] = (2, 4, 8, 16),
    batch: int = 128,
    size: int = 32,
) -> list[Row]:
    """Megabytes that a step of a 16-layer residual network keeps for its backward pass, trained in blocks and by backpropagation.

    Args:
        report: told the share done.
        depth: layers.
        blocks: numbers of blocks.
        batch: images in a step.
        size: of an image.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, size, size, generator=generator)
    targets = torch.randint(10, (batch,), generator=generator)
    table: list[Row] = []
    for done, (name, new_method) in enumerate(HEADS.items()):
        found = block_count_table(
            lambda: residual_classifier(depth, in_channels=3),
            (images, targets),
            nn.functional.cross_entropy,
            partial(new_method, images[:2]),
            blocks,
            batch=(images, targets),
        )
        plain = found[0].saved_bytes / 1e6
        for row in found[2 if table else 0 :]:
            case = row.name if row.blocks == 1 else f"{name}, {row.blocks} blocks"
            table.append(Row.of(case, [row.saved_bytes / 1e6], "MB", over=[plain]))
        most = max(row.share for row in found[2:])
        table.append(Row.of(f"{name}: largest share", [most], "x", limit=0.65, note="of backpropagation"))
        report((done + 1) / len(HEADS))
    return table
