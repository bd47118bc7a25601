from dataclasses import replace
from typing import Any

import pytest

from xlsd_train.progress.pace import Pace, ceiling, describe_epochs, describe_hours, predicted
from xlsd_train.runs.record import EMPTY
from xlsd_train.step.backend import MemoryPlan


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
    record = replace(EMPTY, step_s=("RTX 4090", 1.0))
    for batches, told in {
        1_000_000: "278 hours (12 days)", 3600: "1.0 hours", 300: "5 minutes", 7: "7 seconds"
    }.items():  # fmt: skip
        assert describe_hours(record, batches) == (
            f"at least {told} (at an RTX 4090's peak, which no run reaches), without samples and "
            f"validation"
        )
    assert describe_hours(EMPTY, 300) is None


def test_hours_are_those_of_the_plan_that_was_measured() -> None:
    """32 images, or 16 of each of two processes, at 10 images/s."""
    plan = MemoryPlan("cheap", 11)
    rows: list[Any] = [
        {"plan": list(x), "images_per_s": rate, "of_peak": None, "peak_gib": None, "fits": True}
        for x, rate in ((MemoryPlan("plain", 6), 5.0), (plan, 10.0))
    ]
    record = replace(EMPTY, step_s=("A100", 1.0), batch=32, plan=plan, measured=rows)
    told = "about 3.2 hours at the measured 10 images/s, without samples and validation"
    assert describe_hours(record, 3600) == told
    told = describe_hours(replace(record, processes=2), 3600) or ""
    assert told.startswith("about 1.6 hours at the measured 10 images/s of each process, ")
    told = describe_hours(replace(record, plan=("cheap", 5, "sdpa", "resident")), 3600) or ""
    assert told.startswith("at least 1.0 hours (at an A100's peak")


def test_the_ceiling_is_that_of_the_precision_on_all_cards() -> None:
    """82.6 TFLOP/s in fp32, 165.2 in bf16."""
    for card, processes, precision, rate in (
        ("NVIDIA GeForce RTX 4090", 1, "fp32", 41.3), ("NVIDIA GeForce RTX 4090", 2, "bf16", 165.2),
        ("Quadro", 1, "fp32", None), (None, 1, "fp32", None),
    ):  # fmt: skip
        record = replace(
            EMPTY, machine={"card": card}, config={"precision": precision}, processes=processes
        )
        assert ceiling(record) is None
        assert ceiling(replace(record, tflop=2.0)) == (rate and pytest.approx(rate))


def said(steps: int, last: int, step_s: float, ceiling: float | None = None) -> list[str]:
    """What is said over these steps, the first of which take long."""
    pace, found = Pace(last, ceiling, "tf32"), []
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
    (told,) = said(100, 1_000_000, 0.5, ceiling=128)
    assert told.startswith("0.5 s per step (64 images/s, about 50% of the card's tf32 peak): the ")
    (told,) = said(100, 10_000, 20.0)  # two slow ones are enough
    assert told.startswith("20 s per step: the remaining 9,996 steps take 56 hours")


def test_of_a_short_run_nothing_is_told() -> None:
    assert said(100, 100, 0.5) == []
    assert said(10, 1_000_000, 0.5) == []
