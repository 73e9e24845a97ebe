"""Facts about AdamS: the unit checks of its description, the slow twin, its masks, its state, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coloss.compression import AdamS, masked_to_kept_ratio, nm_parameter_groups
from coloss.errors import InputError
from coloss.ops import nm_mask


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sparse(weight, **options):
    options = {"lr": 0.1, "total_steps": 10} | options
    return AdamS([{"params": [weight], "sparse": True}], **options)


def steps(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()


def twin(weight, gradients, *, lr, nm, decay, total, every, b1=0.9, b2=0.999, eps=1e-8, correct=False):
    """The card's equations, one step after the other, in NumPy."""
    w, mu, v, mask = weight.numpy().copy(), 0.0, 0.0, None
    for t, g in enumerate(gradients):
        if t % every == 0:
            mask = np.zeros(w.shape, dtype=bool)
            for row, row_mask in zip(w, mask, strict=True):
                for start in range(0, len(row), nm[1]):
                    order = sorted(range(nm[1]), key=lambda i: (-abs(row[start + i]), i))
                    row_mask[[start + i for i in order[: nm[0]]]] = True
        mu = b1 * mu + (1 - b1) * g.numpy()
        alpha = t / total
        pulled = np.where(mask, mu, (1 - alpha) * mu + alpha * decay * np.sign(w))
        corrected = pulled / (1 - b1 ** (t + 1))
        v = b2 * v + (1 - b2) * (corrected if correct else pulled) ** 2
        w = w - lr * corrected / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
    return torch.from_numpy(w)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("nm", [(2, 4), (1, 8), (4, 4)])
def test_steps_are_those_of_the_equations(nm, correct):
    weight = nn.Parameter(randn(3, 16))
    gradients = [0.1 * randn(3, 16, seed=seed) for seed in range(1, 13)]
    options = {"lr": 0.03, "decay": 0.05}
    expected = twin(weight.detach(), gradients, nm=nm, total=12, every=5, correct=correct, **options)
    optimizer = sparse(weight, nm=nm, total_steps=12, mask_every=5, correct_second_moment=correct, **options)
    steps(optimizer, weight, gradients)
    torch.testing.assert_close(weight.detach(), expected)


def test_the_first_step_is_ten_learning_rates_and_one_where_the_moments_match():
    """Trap: v of mu^2 is not matched to its start at zero."""
    for correct, factor in ((False, 10.0), (True, 1.0)):
        weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.float64))
        gradient = randn(2, 4)
        optimizer = sparse(weight, nm=(4, 4), lr=1e-3, correct_second_moment=correct)
        steps(optimizer, weight, [gradient])
        torch.testing.assert_close(weight.detach(), -factor * 1e-3 * gradient.sign(), rtol=1e-5, atol=0)


@given(st.integers(0, 10_000), st.sampled_from([(2, 4), (1, 8), (1, 2), (3, 4)]), st.booleans())
@settings(max_examples=8, deadline=None)
def test_every_group_keeps_exactly_n_on_ties_and_zeros_too(seed, nm, tied):
    values = randn(4, 16, seed=seed)
    weight = nn.Parameter(values.round() if tied else values * 0)
    optimizer = sparse(weight, nm=nm)
    steps(optimizer, weight, [torch.zeros_like(weight)])
    assert (optimizer.masks()[weight].unflatten(1, (-1, nm[1])).sum(-1) == nm[0]).all()


def test_without_gradient_losers_fall_by_the_learning_rate_and_the_kept_stand_still():
    weight = nn.Parameter(torch.tensor([[5.0, -4.0, 1.0, -0.9]]))
    optimizer = sparse(weight, lr=1e-3, decay=1e-4, total_steps=None)
    optimizer.param_groups[0]["ramp"] = 1.0
    steps(optimizer, weight, [torch.zeros_like(weight)] * 60)
    before = weight.detach().clone()
    steps(optimizer, weight, [torch.zeros_like(weight)])
    assert torch.equal(weight.detach()[0, :2], torch.tensor([5.0, -4.0]))
    fall = (before - weight.detach())[0, 2:]
    torch.testing.assert_close(fall, torch.tensor([1e-3, -1e-3]), rtol=0.01, atol=0)


