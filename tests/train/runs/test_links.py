"""No link or path in a run folder leads reading, writing or deleting outside it."""

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import files, train
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import sweep
from xlsd_train.checkpoints.checkpoint import prune
from xlsd_train.model.text_encoder import copy_tokenizer
from xlsd_train.runs.layout import checkpoints, steps_in
from xlsd_train.runs.links import refuse_leading_out, refuse_links

Out = pytest.CaptureFixture[str]
KEY = b"PRIVATE-KEY hunter2"


@pytest.fixture(scope="module")
def words(model: Path, store: Path) -> list[object]:
    return [
        "--phase", "te", "--batch", 4, "--data", store, "--model", model, "--steps", 4, "--warmup",
        0, "--threads", 1, "--save-every", 1, "--sample-every", 2, "--sample-steps", 1,
        "--validate-every", 2, "--validation-fraction", 0.4, "--ema", "--lr", 1e-3, "--keep", 1,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def begun(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at step 2 of 4, with all that a run holds; not to be changed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("begun") / "run"
    assert train(*words, "--stop-after", 2, "--out", out) == 0
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


FOLDERS = ("checkpoints", "samples", "validation", "ema", "base", "tensorboard", "wandb")
WITHIN = (
    "checkpoints/step-00000002", "checkpoints/step-00000002/state.json", "samples/grid.png",
    "samples/step-00000002/00.png", "base/unet/config.json", "base/tokenizer/vocab.json",
    "validation/step-00000002.safetensors", "ema/step-00000002.safetensors",
)  # fmt: skip
FILES = ("config.json", "metrics.jsonl", "validation.jsonl", ".lock", "STOP", "SAVE", "SAMPLE",
         "report.html")  # fmt: skip


@pytest.mark.parametrize("name", [*FOLDERS, *FILES, *WITHIN])
def test_a_link_in_a_run_is_refused_by_every_command(
    run: Path, words: list[object], tmp_path: Path, capsys: Out, name: str
) -> None:
    """Dangling ones and those that lead somewhere; what they lead to is left as it is."""
    there, away = run / name, tmp_path / "away"
    for target in (there, None):
        if target is None or not there.exists():
            there.unlink(missing_ok=True)
            there.symlink_to(tmp_path / "nowhere")
        else:
            shutil.move(there, away)
            there.symlink_to(away)
        before = files(tmp_path, "away/**/*") if away.is_dir() else away.exists()
        for command in (
            (*words, "--out", run),
            ("report", run, "-o", tmp_path / "page.html"),
            ("export", run, tmp_path / "exported"),
            ("export", run / "checkpoints" / "step-00000002", tmp_path / "exported"),
            ("ema", run, tmp_path / "averaged"),
        ):
            capsys.readouterr()
            code, said = train(*command), capsys.readouterr().err
            assert code == 1
            # What is found nowhere is no run and no checkpoint.
            if not (name.startswith("checkpoints") and command[0] == "export"):
                assert f"{there} is a link to" in said
            assert len(said.splitlines()) == 1
        assert before == (files(tmp_path, "away/**/*") if away.is_dir() else away.exists())
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "away"}


def test_links_that_are_the_users_own_and_other_files_are_not_asked_after(
    run: Path, words: list[object], tmp_path: Path
) -> None:
    """The run's folder itself, notes in it, and the hard links that checkpoints are made of."""
    (tmp_path / "link").symlink_to(run)
    (run / "notes").symlink_to(tmp_path)
    frozen = [
        run / f"{folder}/unet.safetensors" for folder in ("base", "checkpoints/step-00000002")
    ]
    frozen[1].unlink()
    frozen[1].hardlink_to(frozen[0])
    assert train(*words, "--out", tmp_path / "link") == 0
    assert checkpoints(run)[-1].name == "step-00000004"
    assert frozen[0].stat().st_nlink > 1
    assert (run / "notes").is_symlink()


def test_what_is_no_file_is_not_waited_for(run: Path, words: list[object], capsys: Out) -> None:
    for name, told in (("metrics.jsonl", "neither a file nor"), ("samples/x", "neither a file")):
        there = run / name
        there.unlink(missing_ok=True)
        os.mkfifo(there)
        assert train(*words, "--out", run) == 1
        assert told in capsys.readouterr().err
        there.unlink()


@pytest.mark.parametrize(
    ("name", "folder"),
    [("STOP", True), ("metrics.jsonl", True), ("checkpoints/step-00000009", False),
     ("samples/step-00000009", False), ("validation/step-00000009.safetensors", True),
     ("samples", False), (".lock", True)],
)  # fmt: skip
def test_a_file_for_a_folder_and_the_reverse_is_said(
    run: Path, words: list[object], capsys: Out, name: str, folder: bool
) -> None:
    there = run / name
    if there.exists():
        there.unlink() if there.is_file() else shutil.rmtree(there)
    there.mkdir() if folder else there.touch()
    assert train(*words, "--out", run) == 1
    assert (
        f"{there} is a {'folder' if folder else 'file'}, and a run has a" in capsys.readouterr().err
    )


def test_names_that_no_run_gives_are_passed_over_and_kept(
    run: Path, words: list[object], tmp_path: Path
) -> None:
    odd = (
        "step-zzzzzzzz",
        "step-99999999999",
        "step-\uff10\uff10\uff10\uff10\uff10\uff10\uff10\uff12",
    )
    mine = [run / folder / name for folder in ("checkpoints", "samples") for name in odd]
    mine += [run / "checkpoints/.mine.tmp", run / "checkpoints/.step-mine.tmp", run / "work.tmp"]
    for path in mine:
        path.mkdir()
        (path / "thesis.txt").write_text("mine")
    (run / "samples/draft.tmp").touch()
    for name in ("ema", "validation"):
        (run / name / "step-zzzzzzzz.safetensors").touch()
    for path in (*mine, run / "samples/draft.tmp"):
        os.utime(path, (1, 1))
    assert train("report", run, "-o", tmp_path / "page.html") == 0
    assert train(*words, "--out", run) == 0
    assert all((path / "thesis.txt").exists() for path in mine)
    assert (run / "samples/draft.tmp").exists()
    assert list(steps_in(run / "samples")) == [0, 2, 4]


def test_a_folder_that_is_no_checkpoint_is_neither_taken_nor_pruned(
    run: Path, words: list[object], capsys: Out
) -> None:
    mine = run / "checkpoints/step-00000001"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    prune(run, 1)
    assert (mine / "thesis.txt").exists()
    assert train(*words, "--out", run) == 1
    assert f"{mine} is not a checkpoint: it has no state.json" in capsys.readouterr().err


def test_sweeping_knows_its_own_temporary_files(tmp_path: Path) -> None:
    ours = tmp_path / "x.json.0123abcd.elsewhere.77.tmp"
    theirs = [tmp_path / name for name in ("x.tmp", "x.0123abcd.tmp", "a.b.c.d.tmp")]
    folder = tmp_path / "y.0123abcd.elsewhere.77.tmp"
    folder.mkdir()
    for path in (ours, *theirs):
        path.touch()
    for path in (ours, folder, *theirs):
        os.utime(path, (1, 1))
    sweep(tmp_path)
    assert not ours.exists()
    assert all(path.exists() for path in (folder, *theirs))


def test_a_large_or_foreign_picture_is_left_out(
    run: Path, words: list[object], tmp_path: Path
) -> None:
    """Of pages and grids; samples of a run that goes on are drawn as ever."""
    os.truncate(run / "samples/step-00000002/00.png", 2**40)
    (run / "samples/step-00000000/00.png").write_bytes(KEY)
    assert train("report", run, "-o", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").stat().st_size < 2**25
    assert train(*words, "--out", run) == 0


def test_a_models_file_that_leads_out_of_it_is_not_handed_on(model: Path, tmp_path: Path) -> None:
    """The hub's cache is links, of a repository into itself."""
    (tmp_path / "key").write_bytes(KEY)
    tokenizer = Path(
        shutil.copytree(model / "tokenizer", tmp_path / "hub/models--a--b/snapshots/0/t")
    )
    blob = tmp_path / "hub/models--a--b/blobs/0"
    blob.parent.mkdir()
    shutil.move(tokenizer / "vocab.json", blob)
    (tokenizer / "vocab.json").symlink_to(blob)
    copy_tokenizer(tokenizer, tmp_path / "good", 77)
    (tokenizer / "added_tokens.json").unlink(missing_ok=True)
    (tokenizer / "added_tokens.json").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match="outside of its model"):
        copy_tokenizer(tokenizer, tmp_path / "bad", 77)
    assert not (tmp_path / "bad").exists()
    refuse_leading_out(tmp_path / "key")


BROKEN: list[tuple[str, Any, str]] = [
    ("stores", [{}], r"stores\[0\]\.path is missing"),
    ("stores", "x", "stores has the wrong type"),
    ("config", [], "config has the wrong type"),
    ("validation", {"held_out": [1]}, r"held_out\[0\]"),
    ("prompts", {"a": 1}, "prompts has the wrong type"),
    ("planned_steps", 10**30, "planned_steps has the wrong type"),
    ("adapted", {"batch": {"from": 1, "to": "x", "why": ""}}, r"adapted\.batch\.to"),
    ("command", ["a\0b"], r"command\[0\]"),
    ("plan", ["plain", 4, 5], "plan has the wrong type"),
]


@pytest.mark.parametrize(("name", "value", "told"), BROKEN)
def test_a_config_that_no_run_wrote_is_one_sentence(
    run: Path, words: list[object], tmp_path: Path, capsys: Out, name: str, value: Any, told: str
) -> None:
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**record, name: value}))
    for command in (
        (*words, "--out", run),
        ("report", run, "-o", tmp_path / "page.html"),
        ("export", run, tmp_path / "exported"),
    ):
        with pytest.raises(AssertionError, match=told):
            assert train(*command) == 0, capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "null", '{"step": "x"}', '{"step": -1e999}', ""]
)
def test_a_state_that_no_run_wrote_is_one_sentence(
    run: Path, words: list[object], tmp_path: Path, capsys: Out, content: str
) -> None:
    state = run / "checkpoints/step-00000002/state.json"
    state.write_text(content)
    for command in ((*words, "--out", run), ("export", run, tmp_path / "exported")):
        assert train(*command) == 1
        assert f"cannot read {state}: " in capsys.readouterr().err


