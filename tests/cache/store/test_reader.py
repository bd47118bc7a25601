import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xlsd_cache.store.reader
from tests.support import cache, write_images
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import Identity, LatentStore


@pytest.fixture
def grown(tmp_path: Path, vae: Path) -> tuple[Path, Callable[..., int]]:
    """A small store of ten pictures with four rows a shard, and how to build it again."""
    images, out = tmp_path / "images", tmp_path / "latents"
    write_images(images, [f"{i}.png" for i in range(10)])

    def build(*more: object) -> int:
        return cache(
            "build", images, "--out", out, "--vae", vae, "--resolution", 128,
            "--rows-per-shard", 4, "--batch", 2, *more,
        )  # fmt: skip

    assert build() == 0
    return out, build


def test_what_it_reads_is_what_plain_zarr_reads(store: Path) -> None:
    group: Any = zarr.open_group(store / "latents.zarr", mode="r")
    with LatentStore.open(store) as ours:
        assert set(ours.buckets) == set(group.array_keys())
        for bucket, rows in ours.buckets.items():
            shuffled = np.random.default_rng(0).permutation(rows)
            assert np.array_equal(ours.read(bucket, shuffled), group[bucket].oindex[shuffled])
            assert ours.read(bucket, []).shape == (0, *ours.shape(bucket))
        assert sum(len(rows) for rows in ours.buckets.values()) == len(ours) == 8


def test_out_is_filled_in_place_and_must_fit(store: Path) -> None:
    with LatentStore.open(store) as ours:
        rows = ours.buckets["128x128"][:3]
        out = np.zeros((3, 4, 16, 16), np.float32)
        assert ours.read("128x128", rows, out) is out
        assert np.array_equal(out, ours.read("128x128", rows))
        for wrong in (
            np.zeros((2, 4, 16, 16), np.float32),
            np.zeros((3, 4, 16, 16), np.float64),
            np.zeros((16, 16, 4, 3), np.float32).T,
        ):
            with pytest.raises(ValueError, match="C-contiguous"):
                ours.read("128x128", rows, wrong)


def test_samples_say_where_everything_is(store: Path, photos: Path) -> None:
    with LatentStore.open(store) as ours:
        for index, sample in enumerate(ours.samples.to_pylist()):
            rows = ours.buckets[sample["bucket"]]
            ordinal = int(np.searchsorted(rows, sample["row"]))
            assert rows[ordinal] == sample["row"]
            assert ours.sample_index(sample["bucket"], np.array([ordinal])) == [index]
            name = sample["key"].removeprefix("images/")
            assert Path(sample["source"]) == photos / name
            assert sample["txt"] == (photos / name).with_suffix(".txt").read_text().strip()
        assert ours.caption_columns == ("txt",)


def test_the_tables_open_in_other_programs(store: Path) -> None:
    plan = pl.read_parquet(store / "manifest/plan/*.parquet")
    commits = pl.read_parquet(store / "manifest/commit/*.parquet")
    assert plan.height == commits.height == 8
    assert pl.read_ipc(store / "index.arrow").height == 8


def test_a_run_sees_the_store_as_it_was(grown: tuple[Path, Callable[..., int]]) -> None:
    out, build = grown
    before = LatentStore.open(out)
    write_images(out.parent / "images", ["new.png"], first_seed=50)
    write_images(out.parent / "images", ["0.png"], first_seed=60)
    (out.parent / "images" / "9.png").unlink()
    (out.parent / "images" / "5.txt").write_text("another caption")
    assert build() == 0
    now, then = LatentStore.open(out), LatentStore.open(out, before.generation)
    assert then.samples.equals(before.samples.replace_schema_metadata(None))
    assert then.fingerprint == before.fingerprint != now.fingerprint
    assert len(now) == len(then) == 10
    assert now.generation == 1
    (bucket,) = then.buckets
    assert np.array_equal(
        then.read(bucket, then.buckets[bucket]), before.read(bucket, before.buckets[bucket])
    )
    keys = set(now.samples["key"].to_pylist())
    assert keys == {f"images/{i}.png" for i in range(9)} | {"images/new.png"}
    texts = dict(zip(now.samples["key"].to_pylist(), now.samples["txt"].to_pylist(), strict=True))
    assert texts["images/5.png"] == "another caption"
    with pytest.raises(UserError, match="no generation 7"):
        LatentStore.open(out, 7)
    for opened in (before, now, then):
        opened.close()


