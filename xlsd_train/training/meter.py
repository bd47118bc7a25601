"""Log step metrics with a one-step delay, to avoid a device sync.

A step's loss and norm are copied from the GPU behind that step. They are read when the next step is
already running, or before a checkpoint or sample is made. So a loss that is not finite is found one
step late, but before anything is saved.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.checkpoint import remedy
from xlsd_train.runs.metrics import not_finite

log = logging.getLogger("xlsd.train.training")

SMOOTHING = 0.99  # weight of the past in the smoothed loss, a step


class _CpuStep:
    """A step on the CPU, which has ended."""

    def __init__(self, loss: Tensor, norm: Tensor) -> None:
        self.numbers = torch.stack([loss, norm])
        self.at = time.perf_counter()

    def wait(self) -> list[float]:
        """Loss and norm."""
        numbers: list[float] = self.numbers.tolist()
        return numbers

    def seconds(self, begun: "_Start") -> float:
        """Since that moment."""
        return self.at - begun.at

    def counters(self) -> dict[str, int]:
        """More metrics: none."""
        return {}


class _GpuStep:
    """A step that may still run on a GPU; events measure its time."""

    def __init__(self, loss: Tensor, norm: Tensor) -> None:
        self.device = loss.device
        self.numbers = torch.empty(2, pin_memory=True)  # else the copy would wait for the GPU
        self.numbers.copy_(torch.stack([loss, norm]), non_blocking=True)
        self.event = _mark()

    def wait(self) -> list[float]:
        """Loss and norm; a device sync, for this step and not for later ones."""
        self.event.synchronize()
        numbers: list[float] = self.numbers.tolist()
        return numbers

    def seconds(self, begun: "_Start") -> float:
        """By the GPU's clock; the event before is done when this one is."""
        return float(begun.event.elapsed_time(self.event)) / 1000

    def counters(self) -> dict[str, int]:
        """How often so far the allocator freed its cache and retried, and failed even then."""
        stats = torch.cuda.memory_stats(self.device)
        return {
            "alloc_retries": stats.get("num_alloc_retries", 0),
            "alloc_failures": stats.get("num_ooms", 0),
        }


class _Start:
    """The moment when the first step starts, or training continues after a pause."""

    def __init__(self) -> None:
        self.at = time.perf_counter()
        started: Any = torch.cuda.is_initialized
        self.event: Any = _mark() if started() else None


def _mark() -> Any:
    """An event on the GPU's stream, after all work so far."""
    cuda: Any = torch.cuda
    event = cuda.Event(enable_timing=True)
    event.record()
    return event


class FailureWatch:
    """Logs once that an allocation failed in a step that continued nevertheless."""

    def __init__(self) -> None:
        self._said = False

    def see(self, line: dict[str, Any]) -> None:
        """A line of the metrics."""
        if not self._said and (failures := line.get("alloc_failures", 0)):
            self._said = True
            log.info(
                f"{failures} allocations failed up to step {line['step']}, which continued. cuDNN "
                f"then uses another kernel, which rounds differently, so a resume may differ in "
                f"the last bits. A lower --vram leaves more memory free"
            )


@dataclass
class Meter:
    """Takes steps in order; `add` and `flush` return the metrics lines that are due."""

    smoothed: list[float]  # [sum, weight]; their ratio needs no start-up correction
    _pending: tuple[dict[str, Any], int, _CpuStep | _GpuStep] | None = None
    _begun: Any = field(default_factory=_Start)  # what came before the pending step

    def begin(self) -> None:
        """Start timing, at the first step and after each pause."""
        self._begun = _Start()

    def add(self, line: dict[str, Any], images: int, loss: Tensor, norm: Tensor) -> list[Any]:
        """Take a step that was just launched; returns the line of the one before, if any."""
        newest = (_GpuStep if loss.is_cuda else _CpuStep)(loss, norm)
        due = self.flush()
        self._pending = line, images, newest
        return due

    def flush(self) -> list[dict[str, Any]]:
        """The line of the pending step; on a GPU a device sync, for that step alone.

        A loss or gradient norm may not be finite, see `require_finite`; it is not smoothed.
        """
        if self._pending is None:
            return []
        (line, images, step), self._pending = self._pending, None
        both = step.wait()
        seconds, self._begun = step.seconds(self._begun), step
        line["loss"], line["grad_norm"] = both
        if all(map(math.isfinite, both)):
            total, weight = (SMOOTHING * part for part in self.smoothed)
            self.smoothed = [total + both[0], weight + 1]
            line["loss_smoothed"] = self.smoothed[0] / self.smoothed[1]
        line["images_per_s"] = images / seconds
        line.update(step.counters())
        return [line]


def require_finite(line: Mapping[str, Any], run: Path) -> None:
    """Raises UserError if the loss or the gradient norm of a step is not finite.

    Before step 1 no weight has changed, so the learning rate cannot be the cause.
    """
    if (found := not_finite(line)) is None:
        return
    what, number = found
    then = remedy(run)
    if line["step"] == 1:
        then = (
            "no weight had changed yet, so --lr is not the cause; check the latents with "
            "`xlsd-cache check`, or use another --model"
        )
    raise UserError(
        f"the {what} of step {line['step']} is {number}; the step was not saved: {then}"
    )
