"""Facts about going through a network layer by layer: what each layer reads and should give, and its error as a quadratic form."""

import copy

import pytest
import torch
from torch import nn

from coloss.compression import LayerReconstruction, OutputMoments
from coloss.data import IndexedDataset
from coloss.errors import InputError


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network():
    """Registered in another order than it runs, with a layer that runs twice."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 3)
            self.twice = nn.Linear(6, 6)
            self.drop = nn.Dropout(0.5)
            self.first = nn.Linear(4, 6)

        def forward(self, x):
            x = self.first(x).relu()
            return self.last(self.drop(self.twice(input=self.twice(x).relu())))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().double()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (7, 5)),
        (nn.Linear(5, 3, bias=False), (2, 7, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (3, 4, 9)),
        (nn.Conv2d(2, 4, (3, 2), padding="same", padding_mode="reflect"), (3, 2, 6, 5)),
        (nn.Conv2d(2, 4, 3), (2, 6, 5)),
        (nn.Conv3d(2, 4, 2, padding=1, padding_mode="circular", groups=2), (2, 2, 3, 4, 3)),
    ],
)
def test_the_error_is_that_of_the_layers_output(layer, shape):
    layer = layer.double()
    inputs, seen = randn(*shape), randn(*shape, seed=1)
    moments = OutputMoments.of(layer, seen, layer(inputs).detach(), batch_size=2) if len(inputs) > 2 else None
    if moments is None:
        moments = OutputMoments.empty(layer)
        moments.add(layer, seen, layer(inputs))
    other = copy.deepcopy(layer)
    other.weight.data += randn(*layer.weight.shape, seed=2)
    expected = (other(seen) - layer(inputs)).square().mean().item()
    assert moments.error(other.weight.detach()) == pytest.approx(expected)
    bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (layer.weight.ndim - 2))
    size = (layer(inputs) - bias).square().mean().item()
    assert moments.relative_error(other.weight) == pytest.approx(expected / size)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(2, 4, 3), (2, 6, 5)), (nn.Conv1d(300, 300, 1), (300, 3)), (nn.Linear(3, 2), (3,))],
)
def test_one_sample_needs_no_batch_dimension(layer, shape):
    layer, x = layer.double(), randn(*shape)
    alone, batch = (OutputMoments.of(layer, x, layer(x)) for x in (x, x[None]))
    assert alone.count == batch.count
    assert torch.equal(alone.gram, batch.gram)
    assert torch.equal(alone.cross, batch.cross)


def test_layers_come_in_the_order_in_which_they_run():
    assert [p.path for p in LayerReconstruction(network(), randn(8, 4), ["last", "twice", "first"])] == [
        "first",
        "twice",
        "last",
    ]


@pytest.mark.parametrize("kind", ["tensor", "dataset", "batches"])
def test_targets_are_of_the_network_as_it_was_and_inputs_of_the_one_that_is_compressed(kind):
    """Drift: with full inputs for the student, what a layer before it broke could not be made good."""
    model, x = network(), randn(10, 4)
    before = copy.deepcopy(model).eval()
    data = {"tensor": x, "dataset": IndexedDataset(x, torch.arange(10)), "batches": [(x[:6],), (x[6:],)]}[
        kind
    ]
    modes = [module.training for module in model.modules()]
    for problem in LayerReconstruction(model, data, ["first", "last"], batch_size=4):
        found = []
        problem.visit(lambda *pair, found=found: found.append(pair))
        inputs, targets = (torch.cat(part) for part in zip(*found, strict=True))
        if problem.path == "first":
            torch.testing.assert_close(inputs, x)
            torch.testing.assert_close(targets, before.first(x))
            with torch.no_grad():
                problem.layer.weight.mul_(0.5)
    model.eval()
    assert torch.equal(before.first.weight, 2 * model.first.weight)
    torch.testing.assert_close(inputs, model.twice(model.twice(model.first(x).relu()).relu()))
    torch.testing.assert_close(targets, before(x))
    model.train()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_runs_twice_counts_both_times():
    model, x = network(), randn(10, 4)
    [problem] = LayerReconstruction(model, x, "twice")
    assert problem.moments().count == 20


def test_making_up_for_an_error_before_it():
    """The last layer can undo exactly what a scaled first one did: only if it sees the compressed inputs."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = randn(50, 4)
    expected = model(x).detach()
    for problem in LayerReconstruction(model, x, ["0", "2"]):
        with torch.no_grad():
            if problem.path == "0":
                problem.layer.weight.mul_(0.5)
                problem.layer.bias.mul_(0.5)
            else:
                moments = problem.moments()
                best = torch.linalg.solve(moments.gram[0], moments.cross[0].T).T
                problem.layer.weight.copy_(best)
    torch.testing.assert_close(model(x), expected)


def test_half_precision_networks_have_wide_moments():
    model = network().bfloat16()
    [problem] = LayerReconstruction(model, randn(8, 4, dtype=torch.bfloat16), "first")
    moments = problem.moments()
    assert moments.gram.dtype == torch.float64
    assert moments.relative_error(problem.layer.weight) < 1e-4


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def tied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: list(LayerReconstruction(Idle(), torch.ones(3, 2), "spare")), "got idle spare"),
        (
            lambda: LayerReconstruction(tied(), torch.ones(3, 2), "1"),
            "the weight of 1 must be its own, got one that 0",
        ),
        (
            lambda: LayerReconstruction(Idle(), iter([torch.ones(3, 2)]), "used"),
            "more than once, got an iterator",
        ),
        (
            lambda: list(LayerReconstruction(Idle(), torch.ones(0, 2), "used")),
            "at least one sample, got none",
        ),
        (
            lambda: LayerReconstruction(Idle(), torch.ones(3, 2), "used", batch_size=0),
            "batch_size must be >= 1",
        ),
        (
            lambda: LayerReconstruction(Idle(), torch.ones(3, 2), "no"),
            "layers must be paths of the model, got 'no'",
        ),
        (lambda: OutputMoments.empty(nn.ReLU()), "linear layer or a convolution, got ReLU"),
        (
            lambda: OutputMoments.of(nn.Linear(2, 2), torch.ones(3, 2), torch.ones(2, 2)),
            "targets must be as many as inputs, got 2 and 3",
        ),
        (
            lambda: OutputMoments.of(nn.Linear(2, 2), torch.full((3, 2), torch.nan), torch.ones(3, 2)),
            "must be finite, got NaN or infinity",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
