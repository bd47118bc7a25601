"""The log folded into one sorted table a generation: what the reader maps instead of parsing.

`index.arrow` is derived and may be deleted at any time. It is only written for a complete
generation, which never changes again, so it is fresh exactly when its number is the newest.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.durable import replacing
from xlsd_cache.manifest import Manifest, Unit


@dataclass(frozen=True)
class View:
    """The live samples of one generation."""

    generation: int
    samples: pa.Table  # sorted by (bucket, row)
    ranges: dict[str, tuple[int, int]]  # bucket -> [start, stop) in samples
    pending: int  # planned but not committed: 0 when the generation is complete
    fingerprint: str  # sha256 of the log's files that made it


def make_view(manifest: Manifest, generation: int, rows_per_shard: int) -> View:
    """Fold the log up to a generation. An incomplete one holds what is committed so far."""
    plan = manifest.live(generation)
    plan = plan.filter(pc.greater_equal(plan["row"], 0))
    shards = (plan["row"].to_numpy() // rows_per_shard).tolist()
    units = set(map(Unit, plan["bucket"].to_pylist(), shards))
    committed = units & manifest.committed()
    commits = manifest.commits(committed)
    place = _match(plan, commits)
    encoded = commits["status"].to_numpy(zero_copy_only=False) == "encoded"
    live = place >= 0
    live[live] = encoded[place[live]]
    samples = plan.filter(pa.array(live)).drop_columns(
        ["content_hash", "reason", "detail", "size", "mtime_ns"]
    )
    found = commits.take(place[live])
    samples = samples.append_column("content_hash", found["content_hash"])
    samples = samples.append_column("crc32c", found["crc32c"])
    samples = samples.sort_by([("bucket", "ascending"), ("row", "ascending")])
    captions = manifest.captions(generation)
    for column in sorted(pc.unique(captions["column"]).to_pylist()):
        texts = captions.filter(pc.equal(captions["column"], column))
        at = pc.index_in(samples["key"], value_set=texts["key"])
        samples = samples.append_column(column, texts["text"].take(at))
    pending = int((place < 0).sum())
    fingerprint = _fingerprint(manifest, generation, committed)
    return View(generation, samples, _ranges(samples), pending, fingerprint)


def save_view(root: Path, view: View) -> None:
    """Write `index.arrow` for the reader to map; skipped where the store is not writable."""
    told = {
        "generation": view.generation,
        "ranges": view.ranges,
        "fingerprint": view.fingerprint,
    }
    table = view.samples.replace_schema_metadata({"xlsd": json.dumps(told)})
    try:
        with (
            replacing(root / "index.arrow", root / "staging") as temporary,
            pa.ipc.new_file(temporary, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=65536)
    except OSError:
        return


def cached_view(root: Path, generation: int) -> View | None:
    """The view in `index.arrow`, mapped, if it is there, whole, and of this generation."""
    try:
        source = pa.memory_map(str(root / "index.arrow"))
        table = pa.ipc.open_file(source).read_all()
        told: dict[str, Any] = json.loads(table.schema.metadata[b"xlsd"])
        if told["generation"] != generation:
            return None
        ranges = {bucket: (start, stop) for bucket, (start, stop) in told["ranges"].items()}
        return View(generation, table, ranges, 0, told["fingerprint"])
    except Exception:  # absent, or damaged in whatever way: it is derived, and made anew
        return None


def _match(plan: pa.Table, commits: pa.Table) -> NDArray[np.int64]:
    """For each planned row its row in `commits` by (bucket, row), or -1."""
    names = pc.unique(plan["bucket"])

    def place(table: pa.Table) -> NDArray[np.int64]:
        buckets = pc.index_in(table["bucket"], value_set=names).to_numpy().astype(np.int64)
        places: NDArray[np.int64] = (buckets << 40) + table["row"].to_numpy()
        return places

    wanted, have = place(plan), place(commits)
    order = np.argsort(have)
    at = np.searchsorted(have, wanted, sorter=order)
    found = np.full(len(wanted), -1, np.int64)
    inside = at < len(have)
    candidates = order[at[inside]]
    found[inside] = np.where(have[candidates] == wanted[inside], candidates, -1)
    return found


def _ranges(samples: pa.Table) -> dict[str, tuple[int, int]]:
    counts = samples["bucket"].value_counts().to_pylist() if samples.num_rows else []
    ranges, start = {}, 0
    for count in sorted(counts, key=lambda count: count["values"]):
        ranges[count["values"]] = (start, start + count["counts"])
        start += count["counts"]
    return ranges


def _fingerprint(manifest: Manifest, generation: int, committed: set[Unit]) -> str:
    """sha256 over the names and bytes of every file of the log that the view was made from."""
    digest = hashlib.sha256((manifest.root / "latents.zarr" / "zarr.json").read_bytes())
    paths = manifest.files(generation) + [manifest.commit(unit) for unit in sorted(committed)]
    for path in paths:
        digest.update(path.relative_to(manifest.root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
