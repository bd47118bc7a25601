"""Build the training step of a run: device, memory plan, optimizer."""

import logging
import os
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from xlsd_cache.dataset.selection import Selection
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.device import deterministic, device_of, set_precision
from xlsd_cache.runtime.gpu_memory import give_back
from xlsd_train.checkpoints.checkpoint import load_optimizer
from xlsd_train.checkpoints.comparison import compare_batch
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.memory.choose import cap_card, choose, mean_size, memory_limit
from xlsd_train.memory.gpus import device_name, known_as
from xlsd_train.memory.measure import Measuring
from xlsd_train.memory.meta_step import Size
from xlsd_train.memory.planner import GIB, Planner
from xlsd_train.optim.factory import make_optimizer, streamed_nbytes
from xlsd_train.progress.pace import predicted
from xlsd_train.runs.record import MeasuredPlan, RunRecord
from xlsd_train.step.backend import DeviceBackend, MemoryPlan
from xlsd_train.step.blocks import EAGER
from xlsd_train.step.compile import Compiled, check_compiler, warm_up
from xlsd_train.step.distributed import TIMEOUT
from xlsd_train.step.step import Step
from xlsd_train.training.setup_model import RunModel

log = logging.getLogger("xlsd.train.training")


@dataclass(frozen=True)
class Batching:
    """The batch size of a run, and how a batch passes."""

    batch: int
    plan: MemoryPlan  # of each process
    text: str  # the plan's prediction, for people
    step_s: tuple[str, float] | None  # (GPU, seconds per batch at its peak throughput), if known
    tflop: float | None  # per image on average, if known
    measured: list[MeasuredPlan] = field(default_factory=list)


def start(config: TrainConfig) -> Accelerator:
    """Set precision, threads and determinism, and find the device and the other processes."""
    device = device_of(config.device)
    set_precision(config.precision)
    deterministic(config.deterministic)
    if config.compile:
        check_compiler(device)
    mixed = "bf16" if config.precision == "bf16" else "no"
    handler = InitProcessGroupKwargs(timeout=TIMEOUT)
    accelerator = Accelerator(
        mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[handler]
    )
    if config.threads:  # after accelerate, which sets its own number for several processes
        torch.set_num_threads(config.threads)
    return accelerator


def plan_batch(
    config: TrainConfig,
    run: RunFolder,
    selection: Selection,
    model: RunModel,
    accelerator: Accelerator,
) -> Batching:
    """Choose batch and memory plan; a resumed run keeps those that it was started with."""
    device = accelerator.device
    if config.vram is not None and device.type == "cuda":
        cap_card(config.vram, device)
    needed, free = _host_nbytes(config, model), psutil.virtual_memory().available
    before = run.before
    if before and not config.force:
        plan = _kept_plan(config, run, before)
        _check_host(plan, needed, free)
        tflop = before.tflop if plan.way == before.plan[0] else None
        return Batching(before.batch, plan, before.memory, before.step_s, tflop, before.measured)
    if config.momentum == "auto" and needed > free:
        config = replace(config, momentum="resident")
    chosen: list[Any] = [None]
    if accelerator.is_main_process:  # GPUs differ in free memory, and sums must not differ
        config = replace(config, objective=model.objective.kind)
        networks = dict(model.bundle.unet.config), model.bundle.text_encoder.config.to_dict()
        card = device_name(device) if device.type == "cuda" else ""
        limit, measuring = memory_limit(config.vram, device), None
        if limit is not None and config.measure and config.memory == "fastest":
            measuring = Measuring(config, networks, device, limit, accelerator.num_processes)
        batch, plan, prediction = choose(
            config,
            lambda: Planner(config, *networks, processes=accelerator.num_processes),
            selection.sizes,
            accelerator.num_processes,
            limit,
            known_as(card),
            measuring,
        )
        unknown = f"batch {batch}, {plan}: no memory limit is known here; --vram sets one"
        step_s = predicted(prediction.seconds, card) if prediction else None
        share = mean_size(selection.sizes)
        tflop = share * prediction.tflop / prediction.batch if prediction else None
        text = str(prediction or unknown) + (measuring.text() if measuring else "")
        rows = measuring.rows if measuring else []
        chosen = [Batching(batch, plan, text, step_s, tflop, rows)]
    batching: Batching = broadcast_object_list(chosen)[0]
    _check_host(batching.plan, needed, free)
    compare_batch(run, batching.batch, batching.plan, config.force)
    return batching


def _kept_plan(config: TrainConfig, run: RunFolder, before: RunRecord) -> MemoryPlan:
    """The plan of the checkpoint, with the momentum where this command's --momentum says."""
    plan = MemoryPlan(*run.state().get("plan", before.plan)[:3])
    was = MemoryPlan(*before.plan).momentum
    return plan._replace(momentum=was if config.momentum == "auto" else config.momentum)


def _host_nbytes(config: TrainConfig, model: RunModel) -> int:
    """CPU memory that streamed momentum takes in all processes of this machine."""
    nbytes = streamed_nbytes(config, list(model.named.values()))
    return nbytes.host * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if nbytes else 0


def _check_host(plan: MemoryPlan, needed: int, free: int) -> None:
    """Raise UserError if the CPU's memory is too small for streamed momentum."""
    if plan.momentum == "streamed" and needed > free:
        raise UserError(
            f"streamed momentum takes {needed / GIB:.2f} GiB of CPU memory, and "
            f"{free / GIB:.2f} GiB are free; close other programs, or use --momentum resident"
        )


def build_step(
    config: TrainConfig, run: RunFolder, model: RunModel, plan: MemoryPlan,
    accelerator: Accelerator, size: Size,
) -> Step:  # fmt: skip
    """Move the model to the device, and make its optimizer, with the checkpoint's state if any.

    With --compile, compile for latents of `size` and the micro-batch that the run began with.
    """
    device = accelerator.device
    model.bundle.to(device, config.channels_last)
    optimizer = make_optimizer(config, model.named.values(), plan.momentum == "streamed")
    if run.checkpoint:
        load_optimizer(run.checkpoint, model.named, optimizer)
    parameters, objective = list(model.named.values()), model.objective.to(device)
    backend = DeviceBackend(accelerator, plan)
    compiled = Compiled() if config.compile and not config.dry_run else None
    step = Step(model.bundle, parameters, optimizer, objective, backend, compiled or EAGER)
    if compiled:
        began = MemoryPlan(*run.before.plan) if run.before else plan
        warm_up(step, compiled, began.micro_batch, size)
        give_back(device)
    return step
