"""How long a run will take, predicted before its first step and measured soon after."""

import logging
from collections.abc import Mapping
from math import ceil
from typing import Any

from xlsd_cache.vocabulary import Precision
from xlsd_train.memory.gpus import card_named, known_as
from xlsd_train.progress.time_left import TimeLeft
from xlsd_train.runs.record import RunRecord

log = logging.getLogger("xlsd.train.progress")

ABSURD = 1000  # epochs
STEPS, ENOUGH_S = 20, 30.0  # to measure: so many steps, or so long
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


def describe_hours(record: RunRecord, batches: int) -> str | None:
    """The predicted time of a run of so many batches; None if it is not known."""
    plan, without = list(record.plan), "without samples and validation"
    rate = next((row["images_per_s"] for row in record.measured if row["plan"] == plan), None)
    if rate:
        seconds = batches * ceil(record.batch / record.processes) / rate
        each = " of each process" if record.processes > 1 else ""
        return f"about {_duration(seconds)} at the measured {rate:.3g} images/s{each}, {without}"
    if record.step_s:
        card, step_s = record.step_s
        least = _duration(batches * step_s)
        return f"at least {least} (at an {card}'s peak, which no run reaches), {without}"
    return None


def ceiling(record: RunRecord) -> float | None:
    """images/s of the whole run at the peak of its cards; None if it is not known."""
    card = card_named(record.machine["card"] or "")
    if card is None or record.tflop is None:
        return None
    return record.processes * card.tflops(record.config["precision"]) / record.tflop


class Pace:
    """Logs once how long a long run will take, after some steps were measured."""

    def __init__(
        self, last: int, ceiling: float | None = None, precision: Precision = "fp32"
    ) -> None:
        """`last` is the step that the run will end at; `ceiling`: images/s at the cards' peak."""
        self._last, self._ceiling, self._precision = last, ceiling, precision
        self._times = TimeLeft(last, {})
        self._done = False  # logged, or too short to log

    def see(self, line: Mapping[str, Any]) -> None:
        """Take a step's metrics."""
        if text := self.next(line):
            log.info(text)

    def next(self, line: Mapping[str, Any]) -> str | None:
        """The text to log after this step; None for all steps but one at most."""
        self._times.see(line)
        steps, took = self._times.measured
        if self._done or not steps or (steps < STEPS and took < ENOUGH_S):
            return None
        self._done = True
        step_s, left = took / steps, self._last - line["step"]
        if step_s * left < WORTH_LOGGING_S:
            return None
        rate, peak = self._times.images_per_s or 0.0, ""
        if self._ceiling:
            share = rate / self._ceiling
            peak = f" ({rate:.3g} images/s, about {share:.0%} of the card's {self._precision} peak)"
        return (
            f"{step_s:.3g} s per step{peak}: the remaining {left:,} steps take "
            f"{_duration(step_s * left)}, plus samples and validation"
        )


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    if hours < 48:
        return f"{hours:.1f} hours"
    return f"{hours:,.0f} hours ({hours / 24:,.0f} days)"
