"""How long a run will take, predicted before its first step and measured soon after."""

import logging
from collections.abc import Mapping
from typing import Any

from xlsd_train.memory.gpus import known_as

log = logging.getLogger("xlsd.train.training")

ABSURD = 1000  # epochs
FIRST, STEPS, ENOUGH_S = 2, 20, 30.0  # steps to skip; then measure so many steps, or so long
WORTH_LOGGING_S = 1800.0


def describe_epochs(epochs: float, images: int) -> str:
    """In words, with a remedy if that is absurd."""
    passes = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    if epochs <= ABSURD:
        return f"{passes} epochs of {images:,} images"
    return (
        f"{passes} epochs of {images:,} images. That is probably too long; use e.g. --epochs 10, "
        f"or --stop-after STEPS"
    )


def predicted(seconds: Mapping[str, float], device: str) -> tuple[str, float] | None:
    """(GPU, seconds per step at its peak) of a device by its name; None for an unknown GPU."""
    card = known_as(device)
    return (card, seconds[card]) if card is not None and card in seconds else None


def describe_hours(card: str, seconds: float) -> str:
    """The predicted time of a whole run."""
    return (
        f"at least {_duration(seconds)} at an {card}'s peak (an H200 took 2.5 times as long as its "
        f"peak), without samples and validation"
    )


class Pace:
    """Logs once how long a long run will take, after some steps were measured."""

    def __init__(self, last: int) -> None:
        """`last` is the step that the run will end at."""
        self._last = last
        self._seen = self._steps = 0
        self._took = 0.0
        self._images: int | None = None

    def see(self, line: Mapping[str, Any]) -> None:
        """Take a step's metrics."""
        if text := self.next(line):
            log.info(text)

    def next(self, line: Mapping[str, Any]) -> str | None:
        """The text to log after this step; None for all steps but one at most."""
        before, self._images = self._images, line["images_seen"]
        self._seen += 1
        if self._seen <= FIRST or before is None or self._steps < 0:
            return None
        self._took += (line["images_seen"] - before) / line["images_per_s"]
        self._steps += 1
        if self._steps < STEPS and self._took < ENOUGH_S:
            return None
        step_s, left = self._took / self._steps, self._last - line["step"]
        self._steps = -1  # logged, or too short to log
        if step_s * left < WORTH_LOGGING_S:
            return None
        return (
            f"{step_s:.3g} s per step: the remaining {left:,} steps take "
            f"{_duration(step_s * left)}, plus samples and validation"
        )


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    if hours < 48:
        return f"{hours:.1f} hours"
    return f"{hours:,.0f} hours ({hours / 24:,.0f} days)"
