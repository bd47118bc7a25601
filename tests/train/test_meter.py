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
