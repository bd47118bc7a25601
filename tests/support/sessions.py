"""Training steps and sessions of small models in this process, and a slow run."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.support import train
from xlsd_train.config import sd15
from xlsd_train.config.train import TrainConfig
from xlsd_train.model.latent_scaling import LatentScaling
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.step.backend import DeviceBackend, MemoryPlan
from xlsd_train.step.objective import make_objective
from xlsd_train.step.step import Step
from xlsd_train.training.session import Session

Open = Callable[..., Session]


def bare_step(config: TrainConfig, plan: MemoryPlan, unet: Any, text_encoder: Any) -> Step:
    """A step of these networks on the CPU, with neither store nor tokenizer."""
    unet.requires_grad_(config.phase != "te")
    text_encoder.requires_grad_(config.phase != "unet")
    trained = [p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad]
    model: Any = SimpleNamespace(
        unet=unet, text_encoder=text_encoder, scaling=LatentScaling.of([0] * 4, [1] * 4, False),
        encode=lambda ids: text_encoder(ids).last_hidden_state,
    )  # fmt: skip
    alone: Any = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, config.precision == "bf16"),
    )  # fmt: skip
    optimizer = make_optimizer(config, trained, plan.momentum == "streamed")
    objective = make_objective("eps", "none", 0, sd15.SCHEDULER)
    return Step(model, trained, optimizer, objective, DeviceBackend(alone, plan))


def slow_train(*args: object) -> int:
    """`xlsd-train` with a pause in each step, so that a signal can interrupt one."""
    call = Step.__call__

    def slowly(self: Step, *given: Any) -> Any:
        time.sleep(0.05)
        return call(self, *given)

    Step.__call__ = slowly  # type: ignore[method-assign,assignment]
    return train(*args)
