"""Half-rise times and final gains of deep linear JEPA and MAE: the worked table, quadrature, and limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from coloss.jepa import fixed_point, integrate, jepa_time, mae_time
from coloss.jepa.time_courses import check_times, solve_course

SOLVE = {"jepa": jepa_time, "mae": mae_time}
A_B = torch.tensor([1.0, 1.2]), torch.tensor([0.9, 0.3])


def by_quadrature(objective: str, lam: float, rho: float, depth: int, start: float, share: float) -> float:
    """The integral of 1 / (du/dt), over log u."""
    final = rho ** (depth if objective == "jepa" else depth / (depth + 1))
    first, last = start ** (1 / depth), (share * final) ** (1 / depth)

    def slowness(log: float) -> float:
        u = math.exp(log)
        if objective == "jepa":
            return u / (lam * u ** (2 * depth) * (1 - u / rho))
        return u / (lam * u**depth * (1 - u ** (depth + 1) / rho))

    return quad(slowness, math.log(first), math.log(last), epsabs=0, epsrel=1e-11, limit=500)[0]


@pytest.mark.parametrize(
    ("objective", "depth", "expected"),
    [
        ("jepa", 1, (253.8, 214.7)),
        ("jepa", 2, (1476, 1556)),
        ("jepa", 3, (2560, 3835)),
        ("mae", 1, (4.92, 3.64)),
        ("mae", 2, (14.65, 11.78)),
        ("mae", 3, (19.38, 15.86)),
    ],
)
def test_the_table_of_two_features(objective: str, depth: int, expected: tuple[float, float]) -> None:
    """The less covariant, more predictable feature comes first for JEPA alone, and for it only with a deep encoder."""
    found = SOLVE[objective](*A_B, depth, 0.004)
    assert found.tolist() == pytest.approx(expected, rel=6e-4)
    assert (found[0] < found[1]) == (objective == "jepa" and depth > 1)


@settings(max_examples=25)
@given(
    st.sampled_from(["jepa", "mae"]),
    st.integers(1, 4),
    st.floats(0.1, 10),
    st.floats(0.05, 3),
    st.floats(0.01, 0.99),
    st.floats(-6, -0.1),
)
def test_the_closed_forms_are_the_integrals(
    objective: str, depth: int, lam: float, rho: float, share: float, below: float
) -> None:
    start = float(fixed_point(objective, rho, depth)) * share * 10**below
    found = float(SOLVE[objective](lam, rho, depth, start, share))
    assert found == pytest.approx(by_quadrature(objective, lam, rho, depth, start, share), rel=1e-7)


@pytest.mark.parametrize("objective", ["jepa", "mae"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_integrated_course_reaches_level_and_fixed_point_in_time(objective: str, depth: int) -> None:
    lam, rho = torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.5])
    times = SOLVE[objective](lam, rho, depth, 0.01)
    final = fixed_point(objective, rho, depth)
    for number in range(2):
        course = integrate(objective, lam, rho, depth, 0.01, [0.0, float(times[number])])
        assert course[0].tolist() == pytest.approx([0.01, 0.01])
        assert float(course[1, number]) == pytest.approx(float(final[number]) / 2, rel=1e-5)
    late = integrate(objective, lam, rho, depth, 0.01, [1e6])[0]
    torch.testing.assert_close(late, final, rtol=0, atol=1e-6)
    assert final.tolist() == pytest.approx(
        [r ** (depth if objective == "jepa" else depth / (depth + 1)) for r in (0.9, 0.5)]
    )


def test_the_leading_orders_of_a_small_start() -> None:
    start, depth, rho = 1e-9, 2, 0.6
    u0 = start ** (1 / depth)
    leading = u0**-3 / 3 + u0**-2 / (2 * rho)
    assert float(jepa_time(1.0, rho, depth, start)) == pytest.approx(leading, rel=1e-4)
    assert float(mae_time(1.0, rho, 3, start)) == pytest.approx(start ** (-2 / 3) / 2, rel=1e-4)


def test_the_gap_between_features_of_one_covariance() -> None:
    """JEPA's grows like start^-((2L-2)/L), logarithmically for L = 1; that of MAE stays."""

    def gaps(objective: str, depth: int) -> list[float]:
        times = [SOLVE[objective](1.0, torch.tensor([0.3, 0.9]), depth, start) for start in (1e-6, 1e-9)]
        return [float(slow - quick) for slow, quick in times]

    for depth in (2, 3):
        early, late = gaps("jepa", depth)
        assert late / early == pytest.approx(1000 ** ((2 * depth - 2) / depth), rel=0.1)
        assert gaps("mae", depth)[1] == pytest.approx(gaps("mae", depth)[0], rel=1e-2)
    early, late = gaps("jepa", 1)
    assert 1 < late / early < 2
    # Relative to the time itself the preference of one layer vanishes; that of three does not before theirs.
    shares = [gaps("jepa", depth)[1] / float(jepa_time(1.0, 0.9, depth, 1e-9)) for depth in (1, 2, 3)]
    assert shares[0] < 1e-6 < shares[1] < shares[2]


