import base64
import json
import shutil
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

import xlsd_train.report.charts
import xlsd_train.report.page
from tests.support import printed, train
from tests.support.report_page import Page
from xlsd_train.runs.history import histories
from xlsd_train.runs.layout import checkpoints, step_of
from xlsd_train.runs.validation_log import best_of, describe_best

Out = pytest.CaptureFixture[str]
HOSTILE = "</script><script>alert(1)</script> & \"<img src=x onerror='alert(2)'>"


def logged(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


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
    assert page.text.split()[0] == "one"
    assert page.charts == len(page.figures) == 10
    assert page.row("facts", "progress")[0].startswith("step 4 of 4: ")
    assert "standings" not in page.tables


def test_what_is_drawn_is_what_was_logged(runs: list[Path]) -> None:
    page, lines = Page(runs[0] / "report.html"), logged(runs[0])
    for name, number in (("one raw", "loss"), ("one smoothed", "loss_smoothed"), ("one lr", "lr"),
                         ("one effective", "lr_effective")):  # fmt: skip
        (trace,) = page.traces(name)
        assert trace["x"] == [line["step"] for line in lines]
        assert trace["y"] == [line[number] for line in lines]
    drawn = [x["y"] for x in page.traces("one")]
    for number in ("d", "images_per_s", "wait_s", "peak_gib", "grad_norm"):
        assert [line[number] for line in lines] in drawn
    measured = logged(runs[0], "validation.jsonl")
    assert {line["weights"] for line in measured} == {"live", "ema 0.05", "ema 0.10"}
    for weights, of in (("live", ""), ("ema 0.05", " ema 0.05"), ("ema 0.10", " ema 0.10")):
        ours = [line for line in measured if line["weights"] == weights]
        for part, name in (("held_out", "held-out"), ("training", "training"), ("gap", "gap")):
            told = [[line[part]] for line in ours]
            if part != "gap":
                told = [[line[part], *line[part]["bands"]] for line in ours]
            traces = page.traces(f"one {name}{of}")
            assert len(traces) == len(told[0])
            for i, trace in enumerate(traces):
                assert trace["x"] == [line["step"] for line in ours] == [0, 2, 4][3 - len(ours) :]
                assert trace["y"] == [line[i]["mean"] for line in told]
                assert trace["customdata"] == [[x[i]["low"], x[i]["high"]] for x in told]


def test_plotly_takes_every_figure(runs: list[Path]) -> None:
    """Plotly's validation in Python refuses names and values that its JavaScript ignores."""
    for figure in Page(runs[0] / "report.html").figures:
        go.Figure(figure)


def test_settings_that_differ_come_first_then_facts(runs: list[Path], tmp_path: Path) -> None:
    assert train("report", *runs, "-o", tmp_path / "both.html") == 0
    page = Page(tmp_path / "both.html")
    assert page.tables["settings"][1:3] == [["lr", "1.0", "2.0"], ["stop_after", "", "2"]]
    assert page.tables["settings"][0][1:] == ["one", runs[1].name]
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


def test_samples_are_side_by_side_byte_for_byte(runs: list[Path], tmp_path: Path) -> None:
    assert train("report", *runs, "--out", tmp_path / "new" / "both.html") == 0
    page = Page(tmp_path / "new" / "both.html")
    head, *rows = page.tables["samples"]
    two = runs[1].name
    assert head == ["step", f"one{HOSTILE}", f"{two}{HOSTILE}", "onea cat", f"{two}a cat"]
    assert [row[0] for row in rows] == ["0", "2", "4"]
    shown = [
        base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
        for image in page.images
    ]
    expected = [
        (run / f"samples/step-{step:08d}/{i:02d}.png").read_bytes()
        for step in (0, 2, 4)
        for i in (0, 1)
        for run in runs
        if (run / f"samples/step-{step:08d}").exists()
    ]
    assert shown == expected


def test_the_page_needs_nothing_else_and_runs_nothing_of_the_users(
    runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "both.html"
    assert train("report", *runs, "-o", out) == 0
    page, html = Page(out), out.read_text(encoding="utf-8")
    assert (len(page.scripts), page.links) == (2, 0)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert all("onerror" not in image for image in page.images)
    assert "default-src 'none'" in html
    told = html.replace(page.scripts[0], "")
    for harm in ("<script>alert", "<b onload", "<img src=x"):
        assert harm not in told
    assert HOSTILE in page.text  # and yet it is told in full
    names = {x["name"] for figure in page.figures for x in figure["data"]}
    assert not any("<" in name for name in names)  # plotly's text is HTML too


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
    (trace,) = page.traces("run raw")
    assert trace["x"] == [1, 2, 3, 4]
    assert page.row("facts", "logs") == ["1 lines skipped: no valid JSON"]


def test_a_run_that_has_just_started_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    """Without validation, samples, checkpoints or any step, and with an empty log or none."""
    (tmp_path / "run").mkdir()
    shutil.copy(runs[0] / "config.json", tmp_path / "run")
    for _ in range(2):
        assert train("report", tmp_path / "run") == 0
        page = Page(tmp_path / "run/report.html")
        assert (page.charts, page.figures, page.images) == (0, [], [])
        assert page.row("facts", "progress") == ["step 0 of 4"]
        (tmp_path / "run/metrics.jsonl").touch()
    assert train("report", runs[0], tmp_path / "run", "-o", tmp_path / "both.html") == 0
    both = Page(tmp_path / "both.html")
    assert [row[-1] for row in both.tables["standings"][1:]] == ["best", "not validated"]
    assert both.charts == 10


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
    (raw,), (shade,) = page.traces("run raw"), [
        x for x in page.figures[0]["data"] if "fill" in x
    ]  # fmt: skip
    assert 1000 <= len(raw["x"]) <= 2000
    assert (min(shade["y"]), max(shade["y"])) == (min(losses), max(losses))
    assert "a point is the mean of up to 4 steps" in page.text
    (gap,) = page.traces("run gap")
    assert len(gap["x"]) <= 201
    assert {0, 3330, 4990} <= set(gap["x"])
    assert "at most 200 of 500 validations, evenly spaced, and the best" in page.text
    assert "10 of 30 steps, evenly spaced" in page.text
    steps = [row[0] for row in page.tables["samples"][1:]]
    assert (len(steps), steps[0], steps[-1]) == (10, "0", "58")
    monkeypatch.setattr(xlsd_train.report.page, "PICTURES", 1)
    monkeypatch.setattr(xlsd_train.report.page, "PROMPTS", 1)
    assert train("report", run) == 0
    page = Page(run / "report.html")
    assert [row[0] for row in page.tables["samples"][1:]] == ["0", "58"]
    assert "the first 1 of 2 prompts" in page.text


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
