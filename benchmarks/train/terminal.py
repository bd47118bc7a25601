"""What a terminal shows of a short run: the longest time without a visible change, and the ETA.

The demo's model is trained on the demo's photos in a real terminal of 100 columns, with samples,
validation and checkpoints at every fourth of the run. Everything from the command's start counts.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from select import select
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import xlsd_cache.cli
from benchmarks.demo.photos import write_photos
from benchmarks.demo.pipeline import Size, make_pipeline, read_captions
from benchmarks.lib.commands import run_command
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.lib.terminal import start
from xlsd_cache.errors import UserError

COLUMNS = 100
LEFT = re.compile(r"step (\d+)/\d+, (?:(\d+):)?(\d+):(\d\d) left")
State = tuple[float, str]  # seconds since the start, the line that is shown from then on


@dataclass(frozen=True, kw_only=True)
class TerminalBenchmark(JsonOption):
    """Measure what a terminal shows of a short run."""

    size: Size = "demo"
    """The model."""

    steps: int = 40
    """Steps of the run."""

    sample_steps: int = 20
    """Denoising steps per sample."""


def show(command: Sequence[str]) -> tuple[list[State], float]:
    """Run a command in a terminal; its different lines, and how long it took."""
    begun, shown, states = time.perf_counter(), b"", [(0.0, "")]
    process, outer = start(command, COLUMNS)
    while process.poll() is None or select([outer], [], [], 0)[0]:
        if not select([outer], [], [], 0.02)[0]:
            continue
        try:
            shown += os.read(outer, 1 << 16)
        except OSError:  # the terminal's other end is closed
            break
        *whole, shown = re.split(rb"[\r\n]+", shown)
        for line in (it.decode(errors="replace").strip() for it in (*whole, shown)):
            if line and line != states[-1][1]:
                states.append((time.perf_counter() - begun, line))
    os.close(outer)
    if code := process.wait():
        raise UserError(f"the run ended with code {code}: {states[-1][1]}")
    return states, time.perf_counter() - begun


def errors(states: Sequence[State], took: float, after: int) -> list[float]:
    """Of each time left that was shown after a step, its error as a share of what was left.

    The last 5 s are left out, since whole seconds are shown.
    """
    found = []
    for at, line in states:
        if (left := LEFT.search(line)) and int(left[1]) > after and took - at > 5:
            told = int(left[2] or 0) * 3600 + int(left[3]) * 60 + int(left[4])
            found.append(abs(told - (took - at)) / (took - at))
    return found


def main(config: TerminalBenchmark, arguments: Sequence[str]) -> None:
    """Measure and print."""
    report = Report("benchmarks/train/terminal.py", arguments, machine("tqdm"))
    with tempfile.TemporaryDirectory() as name:
        folder, every = Path(name), max(1, config.steps // 4)
        write_photos(folder / "photos")
        make_pipeline(folder / "model", config.size, read_captions(folder / "photos"))
        run_command(
            xlsd_cache.cli.main, "build", folder / "photos", "--out", folder / "latents",
            "--resolution", 128, "--vae", folder / "model" / "vae",
        )  # fmt: skip
        words = [
            "--phase", "unet", "--data", folder / "latents", "--model", folder / "model",
            "--batch", 4, "--steps", config.steps, "--lr", 1e-4, "--warmup", 0, "--out",
            folder / "run", "--sample-every", every, "--sample-steps", config.sample_steps,
            "--validate-every", every, "--validation-fraction", 0.4, "--save-every", every,
        ]  # fmt: skip
        states, took = show([sys.executable, "-m", "xlsd_train", *map(str, words)])
    ends = [at for at, _ in states[1:]] + [took]
    gaps = [(end - at, line) for (at, line), end in zip(states, ends, strict=True)]
    for gap, line in sorted(gaps, reverse=True)[:5]:
        print(f"{gap:6.2f} s  {line or '(nothing yet)'}")
        report.add("unchanged", seconds=gap, line=line)
    wrong = errors(states, took, every)
    print(f"{took:.0f} s in all, {len(states)} states; the time left was shown {len(wrong)} times")
    report.target("seconds without a visible change", max(gap for gap, _ in gaps), most=2)
    if wrong:
        report.target("median error of the time left after a pause", median(wrong), most=0.2)
        report.add("time left", median=median(wrong), worst=max(wrong), shown=len(wrong))
    report.write(config.json)


if __name__ == "__main__":
    run_script(main, TerminalBenchmark, __doc__)