def test_under_the_ramp_the_pace_is_that_of_alpha_over_its_root_mean_square():
    """So sqrt(3) learning rates at the end, and more at the very start, where mu is divided by its little weight."""
    weight = nn.Parameter(torch.tensor([[5.0, -4.0, 3.0, -2.9]], dtype=torch.float64))
    optimizer = sparse(weight, lr=1e-3, decay=1e-4, total_steps=100, eps=1e-20)
    falls = []
    for _ in range(100):
        before = weight.detach().clone()
        steps(optimizer, weight, [torch.zeros_like(weight)])
        falls.append(float((before - weight.detach())[0, 2]) * 1e3)
    assert falls[0] == 0 and falls[1] == pytest.approx(2**0.5 / 0.19, rel=1e-3)
    assert falls[-1] == pytest.approx(3**0.5, rel=0.05)


def test_the_strength_of_the_decay_does_not_set_the_pace_once_it_rules():
    found = []
    for decay in (1e-4, 1e2):
        weight = nn.Parameter(torch.tensor([[5.0, -4.0, 1.0, -0.9]], dtype=torch.float64))
        steps(sparse(weight, decay=decay, lr=1e-3, eps=1e-30), weight, [torch.zeros_like(weight)] * 10)
        found.append(weight.detach().clone())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("nm", [(4, 4), (1, 1)])
def test_keeping_all_is_the_same_as_no_decay(nm):
    first, second = nn.Parameter(randn(3, 8)), nn.Parameter(randn(3, 8))
    gradients = [randn(3, 8, seed=seed) for seed in range(5)]
    steps(sparse(first, nm=nm, decay=10.0), first, gradients)
    other = nn.Parameter(randn(1, 4))
    plain = AdamS(
        [{"params": [other], "sparse": True}, {"params": [second], "sparse": False}],
        lr=0.1,
        decay=10.0,
        total_steps=10,
    )
    steps(plain, second, gradients)
    assert torch.equal(first, second)


def test_zero_stays_where_it_is():
    """sign(0) is 0: a loser that arrived is not pushed on."""
    weight = nn.Parameter(torch.tensor([[2.0, 1.0, 0.0, 0.0]]))
    steps(sparse(weight, decay=1.0), weight, [torch.zeros(1, 4)] * 9)
    assert torch.equal(weight.detach(), torch.tensor([[2.0, 1.0, 0.0, 0.0]]))


def test_a_rate_that_does_not_fall_leaves_losers_hopping_about_zero():
    """Trap: the floor of the losers is the last learning rate."""
    sizes = {}
    for name, fall in {"constant": 0.0, "falling": 1.0}.items():
        weight = nn.Parameter(torch.tensor([[5.0, 4.0, 0.31, -0.27]]))
        optimizer = sparse(weight, lr=0.01, decay=1.0, total_steps=120)
        for step in range(120):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - fall * step / 120)
            steps(optimizer, weight, [torch.zeros_like(weight)])
        sizes[name] = masked_to_kept_ratio([weight]).max * 4.5
    assert sizes["constant"] > 1e-3 > 2e-4 > sizes["falling"]


def test_masks_are_made_anew_every_so_many_steps_only():
    weight = nn.Parameter(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    optimizer = sparse(weight, lr=0.0, mask_every=3)
    steps(optimizer, weight, [torch.zeros(1, 4)])
    with torch.no_grad():
        weight.copy_(weight.flip(1))
    steps(optimizer, weight, [torch.zeros(1, 4)] * 2)
    assert optimizer.masks()[weight].tolist() == [[True, True, False, False]]
    steps(optimizer, weight, [torch.zeros(1, 4)])
    assert optimizer.masks()[weight].tolist() == [[False, False, True, True]]


def test_convolutions_are_grouped_along_their_input_channels():
    weight = nn.Parameter(randn(2, 8, 3, 3))
    optimizer = sparse(weight, lr=0.0)
    steps(optimizer, weight, [torch.zeros_like(weight)])
    hardware = weight.detach().permute(0, 2, 3, 1)
    expected = nm_mask(hardware, 2, 4).permute(0, 3, 1, 2)
    assert torch.equal(optimizer.masks()[weight], expected)


def test_inputs_behind_the_last_whole_group_are_not_pulled():
    weight = nn.Parameter(torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5, 0.1]]))
    steps(sparse(weight, decay=1.0), weight, [torch.zeros(1, 6)] * 5)
    assert torch.equal(weight.detach()[0, 4:], torch.tensor([0.5, 0.1]))
    assert (weight.detach()[0, 2:4] < torch.tensor([2.0, 1.0])).all()


