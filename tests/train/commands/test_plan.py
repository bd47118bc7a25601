import io
import json
import sys
from pathlib import Path

import pytest

from tests.support import metrics, printed, train
from xlsd_train.memory.gpus import CARDS


def plan(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert train("plan", "--phase", "unet", *args) == 0
    return printed(capsys)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_all_memory_plans_and_the_one_the_run_would_use(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    given = ("--model", model, "--data", store, "--batch", 6)
    lines = plan(capsys, *given).splitlines()
    assert "batch 6; the run may use 22.00 GiB of 24 GB" in lines[0]
    assert "the run would use: plain by 6, 1 passes" in lines[-1]
    shown = terminal.getvalue()
    assert "\rmemory plan: running step 1 on meta tensors, plain by 2\r " in shown  # then erased
    told = json.loads(plan(capsys, *given, "--json", "--memory", "sliced", "--micro-batch", 2))
    assert "meta tensors" not in terminal.getvalue()[len(shown) :]
    assert [row["way"] for row in told["plans"]] == ["plain", "cheap", "feed-forward", "sliced"]
    for row in (*told["plans"], told["chosen"]):
        assert row["peak_gib"] == pytest.approx(sum(row["items_gib"].values()))
        assert set(row["images_per_s"]) == {*CARDS}
        assert row["fits"]
    assert (told["chosen"]["way"], told["chosen"]["micro_batch"]) == ("sliced", 2)


@pytest.mark.slow
def test_streamed_momentum_is_marked_with_what_the_cpu_must_hold(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--model", model, "--data", store, "--batch", 6, "--momentum", "streamed")
    lines = plan(capsys, *given).splitlines()
    assert any(line.startswith("cheap by 6 *") for line in lines)
    assert "plain by 6, streamed momentum, 1 passes" in lines[-2]
    assert lines[-1].startswith("*: streamed momentum, ")
    told = json.loads(plan(capsys, *given, "--json"))
    assert told["chosen"]["momentum"] == "streamed"
    assert told["chosen"]["host_gib"] > 0


@pytest.mark.slow
def test_sizes_may_be_named_and_must_be_sizes(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no store
    given = ("--model", model, "--batch", 2, "--json", "--memory", "plain")
    told = json.loads(plan(capsys, *given, "--size", "128x192", "64x64"))
    assert told["size"] == "128x192"
    assert train("plan", "--phase", "unet", *given, "--size", "100x100") == 1
    assert "--size 100x100 is not WIDTHxHEIGHT" in capsys.readouterr().err
    assert train("plan", "--phase", "unet", *given, "--data", "nowhere") == 1
    assert "no latent store in nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_an_automatic_batch_is_the_same_in_the_plan_and_in_the_run(
    model: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (
        "--model",
        model,
        "--data",
        store,
        "--batch",
        "auto",
        "--vram",
        1.08,
        "--memory",
        "cheap",
    )
    told = json.loads(plan(capsys, *given, "--json"))
    assert 1 <= told["batch"] == told["plans"][1]["largest_pass"]
    run = ("--phase", "unet", *given, "--steps", 4, "--sample-every", 0, "--threads", 1)
    assert train(*run, "--out", tmp_path / "whole") == 0
    said = printed(capsys)
    before = json.loads((tmp_path / "whole/config.json").read_text())
    assert before["batch"] == min(told["batch"], before["stores"][0]["images"])
    assert before["memory"] in said
    assert "predicted peak" in said
    assert train(*run, "--out", tmp_path / "parts", "--stop-after", 2) == 0
    assert train(*run, "--out", tmp_path / "parts") == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
