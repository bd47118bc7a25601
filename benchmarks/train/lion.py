"""Time and memory of our Lion against lion-pytorch's, on the shapes of a UNet's weights.

python benchmarks/train/lion.py
"""

import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lion_pytorch
import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from anywhere, uninstalled

from benchmarks.demo.pipeline import Size
from benchmarks.lib.real_step import here, machine_of, networks
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_train.memory.tracker import Tracker
from xlsd_train.optim.lion import Lion

LR, DECAY = 1e-5, 0.01
PART = 16  # parameters stepped at once by "ours, in parts": about those of a layer


@dataclass(frozen=True)
class LionBenchmark(JsonOption):
    """Step the same weights with the same gradients."""

    size: Size = "sd15"
    """The UNet's size. sd15 takes 10 GB of memory."""

    weights: int = 10**9
    """Take the UNet's tensors up to so many weights."""

    steps: int = 5
    """Timed steps, after a first one."""

    threads: int | None = None
    """Of torch on the CPU."""


class CallTracker(Tracker):  # type: ignore[no-untyped-call]  # torch's own base
    """Counts all calls of torch's kernels."""

    calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass(frozen=True)
class Measured:
    """One optimizer's step."""

    name: str
    ms: float  # median
    calls: int  # of torch's kernels
    temporary_mib: float  # allocated within a step, at the most
    gradients_mib: float  # that wait for the step, at the most
    sha256: str  # of the weights after all steps


def main(config: LionBenchmark, arguments: Sequence[str]) -> None:
    """Print the table."""
    if config.threads:
        torch.set_num_threads(config.threads)
    with torch.device("meta"):
        every = [p.shape for p in networks(config.size)[0].parameters()]
    ends = np.cumsum([shape.numel() for shape in every])
    shapes = [shape for shape, end in zip(every, ends, strict=True) if end <= config.weights]
    report = Report("benchmarks/train/lion.py", arguments, machine_of(here()))
    report.fact("weights", f"{sum(shape.numel() for shape in shapes)} in {len(shapes)} tensors")
    print(f"{'':18}{'ms':>10}{'calls':>10}{'temporary MiB':>16}{'gradients MiB':>16}  sha256")
    for it in (
        measure("lion-pytorch", lion_pytorch.Lion, shapes, config.steps, len(shapes)),
        measure("ours", Lion, shapes, config.steps, len(shapes)),
        measure("ours, in parts", Lion, shapes, config.steps, PART),
    ):
        report.add("optimizer", **asdict(it))
        print(
            f"{it.name:18}{it.ms:10.1f}{it.calls:10}{it.temporary_mib:16.1f}"
            f"{it.gradients_mib:16.1f}  {it.sha256[:12]}"
        )
    report.write(config.json)


def measure(
    name: str, kind: Callable[..., Any], shapes: list[torch.Size], steps: int, part: int
) -> Measured:
    """Step `part` parameters at a time; their gradients are freed before the next part."""
    generator = torch.Generator(here()).manual_seed(0)

    def drawn(shape: torch.Size) -> Tensor:
        return torch.randn(shape, device=here(), generator=generator)

    parameters = [Parameter(drawn(shape)) for shape in shapes]
    optimizer = kind(parameters, lr=LR, weight_decay=DECAY)
    parts = [parameters[a : a + part] for a in range(0, len(parameters), part)]
    times, gradients, calls, temporary = [], 0, 0, 0.0
    for step in range(steps + 2):
        seconds = 0.0
        for some in parts:
            for parameter in some:
                parameter.grad = drawn(parameter.shape)
            gradients = max(gradients, sum(p.nbytes for p in some))
            if step == steps + 1:  # counted and not timed
                tracker = CallTracker()
                with tracker:
                    optimizer.step()
                calls += tracker.calls
                temporary = max(temporary, sum(tracker.footprint().peak(unit=1).values()))
            else:
                seconds += timed(optimizer.step)
            for parameter in some:
                parameter.grad = None
        if 0 < step <= steps:  # the first one makes the state
            times.append(1000 * seconds)
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(np.ascontiguousarray(parameter.detach().cpu().numpy()).data)
    ms, mib = statistics.median(times), 2**20
    return Measured(name, ms, calls, temporary / mib, gradients / mib, digest.hexdigest())


def timed(step: Callable[[], object]) -> float:
    """Seconds of a step, on a GPU until it is done."""
    synchronize: Any = torch.cuda.synchronize if here() == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    run_script(main, LionBenchmark, __doc__)
