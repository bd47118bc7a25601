"""The memory plan: how a batch passes so that it fits, and of all the ways that fit the fastest.

Nothing is estimated by rules of thumb: each way is run once or twice on fake tensors
(footprint.py), by the step that will train, and gives its peak and its time on a card at most.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from math import ceil
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

from xlsd_cache import UserError
from xlsd_train.batches import Batch
from xlsd_train.cards import CARDS, Card
from xlsd_train.config import TrainConfig
from xlsd_train.footprint import FROZEN, GRADIENTS, STATE, WEIGHTS, Footprint, Tracker
from xlsd_train.layers import Layer
from xlsd_train.optim import allocate, make_optimizer
from xlsd_train.sliced import Work
from xlsd_train.step import Plan, Step, Way

GIB = 2**30
SLICES = (4, 2, 1)  # samples at once in the widest layers, the fastest first
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
            optimizer = make_optimizer(config, trained)
            allocate(optimizer)
            vae = SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)
            model: Any = SimpleNamespace(unet=unet, text_encoder=text_encoder, vae=vae)
            alone: Any = SimpleNamespace(
                device=torch.device("cpu"), num_processes=1, mixed=config.precision == "bf16"
            )
            abar = torch.ones(1000)
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
        flop = _total(print_.flop * print_.times) * batch / together
        plain = self._footprint(Plan("plain", batch), batch, size)
        seconds = {name: self._seconds(print_, passes, batch / together, card) for name, card in CARDS.items()}
        return Prediction(plan, batch, items, flop / 1e12, flop / plain.flop.sum(), seconds)
