"""A store of 12 million images: opening it, planning an epoch, finding tags, reading at random.

    python benchmarks/cache/scale.py                       a quarter of an hour and 10 GB of disk
    python benchmarks/cache/scale.py --rows 100000

The log, the captions and the index are real; the latents are holes in sparse files, but for the
first of each shard. Every step has a process of its own, so its memory is its own.
"""

import multiprocessing
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import psutil
import tyro

from benchmarks.lib.machine import machine
from benchmarks.lib.synthetic import TAGS, make_store
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore

if TYPE_CHECKING:
    from xlsd_cache.dataset.batch_order import BatchOrder


@dataclass(frozen=True)
class ScaleConfig:
    """Measure what grows with the number of images."""

    rows: int = 12_000_000
    """Images of the store."""

    rows_per_shard: int | None = None
    """Default: as `xlsd-cache build` would choose, 4096 above four million images, else 1024."""

    batch: int = 32
    """Images a batch, in the schedule and in reads."""

    resume_at: int = 1_000_000
    """Step to resume a run at."""

    folder: Path | None = None
    """A disk to write to. Default: where temporary files go."""


@dataclass(frozen=True)
class Step:
    """What one step cost."""

    name: str
    seconds: float
    peak_gb: float  # resident, mapped files included
    own_gb: float  # resident, without them: what the kernel cannot have back
    said: str = ""


class Memory:
    """The peak of this process's memory while the block runs, by looks every 10 ms."""

    def __enter__(self) -> "Memory":
        self.peak_gb = self.own_gb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            told = process.memory_info()
            self.peak_gb = max(self.peak_gb, told.rss / 1e9)
            self.own_gb = max(self.own_gb, (told.rss - getattr(told, "shared", 0)) / 1e9)
            if self._done.wait(0.01):
                return


def main(config: ScaleConfig, command: Sequence[str]) -> bool:
    """Print one line a step and what became of the targets; whether all were met."""
    print(f"machine: {machine('numpy', 'pyarrow')}")
    print(f"command: {shlex.join(('python', 'benchmarks/cache/scale.py', *command))}")
    print(f"\n{'step':<34}{'seconds':>10}{'peak GB':>10}{'own GB':>10}")
    found = {}
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        case = Case(config, Path(folder) / "latents")
        for take in (
            case.make, case.index, case.open, case.epoch, case.resume, case.tag_index, case.tags,
            case.select, case.reads,
        ):  # fmt: skip
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                step = found[take.__name__] = process.submit(take).result()
            costs = f"{step.seconds:>10.3f}{step.peak_gb:>10.2f}{step.own_gb:>10.2f}"
            print(f"{step.name:<34}{costs}  {step.said}", flush=True)
    return targets(found)


