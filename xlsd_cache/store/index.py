"""The log folded into one sorted table a generation: what the reader maps instead of parsing.

`index.arrow` is derived and may be deleted at any time. It is only written for a complete
generation, which never changes again, so it is fresh exactly when its number is the newest.
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
from xlsd_cache.store.manifest import Manifest, Unit, is_bucket
from xlsd_cache.store.view import StoreView

# Rows of a record batch, at most: its texts must stay below Arrow's 2 GiB. No batch holds rows of
# two buckets, so a bucket's numbers lie in one piece up to here, and are mapped and not copied.
BATCH = 1 << 20
_BUCKET = 1 << 40  # by how much two neighbouring buckets' places differ

_OWN = SAMPLES.names[:-2]  # the columns that are the plan's


@dataclass(frozen=True)
class Snapshot:
    """The live samples of one generation."""

    generation: int
    samples: pa.Table  # sorted by (bucket, row)
    ranges: dict[str, tuple[int, int]]  # bucket -> [start, stop) in samples
    pending: int  # planned but not committed: 0 when the generation is complete
    fingerprint: str  # sha256 of the log's files that made it


def make_snapshot(store: StoreView) -> Snapshot:
    """Fold the log up to the view's generation; an incomplete one has what is committed so far.

    Numbers come first: which line of the log each sample's columns are from. Then one column after
    another is gathered, so that of a large store no more than one is ever held in memory.
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
    columns = {name: gather(manifest.plan_lines(generation, [name])[name], plan) for name in _OWN}
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
    """Write `index.arrow` for the reader to map; skipped where the store is not writable."""
    told = {
        "generation": snapshot.generation,
        "ranges": snapshot.ranges,
        "fingerprint": snapshot.fingerprint,
    }
    table = snapshot.samples.replace_schema_metadata({"xlsd": json.dumps(told)})
    try:
        with (
            replacing(root / "index.arrow", root / "staging") as temporary,
            pa.ipc.new_file(temporary, table.schema) as writer,
        ):
            writer.write_table(table)  # in the batches in which it was gathered
    except OSError:
        return


def cached_snapshot(root: Path, generation: int) -> Snapshot | None:
    """The view in `index.arrow`, mapped, if it is there, whole, and of this generation."""
    try:
        table = map_table(root / "index.arrow", SAMPLES, pa.string())
        told: dict[str, Any] = parse_json(table.schema.metadata[b"xlsd"])
        if told["generation"] != generation:
            return None
        ranges = {bucket: (start, stop) for bucket, (start, stop) in told["ranges"].items()}
        _check_ranges(table, ranges)
        return Snapshot(generation, table, ranges, 0, str(told["fingerprint"]))
    except Exception:  # absent, or damaged in whatever way: it is derived, and made anew
        return None


def _check_ranges(table: pa.Table, ranges: dict[str, tuple[int, int]]) -> None:
    """Raises ValueError where the ranges are not the table's buckets, one after the other."""
    ends = [0, *(stop for _, stop in ranges.values())]
    starts = [*(start for start, _ in ranges.values()), table.num_rows]
    if ends != starts or sorted(ends) != ends or not all(map(is_bucket, ranges)):
        raise ValueError("its buckets are not where it says")
    rows = table["row"].to_numpy()
    if len(rows) and (rows.min() < 0 or rows.max() >= MOST_ROWS):
        raise ValueError("its rows are no rows of a store")
    falls = np.flatnonzero(np.diff(rows) <= 0) + 1
    if not np.isin(falls, starts).all():
        raise ValueError("its rows are not in order")


def _planned(manifest: Manifest, generation: int) -> tuple[Ints, Ints, list[str]]:
    """The lines of the plan that give an image a place, by place; the places; the buckets."""
    lines = manifest.plan_lines(generation, ["key", "bucket", "row"])
    buckets = sorted(pc.unique(lines["bucket"]).drop_null().to_pylist())
    last = last_per_key(lines, ["key"])
    place = _places(lines, buckets)[last]
    order = np.argsort(place, kind="stable")
    order = order[np.searchsorted(place[order], 0) :]  # those without a place come first
    return last[order], place[order], buckets


