"""--log-with wandb, with the real wandb in its offline mode where it is installed."""

import json
import os
import shlex
import signal
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import files, last_error, train, wait_for
from xlsd_train.progress import wandb_run
from xlsd_train.progress.wandb_run import following

Arguments = list[object]
LOOKS: Arguments = [
    "--sample-every", 2, "--sample-steps", 1, "--validate-every", 4, "--validation-fraction", 0.4,
]  # fmt: skip
installed = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


def records(folder: Path) -> list[Any]:
    """What wandb has stored: LevelDB's log format, 32 KiB blocks of records with 7 bytes before."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    data, at, found, whole = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # a whole record, or its last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> values."""
    rows = [it.history.item for it in records(folder) if it.WhichOneof("record_type") == "history"]
    named = [
        {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in row} for row in rows
    ]
    return {row["_step"]: row for row in named}


@installed
def test_a_run_that_was_stopped_goes_on_in_the_same_run_of_wandb(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With images and settings, offline, and with the bits of a run without it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert train(*arguments, *LOOKS, "--log-with", "wandb", "--stop-after", 4) == 0
    assert train(*arguments, *LOOKS, "--log-with", "wandb") == 0
    assert train(*arguments, *LOOKS, "--out", plain) == 0
    for pattern in ("checkpoints/*/*.safetensors", "samples/step*/*.png", "validation/*"):
        assert files(run, pattern) == files(plain, pattern)
    first, second = sorted((run / "wandb").glob("offline-run-*"))
    number = (run / "wandb" / "id").read_text()
    assert [folder.name.split("-")[-1] for folder in (first, second)] == [number, number]
    assert [*history(first)] == [0, 1, 2, 3, 4]
    assert [*history(second)] == [5, 6]
    logged = {**history(first), **history(second)}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        assert logged[line["step"]]["train/loss"] == line["loss"]
    assert {step for step, row in logged.items() if "samples/count" in row} == {0, 2, 4, 6}
    assert {step for step, row in logged.items() if "validation/live/held_out" in row} == {0, 4, 6}
    captions = logged[4]["samples/captions"]
    assert captions == json.loads((run / "config.json").read_text())["prompts"]
    shown = [first / "files" / name for name in logged[4]["samples/filenames"]]
    assert all(path.read_bytes()[:2] == b"\xff\xd8" for path in shown)
    settings = [it.config.update for it in records(first) if it.HasField("config")]
    told = {x.key: json.loads(x.value_json) for update in settings for x in update}
    assert (told["lr"], told["optimizer"]) == (1e-3, "lion")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_without_wandb_the_option_is_refused_at_once(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*arguments, "--log-with", "wandb") == 1
    assert "run `pip install 'xlsd[wandb]'`" in last_error(capsys)
    assert not (tmp_path / "run").exists()


def followers() -> list[psutil.Process]:
    every = psutil.Process().children()
    return [it for it in every if "xlsd_train.progress.wandb_run" in it.cmdline()]


def test_what_fails_is_one_warning_and_what_hangs_is_ended(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The real process, stopped by a signal; then with a mode that wandb refuses, or without it."""
    assert train(*arguments, "--stop-after", 1) == 0
    run = tmp_path / "run"
    caplog.clear()
    monkeypatch.setattr(wandb_run, "FINISH_S", 0.3)
    with following(run, 1):
        wait_for(lambda: len(followers()) == 1)
        (process,) = followers()
        os.kill(process.pid, signal.SIGSTOP)
    assert not process.is_running()
    monkeypatch.setattr(wandb_run, "FINISH_S", 60.0)
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with following(run, 1):
        wait_for(lambda: len(caplog.messages) == 2)
    hung, failed = caplog.messages
    assert f"`wandb sync {shlex.quote(str(run / 'wandb'))}` uploads the rest" in hung
    assert failed.startswith("logging to W&B ended with code 1: ")
    assert any(name in failed for name in ("nonsense", "No module named 'wandb'"))
    assert failed.endswith("training goes on, and a resume logs what is missing")
