"""Folds the log into a snapshot: one sorted table of a generation's live samples.

The reader maps it from `index.arrow`, which is derived and may be deleted at any time. It is
written only for a complete generation, which never changes again, so it is up to date exactly when
it has the newest generation's number.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.runtime.arrow import Ints, last_per_key, lookup
from xlsd_cache.runtime.arrow_files import map_table
from xlsd_cache.runtime.atomic import replacing, temporary_path
from xlsd_cache.runtime.bounded_files import JSON_BYTES, open_regular, parse_json, read_regular
from xlsd_cache.schema import MOST_ROWS, SAMPLES
from xlsd_cache.store.manifest import Manifest, ShardId, is_bucket
from xlsd_cache.store.view import StoreView

# Most rows of a record batch: its strings must stay below Arrow's 2 GiB. No batch holds rows of two
# buckets, so a bucket's numbers are contiguous up to here, and are mapped without a copy.
BATCH = 1 << 20
FEW = 1 << 16  # samples whose columns are read at once: opening many files takes longer than that
_BUCKET = 1 << 40  # step from one bucket's places to the next's

_OWN = SAMPLES.names[:-2]  # the columns from PLAN


@dataclass(frozen=True)
class Snapshot:
    """The live samples of one generation."""

    generation: int
    samples: pa.Table  # sorted by (bucket, row)
    ranges: dict[str, tuple[int, int]]  # bucket -> [start, stop) in samples
    pending: int  # planned but not committed: 0 when the generation is complete
    fingerprint: str  # sha256 of the log's files that it is made from


def make_snapshot(store: StoreView) -> Snapshot:
    """Fold the log up to the view's generation; an incomplete one has what is committed so far.

    First the line of the log is found that each sample's columns come from. Then the columns are
    gathered: of a large store one after another, so that at most one is in memory.
    """
    manifest, generation = store.manifest, store.generation
    plan, place, buckets = _planned(manifest, generation)
    units = _units(place, buckets, store.rows_per_shard) & manifest.committed()
    commit, encoded, crcs = _committed(manifest, units, place, buckets)
    pending = int((commit < 0).sum())
    plan, place, commit = plan[encoded], place[encoded], commit[encoded]

    starts = np.searchsorted(place, np.arange(len(buckets) + 1) * _BUCKET).tolist()
    spans = dict(zip(buckets, itertools.pairwise(starts), strict=True))
    ranges = {bucket: (start, stop) for bucket, (start, stop) in spans.items() if start < stop}
    gather = partial(_gather, ranges, manifest.staging)
    columns = dict[str, pa.ChunkedArray]()
    for names in [_OWN] if len(plan) < FEW else [[name] for name in _OWN]:
        lines = manifest.plan_lines(generation, names)
        columns |= {name: gather(lines[name], plan) for name in names}
        del lines
    hashes = manifest.commits(units, ["content_hash"])["content_hash"]
    columns["content_hash"] = gather(hashes, commit)
    columns["crc32c"] = gather(crcs, commit)
    del hashes
    for name in manifest.caption_columns(generation):
        texts, last = _captions(manifest, generation, name, columns["key"])
        if texts is not None:
            columns[name] = gather(texts, last)
    fingerprint = _fingerprint(manifest, generation, units)
    return Snapshot(generation, pa.table(columns), ranges, pending, fingerprint)


def save_snapshot(root: Path, snapshot: Snapshot) -> None:
    """Write `index.arrow` for the reader to map; does nothing where the store is read-only."""
    header = {
        "generation": snapshot.generation,
        "ranges": snapshot.ranges,
        "fingerprint": snapshot.fingerprint,
    }
    table = snapshot.samples.replace_schema_metadata({"xlsd": json.dumps(header)})
    try:
        with (
            replacing(root / "index.arrow", root / "staging") as temporary,
            pa.ipc.new_file(temporary, table.schema) as writer,
        ):
            writer.write_table(table)  # in the batches of the gathered columns
    except OSError:
        return


def cached_snapshot(root: Path, generation: int) -> Snapshot | None:
    """The snapshot in `index.arrow`, mapped; None if missing, damaged or of another generation."""
    try:
        table = map_table(root / "index.arrow", SAMPLES, pa.string())
        header: dict[str, Any] = parse_json(table.schema.metadata[b"xlsd"])
        if header["generation"] != generation:
            return None
        ranges = {bucket: (start, stop) for bucket, (start, stop) in header["ranges"].items()}
        _check_ranges(table, ranges)
        return Snapshot(generation, table, ranges, 0, str(header["fingerprint"]))
    except Exception:  # missing or damaged in any way: it is derived, and made again
        return None


def _check_ranges(table: pa.Table, ranges: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError where the ranges are not the table's buckets in their order."""
    ends = [0, *(stop for _, stop in ranges.values())]
    starts = [*(start for start, _ in ranges.values()), table.num_rows]
    if ends != starts or sorted(ends) != ends or not all(map(is_bucket, ranges)):
        raise ValueError("its ranges are not its buckets")
    rows = table["row"].to_numpy()
    if len(rows) and (rows.min() < 0 or rows.max() >= MOST_ROWS):
        raise ValueError("it has row numbers that no store has")
    falls = np.flatnonzero(np.diff(rows) <= 0) + 1
    if not np.isin(falls, starts).all():
        raise ValueError("its rows are not in order")


