import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coloss import TrainingStep
from coloss.distillation import (
    AugmentedLocalLearning,
    augmented_head,
    augmented_layers,
    pyramid_depths,
    residual_layer,
    uniform_layer_indices,
)
from coloss.distillation.augmented_local_heads import CLAIM, SYSTEM
from coloss.distillation.local_learning_trial import residual_classifier
from coloss.errors import InputError
from coloss.lab import find_entry, verify
from coloss.lab.catalog import import_name
from coloss.nn import MLP, Classifier, ConvNet, Transformer
from coloss.nn.resnet import PostactivationBlock


def test_indices_in_closed_form():
    assert uniform_layer_indices(0, 16, 3) == [5, 10, 15]
    assert uniform_layer_indices(12, 16, 5) == [13, 14, 15]
    assert uniform_layer_indices(15, 16, 2) == []


@given(st.integers(2, 60), st.data())
def test_indices_rise_to_the_last_layer(num_layers, data):
    layer = data.draw(st.integers(0, num_layers - 2))
    depth = data.draw(st.integers(1, 70))
    found = uniform_layer_indices(layer, num_layers, depth)
    assert found[-1] == num_layers - 1 and found[0] > layer
    assert len(found) == min(depth, num_layers - 1 - layer)
    assert all(a < b for a, b in zip(found, found[1:], strict=False))


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 1))
def test_depths_fall_and_stay_positive(num_blocks, depth, taper):
    found = pyramid_depths(num_blocks, depth, taper)
    assert len(found) == num_blocks - 1
    assert all(1 <= value <= depth for value in found)
    assert found == sorted(found, reverse=True)
    if found:
        assert found[0] == depth
    assert pyramid_depths(num_blocks, depth, 0.0) == [depth] * (num_blocks - 1)
    if num_blocks > 2:
        assert pyramid_depths(num_blocks, depth, 1.0)[-1] == 1


def test_strides_follow_the_doublings_of_the_width():
    widths = [8, 8, 16, 16, 32, 64]
    made, width = augmented_layers([residual_layer] * 6, widths, 0, [1, 2, 3, 4, 5])
    assert [block.branch[0].stride[0] for block in made] == [1, 2, 1, 2, 2] and width == 64
    # Two doublings at once: one stride now, the other at the next layer.
    made, _ = augmented_layers([residual_layer] * 6, widths, 0, [4, 5])
    assert [block.branch[0].stride[0] for block in made] == [2, 2]
    made, width = augmented_layers([residual_layer] * 6, widths, 0, [1, 2], widen=2.0)
    assert [block.branch[0].stride[0] for block in made] == [1, 2] and width == 32


def test_widths_that_double_by_small_steps_take_one_stride():
    for widths in ([10, 14, 20], [6, 7, 12], [48, 56, 64, 80, 96]):
        builders = [lambda channels, width, stride: nn.Conv1d(channels, width, 1, stride)] * len(widths)
        made, _ = augmented_layers(builders, widths, 0, range(1, len(widths)))
        assert [layer.stride[0] for layer in made] == [1] * (len(widths) - 2) + [2]


def test_build_and_widen_shape_the_heads():
    inputs, built = torch.randn(4, 6), []

    def build(channels, width, stride):
        built.append((channels, width, stride))
        return nn.Linear(channels, width)

    method = AugmentedLocalLearning(inputs[:2], depth=1, widen=2.0, build=build, join_last=False)
    TrainingStep(MLP(6, [8, 12, 16], 3), F.cross_entropy, [method])
    assert built == [(8, 32, 2), (12, 32, 1)]
    assert [head.linear.in_features for head in method.heads] == [32, 32]


def test_networks_with_nothing_to_cut_are_refused():
    inputs = torch.randn(4, 6)
    for blocks, layers in ((None, 3), (2, 3)):
        with pytest.raises(InputError, match=f"got blocks={blocks} and depth=2 for {layers} layers"):
            TrainingStep(MLP(6, [8] * 3, 3), F.cross_entropy, [AugmentedLocalLearning(inputs, blocks=blocks)])
    method = AugmentedLocalLearning(inputs, blocks=1)
    TrainingStep(MLP(6, [8] * 3, 3), F.cross_entropy, [method])
    assert method.cuts == []


def test_a_head_of_full_depth_has_the_shape_of_the_rest_of_the_network():
    model, example = residual_classifier(6), torch.zeros(2, 1, 8, 8)
    method = AugmentedLocalLearning(example, depth=9, taper=0.0, join_last=False)
    TrainingStep(model, F.cross_entropy, [method])
    rest = [block for stage in model.backbone.stages for block in stage]
    head = method.heads[0]
    assert [[tuple(p.shape) for p in layer.parameters()] for layer in head.layers] == [
        [tuple(p.shape) for p in layer.parameters()] for layer in rest
    ]
    assert head.linear.weight.shape == model.head.weight.shape
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for p in method.heads.parameters())


