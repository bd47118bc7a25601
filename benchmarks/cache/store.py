"""Random reads of latents: our store against zarr-python, tensorstore, memmap and a file a latent.

    python benchmarks/cache/store.py

Every reader has the same latents and reads the same rows. Readers alternate within each round, so
that ratios are valid when the machine's speed drifts. Warm: files are in the page cache. Cold: they
are dropped from the page cache before each turn, which matters only on a disk.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import pyarrow as pa
import tensorstore
import torch
import zarr
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.lib.synthetic import IDENTITY
from xlsd_cache.errors import UserError
from xlsd_cache.planning.log_state import by_shard
from xlsd_cache.schema import CAPTIONS, PLAN
from xlsd_cache.store.commit import claim
from xlsd_cache.store.identity import attributes_of
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.shard import ShardReader, ShardRow
from xlsd_cache.store.view import StoreView
from xlsd_cache.store.zarr_files import grow_array, write_group

BUCKET, SHAPE = "512x512", (4, 64, 64)
LATENT_NBYTES = 2 * int(np.prod(SHAPE))
AHEAD = 4  # batches announced to the kernel before they are read, as in training

Rows = NDArray[np.int64]
Latents = NDArray[np.float16]


@dataclass(frozen=True)
class StoreConfig(JsonOption):
    """Measure random reads."""

    samples: int = 8192
    """Latents of 4x64x64 float16: 32 KiB each, in each of six formats."""

    batch: int = 32
    """Random rows per batch."""

    batches: int = 8
    """Batches per turn."""

    rounds: int = 15
    """Turns of every reader with a warm page cache; the median is reported."""

    cold_rounds: int = 7
    """Turns with a cold page cache."""

    rows_per_shard: int = 1024
    """Rows per shard of our store, which zarr-python and tensorstore read as well."""

    folder: Path | None = None
    """Folder for the files. Default: the system's temporary folder."""

    seed: int = 0
    """Seed of the latents and of the rows that are read."""


@dataclass(frozen=True)
class Reader:
    """One format or program to read latents with."""

    name: str
    read: Callable[[Rows], Any]  # -> float16 [n, 4, 64, 64]
    files: Callable[[Rows], Iterable[Path]]  # the files with these rows
    hint: Callable[[Rows], None] | None = None  # announces a later batch
    unmap: Callable[[], Any] | None = None  # mapped pages cannot be dropped from the page cache


@dataclass(frozen=True)
class Cost:
    """Median microseconds per latent."""

    wall: float
    cpu: float  # sum over all threads


def main(config: StoreConfig, command: Sequence[str]) -> None:
    """Print both tables, then the targets."""
    if config.samples < config.batch:
        raise UserError(f"--samples {config.samples} is less than one --batch of {config.batch}")
    libraries = machine("numpy", "zarr", "tensorstore", "torch", "safetensors")
    report = Report("benchmarks/cache/store.py", command, libraries)
    mib = config.samples * LATENT_NBYTES / 2**20
    print(f"{config.samples} latents of 4x64x64 float16 ({mib:.0f} MiB), batches of {config.batch}")
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        rng = np.random.default_rng(config.seed)
        latents = rng.standard_normal((config.samples, *SHAPE), np.float32).astype(np.float16)
        store = make_store(config, Path(folder) / "latents", latents)
        with LatentStore.open(store) as opened:
            readers = [*ours(opened), *zarrs(store), memmap(Path(folder), latents)]
            readers += per_file(Path(folder), latents)
            check_equal(readers, latents, config)
            os.sync()  # only pages that are on the disk can be dropped
            warm = measure(readers, config, config.rounds, cold=False)
            cold = measure(readers, config, config.cold_rounds, cold=True)
    for cache, costs, turns in (("warm", warm, config.rounds), ("cold", cold, config.cold_rounds)):
        print_table(f"{cache}, median of {turns} turns of {config.batches} batches", costs)
        for reader, cost in costs.items():
            report.add(cache, reader=reader, us_per_latent=cost.wall, cpu_us_per_latent=cost.cpu)
    print()
    targets(warm, cold, report)
    report.write(config.json)


