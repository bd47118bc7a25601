"""Steps per second of the real training step: fed from the store, and from one batch in memory.

    python benchmarks/throughput.py                            a small model, any machine
    python benchmarks/throughput.py --model sd15 --batch 32    SD1.5's shapes, random weights
    python benchmarks/throughput.py --against diffusers        beside the loop that most people use

All that is measured takes turns in one run, so ratios hold when the machine's speed drifts; what
the store's feed costs more is the loader. FLOPs are counted on the steps themselves, recomputation
included.
"""

import itertools
import multiprocessing
import shlex
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
import tyro
from PIL import Image
from torch import Tensor

from benchmarks.demo.pipeline import VAE
from benchmarks.lib.plain_loop import PlainLoop, optimizer_of, vae_of
from benchmarks.lib.real_step import (
    CAPTIONS,
    captions_of,
    drawn_batch,
    here,
    machine,
    model_of,
    peak_tflops,
    step_of,
)
from benchmarks.lib.turns import Contestant, Result, take_turns
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.dataset.dataset import LatentDataset
from xlsd_cache.dataset.sampler import BucketBatchSampler
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.device import set_precision
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.vocabulary import Precision
from xlsd_train.config.inputs import Phase
from xlsd_train.config.optimization import Optimizer
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.captions import CaptionColumns
from xlsd_train.data.loader import Batch, BatchSource, Loader
from xlsd_train.data.noise import Noising
from xlsd_train.memory.planner import GIB, SLICES, Planner, limit_card, limit_of
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.step.step import Plan, Step
from xlsd_train.training.setup import deterministic


@dataclass(frozen=True)
class ThroughputConfig:
    """Measure the real training step."""

    phase: tuple[Phase, ...] = ("unet", "te", "both")
    """Phases to measure, each in a process of its own."""

    model: Literal["demo", "sd15"] = "demo"
    """demo: a small SD1.5. sd15: its real shapes with random weights, 12 GB and more."""

    batch: int = 4
    """Images a step."""

    resolution: int | None = None
    """Pixels. Default: 512 for sd15, 256 for demo."""

    steps: int = 7
    """Timed steps of each feed, after one warm-up; the median counts."""

    fake_data: bool = False
    """Only the batch in memory: no store, no loader."""

    precision: Precision = "fp32"
    """As in xlsd-train."""

    optimizer: Optimizer = "lion"
    """As in xlsd-train."""

    against: Literal["diffusers"] | None = None
    """Also a plain loop: UNet2DConditionModel with gradient checkpointing and the libraries'
    optimizers, once with cached latents, once with the VAE's encoding in every step."""

    channels_last: bool = False
    """Also our step on channels-last memory."""

    memory: Literal["fastest", "plain", "cheap", "feed-forward", "sliced"] = "plain"
    """As in xlsd-train. fastest: what it would choose for --limit-gib or the whole card."""

    micro_batch: int | None = None
    """As in xlsd-train. Default: the batch; 4 where it is sliced."""

    deterministic: bool = True
    """As in xlsd-train."""

    limit_gib: float | None = None
    """Refuse the card more memory than this: 24 shows what a 24 GB card would do."""

    peak_tflops: float | None = None
    """The machine's peak for this precision. Default: the data sheet's; measured on a CPU."""

    threads: int | None = None
    """CPU threads. Default: torch's own."""


@dataclass(frozen=True)
class Measured:
    """What one phase's process found."""

    machine: str
    precision: str
    peak: float  # TFLOP/s
    peak_source: str
    plan: str
    results: dict[str, Result]  # by what was measured


COLUMNS = ("phase", "data", "steps/s", "images/s", "TFLOP/step", "TFLOP/s", "% of peak", "GiB")
DEFAULT_RESOLUTION = {"demo": 256, "sd15": 512}
MEMORY, STORE, LAST, CACHED, ENCODED = "memory", "store", "ch. last", "plain", "plain+VAE"


