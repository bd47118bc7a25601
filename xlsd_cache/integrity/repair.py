"""`check --repair`: rebuilds what checksums prove, and plans lost latents again.

A latent is good if it has the checksum in its shard's commit record; good ones are always kept.
Damaged ones are listed in `manifest/damaged` and never used again. Their images get new rows after
their bucket's last shard, which the next build encodes. Every step is a rename, and the new
generation appears with the last one: after a kill, the same command continues.
"""

import hashlib
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from xlsd_cache.files.uri import read_source, stat_source
from xlsd_cache.integrity.shard_check import Problem, planned_rows, verify_shard
from xlsd_cache.integrity.verify import damaged_places
from xlsd_cache.planning.generation import write_generation
from xlsd_cache.planning.log_state import is_committed, next_free_rows
from xlsd_cache.runtime.arrow import lookup_rows
from xlsd_cache.runtime.atomic import fsync_folder, write_bytes
from xlsd_cache.schema import CAPTIONS, COMMIT, DAMAGED, PLACE, PLAN, PlanEntry
from xlsd_cache.store.commit import lock_path, planning, write_commit
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.shard import CRC_NBYTES, CorruptShard, ShardRow, index_of
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_files import write_array, write_live


@dataclass
class Repaired:
    """What a repair did, and what is left."""

    done: list[str] = field(default_factory=list)  # a sentence each
    to_encode: list[str] = field(default_factory=list)  # keys, for the next build
    gone: list[str] = field(default_factory=list)  # keys that leave training: the image is gone too
    left: list[Problem] = field(default_factory=list)  # what cannot be repaired


def repair(store: StoreView, problems: list[Problem]) -> Repaired:
    """Repair these problems under the plan lock. Raises OSError."""
    result = Repaired(left=[problem for problem in problems if problem.kind == "plan"])
    if result.left:
        return result  # without the plan, nothing else can be judged
    manifest = store.manifest
    manifest.make_folders()
    with planning(manifest):
        store = replace(store, generation=manifest.generations()[-1])
        places = [(p.unit, p.rows) for p in problems if p.kind == "latents" and p.unit]
        lost: set[tuple[str, int]] = {(unit.bucket, row) for unit, rows in places for row in rows}
        for problem in problems:
            lost |= _repair_one(store, problem, result)
        _plan_again(store, lost, result)
        if result.done or result.to_encode or result.gone:
            (manifest.root / "index.arrow").unlink(missing_ok=True)  # derived from the log before
    write_live(store)
    return result


def _repair_one(store: StoreView, problem: Problem, result: Repaired) -> set[tuple[str, int]]:
    """Repair one problem; returns the places whose latents are lost."""
    manifest, path = store.manifest, store.manifest.root / problem.where
    done, lost = "", set[tuple[str, int]]()
    if problem.kind == "index":
        done = "deleted: it is rebuilt when needed"
    elif problem.kind == "live":
        done = "rebuilt"  # by `repair`, at the end
    elif problem.kind == "array":
        bucket = path.parent.name
        write_array(store, bucket, int(planned_rows(store)[bucket][-1]) + 1)
        done = "rebuilt"
    elif problem.kind == "stray":
        aside = manifest.root / "stray" / path.relative_to(manifest.root)
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside = _unused(aside)
        path.replace(aside)
        done = f"moved to {store.relative(aside)}"
    elif problem.kind == "captions":
        done = f"renamed to {_set_aside(path)}: build, or import the captions, again"
    elif problem.kind == "commit" and problem.unit:
        done, lost = _rebuild_commit(store, problem.unit)
    elif problem.kind == "shard" and problem.unit:
        done, lost = _rebuild_shard(store, problem.unit)
    if done:
        result.done.append(f"{problem.where} {done}")
    return lost


