from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xlsd_cache.store.index
from tests.support.stores import empty_store
from xlsd_cache.schema import CAPTIONS, COMMIT, PLAN
from xlsd_cache.store.index import Snapshot, _gather, cached_snapshot, make_snapshot, save_snapshot
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.view import StoreView

ROWS = 4  # of a shard
KEYS = st.sampled_from("abcdefgh")
PLACED = st.tuples(KEYS, st.sampled_from(["64x64", "128x64"]), st.booleans())
SAID = st.tuples(KEYS, st.sampled_from(["txt", "moon"]), st.sampled_from(["", "x", "y, z"]))


@st.composite
def logs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Generations of a log: what each plans, removes and says, and which rows are encoded."""
    generations, free = [], {"64x64": 0, "128x64": 0}
    for number in range(draw(st.integers(1, 3))):
        plan = {}
        for key, bucket, placed in draw(st.lists(PLACED, max_size=6)):
            if key in plan:
                continue
            plan[key] = (bucket, free[bucket]) if placed else ("", -1)
            free[bucket] += placed
        free = {bucket: -(-rows // ROWS) * ROWS for bucket, rows in free.items()}
        removed = draw(st.sets(KEYS, max_size=2)) if number else set()
        said = {(key, column): text for key, column, text in draw(st.lists(SAID, max_size=8))}
        generations.append({"plan": plan, "removed": removed - plan.keys(), "said": said})
    return generations


def write(root: Path, generations: list[dict[str, Any]], rejected: set[int]) -> StoreView:
    """The log as a store keeps it; of the rows whose number is in `rejected` no latent exists."""
    store = empty_store(root, ROWS)
    manifest = store.manifest
    (root / "latents.zarr" / "zarr.json").write_text("{}")
    units: dict[ShardId, list[dict[str, Any]]] = {}
    for number, generation in enumerate(generations):
        plan = []
        for key, (bucket, row) in generation["plan"].items():
            plan.append(
                {
                    "key": key, "source": f"{number}/{key}", "size": 1, "mtime_ns": 1, "width": 9,
                    "height": 8, "crop": [0.0, 0.0, 9.0, 8.0], "bucket": bucket, "row": row,
                    "content_hash": "", "reason": "" if bucket else "too_small", "detail": "",
                }
            )  # fmt: skip
            if bucket:
                units.setdefault(ShardId(bucket, row // ROWS), []).append(
                    {
                        "row": row, "key": key, "content_hash": f"#{bucket}{row}", "crc32c": row,
                        "status": "rejected" if row in rejected else "encoded",
                        "reason": "", "detail": "",
                    }
                )  # fmt: skip
        said = [{"key": k, "column": c, "text": t} for (k, c), t in generation["said"].items()]
        manifest.write_plan(
            number,
            pa.Table.from_pylist(plan, PLAN),
            sorted(generation["removed"]),
            pa.Table.from_pylist(said, CAPTIONS),
        )
    for unit, lines in units.items():
        pq.write_table(pa.Table.from_pylist(lines, COMMIT), manifest.commit(unit))
    return replace(store, generation=len(generations) - 1)


def plainly(
    generations: list[dict[str, Any]], rejected: set[int], pending: set[ShardId]
) -> tuple[list[dict[str, Any]], int]:
    """The live samples, as one would write it down, and how many wait."""
    live: dict[str, dict[str, Any]] = {}
    captions: dict[str, dict[str, str]] = {"moon": {}, "txt": {}}
    for number, generation in enumerate(generations):
        for key in generation["removed"]:
            live.pop(key, None)
        for key, (bucket, row) in generation["plan"].items():
            live[key] = {
                "key": key, "source": f"{number}/{key}", "width": 9, "height": 8,
                "crop": [0.0, 0.0, 9.0, 8.0], "bucket": bucket, "row": row,
                "content_hash": f"#{bucket}{row}", "crc32c": row,
            }  # fmt: skip
        for (key, column), text in generation["said"].items():
            captions[column][key] = text
    placed = [sample for sample in live.values() if sample["bucket"]]
    waiting = [s for s in placed if ShardId(s["bucket"], s["row"] // ROWS) in pending]
    there = [s for s in placed if s not in waiting and s["row"] not in rejected]
    for column, texts in captions.items():
        if any(texts.values()):
            for sample in there:
                sample[column] = texts.get(sample["key"]) or None
    return sorted(there, key=lambda s: (s["bucket"], s["row"])), len(waiting)


@given(logs(), st.sets(st.integers(0, 9), max_size=3), st.integers(1, 9), st.booleans())
@settings(max_examples=60)
def test_the_snapshot_is_what_the_log_says(
    tmp_path_factory: pytest.TempPathFactory,
    generations: list[dict[str, Any]],
    rejected: set[int],
    batch: int,
    one_waits: bool,
) -> None:
    store = write(tmp_path_factory.mktemp("log"), generations, rejected)
    manifest = store.manifest
    pending = set(sorted(manifest.committed())[:1]) if one_waits else set()
    for unit in pending:
        manifest.commit(unit).unlink()
    for number in range(len(generations)):
        samples, waiting = plainly(generations[: number + 1], rejected, pending)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(xlsd_cache.store.index, "BATCH", batch)
            snapshot = make_snapshot(replace(store, generation=number))
        assert snapshot.samples.to_pylist() == samples
        assert snapshot.pending == waiting
        buckets = [sample["bucket"] for sample in samples]
        assert list(snapshot.ranges) == sorted(set(buckets))
        for bucket, (start, stop) in snapshot.ranges.items():
            assert buckets[start:stop] == [bucket] * buckets.count(bucket)
    assert not list(manifest.staging.iterdir())


def some_log(root: Path) -> StoreView:
    plan = {f"{i:02d}": ("64x64" if i % 3 else "128x64", i) for i in range(20)}
    return write(root, [{"plan": plan, "removed": set(), "said": {("03", "txt"): "cat"}}], set())


def same(a: Snapshot, b: Snapshot) -> bool:
    told = [(v.generation, v.ranges, v.pending, v.fingerprint) for v in (a, b)]
    return told[0] == told[1] and a.samples.equals(b.samples)


def test_columns_laid_aside_are_the_same_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = some_log(tmp_path)
    in_memory = make_snapshot(store)
    monkeypatch.setattr(xlsd_cache.store.index, "BATCH", 3)
    laid_aside = make_snapshot(store)
    assert same(laid_aside, in_memory)
    assert laid_aside.samples["key"].num_chunks == 3 + 5  # 7 and 13 rows, by three
    assert not list(store.manifest.staging.iterdir())
    store.manifest.staging.rmdir()  # as where the store may not be written to
    assert same(make_snapshot(store), in_memory)


def test_what_is_saved_is_mapped_bucket_by_bucket(tmp_path: Path) -> None:
    store = some_log(tmp_path)
    made = make_snapshot(store)
    save_snapshot(tmp_path, made)
    mapped = cached_snapshot(tmp_path, 0)
    assert mapped is not None
    assert same(mapped, made)
    assert cached_snapshot(tmp_path, 1) is None
    for start, stop in mapped.ranges.values():
        assert mapped.samples["row"].slice(start, stop - start).num_chunks == 1


@given(st.lists(st.lists(st.sampled_from(["", "a", "bc"]), max_size=4), max_size=5), st.data())
def test_taking_chunk_by_chunk_is_taking(chunks: list[list[str]], data: st.DataObject) -> None:
    texts = [text for chunk in chunks for text in chunk]
    places = st.integers(-1, len(texts) - 1)
    at = np.array(data.draw(st.lists(places, min_size=1, max_size=9)))
    column = pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks], pa.string())
    taken = _gather({"64x64": (0, len(at))}, Path("nowhere"), column, at)
    assert taken.to_pylist() == [texts[place] if place >= 0 else None for place in at.tolist()]
