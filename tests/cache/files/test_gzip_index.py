import gzip
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xlsd_cache.files import gzip_index as gzips
from xlsd_cache.files.gzip_index import END, gzip_of

MEMBERS = [random.Random(0).randbytes(700_000), bytes(5_000_000), b"", b"abc" * 400_000]
DATA = b"".join(MEMBERS)


@pytest.fixture(params=[1, len(MEMBERS)])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same data in one gzip member, and in several with padding between them."""
    parts = [DATA] if request.param == 1 else MEMBERS
    (tmp_path / "a.gz").write_bytes(bytes(9).join(gzip.compress(part, 1) for part in parts))
    return tmp_path / "a.gz"


def test_a_pass_through_checks_everything_and_leaves_access_points(path: Path) -> None:
    found = gzip_of(path)
    with path.open("rb") as file:
        cursor = found.cursor(file)
        assert cursor.drain(2**40) == len(DATA)
    assert (cursor.ending, cursor.bad, cursor.behind) == (END, [], 0)
    assert [mark.out // 2**22 for mark in found.points] == [0, 1]
    assert gzip_of(path) is found


def test_any_stretch_is_read_by_many_threads(path: Path) -> None:
    order = random.Random(1)
    stretches = [(order.randrange(len(DATA)), order.choice([1, 500, 300_000])) for _ in range(100)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda stretch: gzip_of(path).read_at(*stretch), stretches))
    assert got == [DATA[offset : offset + count] for offset, count in stretches]


def test_access_points_are_thinned_out_where_there_are_too_many(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzips, "_MOST_POINTS", 8)
    monkeypatch.setattr(gzips, "_files", type(gzips._files)())
    found = gzip_of(path)
    found.spacing = 2**16
    with path.open("rb") as file:
        found.cursor(file).drain(2**40)
    assert 2 < len(found.points) <= 8
    assert found.spacing > 2**18
    for offset in range(0, len(DATA), 1_000_000):
        assert found.read_at(offset, 10) == DATA[offset : offset + 10]