def _rebuild_commit(store: StoreView, unit: ShardId) -> tuple[str, set[tuple[str, int]]]:
    """Rebuild a lost commit record from the shard's rows whose checksums are right.

    Without the shard, nothing is committed and the next build writes both.
    """
    manifest, shard = store.manifest, store.rows_per_shard
    lock = FileLock(lock_path(manifest, unit), blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:  # a build is writing it
        return "", set()
    try:
        latent = np.empty(store.identity.shape(unit.bucket), store.identity.dtype)
        flat = latent.reshape(-1).view(np.uint8)
        entries = _planned(store, unit)
        try:
            reader = store.open_shard(unit)
        except (CorruptShard, OSError):
            aside = manifest.commit(unit).exists() and _set_aside(manifest.commit(unit))
            return f"renamed to {aside}: its shard is lost too" if aside else "", set()
        rows = {}
        for slot, entry in entries.items():
            try:
                reader.read_into(slot, flat)
                rows[slot] = ShardRow(slot, _content_hash(entry), google_crc32c.value(flat))
            except CorruptShard:
                detail = "what became of it was lost with the shard's commit record"
                rows[slot] = ShardRow(slot, "", reason="lost", detail=detail)
        reader.close()
        write_commit(store, unit, entries, rows)
    finally:
        lock.release()
    held = sum(row.crc32c is not None for row in rows.values())
    lost = {(unit.bucket, unit.shard * shard + s) for s, row in rows.items() if row.reason}
    return f"rebuilt: {held} of {len(rows)} latents are in the shard and right", lost


def _rebuild_shard(store: StoreView, unit: ShardId) -> tuple[str, set[tuple[str, int]]]:
    """Rebuild a shard file, with its index, from the records that are right.

    A record belongs to the row that was committed with its checksum.
    """
    manifest, shard = store.manifest, store.rows_per_shard
    given_up = damaged_places(store).get(unit.bucket, set())
    if not verify_shard(store, unit, given_up):  # repaired meanwhile
        return "", set()
    commit = pq.read_table(manifest.commit(unit), schema=COMMIT)
    commit = commit.filter(pc.equal(commit["status"], "encoded"))
    wanted: dict[int, list[int]] = {}  # crc32c -> slots; equal latents have equal ones
    for latent in commit.select(["crc32c", "row"]).to_pylist():
        wanted.setdefault(latent["crc32c"], []).append(latent["row"] % shard)
    nbytes = store.identity.nbytes(unit.bucket)
    try:
        data = memoryview(manifest.shard(unit).read_bytes())
    except FileNotFoundError:
        data = memoryview(b"")
    records: dict[int, memoryview] = {}  # slot -> record, in the order of the file
    for offset in range(0, len(data) - nbytes - CRC_NBYTES + 1, nbytes + CRC_NBYTES):
        record = data[offset : offset + nbytes + CRC_NBYTES]
        crc = int.from_bytes(record[-CRC_NBYTES:], "little")
        if wanted.get(crc) and google_crc32c.value(bytes(record[:-CRC_NBYTES])) == crc:
            records[wanted[crc].pop(0)] = record
    if records:
        content = b"".join(records.values()) + index_of(list(records), shard, nbytes)
        write_bytes(manifest.shard(unit), content, manifest.staging)
    again = verify_shard(store, unit, given_up)
    lost = {(unit.bucket, row) for problem in again for row in problem.rows}
    done = f"rebuilt: {len(records)} of {commit.num_rows} latents are right" if records else ""
    return done, lost


def _plan_again(store: StoreView, lost: set[tuple[str, int]], result: Repaired) -> None:
    """Give the images of lost latents new rows; images that are gone leave the store.

    Shards that were never committed are encoded by the next build in any case; only images that
    are gone are removed from them, so that training does not wait for them.
    """
    manifest, shard = store.manifest, store.rows_per_shard
    next_rows = next_free_rows(manifest.planned(store.generation), shard)
    live = manifest.live(store.generation)
    entries: list[PlanEntry] = []
    fresh: dict[tuple[str, int], int] = {}
    for entry in live.take(_at_risk(store, live, lost)).to_pylist():
        place = entry["bucket"], entry["row"]
        if not _is_there(entry):
            detail = "its latent was lost, and its image is not there to be encoded again"
            entry |= {"bucket": "", "row": -1, "reason": "vanished", "detail": detail}
            result.gone.append(entry["key"])
        elif place in lost:
            if place not in fresh:
                fresh[place] = next_rows[place[0]]
                next_rows[place[0]] += 1
            entry["row"] = fresh[place]
            result.to_encode.append(entry["key"])
        else:
            continue
        entries.append(entry)
    if not (entries or lost):
        return
    write_generation(
        store,
        pa.Table.from_pylist(entries, PLAN),
        [],
        CAPTIONS.empty_table(),
        _places(lost),
    )


def _at_risk(store: StoreView, live: pa.Table, lost: set[tuple[str, int]]) -> NDArray[np.int64]:
    """Positions of live entries that are lost or in no committed shard, ordered by place."""
    is_safe = is_committed(store.manifest, live, store.rows_per_shard)
    is_lost = lookup_rows(live, _places(lost), PLACE) >= 0
    rows = live["row"].to_numpy()
    at = np.flatnonzero((rows >= 0) & (is_lost | ~np.asarray(is_safe)))
    buckets = live["bucket"].combine_chunks().dictionary_encode().indices.to_numpy()
    return at[np.lexsort([rows[at], buckets[at]])]


def _places(lost: set[tuple[str, int]]) -> pa.Table:
    """DAMAGED of these (bucket, row), sorted."""
    return pa.Table.from_pylist([dict(zip(PLACE, it, strict=True)) for it in sorted(lost)], DAMAGED)


def _planned(store: StoreView, unit: ShardId) -> dict[int, PlanEntry]:
    """The last planned entry of each slot of a unit."""
    shard = store.rows_per_shard
    planned = store.manifest.planned(store.generation)
    inside = pc.and_(
        pc.equal(planned["bucket"], unit.bucket),
        pc.equal(pc.divide(planned["row"], shard), unit.shard),
    )
    return {entry["row"] % shard: entry for entry in planned.filter(inside).to_pylist()}


def _content_hash(entry: PlanEntry) -> str:
    """sha256 of the planned image, read where the log lacks it; empty where it changed."""
    if entry["content_hash"]:
        return str(entry["content_hash"])
    try:
        now = stat_source(entry["source"])._asdict()
        logged: dict[str, Any] = {**entry}
        same = all(logged[name] in (now[name], None) for name in now)  # older logs lack some
        return hashlib.sha256(read_source(entry["source"])).hexdigest() if same else ""
    except OSError:
        return ""


def _is_there(entry: PlanEntry) -> bool:
    try:
        stat_source(entry["source"])
    except OSError:
        return False
    return True


def _set_aside(path: Path) -> str:
    """Rename a damaged file out of the way; returns its new name."""
    aside = _unused(path.with_name(f"{path.name}.damaged"))
    path.replace(aside)
    fsync_folder(path.parent)
    return aside.name


def _unused(path: Path) -> Path:
    """The path, with a number appended where it exists."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(it for it in (path, *itertools.islice(numbered, 999)) if not it.exists())
