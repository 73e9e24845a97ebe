"""A frozen network inside a loss: what never changes, what gets a gradient, crops, precision, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coloss.nn import FrozenTaskLoss, ImagePreprocess, crop_boxes


def new_network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)
    )


def pictures():
    prediction, truth = torch.rand(2, 4, 3, 6, 6).unbind(0)
    return prediction.clone().requires_grad_(), truth


def test_equal_pictures_cost_exactly_nothing_and_pull_nowhere():
    prediction, _ = pictures()
    loss = FrozenTaskLoss(new_network(), F.mse_loss)
    found = loss(prediction, prediction.detach().clone())
    assert found.item() == 0
    assert torch.autograd.grad(found, prediction)[0].abs().max() == 0


def test_a_training_step_around_it_changes_nothing_of_the_network():
    network = new_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = nn.Conv2d(3, 3, 1)
    both = nn.ModuleList([model, FrozenTaskLoss(network, F.mse_loss)]).train()
    optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], lr=0.1)
    old = model.weight.detach().clone()
    for _ in range(2):
        both[1](model(torch.rand(4, 3, 6, 6)), torch.rand(4, 3, 6, 6)).backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert not torch.equal(model.weight, old)


def test_the_gradient_reaches_the_prediction_alone():
    prediction, truth = pictures()
    truth.requires_grad_()
    FrozenTaskLoss(new_network(), F.mse_loss)(prediction, truth).backward()
    assert prediction.grad.abs().sum() > 0
    assert truth.grad is None


def test_it_is_the_distance_of_the_outputs_and_the_weight_scales_it():
    prediction, truth = pictures()
    network = new_network().eval()
    expected = F.mse_loss(network(prediction), network(truth))
    loss = FrozenTaskLoss(network, F.mse_loss, weight=0.3)
    torch.testing.assert_close(loss(prediction, truth), 0.3 * expected)
    torch.testing.assert_close(loss.unweighted(prediction, truth), expected)
    torch.testing.assert_close(loss(prediction, cached=loss.outputs(truth)), 0.3 * expected)


def test_gradients_are_right():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()).double()
    loss = FrozenTaskLoss(network, F.mse_loss)
    prediction, truth = torch.rand(2, 1, 1, 4, 4, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(lambda x: loss(x, truth), prediction.requires_grad_())


def test_at_weight_zero_the_network_does_not_run():
    prediction, truth = pictures()
    network = new_network()
    network.register_forward_hook(lambda *_: pytest.fail("it ran"))
    found = FrozenTaskLoss(network, F.mse_loss, weight=0.0)(prediction * math.inf, truth)
    assert found.item() == 0
    assert found.requires_grad


def test_the_network_keeps_its_precision_under_autocast():
    prediction, truth = pictures()
    loss = FrozenTaskLoss(new_network(), F.mse_loss)
    plain = loss(prediction, truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, cached = loss(prediction, truth), loss(truth, cached=loss.outputs(truth))
    assert mixed.item() == plain.item()
    assert cached.item() == 0
    half = FrozenTaskLoss(new_network().bfloat16(), F.mse_loss)
    close = half(truth.half(), (truth + 0.02).half())
    assert close.dtype == torch.float32
    assert close.item() > 0


def test_outputs_may_be_nested():
    network = nn.Identity()
    loss = FrozenTaskLoss(network, lambda one, other: F.l1_loss(one["x"], other["x"]))
    network.forward = lambda x: {"x": 2 * x, "name": "kept"}
    prediction, truth = pictures()
    torch.testing.assert_close(loss(prediction, truth), 2 * F.l1_loss(prediction, truth))


def test_boxes_cut_both_sides_and_absent_people_leave_their_sample_out():
    prediction, truth = pictures()
    loss = FrozenTaskLoss(nn.Identity(), F.mse_loss, crop_size=(2, 3))
    boxes = torch.tensor([[1.0, 2.0, 4.0, 4.0]]).repeat(4, 1)
    expected = F.mse_loss(prediction[:, :, 2:4, 1:4], truth[:, :, 2:4, 1:4])
    torch.testing.assert_close(loss(prediction, truth, boxes=boxes), expected)
    boxes[1:] = math.nan
    expected = F.mse_loss(prediction[:1, :, 2:4, 1:4], truth[:1, :, 2:4, 1:4])
    torch.testing.assert_close(loss(prediction, truth, boxes=boxes), expected)
    cached = loss.outputs(truth, boxes)
    torch.testing.assert_close(loss(prediction, cached=cached, boxes=boxes), expected)
    nobody = loss(prediction, truth, boxes=torch.full((4, 4), math.nan))
    assert nobody.item() == 0
    assert nobody.requires_grad


def test_a_cut_at_the_whole_picture_is_the_picture_and_beyond_it_the_edge():
    image = torch.rand(1, 2, 5, 4)
    torch.testing.assert_close(crop_boxes(image, torch.tensor([[0.0, 0, 4, 5]]), (5, 4)), image)
    beyond = crop_boxes(image, torch.tensor([[-2.0, 0, 0, 5]]), (5, 2))
    torch.testing.assert_close(beyond, image[..., :1].expand(-1, -1, -1, 2))


def test_a_picture_is_brought_to_size_without_being_squashed():
    wide = torch.zeros(1, 3, 4, 8)
    wide[:, 0] = 1.0
    found = ImagePreprocess((8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), reverse_channels=True)(wide)
    assert found[0, 2, 2:6].unique().tolist() == [1.0]  # red is the last channel now
    assert found[0, :, :2].abs().max() == found[0, :, 6:].abs().max() == 0
    small = ImagePreprocess((4, 4))(torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(small, torch.ones(1, 1, 4, 4))
    assert not ImagePreprocess().state_dict()


def test_the_same_preprocessing_is_seen_on_both_sides():
    prediction, truth = pictures()
    loss = FrozenTaskLoss(new_network(), F.mse_loss, preprocess=ImagePreprocess((9, 7), mean=(0.4,)))
    assert loss(prediction, prediction.detach().clone()).item() == 0
    loss(prediction, truth).backward()
    assert prediction.grad.abs().sum() > 0


def test_modules_for_preprocessing_and_distance_are_frozen_too():
    class Distance(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, one, other):
            return self.scale * F.mse_loss(one, other)

    prediction, truth = pictures()
    preprocess, distance = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)), Distance()
    copied = FrozenTaskLoss(nn.Identity(), distance, preprocess=preprocess, copy=True)
    assert preprocess.training
    assert preprocess[0].weight.requires_grad
    assert distance.scale.requires_grad
    loss = FrozenTaskLoss(nn.Identity(), distance, preprocess=preprocess)
    for frozen in (loss, copied):
        both = nn.ModuleList([frozen]).train()
        assert not any(parameter.requires_grad for parameter in both.parameters())
        assert frozen(prediction, prediction.detach().clone()).item() == 0
        frozen(prediction, truth).backward()
        assert frozen.preprocess[0].num_batches_tracked == 0


def test_a_copy_leaves_the_network_as_it_was():
    network = new_network().train()
    FrozenTaskLoss(network, F.mse_loss, copy=True)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())


def test_bad_input_is_named(as_users_call):
    prediction, truth = pictures()
    loss = FrozenTaskLoss(new_network(), F.mse_loss)
    cropping = FrozenTaskLoss(new_network(), F.mse_loss, crop_size=(2, 2))
    boxes = torch.tensor([[0.0, 0, 2, 2]]).repeat(4, 1)
    for call, message in (
        (
            lambda: FrozenTaskLoss(nn.Identity(), F.mse_loss, weight=-1.0),
            "weight must be >= 0 and finite, got -1.0",
        ),
        (lambda: FrozenTaskLoss(nn.Identity(), F.mse_loss, crop_size=(0, 2)), "crop_size must be >= 1"),
        (lambda: loss(prediction), "exactly one of truth and cached outputs must be given, got neither"),
        (lambda: loss(prediction, truth, cached=truth), "got both"),
        (lambda: loss(prediction, truth[:2]), "must have equal shapes"),
        (lambda: loss(prediction, truth, boxes=boxes), "boxes need crop_size"),
        (
            lambda: loss(prediction, cached=loss.outputs(truth[:1])),
            r"each of 4 predictions, got \(1, 2, 6, 6\)",
        ),
        (
            lambda: loss(prediction, cached=loss.outputs(truth[:3])),
            r"each of 4 predictions, got \(3, 2, 6, 6\)",
        ),
        (lambda: cropping(prediction, truth, boxes=boxes[:3]), r"each of 4 predictions, got \(3, 4\)"),
        (lambda: cropping(prediction, truth, boxes=boxes + math.inf), "boxes must be finite"),
        (
            lambda: crop_boxes(truth, boxes * torch.tensor([1, 1, 1, math.inf]), (2, 2)),
            "boxes must be finite",
        ),
        (lambda: ImagePreprocess(mean=(0.1, 0.2, 0.3))(truth[:, :1]), "mean must be 1 or 1 numbers, got 3"),
        (lambda: ImagePreprocess(std=(0.1, 0.2))(truth), "std must be 1 or 3 numbers, got 2"),
        (lambda: crop_boxes(truth, boxes[:, [2, 1, 0, 3]], (2, 2)), "left < right"),
        (lambda: crop_boxes(truth, boxes, (0, 2)), "size must be >= 1"),
        (lambda: ImagePreprocess((0, 4)), "size must be >= 1"),
        (lambda: ImagePreprocess(std=(0.0,)), "std must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
