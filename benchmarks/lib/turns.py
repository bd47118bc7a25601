"""Several ways to take a training step on the same weights, timed turn by turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.lib.plain_loop import checkpointing
from xlsd_cache.runtime.gpu_memory import give_back, is_full
from xlsd_train.checkpoints.environment import peak_gib
from xlsd_train.memory.tracker import FlopCounter
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.step.step import drop_gradients


@dataclass(frozen=True)
class Contestant:
    """One way to take a step."""

    take: Callable[[], Tensor]  # gives the loss, on the device
    optimizer: torch.optim.Optimizer
    checkpointing: bool = False  # as the libraries' modules have it
    layout: torch.memory_format = torch.contiguous_format  # of the UNet's convolutions


@dataclass
class Result:
    """What the turns of one of them gave."""

    tflop: float = 0.0  # a step, by every kernel that ran
    times: list[float] = field(default_factory=list)
    peak_gib: float = 0.0  # on the CPU of the whole process
    full: bool = False  # its memory was full, and it was not asked again

    @property
    def seconds(self) -> float | None:
        """The median of a step; None where it does not fit."""
        return None if self.full else statistics.median(self.times)


def take_turns(
    model: ModelBundle, contestants: Mapping[str, Contestant], steps: int, device: str
) -> dict[str, Result]:
    """Time `steps` steps of each after a first one, which makes state and counts FLOPs.

    Whoever has no turn keeps nothing on a card: optimizer states wait on the host.
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
    """Seconds of a step, which ends with its loss on the host and the device idle."""
    if device == "cuda":
        one.take().item()  # memory is cached, and kernels are chosen, as in a long run
        torch.cuda.synchronize()
    begun = time.perf_counter()
    one.take().item()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _make_room(
    model: ModelBundle, one: Contestant, contestants: Mapping[str, Contestant], device: str
) -> None:
    """All that one of them needs in its place, and nothing else."""
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
    """All state but the counts of steps, which AdamW wants where it made them."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[name] = value.to(device)
