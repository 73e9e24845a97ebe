"""Facts about gradual pruning: exact counts, what is dropped and what grows, masked gradients and moments, and what is saved."""

import copy

import pytest
import torch
from contract import check_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coloss.compression import GradualSparsifier, scheduled_density
from coloss.errors import InputError
from coloss.ops import magnitude_masks
from coloss.train import NonFiniteLossError


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def new_weights(*shapes, seed=0, dtype=torch.float32):
    return [nn.Parameter(randn(*shape, seed=seed + i, dtype=dtype)) for i, shape in enumerate(shapes)]


def sgd(weights, lr=0.1):
    return torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=1e-2)


def train(weights, sparsifier, optimizer, steps, seed=0, watch=None, **options):
    """Steps with random gradients that touch every weight, masked or not."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        sparsifier.step(optimizer, **options)
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch()


# The schedule


@given(st.sampled_from(["exponential", "cubic", "cosine"]), st.floats(0.01, 1))
@settings(max_examples=20, deadline=None)
def test_density_falls_from_one_to_the_final_one(schedule, final):
    path = [scheduled_density(i / 12, final, schedule) for i in range(-1, 15)]
    assert path[0] == path[1] == 1
    assert path[-1] == path[-2] == final
    assert all(a >= b for a, b in zip(path, path[1:]))


def test_schedules_by_hand():
    assert scheduled_density(0.5, 0.01) == pytest.approx(0.1)
    assert scheduled_density(0.5, 0.2, "cubic") == pytest.approx(0.2 + 0.8 / 8)
    assert scheduled_density(0.5, 0.2, "cosine") == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"final_density must be in \(0, 1\], got 0"):
        scheduled_density(0.5, 0.0)


# Counts


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("optimizer", [sgd, torch.optim.AdamW])
def test_every_count_is_that_of_the_schedule_and_what_is_out_is_exactly_0(scope, optimizer):
    weights = new_weights((30, 20), (11, 7, 3))
    own = optimizer(weights, lr=0.1)
    sparsifier = GradualSparsifier(weights, 0.95, total_steps=40, every=4, scope=scope)
    sizes, updates = [w.numel() for w in weights], []

    def watch():
        masks = list(sparsifier.masks.values())
        if scope == "global":
            assert sum(int(m.sum()) for m in masks) == round(sparsifier.density * sum(sizes))
        else:
            assert [int(m.sum()) for m in masks] == [round(sparsifier.density * size) for size in sizes]
        for weight, mask in zip(weights, masks, strict=True):
            assert not weight[~mask].any()
            moments = [v for v in own.state[weight].values() if v.shape == weight.shape]
            assert moments
            assert not any(moment[~mask].any() for moment in moments)
        updates.append(sparsifier.updates)

    train(weights, sparsifier, own, 40, watch=watch)
    # The first update in the step after the first four, the last where 0.9 of the steps are done.
    assert [step for step, (a, b) in enumerate(zip([0, *updates], updates)) if b > a] == list(range(4, 37, 4))
    assert sparsifier.density == pytest.approx(0.05)
    assert sparsifier.sparsity() == pytest.approx(0.95, abs=0.5 / sum(sizes) if scope == "global" else 0.01)


def test_density_after_j_of_j_updates_is_the_power():
    weights = new_weights((1000,))
    sparsifier, densities = GradualSparsifier(weights, 0.9, total_steps=100, every=10), []
    train(weights, sparsifier, sgd(weights), 100, watch=lambda: densities.append(sparsifier.density))
    expected = [0.1 ** (min(step // 10, 9) / 9) for step in range(100)]
    assert densities == pytest.approx(expected)


def test_the_final_density_is_reached_where_no_update_falls_on_the_end():
    """Updates at 60 and 120 of 100 steps: another one at 0.9 of them ends the schedule."""
    weights = new_weights((100,))
    sparsifier, seen = GradualSparsifier(weights, 0.9, total_steps=100, every=60), []
    train(weights, sparsifier, sgd(weights), 100, watch=lambda: seen.append(int(weights[0].count_nonzero())))
    assert [step for step in range(1, 100) if seen[step] < seen[step - 1]] == [60, 90]
    assert seen[-1] == 10


def test_counts_stay_exact_with_ties_and_zeros():
    weights = [nn.Parameter(torch.ones(10, 10)), nn.Parameter(torch.zeros(50))]
    sparsifier = GradualSparsifier(weights, 0.9, total_steps=10, every=2)
    optimizer = torch.optim.SGD(weights, lr=0.0)
    train(weights, sparsifier, optimizer, 10)
    assert [int(mask.sum()) for mask in sparsifier.masks.values()] == [15, 0]
    # Of equal ones the first stay.
    assert sparsifier.masks["0"].flatten()[:15].all()


def test_weights_and_moments_are_masked_at_updates_and_on_request_alone():
    """Without a gradient an optimizer leaves them at 0, so a step between updates does not touch them."""
    weights = new_weights((40,))
    sparsifier, optimizer = GradualSparsifier(weights, 0.5, total_steps=40, every=10), sgd(weights)
    train(weights, sparsifier, optimizer, 12)
    with torch.no_grad():
        weights[0] += 1
    train(weights, sparsifier, torch.optim.SGD(weights, lr=0.0), 1)
    out = ~sparsifier.masks["0"]
    assert weights[0][out].all()
    optimizer.state[weights[0]]["momentum_buffer"].fill_(1.0)
    sparsifier.enforce(optimizer)
    assert not weights[0][out].any()
    assert not optimizer.state[weights[0]]["momentum_buffer"][out].any()


# Which weights


def test_without_growth_it_is_gradual_magnitude_pruning():
    """alpha = 0 and grow = "none" are one thing: at each update the largest of those there stay."""
    found = []
    for options in ({"alpha": 0.0}, {"grow": "none", "alpha": 0.3}):
        weights = new_weights((20, 10), (15,))
        optimizer = sgd(weights)
        sparsifier = GradualSparsifier(weights, 0.9, total_steps=20, every=5, **options)
        train(weights, sparsifier, optimizer, 20)
        found.append([w.detach().clone() for w in weights])
    assert all(torch.equal(a, b) for a, b in zip(*found))

    # A slow twin of the last one, with masks by `magnitude_masks`.
    weights = new_weights((20, 10), (15,))
    optimizer, generator = sgd(weights), torch.Generator().manual_seed(0)
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    for step in range(20):
        gradients = [torch.randn(w.shape, generator=generator) for w in weights]
        if step in (5, 10, 15, 18):
            density = 0.1 ** min(step / 18, 1)
            named = {str(i): w.detach() for i, w in enumerate(weights)}
            masks = list(magnitude_masks(named, density).values())
        for weight, gradient, mask in zip(weights, gradients, masks):
            weight.grad = gradient * mask
            weight.data *= mask
            for moment in optimizer.state[weight].values():
                moment *= mask
        optimizer.step()
    for one, other in zip(weights, found[0]):
        torch.testing.assert_close(one.detach(), other)


def test_one_update_by_hand():
    """Eight weights, density 1/2 at half way, and a quarter of the four replaced there: 0.5/2 (1 + cos(pi/2)) = 1/4."""
    weight = nn.Parameter(torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.0, momentum=0.9)
    sparsifier = GradualSparsifier([weight], 0.75, total_steps=8, every=3, alpha=0.5, until=0.75)
    for _ in range(4):
        weight.grad = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 9.0, 0.4])
        sparsifier.step(optimizer)
    # Budget 4: the three largest stay, and of the rest the one of greatest gradient goes on with its value.
    assert weight.tolist() == [8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    assert weight.grad.tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 9, 0])


def test_what_grows_starts_at_0_and_learns_at_once():
    weight = nn.Parameter(torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    sparsifier = GradualSparsifier([weight], 0.75, total_steps=12, every=1, alpha=1.0, until=0.75)
    for _ in range(3):
        weight.grad = torch.zeros(8)
        sparsifier.step(optimizer)
    masked = ~sparsifier.masks["0"]
    assert masked[7]
    weight.grad = torch.zeros(8)
    weight.grad[7] = 0.5
    sparsifier.step(optimizer)
    assert sparsifier.masks["0"][7]
    assert weight[7] == 0
    optimizer.step()
    assert weight[7] == -0.5


def test_growth_by_given_scores_at_random_and_not_finite():
    def sparsifier(weights, **options):
        return GradualSparsifier(weights, 0.5, total_steps=20, every=10, alpha=1.0, **options)

    weights = new_weights((40,))
    own = sparsifier(weights)
    scores = torch.zeros(40)
    scores[weights[0].detach().abs().topk(4, largest=False).indices] = 1.0
    train(weights, own, torch.optim.SGD(weights, lr=0.0), 11, grow_scores=[scores])
    assert own.masks["0"][scores.bool()].all()
    with pytest.raises(InputError, match="grow_scores must have the shapes of the parameters"):
        other = new_weights((40,))
        train(other, sparsifier(other), sgd(other), 11, grow_scores=[torch.zeros(3)])

    masks = []
    for seed in (0, 0, 1):
        weights = new_weights((40,))
        own = sparsifier(weights, grow="random", generator=torch.Generator().manual_seed(seed))
        train(weights, own, torch.optim.SGD(weights, lr=0.0), 11)
        masks.append(own.masks["0"])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])

    # After an overflow the update waits for the next step.
    weights = new_weights((40,))
    own, optimizer = sparsifier(weights), torch.optim.SGD(weights, lr=0.0)
    train(weights, own, optimizer, 10)
    weights[0].grad = torch.full((40,), torch.inf)
    assert not own.step(optimizer)
    weights[0].grad = torch.ones(40)
    assert own.step(optimizer)


def test_a_weight_without_gradient_is_pruned_by_magnitude_alone():
    weights = new_weights((40,))
    sparsifier, optimizer = GradualSparsifier(weights, 0.5, total_steps=10, every=5, alpha=1.0), sgd(weights)
    largest = weights[0].detach().abs().topk(20).indices
    for _ in range(10):
        sparsifier.step(optimizer)
    assert sparsifier.masks["0"].nonzero().flatten().tolist() == sorted(largest.tolist())


def test_the_density_never_rises_again():
    weights = new_weights((100,))
    sparsifier, optimizer = GradualSparsifier(weights, 0.9, every=1), sgd(weights)
    counts = []
    for progress in (0.0, 0.5, 0.2, 0.6, 0.0, 0.9, 0.1):
        train(weights, sparsifier, optimizer, 1, progress=progress)
        counts.append(int(sparsifier.masks["0"].sum()))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 10


def test_complete_and_enforce():
    weights = new_weights((10, 10))
    largest = weights[0].detach().abs().flatten().topk(5).values.min()
    sparsifier = GradualSparsifier({"w": weights[0]}, 0.95, total_steps=100)
    sparsifier.complete()
    assert torch.equal(weights[0] != 0, sparsifier.masks["w"])
    assert sparsifier.densities() == {"w": 0.05}
    assert weights[0][weights[0] != 0].abs().min() == largest
    with torch.no_grad():
        weights[0] += 1
    sparsifier.enforce()
    assert int(weights[0].count_nonzero()) == 5


# State


def test_saved_and_loaded_it_goes_on_to_the_bit():
    def start():
        weights = new_weights((20, 10), (9,))
        return weights, GradualSparsifier(weights, 0.9, total_steps=30, every=4), sgd(weights)

    whole, sparsifier, optimizer = start()
    train(whole, sparsifier, optimizer, 13)
    saved = copy.deepcopy(([w.detach() for w in whole], sparsifier.state_dict(), optimizer.state_dict()))
    train(whole, sparsifier, optimizer, 17, seed=1)

    again, other, own = start()
    for weight, value in zip(again, saved[0]):
        weight.data.copy_(value)
    other.load_state_dict(saved[1])
    own.load_state_dict(saved[2])
    train(again, other, own, 17, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    assert other.get_extra_state() == sparsifier.get_extra_state()
    assert set(sparsifier.state_dict()) == {"mask_0", "mask_1", "_extra_state"}
    assert list(sparsifier.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_counts_are_exact_in_other_precisions(dtype):
    weights = new_weights((64, 16), dtype=dtype)
    sparsifier = GradualSparsifier(weights, 0.9, total_steps=20, every=3)
    train(weights, sparsifier, torch.optim.SGD(weights, lr=0.01), 20)
    assert int(sparsifier.masks["0"].sum()) == round(0.1 * 64 * 16)
    assert weights[0].dtype == dtype


def test_two_processes_with_unlike_gradients_have_equal_masks(tmp_path):
    """A hook that sees local gradients would choose unlike weights: rank 0 decides."""

    def work(fabric):
        weights = new_weights((20, 10), dtype=torch.float64)
        sparsifier = GradualSparsifier(weights, 0.8, total_steps=12, every=3)
        optimizer = torch.optim.SGD(weights, lr=0.0)
        train(weights, sparsifier, optimizer, 12, seed=fabric.global_rank)
        return {"mask": sparsifier.masks["0"].double()}

    check_two_processes(work, tmp_path)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_sparsity": 1.0}, r"final_sparsity must be in \[0, 1\), got 1"),
        ({"final_sparsity": 1 - 1e-13}, "final_sparsity must leave a density of at least 1e-12, got 0.9"),
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"until": 1.0}, r"until must be in \(0, 1\), got 1"),
        ({"total_steps": 0}, "total_steps must be >= 1, got 0"),
        ({"params": []}, "params must hold at least one parameter, got none"),
        ({"params": [nn.Parameter(torch.ones(2), requires_grad=False)]}, "got a frozen one, 0"),
        ({"params": {"w": nn.Parameter(torch.ones(0))}}, "got an empty one, w"),
    ],
)
def test_bad_input_is_named(options, message):
    given = {"params": new_weights((4, 4)), "final_sparsity": 0.5} | options
    with pytest.raises(InputError, match=message):
        GradualSparsifier(**given)


def test_a_bare_parameter_or_a_plain_tensor_is_refused(as_users_call):
    """A parameter iterates into its rows, which no optimizer knows."""
    for params in (nn.Parameter(torch.ones(4, 6)), {"w": torch.ones(4, 6)}):
        with pytest.raises(InputError, match=r"params must hold nn.Parameter, got Tensor"):
            GradualSparsifier(params, 0.5)


def test_bad_use_is_named():
    weights = new_weights((4, 4))
    with pytest.raises(InputError, match="params must be distinct"):
        GradualSparsifier([weights[0], weights[0]], 0.5)
    with pytest.raises(InputError, match="progress must be given where total_steps is None"):
        GradualSparsifier(weights, 0.5).step(sgd(weights))
    sharded = nn.Parameter(torch.ones(2, 2))
    sharded.placements = ()
    with pytest.raises(InputError, match="the weight 0 is sharded"):
        GradualSparsifier([sharded], 0.5)
    weights[0].data[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="weight 0 is not finite after 0 steps"):
        GradualSparsifier(weights, 0.5).complete()


@pytest.mark.parametrize("name", ["schedule", "scope", "grow"])
def test_unknown_choices_are_named(name):
    from coloss.compression.gradual_sparsifier import check_plan

    plan = {"schedule": "cubic", "scope": "layer", "grow": "none"} | {name: "other"}
    with pytest.raises(InputError, match=f"{name} must be .*, got 'other'"):
        check_plan(0.5, 1, 0.3, until=0.9, **plan)
