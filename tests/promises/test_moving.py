"""Latents are kept when sources move, are renamed, are mixed or become unavailable."""

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import cache, files, printed, spawn, sums, wait_for, write_images
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.images.header import read_header
from xlsd_cache.planning import probe as headers
from xlsd_cache.store.reader import LatentStore

Out = pytest.CaptureFixture[str]
SIZE = {"width": 64, "height": 64}


@pytest.fixture
def rest(tmp_path: Path, vae: Path) -> tuple[object, ...]:
    return ("--out", tmp_path / "latents", "--vae", vae, "--resolution", 64, "--batch", 4)


def raw(store: Path) -> dict[str, bytes]:
    """Latents by the images' caption, which no move changes."""
    with LatentStore.open(store) as opened:
        rows = opened.samples.to_pylist()
        return {row["txt"]: opened.read(row["bucket"], [row["row"]]).tobytes() for row in rows}


def test_the_same_images_from_every_kind_of_source_have_the_same_latents(
    tmp_path: Path, rest: tuple[object, ...], encoded: list[int], capsys: Out
) -> None:
    """First a folder, then a tar, a zip, a list and a parquet file: no image is re-encoded."""
    names = [f"{i}.png" for i in range(6)]
    folder = tmp_path / "images"
    write_images(folder, names, **SIZE)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    lines = [
        json.dumps({"image": f"images/{name}", "text": f"picture {name[0]}"}) for name in names
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    table = {"image": [(folder / name).read_bytes() for name in names], "text": [*"012345"]}
    pq.write_table(pa.table(table), tmp_path / "all.parquet", row_group_size=2)

    assert cache("build", folder, *rest) == 0
    first = raw(tmp_path / "latents")
    assert sum(encoded) == 6
    for source, column in (
        ("all.tar", "txt"), ("all.zip", "txt"), ("all.jsonl", "jsonl:text"),
        ("all.parquet", "parquet:text"), ("images", "txt"),
    ):  # fmt: skip
        assert cache("build", tmp_path / source, *rest, "--captions", column) == 0
        assert cache("check", tmp_path / "latents", "--decode", 6) == 0
        assert "gone or changed" not in printed(capsys)
        fresh = tmp_path / f"fresh-{source}"
        assert cache("build", tmp_path / source, *rest, "--captions", column, "--out", fresh) == 0
    assert sum(encoded) == 6 + 5 * 6  # only the fresh ones
    assert raw(tmp_path / "latents") == first
    assert raw(tmp_path / "fresh-all.tar") == raw(tmp_path / "fresh-all.zip") == first


@pytest.mark.parametrize("how", ["moved", "renamed"])
def test_moving_or_renaming_the_source_folder_encodes_nothing(
    tmp_path: Path, rest: tuple[object, ...], encoded: list[int], capsys: Out, how: str
) -> None:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(6)], **SIZE)
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "copy.png")
    assert cache("build", tmp_path / "images", *rest) == 0
    before = raw(tmp_path / "latents")
    shards = files(tmp_path / "latents", "latents.zarr/**/*")
    encoded.clear()
    there = tmp_path / "there" / "images" if how == "moved" else tmp_path / "pictures"
    there.parent.mkdir(exist_ok=True)
    (tmp_path / "images").rename(there)
    assert cache("build", there, *rest) == 0
    assert encoded == []
    assert raw(tmp_path / "latents") == before
    assert files(tmp_path / "latents", "latents.zarr/**/*") == shards
    told = sums(tmp_path / "latents", capsys)
    assert (told["scanned"], told["reused"], told["duplicate"]) == (7, 6, 1)
    assert cache("check", tmp_path / "latents", "--decode", 6) == 0


def test_a_deleted_source_folder_leaves_training_possible(
    tmp_path: Path, rest: tuple[object, ...], capsys: Out
) -> None:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(6)], **SIZE)
    assert cache("build", tmp_path / "images", *rest) == 0
    before = raw(tmp_path / "latents")
    state = files(tmp_path / "latents", "**/*")
    shutil.rmtree(tmp_path / "images")
    assert cache("build", tmp_path / "images", *rest) == 1
    assert "no such file or directory" in capsys.readouterr().err
    (tmp_path / "images").mkdir()  # a mount point with nothing mounted
    assert cache("build", tmp_path / "images", *rest) == 1
    assert "no images in" in capsys.readouterr().err
    assert files(tmp_path / "latents", "**/*") == state
    assert raw(tmp_path / "latents") == before


