"""`xlsd-train live`: what following a run costs the server and the browser.

python benchmarks/train/live.py

refresh: the server's CPU time and the bytes that it reads for a page, in runs of three lengths.
open: a page left open: Chromium's JavaScript heap over many refreshes, and the server's memory
over many events.
"""

import json
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

from benchmarks.lib.live import browsing, get, serving
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.train.report import make_run
from xlsd_train.runs.layout import CONFIG, METRICS_LOG, grid_of

Part = Literal["refresh", "open"]
LINE = {"loss": 0.25, "lr": 5e-6, "lr_effective": 5e-6, "grad_norm": 0.5, "images_per_s": 20.5}
# Timers of the page end early, so that its pauses between refreshes need not be waited for.
HASTE = "{ const it = setTimeout; window.setTimeout = (f, t) => it(f, Math.min(t, 10)); }"


@dataclass(frozen=True)
class LiveBenchmark(JsonOption):
    """Measure what following a run costs server and browser."""

    part: tuple[Part, ...] = ("refresh", "open")
    """What to measure."""

    steps: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    """refresh: steps of the runs."""

    repeat: int = 10
    """refresh: pages of each run, each after one more step."""

    refreshes: int = 2_000
    """open: refreshes of the page, each after ten steps."""

    events: int = 100_000
    """open: events that the server sends."""


def main(config: LiveBenchmark, arguments: Sequence[str]) -> None:
    """Measure and print."""
    report = Report("benchmarks/train/live.py", arguments, machine("playwright", "uvicorn"))
    parts = {"refresh": measure_refresh, "open": measure_open}
    for part in config.part:
        with tempfile.TemporaryDirectory() as folder:
            parts[part](config, report, Path(folder))
    report.write(config.json)


def measure_refresh(config: LiveBenchmark, report: Report, folder: Path) -> None:
    """CPU seconds and bytes read by the server, for the first page and for later ones."""
    costs = []
    print(f"{'steps':>9}{'first s':>9}{'first MB':>10}{'next s':>9}{'next MB':>9}{'MiB':>7}")
    for steps in config.steps:
        run = folder / str(steps)
        make_run(run, steps, min(2000, steps // 100 * 8))
        with serving(run) as (url, server):
            first = cost(server, url)
            later = []
            for step in range(steps + 1, steps + 1 + config.repeat):
                append(run, step)
                later.append(cost(server, url))
            seconds, nbytes = np.median(later, axis=0)
            started = sum(server.cpu_times()[:2]) - sum(it[0] for it in [first, *later])
            mib = server.memory_info().rss / 2**20
        row = {
            "steps": steps, "first_s": started + first[0], "next_s": float(seconds),
            "next_bytes": float(nbytes), "log_bytes": (run / METRICS_LOG).stat().st_size,
            "rss_mib": mib,
        }  # fmt: skip
        report.add("refresh", **row)
        print(
            f"{steps:9}{row['first_s']:9.2f}{row['log_bytes'] / 1e6:10.1f}{seconds:9.2f}"
            f"{nbytes / 1e6:9.2f}{mib:7.0f}"
        )
        costs.append(float(seconds))
        shutil.rmtree(run)
    what = f"CPU of a refresh after {config.steps[-1]:,} steps over one after {config.steps[0]:,}"
    report.target(what, costs[-1] / costs[0], most=3)


def measure_open(config: LiveBenchmark, report: Report, folder: Path) -> None:
    """The browser's heap over refreshes, and the server's memory over events."""
    run = folder / "run"
    make_run(run, 1000, 80)
    record = json.loads((run / CONFIG).read_text()) | {"planned_steps": 10**9}
    (run / CONFIG).write_text(json.dumps(record))
    step, heaps, tenth = 1000, {}, max(1, config.refreshes // 10)
    with serving(run, "it.POLL_S = 0.01") as (url, _), browsing(url, HASTE) as page:
        protocol = page.context.new_cdp_session(page)
        protocol.send("Performance.enable")
        for n in range(1, config.refreshes + 1):
            append(run, *range(step + 1, step + 11))
            step += 10
            page.wait_for_function(
                "step => document.querySelector('#now progress').value >= step", arg=step
            )
            if n % tenth == 0:
                heaps[n] = heap(protocol)
                print(f"refresh {n}: {heaps[n][0]:.2f} MiB of JavaScript, {heaps[n][1]} elements")
    (first, *_), (last, *_) = heaps[tenth], heaps[max(heaps)]
    report.add("browser", refreshes=config.refreshes, first_mib=first, last_mib=last)
    report.target("MiB that the page's heap grew after the first tenth", last - first, most=5)
    sizes = dict(send(run, step, config.events))
    for n, mib in sizes.items():
        report.add("server", events=n, rss_mib=mib)
        print(f"event {n}: {mib:.1f} MiB of the server")
    grown = sizes[max(sizes)] - sizes[min(sizes)]
    report.target("MiB that the server grew after the first 1%", grown, most=20)


def send(run: Path, step: int, events: int) -> Iterator[tuple[int, float]]:
    """(events, MiB of the server) while it sends that many to a reader."""
    with serving(run, "it.POLL_S = 0") as (url, server):
        begin = get(url).decode().partition('"live": {"from": "')[2].partition('"')[0]
        with urllib.request.urlopen(f"{url}events?from={begin}", timeout=60) as answer:
            for n in range(1, events + 1):
                with (run / METRICS_LOG).open("a") as log:
                    log.write(line(step + n))
                while not answer.readline().startswith(b"data: "):
                    pass
                if n in {max(1, events // 100), events}:
                    yield n, server.memory_info().rss / 2**20


def heap(protocol: Any) -> tuple[float, int]:
    """(MiB of JavaScript, elements) after a garbage collection."""
    protocol.send("HeapProfiler.collectGarbage")
    found = {it["name"]: it["value"] for it in protocol.send("Performance.getMetrics")["metrics"]}
    return found["JSHeapUsedSize"] / 2**20, int(found["Nodes"])


def line(step: int) -> str:
    """A line of the log."""
    return json.dumps({"step": step, "images_seen": 32 * step, "epoch": step / 2800, **LINE}) + "\n"


def append(run: Path, *steps: int) -> None:
    """Log steps, and let samples be drawn."""
    with (run / METRICS_LOG).open("a") as log:
        log.writelines(line(step) for step in steps)
    grid_of(run).touch()


def cost(server: psutil.Process, url: str) -> tuple[float, float]:
    """(CPU seconds, bytes read) of the server for its page."""
    before, read = sum(server.cpu_times()[:2]), server.io_counters().read_chars
    get(url)
    return sum(server.cpu_times()[:2]) - before, server.io_counters().read_chars - read


if __name__ == "__main__":
    run_script(main, LiveBenchmark, __doc__)
