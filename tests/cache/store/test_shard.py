import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.stores import empty_store
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.shard import CorruptShard, ShardReader, ShardRow, ShardWriter, read_journal
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_files import grow_array

SHAPE, ROWS = (4, 6, 5), 16
NBYTES = int(np.prod(SHAPE)) * 4


def latents(seed: int, rows: int = ROWS) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, *SHAPE), dtype=np.float32)


def write(folder: Path, values: NDArray[Any], slots: list[int], batch: int = 4) -> Path:
    """Write the rows `slots` of `values` through the writer; returns the shard."""
    batches = [slots[i : i + batch] for i in range(0, len(slots), batch)]
    writer = ShardWriter(folder, "s", batches, NBYTES)
    for todo in writer.remaining:
        writer.append(
            [ShardRow(slot, "hash") for slot in todo], {slot: values[slot] for slot in todo}
        )
    writer.finish(folder / "shard", ROWS)
    return folder / "shard"


def read(path: Path, slot: int) -> NDArray[np.float32]:
    out = np.empty(SHAPE, np.float32)
    ShardReader(path, ROWS, NBYTES).read_into(slot, out.reshape(-1).view(np.uint8))
    return out


@given(st.integers(0, 99), st.sets(st.integers(0, ROWS - 1)), st.integers(1, ROWS))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, slots: set[int], batch: int
) -> None:
    values = latents(seed)
    path = write(tmp_path_factory.mktemp("s"), values, sorted(slots), batch)
    for slot in range(ROWS):
        if slot in slots:
            assert np.array_equal(read(path, slot), values[slot])
        else:
            with pytest.raises(CorruptShard, match="not in the shard"):
                read(path, slot)


def empty_array(root: Path, dtype: str = "float32") -> StoreView:
    store = empty_store(root, ROWS, dtype)
    grow_array(store, "40x48", 2 * ROWS - 3)
    return store


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zarr_and_tensorstore_read_what_we_write(tmp_path: Path, dtype: str) -> None:
    manifest = empty_array(tmp_path, dtype).manifest
    values = latents(1).astype(dtype)
    nbytes = values[0].nbytes
    writer = ShardWriter(manifest.staging, "s", [list(range(ROWS - 1))], nbytes)
    writer.append([ShardRow(slot, "") for slot in range(ROWS - 1)], dict(enumerate(values[:-1])))
    writer.finish(manifest.shard(ShardId("40x48", 1)), ROWS)
    array: Any = zarr.open_array(manifest.array("40x48"), mode="r")
    assert array.shape == (2 * ROWS, *SHAPE)
    assert array.metadata.dimension_names == ("sample", "channel", "y", "x")
    assert np.array_equal(array[ROWS : 2 * ROWS - 1], values[:-1])
    other = open_tensorstore(manifest.array("40x48"))
    assert np.array_equal(other[ROWS : 2 * ROWS - 1].read().result(), values[:-1])


def open_tensorstore(path: Path, **options: Any) -> Any:
    store = {"driver": "file", "path": str(path)}
    return tensorstore.open({"driver": "zarr3", "kvstore": store}, **options).result()


@pytest.mark.parametrize("library", ["zarr", "tensorstore"])
def test_we_read_what_zarr_and_tensorstore_write(tmp_path: Path, library: str) -> None:
    manifest, values = empty_array(tmp_path).manifest, latents(2)
    path = manifest.array("40x48")
    if library == "zarr":
        array: Any = zarr.open_array(path, mode="r+")
        array[0:ROWS] = values
    else:
        open_tensorstore(path, write=True)[0:ROWS].write(values).result()
    shard = manifest.shard(ShardId("40x48", 0))
    for slot in range(ROWS):
        assert np.array_equal(read(shard, slot), values[slot])
    ours = write(tmp_path / "staging", values, list(range(ROWS)))
    assert ours.read_bytes() == shard.read_bytes()


