import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.store.test_index import ROWS, logs, write
from xlsd_cache.errors import UserError
from xlsd_cache.planning.log_state import read_log_state
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.schema import CAPTIONS, COMMIT, PLAN
from xlsd_cache.store import log_files
from xlsd_cache.store.index import make_snapshot
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.view import StoreView

FOLDS = {"plan.parquet", "captions.parquet", "commit.parquet"}


@contextmanager
def together(files: int, small: int = log_files.SMALL) -> Iterator[None]:
    """Fold once there are this many new files of at most `small` bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_files, "TOGETHER", files)
        patch.setattr(log_files, "SMALL", small)
        yield


def says(store: StoreView) -> list[Any]:
    """All that the log says, at each of its generations."""
    manifest, told = store.manifest, list[Any]()
    committed = manifest.committed()
    told += [committed, manifest.commits(committed), manifest.commits(set(sorted(committed)[1:]))]
    for generation in manifest.generations():
        columns = manifest.caption_columns(generation)
        told += [columns, manifest.live(generation), manifest.planned(generation)]
        told += [manifest.captions(generation), manifest.plan_lines(generation, ["row", "bucket"])]
        told += [manifest.caption_lines(generation, column, "text") for column in columns]
        told += manifest.files(generation)
    state = read_log_state(manifest, ROWS)
    told += [state.live, state.content, state.next_rows, state.captions]
    snapshot = make_snapshot(store)
    return [*told, snapshot.samples, snapshot.ranges, snapshot.pending, snapshot.fingerprint]


def one_generation(manifest: Manifest, number: int) -> None:
    """Two images, encoded; the one before the last generation's second is removed."""
    keys = [f"{number}-{i}" for i in range(2)]
    plan = [
        {
            "key": key, "source": key, "size": 1, "mtime_ns": 1, "width": 64, "height": 64,
            "crop": [0.0, 0.0, 64.0, 64.0], "bucket": "64x64", "row": number * ROWS + i,
            "content_hash": "", "reason": "", "detail": "",
        }
        for i, key in enumerate(keys)
    ]  # fmt: skip
    said = [{"key": key, "column": "txt", "text": key} for key in keys]
    removed = [f"{number - 2}-1"] if number > 1 else []
    tables = (pa.Table.from_pylist(it, schema) for it, schema in ((plan, PLAN), (said, CAPTIONS)))
    manifest.write_plan(number, next(tables), removed, next(tables))
    lines = [
        {"row": it["row"], "key": it["key"], "content_hash": f"#{it['key']}", "status": "encoded",
         "reason": "", "detail": "", "crc32c": 1}
        for it in plan
    ]  # fmt: skip
    unit = ShardId("64x64", number)
    write_parquet(manifest.commit(unit), pa.Table.from_pylist(lines, COMMIT), manifest.staging)


def grown(root: Path, generations: int, *, fold: bool = True) -> StoreView:
    """A store of so many generations, folded before each as a build does."""
    store = write(root, [], set())
    for number in range(generations):
        if fold:
            store.manifest.fold()
        one_generation(store.manifest, number)
    return StoreView(store.manifest, store.identity, ROWS, generations - 1)


@settings(max_examples=8)
@given(logs(), st.sets(st.integers(0, 9)), st.integers(0, 3000))
def test_a_folded_log_says_what_its_files_say(
    tmp_path_factory: pytest.TempPathFactory,
    generations: list[dict[str, Any]],
    rejected: set[int],
    small: int,
) -> None:
    """Whatever was folded, and when; large files are not."""
    root = tmp_path_factory.mktemp("log")
    with together(1, small):
        store = write(root, generations[:1], rejected)
        store.manifest.fold()
        store = write(root, generations, rejected)  # other inodes and times
        folded_before = says(store)
        store.manifest.fold()
        told = says(store)
    shutil.rmtree(root / "manifest" / "folded", ignore_errors=True)
    assert told == folded_before == says(store)


def test_files_opened_do_not_grow_with_the_generations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning, accounting and an old generation read a few files, however long the log is."""
    opened: list[Path] = []
    own = pq.ParquetFile.__init__

    def spy(self: Any, source: Any, *args: Any, **kwargs: Any) -> None:
        opened.append(source)
        own(self, source, *args, **kwargs)

    def reads(generations: int) -> tuple[int, int]:
        store = grown(tmp_path / str(generations), generations)
        monkeypatch.setattr(pq.ParquetFile, "__init__", spy)
        opened.clear()
        read_log_state(store.manifest, ROWS)
        newest = len(opened)
        opened.clear()
        store.manifest.live(generations // 2)
        monkeypatch.setattr(pq.ParquetFile, "__init__", own)
        return newest, len(opened)

    turn = log_files.TOGETHER  # so that as many files are not folded yet
    few = reads(1 + 2 * turn)
    assert few == reads(1 + 5 * turn)
    assert few[1] == 1


def test_what_changed_since_is_read_from_its_file(tmp_path: Path) -> None:
    """As `check --repair` rewrites a commit record; the next fold has the new one."""
    store = grown(tmp_path, 9)
    with together(1):
        store.manifest.fold()
    path = store.manifest.commit(ShardId("64x64", 3))
    lines = pq.read_table(path, schema=COMMIT)
    lost = lines.set_column(2, "content_hash", pa.array(["", ""]))
    write_parquet(path, lost, store.manifest.staging)
    for _ in range(2):
        commits = store.manifest.commits(store.manifest.committed())
        assert commits["content_hash"].to_pylist()[6:8] == ["", ""]
        with together(1):
            store.manifest.fold()
    path.write_bytes(path.read_bytes()[:-9])  # damaged: it is read, and so reported
    with pytest.raises(UserError, match=r"cannot read .*64x64\.3\.parquet"):
        store.manifest.commits(store.manifest.committed())
    store.manifest.fold()  # which leaves the report to its readers


def test_a_damaged_or_deleted_fold_is_ignored_and_made_again(tmp_path: Path) -> None:
    store = grown(tmp_path, 10)
    folder = tmp_path / "manifest" / "folded"
    assert {path.name for path in folder.iterdir()} == FOLDS
    expected = read_log_state(store.manifest, ROWS)
    for path in folder.iterdir():
        whole = path.read_bytes()
        for at in range(0, len(whole), len(whole) // 3):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
            assert read_log_state(store.manifest, ROWS) == expected
        path.unlink()
        path.mkdir()
        store.manifest.fold()
        assert read_log_state(store.manifest, ROWS) == expected
        path.rmdir()
    store.manifest.fold()
    assert {path.name for path in folder.iterdir()} == FOLDS
    assert read_log_state(store.manifest, ROWS) == expected


def test_a_moved_store_is_folded_again(tmp_path: Path) -> None:
    """A copy has other inodes, and perhaps other times: none of its files is trusted."""
    store = grown(tmp_path / "here", 12)
    expected = says(store)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    copied = StoreView(Manifest(tmp_path / "there"), store.identity, ROWS, store.generation)
    os.utime(copied.manifest.commit(ShardId("64x64", 1)), ns=(1, 1))
    for _ in range(2):
        assert says(copied) == expected
        copied.manifest.fold()
