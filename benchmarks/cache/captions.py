"""Time of planning and of captions with a million images in the log, and of scanning real files.

    python benchmarks/cache/captions.py

The store has a real log and no shards: neither planning nor captions read latents.
"""

import gzip
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.lib.commands import run_command
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.errors import UserError
from xlsd_cache.images.buckets import Buckets
from xlsd_cache.integrity.accounting import account
from xlsd_cache.planning.log_state import read_log_state
from xlsd_cache.planning.plan import make_plan, refuse_lost_sources
from xlsd_cache.planning.probe import read_headers
from xlsd_cache.schema import CAPTIONS, COMMIT, IMAGES
from xlsd_cache.sources.scan import scan
from xlsd_cache.store.identity import Identity, attributes_of
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_files import write_group

ROWS_PER_SHARD = 4096
BUCKET = "512x512"
IDENTITY = Identity(
    vae_name="none", vae_source="none", vae_class="none", vae_sha256="0" * 64,
    scaling_factor=0.13025, shift_factor=0.0, channels=4, dtype="float16", precision="fp32",
    preprocessing=1, resolution=512, buckets="aspect", max_ratio=4.0, upscale=False,
)  # fmt: skip


@dataclass(frozen=True)
class CaptionsBenchmarkConfig(JsonOption):
    """Measure planning, captions and scanning."""

    rows: int = 1_000_000
    """Images in the store's log."""

    files: int = 20_000
    """Real images, each with a .txt, that are scanned and whose headers are read."""

    workers: int = 4
    """Threads, as in xlsd-cache build."""


