import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import cache, write_images
from tests.support.stores import empty_store
from xlsd_cache.errors import UserError
from xlsd_cache.integrity.shard_check import verify_shard
from xlsd_cache.integrity.verify import verify_index, verify_log
from xlsd_cache.store.commit import write_commit
from xlsd_cache.store.index import cached_snapshot, make_snapshot
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.shard import ShardRow, ShardWriter
from xlsd_cache.store.view import StoreView


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, vae: Path) -> StoreView:
    """A store of seven shards; of one image the latent stays though it left training."""
    folder = tmp_path_factory.mktemp("readback")
    images, out = folder / "images", folder / "latents"
    for shape, (width, height) in {"s": (160, 128), "w": (256, 80), "t": (70, 200)}.items():
        names = [f"{shape}{i}.png" for i in range(7)]
        write_images(images, names, first_seed=ord(shape), width=width, height=height)
    (images / "s0.png").write_bytes((images / "s0.png").read_bytes()[:-900])  # is rejected
    options = ("--vae", vae, "--resolution", 128, "--rows-per-shard", 4, "--batch", 3)
    assert cache("build", images, "--out", out, *options) == 0
    (images / "w1.png").unlink()
    write_images(images, ["s9.png"], first_seed=999)
    assert cache("build", images, "--out", out, *options) == 0
    return StoreView.open(out)


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """The file with one bit turned over, and right again afterwards."""

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    flip()
    try:
        yield
    finally:
        flip()


def test_each_of_1000_flipped_bits_is_found_and_none_reaches_a_batch(checked: StoreView) -> None:
    """Anywhere in any shard: in records, their checksums, the index, and its checksum."""
    manifest, rows_per_shard = checked.manifest, checked.rows_per_shard
    rng = random.Random(0)
    units = sorted(manifest.committed())
    assert len(units) == 7
    sizes = [manifest.shard(unit).stat().st_size for unit in units]
    with LatentStore.open(manifest.root) as store:
        assert len(store) == 20
        right = {
            (bucket, int(row)): store.read(bucket, [int(row)])
            for bucket, rows in store.buckets.items()
            for row in rows
        }
        for unit in units:
            assert verify_shard(checked, unit, set()) == []
        lost_reads = 0
        for _ in range(1000):
            (unit,) = rng.choices(units, sizes)
            path = manifest.shard(unit)
            with flipped(path, rng.randrange(8 * path.stat().st_size)):
                store.close()  # no shard is open from before
                found = {
                    row for problem in verify_shard(checked, unit, set()) for row in problem.rows
                }
                assert found, "a flipped bit always costs a row at least"
                for (bucket, row), latent in right.items():
                    if ShardId(bucket, row // rows_per_shard) != unit:
                        continue
                    if row in found:
                        lost_reads += 1
                        with pytest.raises(UserError, match="xlsd-cache check"):
                            store.read(bucket, [row])
                    else:
                        assert np.array_equal(store.read(bucket, [row]), latent)
        assert lost_reads > 900  # the latent that left training takes the rest


def test_any_flipped_bit_in_the_log_is_found(checked: StoreView) -> None:
    manifest = checked.manifest
    commits = [manifest.commit(unit) for unit in sorted(manifest.committed())]
    paths = [manifest.root / name for name in manifest.files(1)] + commits
    rng = random.Random(0)
    assert verify_log(checked) == []
    for _ in range(300):
        path = rng.choice(paths)
        with flipped(path, rng.randrange(8 * path.stat().st_size)):
            assert [problem.where for problem in verify_log(checked)] == [checked.relative(path)]


def test_a_flipped_bit_in_the_index_is_found_or_changes_nothing(checked: StoreView) -> None:
    root = checked.manifest.root
    with LatentStore.open(root):  # makes it where it is missing
        pass
    view = make_snapshot(checked)
    rng, found = random.Random(0), 0
    assert verify_index(checked, view) == []
    for _ in range(200):
        path = root / "index.arrow"
        with flipped(path, rng.randrange(8 * path.stat().st_size)):
            problems = verify_index(checked, view)
            found += bool(problems)
            if not problems:
                there = cached_snapshot(root, 1)
                assert there is not None
                assert there.samples.equals(view.samples)
    assert found > 50


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 65504.0, 6e-8])
def test_values_that_are_not_finite_are_found(tmp_path: Path, dtype: str, value: float) -> None:
    store, unit = empty_store(tmp_path, 4, dtype), ShardId("64x64", 0)
    manifest = store.manifest
    manifest.array("64x64").mkdir()
    latent = np.zeros((4, 8, 8), dtype)
    latent[3, 7, 7] = value
    writer = ShardWriter(manifest.staging, unit.name, [[0]], latent.nbytes)
    writer.append([ShardRow(0, "hash")], {0: latent})
    writer.finish(manifest.shard(unit), 4)
    entries: dict[int, Any] = {0: {"key": "a.png"}}
    write_commit(store, unit, entries, writer.rows)
    problems = verify_shard(store, unit, set())
    assert bool(problems) == (not np.isfinite(value))
    assert all("hold NaN or infinity: a.png" in str(problem) for problem in problems)