def test_the_last_layers_join():
    """16 blocks of 16 layers with d = 2 are 14, as published."""
    example = torch.zeros(2, 1, 8, 8)
    for join, blocks in ((True, 14), (False, 16)):
        method = AugmentedLocalLearning(example, depth=2, join_last=join)
        TrainingStep(residual_classifier(16), F.cross_entropy, [method])
        assert len(method.cuts) + 1 == blocks
    assert [len(head.layers) for head in method.heads] == [
        min(d, 15 - n) for n, d in enumerate(pyramid_depths(16, 2))
    ]


def test_a_batch_norm_stands_before_the_classifier_of_a_shallow_head():
    for indices, kind in (([3], nn.BatchNorm1d), ([1, 3], nn.Identity)):
        head = augmented_head([residual_layer] * 4, [4, 4, 8, 8], 0, indices, 3)
        assert isinstance(head.norm, kind)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (MLP(6, [8, 12, 8], 3), torch.randn(4, 6)),
        (Transformer(8, 3, 2), torch.randn(4, 5, 8)),
        (Classifier(ConvNet(2, (4, 8, 8), dims=1), 3), torch.randn(4, 2, 9)),
        (
            nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 9), nn.Linear(9, 3)
            ),
            torch.randn(4, 1, 6, 6),
        ),
    ],
    ids=["vectors", "tokens", "series", "maps, then vectors"],
)
def test_every_kind_of_network_trains(model, example):
    method = AugmentedLocalLearning(example[:2], depth=1, join_last=False)
    target = torch.zeros_like(model(example))
    step = TrainingStep(model, F.mse_loss, [method])
    step.backward(step(example, target))
    assert all(parameter.grad is not None for parameter in step.trainable)


def test_heads_on_tokens_hear_what_their_layer_was_told():
    """A head that looked ahead in a causal network would see its own targets."""
    model = Transformer(8, 3, 2).eval()
    tokens = torch.randn(1, 5, 8)
    method = AugmentedLocalLearning(tokens, depth=1)
    TrainingStep(model, F.mse_loss, [method])
    head = method.heads[0].eval()
    changed = tokens.clone()
    changed[:, -1] += 1
    for causal in (True, False):
        one, two = head(tokens, None, causal=causal), head(changed, None, causal=causal)
        assert torch.equal(one[:, :-1], two[:, :-1]) == causal


def test_runs_alike_everywhere_and_resumes(tmp_path):
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(2)]
    new_method = (
        lambda: AugmentedLocalLearning(  # noqa: E731
            batches[0][0][:2], depth=1, join_last=False, loss=F.cross_entropy
        )
    )
    check_loops(lambda: MLP(6, [8] * 3, 3), new_method, batches, F.cross_entropy)
    data = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    check_resume(
        lambda: MLP(6, [8] * 3, 3),
        new_method,
        data,
        tmp_path,
        F.cross_entropy,
        steps=5,
        kill_at=3,
        checkpoint_every=2,
    )


def test_bad_input():
    example = torch.zeros(2, 6)
    with pytest.raises(InputError, match="depth must be >= 1, got 2 and 0"):
        AugmentedLocalLearning(example, depth=0)
    with pytest.raises(InputError, match=r"taper must be in \[0, 1\], got 2"):
        AugmentedLocalLearning(example, taper=2.0)
    with pytest.raises(InputError, match="widen must be > 0"):
        AugmentedLocalLearning(example, widen=0.0)
    with pytest.raises(ValueError, match="layer must be between 0 and num_layers - 1 = 3, got 4"):
        uniform_layer_indices(4, 4, 1)
    with pytest.raises(ValueError, match="depth must be >= 1"):
        uniform_layer_indices(0, 4, 0)
    with pytest.raises(ValueError, match="builders must be one for each of 2 widths, got 1"):
        augmented_layers([residual_layer], [4, 4], 0, [1])
    volumes = nn.Sequential(*(nn.Conv3d(1, 1, 3, padding=1) for _ in range(3)))
    with pytest.raises(InputError, match="build must be given for maps of 3 dimensions"):
        TrainingStep(
            volumes,
            F.mse_loss,
            [AugmentedLocalLearning(torch.zeros(1, 1, 4, 4, 4), depth=1, join_last=False)],
        )
    tokens = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3))
    with pytest.raises(InputError, match="width of tokens changes, here from 8 to 6"):
        TrainingStep(
            tokens, F.mse_loss, [AugmentedLocalLearning(torch.zeros(1, 5, 8), depth=1, join_last=False)]
        )


def test_the_catalog_entry_names_what_exists():
    entry = find_entry("auglocal")
    assert entry.has_claim and import_name(entry.method) is AugmentedLocalLearning
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]
    assert PostactivationBlock.__name__ == type(residual_layer(1, 1, 1)).__name__


def test_the_claim_runs():
    found = verify("auglocal", smoke=True, seeds=1)
    assert set(found["arms"]) == {arm.name for arm in CLAIM.arms}
    share = {
        arm: found["arms"][arm]["metrics"]["saved_bytes_share_depth_16"]["mean"] for arm in found["arms"]
    }
    assert share["backpropagation"] == 1 and share["greedy"] < share["auglocal"] < 0.65
