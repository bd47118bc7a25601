"""`xlsd-train live`: what following a run costs the run, the server, and the browser.

python benchmarks/train/live.py

refresh: the server's CPU time and the bytes that it reads for a page, in runs of three lengths.
followed: a small model trains on this CPU, alone and with a server and a page that follows it, in
turns in one run; then the same run with nobody looking.
open: a page left open: Chromium's JavaScript heap over many refreshes, and the server's memory
over many events.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

from benchmarks.demo.photos import write_photos
from benchmarks.demo.pipeline import make_pipeline, read_captions
from benchmarks.lib.commands import run_command
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.train.report import make_run
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.errors import UserError
from xlsd_train.runs.layout import CONFIG, METRICS_LOG, checkpoints, grid_of

Part = Literal["refresh", "followed", "open"]
LINE = {"loss": 0.25, "lr": 5e-6, "lr_effective": 5e-6, "grad_norm": 0.5, "images_per_s": 20.5}
# Timers of the page end early, so that its pauses between refreshes need not be waited for.
HASTE = "{ const it = setTimeout; window.setTimeout = (f, t) => it(f, Math.min(t, 10)); }"


@dataclass(frozen=True)
class LiveBenchmark(JsonOption):
    """Measure what following a run costs."""

    part: tuple[Part, ...] = ("refresh", "followed", "open")
    """What to measure."""

    steps: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    """refresh: steps of the runs."""

    repeat: int = 10
    """refresh: pages of each run, each after one more step."""

    blocks: int = 10
    """followed: blocks of four windows: alone, followed, followed, alone."""

    window: int = 60
    """followed: steps of a window."""

    every: int = 50
    """followed: steps between samples, and between validations; the page is fetched after each."""

    refreshes: int = 2_000
    """open: refreshes of the page, each after ten steps."""

    events: int = 100_000
    """open: events that the server sends."""


def main(config: LiveBenchmark, arguments: Sequence[str]) -> None:
    """Measure and print."""
    if not chromium():
        raise UserError("there is no Chromium; install it, e.g. `apt-get install chromium`")
    report = Report("benchmarks/train/live.py", arguments, machine("playwright", "uvicorn"))
    parts = {"refresh": measure_refresh, "followed": measure_followed, "open": measure_open}
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


def measure_followed(config: LiveBenchmark, report: Report, folder: Path) -> None:
    """Images/s with and without a page, in turns in one run, and the bits of its checkpoint."""
    write_photos(folder / "images")
    make_pipeline(folder / "model", "nano", read_captions(folder / "images"))
    vae = folder / "model/vae"
    size = ("--resolution", 128, "--batch", 4)
    run_command(
        xlsd_cache, "build", folder / "images", "--out", folder / "store", "--vae", vae, *size
    )
    run, plain = folder / "run", folder / "plain"
    given = [
        "--phase", "unet", "--batch", 4, "--data", folder / "store", "--model", folder / "model",
        "--steps", 10**6, "--warmup", 0, "--lr", 1e-4, "--threads", 1, "--sample-steps", 1,
        "--sample-every", config.every, "--validate-every", config.every,
        "--validation-fraction", 0.4, "--keep", 1, "--save-every", 10**6, "--quiet",
    ]  # fmt: skip
    training = train(*given, "--out", run)
    windows: list[tuple[bool, int, int]] = []
    looked = contextlib.ExitStack()
    try:
        wait(run, 10)
        for followed in [False, True, True, False] * config.blocks:
            if followed != bool(windows and windows[-1][0]):
                looked.close()
                if followed:
                    url, _ = looked.enter_context(serving(run))
                    looked.enter_context(browsing(url))
            begin = wait(run, 5, more=True)
            windows.append((followed, begin, wait(run, config.window, more=True)))
    finally:
        looked.close()
        training.send_signal(signal.SIGTERM)
    if training.wait():
        raise UserError("the training failed; its error is above")
    step = len(lines(run))
    if train(*given, "--stop-after", step, "--out", plain).wait():
        raise UserError("the training without a page failed; its error is above")
    logged = lines(run)
    rates = [rate(logged[begin:end]) for _, begin, end in windows]
    ratios = [pair for i in range(0, len(rates), 4) for pair in (
        rates[i + 1] / rates[i], rates[i + 2] / rates[i + 3])]  # fmt: skip
    logs = np.log(ratios)
    draws = np.random.default_rng(0).integers(0, len(logs), (10_000, len(logs)))
    low, high = np.exp(np.quantile(logs[draws].mean(axis=1), [0.025, 0.975]))
    mean = float(np.exp(logs.mean()))
    ends = [checkpoints(folder)[-1] for folder in (run, plain)]
    same = all(
        (ends[0] / path.relative_to(ends[1])).read_bytes() == path.read_bytes()
        for path in ends[1].rglob("*.safetensors")
    )
    report.add("followed", ratio=mean, low=float(low), high=float(high), pairs=len(logs), step=step)
    print(
        f"images/s followed / alone: {mean:.4f} (95% interval {low:.4f} to {high:.4f}), "
        f"{len(logs)} pairs of {config.window} steps; weights of step {step} equal: {same}"
    )
    report.target("images/s followed / alone", mean, least=0.99)
    report.target("weights that differ from a run that nobody follows", float(not same), most=0)


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


def rate(logged: Sequence[dict[str, float]]) -> float:
    """Images/s of logged steps after the first, without the pauses between them."""
    images = np.diff([it["images_seen"] for it in logged])
    return float(images.sum() / (images / [it["images_per_s"] for it in logged[1:]]).sum())


def lines(run: Path) -> list[dict[str, float]]:
    """The metrics so far."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(it) for it in (run / METRICS_LOG).read_text().splitlines()]
    return []


def wait(run: Path, steps: int, more: bool = False) -> int:
    """Wait for this many (`more`) steps; return how many there are."""
    log, found = run / METRICS_LOG, 0
    wanted = steps + (log.read_bytes().count(b"\n") if more else 0)
    while found < wanted:
        time.sleep(0.1)
        found = log.read_bytes().count(b"\n") if log.exists() else 0
    return found


def train(*words: object) -> "subprocess.Popen[bytes]":
    """Start a training."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xlsd_train", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


@contextmanager
def serving(run: Path, code: str = "") -> Iterator[tuple[str, psutil.Process]]:
    """`xlsd-train live` in a process of its own, which runs `code` on its module `follow`."""
    program = f"import sys, xlsd_train.cli, xlsd_train.live.follow as it; {code}"
    program += "\nsys.exit(xlsd_train.cli.main())"
    words = [sys.executable, "-c", program, "live", str(run), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().decode().strip(), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


@contextmanager
def browsing(url: str, first: str = "") -> Iterator[Page]:
    """Chromium with the page, which runs the script `first` before its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        if first:
            page.add_init_script(first)
        page.goto(url)
        yield page
        browser.close()


def chromium() -> str | None:
    """The browser that the system has."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def get(url: str) -> bytes:
    """The page."""
    with urllib.request.urlopen(url, timeout=600) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    run_script(main, LiveBenchmark, __doc__)
