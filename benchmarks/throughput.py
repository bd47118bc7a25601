"""Steps per second of the training step, with batches from the store and with a batch in memory.

    python benchmarks/throughput.py                            a small model, any machine
    python benchmarks/throughput.py --model sd15 --batch 32    SD1.5's size, random weights
    python benchmarks/throughput.py --against diffusers        also diffusers' loop

Rows alternate step by step, so that ratios are valid when the machine's speed drifts. The
difference between the two data sources is the cost of the loader. FLOPs are counted in the measured
steps and include recomputation.
"""

import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a file

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.demo.pipeline import VAE
from benchmarks.lib.commands import run_command
from benchmarks.lib.plain_loop import PlainLoop, optimizer_of, vae_of
from benchmarks.lib.real_step import (
    CAPTIONS,
    captions_of,
    drawn_batch,
    here,
    machine_of,
    model_of,
    peak_tflops,
    step_of,
)
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.lib.turns import Contestant, Result, take_turns
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.dataset.dataset import LatentDataset
from xlsd_cache.dataset.sampler import BucketBatchSampler
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.device import deterministic, set_precision
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.vocabulary import Precision
from xlsd_train.config.inputs import Phase
from xlsd_train.config.optimization import Optimizer
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.captions import CaptionColumns
from xlsd_train.data.loader import Batch, BatchSource, Loader
from xlsd_train.data.noise import Noising
from xlsd_train.memory.choose import asked, cap_card, memory_limit
from xlsd_train.memory.measure import Measuring
from xlsd_train.memory.planner import GIB, SLICES, Planner
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.step.backend import MemoryPlan
from xlsd_train.step.step import Step


@dataclass(frozen=True)
class ThroughputConfig(JsonOption):
    """Measure the training step."""

    phase: tuple[Phase, ...] = ("unet", "te", "both")
    """Phases to measure, each in its own process."""

    model: Literal["demo", "sd15"] = "demo"
    """demo: a small SD1.5. sd15: full size with random weights, needs 12 GB and more."""

    batch: int = 4
    """Images per step."""

    resolution: int | None = None
    """Side in pixels. Default: 512 for sd15, 256 for demo."""

    steps: int = 7
    """Timed steps per row, after one warm-up step; the median is reported."""

    fake_data: bool = False
    """Measure only the batch in memory: no store, no loader."""

    precision: Precision = "fp32"
    """As in xlsd-train."""

    optimizer: Optimizer = "lion"
    """As in xlsd-train."""

    against: Literal["diffusers"] | None = None
    """Also measure a plain loop with gradient checkpointing and the libraries' optimizers, once
    with cached latents and once with the VAE in every step."""

    channels_last: bool = False
    """Also measure our step in channels-last memory format."""

    memory: Literal["fastest", "plain", "cheap", "feed-forward", "sliced"] = "plain"
    """As in xlsd-train. fastest: the plan it would choose for --limit-gib or the whole GPU."""

    micro_batch: int | None = None
    """As in xlsd-train. Default: the batch; 4 with --memory sliced."""

    deterministic: bool = True
    """As in xlsd-train."""

    limit_gib: float | None = None
    """Limit the GPU memory: 24 shows what a 24 GB card does."""

    peak_tflops: float | None = None
    """Peak of the device at this precision. Default: data sheet for a GPU, measured for a CPU."""

    threads: int | None = None
    """CPU threads. Default: torch's default."""


@dataclass(frozen=True)
class PhaseResult:
    """The measurements of one phase."""

    machine: str
    precision: str
    peak: float  # TFLOP/s
    peak_source: str
    plan: str
    results: dict[str, Result]  # by row


COLUMNS = ("phase", "data", "steps/s", "images/s", "TFLOP/step", "TFLOP/s", "% of peak", "GiB")
DEFAULT_RESOLUTION = {"demo": 256, "sd15": 512}
MEMORY, STORE, LAST, CACHED, ENCODED = "memory", "store", "ch. last", "plain", "plain+VAE"


