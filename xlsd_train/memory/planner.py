"""Predict memory plans: of the ways to run a batch that fit the GPU, the fastest.

No rules of thumb: the training step itself runs once or twice on meta tensors for each way, which
gives its peak memory, and its time on a GPU at peak throughput.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlsd_train.config.train import TrainConfig
from xlsd_train.memory.footprint import CUBLAS, ROUND, STATE, WORKSPACE, Footprint
from xlsd_train.memory.gpus import CARDS, Card
from xlsd_train.memory.meta_step import MetaStep, Size
from xlsd_train.step.backend import MemoryPlan, Momentum, Way
from xlsd_train.step.blocks import Attention

GIB = 2**30
KEEPING: tuple[Way, ...] = ("plain", "cheap", "feed-forward")  # micro-batches, gradients kept
WAYS: tuple[Way, ...] = (*KEEPING, "sliced")
SLICES = (4, 2, 1)  # samples at once in the widest layers, the fastest first
REFERENCE = "RTX 4090"  # for which the fastest plan is chosen where the card is not known
CLOSE = 1.02  # times within this factor count as equal: fewer passes win, their kernels are larger
KERNEL_S = 5e-6  # assumed shortest time of a kernel, else tiny micro-batches would cost nothing


class Asked(NamedTuple):
    """The plans that a run's options allow."""

    way: Way | None = None  # None: any
    micro_batch: int | None = None  # None: any
    attention: tuple[Attention, ...] = ("sdpa",)
    momentum: tuple[Momentum, ...] = ("resident",)