def test_the_index_is_only_derived(grown: tuple[Path, Callable[..., int]]) -> None:
    out, _ = grown
    with LatentStore.open(out) as mapped:
        (out / "index.arrow").unlink()
        with LatentStore.open(out) as made:
            assert made.samples.equals(mapped.samples.replace_schema_metadata(None))
            assert made.fingerprint == mapped.fingerprint
    assert (out / "index.arrow").exists()
    for garbage in (b"", b"ARROW1 but not really", (out / "index.arrow").read_bytes()[:-50]):
        (out / "index.arrow").write_bytes(garbage)
        with LatentStore.open(out) as again:
            assert len(again) == 10


def test_a_moved_store_is_the_same_store(grown: tuple[Path, Callable[..., int]]) -> None:
    out, _ = grown
    with LatentStore.open(out) as before:
        fingerprint = before.fingerprint
    moved = out.rename(out.parent / "moved")
    (moved / "index.arrow").unlink()
    with LatentStore.open(moved) as after:
        assert after.fingerprint == fingerprint


def test_an_unfinished_store_is_not_opened(grown: tuple[Path, Callable[..., int]]) -> None:
    out, build = grown
    with LatentStore.open(out) as whole:
        first = whole.generation
    write_images(out.parent / "images", ["new.png"], first_seed=50)
    assert build() == 0
    (out / "index.arrow").unlink()
    newest = max(path for path in (out / "manifest/commit").iterdir())
    newest.unlink()
    with LatentStore.open(out) as older:  # the newest complete generation
        assert (older.generation, older.newest_generation) == (first, first + 1)
    for path in (out / "manifest/commit").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="not finished: 11 images are not encoded yet"):
        LatentStore.open(out)


def test_damage_is_reported_with_the_images_name(grown: tuple[Path, Callable[..., int]]) -> None:
    out, _ = grown
    with LatentStore.open(out) as ours:
        (bucket,) = ours.buckets
        key = ours.samples["key"][0].as_py()
        row = int(ours.buckets[bucket][0])
    shard = out / "latents.zarr" / bucket / "c.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with LatentStore.open(out) as ours:
        with pytest.raises(UserError, match=f"{key}.*crc32c.*xlsd-cache check"):
            ours.read(bucket, [row])
        with pytest.raises(UserError, match="an image that is not live"):
            ours.read(bucket, [11])
    shard.unlink()
    with LatentStore.open(out) as ours, pytest.raises(UserError, match="No such file"):
        ours.will_need(bucket, [row])
        ours.read(bucket, [row])


def test_it_may_be_pickled_and_forked(store: Path) -> None:
    with LatentStore.open(store) as ours:
        expected = ours.read("128x128", ours.buckets["128x128"])
        with pickle.loads(pickle.dumps(ours)) as copied:
            assert np.array_equal(copied.read("128x128", copied.buckets["128x128"]), expected)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            there = pool.apply(ours.read, ("128x128", ours.buckets["128x128"]))
        assert np.array_equal(there, expected)


