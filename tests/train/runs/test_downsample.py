import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlsd_train.runs.downsample import Downsampler, evenly

VALUES = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300)


@given(VALUES, st.integers(2, 40), st.integers(1, 70))
def test_least_and_most_are_kept_and_points_are_bounded(
    values: list[float], points: int, chunk: int
) -> None:
    sampler = Downsampler(["loss"], points)
    steps = np.arange(1, len(values) + 1)
    for first in range(0, len(values), chunk):
        part = slice(first, first + chunk)
        sampler.add(steps[part], np.array([values[part]]))
    found = sampler.series("loss")
    assert len(found.steps) <= sampler.points
    assert (min(found.low), max(found.high)) == (min(values), max(values))
    assert found.steps == sorted(found.steps)
    for i, step in enumerate(found.steps):  # each point is its whole interval's
        stretch = step // found.every
        those = [v for s, v in zip(steps, values, strict=True) if s // found.every == stretch]
        assert (found.low[i], found.high[i]) == (min(those), max(those))
        assert found.mean[i] == pytest.approx(np.mean(those), abs=1e-3)


@given(VALUES)
def test_what_fits_is_left_as_it_is(values: list[float]) -> None:
    sampler = Downsampler(["loss"], 400)
    sampler.add(np.arange(1, len(values) + 1), np.array([values]))
    found = sampler.series("loss")
    assert found.every == 1
    assert found.steps == list(range(1, len(values) + 1))
    assert found.mean == found.low == found.high == values


def test_what_is_no_number_has_no_point() -> None:
    sampler = Downsampler(["loss", "d"])
    sampler.add(np.arange(3), np.array([[1, np.nan, np.inf], [np.nan] * 3]))
    assert sampler.series("loss").mean == [1.0]
    assert sampler.series("d").steps == []


@given(st.integers(1, 1000), st.integers(2, 50))
def test_an_even_choice_holds_both_ends(count: int, most: int) -> None:
    chosen = evenly(count, most)
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, count - 1, min(count, most))
    gaps = np.diff(chosen)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
