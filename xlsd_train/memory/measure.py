"""Choose the memory plan by measuring the best few with real steps."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from xlsd_train.config.train import TrainConfig
from xlsd_train.memory.choose import asked
from xlsd_train.memory.gpus import card_named, device_name, known_as
from xlsd_train.memory.meta_step import Size
from xlsd_train.memory.plan_cache import key_of, recall, remember
from xlsd_train.memory.planner import GIB, REFERENCE, SLICES, Planner, Prediction
from xlsd_train.memory.trials import MOST, Job, in_child
from xlsd_train.runs.record import MeasuredPlan
from xlsd_train.step.backend import MemoryPlan

log = logging.getLogger("xlsd.train.memory")


@dataclass
class Measuring:
    """Finds the fastest plan of a run by measuring; `rows` is what was measured, now or before."""

    config: TrainConfig  # resolved
    networks: tuple[dict[str, Any], dict[str, Any]]  # configs of UNet and text encoder
    device: torch.device
    limit: float  # bytes
    processes: int = 1
    rows: list[MeasuredPlan] = field(default_factory=list)

    @property
    def card(self) -> str:
        """The GPU's full name; "cpu" without one."""
        return device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def wanted(self) -> bool:
        """Whether to measure what was not measured before."""
        return self.config.remeasure or self.device.type == "cuda"

    def __call__(self, planner: Planner, batch: int, size: Size) -> MemoryPlan | None:
        """The fastest plan that fits, for `batch` samples of a process; None if none is known."""
        key = key_of(
            self.config, self.networks, self.card, self.device, batch, self.processes, size,
            self.limit,
        )  # fmt: skip
        before = [] if self.config.remeasure else recall(key)
        best = fastest(before)
        if best and (best["peak_gib"] or 0) * GIB <= self.limit:
            self.rows = before
            log.info("memory plans were measured before with these options; --remeasure repeats it")
        elif self.wanted and not self.config.dry_run:
            self.rows = self.measure(planner, batch, size)
            best = fastest(self.rows)
            if best:
                remember(key, self.rows)
            else:
                log.info("no memory plan could be measured; using the one predicted to be fastest")
        return MemoryPlan(*best["plan"]) if best and self.rows else None

    def text(self) -> str:
        """What to add to the prediction of the plan that was found, or will be."""
        if best := fastest(self.rows):
            return f"; measured {describe(best)}"
        waits = self.wanted and self.config.dry_run
        return "; the run will measure the best plans first" if waits else ""

    def measure(self, planner: Planner, batch: int, size: Size) -> list[MeasuredPlan]:
        """Measure the best plans, whatever was measured before."""
        ask = asked(self.config)
        if self.config.attention == "auto" and self.config.precision == "fp32":
            ask = ask._replace(attention=("sdpa", "exact"))
        found = shortlist(planner.candidates(batch, size, self.limit, ask), known_as(self.card))
        log.info(
            f"measuring the best {min(MOST, len(found))} of {len(found)} memory plans, two steps "
            f"each on random data; --no-measure skips it"
        )
        job = Job(
            self.config, self.networks, [x.plan for x in found], batch, self.processes, size,
            self.device, self.limit, torch.get_num_threads(),
        )  # fmt: skip
        card = card_named(self.card)
        tflop = {(x.plan.way, x.plan.attention): x.tflop for x in found}  # at any micro-batch
        peak = card.tflops(self.config.precision) if card else None
        return [
            {
                "plan": list(plan),
                "images_per_s": batch / seconds if seconds else None,
                "of_peak": tflop[plan.way, plan.attention] / seconds / peak
                if seconds and peak
                else None,
                "peak_gib": nbytes / GIB if nbytes else None,
                "fits": seconds is not None and (nbytes or 0) <= self.limit,
            }
            for plan, seconds, nbytes in in_child(job)
        ]


def fastest(rows: Sequence[MeasuredPlan]) -> MeasuredPlan | None:
    """The fastest that fits."""
    return max((x for x in rows if x["fits"]), key=lambda x: x["images_per_s"] or 0, default=None)


def describe(row: MeasuredPlan) -> str:
    """The figures of a measured plan."""
    if row["images_per_s"] is None:
        return "out of memory"
    share, gib = row["of_peak"], row["peak_gib"]
    return (
        f"{row['images_per_s']:.4g} images/s"
        + (f", {share:.1%} of the card's peak" if share else "")
        + (f", {gib:.2f} GiB" if gib else "")
        + ("" if row["fits"] else ", does not fit")
    )


def shortlist(found: Sequence[Prediction], card: str | None) -> list[Prediction]:
    """Predictions in the order to measure: the best of each attention, then the rest by time.

    A sliced plan is followed by those with smaller slices, which compute the same.
    """
    ranked = sorted(found, key=lambda x: x.seconds[card or REFERENCE])
    best = list({x.plan.attention: x for x in reversed(ranked)}.values())
    leaders = [x for x in ranked if x in best]
    every = []
    for each in (*leaders, *(x for x in ranked if x not in leaders)):
        plan = each.plan
        smaller = [n for n in SLICES if n < plan.micro_batch] if plan.way == "sliced" else []
        every += [each, *(replace(each, plan=plan._replace(micro_batch=n)) for n in smaller)]
    return every