def main(config: ThroughputConfig, command: Sequence[str]) -> None:
    """Measure each phase in its own process, so that peak memory is per phase; one table."""
    report: Report | None = None
    for phase in config.phase:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            result = process.submit(measure_phase, replace(config, phase=(phase,))).result()
        report = report or print_head(config, command, result)
        for name, measured in result.results.items():
            row = row_of(measured, config, result.peak)
            report.add("step", phase=phase, data=name, **row)
            print("".join(f"{cell:>11}" for cell in (phase, name, *cells_of(row))))
        print_ratios(phase, result.results, report)
        sys.stdout.flush()
    if report:
        report.write(config.json)


def print_head(config: ThroughputConfig, command: Sequence[str], result: PhaseResult) -> Report:
    """Print what holds for all rows, and the names of the columns."""
    side = side_of(config)
    report = Report("benchmarks/throughput.py", command, result.machine)
    report.fact("precision", result.precision)
    report.fact("peak", f"{result.peak:.3g} TFLOP/s ({result.peak_source})")
    print(
        f"{config.model}, {side}x{side}, batch {config.batch}, {config.optimizer}, "
        f"{result.plan}, median of {config.steps} steps"
    )
    if config.against:
        print(f"{CACHED}: the loop of diffusers' example; {ENCODED}: also encodes the images")
    print("".join(f"{name:>11}" for name in COLUMNS))
    return report


def row_of(result: Result, config: ThroughputConfig, peak: float) -> dict[str, float | None]:
    """The figures of a row; all but the memory are None if it ran out of memory."""
    seconds = result.seconds
    return {
        "steps_per_s": 1 / seconds if seconds else None,
        "images_per_s": config.batch / seconds if seconds else None,
        "tflop_per_step": result.tflop if seconds else None,
        "tflop_per_s": result.tflop / seconds if seconds else None,
        "percent_of_peak": 100 * result.tflop / seconds / peak if seconds else None,
        "peak_gib": result.peak_gib,
    }


def cells_of(row: dict[str, float | None]) -> list[str]:
    """The figures as printed."""
    if row["steps_per_s"] is None:
        return ["out of memory"]
    *rates, share, memory = row.values()
    return [*(f"{rate:.4g}" for rate in rates), f"{share:.1f}", f"{memory:.2f}"]


def print_ratios(phase: str, results: dict[str, Result], report: Report) -> None:
    """Print and record the loader's share, and images/s of each row relative to others."""
    seconds = {name: result.seconds for name, result in results.items() if result.seconds}
    if MEMORY in seconds and STORE in seconds:
        share = 100 * (seconds[STORE] - seconds[MEMORY]) / seconds[STORE]
        print(f"{'':>11}the loader's share of the step: {share:+.1f}%")
        report.add("loader", phase=phase, percent_of_step=share)
    pairs = [(x, y) for x in (MEMORY, STORE, LAST) for y in (CACHED, ENCODED)]
    for x, y in [*pairs, (LAST, MEMORY)]:
        if x in seconds and y in seconds:
            ratio = seconds[y] / seconds[x]
            print(f"{'':>11}images/s, {x} / {y}: {ratio:.3f}")
            report.add("ratio", phase=phase, of=x, to=y, images_per_s=ratio)


def side_of(config: ThroughputConfig) -> int:
    """Side of the images in pixels."""
    return config.resolution or DEFAULT_RESOLUTION[config.model]


def measure_phase(config: ThroughputConfig) -> PhaseResult:
    """Measure `config.phase[0]` in this process."""
    quiet_libraries()
    device = here()
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = set_precision(config.precision)
    if device == "cuda":
        if config.limit_gib:
            cap_card(config.limit_gib, torch.device(device))
        deterministic(config.deterministic)
    peak, source = peak_tflops(config.precision, config.peak_tflops, device)
    model, settings = model_of(config.model), settings_of(config)
    plan = plan_of(config, settings, model)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contestants = contestants_of(config, settings, model, plan, device, Path(folder), stack)
        results = take_turns(model, contestants, config.steps, device)
    return PhaseResult(machine_of(device), precision, peak, source, str(plan), results)


def settings_of(config: ThroughputConfig) -> TrainConfig:
    """The options of a run."""
    return TrainConfig(
        phase=config.phase[0], batch=config.batch, precision=config.precision,
        optimizer=config.optimizer,
    ).resolved()  # fmt: skip


