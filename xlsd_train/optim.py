"""Optimizers, and the learning rate as a pure function of the step.

A training step is `step()`, or several of them for parts of the parameters, and then `finish()`.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

from xlsd_cache import UserError
from xlsd_train.config import TrainConfig
from xlsd_train.lion import DLion, Lion

EVOLVING = ("d", "k", "numerator_weighted")  # numbers of a group that steps change


def make_optimizer(config: TrainConfig, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a resolved config, its state allocated beside the parameters.

    Its learning rate is set anew at every step.
    """
    assert config.lr is not None
    assert config.betas is not None
    common: dict[str, Any] = {
        "params": list(parameters),
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if config.optimizer == "lion":
        optimizer = Lion(**common)
    elif config.optimizer == "dlion":
        limits = {"d_max": config.d_max or math.inf, "d_growth": config.d_growth or math.inf}
        optimizer = DLion(**common | limits)
    else:
        optimizer = torch.optim.AdamW(**common, fused=True)  # without temporaries
    allocate(optimizer)
    return optimizer


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Make all state as the first step would: what does not fit is known before it."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(optimizer, (Lion, DLion)):
            optimizer.allocate(parameter)
        elif not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def finish(optimizer: torch.optim.Optimizer) -> None:
    """End a training step, after each parameter with a gradient was stepped."""
    if isinstance(optimizer, DLion):
        optimizer.finish()


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """For the metrics of the step that ended last: `lr`, `lr_effective`, and D-Lion's `d`.

    The effective rate is what Lion moves each weight by.
    """
    lr: float = optimizer.param_groups[0]["lr"]
    if isinstance(optimizer, DLion):
        return {"lr": lr, "lr_effective": optimizer.used_d * lr, "d": optimizer.used_d}
    return {"lr": lr, "lr_effective": lr}


def numbers(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What a checkpoint must hold beside the parameters' state."""
    (group,) = optimizer.param_groups
    return {key: group[key] for key in EVOLVING if key in group}


def set_numbers(optimizer: torch.optim.Optimizer, values: dict[str, float]) -> None:
    """Put back what `numbers` gave. Raises ValueError where they are another optimizer's."""
    (group,) = optimizer.param_groups
    if values.keys() != numbers(optimizer).keys():
        raise ValueError(f"its optimizer has the numbers {', '.join(values) or 'none'}")
    group.update(values)


def warmup_steps(warmup: str, planned_steps: int, steps_an_epoch: float) -> float:
    """`200`, `10%` of the planned length, or `0.5e` epochs, in steps; not rounded.

    Raises UserError for anything else, and for a warm-up longer than the plan.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|e?)", warmup.strip())
    if not match:
        raise UserError(
            f"--warmup {warmup!r} is neither steps (200), percent (10%) nor epochs (0.5e)"
        )
    number, unit = float(match[1]), match[2]
    steps = {
        "": number,
        "%": number / 100 * planned_steps,
        "e": number * steps_an_epoch,
    }[unit]
    if steps > planned_steps:
        raise UserError(
            f"--warmup {warmup} is {steps:g} steps and the planned length only {planned_steps}; "
            f"shorten the one or lengthen the other"
        )
    return steps


def learning_rate(lr: float, warmup: float, step: int) -> float:
    """The rate of step 1, 2, ...: rising in proportion to the step up to `warmup`, then `lr`."""
    return lr * min(1.0, step / warmup) if warmup > 0 else lr