def make_store(config: StoreConfig, root: Path, latents: Latents) -> Path:
    """Write these latents in order into a store, with the shard writer of a build."""
    manifest, rows = Manifest(root), config.rows_per_shard
    manifest.make_folders()
    write_group(manifest, attributes_of(IDENTITY, rows))
    store = StoreView(manifest, IDENTITY, rows)
    grow_array(store, BUCKET, len(latents))
    plan: list[Any] = [
        {
            "key": f"{i:08d}.jpg", "source": f"{i:08d}.jpg", "size": 0, "mtime_ns": 0,
            "width": 512, "height": 512, "crop": [0.0, 0.0, 512.0, 512.0], "bucket": BUCKET,
            "row": i, "content_hash": "", "reason": "", "detail": "",
        }
        for i in range(len(latents))
    ]  # fmt: skip
    manifest.write_plan(0, pa.Table.from_pylist(plan, PLAN), [], CAPTIONS.empty_table())
    units = by_shard(plan, rows)
    for unit, entries in units.items():
        claimed = claim(store, unit, units.__getitem__, 32)
        assert claimed is not None  # no other process builds here
        slots = {slot: latents[entry["row"]] for slot, entry in entries.items()}
        for batch in claimed.writer.remaining:
            claimed.writer.append([ShardRow(slot, "") for slot in batch], slots)
        claimed.finish()
    return root


def ours(store: LatentStore) -> list[Reader]:
    """The store's reader, with read-ahead, with one buffer, and without the checksum."""
    rows_per_shard = store.rows_per_shard
    paths = shard_files(store.root)
    offsets = [ShardReader(path, rows_per_shard, LATENT_NBYTES).offsets for path in paths]
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    kept: dict[int, Latents] = {}

    def read(rows: Rows) -> Latents:
        return store.read(BUCKET, rows)

    def read_again(rows: Rows) -> Latents:
        out = kept.setdefault(len(rows), np.empty((len(rows), *SHAPE), np.float16))
        return store.read(BUCKET, rows, out)

    def read_unchecked(rows: Rows) -> Latents:
        out = np.empty((len(rows), *SHAPE), np.float16)
        for latent, row in zip(out, rows.tolist(), strict=True):
            shard, slot = divmod(row, rows_per_shard)
            os.preadv(fds[shard], [latent.data], offsets[shard].item(slot))
        return out

    def hint(rows: Rows) -> None:
        store.will_need(BUCKET, rows)

    return [
        Reader("xlsd", read, lambda _: paths),
        Reader("xlsd, read-ahead", read, lambda _: paths, hint),
        Reader("xlsd, one buffer", read_again, lambda _: paths),
        Reader("xlsd, no crc", read_unchecked, lambda _: paths),
    ]


def shard_files(store: Path) -> list[Path]:
    """The shards of the bucket in order."""
    manifest = Manifest(store)
    return [manifest.shard(unit) for unit in sorted(manifest.committed())]


def zarrs(store: Path) -> list[Reader]:
    """zarr-python and tensorstore on the same shards."""
    path = Manifest(store).array(BUCKET)
    array: Any = zarr.open_array(path, mode="r")
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "context": {"cache_pool": {"total_bytes_limit": 1 << 20}},  # keeps the shards' indexes
        "recheck_cached_metadata": False,
        "recheck_cached_data": False,
    }
    other = tensorstore.open(spec, read=True).result()
    paths = shard_files(store)
    return [
        Reader("zarr-python oindex", lambda rows: array.oindex[rows], lambda _: paths),
        Reader("tensorstore", lambda rows: other[rows].read().result(), lambda _: paths),
    ]


def memmap(folder: Path, latents: Latents) -> Reader:
    """All latents in one raw file, memory-mapped: the upper limit."""
    path = folder / "latents.raw"
    latents.tofile(path)
    mapped: Any = np.memmap(path, np.float16, "r", shape=latents.shape)

    def unmap() -> None:
        if hasattr(mapped.base, "madvise"):
            mapped.base.madvise(4)  # MADV_DONTNEED: unmapped pages can be dropped

    return Reader("np.memmap", lambda rows: mapped[rows], lambda _: [path], unmap=unmap)


