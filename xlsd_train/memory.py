"""The memory plan: how a batch passes so that it fits, and of all the ways that fit the fastest.

Nothing is estimated by rules of thumb: each way is run once or twice on fake tensors
(footprint.py), by the step that will train, and gives its peak and its time on a card at most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

from xlsd_train.batches import Batch
from xlsd_train.cards import CARDS, Card
from xlsd_train.config import TrainConfig
from xlsd_train.footprint import (
    CUBLAS, FROZEN, GRADIENTS, STATE, WEIGHTS, WORKSPACE, Footprint, Tracker,
)  # fmt: skip
from xlsd_train.layers import Layer
from xlsd_train.lion import DLion
from xlsd_train.optim import make_optimizer
from xlsd_train.sliced import Work
from xlsd_train.step import Plan, Step, Way

GIB = 2**30
SLICES = (4, 2, 1)  # samples at once in the widest layers, the fastest first
REFERENCE = "RTX 4090"  # the card for which the fastest plan is chosen
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

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {nbytes / GIB:.2f}"
            for name, nbytes in sorted(self.items.items(), key=lambda item: -item[1])
        )
        plan, count = self.plan, ceil(self.batch / self.plan.micro_batch)
        how = f"{count} x {ceil(self.batch / count)} {plan.way}"
        if plan.way == "sliced":
            how = f"sliced by {plan.micro_batch}"
        return (
            f"batch {self.batch} as {how}: predicted peak {self.peak / GIB:.2f} GiB ({parts}), "
            f"{self.factor:.3f} of the plain step's FLOPs"
        )


class Rehearsal(Step):
    """The step on fake tensors. Of a layer's slices it runs two, which stand for all of them."""

    tracker: Tracker

    def _mixed(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.accelerator.mixed)

    def _finish(self) -> None:
        """D-Lion's sums have no values."""
        if isinstance(self.optimizer, DLion):
            self.optimizer.forget()

    def _each(self, layer: Layer, count: int, work: Work) -> None:
        size = self.plan.micro_batch * layer.room
        for a in range(0, min(count, 2 * size), size):
            self.tracker.times = count / min(count, 2 * size)
            work(a, min(count, a + size))
        self.tracker.times = 1.0