def contestants_of(
    config: ThroughputConfig,
    settings: TrainConfig,
    model: ModelBundle,
    plan: MemoryPlan,
    device: str,
    folder: Path,
    stack: ExitStack,
) -> dict[str, Contestant]:
    """The steps to measure by row; the store's loader is closed with the stack."""
    step = step_of(model, settings, plan, device)
    side = side_of(config) // 8
    batch = drawn_batch(model, config.batch, (side, side), device)
    steps = {MEMORY: ours(step, itertools.repeat(batch))}
    if not config.fake_data:
        steps[STORE] = ours(step, open_feed(config, folder, step, stack))
    if config.channels_last:
        model.unet.to(memory_format=torch.channels_last)  # the optimizer's state follows
        other = step_of(model, settings, plan, device)
        steps[LAST] = ours(other, itertools.repeat(batch), torch.channels_last)
    if config.against:
        optimizer, mixed = optimizer_of(settings, model), config.precision == "bf16"
        latents = batch.latents * model.vae.scaling_factor
        pixels = torch.rand(config.batch, 3, 8 * side, 8 * side, device=device) * 2 - 1
        cached = PlainLoop(model, optimizer, mixed, batch.input_ids, latents)
        encoding = replace(cached, pixels=pixels, vae=vae_of(config.model, device))
        steps[CACHED] = Contestant(cached, optimizer, checkpointing=True)
        steps[ENCODED] = Contestant(encoding, optimizer, checkpointing=True)
    return steps


def ours(
    step: Step, feed: Iterator[Batch], layout: torch.memory_format = torch.contiguous_format
) -> Contestant:
    """Our step with batches from an iterator."""

    def take() -> Tensor:
        loss, _ = step([next(feed)], 1e-9)  # so small that no loss diverges over many steps
        return loss

    return Contestant(take, step.optimizer, layout=layout)


def open_feed(
    config: ThroughputConfig, folder: Path, step: Step, stack: ExitStack
) -> Iterator[Batch]:
    """Batches from a store that is built here."""
    store = stack.enter_context(LatentStore.open(make_store(config, folder)))
    columns = CaptionColumns(("txt",), (1.0,))
    dataset = LatentDataset(store, "txt", scaled=False)
    sampler, captions = BucketBatchSampler(dataset, config.batch), captions_of(folder)
    noising = Noising(step.objective.first, step.objective.count)
    source = BatchSource(dataset, sampler, captions, columns, noising)
    steps = 2 * config.steps + 1  # on a GPU an untimed step precedes each timed one
    loader = Loader(source, 0, steps, step.backend.device)
    return iter(stack.enter_context(closing(loader)))


def plan_of(config: ThroughputConfig, settings: TrainConfig, model: ModelBundle) -> MemoryPlan:
    """The memory plan of the step. Raises UserError if no plan fits."""
    if config.memory == "fastest":
        device = torch.device(here())
        limit = memory_limit(config.limit_gib, device)
        if limit is None:
            raise UserError("--memory fastest needs a memory limit on this device; add --limit-gib")
        side = side_of(config) // 8
        networks = dict(model.unet.config), model.text_encoder.config.to_dict()
        settings = replace(
            settings, vram=config.limit_gib, micro_batch=config.micro_batch,
            deterministic=config.deterministic,
        )  # fmt: skip
        planner, batch, size = Planner(settings, *networks), config.batch, (side, side)
        if plan := Measuring(settings, networks, device, limit)(planner, batch, size):
            return plan
        choice = planner.fastest(batch, size, limit, asked(settings))
        if choice is None:
            raise UserError(f"no plan fits {limit / GIB:.2f} GiB; lower --batch")
        return choice.plan
    default = SLICES[0] if config.memory == "sliced" else config.batch
    return MemoryPlan(config.memory, config.micro_batch or default)


def make_store(config: ThroughputConfig, folder: Path) -> Path:
    """Build a store of random images."""
    side = side_of(config)
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2 * config.batch):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(CAPTIONS[i % 2])
    options = ("--out", folder / "latents", "--vae", VAE, "--resolution", side)
    run_command(xlsd_cache, "build", images, *options)
    return folder / "latents"


if __name__ == "__main__":
    run_script(main, ThroughputConfig, __doc__)
