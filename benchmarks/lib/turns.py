"""Time several training steps on the same weights, alternating between them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.lib.flops import FlopCounter
from benchmarks.lib.plain_loop import checkpointing
from xlsd_cache.runtime.gpu_memory import give_back, is_full
from xlsd_train.checkpoints.environment import peak_gib
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.step.backend import drop_gradients


@dataclass(frozen=True)
class Contestant:
    """One of the training steps to compare."""

    take: Callable[[], Tensor]  # runs a step; returns the loss on the device
    optimizer: torch.optim.Optimizer
    checkpointing: bool = False  # gradient checkpointing of the libraries' modules
    layout: torch.memory_format = torch.contiguous_format  # of the UNet's convolutions


@dataclass
class Result:
    """The measurements of one contestant."""

    tflop: float = 0.0  # per step, counted in every kernel
    times: list[float] = field(default_factory=list)
    peak_gib: float = 0.0  # on the CPU: of the whole process
    full: bool = False  # it ran out of memory and was not run again

    @property
    def seconds(self) -> float | None:
        """The median time of a step, or None if it ran out of memory."""
        return None if self.full else statistics.median(self.times)


def take_turns(
    model: ModelBundle, contestants: Mapping[str, Contestant], steps: int, device: str
) -> dict[str, Result]:
    """Time `steps` steps of each contestant, after a first one that counts FLOPs.

    The optimizer state of the other contestants is moved from the GPU to the host.
    """
    results = {name: Result() for name in contestants}
    for turn in range(steps + 1):
        for name, one in contestants.items():
            result = results[name]
            if result.full:
                continue
            _make_room(model, one, contestants, device)
            try:
                if turn == 0:
                    with FlopCounter() as counter:
                        one.take().item()
                    result.tflop = counter.total / 1e12
                else:
                    result.times.append(_timed(one, device))
            except RuntimeError as error:
                if not is_full(error):
                    raise
                result.full = True
            result.peak_gib = max(result.peak_gib, peak_gib(torch.device(device)))
    return results


def _timed(one: Contestant, device: str) -> float:
    """Seconds of a step until its loss is on the host and the device is idle."""
    if device == "cuda":
        one.take().item()  # fills the allocator's cache and selects kernels, as in a long run
        torch.cuda.synchronize()
    begun = time.perf_counter()
    one.take().item()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _make_room(
    model: ModelBundle, one: Contestant, contestants: Mapping[str, Contestant], device: str
) -> None:
    """Prepare the model and the memory for this contestant alone."""
    drop_gradients([*model.unet.parameters(), *model.text_encoder.parameters()])
    checkpointing(model, one.checkpointing)
    model.unet.to(memory_format=one.layout)
    if device == "cpu":
        return
    for other in contestants.values():
        if other.optimizer is not one.optimizer:
            _move(other.optimizer, "cpu")
    give_back(torch.device(device))
    _move(one.optimizer, device)
    torch.cuda.reset_peak_memory_stats()


def _move(optimizer: torch.optim.Optimizer, device: str) -> None:
    """Move all state except the step counts, which AdamW needs where it created them."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[name] = value.to(device)