class Planner:
    """Predicts steps of one phase, model, optimizer and precision, whatever their batch and size.

    `workspaces` are counted for a CUDA card; the CPU's libraries take none from torch.
    """

    def __init__(
        self, config: TrainConfig, unet_config: Any, text_config: Any, workspaces: bool = True
    ) -> None:
        self._config, self._workspaces = config, workspaces
        self._channels = unet_config["in_channels"]
        self._logs: dict[tuple[Plan, int, tuple[int, int]], Footprint] = {}
        with FakeTensorMode() as self._fake:
            unet = UNet2DConditionModel.from_config(dict(unet_config))
            text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(dict(text_config)))
            unet.requires_grad_(config.phase != "te").train()
            text_encoder.requires_grad_(config.phase != "unet").train()
            trained = [p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad]
            vae = SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)
            model: Any = SimpleNamespace(unet=unet, text_encoder=text_encoder, vae=vae)
            alone: Any = SimpleNamespace(
                device=torch.device("cpu"), num_processes=1, mixed=config.precision == "bf16"
            )
            abar = torch.ones(1000)
            optimizer = make_optimizer(config, trained)
            self._step = Rehearsal(model, trained, optimizer, abar, alone, Plan("plain", 1))
        self._tokens = text_encoder.config.max_position_embeddings
        optimizer.register_step_pre_hook(self._before_update)

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Here, and only here, the gradients are all known to be gradients."""
        tracker = self._step.tracker
        gradients = [p.grad for p in self._step.parameters if p.grad is not None]
        tracker.hold(gradients, GRADIENTS)
        if tracker.update is None:
            tracker.update = len(tracker.kernels)

    def _log(self, plan: Plan, batch: int, size: tuple[int, int]) -> Footprint:
        """Run one step; `size` is the latents' height and width."""
        key = plan, batch, size
        if key not in self._logs:
            step, tracker = self._step, Tracker(self._workspaces)
            step.plan, step.tracker = plan, tracker
            with self._fake:
                tracker.hold(step.parameters, WEIGHTS)
                model = (step.model.unet, step.model.text_encoder)
                for tensor in (x for m in model for x in (*m.parameters(), *m.buffers())):
                    if not tensor.requires_grad:
                        tracker.hold(tensor, FROZEN)
                tracker.hold(list(step.optimizer.state.values()), STATE)
                latents = torch.empty(batch, self._channels, *size)
                ids = torch.empty(batch, self._tokens, dtype=torch.int64)
                given = latents, torch.empty_like(latents), ids[:, 0].clone(), ids
                tracker.hold(given, "batch")
                with tracker:
                    step([Batch(0, "", 0.0, 0, batch, *given)], 0.0)
            self._logs[key] = tracker.footprint()
        return self._logs[key]

    def _footprint(self, plan: Plan, batch: int, size: tuple[int, int]) -> Footprint:
        """Of one pass of `batch` samples, from two runs where that is exact."""
        low, high = (2, 3) if plan.way != "sliced" else (32 * plan.micro_batch, 48 * plan.micro_batch)
        if batch < low:  # sliced, some layers then have but one slice
            return self._log(plan, batch, size)
        if plan.way != "sliced":
            plan = Plan(plan.way, high)
        first, second = (self._log(plan, n, size) for n in (low, high))
        return first.at(batch, low, second, high)

    def predict(self, plan: Plan, batch: int, size: tuple[int, int]) -> Prediction:
        """What a step takes at its worst, and how fast cards can do it at most."""
        together = batch if plan.way == "sliced" else min(batch, plan.micro_batch)
        print_ = self._footprint(plan, together, size)
        passes = ceil(batch / together)
        items = print_.peak(again=passes > 1)
        if self._workspaces:
            items[WORKSPACE] = items.get(WORKSPACE, 0) + CUBLAS
        flop = float(np.dot(print_.flop, print_.times)) * batch / together
        plain = self._footprint(Plan("plain", batch), batch, size)
        seconds = {
            name: self._seconds(print_, batch / together, passes, card)
            for name, card in CARDS.items()
        }
        return Prediction(plan, batch, items, flop / 1e12, flop / plain.flop.sum(), seconds)

    def _seconds(self, print_: Footprint, times: float, passes: int, card: Card) -> float:
        """Each kernel at the card's peak, or at its bandwidth, or at a kernel's least time."""
        precision = self._config.precision
        peaks = np.array([1e30, card.tflops(precision) * 1e12, card.attention_tflops(precision) * 1e12])
        moved = print_.moved / (card.bandwidth * 1e9)
        each = np.maximum(np.maximum(print_.flop / peaks[print_.kind], moved), KERNEL_S)
        each *= print_.times
        if passes == 1:
            return float(each.sum())
        added = 3 * sum(p.numel() * p.element_size() for p in self._step.parameters)
        adding = (passes - 1) * added / (card.bandwidth * 1e9)
        return float(times * each[: print_.update].sum() + adding + each[print_.update :].sum())

    def largest_pass(self, way: Way, size: tuple[int, int], limit: float, most: int) -> Plan | None:
        """The plan of one way that passes the most samples at once within `limit` bytes."""
        if way == "sliced":
            plans = (Plan(way, n) for n in SLICES)
            return next((p for p in plans if self.predict(p, most, size).peak <= limit), None)

        def fits(count: int) -> bool:
            return self.predict(Plan(way, count), most, size).peak <= limit

        count = _last(fits, most)
        if not count:
            return None
        return Plan(way, ceil(most / ceil(most / count)))  # as even parts as can be

    def fastest(
        self, batch: int, size: tuple[int, int], limit: float, way: Way | None = None
    ) -> Prediction | None:
        """Of the plans within `limit` bytes the fastest, or that of one way; None: there is none.

        Slicing, which passes everything forward twice, is looked at where nothing else fits.
        """
        ways = (way,) if way else ("plain", "cheap", "feed-forward")
        plans = [self.largest_pass(x, size, limit, batch) for x in ways]
        if not any(plans) and not way:
            plans = [self.largest_pass("sliced", size, limit, batch)]
        found = [self.predict(plan, batch, size) for plan in plans if plan]
        return min(found, key=lambda x: x.seconds[REFERENCE], default=None)

    def largest_batch(
        self, way: Way, size: tuple[int, int], limit: float, slice_: int = SLICES[0]
    ) -> int:
        """How many samples pass at once within `limit` bytes, gradients and all; 0: not one."""

        def fits(count: int) -> bool:
            plan = Plan(way, slice_ if way == "sliced" else count)
            return self.predict(plan, count, size).peak <= limit

        return _last(fits)


def _last(fits: Callable[[int], bool], most: int | None = None) -> int:
    """The largest number up to `most` that fits, where all below it do."""
    low, high = 0, 1
    while (most is None or high < most) and fits(high):
        low, high = high, 2 * high
    if most is not None and high >= most:
        if fits(most):
            return most
        high = most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def choose(
    config: TrainConfig, model: Model, buckets: Mapping[str, int], processes: int, limit: float | None
) -> tuple[int, Plan, Prediction | None]:
    """(batch, how it passes, what that is predicted to take) of a new run.

    `buckets` are names and numbers of images, of which the largest pictures decide; `limit` is in
    bytes, None: without. Raises UserError where nothing fits.
    """
    way, part = WAYS.get(config.memory), config.micro_batch
    if limit is None:
        if config.batch == "auto":
            raise UserError("--batch auto needs a memory limit, and there is no card; give --vram")
        share = ceil(config.batch / processes)
        plan = Plan(way or "plain", part or (share if way != "sliced" else _slice(config)))
        return config.batch, plan, None
    planner = Planner(config, model.unet.config, model.text_encoder.config.to_dict())
    size, images = _largest(buckets)
    batch = config.batch
    if batch == "auto":
        fits = planner.largest_batch(way or "sliced", size, limit, part or _slice(config))
        batch = min(processes * fits, images)
    share = ceil(batch / processes)
    found = planner.fastest(share, size, limit, way, part) if share else None
    if found is None:
        ...
    return batch, found.plan, found


def limit_of(config: TrainConfig, device: torch.device) -> float | None:
    """Bytes that torch's tensors may take; None: no limit is known.

    Of a card, a twelfth and at least 1 GiB goes to CUDA's context, libraries and fragmentation.
    """
    if config.vram is not None:
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.vram * GIB / total), device)
        return (config.vram - max(1.0, config.vram / 12)) * GIB
    return 0.96 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
