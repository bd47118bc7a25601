"""Time and memory of a store of 12 million images: opening, epoch order, tags, random reads.

    python benchmarks/cache/scale.py                       a quarter of an hour and 10 GB of disk
    python benchmarks/cache/scale.py --rows 100000

The log, the captions and the index are real. The shards are sparse files in which only the first
latent exists. Every step runs in its own process, so that its peak memory is measured alone.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import psutil

from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.lib.synthetic import TAGS, make_store
from xlsd_cache.store.reader import LatentStore

if TYPE_CHECKING:
    from xlsd_cache.dataset.batch_order import BatchOrder


@dataclass(frozen=True)
class ScaleConfig(JsonOption):
    """Measure what grows with the number of images."""

    rows: int = 12_000_000
    """Images in the store."""

    rows_per_shard: int | None = None
    """Default: as in `xlsd-cache build`, 4096 above four million images, else 1024."""

    batch: int = 32
    """Images per batch, in the batch order and in reads."""

    resume_at: int = 1_000_000
    """Step at which a run is resumed."""

    folder: Path | None = None
    """Folder for the store. Default: the system's temporary folder."""


@dataclass(frozen=True)
class Step:
    """Time and memory of one step."""

    name: str
    seconds: float
    peak_gb: float  # resident, mapped files included
    own_gb: float  # resident, without mapped files: what the kernel cannot reclaim
    details: str = ""


class Memory:
    """The peak memory of this process while the block runs, sampled every 10 ms."""

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
            info = process.memory_info()
            self.peak_gb = max(self.peak_gb, info.rss / 1e9)
            self.own_gb = max(self.own_gb, (info.rss - getattr(info, "shared", 0)) / 1e9)
            if self._done.wait(0.01):
                return


def main(config: ScaleConfig, command: Sequence[str]) -> None:
    """Print a row per step, then the targets."""
    report = Report("benchmarks/cache/scale.py", command, machine("numpy", "pyarrow"))
    print(f"\n{'step':<34}{'seconds':>10}{'peak GB':>10}{'own GB':>10}")
    steps = {}
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        case = Case(config, Path(folder) / "latents")
        for take in (
            case.make, case.index, case.open, case.epoch, case.resume, case.tag_index, case.tags,
            case.select, case.reads,
        ):  # fmt: skip
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                step = steps[take.__name__] = process.submit(take).result()
            costs = f"{step.seconds:>10.3f}{step.peak_gb:>10.2f}{step.own_gb:>10.2f}"
            print(f"{step.name:<34}{costs}  {step.details}", flush=True)
            report.add("step", **asdict(step))
    print()
    targets(steps, report)
    report.write(config.json)


