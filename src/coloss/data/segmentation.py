"""Images with a class for every pixel, ready for a model."""

import torch
import torch.nn.functional as F

from coloss.data.catalog import dataset_info
from coloss.data.dataset import IndexedDataset, Splits
from coloss.data.raw import load_raw
from coloss.errors import InputError

UNLABELLED = -100
"""Target of pixels that count nowhere, which `torch.nn.functional.cross_entropy` leaves out by default."""


def load_segmentation(name: str = "camvid", *, shrink: int = 1) -> Splits:
    """Images and class maps of a segmentation data set, in its own parts for training, validation and testing.

    Args:
        name: of a data set of kind "segmentation", such as "camvid".
        shrink: make images smaller by a whole number: pixels are averaged, and of the labels every `shrink`-th is kept (the one at the
            middle of its block, or right of it). A rest of rows or columns is cut off.

    Returns:
        `Splits` of kind "segmentation": inputs float32 (samples, 3, height, width) in [0, 1], targets int64 (samples, height, width) in
        [0, `num_classes`), or -100 where a pixel has no label. Ids number the images of all parts.

    Raises:
        InputError: for a data set of another kind, or `shrink` < 1 or larger than the images.
        UnknownNameError: if no data set has this name.

    Examples:
        >>> splits = load_segmentation("camvid")
        >>> splits.input_shape, splits.num_classes, len(splits.train), splits.class_names[:3]
        ((3, 90, 120), 11, 220, ('Sky', 'Building', 'Pole'))
    """
    info = dataset_info(name)
    if info.kind != "segmentation" or not isinstance(info.classes, int):
        raise InputError(f"data must be a segmentation data set, such as camvid, got {name!r} ({info.kind})")
    raw, first = load_raw(name), 0
    rows, columns = raw["train_image"].shape[1:3]
    if not 1 <= shrink <= min(rows, columns):
        raise InputError(f"shrink must be in [1, {min(rows, columns)}], got {shrink}")
    rows, columns, middle = rows // shrink * shrink, columns // shrink * shrink, shrink // 2
    parts = []
    for part in ("train", "val", "test"):
        images = torch.from_numpy(raw[f"{part}_image"]).permute(0, 3, 1, 2).float().div(255).contiguous()
        if shrink > 1:
            images = F.avg_pool2d(images, shrink)
        classes = torch.from_numpy(raw[f"{part}_mask"])[:, middle:rows:shrink, middle:columns:shrink].long()
        classes = classes.masked_fill(classes >= info.classes, UNLABELLED)
        parts.append(IndexedDataset(images, classes, torch.arange(first, first + len(images))))
        first += len(images)
    train, validation, test = parts
    return Splits(
        name=name,
        kind="segmentation",
        train=train,
        validation=validation,
        test=test,
        input_shape=tuple(train.inputs.shape[1:]),  # type: ignore[union-attr]
        num_classes=info.classes,
        class_names=tuple(map(str, raw["class_names"][: info.classes])),
        description="pixels in [0, 1]; unlabelled pixels have target -100",
    )
