"""How fast runs go, when they end, and whether they go on."""

import time
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Any

from xlsd_train.report.trend import diverged
from xlsd_train.runs.history import History
from xlsd_train.runs.layout import METRICS_LOG
from xlsd_train.runs.metrics import not_finite

INTERVALS = 8  # between samples
QUIET_S, QUIET_STEPS = 120.0, 20.0  # without a step, the longer one


def progress(run: History) -> dict[str, Any]:
    """For the page's script: what it says of a run, in steps and seconds."""
    step, quiet_s = run.last.get("step", 0), round(max(0.0, _quiet_s(run) or 0.0))
    return {
        "step": step, "last": last_step(run), "pace": pace(run), "quiet_s": quiet_s,
        "diverged": ends.step if (ends := diverged(run)) else None,
    }  # fmt: skip


def last_step(run: History) -> int:
    """The step at which a run ends; 0 if unknown."""
    planned, stop = run.record.planned_steps, run.config.get("stop_after")
    return min(planned, stop) if isinstance(stop, int) and stop > 0 else planned


def is_going(run: History) -> bool:
    """Whether a run that is not at its end logged a step lately; web/src/live.js has this rule."""
    ends = run.last.get("step", 0) >= last_step(run) > 0 or not_finite(run.last)
    if ends or (quiet_s := _quiet_s(run)) is None:
        return False
    # Not in the future either, as of a run that was copied from a machine whose clock is wrong.
    return abs(quiet_s) <= max(QUIET_S, QUIET_STEPS * (pace(run) or 0))


def _quiet_s(run: History) -> float | None:
    """Seconds since the newest step, or since the run began; None if it is gone."""
    with suppress(OSError):
        return time.time() - (run.folder / METRICS_LOG).stat().st_mtime
    return None


def pace(run: History) -> float | None:
    """Seconds per step, with pauses: by the times of the newest samples.

    With fewer than three samples, by the images/s that were logged, without pauses.
    """
    times: list[tuple[int, float]] = []
    for step in sorted(run.samples)[-INTERVALS - 1 :]:
        with suppress(OSError, IndexError):
            times.append((step, run.samples[step][0].stat().st_mtime))
    took = [(t - s) / (m - n) for (n, s), (m, t) in pairwise(times) if t > s]
    if len(took) >= 2:
        return median(took)
    series, accum = run.series.get("images_per_s"), run.config.get("accum", 1)
    newest = [rate for rate in (series.mean[-20:] if series else []) if rate > 0]
    return run.record.batch * accum / median(newest) if newest and run.record.batch else None