def test_logs_of_any_content_are_read_within_bounds(
    run: Path, words: list[object], tmp_path: Path
) -> None:
    """What no run wrote is counted and left out, and gone when the run goes on."""
    good = (run / "metrics.jsonl").read_bytes()
    odd = [b"[" * 10**5, b'{"step": "x"}', b'{"step": 1e999}', b"null", b"\xff", b'{"step": -1}',
           b'{"step": 3' + b"0" * 30 + b"}", b"x" * (3 << 20)]  # fmt: skip
    for name in ("metrics.jsonl", "validation.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b"\n".join(odd) + b"\n" + b'{"step": 2, "loss": "x"}\n')
    assert train("report", run, "-o", tmp_path / "page.html") == 0
    assert "17 lines of its logs: no valid JSON" in (tmp_path / "page.html").read_text()
    assert train(*words, "--out", run) == 0
    assert (run / "metrics.jsonl").read_bytes().startswith(good)
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in lines if b'"x"' not in line] == [1, 2, -1, 3, 4]


def test_a_report_shows_nothing_of_a_link(begun: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    picture = run / "samples/step-00000002/00.png"
    picture.unlink()
    picture.symlink_to(tmp_path / "key")
    page = tmp_path / "page.html"
    assert train("report", run, "-o", page) == 1
    assert not page.exists()
    assert train("report", begun, "-o", page) == 0
    assert base64.b64encode(KEY) not in page.read_bytes()
    refuse_links(tmp_path / "none at all")
