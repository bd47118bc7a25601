import json
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support import cache, files, printed, train
from tests.support.vaes import tiny
from xlsd_cache.integrity.shard_check import LISTED, Problem
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.store.reader import LatentStore

SHARD = "latents.zarr/128x128/c.0.0.0.0"
RECORD = 4 * 16 * 16 * 4 + 4  # bytes of a latent and its crc32c
Out = pytest.CaptureFixture[str]


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A store to be damaged."""
    return Path(shutil.copytree(store, tmp_path / "latents"))


def wrong(folder: Path, capsys: Out, *options: object) -> list[str]:
    """What `check` finds, its exit code agreeing."""
    capsys.readouterr()
    code = cache("check", folder, *options)
    found = [line for line in printed(capsys).splitlines() if line.startswith("WRONG")]
    assert code == bool(found)
    return found


def test_a_good_store_is_right(copy: Path, capsys: Out) -> None:
    assert wrong(copy, capsys, "--decode", 3) == []


def test_a_flipped_bit_names_the_image(copy: Path, capsys: Out) -> None:
    with LatentStore.open(copy) as ours:
        sample = ours.samples.slice(2, 1).to_pylist()[0]
    content = bytearray((copy / SHARD).read_bytes())
    content[sample["row"] * RECORD + 77] ^= 8
    (copy / SHARD).write_bytes(content)
    (line,) = wrong(copy, capsys)
    assert sample["key"] in line
    assert "wrong crc32c" in line


def test_a_changed_latent_with_a_right_checksum_is_not_what_was_committed(
    copy: Path, capsys: Out
) -> None:
    nbytes = 4 * 16 * 16 * 4
    content = bytearray((copy / SHARD).read_bytes())
    content[:nbytes] = np.ones(nbytes // 4, np.float32).tobytes()
    crc = google_crc32c.value(bytes(content[:nbytes]))
    content[nbytes : nbytes + 4] = crc.to_bytes(4, "little")
    (copy / SHARD).write_bytes(content)
    (line,) = wrong(copy, capsys)
    assert "not what was committed" in line


@pytest.mark.parametrize("kept", [-1, 100, 0, None])
def test_a_cut_or_missing_shard_names_its_images(copy: Path, capsys: Out, kept: int | None) -> None:
    whole = (copy / SHARD).read_bytes()
    (copy / SHARD).unlink()
    if kept is not None:
        (copy / SHARD).write_bytes(whole[:kept])
    (line,) = wrong(copy, capsys)
    assert "5 latents are lost: images/" in line


def test_a_missing_commit_names_its_images(copy: Path, capsys: Out) -> None:
    record = copy / "manifest/commit/192x64.0.parquet"
    keys = pq.read_table(record)["key"].to_pylist()
    record.unlink()
    missing, unfinished, stale = wrong(copy, capsys)
    assert "192x64.0.parquet is missing, but its shard exists; 3 images: " in missing
    assert all(key in missing for key in keys)
    assert "3 images are not encoded yet" in unfinished
    assert "index.arrow is stale" in stale


def test_rows_and_bytes_that_nobody_committed_are_found(copy: Path, capsys: Out) -> None:
    record = copy / "manifest/commit/192x64.0.parquet"
    write_parquet(record, pq.read_table(record).slice(1))
    content = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(content[: 5 * RECORD] + b"more" + content[5 * RECORD :])
    lines = wrong(copy, capsys)
    assert any("holds 1 rows that its commit record does not name" in line for line in lines)
    assert any("bytes, where its records and index take" in line for line in lines)


def test_a_commit_without_a_plan_is_found(copy: Path, capsys: Out) -> None:
    commits = copy / "manifest/commit"
    shutil.copy(commits / "192x64.0.parquet", commits / "192x64.9.parquet")
    assert any("was never planned" in line for line in wrong(copy, capsys))


def test_of_many_images_some_are_named_and_the_rest_counted() -> None:
    keys = tuple(f"images/{i}.jpg" for i in range(LISTED + 7))
    told = str(Problem("latents", "a shard", "is damaged", keys))
    assert told.endswith("images/19.jpg and 7 more")


def test_a_stale_index_is_found(copy: Path, capsys: Out) -> None:
    record = copy / "manifest/commit/192x64.0.parquet"
    record.write_bytes(record.read_bytes() + b"more")  # the fingerprint moves on
    record.write_bytes(record.read_bytes()[:-4])
    index = copy / "index.arrow"
    content = bytearray(index.read_bytes())
    at = content.index(b"images/astronaut_face.jpg")
    content[at : at + 6] = b"IMAGES"
    index.write_bytes(content)
    (line,) = wrong(copy, capsys)
    assert "index.arrow is stale" in line


def test_a_log_that_is_not_the_index_own_is_found(copy: Path, capsys: Out) -> None:
    attributes = copy / "latents.zarr/zarr.json"
    attributes.write_bytes(attributes.read_bytes() + b" ")
    (line,) = wrong(copy, capsys)
    assert "built from other bytes of the log" in line


def test_images_that_are_gone_are_said_and_those_that_changed_are_a_problem(
    capsys: Out, photos: Path, tmp_path: Path, vae: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "l"
    shutil.copytree(photos, images)
    build = ("build", images, "--out", out, "--vae", vae, "--resolution", 128)
    assert cache(*build) == 0
    (images / "coffee.jpg").unlink()
    capsys.readouterr()
    assert cache("check", out, "--decode", 8) == 0
    assert "1 of 8 images were not compared: gone" in printed(capsys)
    (images / "rocket.jpg").write_bytes((images / "rocket_wide.jpg").read_bytes())
    before = files(out, "**/*")
    for more in ((), ("--repair",), ("--json",), ("--repair", "--json")):
        assert cache("check", out, "--decode", 8, *more) == 1
        said = capsys.readouterr().out
        assert "images/rocket.jpg" in said
        assert "--rehash" in said
        assert "are right now" not in said
        if "--json" in more:
            told = json.loads(said)
            assert not told["right"]
            (problem,) = told["problems"]
            assert (problem["kind"], problem["images"]) == ("image", ["images/rocket.jpg"])
            assert "repaired" not in told
    assert files(out, "**/*") == before
    assert cache(*build, "--rehash") == 0
    assert cache("check", out, "--decode", 8) == 0


def test_another_vae_cannot_judge(copy: Path, capsys: Out, tmp_path: Path) -> None:
    assert cache("check", copy, "--decode", 1, "--vae", tiny(tmp_path / "tiny")) == 1
    assert "its encoder half" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table", ["manifest/plan/000000.parquet", "manifest/commit/*.parquet", "captions/base.parquet"]
)
def test_a_damaged_log_is_one_sentence_everywhere(
    store: Path, photos: Path, vae: Path, model: Path, tmp_path: Path, table: str, capsys: Out
) -> None:
    copy = shutil.copytree(store, tmp_path / "copy")
    (copy / "index.arrow").unlink()
    damaged = min(copy.glob(table))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    run = ("--phase", "unet", "--batch", 2, "--data", copy, "--model", model)
    commands: tuple[Callable[[], int], ...] = (
        lambda: cache("info", copy),
        lambda: cache("build", photos, "--out", copy, "--vae", vae, "--resolution", 128),
        lambda: cache("preview", copy, tmp_path / "sheet.png"),
        lambda: cache("export-index", copy, tmp_path / "index.parquet"),
        lambda: train(*run, "--out", tmp_path / "run"),
    )
    for command in commands:
        capsys.readouterr()
        assert command() == 1
        (said,) = [line for line in capsys.readouterr().err.splitlines() if "cannot read" in line]
        assert f"cannot read {damaged}, a part of the store's log" in said
        assert f"`xlsd-cache check {copy} --repair`" in said
