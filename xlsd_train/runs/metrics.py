"""Metrics of a training step: names in metrics.jsonl, units, and where each is shown."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number of a step."""

    unit: str
    chart: str = ""  # title of the report's chart that shows it; empty: none


METRICS = {
    "step": Metric("steps"),
    "images_seen": Metric("images"),
    "epoch": Metric("epochs"),
    "loss": Metric("loss", "Training loss"),
    "loss_smoothed": Metric("loss", "Training loss"),
    "lr": Metric("learning rate", "Learning rate"),
    "lr_effective": Metric("learning rate", "Learning rate"),
    "d": Metric("d", "d"),  # D-Lion's alone
    "grad_norm": Metric("norm", "Gradient norm"),
    "images_per_s": Metric("images/s", "Throughput"),
    "wait_s": Metric("seconds per step", "Data wait"),
    "peak_gib": Metric("GiB", "Peak memory"),
    "alloc_retries": Metric("times"),  # of the GPU's allocator, so far
    "alloc_failures": Metric("times"),
}
CHARTED = [name for name, metric in METRICS.items() if metric.chart]


def not_finite(line: Mapping[str, Any]) -> tuple[str, float] | None:
    """The loss or the gradient norm of a step, if it is not finite: the run ended there."""
    for name, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if isinstance(value := line.get(name), float) and not math.isfinite(value):
            return what, value
    return None
