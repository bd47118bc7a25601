"""The page of a large store: time and memory of `xlsd-cache report`, and the page's size.

The store is synthetic: few distinct latents, 100 buckets, 10,000 tags, thousands of rejected
images. Pictures are decoded with the VAE of `make demo`, which is much smaller than SDXL's. What
decoding costs depends on the VAE, so it has no target.
"""

import multiprocessing
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.lib.synthetic import make_store
from benchmarks.scale import Memory, Step
from xlsd_cache.building.finish import conclude
from xlsd_cache.store.view import StoreView

VAE = Path(__file__).parents[1] / "demo" / "vae"
SIDES = range(384, 704, 32)  # of 100 buckets


@dataclass(frozen=True, kw_only=True)
class StoreReportBenchmark(JsonOption):
    """Measure the page of a large store."""

    rows: int = 1_000_000
    """Images in the store."""

    rejected: int = 5_000
    """Images that were rejected."""

    count: int = 48
    """Pictures on the page."""


def make(root: Path, rows: int, rejected: int) -> None:
    """Write the store, and what a build derives at its end."""
    # The measured process imports this file, and `xlsd-cache report --count 0` loads no torch.
    from xlsd_cache.encoding.compatibility import identity_of
    from xlsd_cache.encoding.vae import load_vae

    settings = {
        "dtype": "float16", "precision": "fp32", "preprocessing": 1, "resolution": 512,
        "buckets": "aspect", "max_ratio": 2.5, "upscale": False,
    }  # fmt: skip
    identity = identity_of(load_vae(str(VAE)), **settings)
    shares = {f"{width}x{height}": 0.01 for width in SIDES for height in SIDES}
    make_store(root, rows, 1024, identity=identity, shares=shares, readable=True, rejected=rejected)
    conclude(StoreView.open(root), frozenset())


def measure(store: Path, count: int) -> Step:
    """Time and memory of `xlsd-cache report`, to be called in a process of its own."""
    with Memory() as memory:
        from xlsd_cache.commands.report import report  # counted: it takes seconds
        from xlsd_cache.options.inspection import StoreReportOptions

        report(StoreReportOptions(store=store, count=count))
    return memory.step(f"{count} pictures", "")


def main(config: StoreReportBenchmark, arguments: Sequence[str]) -> None:
    """Measure and print."""
    report = Report("benchmarks/cache/report.py", arguments, machine("torch", "pyarrow", "pillow"))
    steps = []
    print(f"\n{'page with':<14}{'seconds':>10}{'CPU s':>10}{'peak GB':>10}{'own GB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "latents"
        make(root, config.rows, config.rejected)
        for count in (0, config.count):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                step = process.submit(measure, root, count).result()
            costs = f"{step.seconds:>10.1f}{step.cpu_s:>10.1f}"
            print(f"{step.name:<14}{costs}{step.peak_gb:>10.2f}{step.own_gb:>10.2f}", flush=True)
            report.add("step", **asdict(step))
            steps.append(step)
        html = (root / "report.html").read_bytes()
    pictures = sum(map(len, re.findall(rb"data:image[^\"]*", html)))
    print()
    report.target("MB beyond the pictures", (len(html) - pictures) / 1e6, most=0.5)
    report.target("seconds without pictures", steps[0].seconds, most=15)
    report.target("own GB without pictures", steps[0].own_gb, most=0.5)
    report.write(config.json)


if __name__ == "__main__":
    run_script(main, StoreReportBenchmark, __doc__)
