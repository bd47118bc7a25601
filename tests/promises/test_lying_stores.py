"""A hostile store gives one error at worst, and its links are never written through."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import cache, printed, sums
from xlsd_cache.errors import UserError
from xlsd_cache.store.commit import tidy
from xlsd_cache.store.index import cached_snapshot
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore

ESCAPE = "\x1b]0;pwned\x07\x1b[2J"
Out = pytest.CaptureFixture[str]


@pytest.fixture
def mine(store: Path, tmp_path: Path) -> Path:
    """A copy of the store, with its index."""
    LatentStore.open(store).close()
    return Path(shutil.copytree(store, tmp_path / "mine"))


def change_json(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "latents.zarr" / "zarr.json"
    told = json.loads(path.read_bytes())
    change(told["attributes"])
    path.write_text(json.dumps(told))
    (root / "index.arrow").unlink(missing_ok=True)


def error(out: Out) -> str:
    (line,) = out.readouterr().err.splitlines()
    assert line.startswith("xlsd-cache:")
    return line


def identity(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda attributes: attributes["identity"].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(rows_per_shard=0),
        lambda told: told.update(rows_per_shard=-256),
        lambda told: told.update(rows_per_shard=2**40),
        lambda told: told.update(rows_per_shard="x"),
        lambda told: told.update(rows_per_shard=float("inf")),
        lambda told: told.update(identity=[1]),
        identity(channels=10**9),
        identity(channels="4"),
        identity(dtype="O"),
        identity(scaling_factor=float("nan")),
        identity(vae_name={}),
        identity(vae_padding="other"),
    ],
)
def test_metadata_that_no_store_has_is_one_sentence(
    mine: Path, change: Callable[[dict[str, Any]], Any], capsys: Out
) -> None:
    change_json(mine, change)
    capsys.readouterr()
    assert cache("info", mine) == 1
    assert "was not written by xlsd-cache" in error(capsys)


@pytest.mark.parametrize("make", [lambda path: path.write_text("[" * 100_000), os.mkfifo])
def test_metadata_that_cannot_be_read_is_one_sentence(
    mine: Path, make: Callable[[Path], Any], capsys: Out
) -> None:
    path = mine / "latents.zarr" / "zarr.json"
    path.unlink()
    make(path)
    capsys.readouterr()
    assert cache("info", mine) == 1
    assert "was not written by xlsd-cache" in error(capsys)


def test_an_unknown_field_is_passed_over(mine: Path) -> None:
    change_json(mine, identity(later="x"))
    assert cache("info", mine) == 0


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("bucket", "../../pwn", "no name of a bucket"),
        ("bucket", "/tmp/64x64", "no name of a bucket"),
        ("bucket", "99999x99999", "no name of a bucket"),
        ("bucket", None, "missing"),
        ("row", 2**39, "its rows are"),
        ("row", -7, "its rows are"),
        ("key", None, "missing"),
    ],
)
def test_a_plan_that_leads_elsewhere_is_one_sentence(
    mine: Path, column: str, value: Any, told: str, capsys: Out
) -> None:
    (path,) = (mine / "manifest" / "plan").iterdir()
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0] = value
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, table.schema.field(at), [values]), path)
    (mine / "index.arrow").unlink()
    before = sorted(it for it in mine.parent.rglob("*"))
    with pytest.raises(UserError, match=told):
        Manifest(mine).planned(0)  # as a build reads it
    capsys.readouterr()
    assert cache("info", mine) == 1
    assert told in error(capsys)
    assert cache("check", mine) == 1
    assert "checksum" in printed(capsys)
    assert sorted(it for it in mine.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", ["plan", "commit"])
def test_a_table_of_other_types_or_columns_is_one_sentence(
    mine: Path, kind: str, capsys: Out
) -> None:
    path = next((mine / "manifest" / kind).iterdir())
    (mine / "index.arrow").unlink()
    for table in ({"key": [1]}, {"key": ["a"], "bucket": [[1]], "row": ["x"]}):
        pq.write_table(pa.table(table), path)
        capsys.readouterr()
        assert cache("info", mine) == 1
        assert "a part of the store's log" in error(capsys)


def test_an_index_with_offsets_beyond_its_texts_is_made_anew(mine: Path) -> None:
    path = mine / "index.arrow"
    right = LatentStore.open(mine).samples.to_pylist()
    keys = pa.ipc.open_file(pa.OSFile(str(path))).read_all()["key"].chunk(0)
    offsets = np.frombuffer(keys.buffers()[1], np.int32, len(keys) + 1)
    lies = offsets.copy()
    lies[1:-1] = 2**31 - 1 - np.arange(len(lies) - 2)[::-1] * 1000
    path.write_bytes(path.read_bytes().replace(offsets.tobytes(), lies.tobytes()))
    assert cached_snapshot(mine, 0) is None
    assert LatentStore.open(mine).samples.to_pylist() == right
    assert cached_snapshot(mine, 0) is not None


@pytest.mark.parametrize("change", ["type", "order", "ranges", "pipe", "two"])
def test_an_index_of_another_shape_is_made_anew(mine: Path, change: str) -> None:
    path = mine / "index.arrow"
    right = LatentStore.open(mine).samples.to_pylist()
    table = pa.ipc.open_file(pa.OSFile(str(path))).read_all()
    told = json.loads(table.schema.metadata[b"xlsd"])
    if change == "type":
        table = table.set_column(6, "row", table["row"].cast(pa.string()))
    elif change == "order":
        table = table.take(list(range(table.num_rows))[::-1])
    elif change == "ranges":
        told["ranges"] = {"../x": [0, 2**40]}
    elif change == "two":
        table = table.append_column("key", table["key"])
    path.unlink()
    if change == "pipe":
        os.mkfifo(path)
    else:
        table = table.replace_schema_metadata({"xlsd": json.dumps(told)})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert LatentStore.open(mine).samples.to_pylist() == right


def test_a_tag_index_with_samples_that_are_not_there_is_made_anew(mine: Path) -> None:
    with LatentStore.open(mine) as ours:
        right = ours.tags("txt").counts()
        woman = ours.tagged("txt", "woman")
    assert 0 < woman.sum() < len(woman)
    (path,) = mine.glob("tags.*.arrow")
    table = pa.ipc.open_file(pa.OSFile(str(path))).read_all()
    lists = pa.array([[2**30] for _ in range(table.num_rows)], table["samples"].type)
    table = table.set_column(1, table.schema.field(1), [lists])
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    damaged = path.read_bytes()
    with LatentStore.open(mine) as ours:
        assert ours.tags("txt").counts() == right
    assert path.read_bytes() != damaged
    path.write_bytes(damaged)
    with LatentStore.open(mine) as ours:
        assert np.array_equal(ours.tagged("txt", "woman"), woman)
        assert ours.tags("txt").counts() == right


def test_sums_that_are_not_ours_are_counted_again(mine: Path, capsys: Out) -> None:
    right = sums(mine, capsys)
    for told in ('{"generation": 0}', "[1]", "[" * 100_000, json.dumps({**right, "x": 1})):
        (mine / "manifest" / "accounting.json").write_text(told)
        assert sums(mine, capsys)["scanned"] == right["scanned"]


@pytest.mark.parametrize(
    "name", ["staging", "manifest", "captions", "latents.zarr", "manifest/plan"]
)
def test_a_folder_of_a_store_that_is_a_link_is_never_written_through(
    mine: Path, photos: Path, name: str, capsys: Out
) -> None:
    """`tidy` would sweep old .tmp files there, and a build lock and journal in it."""
    other = mine.parent / "other"
    (mine / name).rename(other)
    (mine / name).symlink_to(other)
    old = other / "notes.tmp"
    old.write_text("mine")
    os.utime(old, (1, 1))
    before = {path: path.lstat().st_mtime_ns for path in other.rglob("*")}
    capsys.readouterr()
    commands = [("captions", mine, "--from", photos, "--columns", "txt")]
    for words in commands:
        assert cache(*words) == 1
        assert "is a link" in error(capsys)
    with pytest.raises(UserError, match="is a link"):
        Manifest(mine).make_folders()
    if name != "manifest/plan":
        assert cache("info", mine) == 0  # reading is harmless
    assert {path: path.lstat().st_mtime_ns for path in other.rglob("*")} == before


@pytest.mark.parametrize("name", ["plan.lock", "128x128.0.part", "headers.planning"])
def test_a_file_of_staging_that_is_a_link_is_never_written_through(mine: Path, name: str) -> None:
    precious = mine.parent / "precious"
    precious.write_text("mine")
    (mine / "staging" / name).unlink(missing_ok=True)
    (mine / "staging" / name).symlink_to(precious)
    with pytest.raises(UserError, match="not a regular file"):
        Manifest(mine).make_folders()
    (mine / "staging" / name).unlink()
    os.mkfifo(mine / "staging" / name)
    with pytest.raises(UserError, match="not a regular file"):
        Manifest(mine).make_folders()
    assert precious.read_text() == "mine"


def test_a_store_that_is_a_link_itself_is_written(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mine)
    manifest = Manifest(tmp_path / "link")
    manifest.make_folders()
    tidy(manifest)


def test_no_command_prints_control_characters_of_a_store(mine: Path, capsys: Out) -> None:
    change_json(mine, identity(vae_name=ESCAPE, preprocessing=ESCAPE))
    accounting = mine / "manifest" / "accounting.json"
    told = json.loads(accounting.read_text())
    told["rejected"], told["scanned"] = {ESCAPE: 2}, told["scanned"] + 2
    accounting.write_text(json.dumps(told))
    capsys.readouterr()
    assert cache("info", mine) == 0
    assert cache("info", mine, "--json") == 0
    cache("check", mine)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "pwned" in said.out


def test_a_pipe_in_place_of_a_log_or_shard_ends(mine: Path, capsys: Out) -> None:
    for path in (
        next((mine / "manifest" / "plan").iterdir()),
        next((mine / "manifest" / "commit").iterdir()),
        next((mine / "latents.zarr" / "128x128").glob("c.*")),
    ):
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        (mine / "index.arrow").unlink(missing_ok=True)
        capsys.readouterr()
        assert cache("info", mine) == 1
        assert "not a regular file" in error(capsys)
        assert cache("check", mine) == 1
        path.unlink()
        path.write_bytes(kept)
