"""What a run shows on a terminal, without one, and to a program."""

import fcntl
import json
import os
import re
import struct
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.support import metrics, spawn, train
from tests.train.training.test_loop import in_terminal
from xlsd_train.progress.status import Status, bar_format

COLUMNS = 48


@pytest.fixture
def arguments(model: Path, store: Path, tmp_path: Path) -> list[object]:
    """A run of four steps that samples, validates and saves at steps 0, 2 and 4."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cup\na cat\n")
    return [
        "--phase", "unet", "--data", store, "--model", model, "--batch", 3, "--steps", 4,
        "--lr", 1e-3, "--warmup", 0, "--threads", 1, "--sample-every", 2, "--sample-steps", 1,
        "--sample-prompts", prompts, "--validate-every", 2, "--validation-fraction", 0.3,
        "--save-every", 2,
    ]  # fmt: skip


def test_a_terminal_shows_every_sample_every_part_of_validation_and_every_save(
    arguments: list[object], tmp_path: Path
) -> None:
    """On one line of a narrow terminal, without colours."""
    terminal, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    out = ["--out", tmp_path / "run"]
    process = spawn(in_terminal, os.ttyname(inner), *arguments, *out, log=tmp_path / "log")
    shown = b""
    while chunk := _read(terminal, process, inner):
        shown += chunk
    process.join()
    assert process.exitcode == 0, shown[-2000:]
    states = re.split(r"[\r\n]+", shown.decode())
    told = [state.rstrip() for state in states]
    assert next(filter(None, told)).startswith("loading libraries")  # before anything else
    samples = ("sampling 1/2, step 0/1", "sampling 2/2, step 0/1", "sampling 2/2, step 1/1")
    for part in (*samples, "saving", "writing the report"):
        assert any(state.startswith(part) for state in told), part
    parts = [re.match(r"validating (\d+)/(\d+)", state) for state in told]
    validated = {(int(it[1]), int(it[2])) for it in parts if it}
    (count,) = {of for _, of in validated}
    assert validated == {(number, count) for number in range(1, count + 1)}
    bars = [state for state in states if re.match(r"(training|sampling|validating|saving)", state)]
    assert max(map(len, bars)) <= COLUMNS
    assert any("4/4, 00:00 left, loss " in state for state in bars)
    assert "\x1b[" not in shown.decode()


def _read(terminal: int, process: Any, inner: int) -> bytes:
    """What the terminal got; empty at its end."""
    os.set_blocking(terminal, False)
    while True:
        process.join(0.05)
        try:
            return os.read(terminal, 1 << 16)
        except BlockingIOError:
            if not process.is_alive():
                return b""


def test_without_a_terminal_each_result_is_a_line(
    arguments: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(*arguments, "--out", run, "--quiet") == 0
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert f"step 2: samples {run}/samples/step-00000002" in lines
    assert f"step 2: checkpoint {run}/checkpoints/step-00000002" in lines
    assert sum(line.startswith("step 4: held-out loss 0.") for line in lines) == 1
    assert lines[-1].startswith(f"  xlsd-train export {run} run.safetensors")
    (settings,) = [line for line in lines if line.startswith("settings ")]
    assert "--sample-steps 1" in settings
    assert "--clip-skip" not in settings
    assert lines[0] == f"run        {run}: new"
    assert "\r" not in told.err
    assert "\x1b" not in told.err
    assert train(*arguments, "--out", run) == 0
    assert f"{run} is already complete" in capsys.readouterr().out


def test_json_is_one_event_a_line(
    arguments: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = [*arguments, "--out", run, "--json"]
    assert train(*given, "--stop-after", 2) == 0
    assert train(*given) == 0
    assert train(*given, "--seed", 5) == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = " ".join(event.pop("event") for event in events)
    pause = "sampled validated"
    assert names == (
        f"start {pause} step step {pause} saved stopped start step step {pause} saved done failed"
    )
    steps = [event for event in events if "grad_norm" in event]
    assert [it["loss"] for it in steps] == [it["loss"] for it in metrics(run)]
    assert events[2]["held_out"]["mean"] > 0
    assert Path(events[7]["checkpoint"]).name == "step-00000002"
    assert "--seed 0 (now 5)" in events[-1]["error"]


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_a_bar_is_never_wider_than_the_terminal(columns: int) -> None:
    parts = ["12/40", "00:30 left", "loss 0.1234", "held-out 0.1234", "4 images/s", "lr 1e-06"]
    for doing in ("training", "sampling 2/4 12 s", "x" * 300):
        line = bar_format(columns, doing, parts).replace("{bar:16}", "#" * 16)
        assert len(line) < columns
    assert bar_format(200, "a {brace}", parts).startswith(
        "a {{brace}} |{bar:16}| 12/40, 00:30 left"
    )
    assert bar_format(40, "training", parts) == "training 12/40, 00:30 left, loss 0.1234"


def test_a_pause_is_timed_apart_from_steps() -> None:
    now = [0.0]
    status = Status(clock=lambda: now[0])
    with status.during("sampling") as progress:
        progress(1, 4)
        now[0] += 60
    assert status._left._pause_s == {"sampling": 60.0}
