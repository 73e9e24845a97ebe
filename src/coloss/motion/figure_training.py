"""Trains what frame interpolation of figures needs: networks for joints and masks on still pictures, an interpolator on pairs of pictures."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.metrics import predict
from coloss.motion.figure_networks import (
    FigureNetwork,
    MaskNetwork,
    heatmap_points,
    joint_error,
    joint_heatmaps,
    visible_heatmap_loss,
)
from coloss.motion.figure_sequences import FigureFrames, MotionParts, still_figures
from coloss.motion.frame_interpolation import FrameInterpolator, interpolation_metrics
from coloss.motion.interpolation_losses import reconstruction_loss
from coloss.train import Budget, cosine, fit
from coloss.train.method import Method

M = TypeVar("M", bound=nn.Module)

NETWORK_RATE, INTERPOLATOR_RATE = 6e-3, 2e-3
KEYPOINT_WIDTH, JUDGE_WIDTH, MASK_WIDTH, INTERPOLATOR_WIDTH = 16, 12, 8, 16


class Stage(NamedTuple):
    """How long and where a network is trained.

    Attributes:
        budget: of the training.
        seed: of the order of batches.
        folder: for checkpoints; None keeps none.
        progress: called with the share that is done.
    """

    budget: Budget
    seed: int = 0
    folder: Path | None = None
    progress: Callable[[float], None] | None = None


def seeded(build: Callable[[], M], seed: int) -> M:
    """A fresh network whose weights depend on the seed alone; the global random state is left as it was.

    Examples:
        >>> one, other = (seeded(partial(nn.Linear, 2, 2), 3) for _ in range(2))
        >>> torch.equal(one.weight, other.weight)
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def train_stage(
    model: M,
    data: Any,
    objective: Callable[[Any, Any], Any],
    stage: Stage,
    *,
    rate: float,
    batch_size: int = 16,
    methods: Sequence[Method] = (),
) -> M:
    """Train a network with AdamW and a cosine schedule, going on in the stage's folder where it was stopped; it comes back on the CPU, in eval mode.

    Examples:
        >>> trained = train_stage(
        ...     nn.Linear(2, 1),
        ...     (torch.ones(8, 2), torch.ones(8, 1)),
        ...     F.mse_loss,
        ...     Stage(Budget(steps=2)),
        ...     rate=1e-3,
        ... )
        >>> trained.training
        False
    """
    report = stage.progress
    run = fit(
        model,
        data,
        objective,
        methods,
        budget=stage.budget,
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=rate),
        learning_rate_schedule=cosine(warmup=0.05),
        checkpoint_dir=stage.folder,
        checkpoint_every=200,
        resume=stage.folder is not None,
        progress=None if report is None else lambda share, terms: report(share),
        seed=stage.seed,
    )
    return run.model.cpu().eval()  # type: ignore[return-value]


def train_keypoint_network(
    parts: MotionParts, stage: Stage, *, size: int, pictures: int = 2000, width: int | None = None
) -> FigureNetwork:
    """A network that gives a heatmap for each joint, trained on pictures of the training clips, drawn by the stage's seed."""
    stills = _stills(parts, stage, size, pictures)
    joints = stills.points.shape[1]
    heatmaps = joint_heatmaps(stills.points, size, visible=stills.visible)
    network = seeded(lambda: FigureNetwork(joints, width or KEYPOINT_WIDTH), stage.seed)
    return train_stage(network, (stills.images, heatmaps), visible_heatmap_loss, stage, rate=NETWORK_RATE)


def train_mask_network(
    parts: MotionParts, stage: Stage, *, size: int, pictures: int = 2000, width: int | None = None
) -> MaskNetwork:
    """A network that gives the logits of the figure's mask, trained like the keypoint network."""
    stills = _stills(parts, stage, size, pictures)
    network = seeded(lambda: MaskNetwork(1, width or MASK_WIDTH), stage.seed)
    targets = stills.masks[:, None]
    return train_stage(
        network, (stills.images, targets), F.binary_cross_entropy_with_logits, stage, rate=NETWORK_RATE
    )


def _stills(parts: MotionParts, stage: Stage, size: int, pictures: int) -> Any:
    generator = torch.Generator().manual_seed(stage.seed)
    return still_figures(parts.train, pictures, size=size, extent=parts.extent, generator=generator)


def train_interpolator(
    frames: FigureFrames,
    stage: Stage,
    *,
    network: FrameInterpolator | None = None,
    rate: float = INTERPOLATOR_RATE,
    methods: Sequence[Method] = (),
) -> FrameInterpolator:
    """An interpolator trained on the reconstruction loss, from fresh weights or from those of the network given, which is changed."""
    network = network or seeded(lambda: FrameInterpolator(INTERPOLATOR_WIDTH), stage.seed)
    return train_stage(
        network, frames.dataset, reconstruction_loss, stage, rate=rate, batch_size=8, methods=methods
    )


def judge_pictures(
    pictures: Float[Tensor, "frames 3 height width"], frames: FigureFrames, judge: nn.Module
) -> dict[str, float]:
    """How good pictures between others are, and how far the joints that a network of its own finds there are from the exact ones.

    Args:
        pictures: in place of the targets of `frames`; cut to [0, 1] first.
        frames: with the true pictures and joints.
        judge: a heatmap network that nothing was trained through.

    Returns:
        `joint_error` in pixels over visible joints, each at most half the picture's side, which is also what a joint costs that is not
        found; and `interpolation_metrics`.
    """
    truth = frames.dataset.targets
    assert isinstance(truth, Tensor)
    error = judged_joint_error(pictures, frames, judge)
    return {"joint_error": error, **interpolation_metrics(pictures, truth)}


def judged_joint_error(
    pictures: Float[Tensor, "frames 3 height width"], frames: FigureFrames, judge: nn.Module
) -> float:
    """The `joint_error` of `judge_pictures` alone; of the true pictures, it is what the judge itself gets wrong."""
    found = heatmap_points(predict(judge, pictures.clamp(0, 1)).outputs)
    return joint_error(found, frames.points, frames.visible, missed=pictures.shape[-1] / 2)


def interpolated(network: nn.Module, frames: FigureFrames) -> Float[Tensor, "frames 3 height width"]:
    """The pictures that an interpolator makes of all pairs, on the CPU."""
    outputs = predict(network, frames.dataset).outputs
    assert isinstance(outputs, Tensor)
    return outputs
