from typing import Any

import pytest

from xlsd_train.training.pace import Pace, describe_epochs, describe_hours, predicted


@pytest.mark.parametrize(
    ("epochs", "told"),
    [
        (0.25, "0.25 epochs of 121 images"),
        (3.0, "3 epochs of 121 images"),
        (1000.0, "1,000 epochs of 121 images"),
    ],
)
def test_a_plan_is_told_in_epochs(epochs: float, told: str) -> None:
    assert describe_epochs(epochs, 121) == told


def test_an_absurd_plan_is_told_with_a_remedy() -> None:
    """A million steps on 121 photos."""
    told = describe_epochs(181_818.2, 121)
    assert told.startswith("181,818 epochs of 121 images. That is probably too long")
    assert "--epochs 10" in told


def test_hours_are_predicted_for_known_cards_alone() -> None:
    seconds = {"RTX 4090": 0.9, "A100": 0.5}
    assert predicted(seconds, "NVIDIA GeForce RTX 4090") == ("RTX 4090", 0.9)
    assert predicted(seconds, "NVIDIA A100-SXM4-40GB") == ("A100", 0.5)
    assert predicted(seconds, "Quadro") is None
    assert predicted(seconds, "") is None
    assert describe_hours("RTX 4090", 1e6).startswith("at least 278 hours (12 days) at an RTX 4090")
    assert describe_hours("A100", 3600).startswith("at least 1.0 hours at an A100's peak")
    assert describe_hours("A100", 300).startswith("at least 5 minutes at")
    assert describe_hours("A100", 7.2).startswith("at least 7 seconds at")


def said(steps: int, last: int, step_s: float) -> list[str]:
    """What is said over these steps, the first of which take long."""
    pace, found = Pace(last), []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "images_seen": 32 * step,
            "images_per_s": 32 / (step_s if step > 2 else 60 * step_s),
        }
        found.append(pace.next(line))
    return [told for told in found if told]


def test_hours_are_told_once_some_steps_were_measured() -> None:
    (told,) = said(100, 1_000_000, 0.5)
    assert told.startswith("0.5 s per step: the remaining 999,978 steps take 139 hours (6")
    (told,) = said(100, 10_000, 20.0)  # two slow ones are enough
    assert told.startswith("20 s per step: the remaining 9,996 steps take 56 hours")


def test_of_a_short_run_nothing_is_told() -> None:
    assert said(100, 100, 0.5) == []
    assert said(10, 1_000_000, 0.5) == []
