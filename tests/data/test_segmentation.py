"""Facts about segmentation data as a model gets them."""

import pytest
import torch

from coloss.data import load_raw, load_segmentation
from coloss.errors import InputError


def test_camvid_has_its_parts_and_unlabelled_pixels_do_not_count():
    splits, raw = load_segmentation(), load_raw("camvid")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [220, 50, 100]
    assert splits.train.inputs.shape == (220, 3, 90, 120)
    assert torch.equal(splits.test.targets == -100, torch.from_numpy(raw["test_mask"] == 11))
    assert splits.train.targets.max() == 10
    ids = torch.cat([part.ids for part in (splits.train, splits.validation, splits.test)])
    assert ids.unique().numel() == 370


def test_shrinking_averages_pixels_and_picks_labels():
    whole, small = load_segmentation(), load_segmentation(shrink=3)
    assert small.input_shape == (3, 30, 40)
    torch.testing.assert_close(
        small.test.inputs[0, :, 2, 5], whole.test.inputs[0, :, 6:9, 15:18].mean((1, 2))
    )
    assert torch.equal(small.test.targets, whole.test.targets[:, 1::3, 1::3])


def test_other_data_are_refused():
    with pytest.raises(InputError, match="segmentation data set"):
        load_segmentation("iris")
    with pytest.raises(InputError, match=r"shrink must be in \[1, 90\], got 0"):
        load_segmentation(shrink=0)
