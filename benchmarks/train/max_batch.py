"""The largest batch that each way of the memory plan passes at once: predicted, and measured.

    python benchmarks/train/max_batch.py                  SD1.5 on a 24 GB card; no card is needed
    python benchmarks/train/max_batch.py --model demo --check  against the CPU's allocator

Where there is a CUDA card, the largest batch is also searched for by real steps with random
weights, the card refusing all beyond the limit: what runs out of memory does not fit. `--check`
does without a card: it sets what torch's allocator really holds beside what the plan says.
"""

import shlex
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
import tyro

from benchmarks.lib.allocations import peak_of
from benchmarks.lib.real_step import (
    drawn_batch,
    here,
    machine,
    model_of,
    networks,
    step_of,
)
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.device import set_precision
from xlsd_cache.runtime.gpu_memory import give_back, is_full
from xlsd_cache.vocabulary import Precision
from xlsd_train.checkpoints.environment import peak_gib
from xlsd_train.config.inputs import Phase
from xlsd_train.config.train import TrainConfig
from xlsd_train.memory.meta_step import Size
from xlsd_train.memory.planner import GIB, KEEPING, Planner, largest, limit_card, limit_of
from xlsd_train.optim.lion import DLion
from xlsd_train.step.step import Plan, Step, Way, drop_gradients
from xlsd_train.training.setup import deterministic

TOLERANCE = 3.0  # percent that a prediction may be off


@dataclass(frozen=True)
class MaxBatchConfig:
    """Find the largest batch that passes at once."""

    phase: tuple[Phase, ...] = ("unet", "te", "both")
    """Phases to look at."""

    model: Literal["nano", "demo", "sd15"] = "sd15"
    """sd15: its real shapes. The others are small SD1.5s."""

    size: tuple[str, ...] = ("512x512",)
    """Pictures, WIDTHxHEIGHT."""

    tokens: tuple[int, ...] = (77,)
    """Lengths of the text encoder's input."""

    optimizer: tuple[Literal["lion", "dlion", "adamw"], ...] = ("lion",)
    """As in xlsd-train."""

    precision: Precision = "fp32"
    """As in xlsd-train."""

    vram: float = 24.0
    """GB of the card; the run gets what xlsd-train gives it of them."""

    way: tuple[Way, ...] = (*KEEPING, "sliced")
    """Ways to look at."""

    slices: tuple[int, ...] = (4, 1)
    """Samples at once in the widest layers, where the batch is sliced."""

    batch: int = 32
    """Images whose memory is measured and predicted; fewer where they do not fit."""

    check: bool = False
    """On the CPU: predictions beside what torch's allocator holds, at --batch."""

    parts: tuple[int, ...] = ()
    """Micro-batches to check, where not sliced. Default: the whole batch, and half of it."""


class Strict(Step):
    """The step, which does not go over to another plan when its memory is full."""

    def _tighten(self, error: RuntimeError) -> None:
        raise error


def main(config: MaxBatchConfig, command: Sequence[str]) -> None:
    """Print the table."""
    quiet_libraries()
    device = "cpu" if config.check else here()
    print(f"machine: {machine(device)}")
    print(f"command: {shlex.join(('python', 'benchmarks/train/max_batch.py', *command))}")
    print(f"precision: {set_precision(config.precision)}")
    if config.check:
        check(config)
        return
    limit = limit_of(TrainConfig("unet", vram=config.vram), None)
    assert limit is not None
    print(f"{config.model}, {config.vram:g} GB, of which the run gets {limit / GIB:.2f} GiB")
    if device == "cpu":
        print("predicted only: nothing is measured, for there is no CUDA card here")
    else:
        limit_card(limit / GIB, torch.device(device))
        deterministic(True)
    columns = ["phase", "optimizer", "tokens", "size", "way", "largest", "FLOPs"]
    columns += ["measured", "batch", "GiB", "allocated", "error", "reserved"] * (device == "cuda")
    print(row(columns))
    for phase, optimizer, tokens in cases(config):
        settings = TrainConfig(phase, optimizer=optimizer, precision=config.precision).resolved()
        planner = planner_of(config, settings, tokens, workspaces=True)
        trial: Trial | None = None  # the last one's model goes before the next is made
        trial = Trial(config, settings, tokens) if device == "cuda" else None
        for name in config.size:
            size = latents(name)
            for plan in plans(config):
                most = planner.largest_batch(plan, size, limit)
                factor = planner.predict(whole(plan, max(1, most)), max(1, most), size).factor
                cells: list[object] = [
                    phase,
                    optimizer,
                    tokens,
                    name,
                    told(plan),
                    most,
                    f"{factor:.3f}",
                ]
                if trial:
                    cells += trial.measure(planner, plan, most, size, config.batch)
                print(row(cells), flush=True)


def row(cells: Sequence[object]) -> str:
    """One line of the table."""
    widths = (6, 10, 7, 9, 13, 8, 7, 9, 6, 8, 10, 7, 9)
    return "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=False))


