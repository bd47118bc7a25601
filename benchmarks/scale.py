"""Time and memory that grow with the number of images, and what a hundred million would take.

    python benchmarks/scale.py                       ten million last: 15 minutes, 12 GB of disk
    python benchmarks/scale.py --rows 10000 100000

The log, the captions and the index are real. The shards are sparse files in which only the first
latent exists, and planning is given the headers of the images that do not exist: reading them is a
cost of each image that `benchmarks/cache/captions.py` measures. Every step runs in its own process,
so that its peak memory is measured alone. Growth is the exponent between the two largest numbers of
images: 1 is linear. The last columns extend the line through the same two to 100 million.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # when run as a file

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.lib.synthetic import IDENTITY, TAGS, make_store
from xlsd_cache.store.reader import LatentStore

if TYPE_CHECKING:
    from xlsd_cache.dataset.batch_order import BatchOrder
    from xlsd_cache.planning.log_state import LogState
    from xlsd_cache.planning.plan import GenerationPlan

FAR = 100_000_000  # images, of the extended lines


@dataclass(frozen=True)
class ScaleConfig(JsonOption):
    """Measure what grows with the number of images."""

    rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Images in the store, in ascending order."""

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
    cpu_s: float
    peak_gb: float  # resident, mapped files included
    own_gb: float  # resident, without mapped files: what the kernel cannot reclaim
    details: str = ""


class Memory:
    """Time and peak memory of this process while the block runs; memory is sampled every 10 ms."""

    def __enter__(self) -> "Memory":
        self.peak_gb = self.own_gb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        ended = time.perf_counter(), time.process_time()
        self.seconds, self.cpu_s = np.subtract(ended, self.began).tolist()
        self._done.set()
        self._thread.join()

    def step(self, name: str, details: str) -> Step:
        """The measured block as a step."""
        return Step(name, self.seconds, self.cpu_s, self.peak_gb, self.own_gb, details)

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            info = process.memory_info()
            self.peak_gb = max(self.peak_gb, info.rss / 1e9)
            self.own_gb = max(self.own_gb, (info.rss - getattr(info, "shared", 0)) / 1e9)
            if self._done.wait(0.01):
                return


def main(config: ScaleConfig, command: Sequence[str]) -> None:
    """Print a row per step and number of images, then how they grow, then the targets."""
    report = Report("benchmarks/scale.py", command, machine("numpy", "pyarrow"))
    found = []
    for rows in config.rows:
        columns = f"{'step':<34}{'seconds':>10}{'CPU s':>10}{'peak GB':>10}{'own GB':>10}"
        print(f"\n{rows} images\n{columns}")
        found.append(measure(replace(config, rows=(rows,)), report))
    print(f"\n{'growth':<34}{'time':>10}{'memory':>10}{'100 M: CPU s':>16}{'own GB':>10}")
    for name in found[-1] if len(found) > 1 else ():
        growth(config.rows[-2:], [steps[name] for steps in found[-2:]], report)
    print()
    targets(found[-1], report)
    report.write(config.json)


def measure(config: ScaleConfig, report: Report) -> dict[str, Step]:
    """Every step with one number of images."""
    steps = {}
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        case = Case(config, Path(folder) / "latents")
        for take in (
            case.make, case.plan, case.again, case.index, case.open, case.epoch, case.resume,
            case.tag_index, case.tags, case.select, case.reads,
        ):  # fmt: skip
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                step = steps[take.__name__] = process.submit(take).result()
            times = f"{step.seconds:>10.3f}{step.cpu_s:>10.3f}"
            print(
                f"{step.name:<34}{times}{step.peak_gb:>10.2f}{step.own_gb:>10.2f}  {step.details}",
                flush=True,
            )
            report.add("step", rows=config.rows[0], **asdict(step))
    return steps


