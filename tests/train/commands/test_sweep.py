import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock, Timeout
from safetensors.numpy import load_file, save_file

import xlsd_train.commands.sweep
from tests.support import files, metrics, printed, spawn, train, wait_for
from tests.support.report_page import Page
from tests.support.sessions import slow_train
from xlsd_cache.errors import UserError
from xlsd_train.commands.sweep import rate_hint
from xlsd_train.config.recipes import options_in, parse, without
from xlsd_train.config.run_options import SweepConfig
from xlsd_train.config.train import TrainConfig
from xlsd_train.report.ranking import rank, table
from xlsd_train.runs.bootstrap import intervals, overall
from xlsd_train.runs.history import histories
from xlsd_train.runs.layout import checkpoints
from xlsd_train.runs.validation_log import read_losses

Out = pytest.CaptureFixture[str]


class Forked:
    """A run in a forked process, which has the libraries already and starts seconds sooner."""

    def __init__(self, run: Callable[..., int], words: list[str]) -> None:
        folder = Path(options_in(words)["out"])
        self.process = spawn(run, "run", *words, log=folder.parent.with_suffix(".log"))
        folder.parent.with_suffix(".pid").write_text(str(self.process.pid))

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("run", timeout or 0)
        return int(self.process.exitcode)

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()


def fork(words: list[str]) -> Any:
    return Forked(train, words)


def forked_sweep(*args: object) -> int:
    """`xlsd-train sweep` with runs slow enough to be interrupted."""
    xlsd_train.commands.sweep.start = lambda words: Forked(slow_train, words)  # type: ignore[assignment,return-value]
    return train("sweep", *args)


class Swept(NamedTuple):
    out: Path
    code: int
    said: list[str]
    error: str


