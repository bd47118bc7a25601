"""What is wrong with a store: every file of it read and compared with what the log promises."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from xlsd_cache.integrity.shard_check import Kind, Problem, planned_rows, verify_shard
from xlsd_cache.runtime.atomic import is_whole
from xlsd_cache.store.index import Snapshot, cached_snapshot, make_snapshot
from xlsd_cache.store.live_rows import live_faults, live_files
from xlsd_cache.store.manifest import Unit
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_metadata import array_fault

THREADS = min(8, os.cpu_count() or 1)


def verify(store: StoreView) -> list[Problem]:
    """Everything that is wrong with the files of the log, the arrays, and the committed shards.

    The index and the sums are others' part: they need a log without a fault. Where a plan is
    damaged, it is not known where things should be, and a shard is held to its commit record alone.
    """
    log = verify_log(store)
    planned = not any(problem.kind == "plan" for problem in log)
    places = verify_places(store) if planned else []
    given_up = damaged_places(store) if planned else {}
    unreadable = {problem.unit for problem in log}

    def look(unit: Unit) -> list[Problem]:
        return verify_shard(store, unit, given_up.get(unit.bucket, set()))

    units = [unit for unit in sorted(store.manifest.committed()) if unit not in unreadable]
    return log + places + _in_threads("shards", look, units)


def verify_log(store: StoreView) -> list[Problem]:
    """Compare every file of the log with its own checksum."""
    manifest = store.manifest

    def look(path: Path) -> list[Problem]:
        fault = _table_fault(path)
        kind: Kind = "captions" if path.parent.name == "captions" else "plan"
        return [Problem(kind, store.relative(path), fault)] if fault else []

    def look_at_commit(unit: Unit) -> list[Problem]:
        path = manifest.commit(unit)
        fault = _table_fault(path)
        return [Problem("commit", store.relative(path), fault, unit=unit)] if fault else []

    gaps = set(range(store.generation)) - set(manifest.generations())
    missing = [
        Problem("plan", f"manifest/plan/{number:06d}.parquet", "is missing")
        for number in sorted(gaps)
    ]
    files = _in_threads("the log", look, manifest.files(store.generation))
    commits = _in_threads("commit records", look_at_commit, sorted(manifest.committed()))
    if files or missing or not commits:
        return missing + files + commits
    return [_with_planned_images(store, problem) for problem in commits]


def verify_places(store: StoreView) -> list[Problem]:
    """The arrays' zarr.json, commit records without a plan or the reverse, and stray files."""
    manifest, shard = store.manifest, store.rows_per_shard
    problems = []
    folder = manifest.root / "latents.zarr"
    expected = {folder / "zarr.json", *live_files(manifest)}
    planned: set[Unit] = set()
    for bucket, rows in planned_rows(store).items():
        fault = array_fault(store, bucket, int(rows[-1]) + 1)
        path = manifest.array(bucket) / "zarr.json"
        problems += [Problem("array", store.relative(path), fault)] if fault else []
        expected.add(path)
        units = {Unit(bucket, number) for number in np.unique(rows // shard).tolist()}
        planned |= units
        expected |= {manifest.shard(unit) for unit in units}
    committed = manifest.committed()
    for unit in sorted(planned - committed):
        journal = manifest.staging / f"{unit.name}.jnl"  # a build at work, or killed in the middle
        if manifest.shard(unit).exists() and not journal.exists():
            where = store.relative(manifest.commit(unit))
            lost = Problem("commit", where, "is missing, its shard is there", unit=unit)
            problems.append(_with_planned_images(store, lost))
    for unit in sorted(committed - planned):
        where = store.relative(manifest.commit(unit))
        problems.append(Problem("plan", where, "was never planned: a plan file is missing"))
    there = (path for path in folder.rglob("*") if not path.is_dir())
    strays = sorted(path for path in there if path not in expected)
    return problems + [Problem("stray", store.relative(path), "is none of ours") for path in strays]


def verify_index(store: StoreView, snapshot: Snapshot) -> list[Problem]:
    """Whether index.arrow, if there is one, holds what the log says; `snapshot` is the newest."""
    root = store.manifest.root
    if not (root / "index.arrow").exists():
        return []
    for generation in reversed(store.manifest.generations()):
        cached = cached_snapshot(root, generation)
        if cached is None:
            continue
        try:
            cached.samples.validate(full=True)
        except Exception:  # pyarrow raises whatever damaged bytes make it stumble over
            break
        if generation != store.generation:  # a newer one is planned: right until that is encoded
            snapshot = make_snapshot(replace(store, generation=generation))
        if cached.samples.equals(snapshot.samples) and cached.ranges == snapshot.ranges:
            if cached.fingerprint == snapshot.fingerprint:
                return []
            told = "was made of a log with other bytes, though both say the same of every image"
        else:
            told = "is stale or damaged"
        return [Problem("index", "index.arrow", told)]
    return [Problem("index", "index.arrow", "is damaged, or of no generation of this store")]


def verify_live(store: StoreView, snapshot: Snapshot) -> list[Problem]:
    """Whether plain zarr readers are told what is live; `snapshot` is the newest."""
    faults = live_faults(store.manifest, snapshot)
    return [Problem("live", where, what) for where, what in faults.items()]


def damaged_places(store: StoreView) -> dict[str, set[int]]:
    """Bucket -> rows that repairs have given up."""
    places: dict[str, set[int]] = {}
    for row in store.manifest.damaged(store.generation).to_pylist():
        places.setdefault(row["bucket"], set()).add(row["row"])
    return places


def _in_threads(
    what: str, look: Callable[[Any], list[Problem]], things: list[Any]
) -> list[Problem]:
    """In threads: while one sums, which holds Python's lock, the others wait for the disk."""
    with ThreadPoolExecutor(THREADS) as pool:
        shown = tqdm(pool.map(look, things), f"checking {what}", len(things), leave=False)
        return list(chain.from_iterable(shown))


def _table_fault(path: Path) -> str:
    try:
        return "" if is_whole(path) else "is damaged: its checksum is wrong"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _with_planned_images(store: StoreView, problem: Problem) -> Problem:
    """The same problem with the images that were planned in its unit."""
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
