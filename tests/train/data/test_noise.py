import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from xlsd_train.data.noise import noise, stratified_timesteps, timesteps

POSITIONS = np.arange(20000)


def test_noise_is_standard_normal_and_timesteps_cover_the_range() -> None:
    x = noise(0, np.arange(64), (4, 16, 16))
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    t = timesteps(0, POSITIONS, 1000)
    counts = torch.bincount(t, minlength=1000)
    assert len(counts) == 1000
    assert counts.min() >= 2
    assert counts.max() <= 50


@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(0, 9))
def test_a_position_draws_the_same_in_whatever_company(first: int, count: int, cut: int) -> None:
    positions = np.arange(first, first + count)
    whole = noise(3, positions, (4, 2, 2))
    parts = [noise(3, part, (4, 2, 2)) for part in np.split(positions, [min(cut, count)])]
    assert torch.equal(whole, torch.cat(parts))
    t = timesteps(3, positions, 1000)
    assert t.tolist() == [int(timesteps(3, positions[i : i + 1], 1000)) for i in range(count)]


def test_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = noise(0, np.arange(3), (4, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(a, noise(0, np.arange(3), (4, 4, 4)))


@given(st.integers(1, 70), st.integers(0, 999), st.integers(0, 70))
def test_stratified_timesteps_lie_one_in_each_stratum(size: int, batch: int, cut: int) -> None:
    places = np.arange(size)
    whole = stratified_timesteps(0, batch, size, places, 1000)
    assert sorted((whole.numpy() * size // 1000).tolist()) == list(range(size)) or 1000 % size
    edges = np.arange(size) * 1000 / size  # a stratum's first timesteps are rounded down
    assert (np.abs(np.sort(whole.numpy()) - edges) <= 1000 / size).all()
    parts = np.split(places, [min(cut, size)])
    drawn = [stratified_timesteps(0, batch, size, part, 1000) for part in parts]
    assert torch.equal(whole, torch.cat(drawn))


def test_at_each_place_of_a_stratified_batch_every_timestep_is_as_likely() -> None:
    drawn = [stratified_timesteps(0, b, 8, np.array([0]), 1000).item() for b in range(20000)]
    counts = np.bincount(np.array(drawn, np.int64) // 100, minlength=10)
    assert counts.sum() == 20000
    assert (np.abs(counts - 2000) < 5 * 2000**0.5).all()


def test_offset_noise_shifts_each_channel_of_a_sample_by_its_own_normal_number() -> None:
    plain, offset = (noise(0, np.arange(500), (4, 4, 4), x) for x in (0.0, 0.1))
    shift = offset - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    one = shift[:, :, 0, 0]
    assert abs(float(one.mean())) < 0.01
    assert abs(float(one.std()) - 0.1) < 0.01
    assert torch.equal(noise(0, np.arange(3, 5), (4, 4, 4), 0.1), offset[3:5])
