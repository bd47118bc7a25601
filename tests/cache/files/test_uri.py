import io
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import picture
from xlsd_cache.files.uri import cell, open_source, read_source, span, stat_source

DATA = picture(0).tobytes()


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """The same bytes in every kind of place."""
    (tmp_path / "a.bin").write_bytes(DATA)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("before"))
        info = tarfile.TarInfo("deep/a.bin")
        info.size = len(DATA)
        tar.addfile(info, io.BytesIO(DATA))
    offset = (tmp_path / "a.tar").read_bytes().index(DATA)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.bin", DATA)
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        packed = file.infolist()[0].compress_size
    images = pa.array([{"bytes": b"x", "path": "x"}, {"bytes": DATA, "path": "a.bin"}])
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=1)
    name_length = 30 + len("a.bin")
    return {
        "file": str(tmp_path / "a.bin"),
        "tar": span(tmp_path / "a.tar", offset, len(DATA), "deep/a.bin"),
        "zip": span(tmp_path / "a.zip", name_length, packed, "a.bin", len(DATA)),
        "parquet": cell(tmp_path / "a.parquet", "image.bytes", 1, len(DATA), "a.bin"),
    }


KINDS = pytest.mark.parametrize("kind", ["file", "tar", "zip", "parquet"])


@KINDS
def test_every_kind_gives_the_same_bytes(sources: dict[str, str], kind: str) -> None:
    source = sources[kind]
    assert read_source(source) == DATA
    with open_source(source) as file:
        assert file.read() == DATA
    container = Path(source.partition("//")[0])
    assert stat_source(source)[:2] == (len(DATA), container.stat().st_mtime_ns)


@KINDS
def test_what_is_gone_is_not_found(sources: dict[str, str], kind: str) -> None:
    Path(sources[kind].partition("//")[0]).unlink()
    for look in (read_source, open_source, stat_source):
        with pytest.raises(FileNotFoundError):
            look(sources[kind])


@KINDS
def test_many_threads_read_at_once(sources: dict[str, str], kind: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read_source, [sources[kind]] * 64)) == {DATA}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-9, 40), st.integers(-1, 30))))
def test_a_stretch_of_an_archive_seeks_and_reads_like_a_file(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "stretch"
    path.write_bytes(b"<" * 7 + DATA[:25] + b">" * 50)
    whole = io.BytesIO(DATA[:25])
    with open_source(span(path, 7, 25, "a")) as stretch:
        for whence, offset, count in moves:
            try:
                at = whole.seek(offset, whence)
            except ValueError:
                with pytest.raises((OSError, ValueError)):
                    stretch.seek(offset, whence)
                continue
            if whence and offset < 0 and at == 0:  # BytesIO stops at the beginning, files refuse
                stretch.seek(0)
            else:
                assert stretch.seek(offset, whence) == at
            assert stretch.read(count) == whole.read(count)


def test_damage_is_an_error_and_never_fewer_bytes(sources: dict[str, str], tmp_path: Path) -> None:
    for name, cut in (("a.tar", len(DATA) // 2), ("a.zip", 200)):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:cut])
    with pytest.raises(OSError, match="ends before"):
        read_source(sources["tar"])
    with pytest.raises(OSError, match="ends before"):
        read_source(sources["zip"])
    with pytest.raises(OSError, match="damaged in its archive"):
        read_source(span(tmp_path / "a.bin", 0, 500, "a", 1000))
    with pytest.raises(OSError, match="cannot read"):
        read_source(cell(tmp_path / "a.bin", "image", 0, 5, "a"))
    with pytest.raises(OSError, match="no source that this version knows"):
        read_source(f"{tmp_path}/a.tar//somewhere/else")
