"""Facts about the table of frozen encoders."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coloss.data import MotionClips, Skeleton, motion_splits
from coloss.errors import InputError
from coloss.metrics import knn_probe, linear_probe
from coloss.motion import evaluate_skeleton_encoder
from coloss.nn import SkeletonEncoder
from coloss.ops import graph_partition

BODY = Skeleton((-1, 0, 1))


def clips() -> MotionClips:
    """Two kinds of movement of three persons."""
    random = np.random.default_rng(0)
    time = np.linspace(0, 1, 10)[:, None, None]
    recorded = [
        random.normal(size=(1, 3, 3)) + time * (3.0 if n % 2 else -3.0) * np.arange(3)[:, None]
        + 0.1 * random.normal(size=(10, 3, 3))
        for n in range(36)
    ]  # fmt: skip
    labels = {"action": np.arange(36) % 2, "subject": np.arange(36) // 12}
    return MotionClips.from_list(recorded, BODY, 15, labels=labels)


def encoder(dropout: float = 0.5) -> SkeletonEncoder:
    torch.manual_seed(0)
    return SkeletonEncoder(
        graph_partition(BODY.parents), widths=(4,), strides=(2,), kernel=3, dropout=dropout
    )


def test_the_table_holds_its_anchors_and_equals_the_probes() -> None:
    splits = motion_splits(clips(), frames=8)
    model = encoder()
    table = evaluate_skeleton_encoder(model, splits, untrained=encoder(), labels_per_class=(2,))
    assert list(table) == ["encoder", "untrained encoder", "raw coordinates"]
    train, test = splits.train.all(), splits.test.all()
    mean, std = train.inputs.flatten(1).mean(0), train.inputs.flatten(1).std(0, correction=0)
    std = torch.where(std > 0, std, 1)
    raw = [(part.inputs.flatten(1) - mean) / std for part in (train, test)]
    parts = (raw[0], train.targets, raw[1], test.targets)
    assert table["raw coordinates"]["knn"] == knn_probe(*parts, k=5, temperature=0.1).accuracy
    few = [linear_probe(*parts, labels=4, seed=seed).accuracy for seed in range(3)]
    assert table["raw coordinates"]["linear_2_per_class"] == pytest.approx(sum(few) / 3)
    assert table["encoder"] == table["untrained encoder"]
    # 1 % of 12 clips is no label: one for each class is the least.
    assert table["encoder"]["labels_1_percent"] == 2.0
    assert table["encoder"]["labels_10_percent"] == 2.0


def test_clips_a_name_and_splits_are_the_same_thing() -> None:
    model = encoder()
    one = evaluate_skeleton_encoder(model, clips(), untrained=encoder(), frames=8, label_shares=())
    other = evaluate_skeleton_encoder(
        model, motion_splits(clips(), frames=8), untrained=encoder(), label_shares=()
    )
    assert one == other
    by_person = evaluate_skeleton_encoder(
        model, clips(), untrained=encoder(), frames=8, label="action", split="validation", label_shares=()
    )
    assert set(by_person["encoder"]) == {"linear", "knn"}


def test_probing_does_not_touch_batch_norm_and_dropout_is_off() -> None:
    """The trap: an encoder left in training mode would give other features, and learn from the test clips."""
    model = encoder().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate_skeleton_encoder(model, clips(), untrained=encoder(), frames=8)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert evaluate_skeleton_encoder(model.eval(), clips(), untrained=encoder(), frames=8) == first


def test_features_that_are_not_finite_give_nan() -> None:
    class Broken(nn.Module):
        def forward(self, clips: Tensor) -> Tensor:
            return clips.flatten(1) * torch.nan

    table = evaluate_skeleton_encoder(Broken(), clips(), untrained=encoder(), frames=8)
    assert all(math.isnan(value) for value in table["encoder"].values())
    assert not math.isnan(table["raw coordinates"]["linear"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be >= 1, got 0"),
        ({"label_shares": (0.0,)}, r"label_shares must be in \(0, 1\], got 0.0"),
        ({"labels_per_class": (0,)}, "labels_per_class must be >= 1, got 0"),
        ({"split": "tests"}, "data must have clips for 'tests'"),
    ],
)
def test_bad_input_is_named(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_skeleton_encoder(encoder(), clips(), untrained=encoder(), frames=8, **options)


def test_the_encoder_cannot_be_its_own_anchor() -> None:
    model = encoder()
    with pytest.raises(InputError, match="untrained must be the network as initialised"):
        evaluate_skeleton_encoder(model, clips(), untrained=model)
    with pytest.raises(InputError, match="must not be named 'raw coordinates'"):
        evaluate_skeleton_encoder({"raw coordinates": model}, clips(), untrained=encoder())


def test_several_encoders_are_rows_of_one_table() -> None:
    table = evaluate_skeleton_encoder(
        {"one": encoder(), "other": encoder()}, clips(), untrained=encoder(), frames=8, label_shares=()
    )
    assert list(table) == ["one", "other", "untrained encoder", "raw coordinates"]
    assert table["one"] == table["other"] == table["untrained encoder"]
