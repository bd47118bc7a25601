import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlsd_cache.runtime.atomic import (
    is_whole,
    link_or_copy,
    replacing,
    replacing_folder,
    sweep,
    write_bytes,
    write_json,
    write_parquet,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, staging = tmp_path / "file", tmp_path / "staging"
    staging.mkdir()
    write_bytes(path, b"old", staging)
    with pytest.raises(RuntimeError), replacing(path, staging) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert not list(staging.iterdir())
    write_json(path, {"name": "写真", "path": Path("a/b")})
    assert path.read_text() == '{\n  "name": "写真",\n  "path": "a/b"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model"
    with pytest.raises(RuntimeError), replacing_folder(path) as temporary:
        (temporary / "unet").mkdir(parents=True)
        (temporary / "unet" / "weights").write_bytes(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    path.mkdir()  # empty, so in nobody's way
    dead = path.with_name(".model.99999999.tmp")
    other = path.with_name(f".model.{os.getppid()}.tmp")
    for left in (dead, other):
        left.mkdir()
    with replacing_folder(path) as temporary:
        (temporary / "unet").mkdir(parents=True)
        (temporary / "unet" / "weights").write_bytes(b"whole")
        assert not any(path.iterdir())
    assert (path / "unet" / "weights").read_bytes() == b"whole"
    assert sorted(path.parent.iterdir()) == [other, path]
    with pytest.raises(OSError, match="not empty"), replacing_folder(path) as temporary:
        temporary.mkdir()
    with replacing_folder(tmp_path / "file") as temporary:  # as a model in one file is
        temporary.write_bytes(b"whole")
    link = tmp_path / "link"
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to("elsewhere")
    with replacing_folder(link) as temporary:
        temporary.mkdir()
        (temporary / "a").touch()
    assert (tmp_path / "elsewhere" / "a").exists()
    assert link.is_symlink()


@settings(max_examples=40)  # each syncs a file
@given(st.lists(st.text()), st.integers(min_value=0), st.integers(1, 255))
def test_a_table_knows_whether_it_is_whole(texts: list[str], place: int, change: int) -> None:
    """Any byte changed, or any end cut off, is noticed; a table of others is none of ours."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        write_parquet(path, table)
        assert pq.read_table(path).equals(table)
        assert is_whole(path)
        data = bytearray(path.read_bytes())
        path.write_bytes(data[: place % len(data)])
        assert not is_whole(path)
        data[place % len(data)] ^= change
        path.write_bytes(data)
        assert not is_whole(path)
        pq.write_table(table, path)
        assert not is_whole(path)


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "mine") as mine:
        mine.touch()
        dead = mine.with_name(mine.name.replace(str(os.getpid()), "99999999"))
        other = mine.with_name(mine.name.replace(mine.name.split(".")[2], "elsewhere"))
        for path in (dead, other, tmp_path / "kept.parquet", tmp_path / "odd.tmp"):
            path.touch()
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            mine.name, other.name, "kept.parquet", "odd.tmp"
        }  # fmt: skip
        os.utime(other, (0, 0))
        sweep(tmp_path)
        assert not other.exists()
        raise KeyboardInterrupt


def test_a_second_name_is_a_link_or_else_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"content")
    link_or_copy(source, tmp_path / "b")
    assert (tmp_path / "b").samefile(source)

    def impossible(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", impossible)
    link_or_copy(source, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"content"
    assert not (tmp_path / "c").samefile(source)
