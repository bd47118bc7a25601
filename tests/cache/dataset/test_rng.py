from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.dataset import rng as draw

POSITIONS = np.arange(20000)


def test_splitmix64_gives_the_published_numbers() -> None:
    """Vigna's splitmix64.c started from 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert draw.splitmix64(1234567, np.arange(1, 4)).tolist() == expected


def test_uniform_is_uniform_and_streams_are_independent() -> None:
    a = draw.uniform(0, "a", POSITIONS)
    assert a.min() >= 0
    assert a.max() < 1
    assert abs(a.mean() - 0.5) < 0.01
    assert abs(a.var() - 1 / 12) < 0.01
    for other in (draw.uniform(0, "b", POSITIONS), draw.uniform(1, "a", POSITIONS), np.roll(a, 1)):
        assert abs(np.corrcoef(a, other)[0, 1]) < 0.03


@given(st.integers(0, 500), st.integers(0, 99))
def test_permutations_are_permutations(count: int, seed: int) -> None:
    order = draw.permutation(seed, "order", count)
    assert sorted(order.tolist()) == list(range(count))
    if count > 20:
        assert not np.array_equal(order, draw.permutation(seed + 1, "order", count))


@given(st.integers(0, 300), st.integers(0, 99))
def test_a_permutation_has_every_number_once(count: int, seed: int) -> None:
    assert sorted(draw.permutation(seed, "order", count).tolist()) == list(range(count))


def test_all_permutations_are_as_likely() -> None:
    orders = Counter(tuple(draw.permutation(seed, "order", 3).tolist()) for seed in range(6000))
    assert len(orders) == 6
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in orders.values())


def test_a_permutation_is_the_order_of_the_words() -> None:
    words = draw.words(5, "order", POSITIONS)
    order = draw.permutation(5, "order", len(POSITIONS))
    assert np.array_equal(order, np.argsort(words, kind="stable"))  # no two are alike on top
