from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support import cache, write_images
from tests.train.conftest import Open
from xlsd_cache.store import LatentStore
from xlsd_train.selection import evenly, held_out, selected


class Rows:
    """The parts of a store that `held_out` looks at."""

    def __init__(self, hashes: list[str], crcs: list[int]) -> None:
        self.samples = pa.table({"content_hash": hashes, "crc32c": pa.array(crcs, pa.uint32())})

    def __len__(self) -> int:
        return len(self.samples)


def test_the_fraction_of_hashes_below_it_is_held_out() -> None:
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32).hex() for _ in range(20000)]
    crcs = rng.integers(0, 2**32, 20000).tolist()
    for rows in (Rows(hashes, crcs), Rows([""] * 20000, crcs)):
        small, large = (held_out(rows, x) for x in (0.01, 0.1))  # type: ignore[arg-type]
        assert abs(small.mean() - 0.01) < 0.004
        assert abs(large.mean() - 0.1) < 0.01
        assert not (small & ~large).any()  # who is held out stays so when more is
        assert not held_out(rows, 0.0).any()  # type: ignore[arg-type]
    exact = np.array([int(h[:16], 16) < int(0.1 * 2**64) for h in hashes])
    assert np.array_equal(held_out(Rows(hashes, crcs), 0.1), exact)  # type: ignore[arg-type]


def test_an_image_stays_on_its_side_however_the_store_grows(vae: Path, tmp_path: Path) -> None:
    images, data = tmp_path / "images", tmp_path / "latents"
    write_images(images, [f"{i}.png" for i in range(12)])
    build = ("build", images, "--out", data, "--vae", vae, "--resolution", 64)
    sides: dict[str, bool] = {}
    for _ in range(2):
        assert cache(*build) == 0
        with LatentStore.open(data) as store:
            mask = held_out(store, 0.4)
            told = dict(zip(store.samples["key"].to_pylist(), mask.tolist(), strict=True))
        assert sides.items() <= told.items()
        assert 0 < mask.sum() < len(mask)
        sides = told
        write_images(images, [f"new/{i}.png" for i in range(8)], first_seed=50)
    assert len(sides) == 20


def test_selected_samples_are_those_of_the_mask(store: Path) -> None:
    with LatentStore.open(store) as ours:
        mask = np.arange(len(ours)) % 3 != 1
        selection = selected(ours, mask)
        assert len(selection) == mask.sum()
        assert selection.of == len(ours)
        rows = [
            ours.sample_index(name, selection.ordinals(name, np.arange(size)))
            for name, size in selection.sizes.items()
        ]
        assert sorted(np.concatenate(rows).tolist()) == np.flatnonzero(mask).tolist()
        everything = selected(ours, np.ones(len(ours), np.bool_))
        assert everything.sizes == {name: len(rows) for name, rows in ours.buckets.items()}
        assert not len(selected(ours, np.zeros(len(ours), np.bool_)))


@pytest.mark.parametrize("count", [0, 1, 3, 7, 99])
def test_a_part_is_spread_evenly(count: int) -> None:
    mask = np.arange(100) % 5 == 0
    some = evenly(mask, count)
    assert some.sum() == min(count, 20)
    assert not (some & ~mask).any()
    if count == 3:
        assert np.flatnonzero(some).tolist() == [0, 30, 65]


def test_no_held_out_image_is_ever_in_a_batch(open_run: Open) -> None:
    session = open_run(validation_fraction=0.4, batch=2)
    source = session.source
    mask = held_out(source.store, 0.4)
    assert 0 < mask.sum() < len(mask)
    seen = set()
    for number in range(40):
        slot = session.schedule.slot(number)
        ordinals = source.selection.ordinals(slot.bucket, slot.ordinals)
        batch = source.make(slot)
        rows = source.store.buckets[slot.bucket][ordinals]
        assert np.array_equal(batch.latents.numpy(), source.store.read(slot.bucket, rows))
        seen |= set(source.store.sample_index(slot.bucket, ordinals).tolist())
    assert seen == set(np.flatnonzero(~mask).tolist())
