"""From recorded motion to slow motion, in one call: networks for joints and masks, an interpolator, and the same trained on with what they see."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from coloss.errors import InputError
from coloss.motion.figure_sequences import FigureFrames, MotionParts, figure_frames, motion_parts
from coloss.motion.figure_training import (
    INTERPOLATOR_WIDTH,
    JUDGE_WIDTH,
    Stage,
    interpolated,
    judge_pictures,
    judged_joint_error,
    train_interpolator,
    train_keypoint_network,
    train_mask_network,
)
from coloss.motion.frame_interpolation import FrameInterpolator
from coloss.motion.human_aware_loss import HumanAwareLoss
from coloss.motion.interpolation_losses import reconstruction_loss
from coloss.train import Budget, load_model, matched_weights, save_model
from coloss.train.run_folder import claim_folder, read_run, source_name, write_metrics

_STEPS = 2400
_STAGES = {"keypoints": 0.2, "masks": 0.1, "judge": 0.2, "base": 0.3, "reconstruction": 0.1, "losses": 0.1}
_PICTURES, _PAIRS, _JUDGED, _SHOWN = 2000, 1200, 400, 8
_RATE = 1e-3
_COLUMNS = ("first", "last", "true", "base", "losses")


def train_frame_interpolator(
    data: str | Path = "bandai",
    folder: str | Path = "runs/sportsslomo",
    *,
    size: int = 32,
    gap: int = 3,
    ratio: float = 2.0,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains a small frame interpolator with the keypoint and mask terms, and one without; this is behind `coloss run sportsslomo`.

    The motion is recorded, the pictures are drawn from it. Trained in turn: a network for joints, one for masks, a second one for joints that only
    judges, an interpolator on the reconstruction loss; then that goes on in two ways for the same budget, without and with the two terms. A
    run that was stopped goes on in its folder, in the stage where it was.

    Args:
        data: recorded motion: a name or path for `coloss.data.load_motion`.
        folder: for `model.safetensors` (with the terms), `base.safetensors` (without), the other networks, `pictures.png` (first, last, true
            picture, base, with losses, side by side), `run.json`, `metrics.json` and checkpoints.
        size: side of a picture in pixels, >= 16.
        gap: recorded frames from the first picture to the last, >= 2.
        ratio: how strongly both terms together pull at the pictures at first, beside the reconstruction loss (norms of gradients), > 0.
        budget: of all stages together; default: 2,400 steps.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        On pictures of test clips: `joint_error_*` in pixels by the judge, `psnr_*`, `ssim_*` and `interpolation_error_*` of `losses`, `base`
        (trained on for as long without the terms) and `blend` of the two pictures; `joint_error_true` of the true pictures, which is what the
        judge itself gets wrong; and `motion`, the mean way of a joint between the two pictures.

    Raises:
        InputError: for a value out of range, motion that cannot be read or hardly moves, or a folder that holds another run.

    Examples:
        >>> import tempfile
        >>> metrics = train_frame_interpolator(
        ...     "bandai", tempfile.mkdtemp(), budget=Budget(steps=20)
        ... )  # doctest: +SKIP
        >>> metrics["joint_error_true"] < metrics["joint_error_losses"]  # doctest: +SKIP
        True
    """
    if size < 16:
        raise InputError(f"size must be >= 16 pixels, got {size}")
    if gap < 2:
        raise InputError(f"gap must be >= 2, so that there is a frame between, got {gap}")
    if not 0 < ratio < float("inf"):
        raise InputError(f"ratio must be > 0 and finite, got {ratio}")
    parts, folder = motion_parts(data), Path(folder)
    run: dict[str, Any] = {
        "data": source_name(str(data)),
        "seed": seed,
        "size": size,
        "gap": gap,
        "ratio": ratio,
        "budget": (budget or Budget(steps=_STEPS)).as_dict(),
    }
    train, judged = _pairs(parts, run)
    claim_folder(folder, run)
    done = 0.0

    def stage(name: str, offset: int) -> Stage:
        nonlocal done
        start, part = done, _STAGES[name]
        done += part
        return Stage(
            Budget(**run["budget"]).part(part),
            seed + 1000 * offset,
            folder / "checkpoints" / name,
            None if progress is None else lambda share: progress(start + part * share),
        )

    drawn = {"size": size, "pictures": _PICTURES}
    keypoints = train_keypoint_network(parts, stage("keypoints", 1), **drawn)
    masks = train_mask_network(parts, stage("masks", 2), **drawn)
    judge = train_keypoint_network(parts, stage("judge", 3), width=JUDGE_WIDTH, **drawn)
    first = train_interpolator(train, stage("base", 4))
    base = train_interpolator(train, stage("reconstruction", 5), network=copy.deepcopy(first), rate=_RATE)
    losses = train_interpolator(
        train,
        stage("losses", 5),
        network=copy.deepcopy(first),
        rate=_RATE,
        methods=[_human_aware(keypoints, masks, first, train, ratio)],
    )
    for name, network in {
        "model": losses,
        "base": base,
        "keypoints": keypoints,
        "masks": masks,
        "judge": judge,
    }.items():
        save_model(network, folder / f"{name}.safetensors")
    metrics = _judge(folder, base, judge, judged)
    write_metrics(folder, metrics)
    return metrics


