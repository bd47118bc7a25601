"""What a store costs that is built again and again, with a few new images each time.

    python benchmarks/cache/generations.py

After each of many small generations: CPU of the pass that adds it and of a pass with nothing to do,
of opening the newest generation without index.arrow and an older one; files and rows of the arrays
for each image. Then what the last store takes beyond its latents, on the disk and in the memory of
a reader, and the latents of older generations compared with what they were when those were the
newest.
"""

import hashlib
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import torch
from PIL import Image

from benchmarks.lib.commands import run_command
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.errors import UserError
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.zarr_files import array_rows

VAE = Path(__file__).parents[1] / "demo" / "vae"
SIDES = [(128, 128), (192, 64), (64, 192)]  # three buckets


@dataclass(frozen=True)
class GenerationsConfig(JsonOption):
    """Measure a store of many small generations."""

    generations: int = 200
    """Builds, each with new images."""

    images: int = 2
    """New images a build, in up to three buckets."""

    rows_per_shard: int = 256
    """Rows per shard of the store."""

    repeats: int = 5
    """Passes with nothing to do, and openings, whose median is reported."""

    folder: Path | None = None
    """Folder for images and store. Default: the system's temporary folder."""


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    generation: int  # from 1
    add_cpu_s: float
    nothing_cpu_s: float
    open_cpu_s: float  # the newest, without index.arrow
    older_cpu_s: float  # the generation in the middle
    files_per_image: float
    rows_per_image: float


def main(config: GenerationsConfig, command: Sequence[str]) -> None:
    """Print the table, then the targets."""
    if config.generations < 4:
        raise UserError(f"--generations {config.generations} is too few to compare; give 4 or more")
    torch.set_num_threads(1)
    report = Report("benchmarks/cache/generations.py", command, machine("torch", "pyarrow"))
    print("CPU s of a pass that         of opening           for each image")
    print("generation   adds  nothing   newest   older    files  array rows")
    rng, rows, digests = np.random.default_rng(0), [], dict[int, str]()
    adds: list[float] = []  # CPU seconds of each pass but the first
    shown = {2, config.generations, *(10**n * k for n in range(5) for k in (1, 2, 5))}
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        out = folder / "latents"
        for number in range(1, config.generations + 1):
            add_images(config, folder / "images", number, rng)
            added = cpu_of(lambda: build(config, folder))
            adds += [added] if number > 1 else []
            if number in shown:
                digests[number - 1] = digest(out, number - 1)
                rows.append(measure(config, folder, number, added))
                report.add("generation", **vars(rows[-1]))
                print(line_of(rows[-1]), flush=True)
        same = [digest(out, number) == was for number, was in digests.items()]
        run_command(xlsd_cache, "check", out)
        space = space_of(out) | reading_of(out)
    report.add("space", **space)
    print("\nfor each image of the last store:")
    for name, value in space.items():
        print(f"{value:>12.1f} {name}")
    print()
    by_number = {row.generation: row for row in rows}
    first, last = by_number[2], by_number[config.generations]
    more_ms = 1e3 * (last.nothing_cpu_s - first.nothing_cpu_s) / (config.generations - 2)
    report.target("ms more of a pass with nothing to do, a generation", more_ms, most=1)
    ratio = statistics.median(adds[-5:]) / statistics.median(adds[:5])  # some passes fold
    report.target("CPU of the last five passes over that of passes 2 to 6", ratio, most=2)
    report.target("older generations that read bit-equal, share", sum(same) / len(same), least=1)
    report.write(config.json)


def add_images(config: GenerationsConfig, folder: Path, number: int, rng: Any) -> None:
    """Write the new images of a generation, each with a caption."""
    folder.mkdir(exist_ok=True)
    for i in range(config.images):
        width, height = SIDES[(number * config.images + i) % len(SIDES)]
        path = folder / f"{number:06d}-{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"image {i} of {number}")


