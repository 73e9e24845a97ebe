import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from coloss.train import SavedActivations


def test_bytes_worked_by_hand():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    with SavedActivations(model) as meter:
        loss = model(torch.zeros(8, 10)).sum()
    assert meter.held == meter.peak == 4 * 8 * (10 + 20)  # input, and what ReLU gives; no weights
    loss.backward()
    assert meter.held == 0


def test_a_storage_counts_once_however_many_operations_save_it():
    x = torch.randn(100, requires_grad=True)
    with SavedActivations() as meter:
        y = x * 2
        kept = [y.sin(), y[:50].cos(), y.view(10, 10).exp().sum()]
    assert meter.held == 400 + 400  # y, and the output of exp
    del kept
    assert meter.held == 0


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("operation", [torch.tanh, torch.sin, torch.exp])
def test_nothing_stays_when_the_graph_is_gone(operation, retain):
    """Operations that save their own output would hold themselves through a careless meter."""
    x = torch.randn(10, requires_grad=True)
    with SavedActivations() as meter:
        y = operation(x * 1.5)
        torch.autograd.grad(y.sum(), x, retain_graph=retain)
        assert meter.held == (40 if retain else 0)
        del y
        assert meter.held == 0
        y = operation(x * 1.5)
        del y
    assert meter.held == 0 and meter.peak == 40


def test_gradients_are_as_without_it():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(4, 1, 6, 6)
    plain = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    with SavedActivations(model):
        metered = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(plain, metered, strict=True))


def test_running_statistics_of_given_modules_and_all_weights_are_left_out():
    frozen = nn.Linear(30, 30).requires_grad_(False)
    norm = nn.BatchNorm1d(30)
    x = torch.randn(5, 30, requires_grad=True)
    with SavedActivations(norm) as meter:
        kept = frozen(x)
    assert meter.held == 0
    with SavedActivations(norm) as meter:
        kept = norm(frozen(x))
    assert meter.held == 5 * 30 * 4 + 2 * 30 * 4  # input of the norm, the batch's mean and deviation
    del kept


def test_checkpointing_saves():
    layers = [nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh()) for _ in range(6)]

    def peak(run):
        with SavedActivations(*layers) as meter:
            x = torch.randn(50, 20, requires_grad=True)
            for layer in layers:
                x = run(layer, x)
            x.sum().backward()
        assert meter.held == 0
        return meter.peak

    whole = peak(lambda layer, x: layer(x))
    assert peak(lambda layer, x: checkpoint(layer, x, use_reentrant=True)) < 0.65 * whole


def test_peak_starts_anew_at_each_entry():
    x = torch.randn(10, requires_grad=True)
    meter = SavedActivations()
    with meter:
        (x * 2).sin().sum().backward()
    with meter:
        pass
    assert meter.peak == 0


def test_leaves_that_are_no_parameters_count():
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    with SavedActivations() as meter:
        y = x.sin()
    assert meter.held == 800
    del y
    assert meter.held == 0
    with SavedActivations():
        assert torch.autograd.gradgradcheck(torch.sin, x[:3].detach().requires_grad_())


def test_tensors_without_data_count_as_others_do():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(100, 100), nn.Tanh()) for _ in range(5))).to("meta")
    with SavedActivations(model) as meter:
        loss = model(torch.zeros(10, 100, device="meta")).sum()
    assert meter.held == 6 * 4 * 10 * 100
    del loss
    assert meter.held == 0


def test_sparse_tensors_are_handed_through_uncounted():
    sparse, x = torch.eye(4).to_sparse(), torch.randn(4, 4, requires_grad=True)
    with SavedActivations() as meter:
        torch.sparse.mm(sparse, x * 2).sum().backward()
    assert meter.peak == 0 and torch.equal(x.grad, torch.full((4, 4), 2.0))
