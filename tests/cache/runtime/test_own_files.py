"""No command replaces files it has not written, and none takes its own output as input images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

from tests.support import cache, sums, write_images
from xlsd_cache.runtime.own_files import is_marked, is_page, marking

Out = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("command", "name", "told"),
    [
        ("export-index", "photo.jpg", "must end in .parquet"),
        ("export-index", "table.csv", "must end in .parquet"),
        ("export-index", "none", "must end in .parquet"),
        ("export-index", "theirs.parquet", "was not written by this command"),
        ("export-index", "renamed.parquet", "was not written by this command"),
        ("preview", "photo.jpg", "was not written by this command"),
        ("preview", "photo.PNG", "was not written by this command"),
        ("preview", "photo.webp", "was not written by this command"),
        ("preview", "text.png", "was not written by this command"),
        ("preview", "link.png", "was not written by this command"),
        ("preview", "folder.png", "is a folder"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    store: Path, tmp_path: Path, capsys: Out, command: str, name: str, told: str
) -> None:
    for kind in ("jpg", "PNG", "webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"photo.{kind}")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "theirs.parquet")
    for text in ("table.csv", "none", "text.png", "renamed.parquet"):
        (tmp_path / text).write_text("theirs")
    (tmp_path / "link.png").symlink_to("photo.PNG")
    (tmp_path / "folder.png").mkdir()
    there = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert cache(command, store, tmp_path / name) == 1
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("xlsd-cache:"))
    assert told in line
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == there


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_what_a_command_wrote_it_writes_again(store: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"sheet.{suffix}"
    for seed in (1, 2):
        assert cache("preview", store, out, "--count", 1, "--thumbnail", 64, "--seed", seed) == 0
    with out.open("rb") as file:
        assert is_marked(file)
    for _ in range(2):
        assert cache("export-index", store, tmp_path / "index.parquet") == 0


def test_a_mark_is_more_than_a_word(tmp_path: Path) -> None:
    """A photo that mentions the name is a photo."""
    photos: dict[str, dict[str, Any]] = {
        "a.jpg": {"comment": b"xlsd xlsd"},
        "b.png": {},
        "c.webp": {},
    }
    for name, options in photos.items():
        Image.new("RGB", (8, 8)).save(tmp_path / name, **options)
    (tmp_path / "d.png").write_bytes((tmp_path / "b.png").read_bytes() + b"xlsd")
    for path in tmp_path.iterdir():
        with path.open("rb") as file:
            assert not is_marked(file)


def test_what_commands_wrote_among_the_images_is_not_trained(
    vae: Path, tmp_path: Path, capsys: Out
) -> None:
    """Sheets, grids, a store, a run, an index: passed over or rejected, and counted."""
    images = tmp_path / "images"
    write_images(images, ["a.png", "b.png"], width=64, height=64)
    out = images / "latents"
    rest = (images, "--out", out, "--vae", vae, "--resolution", 64, "--captions", "none")
    assert cache("build", *rest) == 0
    for name in ("sheet.png", "sheet.jpg", "sub/sheet.webp"):
        (images / "sub").mkdir(exist_ok=True)
        assert cache("preview", out, images / name, "--count", 1, "--thumbnail", 64) == 0
    Image.new("RGB", (64, 64)).save(images / "sub/grid.png", **marking("grid"))
    assert cache("export-index", out, images / "index.parquet") == 0
    for folder in ("run/samples", "run/checkpoints"):
        write_images(images / folder, ["step.png"], 7, width=64, height=64)
    (images / "run/config.json").write_text(json.dumps({"settings": {}, "planned_steps": 1}))
    write_images(images / "run", ["mine.png"], 8, width=64, height=64)  # which a user put there
    assert cache("build", *rest, "--captions", "parquet:txt,none-such") == 1  # a table of ours only
    capsys.readouterr()
    assert cache("build", *rest) == 0
    printed = "".join(capsys.readouterr())
    assert "tables of export-index" in printed
    assert "parts of stores and runs" in printed
    told = sums(out, capsys)
    assert (told["live"], told["rejected"]) == (3, {"made_here": 4})


def test_folders_that_look_like_ours_are_the_users(vae: Path, tmp_path: Path, capsys: Out) -> None:
    """A zarr of theirs, another trainer's run, a store into which they put images."""
    write_images(tmp_path / "im/zarr/captions", ["a.png"], 1, width=64, height=64)
    zarr.create_group(tmp_path / "im/zarr/latents.zarr")
    write_images(tmp_path / "im/run/samples", ["b.png"], 2, width=64, height=64)
    (tmp_path / "im/run/config.json").write_text('{"model_type": "clip"}')
    rest = ("--vae", vae, "--resolution", 64, "--captions", "none")
    assert cache("build", tmp_path / "im", "--out", tmp_path / "im/l", *rest) == 0
    write_images(tmp_path / "im/l", ["c.png"], 3, width=64, height=64)
    assert cache("build", tmp_path / "im", "--out", tmp_path / "im/l", *rest) == 0
    assert sums(tmp_path / "im/l", capsys)["live"] == 3


def test_pages_of_every_version_are_known(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    head = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    page.write_text(head + '<meta name="generator" content="xlsd-train report">')
    assert is_page(page)
    page.write_text(
        head + """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; """
        """img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">"""
    )
    assert is_page(page)
    page.write_text(head + "<title>mine</title>")
    assert not is_page(page)


def test_a_stray_never_replaces_another(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "latents")
    for text in ("first", "second"):
        (copy / "latents.zarr/note.txt").write_text(text)
        assert cache("check", copy, "--repair") == 0
    kept = {path.read_text() for path in (copy / "stray").rglob("note*")}
    assert kept == {"first", "second"}


def test_captions_of_someone_are_no_store(vae: Path, tmp_path: Path, capsys: Out) -> None:
    """A folder whose sub folders have the names of a store's, killed early, but hold files."""
    write_images(tmp_path / "im", ["a.png"], width=64, height=64)
    for name in ("captions", "staging", "manifest"):
        (tmp_path / name / "mine").mkdir(parents=True)
        (tmp_path / name / "mine/a.txt").write_text("mine")
        out = tmp_path / f"out-{name}"
        out.mkdir()
        (tmp_path / name).rename(out / name)
        assert cache("build", tmp_path / "im", "--out", out, "--vae", vae) == 1
        assert "and no latent store" in capsys.readouterr().err
    assert np.all([len(list(tmp_path.glob("out-*/*"))) == 3])