def build(config: GenerationsConfig, folder: Path) -> None:
    """Build the store from the images."""
    run_command(
        xlsd_cache, "build", folder / "images", "--out", folder / "latents", "--vae", VAE,
        "--resolution", 128, "--batch", 4, "--workers", 1, "--device", "cpu",
        "--rows-per-shard", config.rows_per_shard,
    )  # fmt: skip


def cpu_of(work: Callable[[], object]) -> float:
    """CPU seconds of this process, in all threads."""
    before = time.process_time()
    work()
    return time.process_time() - before


def measure(config: GenerationsConfig, folder: Path, number: int, added: float) -> Measured:
    """Measure the store as it is after `number` generations."""
    out = folder / "latents"
    manifest = Manifest(out)

    def median(work: Callable[[], object]) -> float:
        return statistics.median(cpu_of(work) for _ in range(config.repeats))

    def open_newest() -> None:
        (out / "index.arrow").unlink()
        LatentStore.open(out).close()

    nothing = median(lambda: build(config, folder))
    newest = median(open_newest)
    older = median(lambda: LatentStore.open(out, (number - 1) // 2).close())
    images = number * config.images
    files = sum(len(names) for _, _, names in os.walk(out))
    buckets = {unit.bucket for unit in manifest.committed()}
    rows = sum(array_rows(manifest.array(bucket) / "zarr.json") or 0 for bucket in buckets)
    return Measured(number, added, nothing, newest, older, files / images, rows / images)


def space_of(out: Path) -> dict[str, float]:
    """Bytes on the disk for each image."""
    with LatentStore.open(out) as store:
        images, rows = len(store), store.rows_per_shard
        latents = sum(len(it) * store.identity.nbytes(name) for name, it in store.buckets.items())
    sizes = {path: path.stat() for path in out.rglob("*") if path.is_file()}
    shards = [it.st_size for path, it in sizes.items() if path.match("*x*/c.*.0.0.0")]
    total = sum(it.st_size for it in sizes.values())
    empty = 16 * (rows * len(shards) - images)
    found = {
        "bytes of latents": latents,
        "bytes of shards beyond the latents": sum(shards) - latents,
        "bytes of these for rows without a latent": empty,
        "bytes of the log and what is derived from it": total - sum(shards),
        "bytes that the files take on the disk": sum(512 * it.st_blocks for it in sizes.values()),
    }
    return {name: value / images for name, value in found.items()}


def reading_of(out: Path) -> dict[str, float]:
    """Memory of a store whose shards are all open, and CPU of an epoch, for each image."""

    def read(store: LatentStore) -> None:
        for bucket, rows in store.buckets.items():
            for start in range(0, len(rows), 32):
                store.read(bucket, rows[start : start + 32])

    with LatentStore.open(out) as store:
        tracemalloc.start()
        read(store)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        store.close()
        first, later = (cpu_of(lambda: read(store)) for _ in range(2))
        each = len(store)
    return {
        "bytes in the memory of a reader, all shards open": held / each,
        "us CPU to read it in the first epoch": 1e6 * first / each,
        "us CPU to read it in a later one": 1e6 * later / each,
    }


def line_of(row: Measured) -> str:
    """One line of the table."""
    return (
        f"{row.generation:>10}{row.add_cpu_s:>7.2f}{row.nothing_cpu_s:>9.2f}"
        f"{row.open_cpu_s:>9.3f}{row.older_cpu_s:>8.3f}"
        f"{row.files_per_image:>9.2f}{row.rows_per_image:>12.1f}"
    )


def digest(out: Path, generation: int) -> str:
    """sha256 of a generation's samples and latents."""
    found = hashlib.sha256()
    with LatentStore.open(out, generation) as store:
        found.update(repr(store.samples.to_pylist()).encode())
        for bucket, rows in store.buckets.items():
            found.update(store.read(bucket, rows).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    run_script(main, GenerationsConfig, __doc__)
