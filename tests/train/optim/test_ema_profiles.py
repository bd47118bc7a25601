import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xlsd_train.optim.ema_profiles import Profile, coefficients, gamma_of, inner, kept, superfluous

STEPS = 1000


def test_gamma_and_sigma_rel_are_those_of_the_paper() -> None:
    """Karras et al. 2024, section 3.1: gamma 16.97 and 6.94 are widths of 5% and 10%."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@given(st.floats(0.002, 0.288))
def test_gamma_has_that_sigma_rel(sigma: float) -> None:
    """By eq. 3."""
    gamma = gamma_of(sigma)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(sigma, rel=1e-6)


def test_sigma_rel_is_the_profiles_standard_deviation() -> None:
    t = np.linspace(0, 1, 200_001)
    for gamma in (0.5, 6.94, 16.97):
        p = (gamma + 1) * t**gamma
        p /= p.sum()
        spread = np.sqrt((p * t**2).sum() - (p * t).sum() ** 2)
        assert gamma_of(spread) == pytest.approx(gamma, rel=1e-3)


@given(st.floats(1, 20), st.floats(1, 20), st.integers(1, 100), st.integers(1, 100))
def test_inner_products_are_integrals(a: float, b: float, ta: int, tb: int) -> None:
    t = (np.arange(100_000) + 0.5) * (min(ta, tb) / 100_000)
    product = (a + 1) * t**a / float(ta) ** (a + 1) * (b + 1) * t**b / float(tb) ** (b + 1)
    expected = product.sum() * min(ta, tb) / 100_000
    assert inner(Profile(a, ta), Profile(b, tb)) == pytest.approx(expected, rel=1e-5)
    assert inner(Profile(b, tb), Profile(a, ta)) == pytest.approx(expected, rel=1e-5)


def averaged(trajectory: NDArray[np.float64], gamma: float, time: int) -> NDArray[np.float64]:
    """Eq. 1 on a trajectory [steps, n] that is constant within each step: written out."""
    edges = (np.arange(time + 1) / time) ** (gamma + 1)
    return np.diff(edges) @ trajectory[:time]


def walk(seed: int = 0) -> NDArray[np.float64]:
    """Weights that drift and shake, far from 0, as those of a network that is trained on."""
    rng = np.random.default_rng(seed)
    return 1.0 + 0.01 * np.cumsum(rng.normal(0.02, 1, (STEPS, 50)), axis=0)


def test_updating_step_by_step_is_the_integral() -> None:
    trajectory = walk()
    for gamma in (6.94, 16.97):
        average = np.zeros(50)
        for step in range(1, STEPS + 1):
            beta = kept(gamma, step - 1, step)
            average = beta * average + (1 - beta) * trajectory[step - 1]
        assert np.allclose(average, averaged(trajectory, gamma, STEPS), rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.07, 0.12, 0.15, 0.2])
def test_other_lengths_are_reconstructed_from_snapshots(sigma: float) -> None:
    """Against the average of the same trajectory, computed directly."""
    trajectory = walk()
    times = np.linspace(STEPS / 12, STEPS, 12).astype(int).tolist()
    profiles = [Profile(gamma_of(s), t) for t in times for s in (0.05, 0.10)]
    counts, error = coefficients(profiles, Profile(gamma_of(sigma), STEPS))
    got = sum(
        count * averaged(trajectory, profile.gamma, int(profile.time))
        for count, profile in zip(counts, profiles, strict=True)
    )
    wanted = averaged(trajectory, gamma_of(sigma), STEPS)
    moved = np.abs(trajectory[-1] - wanted).max()
    assert error < 0.05
    assert np.abs(got - wanted).max() < 0.02 * moved
    assert counts.sum() == pytest.approx(1, abs=1e-9)


def test_what_was_kept_is_found_exactly() -> None:
    profiles = [Profile(gamma_of(s), t) for t in (250, 500, 1000) for s in (0.05, 0.10)]
    for i, wanted in enumerate(profiles):
        counts, error = coefficients(profiles, wanted)
        assert counts == pytest.approx(np.eye(6)[i].tolist(), abs=1e-5)
        assert error < 1e-4


@given(st.lists(st.integers(1, 10_000), unique=True, max_size=40), st.integers(1, 15))
def test_superfluous_snapshots_leave_the_ends_and_even_gaps(times: list[int], most: int) -> None:
    times.sort()
    doomed = superfluous(times, most)
    left = [time for time in times if time not in doomed]
    assert len(left) == min(len(times), max(most, 2))
    if times:
        assert (left[0], left[-1]) == (times[0], times[-1])


def test_snapshots_of_a_long_run_stay_even() -> None:
    there: list[int] = []
    for step in range(500, 100_001, 500):
        there.append(step)
        for doomed in superfluous(there, 12):
            there.remove(doomed)
    gaps = np.diff(there)
    assert len(there) == 12
    assert gaps.max() <= 4 * np.median(gaps)