def test_a_source_of_before_that_is_not_named_is_refused_unless_forgotten(
    tmp_path: Path, rest: tuple[object, ...], encoded: list[int], capsys: Out
) -> None:
    write_images(tmp_path / "one", [f"{i}.png" for i in range(4)], **SIZE)
    write_images(tmp_path / "two", [f"{i}.png" for i in range(4, 7)], first_seed=4, **SIZE)
    assert cache("build", tmp_path / "one", tmp_path / "two", *rest) == 0
    state = files(tmp_path / "latents", "[!s]*/**/*")
    capsys.readouterr()
    assert cache("build", tmp_path / "one", *rest) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the store has 3 images of the source 'two', which is not among" in said
    assert "--forget two" in said
    assert files(tmp_path / "latents", "[!s]*/**/*") == state
    assert cache("build", tmp_path / "one", *rest, "--forget", "two") == 0
    assert sums(tmp_path / "latents", capsys)["live"] == 4
    encoded.clear()
    assert cache("build", tmp_path / "one", tmp_path / "two", *rest) == 0
    assert encoded == []
    assert sums(tmp_path / "latents", capsys)["live"] == 7


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_source_unplugged_while_building_loses_nothing(
    tmp_path: Path,
    rest: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Out,
    kind: str,
) -> None:
    rest = (*rest, "--batch", 1)  # so that no latent depends on which others were there
    source, away = tmp_path / "images", tmp_path / "away"
    write_images(source, [f"{i:02d}.png" for i in range(30)], **SIZE)
    whole = tmp_path / "whole"
    assert cache("build", source, *rest, "--out", whole) == 0
    if kind == "tar":
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            for path in sorted(source.iterdir()):
                tar.add(path, path.name)
        source = tmp_path / "images.tar"
    encode = Encoder.encode

    def unplug(self: Encoder, pixels: Any) -> Any:
        if source.exists():
            source.rename(away)
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode", unplug)
    assert cache("build", source, *rest, "--workers", 1) == 0
    assert "were deleted before they were encoded; restore them" in capsys.readouterr().err
    told = sums(tmp_path / "latents", capsys)
    assert 0 < told["live"] < 30
    assert told["rejected"] == {"vanished": 30 - told["live"]}
    monkeypatch.undo()
    assert cache("build", source, *rest) == 1  # still unplugged
    assert sums(tmp_path / "latents", capsys)["live"] == told["live"]
    away.rename(source)
    assert cache("build", source, *rest) == 0
    after = sums(tmp_path / "latents", capsys)
    assert (after["live"], after["encoded"]) == (30, 30 - told["live"])
    assert raw(tmp_path / "latents") == raw(whole)


def slow_planning(*args: object) -> int:
    """`build` with a moment before each header, so that a kill meets it planning."""
    import time

    read = read_header

    def slowly(file: Any, nbytes: int, *more: int) -> Any:
        time.sleep(0.01)
        return read(file, nbytes, *more)

    headers.read_header = slowly  # type: ignore[attr-defined, assignment]
    return cache("build", *args)


def test_a_killed_planning_begins_where_it_was(
    tmp_path: Path, rest: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", [f"{i:03d}.png" for i in range(400)], **SIZE)
    out, journal = tmp_path / "latents", tmp_path / "latents" / "staging" / "headers.planning"
    process = spawn(slow_planning, tmp_path / "images", *rest, "--workers", 2, log=tmp_path / "log")
    wait_for(lambda: journal.exists() and journal.stat().st_size > 0)
    process.kill()
    process.join()
    done = len(journal.read_text().splitlines())
    assert 0 < done < 400
    assert not list((out / "manifest" / "plan").iterdir())
    opened: list[io.IOBase] = []
    read = read_header

    def counting(file: Any, nbytes: int, *more: int) -> Any:
        opened.append(file)
        return read(file, nbytes, *more)

    monkeypatch.setattr(headers, "read_header", counting)
    assert cache("build", tmp_path / "images", *rest, "--batch", 64) == 0
    assert len(opened) == 400 - done
    assert {path.name for path in (out / "staging").iterdir()} == {"plan.lock"}


def test_lists_choose_what_is_built(tmp_path: Path, rest: tuple[object, ...], capsys: Out) -> None:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(6)], **SIZE)
    (tmp_path / "list.txt").write_text("1.png\n2.png\n")
    assert cache("build", tmp_path / "images", *rest, "--only", tmp_path / "list.txt") == 0
    assert sums(tmp_path / "latents", capsys)["live"] == 2
    assert cache("build", tmp_path / "images", *rest, "--exclude", tmp_path / "list.txt") == 0
    assert sums(tmp_path / "latents", capsys)["live"] == 4
