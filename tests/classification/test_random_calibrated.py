import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from coloss.classification import EnsLoss, ens_loss, random_calibrated_derivatives


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.sampled_from([-3.0, -1.0, -1e-4, 0.0, 0.5, 1.0, 4.0]),
    st.integers(0, 1000),
)
def test_every_draw_is_convex_calibrated_and_clipped(margins: list[float], lam: float, seed: int) -> None:
    m = torch.tensor(margins)
    g = random_calibrated_derivatives(m, lam, generator=seeded(seed))
    assert bool((g < 0).all()) and bool((g >= -1 - 2e-6).all())
    lower, upper = m[:, None] < m[None, :], g[:, None] <= g[None, :]
    assert bool(upper[lower].all())


def test_columns_are_so_many_losses() -> None:
    m = torch.randn(20, 3)
    g = random_calibrated_derivatives(m, generator=seeded())
    for column in range(3):
        order = m[:, column].argsort()
        assert bool((g[order, column].diff() >= 0).all())
    assert len({tuple(g[:, column].sort().values.tolist()) for column in range(3)}) == 3


def test_the_inverse_box_cox_is_continuous_at_zero() -> None:
    options: dict[str, Any] = {"clip": None, "tail": None}
    m = torch.zeros(200, dtype=torch.float64)
    exponential = random_calibrated_derivatives(m, 0.0, generator=seeded(), **options)
    for lam in (1e-4, 1e-9):
        near = random_calibrated_derivatives(m, lam, generator=seeded(), **options)
        torch.testing.assert_close(near, exponential, rtol=10 * lam + 1e-12, atol=1e-9)
    normal = torch.randn(200, generator=seeded(), dtype=torch.float64)
    twin = sorted(-math.exp(r) - 1e-6 for r in normal.tolist())
    torch.testing.assert_close(exponential.sort().values, torch.tensor(twin, dtype=torch.float64))


def test_half_of_the_slopes_are_clipped_and_the_mean_is_the_published_one() -> None:
    g = random_calibrated_derivatives(torch.full((20_000,), -1.0), generator=seeded())
    assert float((g <= -1).float().mean()) == pytest.approx(0.5, abs=0.02)
    # E min(e^r, 1) = e^(1/2) Phi(-1) + 1/2
    assert float(-g.mean()) == pytest.approx(0.7616, abs=0.01)


def test_the_edges_of_the_box_cox_range() -> None:
    # 1 + lam r <= 0: a slope of 0 for lam > 0, which is made strict; an infinite one for lam < 0, which is clipped.
    flat = random_calibrated_derivatives(torch.zeros(2000), 5.0, generator=seeded())
    assert flat.max() == pytest.approx(-1e-6) and bool((flat < 0).all())
    steep = random_calibrated_derivatives(torch.zeros(2000), -5.0, clip=3.0, generator=seeded())
    assert bool(steep.isfinite().all()) and float(steep.min()) == pytest.approx(-3.0, abs=1e-5)


def test_the_tail_divides_safe_margins_only() -> None:
    m = torch.tensor([-2.0, 1.0, 1.5, 4.0, math.inf])
    without = random_calibrated_derivatives(m, tail=None, generator=seeded())
    within = random_calibrated_derivatives(m, generator=seeded())
    expected = (without + 1e-6) / torch.tensor([1.0, 1.0, 1.5, 4.0, math.inf]) - 1e-6
    torch.testing.assert_close(within, expected)