@dataclass(frozen=True)
class Case:
    """The steps. Each runs in its own process."""

    config: ScaleConfig
    root: Path

    def make(self) -> Step:
        """Write the store, without its index."""
        rows = self.config.rows
        begun = time.perf_counter()
        with Memory() as memory:
            rows_per_shard = 4096 if rows > 4_000_000 else 1024
            make_store(self.root, rows, self.config.rows_per_shard or rows_per_shard)
        seconds = time.perf_counter() - begun
        log = sum(path.stat().st_size for path in self.root.rglob("*.parquet"))
        shards = sum(1 for _ in self.root.glob("latents.zarr/*/c.*"))
        details = f"{rows} images in {shards} shards, a log of {log / 1e9:.2f} GB"
        return Step("make the store", seconds, memory.peak_gb, memory.own_gb, details)

    def index(self) -> Step:
        """Open the store for the first time, which makes the index from the log."""
        return self._open("open, making the index")

    def open(self) -> Step:
        """Open the store with its index."""
        return self._open("open")

    def _open(self, name: str) -> Step:
        begun = time.perf_counter()
        with Memory() as memory, LatentStore.open(self.root) as store:
            seconds = time.perf_counter() - begun
            size = (self.root / "index.arrow").stat().st_size / 1e9
            details = f"{len(store)} samples in {len(store.buckets)} buckets, index {size:.2f} GB"
        return Step(name, seconds, memory.peak_gb, memory.own_gb, details)

    def epoch(self) -> Step:
        """Compute every batch of an epoch."""
        order, begun = self._batch_order(), time.perf_counter()
        with Memory() as memory:
            batches = order.batches(1)
            images = sum(len(order.slot(number).ordinals) for number in range(batches))
        seconds = time.perf_counter() - begun
        details = f"{images} samples in {batches} batches"
        return Step("plan an epoch", seconds, memory.peak_gb, memory.own_gb, details)

    def resume(self) -> Step:
        """Compute one batch in the middle of a run, as a resumed run does."""
        order, begun = self._batch_order(), time.perf_counter()
        with Memory() as memory:
            slot = order.slot(self.config.resume_at)
        seconds = time.perf_counter() - begun
        details = f"number {self.config.resume_at}, due in epoch {slot.epoch:.2f}"
        return Step("plan a resumed run's batch", seconds, memory.peak_gb, memory.own_gb, details)

    def _batch_order(self) -> "BatchOrder":
        # Imported late: it imports torch, whose memory would be counted in every step.
        from xlsd_cache.dataset.batch_order import BatchOrder

        with LatentStore.open(self.root) as store:
            sizes = {name: len(rows) for name, rows in store.buckets.items()}
        return BatchOrder(sizes, self.config.batch, 0)

    def tag_index(self) -> Step:
        """Query a tag for the first time, which makes the index of tags."""
        with LatentStore.open(self.root) as store, Memory() as memory:
            begun = time.perf_counter()
            names = len(store.tags("txt").names)
            seconds = time.perf_counter() - begun
        size = (self.root / "tags.txt.arrow").stat().st_size / 1e9
        details = f"{names} tags, index {size:.2f} GB"
        return Step("make the index of tags", seconds, memory.peak_gb, memory.own_gb, details)

    def tags(self) -> Step:
        """Query frequent, rare and unknown tags; the time is that of the slowest query."""
        queried = [TAGS[0], TAGS[15], TAGS[100], TAGS[1000], TAGS[-1], "no such tag"]
        seconds = []
        with LatentStore.open(self.root) as store, Memory() as memory:
            some = [text.split(", ") for text in store.samples["txt"].slice(0, 9999).to_pylist()]
            for tag in queried:
                begun = time.perf_counter()
                mask = store.tagged("txt", tag)
                seconds.append(time.perf_counter() - begun)
                assert [tag in tags for tags in some] == mask[: len(some)].tolist(), tag
            both = int((store.tagged("txt", queried[0]) & store.tagged("txt", queried[1])).sum())
        each = ", ".join(f"{1e3 * second:.1f}" for second in seconds)
        details = f"{each} ms; {both} samples have {queried[0]} and {queried[1]}"
        return Step("find a tag", max(seconds), memory.peak_gb, memory.own_gb, details)

    def select(self) -> Step:
        """Select samples by two required and two forbidden tags, and make their batch order."""
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
        details = (
            f"{len(selection)} samples have {' and '.join(require)}, not {' nor '.join(forbid)}"
        )
        return Step("select samples by four tags", seconds, memory.peak_gb, memory.own_gb, details)

    def reads(self) -> Step:
        """Read random batches in which every row is in another shard."""
        rng = np.random.default_rng(0)
        with LatentStore.open(self.root) as store, Memory() as memory:
            bucket = max(store.buckets, key=lambda name: len(store.buckets[name]))
            firsts = np.arange(0, len(store.buckets[bucket]), store.rows_per_shard)
            seconds = []
            for _ in range(2):  # first with shards to open, then with all shards open
                order, begun = rng.permutation(firsts), time.perf_counter()
                for start in range(0, len(order), self.config.batch):
                    store.read(bucket, order[start : start + self.config.batch])
                seconds.append((time.perf_counter() - begun) / len(order))
        first, again = (1e6 * second for second in seconds)
        details = f"{len(firsts)} shards, {first:.0f} us per latent, then {again:.0f} us"
        return Step("read from all shards", seconds[0], memory.peak_gb, memory.own_gb, details)


def targets(steps: dict[str, Step], report: Report) -> None:
    """The targets for 12 million images."""
    report.target("s to open", steps["open"].seconds, most=3.0)
    report.target("GB to open", steps["open"].peak_gb, most=1.0)
    report.target("s to plan an epoch", steps["epoch"].seconds, most=3.0)
    report.target("s to find a tag", steps["tags"].seconds, most=0.1)
    report.target("s to select", steps["select"].seconds, most=1.0)


if __name__ == "__main__":
    run_script(main, ScaleConfig, __doc__)