@dataclass(frozen=True)
class Case:
    """The steps, each run in a process of its own."""

    config: ScaleConfig
    root: Path

    def make(self) -> Step:
        """The store itself; no index yet."""
        rows = self.config.rows
        begun = time.perf_counter()
        with Memory() as memory:
            rows_per_shard = 4096 if rows > 4_000_000 else 1024
            make_store(self.root, rows, self.config.rows_per_shard or rows_per_shard)
        seconds = time.perf_counter() - begun
        log = sum(path.stat().st_size for path in self.root.rglob("*.parquet"))
        shards = sum(1 for _ in self.root.glob("latents.zarr/*/c.*"))
        said = f"{rows} images in {shards} shards, a log of {log / 1e9:.2f} GB"
        return Step("make the store", seconds, memory.peak_gb, memory.own_gb, said)

    def index(self) -> Step:
        """Open it for the first time, which makes the index from the log."""
        return self._open("open, making the index")

    def open(self) -> Step:
        """Open it."""
        return self._open("open")

    def _open(self, name: str) -> Step:
        begun = time.perf_counter()
        with Memory() as memory, LatentStore.open(self.root) as store:
            seconds = time.perf_counter() - begun
            size = (self.root / "index.arrow").stat().st_size / 1e9
            said = f"{len(store)} samples in {len(store.buckets)} buckets, index {size:.2f} GB"
        return Step(name, seconds, memory.peak_gb, memory.own_gb, said)

    def epoch(self) -> Step:
        """Every batch of an epoch, in order."""
        schedule, begun = self._schedule(), time.perf_counter()
        with Memory() as memory:
            batches = schedule.batches(1)
            images = sum(len(schedule.slot(number).ordinals) for number in range(batches))
        seconds = time.perf_counter() - begun
        said = f"{images} samples in {batches} batches"
        return Step("plan an epoch", seconds, memory.peak_gb, memory.own_gb, said)

    def resume(self) -> Step:
        """One batch in the middle of a run, from nothing."""
        schedule, begun = self._schedule(), time.perf_counter()
        with Memory() as memory:
            slot = schedule.slot(self.config.resume_at)
        seconds = time.perf_counter() - begun
        said = f"number {self.config.resume_at}, due in epoch {slot.epoch:.2f}"
        return Step("plan a resumed run's batch", seconds, memory.peak_gb, memory.own_gb, said)

    def _schedule(self) -> "BatchOrder":
        from xlsd_cache.dataset.batch_order import (
            BatchOrder,  # with torch, whose memory is not the store's
        )

        with LatentStore.open(self.root) as store:
            sizes = {name: len(rows) for name, rows in store.buckets.items()}
        return BatchOrder(sizes, self.config.batch, 0)

    def tag_index(self) -> Step:
        """The first question for a tag, which makes the index of tags."""
        with LatentStore.open(self.root) as store, Memory() as memory:
            begun = time.perf_counter()
            names = len(store.tags("txt").names)
            seconds = time.perf_counter() - begun
        size = (self.root / "tags.txt.arrow").stat().st_size / 1e9
        said = f"{names} tags, index {size:.2f} GB"
        return Step("make the index of tags", seconds, memory.peak_gb, memory.own_gb, said)

    def tags(self) -> Step:
        """Questions for frequent, rare and unknown tags; the slowest, the first one among them."""
        asked = [TAGS[0], TAGS[15], TAGS[100], TAGS[1000], TAGS[-1], "no such tag"]
        seconds = []
        with LatentStore.open(self.root) as store, Memory() as memory:
            some = [text.split(", ") for text in store.samples["txt"].slice(0, 9999).to_pylist()]
            for tag in asked:
                begun = time.perf_counter()
                mask = store.tagged("txt", tag)
                seconds.append(time.perf_counter() - begun)
                assert [tag in tags for tags in some] == mask[: len(some)].tolist(), tag
            both = int((store.tagged("txt", asked[0]) & store.tagged("txt", asked[1])).sum())
        each = ", ".join(f"{1e3 * second:.1f}" for second in seconds)
        said = f"{each} ms; {both} have {asked[0]} and {asked[1]}"
        return Step("find a tag", max(seconds), memory.peak_gb, memory.own_gb, said)

    def select(self) -> Step:
        """Two required tags and two forbidden: what `xlsd-train` trains on, and its schedule."""
        from xlsd_cache.dataset.batch_order import BatchOrder
        from xlsd_cache.dataset.selection import select
        from xlsd_train.data.selection import filter_by_tags

        require, forbid = (TAGS[0], TAGS[15]), (TAGS[1], TAGS[100])
        with LatentStore.open(self.root) as store, Memory() as memory:
            begun = time.perf_counter()
            selection = select(store, filter_by_tags(store, ["txt"], require, forbid).mask)
            BatchOrder(selection.sizes, self.config.batch, 0)
            seconds = time.perf_counter() - begun
            wanted = np.flatnonzero(
                np.all([store.tagged("txt", tag) for tag in require], axis=0)
                & ~np.any([store.tagged("txt", tag) for tag in forbid], axis=0)
            )
            assert np.array_equal(selection.rows(store, np.arange(len(selection))), wanted)
        said = f"{len(selection)} have {' and '.join(require)}, not {' nor '.join(forbid)}"
        return Step("select samples by four tags", seconds, memory.peak_gb, memory.own_gb, said)

    def reads(self) -> Step:
        """Random batches, no two of their rows in one shard: each in a file of its own."""
        rng = np.random.default_rng(0)
        with LatentStore.open(self.root) as store, Memory() as memory:
            bucket = max(store.buckets, key=lambda name: len(store.buckets[name]))
            firsts = np.arange(0, len(store.buckets[bucket]), store.rows_per_shard)
            seconds = []
            for _ in range(2):  # opening the shards, and with all of them open
                order, begun = rng.permutation(firsts), time.perf_counter()
                for start in range(0, len(order), self.config.batch):
                    store.read(bucket, order[start : start + self.config.batch])
                seconds.append((time.perf_counter() - begun) / len(order))
        first, again = (1e6 * second for second in seconds)
        said = f"{len(firsts)} shards, {first:.0f} us a latent, and again {again:.0f} us"
        return Step("read from all shards", seconds[0], memory.peak_gb, memory.own_gb, said)


def targets(found: dict[str, Step]) -> bool:
    """Hold the figures against what the store promises for 12 million images."""
    met = [
        ("s to open", found["open"].seconds, 3.0),
        ("GB to open", found["open"].peak_gb, 1.0),
        ("s to plan an epoch", found["epoch"].seconds, 3.0),
        ("s a tag", found["tags"].seconds, 0.1),
        ("s to select", found["select"].seconds, 1.0),
    ]
    print()
    for what, value, limit in met:
        print(
            f"{'PASS' if value < limit else 'FAIL'}  {value:.3g} {what}, under {limit:.3g} wanted"
        )
    return all(value < limit for _, value, limit in met)


if __name__ == "__main__":
    try:
        main(tyro.cli(ScaleConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"scale: {error}")
