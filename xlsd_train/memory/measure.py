"""Measure memory plans with real steps, in a process of its own.

That process has random weights and data of the run's shapes, so nothing of the run can change: no
weight, no random number, and on a GPU nothing that decides its kernels. (PyTorch keeps, for each
shape of convolution, the first of cuDNN's engines whose workspace fitted, for as long as a process
lives. A plan tried when memory is nearly full would leave other engines to the run than a resume
finds.) All memory is free when it ends, also pinned CPU memory, which torch never frees.
"""

import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.nn import Parameter

from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.runtime.device import deterministic, device_of, set_precision
from xlsd_cache.runtime.gpu_memory import give_back, is_full
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.gpus import card_named, known_as
from xlsd_train.memory.meta_step import Size, random_networks
from xlsd_train.memory.plan_cache import key_of, recall, remember
from xlsd_train.memory.planner import (
    GIB,
    REFERENCE,
    SLICES,
    Planner,
    Prediction,
    asked,
    cap_card,
)
from xlsd_train.model.bundle import Networks
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.runs.record import MeasuredPlan
from xlsd_train.step.backend import DeviceBackend, MemoryPlan, drop_gradients
from xlsd_train.step.objective import Objective
from xlsd_train.step.step import Step

log = logging.getLogger("xlsd.train.memory")

MOST = 4  # plans to measure that fit; at most twice as many are tried once one fits
LR = 1e-9  # so small that no loss diverges
_CHILD = "from xlsd_train.memory.measure import child; child()"
# Launchers tell processes by these that others belong to them; the measuring process is alone.
_LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE",
             "MV2_COMM_WORLD_SIZE"}  # fmt: skip


class TrialBackend(DeviceBackend):
    """Keeps its plan when memory is full, and sums nothing over other processes."""

    @property
    def _distributed(self) -> bool:
        return False

    def tighten(self, error: RuntimeError) -> None:
        """Raise it."""
        raise error


@dataclass(frozen=True)
class Job:
    """What to measure; the measuring process gets it pickled."""

    config: TrainConfig  # resolved
    networks: tuple[dict[str, Any], dict[str, Any]]  # configs of UNet and text encoder
    plans: list[MemoryPlan]
    batch: int  # samples of one process
    size: Size
    device: torch.device
    limit: float  # bytes
    threads: int  # of torch on the CPU


class Trial(NamedTuple):
    """A plan that was tried."""

    plan: MemoryPlan
    seconds: float | None  # per batch; None: out of memory
    peak: int | None  # bytes; None on a CPU, and when out of memory


@dataclass
class Measuring:
    """Finds the fastest plan of a run by measuring; `rows` is what was measured, now or before."""

    config: TrainConfig  # resolved
    networks: tuple[dict[str, Any], dict[str, Any]]  # configs of UNet and text encoder
    device: torch.device
    limit: float  # bytes
    rows: list[MeasuredPlan] = field(default_factory=list)

    @property
    def card(self) -> str:
        """The GPU's full name; "cpu" without one."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def wanted(self) -> bool:
        """Whether to measure what was not measured before."""
        return self.config.remeasure or self.device.type == "cuda"

    def __call__(self, planner: Planner, batch: int, size: Size) -> MemoryPlan | None:
        """The fastest plan that fits, for `batch` samples of a process; None if none is known."""
        key = key_of(self.config, self.networks, self.card, self.device, batch, size, self.limit)
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
            self.config, self.networks, [x.plan for x in found], batch, size, self.device,
            self.limit, torch.get_num_threads(),
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


def in_child(job: Job) -> Iterator[Trial]:
    """What `trials` gives, from a process of its own; of one that crashes, what it gave so far."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _CHILD], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(pickle.dumps(job))
            for line in process.stdout:
                plan, seconds, peak = json.loads(line)
                yield Trial(MemoryPlan(*plan), seconds, peak)
            if process.wait():
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                log.info(f"measuring memory plans ended early: {last or process.returncode}")
        finally:
            process.kill()


def child() -> None:
    """The measuring process: a pickled job on stdin, a line of JSON for each trial on stdout."""
    out, sys.stdout = sys.stdout, sys.stderr
    job: Job = pickle.load(sys.stdin.buffer)  # noqa: S301 (from `in_child`)
    quiet_libraries()
    device_of(job.device.type)  # configures the allocator
    set_precision(job.config.precision)
    deterministic(job.config.deterministic)
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
        if job.config.vram is not None:
            cap_card(job.config.vram, job.device)
    torch.set_num_threads(job.threads)
    for trial in trials(job):
        print(json.dumps(trial), file=out, flush=True)  # fails if the run is gone


def trials(job: Job) -> Iterator[Trial]:
    """Two steps of each plan in turn, on random weights and data; the second is measured.

    A plan that does not fit is followed by the same with one pass more.
    """
    config, device, fits = job.config, job.device, 0
    with torch.device(device):
        model, trained, objective = random_networks(config, *job.networks)
        batch = _batch(job, model, objective)
    if config.channels_last:
        model.unet.to(memory_format=torch.channels_last)
    mixed = "bf16" if config.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
    plans, number = list(job.plans), 0
    while number < len(plans) and fits < MOST and not (fits and number >= 2 * MOST):
        plan, number = plans[number], number + 1
        backend, trial = TrialBackend(accelerator, plan), Trial(plan, None, None)
        try:
            trial = _measure(config, model, trained, objective, backend, batch)
        except RuntimeError as error:
            if not is_full(error):
                raise
        drop_gradients(trained)
        give_back(device)
        if trial.seconds is not None and (trial.peak or 0) <= job.limit:
            fits += 1
        elif config.micro_batch is None and (smaller := _smaller(plan, job.batch)) not in plans:
            plans.insert(number, smaller)
        yield trial


def _smaller(plan: MemoryPlan, batch: int) -> MemoryPlan:
    """With one pass more; the plan itself if there is none, or if `shortlist` has smaller ones."""
    if plan.way == "sliced" or plan.micro_batch == 1:
        return plan
    passes = ceil(batch / plan.micro_batch) + 1
    return plan._replace(micro_batch=min(plan.micro_batch - 1, ceil(batch / passes)))


def _measure(
    config: TrainConfig, model: Networks, trained: list[Parameter], objective: Objective,
    backend: TrialBackend, batch: Batch,
) -> Trial:  # fmt: skip
    optimizer = make_optimizer(config, trained, backend.plan.momentum == "streamed")
    step = Step(model, trained, optimizer, objective, backend)
    batches = [batch] * min(config.accum, 2)  # gradients of the first stay during the second
    cuda = backend.device.type == "cuda"
    step(batches, LR)  # chooses kernels and fills the allocator's cache
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    step(batches, LR)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / len(batches)
    return Trial(backend.plan, seconds, torch.cuda.max_memory_allocated() if cuda else None)


def _batch(job: Job, model: Networks, objective: Objective) -> Batch:
    """Random data on torch's default device."""
    latents, noise = torch.randn(2, job.batch, model.unet.config["in_channels"], *job.size)
    timesteps = torch.randint(objective.first, objective.count, (job.batch,))
    words = model.text_encoder.config.vocab_size
    ids = torch.randint(0, words, (job.batch, model.tokens))
    return Batch(0, "", 0.0, 0, job.batch, latents, noise, timesteps, ids)
