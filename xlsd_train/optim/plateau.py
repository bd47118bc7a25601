"""Where D-Lion's d stops growing for the first time: the rate with which plain Lion may go on."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlsd_train.config.optimization import OptimizerOptions
from xlsd_train.runs.json_files import objects_in

log = logging.getLogger("xlsd.train.optim")

WINDOW = 100  # steps over which d hardly grows on a plateau
GROWTH = 1.02  # by a factor less than this over the window
LINE = {"step!": int, "d!": float, "lr_effective!": float}
RISE = 10.0  # after it has grown by this factor since the first step


@dataclass(frozen=True)
class Plateau:
    """The first plateau of a run."""

    step: int  # its first step
    seen_at: int  # a window later
    d: float
    lr: float  # d times the learning rate: what to give Lion as --lr

    def __str__(self) -> str:
        """One sentence, for the person at the run."""
        return (
            f"d reached its first plateau at step {self.step}: from there to step {self.seen_at} "
            f"it grew by less than {GROWTH - 1:.0%}, to {self.d:.3g}; --optimizer lion --lr "
            f"{self.lr:.2g} goes on at this rate"
        )


def first_plateau(lines: Iterable[Mapping[str, Any]], d_max: float | None = None) -> Plateau | None:
    """The first plateau in the metrics of a run, a line for each step from the first.

    That is the first step s where d is at least RISE times its first value, and has grown by less
    than the factor GROWTH at step s + WINDOW. It tells nothing where `d_max` has held d.
    """
    watch = PlateauWatch(d_max)
    return next((found for line in lines if (found := watch.next(line))), None)


class PlateauWatch:
    """Watches a run's metrics, step after step, for the first plateau."""

    def __init__(self, d_max: float | None = None) -> None:
        """`d_max` is the limit that the run was given."""
        self._d_max = math.inf if d_max is None else d_max
        self._first: float | None = None
        self._last: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)  # (step, d)
        self._done = False

    @classmethod
    def of_run(cls, options: OptimizerOptions, metrics: Path) -> "PlateauWatch":
        """As far as the run has got, by its metrics.jsonl; only for D-Lion it looks at all."""
        watch = cls(options.d_max)
        if options.optimizer != "dlion":
            watch._done = True
        else:
            for line in objects_in(metrics, LINE):
                watch.next(line)
        return watch

    def see(self, line: Mapping[str, Any]) -> None:
        """Say it, at the step where it is found."""
        if found := self.next(line):
            log.info(found)

    def next(self, line: Mapping[str, Any]) -> Plateau | None:
        """The plateau that this step's metrics end the search for; at later steps None again."""
        if self._done or "d" not in line:
            return None
        d = line["d"]
        self._first = d if self._first is None else self._first
        self._last.append((line["step"], d))
        step, before = self._last[0]
        if len(self._last) <= WINDOW or before < RISE * self._first or d >= GROWTH * before:
            return None
        if d >= self._d_max:
            return None
        self._done = True
        return Plateau(step, line["step"], d, line["lr_effective"])
