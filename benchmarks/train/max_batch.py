"""The largest batch in one pass for each strategy of the memory plan: predicted and measured.

    python benchmarks/train/max_batch.py                  SD1.5 on a 24 GB GPU; no GPU is needed
    python benchmarks/train/max_batch.py --model demo --check  against torch's CPU allocator

On a CUDA GPU the largest batch is also searched with real steps on random weights, under the limit
of GPU memory. `--check` runs on the CPU: it compares the predictions with the memory that torch's
allocator holds.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import psutil
import torch

from benchmarks.lib.allocations import peak_of
from benchmarks.lib.real_step import drawn_batch, here, machine_of, model_of, networks, step_of
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.runtime.device import describe_precision, deterministic, set_precision
from xlsd_cache.runtime.gpu_memory import give_back, is_full
from xlsd_cache.vocabulary import Precision
from xlsd_train.checkpoints.environment import peak_gib
from xlsd_train.config.inputs import Phase
from xlsd_train.config.train import TrainConfig
from xlsd_train.memory.choose import cap_card, largest, memory_limit
from xlsd_train.memory.meta_step import Size
from xlsd_train.memory.planner import GIB, KEEPING, Planner
from xlsd_train.memory.trials import TrialBackend
from xlsd_train.optim.lion import DLion
from xlsd_train.step.backend import MemoryPlan, Way, drop_gradients
from xlsd_train.step.blocks import Attention

TOLERANCE = 3.0  # percent of error that a prediction may have
COLUMNS = (
    "phase", "optimizer", "tokens", "size", "way", "largest", "FLOPs",
    "measured", "batch", "GiB", "allocated", "error %", "reserved",
)  # fmt: skip
PREDICTED = 7  # of these columns; the others are measured on a GPU


@dataclass(frozen=True)
class MaxBatchConfig(JsonOption):
    """Find the largest batch that fits in one pass."""

    phase: tuple[Phase, ...] = ("unet", "te", "both")
    """Phases to measure."""

    model: Literal["nano", "demo", "sd15"] = "sd15"
    """sd15: full size. The others are small SD1.5s."""

    size: tuple[str, ...] = ("512x512",)
    """Image sizes, WIDTHxHEIGHT."""

    tokens: tuple[int, ...] = (77,)
    """Lengths of the text encoder's input in tokens."""

    optimizer: tuple[Literal["lion", "dlion", "adamw"], ...] = ("lion",)
    """As in xlsd-train."""

    precision: Precision = "fp32"
    """As in xlsd-train."""

    vram: float = 24.0
    """GPU memory in GB. The run gets the share that xlsd-train uses."""

    way: tuple[Way, ...] = (*KEEPING, "sliced")
    """Strategies to measure."""

    slices: tuple[int, ...] = (4, 1)
    """Samples at once in the widest layers with the strategy sliced."""

    batch: int = 32
    """Batch whose memory is measured and predicted, or the largest that fits."""

    attention: Attention = "sdpa"
    """As in xlsd-train."""

    check: bool = False
    """Compare predictions with torch's CPU allocator at --batch."""

    parts: tuple[int, ...] = ()
    """Micro-batches to check, except for sliced. Default: the batch and half of it."""


def main(config: MaxBatchConfig, command: Sequence[str]) -> None:
    """Print one table: the largest batches, or the check of predictions."""
    quiet_libraries()
    device = "cpu" if config.check else here()
    report = Report("benchmarks/train/max_batch.py", command, machine_of(device))
    set_precision(config.precision)
    exact = config.attention == "exact"
    report.fact("precision", describe_precision(config.precision, exact))
    if config.check:
        check(config, report)
    else:
        search(config, device, report)
    report.write(config.json)


def search(config: MaxBatchConfig, device: str, report: Report) -> None:
    """Print and record the largest batch of every case."""
    limit = memory_limit(config.vram)
    assert limit is not None
    print(f"{config.model}, {config.vram:g} GB, of which the run gets {limit / GIB:.2f} GiB")
    if device == "cpu":
        print("predicted only: nothing is measured, as there is no CUDA GPU")
    else:
        cap_card(limit / GIB, torch.device(device))
        deterministic(True)
    report.fact("limit", f"{limit / GIB:.2f} GiB")
    print(line(COLUMNS if device == "cuda" else COLUMNS[:PREDICTED]))
    for phase, optimizer, tokens in cases(config):
        settings = TrainConfig(phase, optimizer=optimizer, precision=config.precision).resolved()
        planner = planner_of(config, settings, tokens, workspaces=True)
        trial: Trial | None = None  # frees the last model before the next is created
        trial = Trial(config, settings, tokens) if device == "cuda" else None
        for name in config.size:
            size = latents(name)
            for plan in plans(config):
                most = planner.largest_batch(plan, size, limit)
                factor = planner.predict(whole(plan, max(1, most)), max(1, most), size).factor
                cells: list[object] = [phase, optimizer, tokens, name, shown(plan), most]
                cells.append(round(factor, 3))
                if trial:
                    cells += trial.measure(planner, plan, most, size, config.batch)
                print(line(cells), flush=True)
                report.add("largest", **dict(zip(COLUMNS, cells, strict=False)))


def line(cells: Sequence[object]) -> str:
    """One line of the table."""
    widths = (6, 10, 7, 9, 13, 8, 7, 9, 6, 8, 10, 7, 9)
    return "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=False))


def cases(config: MaxBatchConfig) -> Iterator[tuple[Phase, Literal["lion", "dlion", "adamw"], int]]:
    """The cases that need a planner of their own."""
    for phase in config.phase:
        for optimizer in config.optimizer:
            for tokens in config.tokens:
                yield phase, optimizer, tokens


