from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from xlsd_cache.errors import UserError
from xlsd_train.config.optimization import Scheduler
from xlsd_train.optim.lr_scheduler import learning_rate, warmup_steps

FALLING: tuple[Scheduler, ...] = ("linear", "cosine", "rex")


def test_the_articles_learning_rates_inside_the_warm_up() -> None:
    """3e-6 with 10% of three epochs of 30,000 images at batch 32: 2.1e-6 at 200, 2.67e-6 at 250."""
    warmup = warmup_steps("10%", 2812, 937.5)
    assert warmup == pytest.approx(281.2)
    assert learning_rate(3e-6, warmup, 200) == pytest.approx(2.1e-6, rel=0.02)
    assert learning_rate(3e-6, warmup, 250) == pytest.approx(2.67e-6, rel=0.002)
    assert learning_rate(3e-6, warmup, 282) == learning_rate(3e-6, warmup, 2000) == 3e-6


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [("200", 200), ("0", 0), ("10%", 100), ("2.5%", 25), ("0.5e", 20), ("1e", 40)],
)
def test_warm_ups_in_steps_percent_and_epochs(warmup: str, steps: float) -> None:
    assert warmup_steps(warmup, 1000, 40.0) == steps


@pytest.mark.parametrize("warmup", ["", "ten", "-5", "5 %%", "1001", "101%", "26e"])
def test_impossible_warm_ups_are_refused(warmup: str) -> None:
    with pytest.raises(UserError, match="--warmup"):
        warmup_steps(warmup, 1000, 40.0)


def test_no_warm_up_is_the_full_rate_at_once() -> None:
    assert learning_rate(1e-5, 0, 1) == 1e-5
    assert learning_rate(1e-5, 4, 1) == 2.5e-6


def library(make: Any, **settings: Any) -> list[float]:
    """What a scheduler of theirs gives after 0, 1, ..., 100 steps at the base rate 2."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = make(optimizer, **settings)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(100):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 30])
def test_linear_and_cosine_are_diffusers(warmup: int) -> None:
    settings = {"num_warmup_steps": warmup, "num_training_steps": 100}
    linear = library(get_linear_schedule_with_warmup, **settings)
    cosine = library(get_cosine_schedule_with_warmup, **settings)
    for step in range(1, 101):
        ours = learning_rate(2.0, warmup, step, "linear", 100)
        assert ours == pytest.approx(linear[step], abs=1e-12)
        ours = learning_rate(2.0, warmup, step, "cosine", 100)
        assert ours == pytest.approx(cosine[step], abs=1e-12)


def test_cosine_with_a_floor_is_torchs() -> None:
    make = torch.optim.lr_scheduler.CosineAnnealingLR
    theirs = library(make, T_max=100, eta_min=0.3)
    for step in range(1, 101):
        ours = learning_rate(2.0, 0, step, "cosine", 100, 0.3)
        assert ours == pytest.approx(theirs[step], rel=1e-9)


def test_rex_is_the_papers() -> None:
    """eta_t = eta_0 (1 - t/T) / (1/2 + 1/2 (1 - t/T)), over what follows the warm-up."""
    for step in range(21, 101):
        part = (step - 20) / 80
        paper = 2.0 * (1 - part) / (0.5 + 0.5 * (1 - part))
        assert learning_rate(2.0, 20, step, "rex", 100) == pytest.approx(paper, rel=1e-12)
    assert learning_rate(2.0, 20, 60, "rex", 100) == pytest.approx(2.0 * 2 / 3)


@pytest.mark.parametrize("scheduler", FALLING)
def test_they_fall_from_the_warm_up_to_the_floor_at_the_planned_end(scheduler: Scheduler) -> None:
    rates = [learning_rate(4.5e-5, 10, step, scheduler, 1000, 4.5e-6) for step in range(1, 1001)]
    assert rates[9] == 4.5e-5 == max(rates)
    assert rates[:10] == [learning_rate(4.5e-5, 10, step) for step in range(1, 11)]
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(4.5e-6, rel=1e-12)
    assert learning_rate(1.0, 10, 10, scheduler, 10) == 1.0, "a plan that is all warm-up"


def test_a_constant_rate_knows_no_end() -> None:
    assert learning_rate(3e-6, 10, 11, "constant", 12) == 3e-6
    assert learning_rate(3e-6, 10, 10**6, "constant", 12) == 3e-6
