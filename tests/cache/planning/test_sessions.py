"""Concurrent builders of one store print the same sums, in whatever order they start and end."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import cache, printed, spawn, wait_for, write_images
from tests.support.stores import slow_build

Out = pytest.CaptureFixture[str]
NEW = "12 scanned = 12 encoded + 0 reused + 0 duplicate + 0 rejected"
OLD = "12 scanned = 0 encoded + 12 reused + 0 duplicate + 0 rejected"


@pytest.fixture
def arguments(tmp_path: Path, vae: Path) -> tuple[object, ...]:
    write_images(tmp_path / "im", [f"{i:02d}.png" for i in range(12)], width=64, height=64)
    return (tmp_path / "im", "--out", tmp_path / "l", "--vae", vae, "--resolution", 64,
            "--rows-per-shard", 2, "--batch", 1)  # fmt: skip


def said(log: Path) -> list[str]:
    """The sums that a log holds."""
    return re.findall(r"^\d+ scanned = .*", log.read_text(), re.MULTILINE)


def finish(processes: list[Any], logs: list[Path]) -> list[str]:
    for process, log in zip(processes, logs, strict=True):
        process.join()
        assert process.exitcode == 0, log.read_text()[-2000:]
    return [line for log in logs for line in said(log)]


@pytest.mark.parametrize("shards", [((), ()), (("--shard", "0/2"), ("--shard", "1/2"))])
def test_two_at_once_say_the_same(
    arguments: tuple[object, ...], tmp_path: Path, shards: tuple[Any, ...], capsys: Out
) -> None:
    """Also where the second begins when shards of the first are committed."""
    commits = tmp_path / "l/manifest/commit"
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    first = spawn(slow_build, *arguments, *shards[0], log=logs[0])
    wait_for(lambda: commits.is_dir() and len(list(commits.iterdir())) >= 1)
    second = spawn(slow_build, *arguments, *shards[1], log=logs[1])
    assert finish([first, second], logs) == [NEW, NEW]
    assert cache("build", *arguments, *shards[0]) == 0  # again: all is there
    assert OLD in printed(capsys)


def test_parts_one_after_the_other_say_the_same(
    arguments: tuple[object, ...], tmp_path: Path, capsys: Out
) -> None:
    for expected in (NEW, OLD):
        for part in range(2):
            assert cache("build", *arguments, "--shard", f"{part}/2") == 0
            assert expected in printed(capsys)
    write_images(tmp_path / "im", ["new.png"], 99, width=64, height=64)
    for part in range(2):
        assert cache("build", *arguments, "--shard", f"{part}/2") == 0
        assert "13 scanned = 1 encoded + 12 reused" in printed(capsys)


def test_after_a_kill_what_was_committed_is_reused(
    arguments: tuple[object, ...], tmp_path: Path, capsys: Out
) -> None:
    """The dead one is no builder any more, its number taken by another process or not."""
    commits = tmp_path / "l/manifest/commit"
    process = spawn(slow_build, *arguments, log=tmp_path / "log")
    wait_for(lambda: commits.is_dir() and len(list(commits.iterdir())) >= 2)
    process.kill()
    process.join()
    assert not psutil.pid_exists(process.pid)
    done = 2 * len([path for path in commits.iterdir() if path.suffix == ".parquet"])
    assert cache("build", *arguments) == 0
    assert f"12 scanned = {12 - done} encoded + {done} reused" in printed(capsys)


def test_one_that_was_stopped_is_no_builder(
    arguments: tuple[object, ...], tmp_path: Path, capsys: Out
) -> None:
    commits = tmp_path / "l/manifest/commit"
    process = spawn(slow_build, *arguments, log=tmp_path / "log")
    wait_for(lambda: commits.is_dir() and len(list(commits.iterdir())) >= 1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 1
    assert '"pid"' not in (tmp_path / "l/manifest/builders.json").read_text()
    done = 2 * len(list(commits.iterdir()))
    assert cache("build", *arguments) == 0
    assert f"12 scanned = {12 - done} encoded + {done} reused" in printed(capsys)


def test_a_damaged_record_of_builders_costs_nothing(
    arguments: tuple[object, ...], tmp_path: Path, capsys: Out
) -> None:
    assert cache("build", *arguments) == 0
    for text in ("", "{", "[]", '{"before": [], "builders": [1]}'):
        (tmp_path / "l/manifest/builders.json").write_text(text)
        assert cache("build", *arguments) == 0
        assert OLD in printed(capsys)
