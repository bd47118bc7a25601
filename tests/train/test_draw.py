from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from xlsd_train import draw

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


def test_noise_is_standard_normal_and_timesteps_cover_the_range() -> None:
    x = draw.noise(0, np.arange(64), (4, 16, 16))
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    t = draw.timesteps(0, POSITIONS, 1000)
    counts = torch.bincount(t, minlength=1000)
    assert len(counts) == 1000
    assert counts.min() >= 2
    assert counts.max() <= 50


@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(0, 9))
def test_a_position_draws_the_same_in_whatever_company(first: int, count: int, cut: int) -> None:
    positions = np.arange(first, first + count)
    whole = draw.noise(3, positions, (4, 2, 2))
    parts = [draw.noise(3, part, (4, 2, 2)) for part in np.split(positions, [min(cut, count)])]
    assert torch.equal(whole, torch.cat(parts))
    t = draw.timesteps(3, positions, 1000)
    assert t.tolist() == [int(draw.timesteps(3, positions[i : i + 1], 1000)) for i in range(count)]


def test_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = draw.noise(0, np.arange(3), (4, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(a, draw.noise(0, np.arange(3), (4, 4, 4)))


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


@given(st.integers(1, 70), st.integers(0, 999), st.integers(0, 70))
def test_stratified_timesteps_lie_one_in_each_stratum(size: int, batch: int, cut: int) -> None:
    places = np.arange(size)
    whole = draw.stratified_timesteps(0, batch, size, places, 1000)
    assert sorted((whole.numpy() * size // 1000).tolist()) == list(range(size)) or 1000 % size
    edges = np.arange(size) * 1000 / size  # a stratum's first timesteps are rounded down
    assert (np.abs(np.sort(whole.numpy()) - edges) <= 1000 / size).all()
    parts = np.split(places, [min(cut, size)])
    drawn = [draw.stratified_timesteps(0, batch, size, part, 1000) for part in parts]
    assert torch.equal(whole, torch.cat(drawn))


def test_at_each_place_of_a_stratified_batch_every_timestep_is_as_likely() -> None:
    drawn = [draw.stratified_timesteps(0, b, 8, np.array([0]), 1000).item() for b in range(20000)]
    counts = np.bincount(np.array(drawn, np.int64) // 100, minlength=10)
    assert counts.sum() == 20000
    assert (np.abs(counts - 2000) < 5 * 2000**0.5).all()


def test_offset_noise_shifts_each_channel_of_a_sample_by_its_own_normal_number() -> None:
    plain, offset = (draw.noise(0, np.arange(500), (4, 4, 4), x) for x in (0.0, 0.1))
    shift = offset - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    one = shift[:, :, 0, 0]
    assert abs(float(one.mean())) < 0.01
    assert abs(float(one.std()) - 0.1) < 0.01
    assert torch.equal(draw.noise(0, np.arange(3, 5), (4, 4, 4), 0.1), offset[3:5])