def growth(rows: Sequence[int], steps: Sequence[Step], report: Report) -> None:
    """Print and record the exponents of growth, and the line extended to FAR images."""
    few, many = rows
    ratio = log(many / few)
    exponents, far = [], []
    for was, now in zip(*((step.cpu_s, step.own_gb) for step in steps), strict=True):
        exponents.append(log(max(now, 1e-9) / max(was, 1e-9)) / ratio)
        far.append(now + (FAR - many) * (now - was) / (many - few))
    name = steps[0].name
    print(f"{name:<34}{exponents[0]:>10.2f}{exponents[1]:>10.2f}{far[0]:>16.0f}{far[1]:>10.1f}")
    report.add("growth", name=name, time=exponents[0], memory=exponents[1], cpu_s=far[0],
               own_gb=far[1])  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The steps. Each runs in its own process."""

    config: ScaleConfig
    root: Path

    @property
    def images(self) -> int:
        """Images in the store."""
        return self.config.rows[0]

    def make(self) -> Step:
        """Write the store, without its index."""
        with Memory() as memory:
            rows_per_shard = 4096 if self.images > 4_000_000 else 1024
            make_store(self.root, self.images, self.config.rows_per_shard or rows_per_shard)
        log_gb = sum(path.stat().st_size for path in self.root.rglob("*.parquet")) / 1e9
        shards = sum(1 for _ in self.root.glob("latents.zarr/*/c.*"))
        return memory.step("make the store", f"{shards} shards, a log of {log_gb:.2f} GB")

    def plan(self) -> Step:
        """Plan a new store of what a scan found, and write the plan."""
        from xlsd_cache.planning import plan
        from xlsd_cache.planning.log_state import read_log_state
        from xlsd_cache.store.manifest import Manifest

        scan = Scanned.of(self.root)
        vars(plan)["read_headers"] = scan.read_headers  # no image exists
        other = Manifest(self.root.parent / "planned")
        other.make_folders()
        with Memory() as memory:
            made = scan.plan(read_log_state(other, 1))
            other.write_plan(0, made.entries, made.removed, made.captions)
        assert made.fresh.sum() == self.images
        return memory.step("plan and write the plan", f"{made.entries.num_rows} images")

    def again(self) -> Step:
        """Plan again with nothing changed, which reads the log first."""
        from xlsd_cache.planning.log_state import read_log_state
        from xlsd_cache.store.manifest import Manifest

        scan = Scanned.of(self.root)
        with LatentStore.open(self.root) as store:
            rows_per_shard = store.rows_per_shard
        (self.root / "index.arrow").unlink()
        with Memory() as memory:
            state = read_log_state(Manifest(self.root), rows_per_shard)
            read_s = time.process_time() - memory.began[1]
            made = scan.plan(state)
        assert made.is_empty
        return memory.step("plan again, nothing changed", f"{read_s:.1f} s of it read the log")

    def index(self) -> Step:
        """Open the store for the first time, which makes the index from the log."""
        return self._open("open, making the index")

    def open(self) -> Step:
        """Open the store with its index."""
        return self._open("open")

    def _open(self, name: str) -> Step:
        with Memory() as memory, LatentStore.open(self.root) as store:
            pass
        size = (self.root / "index.arrow").stat().st_size / 1e9
        details = f"{len(store)} samples in {len(store.buckets)} buckets, index {size:.2f} GB"
        return memory.step(name, details)

    def epoch(self) -> Step:
        """Compute every batch of an epoch."""
        order = self._batch_order()
        with Memory() as memory:
            batches = order.batches(1)
            images = sum(len(order.slot(number).ordinals) for number in range(batches))
        return memory.step("plan an epoch", f"{images} samples in {batches} batches")

    def resume(self) -> Step:
        """Compute one batch in the middle of a run, as a resumed run does."""
        order = self._batch_order()
        with Memory() as memory:
            slot = order.slot(self.config.resume_at)
        details = f"number {self.config.resume_at}, due in epoch {slot.epoch:.2f}"
        return memory.step("plan a resumed run's batch", details)

    def _batch_order(self) -> "BatchOrder":
        # Imported late: it imports torch, whose memory would be counted in every step.
        from xlsd_cache.dataset.batch_order import BatchOrder

        with LatentStore.open(self.root) as store:
            sizes = {name: len(rows) for name, rows in store.buckets.items()}
        return BatchOrder(sizes, self.config.batch, 0)

    def tag_index(self) -> Step:
        """Query a tag for the first time, which makes the index of tags."""
        with LatentStore.open(self.root) as store, Memory() as memory:
            names = len(store.tags("txt").names)
        size = (self.root / "tags.txt.arrow").stat().st_size / 1e9
        details = f"{names} tags, index {size:.2f} GB"
        return memory.step("make the index of tags", details)

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
        return replace(memory.step("find a tag", details), seconds=max(seconds))

    def select(self) -> Step:
        """Select samples by two required and two forbidden tags, and make their batch order."""
        from xlsd_cache.dataset.batch_order import BatchOrder
        from xlsd_cache.dataset.selection import select
        from xlsd_train.data.selection import filter_by_tags

        require, forbid = (TAGS[0], TAGS[15]), (TAGS[1], TAGS[100])
        with LatentStore.open(self.root) as store:
            with Memory() as memory:
                selection = select(store, filter_by_tags(store, ["txt"], require, forbid).mask)
                BatchOrder(selection.sizes, self.config.batch, 0)
            wanted = np.flatnonzero(
                np.all([store.tagged("txt", tag) for tag in require], axis=0)
                & ~np.any([store.tagged("txt", tag) for tag in forbid], axis=0)
            )
            assert np.array_equal(selection.rows(store, np.arange(len(selection))), wanted)
        details = (
            f"{len(selection)} samples have {' and '.join(require)}, not {' nor '.join(forbid)}"
        )
        return memory.step("select samples by four tags", details)

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
        return replace(memory.step("read from all shards", details), seconds=seconds[0])


@dataclass(frozen=True)
class Scanned:
    """What a scan of the images of a store would find, and what reading their headers would."""

    images: pa.Table  # IMAGES
    captions: pa.Table  # CAPTIONS
    headers: pa.Table  # probe.HEADERS

    @classmethod
    def of(cls, root: Path) -> "Scanned":
        """As the store's log has them."""
        import pyarrow.parquet as pq

        from xlsd_cache.planning.probe import HEADERS
        from xlsd_cache.schema import IMAGES

        log = pq.read_table(root / "manifest" / "plan" / "000000.parquet")
        captions = pq.read_table(root / "captions" / "base.parquet")
        count = log.num_rows
        nothing, unknown = pa.repeat("", count), pa.nulls(count, pa.string())
        extra = {"url": unknown, "reason": nothing, "detail": nothing}
        columns = {name: log[name] if name in log.column_names else extra[name]
                   for name in IMAGES.names} | extra  # fmt: skip
        head = pa.array(np.arange(count)).cast(pa.string())  # no two files are equal
        headers = {
            "width": log["width"], "height": log["height"], "reason": nothing, "detail": nothing,
            "head": head,
        }  # fmt: skip
        return cls(pa.table(columns, IMAGES).combine_chunks(), captions, pa.table(headers, HEADERS))

    def read_headers(self, files: pa.Table, *_: object) -> pa.Table:
        """The headers of all images, in their order."""
        assert files.num_rows in {0, len(self.headers)}
        return self.headers.slice(0, files.num_rows)

    def plan(self, state: "LogState") -> "GenerationPlan":
        """The next generation of a store with this log."""
        from xlsd_cache.images.buckets import Buckets
        from xlsd_cache.planning.plan import make_plan

        buckets = Buckets.make(IDENTITY.buckets, IDENTITY.resolution, 4.0, True)
        return make_plan(self.images, self.captions, ("txt",), state, buckets, 1)


def targets(steps: dict[str, Step], report: Report) -> None:
    """The targets for ten million images."""
    for name in ("plan", "again", "index"):
        report.target(f"GB to {steps[name].name}", steps[name].own_gb, most=24.0)
    report.target("s to open", steps["open"].seconds, most=3.0)
    report.target("GB to open", steps["open"].peak_gb, most=1.0)
    report.target("s to plan an epoch", steps["epoch"].seconds, most=3.0)
    report.target("s to find a tag", steps["tags"].seconds, most=0.1)
    report.target("s to select", steps["select"].seconds, most=1.0)


if __name__ == "__main__":
    run_script(main, ScaleConfig, __doc__)
