"""Metrics of each step, one step late: the host never waits for the newest step of a card.

A step's numbers leave the card as soon as it has them, behind that step alone. They are read when
the next step is already under way, or when the run is about to keep something of it, a checkpoint
or a sample. So a loss that is not finite is found one step late, and never by a checkpoint.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.checkpoint import remedy

log = logging.getLogger("xlsd.train.training")

SMOOTHING = 0.99  # weight of the past in the smoothed loss, a step


class _Ended:
    """A step that ended on the CPU: its numbers are there."""

    def __init__(self, loss: Tensor, norm: Tensor) -> None:
        self.numbers = torch.stack([loss, norm])
        self.at = time.perf_counter()

    def wait(self) -> list[float]:
        """Loss and norm."""
        found: list[float] = self.numbers.tolist()
        return found

    def seconds(self, begun: "_Begun") -> float:
        """Since a moment before."""
        return self.at - begun.at

    def told(self) -> dict[str, int]:
        """What else the line of the step says."""
        return {}


class _UnderWay:
    """A step that a card is still at: its numbers are on their way, and the card notes the time."""

    def __init__(self, loss: Tensor, norm: Tensor) -> None:
        self.device = loss.device
        self.numbers = torch.empty(2, pin_memory=True)  # else the copy would wait for the card
        self.numbers.copy_(torch.stack([loss, norm]), non_blocking=True)
        self.event = _mark()

    def wait(self) -> list[float]:
        """Loss and norm, when this step is done, whatever the card was given after it."""
        self.event.synchronize()
        found: list[float] = self.numbers.tolist()
        return found

    def seconds(self, begun: "_Begun") -> float:
        """By the card's own clock; the one before is done where this one is."""
        return float(begun.event.elapsed_time(self.event)) / 1000

    def told(self) -> dict[str, int]:
        """How often the card had to stop and sort its memory, and had none even so, so far."""
        stats = torch.cuda.memory_stats(self.device)
        return {
            "alloc_retries": stats.get("num_alloc_retries", 0),
            "alloc_failures": stats.get("num_ooms", 0),
        }


class _Begun:
    """The moment when the first step begins, or goes on after a pause."""

    def __init__(self) -> None:
        self.at = time.perf_counter()
        started: Any = torch.cuda.is_initialized
        self.event: Any = _mark() if started() else None


def _mark() -> Any:
    """The moment when a card comes here, with all that it was given before done."""
    cuda: Any = torch.cuda
    event = cuda.Event(enable_timing=True)
    event.record()
    return event


class FailureWatch:
    """Says once that memory was refused to a step that went on all the same."""

    def __init__(self) -> None:
        self._said = False

    def see(self, line: dict[str, Any]) -> None:
        """A line of the metrics."""
        if not self._said and (failures := line.get("alloc_failures", 0)):
            self._said = True
            log.info(
                f"memory was refused {failures} times up to step {line['step']}, which went on: "
                f"where a kernel finds no room cuDNN takes another, which rounds otherwise, so "
                f"that a resume may differ in the last bits; a lower --vram plans for more room"
            )


@dataclass
class Meter:
    """Takes the steps in order; `flush` and `add` give the lines that are due for the metrics."""

    smoothed: list[float]  # [sum, weight], whose ratio needs no start-up correction
    run: Path | None = None  # whose checkpoints a loss that is not finite leaves
    _pending: tuple[dict[str, Any], int, _Ended | _UnderWay] | None = None
    _begun: Any = field(default_factory=_Begun)  # what the pending step came after

    def begin(self) -> None:
        """The first step begins, or goes on after something that is not training."""
        self._begun = _Begun()

    def add(self, line: dict[str, Any], images: int, loss: Tensor, norm: Tensor) -> list[Any]:
        """A step that is under way; gives the line of the one before it, if there is one."""
        # A card is still at it; a CPU is done.
        newest = (_UnderWay if loss.is_cuda else _Ended)(loss, norm)
        due = self.flush()
        self._pending = line, images, newest
        return due

    def flush(self) -> list[dict[str, Any]]:
        """The line of the step that is pending, for which this waits, and for no later one.

        Raises UserError for a loss or a gradient that is not finite.
        """
        if self._pending is None:
            return []
        (line, images, step), self._pending = self._pending, None
        both = step.wait()
        seconds, self._begun = step.seconds(self._begun), step
        for what, number in zip(("loss", "gradient's norm"), both, strict=True):
            if not math.isfinite(number):
                raise UserError(
                    f"the {what} of step {line['step']} is {number}; nothing of it was kept"
                    + (f": {_remedy(self.run, line['step'])}" if self.run else "")
                )
        total, weight = (SMOOTHING * part for part in self.smoothed)
        self.smoothed = [total + both[0], weight + 1]
        line["loss"], line["grad_norm"] = both
        line["loss_smoothed"] = self.smoothed[0] / self.smoothed[1]
        line["images_per_s"] = images / seconds
        line.update(step.told())
        return [line]


def _remedy(run: Path, step: int) -> str:
    """Before the first step no rate has moved a weight."""
    if step == 1:
        return (
            "no weight had moved yet, so --lr is not the cause: look for wrong latents with "
            "`xlsd-cache check`, or try another --model"
        )
    return remedy(run)