def test_bfloat16_weights_take_steps_that_bfloat16_cannot_hold():
    """Trap: a rate of 1e-5 vanishes beside 1.0 in bfloat16."""
    weight = nn.Parameter(torch.tensor([[4.0, 3.0, 1.0, 1.0]], dtype=torch.bfloat16))
    optimizer = sparse(weight, lr=4e-5, decay=1e-3, total_steps=None)
    optimizer.param_groups[0]["ramp"] = 1.0
    steps(optimizer, weight, [torch.zeros(1, 4, dtype=torch.bfloat16)] * 150)
    assert weight.detach()[0, 2] < 1.0 and weight.dtype == torch.bfloat16
    state = optimizer.state[weight]
    assert {name: state[name].dtype for name in ("mu", "v", "master", "mask")} == {
        "mu": torch.float32,
        "v": torch.float32,
        "master": torch.float32,
        "mask": torch.bool,
    }
    with torch.no_grad():
        weight[0, 0] = 8.0  # written by somebody else
    steps(optimizer, weight, [torch.zeros(1, 4, dtype=torch.bfloat16)])
    assert weight[0, 0] == 8.0 == state["master"][0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_that_was_stored_goes_on_to_the_bit(dtype):
    gradients = [randn(4, 8, seed=seed).to(dtype) for seed in range(9)]

    def run(split):
        weight = nn.Parameter(randn(4, 8, seed=1).to(dtype))
        optimizer = sparse(weight, mask_every=4, decay=0.1)
        steps(optimizer, weight, gradients[:split])
        state, values = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
        weight = nn.Parameter(values)
        optimizer = sparse(weight, mask_every=4, decay=0.1)
        optimizer.load_state_dict(state)
        steps(optimizer, weight, gradients[split:])
        return weight.detach(), optimizer.state[weight]

    (whole, first), (resumed, second) = run(0), run(6)
    assert torch.equal(whole, resumed)
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same and type(value) is type(second[name]), name


def test_groups_of_different_age_and_type_are_stepped_apart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2).double())
    optimizer = AdamS(nm_parameter_groups(model), lr=0.01, decay=0.1, total_steps=10)
    alone = copy.deepcopy(model[1].weight)
    single = AdamS([{"params": [alone], "sparse": True}], lr=0.01, decay=0.1, total_steps=10)
    for step in range(4):
        for index, parameter in enumerate(model.parameters()):
            # Some parameters have no gradient at first.
            parameter.grad = None if step < index % 2 else torch.ones_like(parameter)
        alone.grad = model[1].weight.grad
        optimizer.step()
        single.step()
    assert torch.equal(alone, model[1].weight)
    assert optimizer.state[model[0].bias]["step"] == 3 and optimizer.state[model[0].weight]["step"] == 4


def test_a_closure_gives_gradients_and_loss():
    weight = nn.Parameter(torch.ones(1, 4))
    optimizer = sparse(weight)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (weight < 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"nm": (5, 4)}, r"nm must be \(n, m\) with 1 <= n <= m, got \(5, 4\)"),
        ({"nm": (0, 4)}, "nm must be"),
        ({"decay": -0.1}, "decay must be >= 0, got -0.1"),
        ({"decay": float("nan")}, "decay must be >= 0, got nan"),
        ({"total_steps": 0}, "total_steps must be >= 1 or None, got 0"),
        ({"mask_every": 0}, "mask_every must be >= 1, got 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps must be >= 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        sparse(nn.Parameter(torch.ones(1, 4)), **options)


def test_what_would_be_silent_adam_is_refused():
    """Trap: flattened shards misalign masks and weights; a run without any weight in scope is Adam."""
    with pytest.raises(InputError, match="params must have a group with sparse=True"):
        AdamS([nn.Parameter(torch.ones(1, 4))], lr=0.1, total_steps=10)
    with pytest.raises(InputError, match=r"two dimensions and at least m=4 inputs .* got shape \(64,\)"):
        sparse(nn.Parameter(torch.ones(64)))
    with pytest.raises(InputError, match=r"got shape \(8, 3\)"):
        sparse(nn.Parameter(torch.ones(8, 3)))
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = sparse(weight)
    steps(optimizer, weight, [torch.ones(4, 4)])
    weight.data = torch.ones(2, 4)
    with pytest.raises(InputError, match=r"shape must not change .* got \(2, 4\) after \(4, 4\)"):
        steps(optimizer, weight, [torch.ones(2, 4)])


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 4, sparse=True)
    optimizer = sparse(table.weight)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="dense gradients"):
        optimizer.step()