def main(config: ThroughputConfig, command: Sequence[str]) -> None:
    """Measure each phase in a process of its own, whose memory's peak is its own; one table."""
    side = side_of(config)
    for phase in config.phase:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = process.submit(measure_phase, replace(config, phase=(phase,))).result()
        if phase == config.phase[0]:
            print(f"machine: {found.machine}")
            print(f"command: {shlex.join(('python', 'benchmarks/throughput.py', *command))}")
            print(f"precision: {found.precision}")
            print(f"peak: {found.peak:.3g} TFLOP/s ({found.peak_source})")
            print(
                f"{config.model}, {side}x{side}, batch {config.batch}, {config.optimizer}, "
                f"{found.plan}, median of {config.steps} steps"
            )
            if config.against:
                print(f"{CACHED}: a loop as diffusers' example has it; {ENCODED}: it encodes, too")
            print("".join(f"{name:>11}" for name in COLUMNS))
        for name, result in found.results.items():
            print("".join(f"{cell:>11}" for cell in row(phase, name, result, config, found.peak)))
        for line in compared(found.results):
            print(f"{'':>11}{line}")
        sys.stdout.flush()


def row(phase: str, name: str, result: Result, config: ThroughputConfig, peak: float) -> list[str]:
    """Of the table."""
    if result.seconds is None:
        return [phase, name, "out of memory"]
    rate = result.tflop / result.seconds
    cells = [f"{1 / result.seconds:.4g}", f"{config.batch / result.seconds:.4g}"]
    cells += [f"{result.tflop:.4g}", f"{rate:.4g}", f"{100 * rate / peak:.1f}"]
    return [phase, name, *cells, f"{result.peak_gib:.2f}"]


def compared(results: dict[str, Result]) -> list[str]:
    """What the rows mean for each other."""
    seconds = {name: result.seconds for name, result in results.items() if result.seconds}
    lines = []
    if MEMORY in seconds and STORE in seconds:
        share = 100 * (seconds[STORE] - seconds[MEMORY]) / seconds[STORE]
        lines.append(f"the loader's share of the step: {share:+.1f}%")
    pairs = [(x, y) for x in (MEMORY, STORE, LAST) for y in (CACHED, ENCODED)]
    lines += [
        f"images/s, {x} / {y}: {seconds[y] / seconds[x]:.3f}"
        for x, y in [*pairs, (LAST, MEMORY)]
        if x in seconds and y in seconds
    ]
    return lines


def side_of(config: ThroughputConfig) -> int:
    """Pixels of a side."""
    return config.resolution or DEFAULT_RESOLUTION[config.model]


def measure_phase(config: ThroughputConfig) -> Measured:
    """Everything about `config.phase[0]`, in this process."""
    quiet_libraries()
    device = here()
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = set_precision(config.precision)
    if device == "cuda":
        if config.limit_gib:
            limit_card(config.limit_gib, torch.device(device))
        deterministic(config.deterministic)
    peak, source = peak_tflops(config.precision, config.peak_tflops, device)
    model, settings = model_of(config.model), settings_of(config)
    plan = plan_of(config, settings, model)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contestants = contestants_of(config, settings, model, plan, device, Path(folder), stack)
        results = take_turns(model, contestants, config.steps, device)
    return Measured(machine(device), precision, peak, source, str(plan), results)


def settings_of(config: ThroughputConfig) -> TrainConfig:
    """As a run would have them."""
    return TrainConfig(
        phase=config.phase[0], batch=config.batch, precision=config.precision,
        optimizer=config.optimizer,
    ).resolved()  # fmt: skip


