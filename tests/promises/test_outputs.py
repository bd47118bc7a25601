"""No `xlsd-train` command replaces a file or folder that it has not written."""

import json
from pathlib import Path

import pytest

from tests.support import train

Out = pytest.CaptureFixture[str]


def refused(capsys: Out, *words: object) -> str:
    """The one sentence that a command is refused with."""
    capsys.readouterr()
    assert train(*words) == 1
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("xlsd-train:"))
    return line


def test_a_report_replaces_reports_alone(tmp_path: Path, capsys: Out) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    assert "is not overwritten" in refused(capsys, "report", tmp_path, "-o", mine)
    assert "does not end in .html" in refused(capsys, "report", tmp_path, "-o", tmp_path / "a.txt")
    (tmp_path / "report.html").write_text("<p>mine")  # where a run's page is by default
    assert "is not overwritten" in refused(capsys, "report", tmp_path)
    assert mine.read_text() == (tmp_path / "report.html").read_text() == "<p>mine"


def test_a_sweep_is_refused_before_its_first_run(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "report.html").write_text("<p>mine")
    words = ("sweep", "--lr", "1e-5,2e-5", "--phase", "unet", "--out", tmp_path, "--steps", 2)
    assert "report.html exists" in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("record", [{}, {"model_type": "clip"}, [1], "text", None, {"settings": 1}])
def test_another_programs_config_is_no_run(
    store: Path, model: Path, tmp_path: Path, capsys: Out, record: object
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(record))
    words = ("--phase", "unet", "--data", store, "--model", model, "--out", tmp_path, "--device",
             "cpu", "--steps", 1)  # fmt: skip
    assert f"--out {tmp_path} " in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.md", "m.samples.png"])
def test_a_single_file_and_what_lies_beside_it_are_new(
    model: Path, tmp_path: Path, capsys: Out, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    words = ("export", model, tmp_path / "m.safetensors", "--format", "single-file")
    assert "exists already" in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folders_are_new_or_empty(model: Path, tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "p.txt").write_text("a cat")
    for words in (
        ("export", model, tmp_path),
        ("swap", tmp_path, "--model", model),
        ("sample", model, "--prompts", tmp_path / "p.txt", "--out", tmp_path),
    ):
        assert "exists already" in refused(capsys, *words)
    words = ("sample", model, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "p.txt")
    assert "is a file, not a folder" in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
