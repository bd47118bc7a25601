"""`xlsd-train live`: what following a run costs the run.

python benchmarks/train/followed.py

A small model trains on one core, in turns alone, with a server and a page in Chromium that follows
it, and beside a loop that computes for as long as those two did: what any other program of that
load costs on this machine. Then the same run with nobody looking, for the bits of its checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

from benchmarks.demo.photos import write_photos
from benchmarks.demo.pipeline import make_pipeline, read_captions
from benchmarks.lib.commands import run_command
from benchmarks.lib.live import browsing, serving
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.errors import UserError
from xlsd_train.runs.layout import METRICS_LOG, checkpoints

TURNS = ("alone", "followed", "busy", "busy", "followed", "alone")
SETTLE = 20  # steps after a browser was opened or closed
BUSY = """
import sys, time
share = float(sys.argv[1])
while True:
    end = time.process_time() + share / 2
    while time.process_time() < end:
        pass
    time.sleep((1 - share) / 2)
"""


class Window(NamedTuple):
    """Steps of the run, by their lines in its log, and the load beside it."""

    beside: str
    begin: int
    end: int
    cores: float


@dataclass(frozen=True)
class FollowedBenchmark(JsonOption):
    """Measure what following a run costs it."""

    blocks: int = 8
    """Blocks of windows: alone, followed, busy, busy, followed, alone."""

    window: int = 150
    """Steps of a window."""

    every: int = 600
    """Steps between samples, and between validations; the page is fetched after each."""


def main(config: FollowedBenchmark, arguments: Sequence[str]) -> None:
    """Measure and print."""
    report = Report("benchmarks/train/followed.py", arguments, machine("playwright", "uvicorn"))
    with tempfile.TemporaryDirectory() as folder:
        measure(config, report, Path(folder))
    report.write(config.json)


def measure(config: FollowedBenchmark, report: Report, folder: Path) -> None:
    """Images/s in turns in one run, and the bits of its checkpoint."""
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
    windows: list[Window] = []
    try:
        wait(run, 2 * SETTLE)
        for beside in TURNS * config.blocks:
            with company(beside, run, mean_cores(windows, "followed")):
                wait(run, SETTLE, more=True)
                windows.append(observe(training, beside, run, config.window))
    finally:
        training.send_signal(signal.SIGTERM)
    if training.wait():
        raise UserError("the training failed; its error is above")
    step = len(lines(run))
    if train(*given, "--stop-after", step, "--out", plain).wait():
        raise UserError("the training without a page failed; its error is above")
    ratios = compare(report, windows, lines(run))
    report.target("images/s followed / alone", ratios["followed"], least=0.99)
    ends = [checkpoints(folder)[-1] for folder in (run, plain)]
    differ = sum(
        (ends[0] / path.relative_to(ends[1])).read_bytes() != path.read_bytes()
        for path in ends[1].rglob("*.safetensors")
    )
    what = f"files of weights at step {step} that differ from a run that nobody follows"
    report.target(what, differ, most=0)


def compare(
    report: Report, windows: Sequence[Window], logged: Sequence[dict[str, float]]
) -> dict[str, float]:
    """What runs beside -> images/s over those alone: the geometric mean over half-blocks."""
    half = len(TURNS) // 2
    halves = [
        {it.beside: rate(logged[it.begin : it.end]) for it in windows[i : i + half]}
        for i in range(0, len(windows), half)
    ]
    ratios = {}
    for beside in ("followed", "busy"):
        logs = np.log([it[beside] / it["alone"] for it in halves])
        draws = np.random.default_rng(0).integers(0, len(logs), (10_000, len(logs)))
        low, high = np.exp(np.quantile(logs[draws].mean(axis=1), [0.025, 0.975]))
        ratios[beside] = float(np.exp(logs.mean()))
        row = {"low": float(low), "high": float(high), "pairs": len(logs)}
        cores = mean_cores(windows, beside)
        report.add("followed", beside=beside, ratio=ratios[beside], **row, cores=cores)
        print(
            f"images/s {beside} / alone: {ratios[beside]:.4f} (95% interval {low:.4f} to "
            f"{high:.4f}), {len(logs)} pairs of windows; {cores:.1%} of a core beside the run"
        )
    return ratios


def observe(training: "subprocess.Popen[bytes]", beside: str, run: Path, steps: int) -> Window:
    """A window of steps, with the CPU time of all that this process started but the training."""
    begun, used, begin = time.monotonic(), cpu_s(training.pid), wait(run, 0, more=True)
    end = wait(run, steps, more=True)
    return Window(beside, begin, end, (cpu_s(training.pid) - used) / (time.monotonic() - begun))


def cpu_s(but: int) -> float:
    """CPU seconds so far of this process's descendants, but one and its own."""
    left = {but, *(it.pid for it in psutil.Process(but).children(recursive=True))}
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:2]) if process.pid not in left else 0
    return seconds


def mean_cores(windows: Sequence[Window], beside: str) -> float:
    """The mean load of such windows; 0 without any."""
    return float(np.mean([it.cores for it in windows if it.beside == beside] or [0]))


@contextmanager
def company(beside: str, run: Path, cores: float) -> Iterator[None]:
    """What runs beside the training; a busy loop has this load."""
    if beside == "followed":
        with serving(run) as (url, _), browsing(url):
            yield
    elif beside == "busy":
        with subprocess.Popen([sys.executable, "-c", BUSY, str(cores)]) as process:
            try:
                yield
            finally:
                process.terminate()
    else:
        yield


def rate(logged: Sequence[dict[str, float]]) -> float:
    """Images/s of logged steps after the first, without the pauses between them."""
    images = np.diff([it["images_seen"] for it in logged])
    return float(images.sum() / (images / [it["images_per_s"] for it in logged[1:]]).sum())


def lines(run: Path) -> list[dict[str, float]]:
    """The metrics so far."""
    with suppress(FileNotFoundError):
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


if __name__ == "__main__":
    run_script(main, FollowedBenchmark, __doc__)