def main(config: CaptionsBenchmarkConfig, command: Sequence[str]) -> None:
    """Print one table; the memory is the peak of this process so far."""
    libraries = machine("pyarrow", "numpy", "pillow")
    report = Report("benchmarks/cache/captions.py", command, libraries)
    print(f"{'':38}{'items':>12}{'s':>9}{'CPU s':>9}{'items/s':>12}{'peak GiB':>10}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure_log(config, folder, report)
        measure_files(config, folder / "images", report)
    report.write(config.json)


@contextmanager
def timed(report: Report, what: str, items: int) -> Iterator[None]:
    """Time the block as one row of the table."""
    begun, cpu = time.perf_counter(), time.process_time()
    yield
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"what": what, "items": items, "seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak}
    report.add("work", **row)
    print(
        f"{what:38}{items:>12,}{seconds:>9.2f}{cpu:>9.2f}{items / seconds:>12,.0f}{peak:>10.2f}",
        flush=True,
    )


def measure_log(config: CaptionsBenchmarkConfig, folder: Path, report: Report) -> None:
    """Time what `build` and `captions` do with a log of `rows` images."""
    n, store = config.rows, folder / "latents"
    images, captions = make_images(n), make_captions(n)
    manifest = Manifest(store)
    manifest.make_folders()
    write_group(manifest, attributes_of(IDENTITY, ROWS_PER_SHARD))
    buckets = Buckets.make("square", 512, 4.0, upscale=False)
    with timed(report, "first plan, headers known", n):
        journal_headers(manifest.staging, images)
        empty = read_log_state(manifest, ROWS_PER_SHARD)
        plan = make_plan(images, captions, ("txt",), empty, buckets, 1, manifest.staging)
    manifest.write_plan(0, plan.entries, plan.removed, plan.captions)
    (manifest.staging / "headers.planning").unlink()
    commit(manifest, plan.entries)
    del plan
    with timed(report, "no-change rebuild: reading the log", n):
        known = read_log_state(manifest, ROWS_PER_SHARD)
    with timed(report, "no-change rebuild: planning", n):
        plan = make_plan(images, captions, ("txt",), known, buckets, 1)
        refuse_lost_sources(plan, known, {"images"}, set())
    if not plan.is_empty:
        raise UserError("the plan of an unchanged source is not empty")
    del known, plan
    with timed(report, "no-change rebuild: accounting", n):
        account(StoreView(manifest, IDENTITY, ROWS_PER_SHARD, 0))
    keys = images["key"].to_pylist()
    bare = [key.removeprefix("images/").removesuffix(".jpg") for key in keys]
    texts = [f"another caption of {key}, woman, solo, outdoors" for key in bare]
    pq.write_table(pa.table({"key": bare, "caption": texts}), folder / "table.parquet")
    with gzip.open(folder / "table.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(
            json.dumps({"key": k, "wd": [t]}) + "\n" for k, t in zip(bare, texts, strict=True)
        )
    del images, captions, keys, bare, texts
    for what, source, column in (
        ("captions added from parquet", "table.parquet", "parquet:caption"),
        ("captions unchanged, from parquet", "table.parquet", "parquet:caption"),
        ("captions added from .jsonl.gz", "table.jsonl.gz", "jsonl:wd"),
    ):
        with timed(report, what, n):
            options = ("--from", folder / source, "--columns", column)
            run_command(xlsd_cache, "captions", store, *options)


def make_images(n: int) -> pa.Table:
    """The table that a scan of n images in one img2dataset tree returns."""
    relative = [f"{i // 10000:05d}/{i:09d}" for i in range(n)]
    rng = np.random.default_rng(0)
    columns = [
        pa.array([f"images/{name}.jpg" for name in relative]),
        pa.array([f"/data/images/{name}.jpg" for name in relative]),
        pa.array(rng.integers(20_000, 200_000, n)),
        *(pa.array(rng.integers(1 << 60, 1 << 61, n)) for _ in range(3)),
        pa.nulls(n, pa.string()),
        *(pa.repeat("", n) for _ in range(2)),
    ]
    return pa.Table.from_arrays(columns, schema=IMAGES)


def make_captions(n: int) -> pa.Table:
    """A caption of about 100 bytes for each of these images."""
    keys = pa.array([f"images/{i // 10000:05d}/{i:09d}.jpg" for i in range(n)])
    tags = "woman, solo, smiling, outdoors, standing, looking at viewer, tree, brown hair, day"
    texts = pa.array([f"{tags}, {i}" for i in range(n)])
    return pa.table([keys, pa.repeat("txt", n), texts], schema=CAPTIONS)


def journal_headers(staging: Path, images: pa.Table) -> None:
    """Write the journal of headers that an interrupted planning leaves."""
    rows = images.select(["key", "size", "mtime_ns", "inode", "ctime_ns"]).to_pylist()
    with (staging / "headers.planning").open("w") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps([*row.values(), 640, 640, "", "", f"{i:016x}"]) + "\n")


def commit(manifest: Manifest, entries: pa.Table) -> None:
    """Write a commit record per shard, as if all images had been encoded."""
    entries = entries.sort_by("row")
    for start in range(0, entries.num_rows, ROWS_PER_SHARD):
        part = entries.slice(start, ROWS_PER_SHARD)
        n = part.num_rows
        hashes = pa.array([f"{i:064x}" for i in range(start, start + n)])
        empty, status = pa.repeat("", n), pa.repeat("encoded", n)
        crc = pa.array(np.zeros(n, np.uint32))
        columns = [part["row"], part["key"], hashes, status, empty, empty, crc]
        unit = ShardId(BUCKET, start // ROWS_PER_SHARD)
        pq.write_table(pa.table(columns, schema=COMMIT), manifest.commit(unit))


def measure_files(config: CaptionsBenchmarkConfig, folder: Path, report: Report) -> None:
    """Time the scan and the headers of real files in the page cache, where threads help least."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    for i in range(config.files):
        path = folder / f"{i // 1000:05d}" / f"{i:09d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg + i.to_bytes(8, "little"))
        path.with_suffix(".txt").write_text(f"woman, solo, outdoors, {i}")
    with timed(report, "scan with .txt captions", config.files):
        images = scan((str(folder),), ("txt",), workers=config.workers).images
    with timed(report, "headers", config.files):
        read_headers(images, None, config.workers)


if __name__ == "__main__":
    run_script(main, CaptionsBenchmarkConfig, __doc__)
