"""Pictures cut in two: the smallest honest data for two modalities, or for queries and the documents they should find."""

from dataclasses import replace

from torch import Tensor

from coloss.data.dataset import IndexedDataset, Splits


def halves(splits: Splits) -> Splits:
    """Same splits with each image as the pair (its top half, its bottom half).

    Args:
        splits: of images (channels, height, width), with an even height.

    Returns:
        splits whose `inputs` are tuples of two tensors (samples, channels, height / 2, width), with `input_shape` that of one half;
        targets and ids stay.

    Raises:
        ValueError: if the inputs are no images of even height.

    Examples:
        >>> from coloss.data import load
        >>> top, bottom = halves(load("digits", limit=20)).train.inputs
        >>> top.shape, bottom.shape
        (torch.Size([20, 1, 4, 8]), torch.Size([20, 1, 4, 8]))
    """
    shape = splits.input_shape
    if len(shape) != 3 or shape[1] % 2 or not isinstance(splits.train.inputs, Tensor):
        raise ValueError(
            f"splits must hold images (channels, even height, width), got samples of shape {shape}"
        )
    return replace(
        splits,
        train=_cut(splits.train),
        validation=_cut(splits.validation),
        test=_cut(splits.test),
        input_shape=(shape[0], shape[1] // 2, shape[2]),
        standardize=None,
        description=f"{splits.description}; images as (top half, bottom half)",
    )


def _cut(dataset: IndexedDataset) -> IndexedDataset:
    images = dataset.inputs
    assert isinstance(images, Tensor)
    top, bottom = images.chunk(2, dim=2)
    return IndexedDataset(
        (top.contiguous(), bottom.contiguous()), dataset.targets, dataset.ids, dataset.extras
    )