def test_a_generator_repeats_the_draw_and_leaves_the_global_one_alone() -> None:
    m, before = torch.randn(10), torch.get_rng_state()
    first, second = (random_calibrated_derivatives(m, generator=seeded(4)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(random_calibrated_derivatives(m), random_calibrated_derivatives(m))
    assert random_calibrated_derivatives(torch.zeros(0)).shape == (0,)


def gradient_of(loss: Any, scores: Tensor, target: Tensor) -> Tensor:
    scores = scores.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(scores, target), scores)
    return found


def test_the_gradient_is_the_signed_slope_over_the_batch_and_the_value_the_logistic_loss() -> None:
    scores, target = torch.randn(12), torch.randint(2, (12,))
    signs = 2.0 * target - 1
    slopes = random_calibrated_derivatives(signs * scores, generator=seeded())
    found = gradient_of(lambda z, y: ens_loss(z, y, generator=seeded()), scores, target)
    torch.testing.assert_close(found, signs * slopes / 12)
    value = ens_loss(scores, target, reduction="sum", generator=seeded())
    expected = F.binary_cross_entropy_with_logits(scores, target.float(), reduction="sum")
    torch.testing.assert_close(value, expected)
    summed = gradient_of(lambda z, y: ens_loss(z, y, reduction="sum", generator=seeded()), scores, target)
    torch.testing.assert_close(summed, 12 * found)


def test_without_randomness_it_is_the_perceptrons_gradient() -> None:
    # A tiny clip cuts every slope alike: -clip y / B for each score, wherever it is.
    scores, target = torch.randn(8), torch.randint(2, (8,))
    signs = 2.0 * target - 1
    loss = partial(ens_loss, lam=0.0, clip=1e-2, tail=None)
    torch.testing.assert_close(
        gradient_of(loss, scores, target), -signs * (1e-2 + 1e-6) / 8, rtol=0, atol=2e-4
    )


def test_two_logits_and_a_column_are_one_score() -> None:
    logits, target = torch.randn(9, 2), torch.randint(2, (9,))
    one = logits[:, 1] - logits[:, 0]
    draw = partial(ens_loss, generator=seeded())
    by_score = gradient_of(partial(ens_loss, generator=seeded()), one, target)
    by_column = gradient_of(partial(ens_loss, generator=seeded()), one[:, None], target[:, None].float())
    by_logits = gradient_of(draw, logits, target)
    assert torch.equal(by_column.squeeze(1), by_score)
    torch.testing.assert_close(by_logits, torch.stack([-by_score, by_score], 1))
    torch.testing.assert_close(ens_loss(logits, target), F.cross_entropy(logits, target))


def test_each_of_many_classes_is_held_against_the_rest() -> None:
    logits, target = torch.randn(15, 4), torch.randint(4, (15,))
    signs = 2.0 * F.one_hot(target, 4) - 1
    slopes = random_calibrated_derivatives(signs * logits, generator=seeded())
    found = gradient_of(lambda z, y: ens_loss(z, y, generator=seeded()), logits, target)
    torch.testing.assert_close(found, signs * slopes / 15)
    expected = F.binary_cross_entropy_with_logits(logits, (signs > 0).float(), reduction="sum") / 15
    torch.testing.assert_close(ens_loss(logits, target), expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_class_weights_multiply_after_the_ranking(classes: int) -> None:
    logits, target = torch.randn(10, classes), torch.randint(classes, (10,))
    weight = torch.rand(classes) + 0.1
    plain = gradient_of(lambda z, y: ens_loss(z, y, generator=seeded()), logits, target)
    weighted = gradient_of(lambda z, y: ens_loss(z, y, weight, generator=seeded()), logits, target)
    torch.testing.assert_close(weighted, plain * weight[target][:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_keep_every_slope(dtype: torch.dtype) -> None:
    scores = torch.tensor([100.0, -3.0, 5e4], dtype=dtype, requires_grad=True)
    loss = ens_loss(scores, torch.tensor([1, 1, 0]), generator=seeded())
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    loss.backward()
    assert scores.grad is not None and scores.grad.sign().tolist() == [-1.0, -1.0, 1.0]


def test_an_empty_batch_and_one_sample() -> None:
    assert ens_loss(torch.zeros(0), torch.zeros(0)).item() == 0
    gradient = gradient_of(ens_loss, torch.tensor([0.3]), torch.tensor([1]))
    assert -1.1 < gradient.item() < 0


# The module


def test_the_module_redraws_lam_each_period_of_training_calls_only() -> None:
    module = EnsLoss(period=3, lam_range=(0.5, 0.7), generator=seeded())
    seen = []
    for _ in range(7):
        module(torch.zeros(4), torch.tensor([0, 1, 0, 1]))
        seen.append(float(module.lam))
    assert seen[:3] == [0.0] * 3 and len(set(seen[3:6])) == 1 and len(set(seen)) == 3
    assert all(0.5 <= value <= 0.7 for value in seen[3:])
    module.eval()(torch.zeros(4), torch.tensor([0, 1, 0, 1]))
    assert int(module.calls) == 7 and float(module.lam) == seen[-1]


def test_a_restored_module_goes_on_with_the_same_draws() -> None:
    def steps(module: EnsLoss, count: int) -> list[list[float]]:
        return [
            gradient_of(module, torch.linspace(-2, 2, 6), torch.tensor([0, 1, 0, 1, 1, 0])).tolist()
            for _ in range(count)
        ]

    whole = steps(EnsLoss(period=2, generator=seeded()), 8)
    module = EnsLoss(period=2, generator=seeded())
    steps(module, 5)
    restored = EnsLoss(period=2, generator=seeded(99))
    restored.load_state_dict(module.state_dict())
    assert steps(restored, 3) == whole[5:]


def test_it_says_what_it_is() -> None:
    module = EnsLoss(torch.ones(2), lam=0.5)
    for loss in (module, ens_loss):
        assert loss.batch_statistic and loss.gradient_only  # type: ignore[attr-defined]
    assert "lam=0.5" in repr(module) and "weight" in module.state_dict()


def test_it_learns_to_separate_what_can_be_separated() -> None:
    generator = seeded()
    inputs = torch.randn(200, 2, generator=generator)
    target = (inputs @ torch.tensor([2.0, -1.0]) > 0).long()
    model, loss = nn.Linear(2, 1), EnsLoss(generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitored = []
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(model(inputs), target)
        value.backward()
        optimizer.step()
        monitored.append(value.item())
    accuracy = ((model(inputs).squeeze(1) > 0).long() == target).float().mean()
    assert accuracy > 0.97 and monitored[-1] < 0.5 * monitored[0]


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: ens_loss(z, y, reduction="none"), "samples are ranked in the batch.* got 'none'"),
        (lambda z, y: ens_loss(z, y, lam=math.nan), "lam must be finite, got nan"),
        (lambda z, y: ens_loss(z, y, clip=0.0), "clip must be > 0 and finite, or None, got 0.0"),
        (lambda z, y: ens_loss(z, y, tail=-1.0), "tail must be > 0 and finite, or None, got -1.0"),
        (lambda z, y: ens_loss(z, y, clip=None, lam=-1.0), "clip must be given where lam < 0"),
        (lambda z, y: ens_loss(z, y + 0.1), "hard labels, got fractions"),
        (lambda z, y: ens_loss(z, 2 * y - 1), r"class numbers in \[0, 2\), got -1"),
        (lambda z, y: ens_loss(z, y[:2]), r"target must hold 4 hard labels, got shape \(2,\)"),
        (lambda z, y: ens_loss(torch.zeros(4, 3), torch.zeros(4, 3)), "soft labels have no meaning here"),
        (lambda z, y: ens_loss(z[:, None, None], y), r"input must be \(batch,\) or \(batch, classes\)"),
        (lambda z, y: ens_loss(z, y, torch.ones(3)), "weight must hold 2 numbers > 0"),
        (lambda z, y: ens_loss(z, y, torch.zeros(2)), r"weight must hold 2 numbers > 0, got \[0.0, 0.0\]"),
        (lambda z, y: EnsLoss(period=0), "period must be >= 1, got 0"),
        (lambda z, y: EnsLoss(lam_range=(1.0, -1.0)), "lam_range must be .* low <= high"),
        (lambda z, y: EnsLoss(period=2, clip=None), "clip must be given where lam < 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4), torch.tensor([0, 1, 1, 0]))
