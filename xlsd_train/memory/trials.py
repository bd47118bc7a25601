"""Take real steps with memory plans, in a process of its own.

That process has random weights and data of the run's shapes, so nothing of the run can change: no
weight, no random number, and on a GPU nothing that decides its kernels. (PyTorch keeps, for each
shape of convolution, the first of cuDNN's engines whose workspace fitted, for as long as a process
lives. A plan tried when memory is nearly full would leave other engines to the run than a resume
finds.) All memory is free when it ends, also pinned CPU memory, which torch never frees.
"""

import json
import logging
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.runtime.device import deterministic, device_of, set_precision
from xlsd_cache.runtime.gpu_memory import give_back, is_full
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.choose import cap_card
from xlsd_train.memory.meta_step import Size, random_networks
from xlsd_train.model.bundle import Networks
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.step.backend import DeviceBackend, MemoryPlan, drop_gradients
from xlsd_train.step.distributed import environment_alone
from xlsd_train.step.objective import Objective
from xlsd_train.step.sharing import Sharing
from xlsd_train.step.step import Step

log = logging.getLogger("xlsd.train.memory")

MOST = 4  # plans to measure that fit; at most twice as many are tried once one fits
LR = 1e-9  # so small that no loss diverges
_CHILD = "from xlsd_train.memory.trials import child; child()"


class Unsent:
    """A message with gradients that no other process gets: it only takes memory and a copy."""

    def __init__(self, message: Tensor) -> None:
        """Of any length."""

    def wait(self) -> None:
        """At once."""


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
    processes: int  # of the run
    size: Size
    device: torch.device
    limit: float  # bytes
    threads: int  # of torch on the CPU


class Trial(NamedTuple):
    """A plan that was tried."""

    plan: MemoryPlan
    seconds: float | None  # per batch; None: out of memory
    peak: int | None  # bytes; None on a CPU, and when out of memory


def in_child(job: Job) -> Iterator[Trial]:
    """What `trials` gives, from a process of its own; of one that crashes, what it gave so far."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _CHILD], env=environment_alone(), stdin=subprocess.PIPE,
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
        backend.sharing = Sharing(Unsent if job.processes > 1 else None)
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
