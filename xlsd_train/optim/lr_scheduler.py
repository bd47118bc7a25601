"""The LR scheduler: the learning rate as a pure function of the step and the planned length.

So stopping a run early changes no learning rate.
"""

import math
import re

from xlsd_cache.dataset.batch_order import BatchOrder
from xlsd_cache.errors import UserError
from xlsd_train.config.optimization import MOST_STEPS, Scheduler
from xlsd_train.config.train import TrainConfig


def planned_steps(
    config: TrainConfig, order: BatchOrder, warmup_given: bool = True
) -> tuple[int, float]:
    """Planned length and warm-up, in steps.

    A recipe's warm-up that is longer than the planned length becomes a tenth of it, unless it was
    given as an option too (`warmup_given`).
    """
    planned = config.steps
    if planned is None:
        assert config.epochs is not None
        whole, part = divmod(config.epochs, 1)
        batches = order.batches(int(whole))
        batches += math.ceil(part * (order.batches(int(whole) + 1) - batches))
        planned = max(1, math.ceil(batches / config.accum))
        if planned > MOST_STEPS:
            raise UserError(
                f"--epochs {config.epochs:g} is {planned} steps, and a run can have {MOST_STEPS}; "
                f"lower it"
            )
    steps_an_epoch = order.batches_an_epoch / config.accum
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
    """The first of steps 1 to `steps` whose rate differs between two (planned length, warm-up).

    None if all rates are equal, and so all of these steps bit for bit.
    """
    last = steps
    if config.scheduler == "constant":  # equal after the longer warm-up
        last = min(steps, math.ceil(max(old[1], new[1])))

    def rate(step: int, plan: tuple[int, float]) -> float:
        planned, warmup = plan
        return learning_rate(
            config.rate, warmup, step, config.scheduler, planned, config.lr_floor or 0.0
        )

    return next((n for n in range(1, last + 1) if rate(n, old) != rate(n, new)), None)


def warmup_steps(warmup: str, planned_steps: int, steps_an_epoch: float) -> float:
    """`200`, `10%` of the planned length, or `0.5e` epochs, in steps; not rounded.

    Raises UserError for anything else, and for a warm-up longer than the planned length.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|e?)", warmup.strip())
    if not match:
        raise UserError(f"--warmup {warmup!r} is not steps (200), percent (10%) or epochs (0.5e)")
    number, unit = float(match[1]), match[2]
    steps = {
        "": number,
        "%": number / 100 * planned_steps,
        "e": number * steps_an_epoch,
    }[unit]
    if steps > planned_steps:
        raise UserError(
            f"--warmup {warmup} is {steps:g} steps, longer than the planned {planned_steps}; lower "
            f"it or raise --steps"
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
    """The learning rate of step 1, 2, ..., `planned`.

    It rises linearly to `lr` at step `warmup`, and then falls to `floor` at step `planned`, as the
    scheduler says.
    """
    if step <= warmup:
        return lr * min(1.0, step / warmup)
    if scheduler == "constant":
        return lr
    x = min(1.0, (step - warmup) / (planned - warmup))
    return floor + (lr - floor) * left(scheduler, x)


def left(scheduler: Scheduler, x: float) -> float:
    """The share of the way from the floor to the full rate at x, 0 after warm-up to 1 at the end.

    Cosine: Loshchilov and Hutter 2017 (arXiv 1608.03983, eq. 5, one cycle). REX: Chen, Wolfe and
    Kyrillidis 2021 (arXiv 2107.04197), changed at every step.
    """
    if scheduler == "cosine":
        return (1 + math.cos(math.pi * x)) / 2
    if scheduler == "rex":
        return (1 - x) / (0.5 + 0.5 * (1 - x))
    return 1 - x if scheduler == "linear" else 1.0
