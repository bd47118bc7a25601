import json
from pathlib import Path

import pytest
import torch

from xlsd_cache import UserError
from xlsd_train.meter import SMOOTHING, Meter


def test_each_step_has_its_own_time_though_it_is_told_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the first after a pause, and the last before one, which is told at once."""
    clock, meter, lines = [100.0], Meter([0.0, 0.0]), []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    lasted = [8.0, 2.0, 4.0, 16.0]
    meter.begin()
    for step, seconds in enumerate(lasted, 1):
        clock[0] += seconds
        lines += meter.add({"step": step}, 8, torch.tensor(float(step)), torch.tensor(1.0))
        if step == 2:
            lines += meter.flush()
            clock[0] += 300  # samples
            meter.begin()
    lines += meter.flush()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["images_per_s"] for line in lines] == [8 / seconds for seconds in lasted]


def test_smoothing_needs_no_start_up_correction() -> None:
    meter = Meter([0.0, 0.0])
    lines = []
    for step in range(1, 4):
        lines += meter.add({"step": step}, 1, torch.tensor(float(step)), torch.tensor(0.0))
    lines += meter.flush()
    weights = [SMOOTHING**2, SMOOTHING, 1.0]
    expected = sum(w * x for w, x in zip(weights, (1, 2, 3), strict=True)) / sum(weights)
    assert lines[0]["loss_smoothed"] == lines[0]["loss"] == 1
    assert lines[-1]["loss_smoothed"] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_is_found_before_anything_is_kept() -> None:
    meter = Meter([0.0, 0.0])
    meter.add({"step": 7}, 1, torch.tensor(torch.nan), torch.tensor(0.0))
    with pytest.raises(UserError, match="the loss of step 7 is nan; nothing of it was kept"):
        meter.flush()


@pytest.mark.parametrize(
    ("optimizer", "saved", "step", "told"),
    [
        ("lion", False, 1, "no weight had moved yet, so --lr is not the cause"),
        ("lion", False, 2, "begin again with a lower --lr and another --out"),
        ("lion", True, 9, "step-00000004 stands: to go on from it, give the same command with"),
        ("adamw", True, 9, "a lower --lr and --force"),
        ("dlion", True, 9, "a --d-max below what d came to and --force"),
        ("prodigy", True, 9, "a --d-growth nearer to 1 and --force"),
    ],
)
def test_what_is_advised_is_possible(
    tmp_path: Path, optimizer: str, saved: bool, step: int, told: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"config": {"optimizer": optimizer}}))
    if saved:
        (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    meter = Meter([0.0, 0.0], tmp_path)
    meter.add({"step": step}, 1, torch.tensor(torch.inf), torch.tensor(0.0))
    with pytest.raises(UserError, match=f"the loss of step {step} is inf.*{told}"):
        meter.flush()


def test_a_gradient_that_is_not_finite_is_found_as_well() -> None:
    meter = Meter([0.0, 0.0])
    meter.add({"step": 7}, 1, torch.tensor(1.0), torch.tensor(torch.inf))
    with pytest.raises(UserError, match="the gradient's norm of step 7 is inf"):
        meter.flush()
