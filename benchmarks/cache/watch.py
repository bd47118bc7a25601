"""`xlsd-cache watch` next to a folder in which something happens all the time, and kills.

    python benchmarks/cache/watch.py --minutes 10 --per-second 20

Images are added, changed, renamed and deleted, some written in two parts, some with a caption that
comes later. The watcher is killed (SIGKILL) four times before its memory is measured, and once at
the end. Then the store must equal a fresh build of the same folder: keys, content hashes, captions,
latents bit for bit, and sums.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import psutil

from benchmarks.lib.churn import Churn, difference, sums
from benchmarks.lib.commands import run_command
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.cli import main as xlsd_cache

ROOT = Path(__file__).parents[2]
VAE = ROOT / "benchmarks" / "demo" / "vae"
OPTIONS = ("--vae", str(VAE), "--buckets", "64x64,128x64", "--batch", "1", "--workers", "2")
MOST_MIB = 20.0  # by which memory may grow


@dataclass(frozen=True)
class WatchBenchmarkConfig(JsonOption):
    """Measure `xlsd-cache watch`."""

    minutes: float = 10.0
    """How long things happen."""

    per_second: float = 20.0
    """How many of them a second."""

    kills: int = 5
    """SIGKILLs, each after the watcher has begun to work."""

    min_new: int = 64
    """As in xlsd-cache watch."""

    max_wait: str = "10s"
    """As in xlsd-cache watch."""

    seed: int = 0
    """Of what happens."""


@dataclass
class Watched:
    """The watcher of a folder, in a process of its own."""

    words: list[str]
    log: Path
    status_file: Path

    def __post_init__(self) -> None:
        self.memory: list[tuple[float, float, float]] = []  # seconds, MiB of main, of all
        self.process = self._start()

    def _start(self) -> psutil.Popen:
        with self.log.open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            words = [sys.executable, "-m", "xlsd_cache", *self.words]
            return psutil.Popen(words, stdout=log, stderr=log, env=environment)

    def status(self) -> dict[str, Any]:
        """Of this process; empty before it has told any."""
        try:
            told: dict[str, Any] = json.loads(self.status_file.read_text())
        except FileNotFoundError:
            return {}
        return told if told["pid"] == self.process.pid else {}

    def wait_for(self, seconds: float, **fields: Any) -> bool:
        """Until the status has these values."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            told = self.status()
            if told and all(told[name] == value for name, value in fields.items()):
                return True
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.05)
        return False

    def kill(self) -> None:
        """Kill it, and start it again; what it started ends by itself."""
        self.end()
        self.process = self._start()

    def end(self) -> None:
        """Kill it, if it runs."""
        with suppress(psutil.NoSuchProcess):
            self.process.kill()
        self.process.wait()

    def measure(self, at_s: float) -> None:
        """Note the resident memory."""
        try:
            main = self.process.memory_info().rss / 2**20
            all_of = [self.process, *self.process.children(recursive=True)]
            self.memory.append((at_s, main, sum(it.memory_info().rss for it in all_of) / 2**20))
        except psutil.NoSuchProcess:  # a child that ended
            pass


def main(config: WatchBenchmarkConfig, command: Sequence[str]) -> int:
    """Print what happened, memory, and whether the stores are equal."""
    report = Report("benchmarks/cache/watch.py", command, machine("pyarrow", "torch"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, out = folder / "images", folder / "latents"
        churn = Churn(images, config.seed)
        churn.run(1.0, config.per_second)
        words = ["watch", str(images), "--out", str(out), *OPTIONS, "--every", "5", "--settle", "1"]
        words += ["--min-new", str(config.min_new), "--max-wait", config.max_wait, "--quiet"]
        watched = Watched(words, folder / "log", out / "status.json")
        try:
            _run(config, churn, watched)
            if not _settled(watched):
                report.add("failed", status=watched.status())
            watched.process.send_signal(signal.SIGTERM)
            code = watched.process.wait(120)
        finally:
            watched.end()
        fresh = folder / "fresh"
        run_command(xlsd_cache, "build", images, "--out", fresh, *OPTIONS)
        return _report(config, report, churn, watched, (out, fresh), code)


def _run(config: WatchBenchmarkConfig, churn: Churn, watched: Watched) -> None:
    """Let things happen for the time, with kills; note memory from then on that these are over."""
    seconds, begun = 60 * config.minutes, time.monotonic()
    churning = Thread(target=churn.run, args=(seconds, config.per_second))
    churning.start()
    until_s = min(60.0, seconds / 4)  # a process warms up for its first generations
    for number in range(config.kills - 1):
        watched.wait_for(60, state="encoding" if number % 2 else "planning")
        time.sleep(churn.pause(0.3))
        watched.kill()
        time.sleep(max(0.0, begun + until_s * (number + 1) / config.kills - time.monotonic()))
    while churning.is_alive():
        watched.measure(time.monotonic() - begun)
        churning.join(1.0)
    if config.kills:
        watched.wait_for(60, state="encoding")
        watched.kill()


def _settled(watched: Watched) -> bool:
    """Wait until the watcher has seen all, twice."""
    for _ in range(2):
        time.sleep(6.0)  # a pass, and files are quiet
        if not watched.wait_for(240, state="idle", waiting=0, unsettled=0):
            return False
    return True


def _report(
    config: WatchBenchmarkConfig, report: Report, churn: Churn, watched: Watched,
    stores: tuple[Path, Path], code: int,
) -> int:  # fmt: skip
    happened = ", ".join(f"{name} {count}" for name, count in sorted(churn.done.items()))
    report.fact("happened", happened)
    told = watched.status()
    report.fact("last status", json.dumps({k: told[k] for k in ("generation", "sums", "state")}))
    odd = difference(*stores)
    print(f"difference from a fresh build: {odd or 'none'}")
    left, right = map(sums, stores)
    print(f"sums: {left}" + ("" if left == right else f", of the fresh build: {right}"))
    report.add("equal", difference=odd, sums=left, fresh=right, exit_code=code)
    report.target("stores differ, or sums, or the exit status", bool(odd or left != right or code),
                  most=0)  # fmt: skip
    begin, end = min(120.0, 30 * config.minutes), 60 * config.minutes
    window = max(5.0, (end - begin) / 16)
    for place, what in ((1, "the main process"), (2, "all processes")):
        sampled = [(it[0], it[place]) for it in watched.memory]
        before = [mib for at, mib in sampled if begin <= at < begin + window]
        after = [mib for at, mib in sampled if at >= end - window]
        if before and after:
            grown = statistics.median(after) - statistics.median(before)
            print(f"memory of {what}: {statistics.median(before):.0f} MiB, then {grown:+.1f}")
            report.target(f"MiB by which {what} grew", grown, most=MOST_MIB)
    for at, main_mib, all_mib in watched.memory[:: max(1, len(watched.memory) // 60)]:
        report.add("memory", at_s=at, main_mib=main_mib, all_mib=all_mib)
    report.write(config.json)
    return int(bool(odd or left != right or code))


if __name__ == "__main__":
    run_script(main, WatchBenchmarkConfig, __doc__)