def load_frame_interpolator(folder: str | Path, name: str = "model") -> FrameInterpolator:
    """The interpolator that `train_frame_interpolator` stored, in evaluation mode.

    Args:
        folder: of the run.
        name: "model", with the terms, or "base", without.

    Raises:
        InputError: if there is no such run, it is damaged, or the name is another.

    Examples:
        >>> network = load_frame_interpolator("runs/sportsslomo-bandai")  # doctest: +SKIP
        >>> slow_motion(network, torch.rand(5, 3, 32, 32), 4).shape  # doctest: +SKIP
        torch.Size([17, 3, 32, 32])
    """
    if name not in ("model", "base"):
        raise InputError(f'name must be "model" or "base", got {name!r}')
    folder = Path(folder)
    read_run(folder)
    network = FrameInterpolator(INTERPOLATOR_WIDTH)
    load_model(network, folder / f"{name}.safetensors")
    return network.eval()


def _pairs(parts: MotionParts, run: dict[str, Any]) -> tuple[FigureFrames, FigureFrames]:
    generator = torch.Generator().manual_seed(run["seed"])
    options: dict[str, Any] = {
        "size": run["size"],
        "gap": run["gap"],
        "extent": parts.extent,
        "generator": generator,
    }
    return figure_frames(parts.train, _PAIRS, **options), figure_frames(parts.test, _JUDGED, **options)


def _human_aware(
    keypoints: Any, masks: Any, network: FrameInterpolator, frames: FigureFrames, ratio: float
) -> HumanAwareLoss:
    """Both terms, at weights with which they pull as strongly as asked at what the network gives now."""
    unit = HumanAwareLoss(keypoints, masks)
    batch = frames.dataset.take(torch.arange(min(128, len(frames.dataset))))
    prediction = network(batch.inputs)
    objective = reconstruction_loss(prediction, batch.targets)
    weights = matched_weights(unit.losses, prediction, batch.targets, objective, ratio / 2**0.5)
    return HumanAwareLoss(
        keypoints, masks, keypoint_weight=weights["keypoints"], mask_weight=weights["masks"]
    )


def _judge(folder: Path, base: FrameInterpolator, judge: Any, judged: FigureFrames) -> dict[str, float]:
    first, last, share = judged.dataset.inputs
    truth = judged.dataset.targets
    assert isinstance(truth, Tensor)
    made = {
        "losses": interpolated(load_frame_interpolator(folder), judged),
        "base": interpolated(base, judged),
        "blend": torch.lerp(first, last, share[:, None, None, None]),
    }
    metrics = {
        f"{metric}_{name}": value
        for name, pictures in made.items()
        for metric, value in judge_pictures(pictures, judged, judge).items()
    }
    metrics["joint_error_true"] = judged_joint_error(truth, judged, judge)
    metrics["motion"] = judged.motion
    shown = [first, last, truth, made["base"], made["losses"]]
    save_picture_rows([column[:_SHOWN] for column in shown], folder / "pictures.png", _COLUMNS)
    return metrics


def save_picture_rows(
    columns: Sequence[Float[Tensor, "rows 3 height width"]], path: str | Path, titles: Sequence[str] = ()
) -> None:
    """Write pictures side by side, enlarged without smoothing, with a title above each column.

    Args:
        columns: pictures of one size, cut to [0, 1]; the k-th row holds the k-th of each.
        path: of the PNG file.
        titles: one for each column, or none.

    Raises:
        InputError: for no pictures, unequal sizes, or a file that cannot be written.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pictures.png"
        >>> save_picture_rows([torch.zeros(2, 3, 8, 8)] * 3, path, ("a", "b", "c"))
        >>> Image.open(path).width >= 3 * 96
        True
    """
    if not columns or not len(columns[0]) or len({tuple(column.shape) for column in columns}) != 1:
        raise InputError(
            f"columns must hold pictures of one size, got {[tuple(column.shape) for column in columns]}"
        )
    if titles and len(titles) != len(columns):
        raise InputError(f"titles must be {len(columns)} or none, got {len(titles)}")
    height, width = columns[0].shape[2:]
    scale, rim, head = max(1, round(96 / min(height, width))), 4, 16 if titles else 0
    rows = len(columns[0])
    sheet = Image.new(
        "RGB",
        (len(columns) * (width * scale + rim) + rim, head + rows * (height * scale + rim) + rim),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for place, column in enumerate(columns):
        left = rim + place * (width * scale + rim)
        if titles:
            draw.text((left, 2), titles[place], fill="black")
        values = (column.clamp(0, 1) * 255).round().byte().movedim(1, 3)
        for row, picture in enumerate(values):
            enlarged = Image.fromarray(picture.numpy()).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            sheet.paste(enlarged, (left, head + rim + row * (height * scale + rim)))
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error
