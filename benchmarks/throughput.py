"""Steps per second of the real training step: fed from the store, and from one batch in memory.

    python benchmarks/throughput.py                            a small model, any machine
    python benchmarks/throughput.py --model sd15 --batch 32    SD1.5's shapes, random weights

The two feeds take turns in one run, so their ratio holds when the machine's speed drifts; what the
store's costs more is the loader. FLOPs are counted on the step itself, recomputation included.
"""

import itertools
import multiprocessing
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a file

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTokenizer

from benchmarks.demo.pipeline import VAE, make_networks, make_pipeline
from benchmarks.machine import cpu_name
from xlsd_cache import Precision, UserError
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.cli import quiet_libraries
from xlsd_cache.precision import set_precision
from xlsd_cache.store import LatentStore
from xlsd_cache.vae import load_vae
from xlsd_train.batches import Batch, BatchSource, Loader, Noising
from xlsd_train.captions import Captions
from xlsd_train.config import Phase, TrainConfig
from xlsd_train.diffusion import make_objective
from xlsd_train.latents import own_scaling
from xlsd_train.model import Model
from xlsd_train.optim import make_optimizer
from xlsd_train.run import peak_gib
from xlsd_train.schedule import Schedule
from xlsd_train.selection import selected
from xlsd_train.step import Step

# Dense TFLOP/s by NVIDIA's data sheets: fp32, tf32, bf16 with fp32 accumulation.
PEAKS: dict[str, dict[str, float]] = {
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2},
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0},
    "H100": {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4},
    "H200": {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4},
}


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

    optimizer: Literal["lion", "adamw"] = "lion"
    """As in xlsd-train."""

    gradient_checkpointing: bool = True
    """As in xlsd-train."""

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
    tflop: float  # a step, by every kernel that ran
    seconds: dict[str, float]  # feed -> median of a step
    peak_gib: float


def main(config: ThroughputConfig, command: Sequence[str]) -> None:
    """Measure each phase in a process of its own, whose memory's peak is its own; one table."""
    side = config.resolution or DEFAULT_RESOLUTION[config.model]
    columns = ("phase", "data", "steps/s", "images/s", "TFLOP/step", "TFLOP/s", "% of peak", "GiB")
    for phase in config.phase:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = process.submit(measure_phase, replace(config, phase=(phase,))).result()
        if phase == config.phase[0]:
            print(f"machine: {found.machine}")
            print(f"command: {shlex.join(('python', 'benchmarks/throughput.py', *command))}")
            print(f"precision: {found.precision}")
            print(f"peak: {found.peak:.3g} TFLOP/s ({found.peak_source})")
            checkpointing = "on" if config.gradient_checkpointing else "off"
            print(
                f"{config.model}, {side}x{side}, batch {config.batch}, {config.optimizer}, ", end=""
            )
            print(f"gradient checkpointing {checkpointing}, median of {config.steps} steps")
            print("".join(f"{name:>11}" for name in columns))
        for data, seconds in found.seconds.items():
            rate, share = found.tflop / seconds, 100 * found.tflop / seconds / found.peak
            cells = [f"{1 / seconds:.4g}", f"{config.batch / seconds:.4g}", f"{found.tflop:.4g}"]
            cells += [f"{rate:.4g}", f"{share:.1f}", f"{found.peak_gib:.2f}"]
            print("".join(f"{cell:>11}" for cell in (phase, data, *cells)))
        if len(found.seconds) == 2:
            fake, store = found.seconds["memory"], found.seconds["store"]
            print(f"{'':>11}the loader's share of the step: {100 * (store - fake) / store:+.1f}%")
        sys.stdout.flush()


DEFAULT_RESOLUTION = {"demo": 256, "sd15": 512}


def measure_phase(config: ThroughputConfig) -> Measured:
    """Everything about `config.phase[0]`, in this process."""
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = set_precision(config.precision)
    if device.type == "cuda":
        if config.limit_gib:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(config.limit_gib * 2**30 / total)
        torch.use_deterministic_algorithms(config.deterministic)
    peak, source = peak_tflops(config, device)
    with tempfile.TemporaryDirectory() as folder:
        seconds, tflop = measure(config, device, Path(folder))
    told = machine(device), precision, peak, source
    return Measured(*told, tflop, seconds, peak_gib(device))


