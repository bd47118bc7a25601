"""The learning rate as a pure function of the step and the planned length.

A run that is stopped, early or for ever, had at every step the rate that it would have had.
"""

import math
import re

from xlsd_cache.dataset.batch_order import BatchOrder
from xlsd_cache.errors import UserError
from xlsd_train.config.optimization import MOST_STEPS, Scheduler
from xlsd_train.config.train import TrainConfig


def planned_steps(
    config: TrainConfig, schedule: BatchOrder, warmup_given: bool = True
) -> tuple[int, float]:
    """Planned length and warm-up, in steps.

    A warm-up that nobody gave, but a recipe, is a tenth of a plan that is shorter than it is.
    """
    planned = config.steps
    if planned is None:
        assert config.epochs is not None
        whole, part = divmod(config.epochs, 1)
        batches = schedule.batches(int(whole))
        batches += math.ceil(part * (schedule.batches(int(whole) + 1) - batches))
        planned = max(1, math.ceil(batches / config.accum))
        if planned > MOST_STEPS:
            raise UserError(
                f"--epochs {config.epochs:g} is {planned} steps, and a run has at most "
                f"{MOST_STEPS}; lower it"
            )
    steps_an_epoch = schedule.batches_an_epoch / config.accum
    if config.warmup is None and config.phase == "unet":
        return planned, min(200.0, planned / 10)
    try:
        return planned, warmup_steps(config.warmup or "10%", planned, steps_an_epoch)
    except UserError:
        if warmup_given:
            raise
        return planned, planned / 10


def first_other_rate(
    config: TrainConfig, old: tuple[int, float], new: tuple[int, float], steps: int
) -> int | None:
    """The first of the steps 1 to `steps` that two (planned length, warm-up) give other rates.

    None: the rates are all the same, and so is each of these steps, to the bit.
    """
    last = steps
    if config.scheduler == "constant":  # alike from the longer warm-up's end on
        last = min(steps, math.ceil(max(old[1], new[1])))

    def rate(step: int, plan: tuple[int, float]) -> float:
        planned, warmup = plan
        return learning_rate(
            config.rate, warmup, step, config.scheduler, planned, config.lr_floor or 0.0
        )

    return next((n for n in range(1, last + 1) if rate(n, old) != rate(n, new)), None)


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


def learning_rate(
    lr: float,
    warmup: float,
    step: int,
    scheduler: Scheduler = "constant",
    planned: int = 0,
    floor: float = 0.0,
) -> float:
    """The rate of step 1, 2, ..., `planned`.

    It rises in proportion to the step up to `warmup`, where it is `lr`, then falls as the scheduler
    has it: with x from 0 there to 1 at the planned end, where it is `floor`.
    """
    if step <= warmup:
        return lr * min(1.0, step / warmup)
    if scheduler == "constant":
        return lr
    x = min(1.0, (step - warmup) / (planned - warmup))
    return floor + (lr - floor) * left(scheduler, x)


def left(scheduler: Scheduler, x: float) -> float:
    """The part of the way from the floor to the full rate that is left at x, 0 to 1.

    Cosine: Loshchilov and Hutter 2017 (arXiv 1608.03983, eq. 5, one cycle). REX: Chen, Wolfe and
    Kyrillidis 2021 (arXiv 2107.04197), changed at every step.
    """
    if scheduler == "cosine":
        return (1 + math.cos(math.pi * x)) / 2
    if scheduler == "rex":
        return (1 - x) / (0.5 + 0.5 * (1 - x))
    return 1 - x if scheduler == "linear" else 1.0
