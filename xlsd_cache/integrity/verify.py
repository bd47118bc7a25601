"""Verifies a store: reads every file and compares it with the log."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.integrity.shard_check import Problem, ProblemKind, planned_rows, verify_shard
from xlsd_cache.runtime.atomic import is_whole
from xlsd_cache.store.index import Snapshot, cached_snapshot, make_snapshot
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_files import array_fault, live_faults, live_files

THREADS = min(8, os.cpu_count() or 1)


def verify(store: StoreView) -> list[Problem]:
    """Every problem of the log's files, the arrays and the committed shards.

    Not of the index and the sums, which need a sound log. Where a plan is damaged, shards are
    compared with their commit records alone.
    """
    log = verify_log(store)
    planned = not any(problem.kind == "plan" for problem in log)
    places = verify_places(store) if planned else []
    given_up = damaged_places(store) if planned else {}
    unreadable = {problem.unit for problem in log}

    def check(unit: ShardId) -> list[Problem]:
        return verify_shard(store, unit, given_up.get(unit.bucket, set()))

    units = [unit for unit in sorted(store.manifest.committed()) if unit not in unreadable]
    return log + places + _in_threads("shards", check, units)


def verify_log(store: StoreView) -> list[Problem]:
    """Compare every file of the log with its own checksum."""
    manifest = store.manifest

    def check(name: str) -> list[Problem]:
        fault = _table_fault(manifest.root / name)
        kind: ProblemKind = "captions" if name.startswith("captions/") else "plan"
        return [Problem(kind, name, fault)] if fault else []

    def check_commit(unit: ShardId) -> list[Problem]:
        fault = _table_fault(manifest.commit(unit))
        return [Problem("commit", unit.record, fault, unit=unit)] if fault else []

    gaps = set(range(store.generation)) - set(manifest.generations())
    missing = [
        Problem("plan", f"manifest/plan/{number:06d}.parquet", "is missing")
        for number in sorted(gaps)
    ]
    files = _in_threads("the log", check, manifest.files(store.generation))
    commits = _in_threads("commit records", check_commit, sorted(manifest.committed()))
    if files or missing or not commits:
        return missing + files + commits
    return [_with_planned_images(store, problem) for problem in commits]


def verify_places(store: StoreView) -> list[Problem]:
    """Check the arrays' zarr.json, commit records without a plan, lost records, stray files."""
    manifest, shard = store.manifest, store.rows_per_shard
    problems = []
    folder = manifest.root / "latents.zarr"
    expected = {folder / "zarr.json", *live_files(manifest)}
    planned: set[ShardId] = set()
    for bucket, rows in planned_rows(store).items():
        fault = array_fault(store, bucket, int(rows[-1]) + 1)
        path = manifest.array(bucket) / "zarr.json"
        problems += [Problem("array", store.relative(path), fault)] if fault else []
        expected.add(path)
        units = {ShardId(bucket, number) for number in np.unique(rows // shard).tolist()}
        planned |= units
        expected |= {manifest.shard(unit) for unit in units}
    committed = manifest.committed()
    for unit in sorted(planned - committed):
        journal = manifest.staging / f"{unit.name}.jnl"  # a running or killed build
        if manifest.shard(unit).exists() and not journal.exists():
            lost = Problem("commit", unit.record, "is missing, but its shard exists", unit=unit)
            problems.append(_with_planned_images(store, lost))
    for unit in sorted(committed - planned):
        why = "was never planned: a plan file is missing"
        problems.append(Problem("plan", unit.record, why))
    existing = (path for path in folder.rglob("*") if not path.is_dir())
    strays = sorted(path for path in existing if path not in expected)
    return problems + [
        Problem("stray", store.relative(path), "is not a file of the store") for path in strays
    ]


def verify_index(store: StoreView, snapshot: Snapshot) -> list[Problem]:
    """Compare index.arrow, if it exists, with the log; `snapshot` is the newest."""
    root = store.manifest.root
    if not (root / "index.arrow").exists():
        return []
    for generation in reversed(store.manifest.generations()):
        cached = cached_snapshot(root, generation)
        if cached is None:
            continue
        try:
            cached.samples.validate(full=True)
        except Exception:  # pyarrow raises anything for damaged bytes
            break
        if generation != store.generation:  # a newer one is not encoded yet
            snapshot = make_snapshot(replace(store, generation=generation))
        if cached.samples.equals(snapshot.samples) and cached.ranges == snapshot.ranges:
            if cached.fingerprint == snapshot.fingerprint:
                return []
            what = "was built from other bytes of the log, though with equal samples"
        else:
            what = "is stale or damaged"
        return [Problem("index", "index.arrow", what)]
    return [Problem("index", "index.arrow", "is damaged, or of no generation of this store")]


def verify_live(store: StoreView, snapshot: Snapshot) -> list[Problem]:
    """Compare the masks of live rows with the log; `snapshot` is the newest."""
    faults = live_faults(store.manifest, snapshot)
    return [Problem("live", where, what) for where, what in faults.items()]


def damaged_places(store: StoreView) -> dict[str, set[int]]:
    """Bucket -> rows that repairs gave up."""
    places: dict[str, set[int]] = {}
    for row in store.manifest.damaged(store.generation).to_pylist():
        places.setdefault(row["bucket"], set()).add(row["row"])
    return places


def _in_threads(
    what: str, look: Callable[[Any], list[Problem]], things: list[Any]
) -> list[Problem]:
    """Check in threads: while one computes, holding Python's lock, the others read the disk."""
    with ThreadPoolExecutor(THREADS) as pool:
        shown = progress_bar(pool.map(look, things), f"checking {what}", len(things), leave=False)
        return list(chain.from_iterable(shown))


def _table_fault(path: Path) -> str:
    try:
        return "" if is_whole(path) else "is damaged: its checksum is wrong"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _with_planned_images(store: StoreView, problem: Problem) -> Problem:
    """The problem with the images that were planned in its unit."""
    unit, shard = problem.unit, store.rows_per_shard
    assert unit is not None
    planned = store.manifest.planned(store.generation)
    inside = pc.and_(
        pc.equal(planned["bucket"], unit.bucket),
        pc.and_(
            pc.greater_equal(planned["row"], unit.shard * shard),
            pc.less(planned["row"], (unit.shard + 1) * shard),
        ),
    )
    keys = tuple(planned.filter(inside)["key"].to_pylist())
    what = f"{problem.what}; {len(keys)} images"
    return Problem(problem.kind, problem.where, what, keys, unit)