def contestants_of(
    config: ThroughputConfig, settings: TrainConfig, model: ModelBundle, plan: Plan, device: str,
    folder: Path, stack: ExitStack,
) -> dict[str, Contestant]:  # fmt: skip
    """All that is to be measured; the store's loader is closed with the stack."""
    step = step_of(Step, model, settings, plan, device)
    side = side_of(config) // 8
    batch = drawn_batch(model, config.batch, (side, side), device)
    found = {MEMORY: ours(step, itertools.repeat(batch))}
    if not config.fake_data:
        found[STORE] = ours(step, open_feed(config, folder, step, stack))
    if config.channels_last:
        model.unet.to(memory_format=torch.channels_last)  # and so is the optimizer's state
        other = step_of(Step, model, settings, plan, device)
        found[LAST] = ours(other, itertools.repeat(batch), torch.channels_last)
    if config.against:
        optimizer, mixed = optimizer_of(settings, model), config.precision == "bf16"
        latents = batch.latents * model.vae.scaling_factor
        pixels = torch.rand(config.batch, 3, 8 * side, 8 * side, device=device) * 2 - 1
        cached = PlainLoop(model, optimizer, mixed, batch.input_ids, latents)
        encoding = replace(cached, pixels=pixels, vae=vae_of(config.model, device))
        found[CACHED] = Contestant(cached, optimizer, checkpointing=True)
        found[ENCODED] = Contestant(encoding, optimizer, checkpointing=True)
    return found


def ours(
    step: Step, feed: Iterator[Batch], layout: torch.memory_format = torch.contiguous_format
) -> Contestant:
    """Our step with batches from a feed."""

    def take() -> Tensor:
        loss, _ = step([next(feed)], 1e-9)  # a rate at which no loss runs away over many steps
        return loss

    return Contestant(take, step.optimizer, layout=layout)


def open_feed(
    config: ThroughputConfig, folder: Path, step: Step, stack: ExitStack
) -> Iterator[Batch]:
    """Batches of a store made here."""
    store = stack.enter_context(LatentStore.open(make_store(config, folder)))
    columns = CaptionColumns(("txt",), (1.0,))
    dataset = LatentDataset(store, "txt", scaled=False)
    sampler, captions = BucketBatchSampler(dataset, config.batch), captions_of(folder)
    noising = Noising(step.objective.first, step.objective.count)
    source = BatchSource(dataset, sampler, captions, columns, noising)
    steps = 2 * config.steps + 1  # on a card each timed one follows another
    loader = Loader(source, 0, steps, step.accelerator.device)
    return iter(stack.enter_context(closing(loader)))


def plan_of(config: ThroughputConfig, settings: TrainConfig, model: ModelBundle) -> Plan:
    """How the batch passes."""
    if config.memory == "fastest":
        device = torch.device(here())
        limit = limit_of(replace(settings, vram=config.limit_gib), device)
        if limit is None:
            raise UserError("--memory fastest needs to know the memory; add --limit-gib")
        side = side_of(config) // 8
        planner = Planner(settings, model.unet.config, model.text_encoder.config.to_dict())
        found = planner.fastest(config.batch, (side, side), limit, None, config.micro_batch)
        if found is None:
            raise UserError(f"no plan fits {limit / GIB:.2f} GiB; lower --batch")
        return found.plan
    default = SLICES[0] if config.memory == "sliced" else config.batch
    return Plan(config.memory, config.micro_batch or default)


def make_store(config: ThroughputConfig, folder: Path) -> Path:
    """A store of pictures made up here, through the real build."""
    side = config.resolution or DEFAULT_RESOLUTION[config.model]
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2 * config.batch):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(CAPTIONS[i % 2])
    options = ("--out", folder / "latents", "--vae", VAE, "--resolution", side)
    printed = sys.stdout
    sys.stdout = sys.stderr  # the table alone belongs on stdout
    try:
        if xlsd_cache(["build", str(images), *map(str, options)]):
            raise UserError("the store could not be built; see above")
    finally:
        sys.stdout = printed
    return folder / "latents"


if __name__ == "__main__":
    try:
        main(tyro.cli(ThroughputConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"throughput: {error}")