def per_file(folder: Path, latents: Latents) -> list[Reader]:
    """One file per latent, as other trainers store them."""
    size = np.array([512, 512])
    kohya = {"original_size_64x64": size, "crop_ltrb_64x64": np.array([0, 0, 512, 512])}
    for kind in ("npz", "pt", "safetensors"):
        (folder / kind).mkdir()
    for i, latent in enumerate(latents):
        tensor = torch.from_numpy(latent)
        np.savez(folder / f"npz/{i}.npz", allow_pickle=False, latents_64x64=latent, **kohya)
        torch.save(tensor, folder / f"pt/{i}.pt")
        save_file({"latent": tensor}, folder / f"safetensors/{i}.safetensors")

    def reader(name: str, kind: str, load: Callable[[Path], Any]) -> Reader:
        def files(rows: Rows) -> list[Path]:
            return [folder / kind / f"{row}.{kind}" for row in rows.tolist()]

        return Reader(name, lambda rows: np.stack([load(path) for path in files(rows)]), files)

    def load_npz(path: Path) -> Any:
        with np.load(path) as file:  # kohya reads all three arrays
            latent, _, _ = (file[name] for name in ("latents_64x64", *kohya))
        return latent

    return [
        reader("safetensors a file", "safetensors", lambda path: load_file(path)["latent"]),
        reader(".pt, pickle", "pt", lambda path: torch.load(path, weights_only=False)),
        reader(".pt, weights_only", "pt", lambda path: torch.load(path, weights_only=True)),
        reader("npz as kohya", "npz", load_npz),
    ]


def check_equal(readers: list[Reader], latents: Latents, config: StoreConfig) -> None:
    """Assert that every reader returns the same rows, bit for bit."""
    (rows,) = draw(config, 1, -1)
    for reader in readers:
        assert np.array_equal(reader.read(rows), latents[rows]), reader.name


def draw(config: StoreConfig, count: int, turn: int) -> list[Rows]:
    """The rows of the batches of one turn."""
    rng = np.random.default_rng([config.seed, turn + 1])
    return [rng.choice(config.samples, config.batch, replace=False) for _ in range(count)]


def measure(readers: list[Reader], config: StoreConfig, rounds: int, cold: bool) -> dict[str, Cost]:
    """The cost of every reader. One warm-up turn is not counted."""
    times: dict[str, list[tuple[float, float]]] = {reader.name: [] for reader in readers}
    for turn in range(-1, rounds):
        batches = draw(config, config.batches, turn)
        for reader in readers:
            if cold:
                forget(reader, batches)
            wall, cpu = time.perf_counter(), time.process_time()
            read_all(reader, batches)
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= 0:
                times[reader.name].append(spent)
    each = 1e6 / (config.batches * config.batch)
    return {
        name: Cost(*(each * statistics.median(column) for column in zip(*spent, strict=True)))
        for name, spent in times.items()
    }


def read_all(reader: Reader, batches: list[Rows]) -> None:
    """Read the batches in order; readers with a hint announce the next ones to the kernel."""
    if reader.hint:
        for rows in batches[:AHEAD]:
            reader.hint(rows)
    for i, rows in enumerate(batches):
        if reader.hint and i + AHEAD < len(batches):
            reader.hint(batches[i + AHEAD])
        reader.read(rows)


def forget(reader: Reader, batches: list[Rows]) -> None:
    """Drop the files with these rows from the page cache."""
    if reader.unmap:
        reader.unmap()
    for path in {path for rows in batches for path in reader.files(rows)}:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def print_table(title: str, costs: dict[str, Cost]) -> None:
    """A row per reader: its cost, np.memmap's time over its time, its time over ours."""
    columns = ("us/latent", "CPU us", "x memmap", "xlsd is")
    print(f"\n{title:<42}" + "".join(f"{name:>12}" for name in columns))
    resident, own = costs["np.memmap"], costs["xlsd"]
    for name, cost in costs.items():
        cells = [f"{cost.wall:.1f}", f"{cost.cpu:.1f}", f"{resident.wall / cost.wall:.3f}"]
        cells.append(f"{cost.wall / own.wall:.1f}x")
        print(f"{name:<42}" + "".join(f"{cell:>12}" for cell in cells))


def targets(warm: dict[str, Cost], cold: dict[str, Cost], report: Report) -> None:
    """The targets of the store's reader."""

    def times(name: str) -> float:
        return warm[name].wall / warm["xlsd"].wall

    ahead = cold["xlsd"].wall / cold["xlsd, read-ahead"].wall
    report.target("speed relative to np.memmap, with crc", times("np.memmap"), least=0.20)
    report.target("speed relative to zarr-python", times("zarr-python oindex"), least=50)
    report.target("speed relative to npz as kohya", times("npz as kohya"), least=20)
    report.target("speed relative to a safetensors file", times("safetensors a file"), least=5)
    report.target("latents per CPU second", 1e6 / warm["xlsd"].cpu, least=1e6 / 25)
    report.target("speed-up by read-ahead, cold", ahead, least=2)


if __name__ == "__main__":
    run_script(main, StoreConfig, __doc__)
