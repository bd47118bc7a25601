"""The memory plan: how a batch passes so that it fits, and of all the ways that fit the fastest.

Nothing is estimated by rules of thumb: each way is run once or twice on tensors without data, by
the step that will train, which gives its peak, and its time on a card that does all it can.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch

from xlsd_cache.errors import UserError
from xlsd_cache.vocabulary import Bucket
from xlsd_train.config.train import TrainConfig
from xlsd_train.memory.gpus import CARDS, Card
from xlsd_train.memory.meta_step import Rehearsal, Size
from xlsd_train.memory.tracker import CUBLAS, ROUND, WORKSPACE, Footprint
from xlsd_train.step.step import Plan, Way

GIB = 2**30
KEEPING: tuple[Way, ...] = ("plain", "cheap", "feed-forward")  # micro-batches, gradients kept
WAYS: tuple[Way, ...] = (*KEEPING, "sliced")
SLICES = (4, 2, 1)  # samples at once in the widest layers, the fastest first
REFERENCE = "RTX 4090"  # the card for which the fastest plan is chosen
CLOSE = 1.02  # times this near are equal: fewer passes win, whose kernels are larger
KERNEL_S = 5e-6  # no kernel is done sooner: an assumption that keeps micro-batches from vanishing


@dataclass(frozen=True)
class Prediction:
    """What a step of `batch` samples by a plan is predicted to take."""

    plan: Plan
    batch: int
    items: dict[str, int]  # bytes at the peak
    tflop: float
    factor: float  # FLOPs, of those of the plain step
    seconds: dict[str, float]  # by card, at 100% of what the card can do

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.items.values())

    @property
    def passes(self) -> int:
        """How often the networks are passed; a sliced batch passes once."""
        return 1 if self.plan.way == "sliced" else ceil(self.batch / self.plan.micro_batch)

    def __str__(self) -> str:
        items = sorted(self.items.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {nbytes / GIB:.2f}" for name, nbytes in items)
        return (
            f"batch {self.batch}, {self.plan}: predicted peak {self.peak / GIB:.2f} GiB ({parts}), "
            f"{self.factor:.3f} of the plain step's FLOPs"
        )


class Planner:
    """Predicts and compares the steps of one phase, model, optimizer and precision."""

    def __init__(
        self, config: TrainConfig, unet_config: Any, text_config: Any, workspaces: bool = True
    ) -> None:
        self._rehearse = Rehearsal(config, unet_config, text_config, workspaces)
        self._precision, self._workspaces = config.precision, workspaces
        # Of bf16 there is another kernel, whose blocks are as many.
        self._in_order = config.deterministic and config.precision != "bf16"

    def predict(self, plan: Plan, batch: int, size: Size) -> Prediction:
        """What a step takes at its worst, and how fast cards can do it at most."""
        together = batch if plan.way == "sliced" else min(batch, plan.micro_batch)
        print_ = self._rehearse(plan, together, size)
        passes = ceil(batch / together)
        items = print_.peak(again=passes > 1, unit=ROUND if self._workspaces else 1)
        if self._workspaces:
            items[WORKSPACE] = items.get(WORKSPACE, 0) + CUBLAS
        tflop = print_.tflop * batch / together
        plain = self._rehearse(Plan("plain", batch), batch, size).tflop
        seconds = {
            name: self._seconds(print_, batch / together, passes, card)
            for name, card in CARDS.items()
        }
        return Prediction(plan, batch, items, tflop, tflop / plain, seconds)

    def _seconds(self, print_: Footprint, parts: float, passes: int, card: Card) -> float:
        """Of `parts` micro-batches, in `passes` passes, the last of which may be a smaller one."""
        bandwidth = card.bandwidth * 1e9
        peaks = (np.inf, card.tflops(self._precision), card.attention_tflops(self._precision))
        computing = print_.flop / (np.array(peaks)[print_.kind] * 1e12)
        if self._in_order:
            few = print_.blocks > 0
            computing[few] /= card.busy(print_.blocks[few])
        each = np.maximum(np.maximum(computing, print_.moved / bandwidth), KERNEL_S) * print_.times
        adding = (passes - 1) * 3 * self._rehearse.gradients_nbytes / bandwidth
        passing, updating = each[: print_.update], each[print_.update :]
        if passes == 1:
            return float(each.sum())
        return float(parts * passing.sum() + adding + updating.sum())

    def largest_batch(self, plan: Plan, size: Size, limit: float) -> int:
        """How many samples pass at once within `limit` bytes, by the way of a plan; 0: not one."""

        def fits(count: int) -> bool:
            micro_batch = plan.micro_batch if plan.way == "sliced" else count
            return self.predict(Plan(plan.way, micro_batch), count, size).peak <= limit

        # From there on two rehearsals serve all batches.
        start = self._rehearse.two_slices * plan.micro_batch if plan.way == "sliced" else 4
        return last(fits, start=start)

    def fastest(
        self, batch: int, size: Size, limit: float, way: Way | None, part: int | None
    ) -> Prediction | None:
        """Of the plans within `limit` bytes the fastest; None: there is none.

        `way` and `part`, the micro-batch, are given or free. Slicing passes everything forward
        twice, and is looked at where nothing else fits.
        """
        found: list[Prediction] = []
        for one in (way,) if way else WAYS:
            if one != "sliced" or not found:
                found += self._fitting(one, batch, size, limit, part)
        best = min((x.seconds[REFERENCE] for x in found), default=0.0)
        close = [x for x in found if x.seconds[REFERENCE] <= CLOSE * best]
        return min(close, key=lambda x: x.passes, default=None)

    def _fitting(
        self, way: Way, batch: int, size: Size, limit: float, part: int | None
    ) -> list[Prediction]:
        """The best plan of one way, or none."""

        def fits(count: int) -> bool:
            return self.predict(Plan(way, count), batch, size).peak <= limit

        if part:
            parts = [part]
        elif way == "sliced":
            parts = list(SLICES)
        else:
            count = last(fits, batch)
            parts = [ceil(batch / ceil(batch / count))] if count else []  # as even as can be
        return [self.predict(Plan(way, x), batch, size) for x in parts if fits(x)][:1]


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


def asked(config: TrainConfig) -> tuple[Way | None, int | None]:
    """The way and the micro-batch that --memory and --micro-batch name; None is free."""
    if config.memory == "fastest":
        return None, config.micro_batch
    if config.memory == "largest":
        return "sliced", config.micro_batch or 1
    return config.memory, config.micro_batch


def choose(
    config: TrainConfig, planner: Callable[[], Planner], buckets: Mapping[str, int], processes: int,
    limit: float | None,
) -> tuple[int, Plan, Prediction | None]:  # fmt: skip
    """(batch, its plan in each process, what that is predicted to take) of a new run.

    `buckets` are names and numbers of images: the largest picture decides. `limit` is in bytes;
    without one nothing is predicted. Raises UserError where nothing fits.
    """
    way, part = asked(config)
    if limit is None:
        if config.batch == "auto":
            raise UserError(
                "--batch auto needs to know the memory, and no card is seen; add --vram"
            )
        share = ceil(config.batch / processes)
        default = SLICES[0] if way == "sliced" else share
        return config.batch, Plan(way or "plain", part or default), None
    plans, size = planner(), largest(buckets)
    if config.batch == "auto":
        most = plans.largest_batch(Plan(way or WAYS[-1], part or SLICES[0]), size, limit)
        batch = max(1, min(processes * most, sum(buckets.values())))
    else:
        batch = config.batch
    share = ceil(batch / processes)
    found = plans.fastest(share, size, limit, way, part)
    if found is None:
        tightest = plans.predict(Plan(way or WAYS[-1], part or 1), share, size)
        raise UserError(
            f"a batch of {share} images of {8 * size[1]}x{8 * size[0]} does not fit: {tightest}, "
            f"and there are {limit / GIB:.2f} GiB; lower --batch, leave out --memory and "
            f"--micro-batch, or raise --vram"
        )
    return batch, found.plan, found


def largest(buckets: Mapping[str, int]) -> Size:
    """Height and width of the latents that decide: those of the bucket of most pixels."""
    sizes = [Bucket.parse(name).latent_size for name in buckets]
    return max(sizes, key=lambda size: (size[0] * size[1], size[1]))


def limit_card(gib: float, device: torch.device) -> None:
    """Refuse the card more memory than this."""
    # A device that stands for the only card has no index, and torch wants one here.
    index = torch.cuda.current_device() if device.index is None else device.index
    share = gib * GIB / torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), index)


def limit_of(config: TrainConfig, device: torch.device | None) -> float | None:
    """Bytes that torch's tensors may take on a device, if there is one; None: no limit is known.

    Of --vram, or of what a card has free, a twelfth, at least 1 GiB, is left to CUDA's context,
    libraries and fragmentation. A card is kept from giving more than --vram.
    """
    card = device if device and device.type == "cuda" else None
    if config.vram is not None:
        if card:
            limit_card(config.vram, card)
        gib = config.vram
    elif card:
        gib = torch.cuda.mem_get_info(card)[0] / GIB
    else:
        return None
    return (gib - max(1.0, gib / 12)) * GIB