def _planned(manifest: Manifest, generation: int) -> tuple[Ints, Ints, list[str]]:
    """Plan lines of the live images with a place, ordered by place; the places; the buckets."""
    lines = manifest.plan_lines(generation, ["key", "bucket", "row"])
    buckets = sorted(pc.unique(lines["bucket"]).drop_null().to_pylist())
    last = last_per_key(lines, ["key"])
    place = _places(lines, buckets)[last]
    order = np.argsort(place, kind="stable")
    order = order[np.searchsorted(place[order], 0) :]  # those without a place sort first
    return last[order], place[order], buckets


def _units(place: Ints, buckets: list[str], rows_per_shard: int) -> set[ShardId]:
    """The shards that hold these places."""
    shards = np.unique(place // _BUCKET * _BUCKET + place % _BUCKET // rows_per_shard)
    return {ShardId(buckets[shard // _BUCKET], shard % _BUCKET) for shard in shards.tolist()}


def _committed(
    manifest: Manifest, units: set[ShardId], place: Ints, buckets: list[str]
) -> tuple[Ints, NDArray[np.bool_], pa.ChunkedArray]:
    """Each place's line in the commit records of `units`, or -1; whether it has a latent.

    Also the column of the latents' checksums, a value a line.
    """
    lines = manifest.commits(units, ["row", "status", "crc32c"])
    commit = lookup(pa.array(place), pa.array(_places(lines, buckets)))
    encoded = commit >= 0
    encoded[encoded] = pc.equal(lines["status"], "encoded").to_numpy()[commit[encoded]]
    return commit, encoded, lines["crc32c"]


def _places(lines: pa.Table, buckets: list[str]) -> Ints:
    """(bucket, row) as one number that sorts the same; negative without a place."""
    names = pa.array(buckets, pa.string())
    codes = pc.index_in(lines["bucket"], value_set=names).fill_null(0).to_numpy()
    rows: Ints = lines["row"].fill_null(-1).to_numpy()
    return np.where(rows < 0, -1, codes.astype(np.int64) * _BUCKET + rows)


def _captions(
    manifest: Manifest, generation: int, column: str, keys: pa.ChunkedArray
) -> tuple[pa.ChunkedArray | None, Ints]:
    """All texts of a caption column, and the position of each key's last one; -1 where empty.

    None in place of the texts where all of the last ones are empty.
    """
    keys_of_lines = manifest.caption_lines(generation, column, "key")
    last = last_per_key(pa.table({"key": keys_of_lines}), ["key"])
    key_of = pc.index_in(keys, value_set=keys_of_lines.take(last)).fill_null(len(last)).to_numpy()
    at = np.append(last, -1)[key_of]
    del keys_of_lines, key_of
    _give_back()
    texts = manifest.caption_lines(generation, column, "text")
    length = pc.binary_length(texts).to_numpy()
    at[length[at] == 0] = -1
    return (texts if length[last].any() else None), at


def _gather(
    ranges: dict[str, tuple[int, int]], staging: Path, column: pa.ChunkedArray, at: Ints
) -> pa.ChunkedArray:
    """The column's values at these positions, null at -1, in batches of one bucket each.

    More than one batch is written to a temporary file and mapped, so that the kernel can reclaim
    the memory; it stays in memory where the store is read-only.
    """
    chunks = [*column.chunks, pa.nulls(1, column.type)]
    starts = np.cumsum([0, *map(len, column.chunks)])
    at = np.where(at < 0, len(column), at)  # position of the null

    def batches() -> Iterator[pa.Array]:
        for start, stop in ranges.values():
            for i in range(start, stop, BATCH):
                yield _take(chunks, starts, at[i : min(i + BATCH, stop)])

    if len(at) > BATCH and not staging.is_symlink():
        _give_back()
        path = temporary_path(staging, "column")
        schema = pa.schema([("column", column.type)])
        try:
            with pa.ipc.new_file(path, schema) as writer:
                for batch in batches():
                    writer.write_batch(pa.record_batch([batch], schema))
                    _give_back()
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["column"]
        except OSError:
            pass
        finally:
            with suppress(OSError):  # Windows cannot remove a mapped file; `sweep` does so later
                path.unlink()
    return pa.chunked_array(batches(), column.type)


def _take(chunks: list[pa.Array], starts: Ints, at: Ints) -> pa.Array:
    """The values at these positions of the chunks that start at `starts`.

    Arrow's own take concatenates the chunks first, every time, and fails above 2 GiB.
    """
    chunk = np.searchsorted(starts, at, side="right") - 1
    order = np.argsort(chunk, kind="stable")
    ends = np.searchsorted(chunk[order], np.arange(len(chunks) + 1))
    pieces = [
        chunks[i].take(pa.array(at[order[begin:end]] - starts[i]))
        for i, (begin, end) in enumerate(itertools.pairwise(ends.tolist()))
        if begin < end
    ]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_arrays(pieces).take(pa.array(back))


def _give_back() -> None:
    """Return freed memory: Arrow's allocator would keep gigabytes for later."""
    pa.default_memory_pool().release_unused()


def _fingerprint(manifest: Manifest, generation: int, committed: set[ShardId]) -> str:
    """sha256 over names and bytes of all files of the log that the snapshot is made from."""
    digest = hashlib.sha256(read_regular(manifest.root / "latents.zarr" / "zarr.json", JSON_BYTES))
    for name in manifest.files(generation) + [unit.record for unit in sorted(committed)]:
        digest.update(name.encode())
        with open_regular(f"{manifest.root}/{name}", buffered=False) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
