import base64
import hashlib
import json
import math
import os
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch

import xlsd_train.report.page
import xlsd_train.report.pictures
from tests.support import printed, train
from tests.support.report_page import Page
from xlsd_train.cli import COMMANDS
from xlsd_train.config.recipes import parse
from xlsd_train.report.page import hero, write_page
from xlsd_train.report.pictures import timeline
from xlsd_train.report.ranking import rank
from xlsd_train.report.summary import next_of_several, summary
from xlsd_train.report.trend import trend
from xlsd_train.runs.history import histories
from xlsd_train.runs.layout import checkpoints, step_of
from xlsd_train.runs.validation_log import best_of, describe_best, read_losses

Out = pytest.CaptureFixture[str]
HOSTILE = "</script><script>alert(1)</script> & \"<img src=x onerror='alert(2)'>"


def logged(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def decoded(uri: str | None) -> bytes:
    return base64.b64decode(str(uri).removeprefix("data:image/webp;base64,"))


@pytest.fixture(scope="module")
def arguments(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A run that logs everything, with hostile prompts."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text(f"{HOSTILE}\na cat\n", encoding="utf-8")
    return [
        "--phase", "te", "--batch", 3, "--data", store, "--model", model, "--steps", 4,
        "--warmup", 0, "--threads", 1, "--save-every", 2, "--optimizer", "dlion", "--ema",
        "--validate-every", 2, "--validation-fraction", 0.4, "--sample-every", 2,
        "--sample-steps", 1, "--sample-prompts", prompts, "--keep", 0,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A finished run, and a stopped one of another rate with a hostile name. Read-only."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    made = [folder / "one", folder / "<b onload=alert(3)>two"]
    assert train(*arguments, "--out", made[0]) == 0
    assert train(*arguments, "--out", made[1], "--lr", 2.0, "--stop-after", 2) == 0
    return made


def test_a_run_leaves_its_report(runs: list[Path]) -> None:
    page = Page(runs[0] / "report.html")
    assert "Text encoder, trained for 4 steps on 5 images" in page.text
    assert [chart["id"] for chart in page.data["charts"]] == [
        "loss", "lr", "gap", "d", "grad_norm", "images_per_s", "peak_gib", "wait_s",
    ]  # fmt: skip
    assert len(page.sentences) == 8
    assert page.sentences[0].startswith("Chart: Loss. each step ")
    assert page.row("facts", "progress")[0].startswith("step 4 of 4: ")
    assert "standings" not in page.tables


def test_what_is_drawn_is_what_was_logged(runs: list[Path]) -> None:
    page, logs = Page(runs[0] / "report.html"), logged(runs[0])
    for chart, label, number in (
        ("loss", "each step", "loss"), ("lr", "lr", "lr"), ("lr", "effective", "lr_effective"),
        *((name, "", name) for name in ("d", "images_per_s", "wait_s", "peak_gib", "grad_norm")),
    ):  # fmt: skip
        (line,) = page.lines(chart, label)
        assert line["x"] == [it["step"] for it in logs]
        assert line["y"] == pytest.approx([it[number] for it in logs], rel=1e-4)
    measured = logged(runs[0], "validation.jsonl")
    assert {line["weights"] for line in measured} == {"live", "ema 0.05", "ema 0.10"}
    for weights, label in (("live", "held-out"), ("ema 0.05", "held-out, ema 0.05")):
        ours = [line for line in measured if line["weights"] == weights]
        line = page.lines("loss", label)[0]
        assert line["x"] == [it["step"] for it in ours] == [0, 2, 4][3 - len(ours) :]
        told = [it["held_out"] for it in ours]
        assert line["y"] == pytest.approx([it["mean"] for it in told], rel=1e-4)
        ends = [it["low"] for it in told] if weights == "live" else []
        assert line["low"] == pytest.approx(ends, rel=1e-4)
    (training,) = page.lines("loss", "training images")
    live = [line for line in measured if line["weights"] == "live"]
    assert training["y"] == pytest.approx([it["training"]["mean"] for it in live], rel=1e-4)
    (gap,) = page.lines("gap")
    assert gap["high"] == pytest.approx([it["gap"]["high"] for it in live], rel=1e-4)


def test_steps_have_images_epochs_and_hours(runs: list[Path]) -> None:
    logs, (axes,) = logged(runs[0]), Page(runs[0] / "report.html").data["axes"]
    assert axes["step"] == [0, 1, 2, 3, 4]
    assert axes["images_seen"][1:] == [line["images_seen"] for line in logs]
    assert axes["epoch"][1:] == pytest.approx([line["epoch"] for line in logs])
    images = np.diff([0, *(line["images_seen"] for line in logs)])
    took = images / [line["images_per_s"] for line in logs] / 3600
    assert axes["hours"][1:] == pytest.approx(np.cumsum(took), rel=1e-5)


def test_the_first_screen_has_the_verdict_and_a_command_that_works(runs: list[Path]) -> None:
    page, run = Page(runs[0] / "report.html"), histories(runs[:1])[0]
    found = trend(run)
    assert found is not None
    said = summary(run, found, going=False)
    assert said.state == "finished"
    assert (
        summary(histories(runs[1:])[0], None, going=False).state == "finished"
    )  # it ends at --stop-after
    for sentence in said.verdict:
        assert sentence.replace(" -", " \N{MINUS SIGN}") in page.text
    assert found.verdict in said.verdict
    assert said.command in page.commands
    check_command(said.command)


def check_command(command: str) -> str:
    """Parses it, which refuses what is wrong; the command's name."""
    program, *words = shlex.split(command)
    assert program == "xlsd-train"
    name = words[0] if words[0] in COMMANDS else "train"
    parse(COMMANDS[name].options, words[words[0] == name :], program)
    return name


@pytest.mark.parametrize(
    ("loss", "name", "then"),
    [
        (math.nan, "sweep", "Try lower learning rates"),
        (1.0, "train", "Train twice as long"),
    ],
)
def test_a_command_that_was_given_its_name_is_proposed_without(
    runs: list[Path], loss: float, name: str, then: str
) -> None:
    (run,) = histories(runs[:1])
    command = [run.record.command[0], "train", *run.record.command[1:], "--lr", "0.1"]
    record = replace(run.record, command=command, config={**run.config, "lr": 0.1})
    found = trend(run)
    assert found is not None
    run = replace(run, record=record, last={**run.last, "loss": loss})
    said = summary(run, replace(found, state="falling"), going=False)
    assert (check_command(said.command), said.then) == (name, then)


def test_runs_without_a_checkpoint_are_not_proposed_to_sample(
    runs: list[Path], tmp_path: Path
) -> None:
    failed = shutil.copytree(runs[0], tmp_path / "failed")
    shutil.rmtree(failed / "checkpoints")
    compared = histories([runs[0], failed])
    _, command = next_of_several(rank(compared)[0], compared, [False, False])
    assert (str(runs[0]) in command, str(failed) in command) == (True, False)


def test_first_and_newest_samples_stand_under_their_own_prompts(
    runs: list[Path], tmp_path: Path
) -> None:
    other = shutil.copytree(runs[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["prompts"] = ["a dog", config["prompts"][0]]
    (other / "config.json").write_text(json.dumps(config))
    compared = histories([runs[0], other])
    samples = timeline(compared, tmp_path / "page.html")
    (prompt, tiles), (alone, (first, newest)) = hero(compared, samples)
    assert prompt == HOSTILE  # both runs have it, at other places
    assert [label for label, _ in tiles] == ["one, step 0", "one, step 4", "other, step 4"]
    assert tiles[2][1] == samples.first_and_newest(1)[1][1][-1][1]
    assert (alone, first[0], newest[0]) == ("a dog", "other, step 0", "other, step 4")


@pytest.mark.parametrize("given", [["--on-event", "sh harm.sh x"], ["--on_event=sh harm.sh"]])
@pytest.mark.parametrize("planned", [9999, 4])
def test_no_command_to_copy_runs_a_program_of_the_runs(
    runs: list[Path], given: list[str], planned: int
) -> None:
    (run,) = histories(runs[:1])
    record = replace(run.record, command=[*run.record.command, *given], planned_steps=planned)
    found = trend(run)
    assert found is not None
    falling = replace(found, state="falling")
    said = summary(replace(run, record=record), falling, going=False)
    assert said.then in {
        "Resume, if it is not running (its --on-event is left out)",
        "Train twice as long (its --on-event is left out)",
    }
    assert said.command.startswith(shlex.join(["xlsd-train", *run.record.command[1:3]]))
    assert "harm" not in said.command
    assert "left out" not in summary(run, falling, going=False).then


def test_changes_by_noise_are_paired_and_on_one_scale(runs: list[Path]) -> None:
    found = trend(histories(runs[:1])[0])
    assert found is not None
    assert found.steps == found.banded == [0, 2, 4]
    assert tuple(found.change[0]) == (0, 0, 0)
    losses = [read_losses(runs[0], step)["live/held_out"] for step in (0, 4)]
    assert found.change[-1].mean == pytest.approx(losses[1].mean() / losses[0].mean() - 1, abs=1e-6)
    for band, changes in enumerate(found.bands):
        ratio = losses[1][:, band].mean() / losses[0][:, band].mean() - 1
        assert changes[-1].mean == pytest.approx(ratio, abs=1e-5)
        assert changes[-1].low <= ratio <= changes[-1].high
    page = Page(runs[0] / "report.html")
    assert len(page.tables["changes"]) == 11
    first = f"{100 * found.bands[0][-1].mean:+.1f}%".replace("-", "\N{MINUS SIGN}")
    assert page.row("changes", "least noise")[0].startswith(first)


def test_settings_that_differ_come_first_then_facts(runs: list[Path], tmp_path: Path) -> None:
    assert train("report", *runs, "-o", tmp_path / "both.html") == 0
    page = Page(tmp_path / "both.html")
    assert page.tables["different"][1:] == [["lr", "1.0", "2.0"], ["stop_after", "", "2"]]
    assert page.tables["settings"][1:3] == page.tables["different"][1:]
    assert page.tables["settings"][0][1:] == ["one", runs[1].name]
    assert list(page.tables)[:2] == ["standings", "different"]
    record = json.loads((runs[0] / "config.json").read_text())
    listed = {row[0] for table in ("settings", "others") for row in page.tables[table]}
    assert record["config"].keys() <= listed
    assert page.row("settings", "ema") == ["True", "True"]
    assert page.row("others", "clip_skip") == ["0", "0"]
    assert page.row("facts", "precision")[0] == record["precision"]
    (store,) = {*page.row("facts", "store")}
    assert record["stores"][0]["fingerprint"][:16] in store
    assert "torch " in page.row("facts", "versions")[0]
    assert page.row("facts", "command line")[1].startswith("xlsd-train --phase te --batch 3 ")
    best = best_of(runs[0], (0, *map(step_of, checkpoints(runs[0]))))
    assert best is not None
    assert page.row("facts", "verdict")[0] == describe_best(best)


def test_samples_are_thumbnails_by_run_step_and_prompt(runs: list[Path], tmp_path: Path) -> None:
    assert train("report", *runs, "--out", tmp_path / "new" / "both.html") == 0
    page = Page(tmp_path / "new" / "both.html")
    assert list(page.sheets) == ["0 0", "1 0", "0 2", "1 2", "0 4"]
    assert page.data["samples"]["prompts"] == [[HOSTILE, "a cat"]] * 2
    for name, pictures in page.sheets.items():
        run, step = map(int, name.split())
        for i, picture in enumerate(pictures):
            path = runs[run] / f"samples/step-{step:08d}/{i:02d}.webp"
            assert decoded(picture) == path.read_bytes()
    folder = page.data["samples"]["folders"][1]
    assert (tmp_path / "new" / unquote(folder)).resolve() == (runs[1] / "samples").resolve()
    shown = [image["alt"] for image in page.images]
    second = f"{runs[1].name}, step 2"
    assert shown[:3] == [f"{x}: {HOSTILE}" for x in ("one, step 0", "one, step 4", second)]


def test_the_page_needs_nothing_else_and_runs_nothing_of_the_users(
    runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "both.html"
    assert train("report", *runs, "-o", out) == 0
    page, html = Page(out), out.read_text(encoding="utf-8")
    assert (len(page.scripts), page.links) == (1, 0)
    assert all(str(image.get("src", "data:")).startswith("data:") for image in page.images)
    assert all("onerror" not in image for image in page.images)
    assert "default-src 'none'" in html
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    told = html.replace(page.scripts[0], "")
    for harm in ("<script>alert", "<b onload", "<img src=x"):
        assert harm not in told
    assert HOSTILE in page.text  # and yet it is told in full


def test_a_page_is_small_beyond_its_samples(runs: list[Path]) -> None:
    page = runs[0] / "report.html"
    pictures = sum(len(it or "") for sheet in Page(page).sheets.values() for it in sheet)
    assert page.stat().st_size - pictures < 500_000


def test_pages_of_the_same_runs_are_the_same(runs: list[Path], tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        assert train("report", runs[0], "--out", tmp_path / name) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_damaged_lines_are_skipped_and_counted(runs: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    log = run / "metrics.jsonl"
    log.write_bytes(b"\0\0\n" + log.read_bytes() + b'{"step": 5, "loss": 0.')
    assert train("report", run) == 0
    page = Page(run / "report.html")
    (raw,) = page.lines("loss", "each step")
    assert raw["x"] == [1, 2, 3, 4]
    assert "Left out: 1 line of its logs: no valid JSON." in page.text


@pytest.mark.parametrize("damage", [b"", b"junk" * 40, None])
def test_damaged_losses_and_pictures_are_left_out_and_said_to_be(
    runs: list[Path], tmp_path: Path, damage: bytes | None, capsys: Out
) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    losses, picture = (
        run / name
        for name in ("validation/step-00000004.safetensors", "samples/step-00000004/00.png")
    )
    picture.with_suffix(".webp").unlink()
    for path in (losses, picture):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert train("report", run) == 0
    page = Page(run / "report.html")
    told = "validation losses that cannot be read: validation/step-00000004.safetensors"
    assert f"Left out: {told}." in page.text
    assert f"warning: run: left out of the report: {told}" in capsys.readouterr().err
    assert "Left out: damaged pictures, 1." in page.text
    assert page.sheets["0 4"][0] is None
    assert len(page.data["charts"]) == 8
    found = trend(histories([run])[0])
    assert found is not None
    assert found.steps == [0, 2]
    assert train("report", run, runs[0], "-o", tmp_path / "both.html") == 0
    assert f"Left out: run: {told}." in Page(tmp_path / "both.html").text


def test_of_a_run_that_goes_on_its_newest_checkpoint_is_proposed(
    runs: list[Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**record, "planned_steps": 9}))

    def proposed(quiet_s: float, ended: bool = False) -> tuple[str, str]:
        (run / "metrics.jsonl").touch()
        at = time.time() - quiet_s
        os.utime(run / "metrics.jsonl", (at, at))
        (command,) = Page(write_page(histories([run]), run / "report.html", ended)).commands
        return check_command(command), command

    assert proposed(5)[0] == proposed(-5)[0] == "sample"
    assert proposed(5, ended=True)[0] == proposed(5000)[0] == proposed(-5000)[0] == "train"
    shutil.rmtree(run / "checkpoints")
    assert proposed(5)[0] == "train"
    assert "If you stop it with Ctrl-C, which saves, resume" in Page(run / "report.html").text


def test_a_first_step_that_is_not_finite_is_not_the_rates_fault(
    runs: list[Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    shutil.rmtree(run / "validation")
    (run / "validation.jsonl").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "grad_norm": 1.0}\n')
    assert train("report", run) == 0
    page = Page(run / "report.html")
    assert "It diverged: at step 1 the loss is not finite." in page.text
    (command,) = page.commands
    assert shlex.split(command)[:2] == ["xlsd-cache", "check"]


def test_a_run_that_has_just_started_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    """Without validation, samples, checkpoints or any step, and with an empty log or none."""
    (tmp_path / "run").mkdir()
    shutil.copy(runs[0] / "config.json", tmp_path / "run")
    for _ in range(2):
        assert train("report", tmp_path / "run") == 0
        page = Page(tmp_path / "run/report.html")
        assert (page.data["charts"], page.sheets, page.images) == ([], {}, [])
        assert page.row("facts", "progress") == ["step 0 of 4"]
        assert "not a step trained yet" in page.text
        (tmp_path / "run/metrics.jsonl").touch()
    assert train("report", runs[0], tmp_path / "run", "-o", tmp_path / "both.html") == 0
    both = Page(tmp_path / "both.html")
    assert [row[5] for row in both.tables["standings"][1:]] == ["best", "not validated"]
    assert len(both.data["charts"]) == 8


def test_a_long_log_is_downsampled_and_the_page_says_so(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minimum and maximum survive; validations and samples are evenly spaced."""
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    (line, *_), (measured, *_) = logged(run), logged(run, "validation.jsonl")
    losses = [1 + (i * 7919 % 5000) / 5000 for i in range(5000)]
    told = [json.dumps({**line, "step": i + 1, "loss": x}) for i, x in enumerate(losses)]
    (run / "metrics.jsonl").write_text("\n".join(told) + "\n")
    marked = [{**measured, "step": 10 * i} for i in range(500)]
    marked[333] = {**marked[333], "held_out": {**measured["held_out"], "mean": 0.0}}
    text = "".join(json.dumps(x) + "\n" for x in marked)
    (run / "validation.jsonl").write_text(text)
    for step in range(6, 60, 2):
        shutil.copytree(run / "samples/step-00000004", run / f"samples/step-{step:08d}")
    assert train("report", run) == 0
    page = Page(run / "report.html")
    (raw,) = page.lines("loss", "each step")
    assert 1000 <= len(raw["x"]) <= 2000
    assert (min(raw["low"]), max(raw["high"])) == pytest.approx((min(losses), max(losses)), 1e-4)
    assert "Each point is the mean of up to 4 steps" in page.text
    (rate,) = page.lines("images_per_s")
    assert len(rate["x"]) <= 500
    (gap,) = page.lines("gap")
    assert len(gap["x"]) <= 201
    assert {0, 3330, 4990} <= set(gap["x"])
    assert "200 of 500 validations, evenly spaced, and the best" in page.text
    assert page.data["samples"]["steps"] == list(range(0, 60, 2))
    monkeypatch.setattr(xlsd_train.report.pictures, "NBYTES", 1)
    monkeypatch.setattr(xlsd_train.report.pictures, "PROMPTS", 1)
    assert train("report", run) == 0
    page = Page(run / "report.html")
    assert page.data["samples"]["steps"] == [0, 58]
    assert "2 of 30 steps, evenly spaced." in page.text
    assert "The first 1 of 2 prompts." in page.text


def test_folders_without_a_run_are_refused(runs: list[Path], tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    for words, told in (
        ((tmp_path,), f"{tmp_path} is not a run: it has no config.json"),
        ((runs[0], tmp_path / "nowhere"), "is not a run"),
        ((tmp_path / "broken",), "cannot read"),
        ((runs[0], f"{runs[0]}/../{runs[0].name}"), "is given more than once"),
        ((), "no run is given"),
        ((runs[0], "-o", tmp_path / "page.txt"), "does not end in .html"),
    ):
        assert train("report", *words) == 1
        assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_runs_of_the_same_name_get_different_titles(runs: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(runs[0], tmp_path / x / "one") for x in ("a", "b")]
    assert [run.name for run in histories(copies)] == ["a/one", "b/one"]


def test_a_report_of_several_runs_is_written_to_the_working_directory(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("report", *runs) == 0
    assert printed(capsys) == "report report.html\n"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_failing_report_does_not_fail_the_run(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    run = tmp_path / "run"
    given = (*arguments, "--stop-after", 1, "--sample-every", 0, "--out", run)
    assert train(*given, "--dry-run") == 0
    assert not run.exists()
    monkeypatch.setattr(xlsd_train.report.page, "NAME", "no such folder\0/report.html")
    assert train(*given) == 0
    said = printed(capsys)
    assert f"all else is saved. `xlsd-train report {run}` writes it" in said
    assert len(checkpoints(run)) == 1


def test_damaged_losses_end_no_run(
    runs: list[Path], arguments: list[object], tmp_path: Path, capsys: Out
) -> None:
    run = Path(shutil.copytree(runs[1], tmp_path / "run"))
    (run / "validation/step-00000002.safetensors").write_bytes(b"junk")
    assert train(*arguments, "--lr", 2.0, "--out", run) == 0
    said = capsys.readouterr().err
    assert "left out of the report: validation losses that cannot be read" in said
    assert "best on held-out images: step 4" in said
