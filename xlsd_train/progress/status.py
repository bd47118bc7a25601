"""What a run tells: a bar that says what goes on, and a line and an event for each result.

It is made before torch is loaded. Of several processes only the first one tells anything.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlsd_cache.console.progress import (
    LINE_S,
    draws_bars,
    event,
    progress_bar,
    ticking,
    writes_events,
)
from xlsd_cache.console.terminal import say
from xlsd_train.config.train import TrainConfig
from xlsd_train.progress.time_left import TimeLeft
from xlsd_train.runs.layout import losses_of, samples_of
from xlsd_train.runs.validation_log import HELD_OUT, LIVE, TRAINING

if TYPE_CHECKING:
    from xlsd_train.progress.events import Events
    from xlsd_train.step.distributed import Progress

log = logging.getLogger("xlsd.train.progress")

TRAINS, ENDS = "training", ("done", "stopped")
STEPS = 20  # latest steps, whose mean is the loss shown
SHORT_S = 1.0  # how long something lasts before its seconds are shown
NARROW, BAR = 60, 16  # columns: of a terminal without a bar, of the bar otherwise


class Status:
    """The state of a run, as its user sees it. A context manager; unless entered it has no bar."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.main = os.environ.get("RANK", "0") == "0"
        self._clock = clock
        self._doing, self._since, self._line_at = "loading libraries", clock(), clock()
        self._step = 0
        self._last: int | None = None
        self._left = TimeLeft(0, {})
        self._events: Events | None = None
        self._losses: deque[float] = deque(maxlen=STEPS)
        self._held_out: float | None = None
        self._line: Mapping[str, Any] = {}  # the newest step's metrics
        self._parts: list[str] = []  # the numbers to show, made in the thread that trains
        self._shown = ExitStack()
        self._bar: Any = None

    def __enter__(self) -> "Status":
        if self.main and draws_bars():
            bar = progress_bar(total=0, leave=False, bar_format=" ")
            self._bar = self._shown.enter_context(bar)
            self._shown.enter_context(ticking(self.show))
            self.show()
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.close()
        self._bar = None

    def doing(self, what: str) -> None:
        """Show what goes on now."""
        self._doing, self._since = what, self._clock()
        self.show()

    def begin(self, config: TrainConfig, step: int, last: int, events: "Events") -> None:
        """From here on steps are counted, from a step to the last one."""
        self._step, self._last, self._events = step, last, events
        self._left = TimeLeft(
            last,
            {
                "sampling": config.sample_every,
                "validating": config.validate_every,
                "saving": config.save_every,
            },
        )
        self.doing(TRAINS)

    def trained(self, line: Mapping[str, Any]) -> None:
        """Take a step's metrics."""
        if not self.main:
            return
        self._step, self._since = line["step"], self._clock()
        self._losses.append(line["loss"])
        self._left.see(line)
        self._line, self._parts = line, self._numbers(line)
        event("step", **line)
        if self._bar is None and self._since - self._line_at >= LINE_S:
            self._line_at = self._since
            log.info(", ".join([f"{TRAINS} step {self._step}/{self._last}", *self._parts]))

    @contextmanager
    def during(self, what: str) -> "Iterator[Progress]":
        """Show a pause of training while the block runs; yields what tells which part is begun."""
        began = self._clock()
        self.doing(what)

        def progress(number: int, of: int, part: str = "") -> None:
            self._doing = f"{what} {number}/{of}" + (f", {part}" if part else "")
            self.show()

        try:
            yield progress
        finally:
            self._left.paused(what, self._clock() - began)
            self.doing(TRAINS)

    def complete(self, text: str) -> None:
        """Tell that there is nothing to do."""
        if not self.main:
            return
        event("done", text=text)
        if not writes_events():
            say(text)

    def sampled(self, run: Path, step: int) -> None:
        """Tell that samples were drawn."""
        folder = samples_of(run, step)
        self._tell("sampled", f"samples {folder}", step, folder, samples=folder)

    def validated(self, run: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Tell the validation losses: the lines that validation.jsonl got."""
        for line in lines:
            held_out, training = line[HELD_OUT]["mean"], line[TRAINING]["mean"]
            if line["weights"] == LIVE:
                self._held_out = held_out
            of = "" if line["weights"] == LIVE else f" of {line['weights']}"
            text = f"held-out loss{of} {held_out:.4f}, on training images {training:.4f}"
            self._tell("validated", text, path=losses_of(run, line["step"]), **line)
        if self._line:
            self._parts = self._numbers(self._line)

    def saved(self, step: int, checkpoint: Path) -> None:
        """Tell that a checkpoint is complete."""
        self._tell("saved", f"checkpoint {checkpoint}", step, checkpoint, checkpoint=checkpoint)
        if self._events:
            self._events.warn_low(step, checkpoint)

    def ended(self, name: str, step: int, planned: int, checkpoint: Path | None) -> None:
        """Tell that the run is done, or stopped."""
        self._tell(name, f"step {step} of {planned}", step, checkpoint, checkpoint=checkpoint)
        self.doing("finishing")  # --on-event and W&B may take a while

    def refresh_report(self) -> None:
        """Rewrite the report on the disk, if that takes little of the time."""
        if self._events:
            with self.during("writing the report"):
                self._events.refresh()

    def _tell(self, name: str, text: str, step: int, path: Path | None, **values: Any) -> None:
        if self.main:
            if name not in ENDS:
                log.info(f"step {step}: {text}")
            event(name, step=step, **values)
            if self._events:
                self._events.tell(name, step, text, path)

    def show(self) -> None:
        """Draw the bar, as wide as the terminal."""
        if (bar := self._bar) is None:
            return
        doing, took = self._doing, self._clock() - self._since
        if took >= SHORT_S:
            doing += f", {took:.0f} s"
        bar.n, bar.total = (self._step, self._last) if self._last else (0, 1)
        parts = [f"step {self._step}/{self._last}", *self._parts] if self._last else []
        bar.bar_format = bar_format(bar.format_dict["ncols"] or 80, doing, parts)
        bar.refresh()

    def _numbers(self, line: Mapping[str, Any]) -> list[str]:
        """What to show of a step, the most important number first."""
        left_s, rate = self._left.after(self._step), self._left.images_per_s
        held_out, gpu = self._held_out, "alloc_retries" in line  # metrics of a GPU alone
        numbers = [
            f"{_clock_time(left_s)} left" if left_s is not None else "",
            f"loss {sum(self._losses) / len(self._losses):.4f}",
            f"held-out {held_out:.4f}" if held_out is not None else "",
            f"{rate:.3g} images/s" if rate is not None else "",
            f"lr {line['lr_effective']:.3g}",
            f"{line['peak_gib']:.1f} GiB" if gpu else "",
            f"smoothed {line['loss_smoothed']:.4f}",
        ]
        return [number for number in numbers if number]


def bar_format(columns: int, doing: str, parts: Sequence[str]) -> str:
    """Tqdm's format: what goes on, a bar where there is room, and as many parts as fit."""
    wide = bool(parts) and columns >= max(NARROW, len(doing) + BAR + 4)
    bar = f"|{{bar:{BAR}}}|" if wide else ""
    left, shown = columns - 1 - len(doing) - (BAR + 3 if wide else 0), list[str]()
    for part in parts:
        left -= len(part) + (2 if shown else 1)
        if left < 0:
            break
        shown.append(part)
    doing = doing[: columns - 1].replace("{", "{{").replace("}", "}}")
    return " ".join(filter(None, [doing, bar, ", ".join(shown)]))


def _clock_time(seconds: float) -> str:
    """Hours, minutes and seconds, or days and hours."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes:02d}:{s:02d}"
