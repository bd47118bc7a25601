"""What all parts of `card.py` share: the device, one training step, and the clock."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks.demo.pipeline import Size
from benchmarks.lib.real_step import drawn_batch, model_of, step_of
from xlsd_cache.runtime.gpu_memory import give_back
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.gpus import Card, card_named, device_name
from xlsd_train.memory.planner import Planner
from xlsd_train.memory.trials import TrialBackend
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.step.backend import MemoryPlan, drop_gradients
from xlsd_train.step.step import Step

# The fastest plan of each strategy on 24 GB at 512x512, and two more; see `xlsd-train plan`.
PLANS = (
    MemoryPlan("plain", 6),
    MemoryPlan("cheap", 11),
    MemoryPlan("feed-forward", 16),
    MemoryPlan("sliced", 4),
    MemoryPlan("sliced", 1),
    MemoryPlan("cheap", 4),
)
Results = dict[str, Any]  # the results of a part, as JSON


@dataclass
class Bench:
    """SD1.5 in full size on the GPU, or with `tiny` the smallest model on the CPU."""

    tiny: bool
    vram: float  # GB
    seconds: float  # limit for all parts together
    _begun: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> torch.device:
        """The device of all measurements."""
        return torch.device("cpu") if self.tiny else torch.device("cuda", 0)

    @property
    def model(self) -> Size:
        """The size of the model; its weights are random."""
        return "nano" if self.tiny else "sd15"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return (8, 8) if self.tiny else (64, 64)

    @property
    def batch(self) -> int:
        """Images per step."""
        return 4 if self.tiny else 32

    @property
    def plans(self) -> list[MemoryPlan]:
        """The memory plans to measure, the fastest of each strategy first."""
        return [MemoryPlan("plain", 2), MemoryPlan("sliced", 2)] if self.tiny else list(PLANS)

    @property
    def name(self) -> str:
        """The name of the device."""
        return "cpu" if self.tiny else device_name(self.device)

    @property
    def card(self) -> Card | None:
        """The peak rates of the GPU if they are known."""
        return card_named(self.name)

    @cached_property
    def settings(self) -> TrainConfig:
        """The options of a run."""
        return TrainConfig("unet", batch=self.batch).resolved()

    @cached_property
    def bundle(self) -> ModelBundle:
        """The model that all parts share: creating it takes longer than most parts."""
        return model_of(self.model)

    @cached_property
    def step(self) -> Step:
        """The step of that model, whose networks it moves to the device."""
        return step_of(self.bundle, self.settings, self.plans[0], self.device.type, TrialBackend)

    @cached_property
    def planner(self) -> Planner:
        """The planner that predicts memory."""
        model = self.step.model
        text = model.text_encoder.config.to_dict()
        return Planner(self.settings, model.unet.config, text, workspaces=not self.tiny)

    def drawn(self, count: int) -> Batch:
        """A random batch of `count` images."""
        return drawn_batch(self.bundle, count, self.size, self.device.type)

    def with_optimizer(self, name: Any, streamed: bool = False) -> None:
        """Give the step another optimizer with new state."""
        self.step.optimizer = torch.optim.SGD(self.step.parameters)  # frees the old state
        self.free()
        settings = TrainConfig("unet", batch=self.batch, optimizer=name).resolved()
        self.step.optimizer = make_optimizer(settings, self.step.parameters, streamed)

    def free(self) -> None:
        """Free gradients and cached memory."""
        drop_gradients(self.step.parameters)
        give_back(self.device)

    def sync(self) -> None:
        """Wait for the device."""
        if not self.tiny:
            torch.cuda.synchronize()

    def left(self) -> float:
        """Seconds until the limit."""
        return self.seconds - (time.perf_counter() - self._begun)

    def clock(self, work: Callable[[], Any], times: int = 2) -> float:
        """The shortest of `times` calls in seconds, after a warm-up call."""
        seconds = []
        for _ in range(times + 1):
            begun = time.perf_counter()
            work()
            self.sync()
            seconds.append(time.perf_counter() - begun)
        return min(seconds[1:])
