"""How long a run will take, and whether anybody can want that: said before it, or soon after."""

import logging
from collections.abc import Mapping
from typing import Any

from xlsd_train.memory.gpus import known_as

log = logging.getLogger("xlsd.train.training")

ABSURD = 1000  # epochs
FIRST, STEPS, ENOUGH_S = 2, 20, 30.0  # steps that are not measured, then as many or as long
WORTH_SAYING_S = 1800.0


def epochs_told(epochs: float, images: int) -> str:
    """In words, with a remedy where it is absurd."""
    passes = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    if epochs <= ABSURD:
        return f"{passes} epochs of {images:,} images"
    return (
        f"{passes} epochs of {images:,} images: each would be trained on {passes} times. That is "
        f"hardly wanted; give say --epochs 10, or --stop-after STEPS"
    )


def predicted(seconds: Mapping[str, float], device: str) -> tuple[str, float] | None:
    """(card, seconds a step at its peak) of a device by its name; None for a card not known."""
    card = known_as(device)
    return (card, seconds[card]) if card is not None and card in seconds else None


def hours_told(card: str, seconds: float) -> str:
    """Of a whole run, predicted before it."""
    return (
        f"no less than {_long(seconds)} at an {card}'s peak; an H200 took 2.5 times its own, and "
        f"samples and validation are not in it"
    )


class Pace:
    """Says once, as soon as some steps were measured, how long a long run will take."""

    def __init__(self, last: int) -> None:
        """`last` is the step that the run is to end at."""
        self._last = last
        self._seen = self._steps = 0
        self._took = 0.0
        self._images: int | None = None

    def see(self, line: Mapping[str, Any]) -> None:
        """Take a step's metrics."""
        if told := self.next(line):
            log.info(told)

    def next(self, line: Mapping[str, Any]) -> str | None:
        """What there is to say at this step; None at most."""
        before, self._images = self._images, line["images_seen"]
        self._seen += 1
        if self._seen <= FIRST or before is None or self._steps < 0:
            return None
        self._took += (line["images_seen"] - before) / line["images_per_s"]
        self._steps += 1
        if self._steps < STEPS and self._took < ENOUGH_S:
            return None
        step_s, left = self._took / self._steps, self._last - line["step"]
        self._steps = -1  # said, or not worth it
        if step_s * left < WORTH_SAYING_S:
            return None
        return (
            f"measured {step_s:.3g} s a step: the {left:,} steps to come take "
            f"{_long(step_s * left)}, with samples and validation more"
        )


def _long(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    if hours < 48:
        return f"{hours:.1f} hours"
    return f"{hours:,.0f} hours ({hours / 24:,.0f} days)"
