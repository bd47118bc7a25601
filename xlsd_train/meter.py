"""What each step was, written down one step late: so the host never waits for the device's newest.

A step's loss is read when the next step is already under way, or when the run is about to keep
something of it, a checkpoint or a sample. So a loss that is not finite is found one step late, and
never by a checkpoint.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlsd_cache import UserError
from xlsd_train.checkpoint import remedy

SMOOTHING = 0.99  # weight of the past in the smoothed loss, a step


@dataclass
class Meter:
    """Takes the steps in order; `flush` and `add` give the lines that are due for the metrics."""

    smoothed: list[float]  # [sum, weight], whose ratio needs no start-up correction
    run: Path | None = None  # whose checkpoints a loss that is not finite leaves
    _pending: tuple[dict[str, Any], int, Tensor, Tensor, float | None] | None = None
    _begun: float = 0.0

    def begin(self) -> None:
        """The first step begins, or goes on after something that is not training."""
        self._begun = time.perf_counter()

    def add(self, line: dict[str, Any], images: int, loss: Tensor, norm: Tensor) -> list[Any]:
        """A step that is under way; gives the line of the one before it, if there is one."""
        due = self.flush()
        # A card is still at it, and done when its loss can be read; a CPU is done.
        ended = None if loss.is_cuda else time.perf_counter()
        self._pending = line, images, loss, norm, ended
        return due

    def flush(self) -> list[dict[str, Any]]:
        """The line of the step that is pending, for which this waits.

        Raises UserError for a loss or a gradient that is not finite.
        """
        if self._pending is None:
            return []
        (line, images, loss, norm, ended), self._pending = self._pending, None
        both = torch.stack([loss, norm]).tolist()  # waits for the device
        ended = ended or time.perf_counter()
        seconds, self._begun = ended - self._begun, ended
        for what, value in zip(("loss", "gradient's norm"), both, strict=True):
            if math.isfinite(value):
                continue
            raise UserError(
                f"the {what} of step {line['step']} is {value}; nothing of it was kept"
                + (f": {_remedy(self.run, line['step'])}" if self.run else "")
            )
        total, weight = (SMOOTHING * part for part in self.smoothed)
        self.smoothed = [total + both[0], weight + 1]
        line["loss"], line["grad_norm"] = both
        line["loss_smoothed"] = self.smoothed[0] / self.smoothed[1]
        line["images_per_s"] = images / seconds
        return [line]


def _remedy(run: Path, step: int) -> str:
    """Before the first step no rate has moved a weight."""
    if step == 1:
        return (
            "no weight had moved yet, so --lr is not the cause: look for wrong latents with "
            "`xlsd-cache check`, or try another --model"
        )
    return remedy(run)