@pytest.fixture(scope="module")
def arguments(model: Path, store: Path) -> list[object]:
    return [
        "--phase", "unet", "--batch", 3, "--data", store, "--model", model, "--steps", 100,
        "--stop-after", 6, "--save-every", 2, "--sample-every", 3, "--sample-steps", 1,
        "--warmup", 0, "--threads", 1, "--validation-fraction", 0.4, "--optimizer", "adamw",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def swept(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep of three rates, one of which makes the weights nan. Read-only."""
    out, said, error = tmp_path_factory.mktemp("sweep") / "all", StringIO(), StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(said),
        redirect_stderr(error),
    ):
        patch.setattr(xlsd_train.commands.sweep, "start", fork)
        (script := out.with_name("notify it.sh")).write_text(
            f'echo "$XLSD_EVENT|$XLSD_RUN|$XLSD_PATH|$XLSD_MESSAGE" >> {out.with_name("told")}\n'
        )
        given = [*arguments, "--on-event", shlex.join(["sh", str(script)])]
        code = train("sweep", *given, "--lr=1e-3,1e30,1e-5", "--force", "--out", out)
    return Swept(out, code, said.getvalue().splitlines(), error.getvalue())


def test_a_failed_run_is_reported_and_the_others_run(swept: Swept) -> None:
    names = {path.name for path in swept.out.iterdir()}
    assert names == {"lr-0.001", "lr-1e+30", "lr-1e-05", "report.html"}
    assert swept.code == 1
    assert "warning: --lr 1e+30: failed with exit code 1; the others continue\n" in swept.error
    assert f"1 of 3 runs failed, with the errors above: {swept.out}/lr-1e+30;" in swept.error
    for name, rate in (("lr-0.001", 1e-3), ("lr-1e-05", 1e-5)):
        lines = metrics(swept.out / name)
        assert [line["step"] for line in lines] == list(range(1, 7))
        assert {line["lr"] for line in lines} == {rate}
        record = json.loads((swept.out / name / "config.json").read_text())
        assert (record["planned_steps"], record["config"]["optimizer"]) == (100, "adamw")


def test_every_run_and_the_comparison_are_told_to_the_command(swept: Swept) -> None:
    told = [line.split("|") for line in swept.out.with_name("told").read_text().splitlines()]
    of = {name: [line for line in told if line[1] == f"{swept.out}{name}"]
          for name in ("/lr-0.001", "/lr-1e+30", "/lr-1e-05", "")}  # fmt: skip
    assert sum(map(len, of.values())) == len(told)
    assert [lines[-1][0] for lines in of.values()] == ["stopped", "failed", "stopped", "compared"]
    assert "the loss of step 2 is nan" in of["/lr-1e+30"][-1][3]
    assert of[""] == [["compared", str(swept.out), f"{swept.out}/report.html", swept.said[-1]]]


def test_runs_share_seed_samples_and_held_out_images(swept: Swept) -> None:
    assert swept.error.startswith("validating every 1 steps, to compare; change it with ")
    records = [json.loads(path.read_text()) for path in swept.out.glob("*/config.json")]
    assert len(records) == 3
    for name in ("validation", "prompts", "stores", "model"):
        assert len({json.dumps(record[name]) for record in records}) == 1
    begun = [files(path, "samples/step-00000000/*") for path in swept.out.glob("lr-*")]
    assert begun[0] == begun[1] == begun[2]
    assert len({(path / "metrics.jsonl").read_text()[:40] for path in swept.out.glob("lr-*")}) == 1


def test_the_table_and_the_answer_are_right(swept: Swept) -> None:
    """Computed from the runs' own files in another way."""
    told = {"lr-0.001": "--lr 0.001", "lr-1e+30": "--lr 1e+30, failed", "lr-1e-05": "--lr 1e-05"}
    runs = histories([swept.out / name for name in told])
    standings, answer = rank([replace(run, name=told[run.folder.name]) for run in runs])
    assert swept.said[-5:] == [*table(standings).splitlines(), answer + rate_hint(standings)]
    best = {}
    for folder in sorted(swept.out.glob("lr-*")):
        steps = range(7)
        found = {step: read_losses(folder, step).get("live/held_out") for step in steps}
        means = {step: float(x.mean()) for step, x in found.items() if x is not None}
        step = min(means, key=lambda step: means[step])
        best[folder.name] = step, found[step], metrics(folder)[-1]
    (_, first, _) = best["lr-0.001"]
    assert first is not None
    for run, (name, title) in zip(standings, told.items(), strict=True):
        step, losses, last = best[name]
        assert losses is not None
        beyond = (overall(losses) - overall(first)).interval
        smoothed = f"{last['loss_smoothed']:.5f}" if math.isfinite(last["loss"]) else ""
        assert run.cells == (
            title, str(last["step"]), smoothed, str(intervals(losses)[0]),
            f"step {step}", "best" if name == "lr-0.001" else f"worse by {beyond}",
        )  # fmt: skip
    assert answer.startswith("use --lr 0.001: lowest loss on 3 held-out images, ")
    assert "; all others are worse (3 images are few: 95% intervals" in answer


def test_its_report_has_the_runs_side_by_side(swept: Swept) -> None:
    assert f"report {swept.out / 'report.html'}\n" in swept.error
    page = Page(swept.out / "report.html")
    names = ["--lr 0.001", "--lr 1e+30, failed", "--lr 1e-05"]
    assert page.tables["settings"][0][1:] == names
    assert page.tables["settings"][1] == ["lr", "0.001", "1e+30", "1e-05"]
    assert [row[0] for row in page.tables["standings"][1:]] == names
    assert page.data["runs"] == names
    for i in range(3):
        assert page.lines("loss", "each step", i)
        assert page.lines("loss", "held-out", i)
    assert page.data["samples"]["steps"] == [0, 3, 6]
    assert "by learning rate. 1e-05: worse by " in page.text_of_pictures


@pytest.mark.slow
def test_a_stopped_and_killed_sweep_resumes_bit_exactly(
    swept: Swept, arguments: list[object], tmp_path: Path
) -> None:
    """SIGTERM to the sweep alone in the first run, SIGKILL to it and its run in the second."""
    out, log = tmp_path / "sweep", tmp_path / "log"
    given = (*arguments, "--lr", "1e-3,1e-5", "--out", out)
    first, second = out / "lr-0.001", out / "lr-1e-05"

    process = spawn(forked_sweep, *given, log=log)
    wait_for(lambda: lines(first) >= 2)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert f"to resume bit-exactly, use the same command with --out {out}" in log.read_text()
    assert 2 <= lines(first) < 6
    assert int(checkpoints(first)[-1].name[5:]) == lines(first)
    assert not second.exists()

    process = spawn(forked_sweep, *given, log=log)
    wait_for(lambda: lines(second) >= 3)
    process.kill()
    os.kill(int(out.with_suffix(".pid").read_text()), signal.SIGKILL)
    process.join()
    assert 3 <= lines(second) < 6
    wait_for(lambda: not locked(second))
    finished = files(first, "**/*")
    process = spawn(forked_sweep, *given, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert f"--lr 0.001: {first} is finished" in log.read_text()
    assert files(first, "**/*") == finished

    for name in ("lr-0.001", "lr-1e-05"):
        last = "checkpoints/step-00000006/*"
        assert files(out / name, last) == files(swept.out / name, last)
        assert metrics(out / name) == metrics(swept.out / name)
        for path in ("validation/step-00000006*", "samples/step-00000006/*"):
            assert files(out / name, path) == files(swept.out / name, path)


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def locked(run: Path) -> bool:
    try:
        with FileLock(run / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def refuse(words: list[str]) -> Any:
    raise AssertionError(words)


def test_a_sweep_with_other_settings_is_refused(
    swept: Swept, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Out,
) -> None:  # fmt: skip
    """Runs with other settings are refused even if finished, and nothing starts."""
    monkeypatch.setattr(xlsd_train.commands.sweep, "start", refuse)
    given = ["sweep", *arguments, "--lr", "1e-3,1e-5", "--out", swept.out]
    for option, value in (("--batch", 2), ("--seed", 1), ("--weight-decay", 0.1)):
        assert train(*given, option, value) == 1
        error = capsys.readouterr().err
        assert f"lr-0.001 was started with {option} " in error
        assert f" (now {value}); use the same" in error
    out = Path(shutil.copytree(swept.out, tmp_path / "copy"))
    assert train(*given[:-1], out, "--batch", 2, "--force") == 0  # all are finished
    assert "--lr 1e-05: " in printed(capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lr", "1e-3"), "--lr 1e-3 has fewer than two rates"),
        (("--lr", "1e-3,0.001"), "has fewer than two rates, or one twice"),
        (("--lr", "slow,fast"), "--lr 'slow,fast' is not a list of rates"),
        ((), "--lr '' is not a list of rates"),
        (("--lr", "1e-3,-1"), "--lr -1 is not above 0"),
        (("--lr", "4e-3,1e-5", "--scheduler", "linear", "--lr-floor", "1e-4"), "--lr-floor 0.0001"),
        (("--lr", "4e-3,1e-5", "--batch", 0), "--batch 0"),
    ],
)
def test_bad_rates_are_refused_before_anything_runs(
    words: tuple[object, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Out,
) -> None:  # fmt: skip
    monkeypatch.setattr(xlsd_train.commands.sweep, "start", refuse)
    assert train("sweep", "--phase", "te", *words, "--out", tmp_path / "out") == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rates_are_refused_for_optimizers_that_find_their_own(tmp_path: Path, capsys: Out) -> None:
    words = ("--recipe", "phase1-unet", "--lr", "4e-6,2e-6", "--out", tmp_path / "out")
    assert train("sweep", *words) == 1
    assert "--lr 4e-06 is a factor of the learning rate that --optimizer dlion finds" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_an_out_folder_that_is_a_run_and_a_launcher_are_refused(
    swept: Swept, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setattr(xlsd_train.commands.sweep, "start", refuse)
    given = ("sweep", "--phase", "te", "--lr", "2e-3,1e-3")
    assert train(*given, "--out", swept.out / "lr-0.001") == 1
    assert "lr-0.001 is a run or a file; use another folder" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(*given) == 1
    assert "start it without a launcher" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_checks_one_run_and_writes_nothing(
    arguments: list[object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ("--lr", "1e-3,1e-5", "--out", out, "--dry-run", "--validate-every", 0)
    assert train("sweep", *arguments, *given) == 0
    said = "".join(capfd.readouterr())
    assert f"--lr 0.001: run 1 of 2, {out}/lr-0.001\n" in said
    assert "--validate-every" not in said  # 0, as a run has it by default
    assert "the other runs differ only in --lr" in said
    assert not out.exists()


def test_folders_and_validation_have_defaults_of_their_own() -> None:
    config = SweepConfig(phase="te", rates="5e-6,4e-6", stop_after=500)
    (first, run), (second, other) = config.runs(False).items()
    assert first.parent == second.parent
    assert re.fullmatch(r"runs/sweep-te-\d{8}-\d{6}", first.parent.as_posix())
    assert (first.name, second.name, run.out) == ("lr-5e-06", "lr-4e-06", first)
    assert (run.lr, other.lr, run.validate_every) == (5e-6, 4e-6, 50)
    assert type(run).__name__ == "TrainConfig"
    for settings, given, every in (
        ({"stop_after": 5}, False, 1),
        ({"steps": 300}, False, 30),
        ({}, False, 250),
        ({"stop_after": 500}, True, 0),
        ({"stop_after": 500, "validate_every": 7}, True, 7),
    ):
        told: dict[str, Any] = settings
        runs = SweepConfig(phase="te", rates="2e-3,1e-3", **told).runs(given)
        assert {run.validate_every for run in runs.values()} == {every}


def test_a_recipe_passes_through(tmp_path: Path) -> None:
    """All options of a recipe apply but its rate, in the sweep and in its runs' command lines."""
    words = "--recipe phase1-te --lr 5e-6,4e-6 --stop-after 500".split()
    config = parse(SweepConfig, [*words, "--out", str(tmp_path / "out")], "")
    first, second = config.runs(False).values()
    assert (first.lr, second.lr, first.validate_every) == (5e-6, 4e-6, 50)
    alone = [*without(words, "lr"), "--lr", "5e-6", "--validate-every", "50"]
    assert replace(parse(TrainConfig, alone, "").resolved(), out=first.out) == first
    with pytest.raises(UserError, match="has fewer than two rates"):
        parse(SweepConfig, words[:2], "").runs(False)


def test_runs_get_the_command_line_without_the_sweeps_own_options() -> None:
    words = "--lr 1,2 --phase te --out=x --lr_floor 0 --stop-after 5 --validate_every 3".split()
    kept = without(words, "lr", "out", "validate_every")
    assert kept == "--phase te --lr_floor 0 --stop-after 5".split()


def copied(swept: Swept, tmp_path: Path, *names: str) -> list[Path]:
    return [
        Path(shutil.copytree(swept.out / name, tmp_path / str(i))) for i, name in enumerate(names)
    ]


def told_of(folders: list[Path]) -> str:
    return rank(histories(folders))[1]


def test_the_answer_says_what_is_comparable(swept: Swept, tmp_path: Path) -> None:
    good, same, bad = copied(swept, tmp_path, "lr-0.001", "lr-0.001", "lr-1e-05")
    for runs in ([good, bad], [bad, good]):
        assert told_of(runs).startswith("use 0: lowest loss on 3 held-out images, ")
    tied = "all are statistically tied on 3 held-out images; 0 has the lowest loss"
    assert told_of([good, same]).startswith(tied)
    assert "; statistically tied: 1 (3 images are few" in told_of([good, same, bad])

    # The same images in another order are the same images.
    expected = told_of([good, bad])
    path = bad / "config.json"
    record = json.loads(path.read_text())
    keys = record["validation"]["held_out"]
    for losses in (bad / "validation").iterdir():
        found = load_file(losses)
        found["live/held_out"] = found["live/held_out"][::-1].copy()
        save_file(found, losses)
    record["validation"]["held_out"] = keys[::-1]
    path.write_text(json.dumps(record))
    assert told_of([good, bad]) == expected

    record["validation"]["held_out"] = ["other", *keys[1:]]
    path.write_text(json.dumps(record))
    assert "lowest loss on 2 held-out images" in told_of([good, bad])
    record["validation"]["held_out"] = ["a", "b", "c"]
    path.write_text(json.dumps(record))
    assert told_of([good, bad]).endswith("they held out different images")
    record["objective"]["kind"] = "v"
    path.write_text(json.dumps(record))
    assert "their objective differs, eps (0) and v (2)" in told_of([good, bad])

    for run in (good, bad):
        (run / "validation.jsonl").unlink()
    assert "training loss, which says little about other images, is lowest for 0: " in told_of(
        [good, bad]
    )


def test_runs_at_different_steps_are_said_to_be_so_unless_one_diverged(
    swept: Swept, tmp_path: Path
) -> None:
    good, early, failed = copied(swept, tmp_path, "lr-0.001", "lr-1e-05", "lr-1e+30")
    assert "different steps" not in told_of([good, early, failed])
    log = early / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert "different steps" in told_of([good, early, failed])


def test_runs_that_never_improved_are_not_recommended(swept: Swept, tmp_path: Path) -> None:
    runs = copied(swept, tmp_path, "lr-1e+30", "lr-1e+30")
    assert told_of(runs).startswith("use none: on 3 held-out images no run improved on the model")


def test_a_best_rate_at_either_end_gives_a_hint(swept: Swept, tmp_path: Path) -> None:
    runs = histories(copied(swept, tmp_path, "lr-0.001", "lr-1e-05"))
    standings = rank(runs)[0]
    assert [run.rate for run in standings] == [1e-3, 1e-5]
    for rate, hint in ((1e-3, "highest rate tried"), (1e-6, "lowest rate tried")):
        assert hint in rate_hint([replace(standings[0], rate=rate), standings[1]])
    between = [replace(standings[1], name="2", rate=1e-2), *standings]
    assert rate_hint(between) == ""
    (again,) = histories(copied(swept, tmp_path / "again", "lr-0.001"))
    tied = rank([runs[0], replace(again, name="again")])[0]
    assert tied[0].loss is not None
    assert rate_hint(tied) == ""
