"""Find where D-Lion's d first stops growing: a learning rate for continuing with plain Lion."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlsd_train.config.optimization import OptimizerOptions
from xlsd_train.runs.json_files import objects_in

log = logging.getLogger("xlsd.train.optim")

WINDOW = 100  # steps of a plateau
GROWTH = 1.02  # d grows by less than this factor over the window
LINE = {"step!": int, "d!": float, "lr_effective!": float}
RISE = 10.0  # and has grown by this factor since the first step


@dataclass(frozen=True)
class Plateau:
    """The first plateau of a run."""

    step: int  # its first step
    seen_at: int  # WINDOW steps later
    d: float
    lr: float  # d times the learning rate: Lion's --lr

    def __str__(self) -> str:
        """One sentence, with the options to continue with."""
        return (
            f"d reached its first plateau at step {self.step}: up to step {self.seen_at} it grew "
            f"by less than {GROWTH - 1:.0%}, to {self.d:.3g}; the same rate with plain Lion is "
            f"--optimizer lion --lr {self.lr:.2g}"
        )


class PlateauWatch:
    """Watches a run's metrics, one line per step from the first step, for the first plateau.

    That is the first step s where d is at least RISE times its first value, and has grown by less
    than the factor GROWTH at step s + WINDOW; none if `d_max` limited d there.
    """

    def __init__(self, d_max: float | None = None) -> None:
        """`d_max` is the run's --d-max."""
        self._d_max = math.inf if d_max is None else d_max
        self._first: float | None = None
        self._last: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)  # (step, d)
        self._done = False

    @classmethod
    def of_run(cls, options: OptimizerOptions, metrics: Path) -> "PlateauWatch":
        """A watch that has seen the run's metrics.jsonl so far; for D-Lion only."""
        watch = cls(options.d_max)
        if options.optimizer != "dlion":
            watch._done = True
        else:
            for line in objects_in(metrics, LINE):
                watch.next(line)
        return watch

    def see(self, line: Mapping[str, Any]) -> None:
        """Log a plateau, at the step where it is found."""
        if plateau := self.next(line):
            log.info(plateau)

    def next(self, line: Mapping[str, Any]) -> Plateau | None:
        """The first plateau, at the step where it is found; None at all others."""
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