def measure(
    config: ThroughputConfig, device: torch.device, folder: Path
) -> tuple[dict[str, float], float]:
    """Median seconds a step by feed, and TFLOP a step."""
    model, captions = make_model(config, folder)
    settings = TrainConfig(
        phase=config.phase[0], batch=config.batch, precision=config.precision,
        optimizer=config.optimizer,
    ).resolved()  # fmt: skip
    named = model.prepare(settings.phase, config.gradient_checkpointing)
    model.unet.to(device)
    model.text_encoder.to(device)
    mixed = "bf16" if config.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
    optimizer = make_optimizer(settings, named.values())
    objective = make_objective("eps", "none", 0, model.scheduler_config).to(device)
    model.scaling = model.scaling.to(device)
    step = Step(model, list(named.values()), optimizer, objective, accelerator)
    batch = fake_batch(config, captions).to(device)
    with flop_counter() as counter:
        step([batch], 1e-9)  # the warm-up: it allocates the optimizer's state as well
    feeds: dict[str, Iterator[Batch]] = {"memory": itertools.repeat(batch)}
    times: dict[str, list[float]] = {"memory": []}
    if config.fake_data:
        run(step, feeds, times, config.steps)
    else:
        with LatentStore.open(make_store(config, folder)) as store:
            selection = selected(store, np.ones(len(store), np.bool_))
            schedule = Schedule(selection.sizes, config.batch, 0)
            noising = Noising(objective.first, objective.count)
            source = BatchSource(store, selection, schedule, captions, "txt", noising, 0, 1)
            with closing(Loader(source, 0, config.steps + 1, device)) as loader:
                feeds["store"], times["store"] = iter(loader), []
                step([next(feeds["store"])], 1e-9)
                run(step, feeds, times, config.steps)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return medians, counter.get_total_flops() / 1e12


def flop_counter() -> FlopCounterMode:
    """Torch's counter of every kernel that runs, with the CPU's attention, which it leaves out."""
    counter = FlopCounterMode(display=False)
    for suffix in ("", "_backward"):
        name = f"_scaled_dot_product_flash_attention{{}}{suffix}"
        known = counter.flop_registry[getattr(torch.ops.aten, name.format(""))]
        counter.flop_registry[getattr(torch.ops.aten, name.format("_for_cpu"))] = known
    return counter


def run(
    step: Step, feeds: dict[str, Iterator[Batch]], times: dict[str, list[float]], steps: int
) -> None:
    """Time the steps, the feeds taking turns. The step ends with its loss on the host."""
    for _ in range(steps):
        for name, feed in feeds.items():
            begun = time.perf_counter()
            step([next(feed)], 1e-9)  # a rate at which no loss runs away over many steps
            times[name].append(time.perf_counter() - begun)


def make_model(config: ThroughputConfig, folder: Path) -> tuple[Model, Captions]:
    """The networks in memory; the small model's tokenizer serves both sizes."""
    make_pipeline(folder / "demo", "nano", CAPTIONS)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "demo" / "tokenizer")
    vocabulary = 49408 if config.model == "sd15" else len(tokenizer)
    unet, text_encoder = make_networks(config.model, vocabulary)
    scheduler = dict(DDPMScheduler.load_config(folder / "demo" / "scheduler"))
    vae = load_vae(str(VAE))
    parts = (unet, text_encoder, vae, tokenizer, scheduler)
    model = Model(*parts, config.model, folder / "demo", own_scaling(vae))
    return model, Captions(tokenizer, model.tokens, 0, 0.0)


CAPTIONS = ["woman, solo, smiling, outdoors", "a cup of coffee on a wooden table. it is morning."]


def fake_batch(config: ThroughputConfig, captions: Captions) -> Batch:
    """One batch of the right shapes, drawn once."""
    side = (config.resolution or DEFAULT_RESOLUTION[config.model]) // 8
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, config.batch, 4, side, side), generator=generator)
    timesteps = torch.randint(0, 1000, (config.batch,), generator=generator)
    texts = list(itertools.islice(itertools.cycle(CAPTIONS), config.batch))
    input_ids = captions.tokenize(texts)
    n = config.batch
    return Batch(0, "memory", 0.0, 0, n, latents / 0.13025, noise, timesteps, input_ids)


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


def peak_tflops(config: ThroughputConfig, device: torch.device) -> tuple[float, str]:
    """The peak to hold the step against, and where it is from."""
    if config.peak_tflops:
        return config.peak_tflops, "as stated"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, peaks in PEAKS.items():
            if card in name:
                return peaks[config.precision], f"data sheet of the {card}"
        raise UserError(f"no peak is known of the {name}; state it with --peak-tflops")
    side, best = 2048, float("inf")
    a = torch.randn(side, side)
    for _ in range(20):
        begun = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best / 1e12, f"the best of 20 {side}x{side} fp32 matmuls here"


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "numpy"))
    if device.type == "cpu":
        return f"{cpu_name()}, {torch.get_num_threads()} threads; {libraries}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    cudnn: Any = torch.backends.cudnn
    return f"{card}; CUDA {torch.version.cuda}, cuDNN {cudnn.version()}; {libraries}"


if __name__ == "__main__":
    try:
        main(tyro.cli(ThroughputConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"throughput: {error}")