def test_growing_an_array_keeps_what_it_holds(tmp_path: Path) -> None:
    store, values = empty_array(tmp_path), latents(3)
    manifest = store.manifest
    write(manifest.staging, values, list(range(ROWS))).rename(manifest.shard(ShardId("40x48", 0)))
    grow_array(store, "40x48", 5 * ROWS)
    grow_array(store, "40x48", 1)
    array: Any = zarr.open_array(manifest.array("40x48"), mode="r")
    assert array.shape[0] == 5 * ROWS
    assert np.array_equal(array[:ROWS], values)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_flipped_bit_is_ever_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    values = latents(4)
    path = write(tmp_path_factory.mktemp("s"), values, list(range(ROWS)))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        reader = ShardReader(path, ROWS, NBYTES)
    except CorruptShard:
        return
    record = NBYTES + 4
    damaged = bit // 8 // record
    for slot in range(ROWS):
        out = np.empty(SHAPE, np.float32)
        if slot == damaged:
            with pytest.raises(CorruptShard, match="wrong crc32c"):
                reader.read_into(slot, out.reshape(-1).view(np.uint8))
        else:
            reader.read_into(slot, out.reshape(-1).view(np.uint8))
            assert np.array_equal(out, values[slot])


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, latents(5), list(range(ROWS)))
    whole = path.read_bytes()
    for size in (0, 3, 16 * ROWS + 3, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptShard):
            ShardReader(path, ROWS, NBYTES)
    path.write_bytes(whole)
    with pytest.raises(CorruptShard, match="records are not of"):
        ShardReader(path, ROWS, NBYTES + 4)
    index = np.frombuffer(whole[-16 * ROWS - 4 : -4], "<u8").copy()
    index[0] = len(whole)  # beyond the file, under a right checksum
    crc = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    path.write_bytes(whole[: -16 * ROWS - 4] + index.tobytes() + crc)
    with pytest.raises(CorruptShard, match="beyond its records"):
        ShardReader(path, ROWS, NBYTES)


def test_reading_without_preadv_and_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where neither call exists."""
    values = latents(6)
    path = write(tmp_path, values, list(range(ROWS)))
    for name in ("preadv", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    for slot in range(ROWS):
        assert np.array_equal(read(path, slot), values[slot])
        ShardReader(path, ROWS, NBYTES).will_need(slot)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_an_interrupted_shard_ends_byte_equal_and_keeps_whole_batches(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever a kill leaves of the two staging files: any prefix of each, or garbage behind it."""
    values, slots = latents(7), list(range(ROWS - 3))
    folder, batch = tmp_path_factory.mktemp("s"), 4
    expected = write(tmp_path_factory.mktemp("s"), values, slots, batch).read_bytes()
    batches = [slots[i : i + batch] for i in range(0, len(slots), batch)]
    writer = ShardWriter(folder, "s", batches, NBYTES)
    done = data.draw(st.integers(0, len(batches)))
    for todo in batches[:done]:
        writer.append([ShardRow(slot, "") for slot in todo], {slot: values[slot] for slot in todo})
    for path in (writer.part, writer.journal):
        if path.exists():
            kept = data.draw(st.integers(0, path.stat().st_size))
            path.write_bytes(path.read_bytes()[:kept] + data.draw(st.binary(max_size=9)))
    again = ShardWriter(folder, "s", batches, NBYTES)
    assert len(again.rows) % batch == 0 or len(again.rows) == len(slots)
    for left in again.remaining:
        again.append([ShardRow(slot, "") for slot in left], {slot: values[slot] for slot in left})
    again.finish(folder / "shard", ROWS)
    assert (folder / "shard").read_bytes() == expected
    assert read_journal(again.journal).keys() == set(slots)


def test_rejected_rows_survive_a_salvage_with_their_reason(tmp_path: Path) -> None:
    values = latents(8)
    writer = ShardWriter(tmp_path, "s", [[0, 1], [2]], NBYTES)
    writer.append(
        [ShardRow(0, "h0"), ShardRow(1, "h1", reason="corrupt", detail="why")], {0: values[0]}
    )
    again = ShardWriter(tmp_path, "s", [[0, 1], [2]], NBYTES)
    assert again.remaining == [[2]]
    assert again.rows[1] == ShardRow(1, "h1", reason="corrupt", detail="why")
    assert again.rows[0].crc32c == google_crc32c.value(values[0].tobytes())