@dataclass(frozen=True)
class Prediction:
    """Predicted memory and time of a step of `batch` samples with a plan."""

    plan: MemoryPlan
    batch: int
    items: dict[str, int]  # bytes at the peak
    tflop: float
    factor: float  # FLOPs, of those of the plain step
    seconds: dict[str, float]  # by GPU, at 100% of its peak
    host: int = 0  # bytes of pinned CPU memory

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return sum(self.items.values())

    @property
    def passes(self) -> int:
        """Forward passes through the networks; a sliced batch takes one."""
        return 1 if self.plan.way == "sliced" else ceil(self.batch / self.plan.micro_batch)

    def __str__(self) -> str:
        items = sorted(self.items.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {nbytes / GIB:.2f}" for name, nbytes in items)
        host = f", {self.host / GIB:.2f} GiB of pinned CPU memory" if self.host else ""
        return (
            f"batch {self.batch}, {self.plan}: predicted peak {self.peak / GIB:.2f} GiB ({parts})"
            f"{host}, {self.factor:.3f} of the plain step's FLOPs"
        )


class Planner:
    """Predicts and compares the steps of one phase, model, optimizer and precision."""

    def __init__(
        self, config: TrainConfig, unet_config: Any, text_config: Any, workspaces: bool = True,
        processes: int = 1, progress: bool = True,
    ) -> None:  # fmt: skip
        """Of one of the `processes`, which share their gradients. `progress`: show it."""
        alone = processes == 1
        self._meta_step = MetaStep(config, unet_config, text_config, workspaces, alone, progress)
        self._precision, self._workspaces = config.precision, workspaces
        # The attention kernel of bf16 has as many blocks when it sums in a fixed order.
        self._in_order = config.deterministic and config.precision != "bf16"

    def predict(self, plan: MemoryPlan, batch: int, size: Size) -> Prediction:
        """Peak memory of a step, and its shortest time on known GPUs."""
        together = batch if plan.way == "sliced" else min(batch, plan.micro_batch)
        footprint = self._meta_step(plan, together, size)
        passes = ceil(batch / together)
        items = footprint.peak(again=passes > 1, unit=ROUND if self._workspaces else 1)
        if self._workspaces:
            items[WORKSPACE] = items.get(WORKSPACE, 0) + CUBLAS
        host = transfer = 0
        if plan.momentum == "streamed":
            items[STATE], host, transfer = self._meta_step.streamed_nbytes
        tflop = footprint.tflop * batch / together
        plain = self._meta_step(MemoryPlan("plain", batch), batch, size).tflop
        seconds = {
            name: self._seconds(footprint, batch / together, passes, transfer, card)
            for name, card in CARDS.items()
        }
        return Prediction(plan, batch, items, tflop, tflop / plain, seconds, host)

    def _seconds(
        self, footprint: Footprint, parts: float, passes: int, transfer: int, card: Card
    ) -> float:
        """Time of `parts` micro-batches in `passes` passes, the last of which may be smaller.

        `transfer` bytes of state are copied to the GPU, and back, from the first update on.
        """
        each = self.kernel_seconds(footprint, card)
        adding = (passes - 1) * 3 * self.gradients_nbytes / (card.bandwidth * 1e9)
        passing, updating = each[: footprint.update], each[footprint.update :]
        update = max(float(updating.sum()), transfer / (card.host * 1e9))
        return float(parts * passing.sum()) + adding + update

    def kernel_seconds(self, footprint: Footprint, card: Card) -> NDArray[np.float64]:
        """Shortest time of each kernel, with those that it stands for."""
        peaks = (np.inf, card.tflops(self._precision), *card.attention_tflops(self._precision))
        computing = footprint.flop / (np.array(peaks)[footprint.kind] * 1e12)
        if self._in_order:
            few = footprint.blocks > 0
            computing[few] /= card.busy(footprint.blocks[few])
        longest = np.maximum(computing, card.moving(footprint.moved, footprint.cached))
        return np.maximum(longest, KERNEL_S) * footprint.times

    @property
    def gradients_nbytes(self) -> int:
        """Bytes of the gradients of all trained weights."""
        return self._meta_step.gradients_nbytes

    def last_pass(self, it: Prediction, size: Size) -> Footprint:
        """The footprint of a step's last pass, which may have fewer samples than the others."""
        return self._meta_step(it.plan, it.batch - (it.passes - 1) * it.plan.micro_batch, size)

    def largest_batch(self, plan: MemoryPlan, size: Size, limit: float) -> int:
        """The most samples in one pass within `limit` bytes, with the way of a plan; 0 if none."""

        def fits(count: int) -> bool:
            micro_batch = plan.micro_batch if plan.way == "sliced" else count
            return self.predict(plan._replace(micro_batch=micro_batch), count, size).peak <= limit

        # From there on two runs on meta tensors serve all batches.
        start = self._meta_step.two_slices * plan.micro_batch if plan.way == "sliced" else 4
        return last(fits, start=start)

    def largest_asked(self, plan: MemoryPlan, size: Size, limit: float, asked: Asked) -> int:
        """The same, with streamed momentum where it may be and where resident fits no sample."""
        places = (plan._replace(momentum=x) for x in asked.momentum)
        return next(filter(None, (self.largest_batch(x, size, limit) for x in places)), 0)

    def fastest(
        self, batch: int, size: Size, limit: float, asked: Asked, card: str = REFERENCE
    ) -> Prediction | None:
        """The fastest plan within `limit` bytes on a card of CARDS; None if none fits."""
        fitting = self.candidates(batch, size, limit, asked)
        best = min((x.seconds[card] for x in fitting), default=0.0)
        close = [x for x in fitting if x.seconds[card] <= CLOSE * best]
        return min(close, key=lambda x: (x.plan.momentum != "resident", x.passes), default=None)

    def candidates(self, batch: int, size: Size, limit: float, asked: Asked) -> list[Prediction]:
        """The best plan within `limit` bytes of each way, attention and place of the momentum."""
        ways = (asked.way,) if asked.way else WAYS
        return [
            prediction
            for way, attention, momentum in product(ways, asked.attention, asked.momentum)
            for prediction in self._fitting(
                MemoryPlan(way, asked.micro_batch or 0, attention, momentum), batch, size, limit
            )
        ]

    def _fitting(self, plan: MemoryPlan, batch: int, size: Size, limit: float) -> list[Prediction]:
        """The plan if it fits, with the largest micro-batch if it has none; else nothing."""

        def predict(count: int) -> Prediction:
            return self.predict(plan._replace(micro_batch=count), batch, size)

        def fits(count: int) -> bool:
            return predict(count).peak <= limit

        if plan.micro_batch:
            counts = [plan.micro_batch]
        elif plan.way == "sliced":
            counts = list(SLICES)
        else:
            most = last(fits, batch)
            counts = [ceil(batch / ceil(batch / most))] if most else []  # as even as possible
        return [predict(n) for n in islice(filter(fits, counts), 1)]


def last(fits: Callable[[int], bool], most: int | None = None, start: int = 4) -> int:
    """The largest number up to `most` that fits, where all below it do; 0 where not even 1."""
    low, high = 0, start
    while (most is None or high <= most) and fits(high):
        low, high = high, 2 * high
    if most is not None:
        high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
