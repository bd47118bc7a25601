"""Optimizers, and the learning rate as a pure function of the step."""

import re
from collections.abc import Iterable

import torch
from lion_pytorch import Lion
from torch.nn import Parameter

from xlsd_cache import UserError
from xlsd_train.config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a resolved config; its learning rate is set anew at every step."""
    assert config.lr is not None
    assert config.betas is not None
    kind = {"lion": Lion, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer: torch.optim.Optimizer = kind(
        list(parameters), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    return optimizer


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
