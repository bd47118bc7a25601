"""Relative error of the gradients of every memory plan against the plain step, at SD1.5's size.

    python benchmarks/train/equal.py                        minutes, and 16 GB
    python benchmarks/train/equal.py --model demo           a small model, seconds

All gradients are compared as one vector: with the plain step in float32, and with float64 if
`--float64` is given.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import torch
from torch import Tensor

from benchmarks.lib.real_step import drawn_batch, machine_of, model_of, step_of
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.runtime.device import set_precision
from xlsd_train.config.inputs import Phase
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.step.backend import DeviceBackend, MemoryPlan
from xlsd_train.step.step import Step


@dataclass(frozen=True)
class EqualConfig(JsonOption):
    """Compare the gradients of the memory plans."""

    model: Literal["nano", "demo", "sd15"] = "sd15"
    """sd15: full size with random weights."""

    phase: Phase = "unet"
    """As in xlsd-train."""

    batch: int = 2
    """Images per step."""

    resolution: int = 512
    """Side of the images in pixels."""

    float64: bool = False
    """Also compare with float64: twice the memory, several times the time."""


@dataclass
class GradientKeeper(DeviceBackend):
    """Keeps the gradients of a step, and changes no weight."""

    gradients: dict[int, Tensor] = field(default_factory=dict)

    def apply(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
    ) -> Sequence[Tensor]:
        """Take the gradients."""
        del optimizer
        for parameter in parameters:
            if parameter.grad is not None:
                self.gradients[id(parameter)] = parameter.grad
                parameter.grad = None
        return [torch.zeros(())]


def main(config: EqualConfig, command: Sequence[str]) -> None:
    """Print the table."""
    quiet_libraries()
    precision = set_precision("fp32")
    model = model_of(config.model)
    torch.manual_seed(0)
    for parameter in model.unet.parameters():
        if parameter.dim() > 1:  # as if trained: initial weights hardly change the skips
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
    settings = TrainConfig(phase=config.phase, batch=config.batch).resolved()
    n = config.batch
    step = step_of(model, settings, MemoryPlan("plain", n), "cpu", GradientKeeper)
    side = config.resolution // 8
    batch = drawn_batch(model, n, (side, side), "cpu")
    report = Report("benchmarks/train/equal.py", command, machine_of("cpu"))
    report.fact("precision", precision)
    print(f"{config.model}, phase {config.phase}, {side * 8}x{side * 8}, batch {n}; relative error")
    print(f"{'plan':>20}{'loss':>14}{'of plain':>12}{'of float64':>12}{'bit-equal':>14}{'s':>8}")
    exact = None
    if config.float64:
        step.model.unet.double()
        step.model.text_encoder.double()
        wide = replace(batch, latents=batch.latents.double(), noise=batch.noise.double())
        exact = gradients(step, wide, MemoryPlan("sliced", 1))[1]
        step.model.unet.float()
        step.model.text_encoder.float()
    plain: list[Tensor] | None = None
    for plan in plans(n):
        begun = time.perf_counter()
        loss, computed = gradients(step, batch, plan)
        seconds = time.perf_counter() - begun
        plain = plain or computed
        same = sum(torch.equal(a, b) for a, b in zip(computed, plain, strict=True))
        error = distance(computed, plain)
        error64 = distance(computed, exact) if exact else None
        print(
            f"{plan!s:>20}{loss:14.8f}{error:12.1e}"
            f"{'' if error64 is None else f'{error64:.1e}':>12}"
            f"{f'{same}/{len(computed)}':>14}{seconds:8.1f}",
            flush=True,
        )
        errors = {"error_of_plain": error, "error_of_float64": error64}
        equal = {"bit_equal": same, "parameters": len(computed)}
        report.add("plan", plan=str(plan), loss=loss, **errors, **equal, seconds=seconds)
    report.write(config.json)


def plans(batch: int) -> list[MemoryPlan]:
    """The plain step first, then the other plans in one pass and in several."""
    first = [
        MemoryPlan("plain", batch),
        MemoryPlan("cheap", batch),
        MemoryPlan("feed-forward", batch),
    ]
    return [
        *first,
        MemoryPlan("plain", 1),
        MemoryPlan("cheap", 1),
        MemoryPlan("sliced", batch),
        MemoryPlan("sliced", 1),
    ]


def gradients(step: Step, batch: Batch, plan: MemoryPlan) -> tuple[float, list[Tensor]]:
    """The loss and the gradients in the order of the parameters."""
    assert isinstance(step.backend, GradientKeeper)
    step.plan, step.backend.gradients = plan, {}
    loss, _ = step([batch], 0.0)
    kept = step.backend.gradients
    return loss.item(), [kept[id(p)] for p in step.parameters if id(p) in kept]


def distance(these: list[Tensor], those: list[Tensor]) -> float:
    """Relative distance of all gradients as one vector."""
    pairs = zip(these, those, strict=True)
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(squares / sum(float(b.double().square().sum()) for b in those))


if __name__ == "__main__":
    run_script(main, EqualConfig, __doc__)
