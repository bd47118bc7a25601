"""The owner's command sees every event of a run; the report on the disk follows the run."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import psutil
import pytest

from tests.support import files, spawn, together, train, wait_for
from tests.support.report_page import Page
from tests.support.sessions import slow_train
from xlsd_cache.console.progress import choose
from xlsd_cache.console.terminal import as_command_line
from xlsd_cache.errors import UserError
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import BatchSource
from xlsd_train.progress import events
from xlsd_train.progress.events import Events, run_command
from xlsd_train.training.loop import STOPPING

Arguments = list[object]


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


@pytest.fixture
def command(tmp_path: Path, told: Path) -> str:
    """A real command that appends a line for each event."""
    script = tmp_path / "notify it.sh"
    line = '"$XLSD_EVENT|$XLSD_STEP|$XLSD_RUN|$XLSD_PATH|$XLSD_MESSAGE"'
    script.write_text(f"echo {line} >> {shlex.quote(str(told))}\n")
    return shlex.join(["sh", str(script)])


def lines(told: Path) -> list[list[str]]:
    return [line.split("|") for line in told.read_text().splitlines()] if told.exists() else []


LOOKS: Arguments = [
    "--sample-every", 6, "--sample-steps", 1, "--validate-every", 6, "--validation-fraction", 0.4,
]  # fmt: skip


def test_a_run_tells_each_event_with_its_paths(
    arguments: Arguments, tmp_path: Path, command: str, told: Path
) -> None:
    run = tmp_path / "run"
    assert train(*arguments, *LOOKS, "--save-every", 6, "--on-event", command) == 0
    found = lines(told)
    assert [line[0] for line in found if line[1] == "0"] == ["sampled", "validated"]
    last = [line for line in found if line[1] == "6"]
    assert [line[0] for line in last] == ["sampled", "validated", "saved", "done"]
    assert {line[2] for line in found} == {str(run)}
    paths = [Path(line[3]) for line in last]
    assert paths[0] == run / "samples/step-00000006"
    assert paths[2] == paths[3] == run / "checkpoints/step-00000006"
    assert all(path.exists() for path in paths)
    assert last[1][4].startswith("held-out loss 0.") or last[1][4].startswith("held-out loss 1.")
    assert last[3][4] == "step 6 of 6"
    # Neither the command nor the report changes a bit, and a resume may leave it out.
    plain = [*arguments[:-1], tmp_path / "plain"]
    assert train(*plain, *LOOKS, "--save-every", 6) == 0
    for pattern in ("checkpoints/*/*", "samples/step*/*.png", "validation/*"):
        assert files(run, pattern) == files(tmp_path / "plain", pattern)
    assert train(*arguments, *LOOKS, "--save-every", 6) == 0


def test_a_signal_tells_that_the_run_is_stopped(
    arguments: Arguments, tmp_path: Path, command: str, told: Path
) -> None:
    given = [*arguments, "--steps", 1000, "--save-every", 1000, "--on-event", command]
    process = spawn(slow_train, *given, log=tmp_path / "log")
    log = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_bytes().splitlines()) >= 2)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert [line[0] for line in lines(told)] == ["saved", "stopped"]
    assert lines(told)[-1][4].endswith(" of 1000")
    assert f"{STOPPING}\n" in (tmp_path / "log").read_text()


def test_a_failed_run_tells_why(
    arguments: Arguments, command: str, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = BatchSource.make

    def spoilt(*given: object) -> object:
        batch = make(*given)  # type: ignore[arg-type]
        batch.latents[0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(BatchSource, "make", spoilt)
    assert train(*arguments, "--on-event", command) == 1
    (line,) = lines(told)
    assert line[0] == "failed"
    assert "the loss of step 1 is nan" in line[4]


def test_of_two_processes_only_the_first_tells(
    arguments: Arguments, tmp_path: Path, command: str, told: Path
) -> None:
    given = [*arguments, "--save-every", 6, "--on-event", command]
    for process in (processes := together(2, train, *given, log=tmp_path / "log")):
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [line[0] for line in lines(told)] == ["saved", "done"]


def test_commands_that_fail_are_two_lines_in_the_log(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('no mail', file=sys.stderr); sys.exit(3)"
    command = shlex.join([sys.executable, "-c", code])
    assert train(*arguments, "--on-event", command) == 0
    first, last = (x for x in capsys.readouterr().err.splitlines() if "warning: --on-event" in x)
    assert first.startswith("warning: --on-event saved: ")
    assert "ended with code 3: no mail" in first
    assert re.search("of [2-4] commands failed, [012] events skipped$", last)


def test_a_command_that_hangs_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "TIMEOUT_S", 0.5)
    words = ["sh", "-c", f"sleep 600 & echo $! > {shlex.quote(str(tmp_path / 'pid'))}; wait"]
    assert run_command(words, {}) == "was killed after 0.5 s"
    child = int((tmp_path / "pid").read_text())

    def gone() -> bool:
        stat = Path(f"/proc/{child}/stat")
        return not stat.exists() or stat.read_text().split()[2] == "Z"

    wait_for(gone)
    assert run_command([str(tmp_path / "nothing")], {}) is not None


@pytest.mark.parametrize("ctrl_c", ["", "within", "after"])
def test_no_command_outlives_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: str
) -> None:
    """Neither one for which no time was left, nor one that runs at a second Ctrl-C."""
    monkeypatch.setattr(events, "TIMEOUT_S", 60 if ctrl_c else 0.2)
    pids = tmp_path / "pids"
    hangs = shlex.join(["sh", "-c", f"echo $$ >> {shlex.quote(str(pids))}; exec sleep 600"])
    with suppress(KeyboardInterrupt), Events(tmp_path, hangs) as it:
        for name in ("sampled", "validated", "saved", "stopped"):
            it.tell(name, 1, "")
        wait_for(lambda: pids.exists() and pids.read_text() != "")
        if ctrl_c == "within":
            raise KeyboardInterrupt
        if ctrl_c:
            Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    begun = [int(pid) for pid in pids.read_text().split()]
    assert begun
    assert not any(map(psutil.pid_exists, begun))


def test_a_command_without_room_for_its_output_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And one whose environment the system refuses."""
    assert str(run_command(["true"], {"XLSD_MESSAGE": "\ud800"})).startswith("did not start: ")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    assert str(run_command(["true"], {})).startswith("did not start: ")