def test_times_scale_with_covariance_and_grow_with_share() -> None:
    for solve in SOLVE.values():
        assert solve(2.0, 0.7, 2, 0.01) * 2 == pytest.approx(float(solve(1.0, 0.7, 2, 0.01)))
        values = [float(solve(1.0, 0.7, 3, 0.01, share)) for share in (0.1, 0.5, 0.9, 0.999999)]
        assert values == sorted(values) and math.isfinite(values[-1])


def test_features_without_a_rise() -> None:
    lam = torch.tensor([0.0, -1.0, 1.0, 1.0, math.nan])
    rho = torch.tensor([0.0, -0.5, 0.1, 0.9, 0.5])
    found = jepa_time(lam, rho, 2, 0.01)
    assert found[:2].tolist() == [math.inf, math.inf]  # not learned
    assert found[2].isnan()  # 0.1^2 / 2 is below the start
    assert found[3].isfinite() and found[4].isnan()
    assert mae_time(lam, rho, 2, 0.01)[:2].tolist() == [math.inf, math.inf]
    assert fixed_point("jepa", rho[:2], 2).tolist() == [0, 0]
    # From above its fixed point a feature decays to it.
    course = integrate("jepa", torch.tensor([1.0]), torch.tensor([0.2]), 2, 0.5, [0.0, 1.0, 1e5])[:, 0]
    assert course[0] > course[1] > course[2] and float(course[2]) == pytest.approx(0.04, rel=1e-4)
    sinks = integrate("jepa", torch.tensor([-1.0]), torch.tensor([-0.5]), 2, 0.5, [0.0, 10.0])[:, 0]
    assert sinks[1] < sinks[0]


def test_half_precision_and_single_values() -> None:
    halved = torch.tensor([0.9, 0.3]).bfloat16()
    found = jepa_time(torch.ones(2).bfloat16(), halved, 2, 0.01)
    assert found.dtype == torch.float64
    assert found.tolist() == jepa_time(torch.ones(2), halved.double(), 2, 0.01).tolist()
    assert jepa_time(1, 0.5, 1, 0.01).shape == ()
    assert jepa_time(torch.ones(2, 1), torch.tensor([0.5, 0.6, 0.7]), 1, 0.01).shape == (2, 3)
    assert integrate("mae", torch.zeros(0), torch.zeros(0), 2, 0.01, [1.0]).shape == (1, 0)


def test_a_slow_euler_twin() -> None:
    u, rho, lam, depth, step = 0.1, 0.8, 1.5, 2, 1e-2
    for _ in range(30000):
        u += step * lam * u ** (2 * depth) * (1 - u / rho)
    found = integrate("jepa", torch.tensor([lam]), torch.tensor([rho]), depth, 0.01, [30000 * step])
    assert float(found) == pytest.approx(u**depth, rel=1e-3)
    assert np.isfinite(float(found))


def test_bad_input_is_named(as_users_call: None) -> None:
    one = torch.ones(1)
    for call, message in (
        (lambda: jepa_time(1.0, 0.5, 0, 0.01), "depth must be >= 1, got 0"),
        (lambda: mae_time(1.0, 0.5, 1, 0.0), "start must be > 0 and finite, got 0.0"),
        (lambda: jepa_time(1.0, 0.5, 1, 0.01, 1.0), r"share must be in \(0, 1\), got 1.0"),
        (lambda: fixed_point("byol", 0.5, 1), 'objective must be "jepa" or "mae", got \'byol\''),
        (lambda: integrate("jepa", one, -one, 1, 0.01, [1.0]), "of one sign in each feature"),
        (lambda: integrate("jepa", one, one, 1, 0.01, [2.0, 1.0]), "times must be increasing"),
        (lambda: integrate("jepa", one, one, 1, 0.01, [math.inf]), "and finite, got .inf"),
        (lambda: integrate("jepa", one, one, 1, 0.01, [0.0, math.nan]), "and finite, got .*nan"),
        (lambda: integrate("jepa", one / 0, one, 1, 0.01, [1.0]), "must be finite, of one sign"),
        (lambda: integrate("jepa", one, one, 3, 1e300, [1.0]), "must start with a finite velocity"),
        (lambda: integrate("jepa", one, one, 1, -1.0, [1.0]), "start must be > 0 and finite, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_course_that_breaks_off_is_refused() -> None:
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="times must be reachable, up to 2 they"):
        # 1 / (1 - t) is infinite at 1.
        solve_course(lambda time, values: values**2, np.ones(1), check_times([2.0]), rtol=1e-6)
