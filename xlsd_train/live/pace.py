"""How fast runs go, and so when they end."""

import time
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Any

from xlsd_train.report.summary import last_step
from xlsd_train.runs.history import History
from xlsd_train.runs.layout import METRICS_LOG

INTERVALS = 8  # between samples


def progress(run: History) -> dict[str, Any]:
    """For the page's script: step, last step, seconds per step, seconds without news."""
    quiet = 0.0
    with suppress(OSError):
        quiet = max(0.0, time.time() - (run.folder / METRICS_LOG).stat().st_mtime)
    step = run.last.get("step", 0)
    return {"step": step, "last": last_step(run), "pace": pace(run), "quiet_s": round(quiet)}


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
