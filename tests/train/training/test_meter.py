import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from xlsd_cache.errors import UserError
from xlsd_train.training.meter import SMOOTHING, FailureWatch, Meter, require_finite


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


@pytest.mark.parametrize(
    ("loss", "norm", "told"),
    [
        (math.nan, 0.0, "the loss of step 7 is nan; the step was not saved"),
        (1.0, math.inf, "the gradient norm of step 7 is inf"),
    ],
)
def test_a_step_that_is_not_finite_is_found_and_not_smoothed(
    tmp_path: Path, loss: float, norm: float, told: str
) -> None:
    (tmp_path / "config.json").write_text('{"config": {}, "settings": {}, "stores": []}')
    meter = Meter([0.5, 1.0])
    meter.add({"step": 7}, 1, torch.tensor(loss), torch.tensor(norm))
    (line,) = meter.flush()
    assert ("loss_smoothed" in line, meter.smoothed) == (False, [0.5, 1.0])
    with pytest.raises(UserError, match=told):
        require_finite(line, tmp_path)


@pytest.mark.parametrize(
    ("optimizer", "saved", "step", "told"),
    [
        ("lion", False, 1, "no weight had changed yet, so --lr is not the cause"),
        ("lion", False, 2, "start again with a lower --lr and another --out"),
        ("lion", True, 9, "step-00000004, run the same command with"),
        ("adamw", True, 9, "a lower --lr and --force"),
        ("dlion", True, 9, "a --d-max below the last d and --force"),
    ],
)
def test_what_is_advised_is_possible(
    tmp_path: Path, optimizer: str, saved: bool, step: int, told: str
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"config": {"optimizer": optimizer}, "settings": {}, "stores": []})
    )
    if saved:
        state = tmp_path / "checkpoints/step-00000004/state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")
    with pytest.raises(UserError, match=f"the loss of step {step} is inf.*{told}"):
        require_finite({"step": step, "loss": math.inf}, tmp_path)


class Stream:
    """A card's stream: what it was given, in order, and what the host has waited for."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.waited: list[int] = []  # places in `given`
        self.clock_ms = 0.0

    def event(self, **_: Any) -> "Event":
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at, self.time_ms = len(self.stream.given), self.stream.clock_ms

    def synchronize(self) -> None:
        self.stream.waited.append(self.at)

    def elapsed_time(self, later: "Event") -> float:
        return later.time_ms - self.time_ms


class OnCard(torch.Tensor):
    """A number that counts as a card's."""

    is_cuda = True


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """CUDA's events and pinned memory, and nothing else, replaced."""
    made, empty = Stream(), torch.empty

    def pinned(*size: int, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        return empty(*size)

    monkeypatch.setattr("torch.cuda.Event", made.event)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.memory_stats", lambda _: {"num_alloc_retries": 3, "num_ooms": 2}
    )
    monkeypatch.setattr("torch.empty", pinned)
    return made


def test_the_host_never_waits_for_the_newest_step_of_a_card(stream: Stream) -> None:
    meter = Meter([0.0, 0.0])
    meter.begin()
    lines: list[dict[str, Any]] = []
    lasted = [8.0, 2.0, 4.0]
    for step, seconds in enumerate(lasted, 1):
        stream.given.append(f"step {step}")
        stream.clock_ms += 1000 * seconds
        loss, norm = (torch.tensor(float(x)).as_subclass(OnCard) for x in (step, 1))
        lines += meter.add({"step": step}, 8, loss, norm)
        assert stream.waited == list(range(1, step))  # for those before this one
    lines += meter.flush()
    assert [line["loss"] for line in lines] == [1, 2, 3]
    assert [line["images_per_s"] for line in lines] == [8 / seconds for seconds in lasted]
    assert {line["alloc_retries"] for line in lines} == {3}
    assert {line["alloc_failures"] for line in lines} == {2}


def test_a_pause_is_no_steps_time_on_a_card(stream: Stream) -> None:
    meter = Meter([0.0, 0.0])
    lines: list[dict[str, Any]] = []
    for step in (1, 2):
        meter.begin()
        stream.clock_ms += 2000
        one = torch.tensor(1.0).as_subclass(OnCard)
        lines += meter.add({"step": step}, 8, one, one)
        lines += meter.flush()
        stream.clock_ms += 300_000  # samples
    assert [line["images_per_s"] for line in lines] == [4, 4]


def test_memory_that_was_refused_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "xlsd")
    watch = FailureWatch()
    for step, failures in enumerate((0, 0, 4, 9), 1):
        watch.see({"step": step, "alloc_failures": failures})
    watch.see({"step": 5})  # on a CPU
    assert caplog.text.count("allocations failed") == 1
    assert "4 allocations failed up to step 3" in caplog.text