def _units(place: Ints, buckets: list[str], rows_per_shard: int) -> set[Unit]:
    """The shards in which these places are."""
    shards = np.unique(place // _BUCKET * _BUCKET + place % _BUCKET // rows_per_shard)
    return {Unit(buckets[shard // _BUCKET], shard % _BUCKET) for shard in shards.tolist()}


def _committed(
    manifest: Manifest, units: set[Unit], place: Ints, buckets: list[str]
) -> tuple[Ints, NDArray[np.bool_], pa.ChunkedArray]:
    """Of each place its line in the commit records of `units`, or -1; whether there is a latent.

    And of every line the latent's checksum.
    """
    lines = manifest.commits(units, ["row", "status", "crc32c"])
    commit = lookup(pa.array(place), pa.array(_places(lines, buckets)))
    encoded = commit >= 0
    encoded[encoded] = pc.equal(lines["status"], "encoded").to_numpy()[commit[encoded]]
    return commit, encoded, lines["crc32c"]


def _places(lines: pa.Table, buckets: list[str]) -> Ints:
    """(bucket, row) as one number each, which sorts as they do; negative without a place."""
    names = pa.array(buckets, pa.string())
    codes = pc.index_in(lines["bucket"], value_set=names).fill_null(0).to_numpy()
    rows: Ints = lines["row"].fill_null(-1).to_numpy()
    return np.where(rows < 0, -1, codes.astype(np.int64) * _BUCKET + rows)


def _captions(
    manifest: Manifest, generation: int, column: str, keys: pa.ChunkedArray
) -> tuple[pa.ChunkedArray | None, Ints]:
    """All texts of a caption column, and which is the last said of each key; -1 where empty.

    None where every text was taken back.
    """
    said_of = manifest.caption_lines(generation, column, "key")
    last = last_per_key(pa.table({"key": said_of}), ["key"])
    found = pc.index_in(keys, value_set=said_of.take(last)).fill_null(len(last)).to_numpy()
    at = np.append(last, -1)[found]
    del said_of, found
    _give_back()
    texts = manifest.caption_lines(generation, column, "text")
    length = pc.binary_length(texts).to_numpy()
    at[length[at] == 0] = -1
    return (texts if length[last].any() else None), at


def _gather(
    ranges: dict[str, tuple[int, int]], staging: Path, column: pa.ChunkedArray, at: Ints
) -> pa.ChunkedArray:
    """The column at these places, null at -1, in batches of one bucket.

    More than one batch's worth is laid aside in a temporary file and mapped: memory that the
    kernel may take back. It stays in memory where the store is not writable.
    """
    chunks = [*column.chunks, pa.nulls(1, column.type)]
    starts = np.cumsum([0, *map(len, column.chunks)])
    at = np.where(at < 0, len(column), at)  # where the null is

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
            with suppress(OSError):  # Windows keeps a mapped file, and `sweep` removes it later
                path.unlink()
    return pa.chunked_array(batches(), column.type)


def _take(chunks: list[pa.Array], starts: Ints, at: Ints) -> pa.Array:
    """What is at these places of the chunks that start at `starts`.

    Arrow's own take would join the chunks first, every time, and fail where they pass 2 GiB.
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
    """Arrow's allocator keeps what was freed for later, which of a large store is gigabytes."""
    pa.default_memory_pool().release_unused()


def _fingerprint(manifest: Manifest, generation: int, committed: set[Unit]) -> str:
    """sha256 over the names and bytes of every file of the log that the view was made from."""
    digest = hashlib.sha256(read_regular(manifest.root / "latents.zarr" / "zarr.json", JSON_BYTES))
    paths = manifest.files(generation) + [manifest.commit(unit) for unit in sorted(committed)]
    for path in paths:
        digest.update(path.relative_to(manifest.root).as_posix().encode())
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