def plans(config: MaxBatchConfig) -> list[MemoryPlan]:
    """The plans of the strategies. Only sliced has several: one per number of slices."""
    slices = config.slices
    return [
        MemoryPlan(way, n, config.attention)
        for way in config.way
        for n in (slices if way == "sliced" else (1,))
    ]


def shown(plan: MemoryPlan) -> str:
    """The plan's name in the table: the micro-batch is the batch, except for sliced."""
    return f"sliced by {plan.micro_batch}" if plan.way == "sliced" else plan.way


def whole(plan: MemoryPlan, batch: int) -> MemoryPlan:
    """The plan that runs this batch in one pass."""
    return plan if plan.way == "sliced" else plan._replace(micro_batch=batch)


def latents(name: str) -> Size:
    """Height and width of the latents of images of WIDTHxHEIGHT pixels."""
    return largest({name: 1})


def planner_of(
    config: MaxBatchConfig, settings: TrainConfig, tokens: int, workspaces: bool
) -> Planner:
    """The planner of these networks, made from their configurations without weights."""
    with torch.device("meta"):
        unet, text_encoder = networks(config.model, tokens)
    return Planner(settings, unet.config, text_encoder.config.to_dict(), workspaces)


class Trial:
    """Real steps on the GPU in this process."""

    def __init__(self, config: MaxBatchConfig, settings: TrainConfig, tokens: int) -> None:
        _free()
        self._model = model_of(config.model, tokens)
        self._step = step_of(self._model, settings, MemoryPlan("plain", 1), "cuda", TrialBackend)

    def measure(
        self, planner: Planner, plan: MemoryPlan, predicted: int, size: Size, batch: int
    ) -> list[object]:
        """The measured columns of the table. The search starts at the predicted batch."""
        most = nearest(lambda count: self.fits(whole(plan, count), count, size), predicted)
        batch = min(batch, most)
        if not batch:
            return [0]
        _free()
        torch.cuda.reset_peak_memory_stats()
        self.fits(whole(plan, batch), batch, size)
        allocated = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
        peak = planner.predict(whole(plan, batch), batch, size).peak
        gib = [round(nbytes / GIB, 2) for nbytes in (peak, allocated, reserved)]
        error = round(100 * (peak / allocated - 1), 1)
        return [most, batch, *gib[:2], error, gib[2]]

    def fits(self, plan: MemoryPlan, batch: int, size: Size) -> bool:
        """Whether a step of this batch stays within the limit."""
        _free()
        step = self._step
        step.plan = plan
        try:
            step([drawn_batch(self._model, batch, size, "cuda")], 0.0)
            torch.cuda.synchronize()
        except RuntimeError as error:
            if not is_full(error):
                raise
        else:
            return True
        drop_gradients(step.parameters)
        if isinstance(step.optimizer, DLion):
            step.optimizer.forget()
        return False


def _free() -> None:
    """Free the cached memory of the last step, with its fragments."""
    give_back(torch.device("cuda"))


def nearest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that fits, searched from a guess. All numbers below it must fit."""
    guess = max(1, guess)
    stride = ceil(guess / 32)
    if fits(guess):
        low, high = guess, guess + stride
        while fits(high):
            stride *= 2
            low, high = high, high + stride
    else:
        low, high = max(0, guess - stride), guess
        while low and not fits(low):
            stride *= 2
            low, high = max(0, low - stride), low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check(config: MaxBatchConfig, report: Report) -> None:
    """Print and record predicted and measured peaks on the CPU, for one pass and several."""
    print(f"{config.model}, batch {config.batch}; real: the peak of torch's CPU allocator, in MiB")
    names = ("phase", "optimizer", "tokens", "size", "plan", "predicted", "real", "error", "s")
    form = "{:>6}{:>10}{:>7}{:>9}{:>36}{:>11}{:>11}{:>8}{:>7}"
    print(form.format(*names))
    errors, before = [], psutil.Process().memory_info().rss / GIB
    for phase, optimizer, tokens in cases(config):
        settings = TrainConfig(phase, optimizer=optimizer, precision=config.precision).resolved()
        planner = planner_of(config, settings, tokens, workspaces=False)
        model = model_of(config.model, tokens)
        step = step_of(model, settings, MemoryPlan("plain", 1), "cpu", TrialBackend)
        for name in config.size:
            size = latents(name)
            for plan in check_plans(config):
                step.plan, begun = plan, time.perf_counter()
                real = peak_of(step, [drawn_batch(model, config.batch, size, "cpu")])
                seconds = time.perf_counter() - begun
                predicted = planner.predict(plan, config.batch, size).peak
                errors.append(100 * (predicted / real - 1))
                cells = [phase, optimizer, tokens, name, plan, f"{predicted / 2**20:.2f}"]
                cells += [f"{real / 2**20:.2f}", f"{errors[-1]:+.2f}%", f"{seconds:.1f}"]
                print(form.format(*map(str, cells)), flush=True)
                row = dict(zip(names[:5], map(str, cells), strict=False))
                peaks = {"predicted_mib": predicted / 2**20, "real_mib": real / 2**20}
                report.add("check", **row, **peaks, error=errors[-1], seconds=seconds)
    report.target("largest error in percent", max(map(abs, errors)), most=TOLERANCE)
    most = peak_gib(torch.device("cpu"))
    print(f"memory of this process: {before:.2f} GiB without a model, {most:.2f} GiB at its peak")


def check_plans(config: MaxBatchConfig) -> list[MemoryPlan]:
    """Every strategy, with the batch in one pass and in several."""
    parts = config.parts or (config.batch, ceil(config.batch / 2))
    return [
        MemoryPlan(way, n, config.attention)
        for way in config.way
        for n in (config.slices if way == "sliced" else parts)
    ]


if __name__ == "__main__":
    run_script(main, MaxBatchConfig, __doc__)
