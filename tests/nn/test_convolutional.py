import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coloss.nn import ConvNet, ResNet

NETWORKS = {
    "convnet": lambda dims: ConvNet(3, (8, 12, 16), dims=dims),
    "resnet": lambda dims: ResNet(3, (8, 12), (2, 1), dims=dims),
    "preactivation": lambda dims: ResNet(3, (8, 12), (2, 1), dims=dims, preactivation=True),
}


def randomise_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 2)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_series_are_images_of_one_row(build, training):
    series_network, image_network = build(1).double(), build(2).double()
    randomise_statistics(series_network)
    weights = {}
    for name, tensor in series_network.state_dict().items():
        # A kernel over time is a two-dimensional kernel that is zero but for its middle row.
        margin = 0 if tensor.ndim < 3 else tensor.shape[2] // 2
        weights[name] = F.pad(tensor[:, :, None], (0, 0, margin, margin)) if tensor.ndim == 3 else tensor
    image_network.load_state_dict(weights)
    series = torch.randn(4, 3, 21, dtype=torch.float64)
    on_series = series_network.train(training)(series)
    on_images = image_network.train(training)(series[:, :, None])
    assert torch.allclose(on_series, on_images, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_any_size_goes_down_to_one_position(build):
    network = build(2).eval()
    for height, width in [(1, 1), (5, 8), (3, 17)]:
        assert network(torch.randn(2, 3, height, width)).shape == (2, network.out_features)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_result_is_the_mean_of_the_maps(build):
    network = build(2).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.allclose(network(images), network.forward_features(images).mean((2, 3)), atol=1e-6)


def test_convnet_is_convolution_norm_and_relu_in_turn():
    network = ConvNet(2, (4, 6)).eval()
    randomise_statistics(network)
    expected = images = torch.randn(3, 2, 7, 7)
    for (layer, norm, _), stride in zip(network.stages, (1, 2), strict=True):
        expected = F.conv2d(expected, layer.weight, stride=stride, padding=1)
        expected = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
    assert torch.allclose(network.forward_features(images), expected, atol=1e-6)


def test_convnet_downsamples_where_told():
    images = torch.randn(2, 1, 8, 8)
    sizes = {
        downsample: ConvNet(1, (4, 4, 4), downsample=downsample).forward_features(images).shape[-1]
        for downsample in (True, False, (True, True, True), (False, False, True))
    }
    assert sizes == {True: 2, False: 8, (True, True, True): 1, (False, False, True): 4}


def test_resnet_block_adds_its_branch_to_its_input():
    network = ResNet(3, (4,), (1,)).eval()
    randomise_statistics(network)
    block = network.stages[0][0]
    x = torch.randn(2, 4, 5, 5)
    first, norm1, _, second, norm2 = block.branch
    hidden = norm1(F.conv2d(x, first.weight, padding=1)).relu()
    expected = (x + norm2(F.conv2d(hidden, second.weight, padding=1))).relu()
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_preactivation_block_with_an_empty_branch_is_the_identity():
    block = ResNet(3, (4,), (1,), preactivation=True).stages[0][0]
    nn.init.zeros_(block.branch[-1].weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_resnet_projects_only_where_the_shape_changes():
    network = ResNet(3, (4, 4, 8), (2, 2, 1))
    identity = [[isinstance(block.shortcut, nn.Identity) for block in stage] for stage in network.stages]
    assert identity == [[True, True], [False, True], [False]]


@pytest.mark.parametrize("model", [ConvNet, ResNet])
def test_refuses_impossible_architectures(model):
    with pytest.raises(ValueError, match="widths must be one or more integers"):
        model(1, ())
    with pytest.raises(ValueError, match="kernel_size must be odd and >= 1, got 4"):
        model(1, (8, 8, 8), kernel_size=4)
    with pytest.raises(ValueError, match="in_channels must be >= 1, got 0"):
        model(0)


def test_refuses_lists_of_another_length():
    with pytest.raises(ValueError, match="downsample must say yes or no for 2 stages, got 3"):
        ConvNet(1, (8, 8), downsample=[True, True, False])
    with pytest.raises(ValueError, match="blocks must be 2 integers >= 1"):
        ResNet(1, (8, 8), (1,))


@pytest.mark.parametrize("model", [ConvNet, ResNet])
def test_refuses_inputs_of_another_shape(model):
    with pytest.raises(ValueError, match=r"shape \(batch, 3, height, width\), got \(2, 1, 8, 8\)"):
        model(3)(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(batch, 3, length\), got \(2, 3, 8, 8\)"):
        model(3, dims=1)(torch.rand(2, 3, 8, 8))