@given(st.lists(st.integers(0, 9), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_come_in_the_order_asked_for_and_as_often(
    grown: tuple[Path, Callable[..., int]], wanted: list[int]
) -> None:
    with LatentStore.open(grown[0]) as ours:
        (bucket,) = ours.buckets
        each = ours.read(bucket, ours.buckets[bucket])
        assert np.array_equal(ours.read(bucket, ours.buckets[bucket][wanted]), each[wanted])


def test_few_shards_stay_open_however_many_threads_read(
    grown: tuple[Path, Callable[..., int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shards, of which one may stay open, and a thread never sees another's file."""
    monkeypatch.setattr(xlsd_cache.store.reader, "_raise_file_limit", lambda: 1)
    out, _ = grown
    process = psutil.Process()
    with LatentStore.open(out) as ours:
        (bucket,) = ours.buckets
        rows = ours.buckets[bucket]
        expected = ours.read(bucket, rows)

        def read(seed: int) -> bool:
            orders = (np.random.default_rng([seed, i]).permutation(10) for i in range(50))
            return all(np.array_equal(ours.read(bucket, rows[o]), expected[o]) for o in orders)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(8)))
        assert len(shards_open(process, out)) == 1
    assert shards_open(process, out) == []


def shards_open(process: psutil.Process, store: Path) -> list[str]:
    zarr_folder = str(store / "latents.zarr")
    return [file.path for file in process.open_files() if file.path.startswith(zarr_folder)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_forked_while_threads_read_can_read(
    grown: tuple[Path, Callable[..., int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xlsd_cache.store.reader, "_raise_file_limit", lambda: 1)
    with LatentStore.open(grown[0]) as ours:
        (bucket,) = ours.buckets
        rows = ours.buckets[bucket]
        expected, done = ours.read(bucket, rows), threading.Event()
        context = multiprocessing.get_context("fork")
        ends, other = context.Pipe(duplex=False)

        def keep_reading() -> None:
            while not done.is_set():
                ours.read(bucket, rows[::-1])

        threads = [threading.Thread(target=keep_reading) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            child = context.Process(target=lambda: other.send(ours.read(bucket, rows)))
            child.start()
            assert ends.poll(60), "the child hangs"
            assert np.array_equal(ends.recv(), expected)
            child.join()
        done.set()
        for thread in threads:
            thread.join()


def test_row_numbers_are_mapped_and_not_copied(store: Path) -> None:
    with LatentStore.open(store) as ours:
        for bucket, rows in ours.buckets.items():
            start = ours.sample_index(bucket, np.array([0])).item()
            column = ours.samples["row"].slice(start, len(rows)).chunk(0)
            address = column.buffers()[1].address + 8 * column.offset
            assert rows.__array_interface__["data"] == (address, True)


@pytest.mark.parametrize("content", [None, "{}", "nonsense", '{"attributes": {"format": "x"}}'])
def test_other_folders_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "latents.zarr").mkdir()
        (tmp_path / "latents.zarr" / "zarr.json").write_text(content)
    with pytest.raises(
        UserError, match="no latent store" if content is None else "not a latent store"
    ):
        LatentStore.open(tmp_path)


def test_a_newer_format_is_refused(grown: tuple[Path, Callable[..., int]]) -> None:
    path = grown[0] / "latents.zarr" / "zarr.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="store format 2"):
        LatentStore.open(grown[0])


def test_identities_differ_by_weights_and_not_by_names(store: Path) -> None:
    with LatentStore.open(store) as ours:
        values = {**ours.identity.__dict__, "vae_name": "other", "vae_source": "elsewhere"}
        assert ours.identity.differences(Identity(**values)) == {}
        values |= {"vae_sha256": "0", "max_ratio": 3.0}  # another decoder
        assert set(ours.identity.differences(Identity(**values))) == {"max_ratio"}
        for encoder, name in (("1", "encoder_sha256"), ("", "vae_sha256")):  # another, not known
            values["encoder_sha256"] = encoder
            assert set(ours.identity.differences(Identity(**values))) == {name, "max_ratio"}


def test_commit_records_hold_the_checksums_of_the_latents(store: Path) -> None:
    import google_crc32c

    with LatentStore.open(store) as ours:
        for path in (store / "manifest/commit").iterdir():
            bucket = path.name.partition(".")[0]
            for row in pq.read_table(path).to_pylist():
                latent = ours.read(bucket, [row["row"]])
                assert google_crc32c.value(latent.tobytes()) == row["crc32c"]