def cases(config: MaxBatchConfig) -> Iterator[tuple[Phase, Literal["lion", "dlion", "adamw"], int]]:
    """What a planner is made for."""
    for phase in config.phase:
        for optimizer in config.optimizer:
            for tokens in config.tokens:
                yield phase, optimizer, tokens


def plans(config: MaxBatchConfig) -> list[Plan]:
    """The ways; micro-batches are the whole batch but where it is sliced."""
    slices = config.slices
    return [Plan(way, n) for way in config.way for n in (slices if way == "sliced" else (1,))]


def told(plan: Plan) -> str:
    """What the table calls it."""
    return str(plan) if plan.way == "sliced" else plan.way


def whole(plan: Plan, batch: int) -> Plan:
    """The plan that passes this batch at once."""
    return plan if plan.way == "sliced" else Plan(plan.way, batch)


def latents(name: str) -> Size:
    """Height and width of the latents of pictures WIDTHxHEIGHT."""
    return largest({name: 1})


def planner_of(
    config: MaxBatchConfig, settings: TrainConfig, tokens: int, workspaces: bool
) -> Planner:
    """The planner of these networks, of which only the configurations are made."""
    with torch.device("meta"):
        unet, text_encoder = networks(config.model, tokens)
    return Planner(settings, unet.config, text_encoder.config.to_dict(), workspaces)


class Trial:
    """Real steps on the card, one after another in this process."""

    def __init__(self, config: MaxBatchConfig, settings: TrainConfig, tokens: int) -> None:
        _free()
        model = model_of(config.model, tokens)
        self._step = step_of(Strict, model, settings, Plan("plain", 1), "cuda")

    def measure(
        self, planner: Planner, plan: Plan, predicted: int, size: Size, batch: int
    ) -> list[object]:
        """The table's measured columns, found from the predicted largest batch on."""
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
        memory = (f"{nbytes / GIB:.2f}" for nbytes in (peak, allocated, reserved))
        said, was, kept = memory
        return [most, batch, said, was, f"{100 * (peak / allocated - 1):+.1f}%", kept]

    def fits(self, plan: Plan, batch: int, size: Size) -> bool:
        """Whether a step of this batch stays within the limit."""
        _free()
        step = self._step
        step.plan = plan
        try:
            step([drawn_batch(step.model, batch, size, "cuda")], 0.0)
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
    """What the last trial held, fragments included."""
    give_back(torch.device("cuda"))


def nearest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that fits, all below it fitting, looked for around a guess."""
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


def check(config: MaxBatchConfig) -> None:
    """Predicted and real peaks on the CPU: ways, whole and in parts."""
    print(f"{config.model}, batch {config.batch}; real: what torch's CPU allocator held, in MiB")
    names = ("phase", "optimizer", "tokens", "size", "plan", "predicted", "real", "error", "s")
    form = "{:>6}{:>10}{:>7}{:>9}{:>20}{:>11}{:>11}{:>8}{:>7}"
    print(form.format(*names))
    errors, before = [], psutil.Process().memory_info().rss / GIB
    for phase, optimizer, tokens in cases(config):
        settings = TrainConfig(phase, optimizer=optimizer, precision=config.precision).resolved()
        planner = planner_of(config, settings, tokens, workspaces=False)
        step = step_of(Strict, model_of(config.model, tokens), settings, Plan("plain", 1), "cpu")
        for name in config.size:
            size = latents(name)
            for plan in check_plans(config):
                step.plan, begun = plan, time.perf_counter()
                real = peak_of(step, [drawn_batch(step.model, config.batch, size, "cpu")])
                seconds = time.perf_counter() - begun
                predicted = planner.predict(plan, config.batch, size).peak
                errors.append(100 * (predicted / real - 1))
                cells = [phase, optimizer, tokens, name, plan, f"{predicted / 2**20:.2f}"]
                cells += [f"{real / 2**20:.2f}", f"{errors[-1]:+.2f}%", f"{seconds:.1f}"]
                print(form.format(*map(str, cells)), flush=True)
    good = sum(abs(error) <= TOLERANCE for error in errors)
    word = "PASS" if good == len(errors) else "FAIL"
    print(f"{word}  {good} of {len(errors)} predictions are within {TOLERANCE:g}%", end="")
    print(f", the worst is {max(errors, key=abs):+.2f}%")
    most = peak_gib(torch.device("cpu"))
    print(
        f"this process's memory: {before:.2f} GiB before a model was made, {most:.2f} at its peak",
        end="",
    )
    print(f", so {most - before:.2f} for all that the steps took")


def check_plans(config: MaxBatchConfig) -> list[Plan]:
    """Every way, with the whole batch and in parts."""
    parts = config.parts or (config.batch, ceil(config.batch / 2))
    return [
        Plan(way, n) for way in config.way for n in (config.slices if way == "sliced" else parts)
    ]


if __name__ == "__main__":
    try:
        main(tyro.cli(MaxBatchConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"max_batch: {error}")
