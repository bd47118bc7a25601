import pytest
import torch
from lion_pytorch import Lion

from xlsd_cache import UserError
from xlsd_train.config import TrainConfig
from xlsd_train.optim import learning_rate, make_optimizer, warmup_steps


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


def test_lion_is_lion_pytorchs_with_the_papers_defaults() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(TrainConfig(phase="te").resolved(), [weight])
    assert isinstance(optimizer, Lion)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.99), 0.0, 3e-6)
    adam = make_optimizer(TrainConfig(phase="te", optimizer="adamw").resolved(), [weight])
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.param_groups[0]["betas"] == (0.9, 0.999)
