"""How a run's held-out loss changed: relative changes since its first validation, and a verdict.

All figures are paired bootstraps on the same images (runs/bootstrap.py), so that small changes show
although images differ much. Averaged weights are left out: they lag behind.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from xlsd_train.runs.bootstrap import Estimate, Interval, Losses, means, overalls
from xlsd_train.runs.downsample import evenly
from xlsd_train.runs.history import History
from xlsd_train.runs.metrics import not_finite
from xlsd_train.runs.validation_log import HELD_OUT, LIVE, read_losses

MEASURED = 200  # validations that are compared
BANDED = 40  # validations that are drawn in the chart of each band
LEVEL = 0.25  # share of the steps without a measurable change after which a curve is level


@dataclass(frozen=True)
class Trend:
    """The live weights' held-out loss at the validated steps."""

    steps: list[int]
    change: list[Interval]  # since the first validation, a share of its loss
    banded: list[int]  # steps of `bands`
    bands: list[list[Interval]]  # the same change for each band
    verdict: str
    state: str  # falling, levelled off, rising or unknown

    @property
    def short(self) -> str:
        """The verdict without its interval."""
        return self.verdict.partition(" (95%")[0].rstrip(".").replace(" -", " \N{MINUS SIGN}")


def trend(run: History) -> Trend | None:
    """The change of the held-out loss; None for fewer than two validations."""
    measured = _losses(run)
    if len(measured) < 2:
        return None
    steps = list(measured)
    found = overalls(list(measured.values()))
    banded = [steps[i] for i in evenly(len(steps), BANDED)]
    state, verdict = _verdict(steps, found)
    return Trend(
        steps,
        [each.relative_to(found[0]).interval for each in found],
        banded,
        _bands([measured[step] for step in banded]),
        verdict,
        state,
    )


class Diverged(NamedTuple):
    """Where a run stopped having numbers."""

    step: int
    what: str

    def __str__(self) -> str:
        return f"It diverged: at step {self.step} the {self.what} is not finite."


def diverged(run: History) -> Diverged | None:
    """Whether the newest step or the newest validation of the live weights is not finite."""
    if found := not_finite(run.last):
        return Diverged(run.last["step"], found[0])
    of = {
        line["step"]: line[HELD_OUT]["mean"] for line in run.validation if line["weights"] == LIVE
    }
    newest = max(of, default=0)
    return None if math.isfinite(of.get(newest, 0.0)) else Diverged(newest, "held-out loss")


def shown_validations(run: History, weights: str) -> list[dict[str, Any]]:
    """The lines of at most MEASURED steps, with the first, the last and the best finite one."""
    of = {line["step"]: line for line in run.validation if line["weights"] == weights}
    lines = [of[step] for step in sorted(of)]
    chosen = set(evenly(len(lines), MEASURED - (len(lines) > MEASURED)))
    measured = [line[HELD_OUT]["mean"] for line in lines]
    finite = [i for i, mean in enumerate(measured) if math.isfinite(mean)]
    chosen.update(sorted(finite, key=measured.__getitem__)[:1])
    return [lines[i] for i in sorted(chosen)]


def _losses(run: History) -> dict[int, Losses]:
    """Step -> losses of the live weights on the images of the first validation."""
    found = {}
    for line in shown_validations(run, LIVE):
        losses = read_losses(run.folder, line["step"]).get(f"{LIVE}/{HELD_OUT}")
        if losses is not None and np.isfinite(losses).all():
            found[line["step"]] = losses
    shape = next(iter(found.values())).shape if found else ()
    return {step: losses for step, losses in found.items() if losses.shape == shape}


def _bands(measured: Sequence[Losses]) -> list[list[Interval]]:
    """Relative changes, [band][validation]."""
    count = measured[0].shape[1]
    found = means(np.hstack(measured).astype(np.float64))
    return [
        [each.relative_to(found[band]).interval for each in found[band::count]]
        for band in range(count)
    ]


def _verdict(steps: list[int], found: list[Estimate]) -> tuple[str, str]:
    """Whether the loss still falls at the newest validation, in a word and in a sentence."""
    newest, last = found[-1], steps[-1]
    if len(steps) < 3:
        return "unknown", "Too few validations to tell whether the loss still falls."
    best = min(range(len(found)), key=lambda i: found[i].value)
    rise, recent = (newest - found[best]).interval, last - LEVEL * (last - steps[0])
    if rise.low > 0 and steps[best] <= recent:
        return "rising", (
            f"The loss is rising: at step {last} it is {rise.mean:+.5f} above step {steps[best]} "
            f"(95% interval {rise.low:+.5f} to {rise.high:+.5f})."
        )
    before = list(zip(steps, found, strict=True))[-2::-1]
    tied = takewhile(lambda it: (newest - it[1]).interval.high >= 0, before)
    since = min((step for step, _ in tied), default=last)
    if since <= recent:
        return "levelled off", f"It has levelled off: no measurable change since step {since}."
    step, other = next(it for it in before if it[0] <= recent)
    fall = (newest - other).interval
    return "falling", (
        f"It still falls: {fall.mean:+.5f} since step {step} "
        f"(95% interval {fall.low:+.5f} to {fall.high:+.5f})."
    )
