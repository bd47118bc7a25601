"""The gradients of one training step, as its optimizer sees them."""

import math
from typing import Any

from torch import Tensor

from xlsd_train.data.loader import Batch
from xlsd_train.step.backend import MemoryPlan
from xlsd_train.step.step import Step


def gradients_of(step: Step, batch: Batch, plan: MemoryPlan) -> list[Tensor]:
    """The gradient of each parameter, by a step with a learning rate of 0."""
    found: dict[int, Tensor] = {}

    def look(*_: Any) -> None:
        for n, parameter in enumerate(step.parameters):
            if parameter.grad is not None:
                found[n] = parameter.grad.clone()

    step.plan = plan
    hook = step.optimizer.register_step_pre_hook(look)
    step([batch], 0.0)
    hook.remove()
    return [found[n] for n in sorted(found)]


def difference(these: list[Tensor], those: list[Tensor]) -> float:
    """Relative difference of all gradients as one vector."""
    pairs = [(a.double(), b.double()) for a, b in zip(these, those, strict=True)]
    squares = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(squares / sum(float(b.square().sum()) for _, b in pairs))
