from pathlib import Path
from typing import Any

import pyarrow as pa

from xlsd_cache.schema import CAPTIONS, PLAN
from xlsd_cache.store.manifest import Manifest, ShardId


def plan(*keys: str, row: int = 0) -> pa.Table:
    entry: dict[str, Any] = {
        "source": "", "size": 1, "mtime_ns": 1, "width": 64, "height": 64,
        "crop": [0.0, 0.0, 64.0, 64.0], "bucket": "64x64", "content_hash": "", "reason": "",
        "detail": "",
    }  # fmt: skip
    return pa.Table.from_pylist([{"key": key, "row": row, **entry} for key in keys], PLAN)


def captions(**texts: str) -> pa.Table:
    rows = [{"key": key, "column": "txt", "text": text} for key, text in texts.items()]
    return pa.Table.from_pylist(rows, CAPTIONS)


def test_generations_add_up_and_old_ones_stay_readable(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.make_folders()
    assert manifest.generations() == []
    manifest.write_plan(0, plan("a", "b"), [], captions(a="A", b="B"))
    manifest.write_plan(1, plan("b", "c", row=5), ["a"], captions(b="new", c=""))
    manifest.write_plan(2, plan("a", row=7), [], captions())
    assert manifest.generations() == [0, 1, 2]

    def live(generation: int) -> dict[str, int]:
        return {row["key"]: row["row"] for row in manifest.live(generation).to_pylist()}

    assert live(0) == {"a": 0, "b": 0}
    assert live(1) == {"b": 5, "c": 5}
    assert live(2) == {"a": 7, "b": 5, "c": 5}
    texts = {row["key"]: row["text"] for row in manifest.captions(2).to_pylist()}
    assert texts == {"a": "A", "b": "new"}
    assert manifest.files(1) == [
        "manifest/plan/000000.parquet", "captions/base.parquet", "manifest/removed/000001.parquet",
        "manifest/plan/000001.parquet", "captions/delta-000001.parquet",
    ]  # fmt: skip


def test_a_generation_exists_only_with_its_plan(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.make_folders()
    manifest.write_plan(0, plan("a"), [], captions(a="A"))
    manifest.write_plan(1, plan(), ["a"], captions(a="B"))
    (tmp_path / "manifest/plan/000001.parquet").unlink()  # as if killed before it was written
    assert manifest.generations() == [0]
    assert manifest.live(1).num_rows == 1
    assert manifest.captions(1).to_pylist()[0]["text"] == "A"
    manifest.write_plan(1, plan("b"), [], captions())  # the leftovers must not come back to life
    assert manifest.live(1)["key"].to_pylist() == ["a", "b"]
    assert manifest.captions(1).to_pylist()[0]["text"] == "A"


def test_committed_units_are_those_with_a_record(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    assert manifest.committed() == set()
    manifest.make_folders()
    manifest.commit(ShardId("64x128", 12)).touch()
    (tmp_path / "manifest/commit/.hidden").touch()
    assert manifest.committed() == {ShardId("64x128", 12)}