def test_what_a_command_prints_does_not_fill_the_disk() -> None:
    """It prints until its output takes less room than before."""
    code = """if True:
        import os, time
        for _ in range(500):
            before = os.fstat(1).st_blocks
            os.write(1, b"x" * 2**20)
            time.sleep(0.01)
            if os.fstat(1).st_blocks < before:
                raise SystemExit("the last words")
    """
    assert str(run_command([sys.executable, "-c", code], {})).endswith("the last words")


def test_events_never_wait_for_a_slow_command(tmp_path: Path) -> None:
    """At most one of each name waits: the newest."""
    gate, told = tmp_path / "gate", tmp_path / "told"
    script = (
        f'while [ ! -e "{gate}" ]; do sleep 0.05; done; echo "$XLSD_EVENT $XLSD_STEP" >> {told}'
    )
    with Events(tmp_path, shlex.join(["sh", "-c", script])) as it:
        for step in range(1, 101):
            it.tell("saved", step, "")
        it.tell("done", 100, "")
        assert not told.exists()
        gate.touch()
    steps = told.read_text().splitlines()
    assert steps[-2:] == ["saved 100", "done 100"]
    assert len(steps) <= 3


def test_a_disk_that_fills_is_told_once(
    tmp_path: Path, command: str, told: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """To the owner's command and with --json."""
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    (saved / "unet").write_bytes(b"0" * 1000)
    with as_command_line(), Events(tmp_path, command) as it:
        choose(json=True)
        for free in (2000, 1999, 1500, 2000, 100):
            usage = SimpleNamespace(total=10_000, used=0, free=free)
            monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
            it.warn_low(free, saved)
            wait_for(it._idle.is_set)
    assert [line[1] for line in lines(told) if line[0] == "disk-low"] == ["1999", "100"]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(it["event"], it["free_nbytes"]) for it in printed] == [
        ("disk-low", 1999), ("disk-low", 100)
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["'", " ", "no-such-program --x"])
def test_a_command_that_cannot_run_is_refused_at_once(command: str) -> None:
    with pytest.raises(UserError, match="on.event"):
        TrainConfig(phase="unet", data=("latents",), batch=1, on_event=command)


def test_the_report_follows_the_run(arguments: Arguments, tmp_path: Path) -> None:
    """It is rewritten while the run goes on; a page of someone else's stays, and the run ends."""
    given = [*arguments, "--steps", 400, "--save-every", 20]
    process = spawn(slow_train, *given, log=tmp_path / "log")
    report = tmp_path / "run/report.html"
    wait_for(report.exists)
    first = report.stat().st_mtime_ns
    wait_for(lambda: report.stat().st_mtime_ns > first)
    assert process.is_alive()
    assert "not a step trained yet" not in Page(report).text
    report.write_text("mine")
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    assert report.read_text() == "mine"


def test_refreshing_takes_a_small_share_of_the_time(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*arguments) == 0
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    written: list[float] = []

    def slowly(*_: object) -> None:
        clock[0] += 1
        written.append(clock[0])

    monkeypatch.setattr(events, "leave_report", slowly)
    with Events(tmp_path / "run", None) as it:
        for _ in range(1000):
            clock[0] += 1
            it.refresh()
    assert len(written) <= events.SHARE * (clock[0] - 1000) + 1
    assert len(written) >= 15
