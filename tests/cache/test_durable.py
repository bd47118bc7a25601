import os
from pathlib import Path

import pytest

from xlsd_cache.durable import replacing, sweep, write_bytes, write_json


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
