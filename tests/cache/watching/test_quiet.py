"""Files are young until they have been left alone."""

import os
import time
from pathlib import Path

import pytest

from xlsd_cache.errors import UserError
from xlsd_cache.watching.quiet import Quiet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "a.txt", "sub/b.png"):
        (tmp_path / name).write_text(name)
    return tmp_path


def names(young: frozenset[str], folder: Path) -> set[str]:
    return {Path(path).relative_to(folder).as_posix() for path in young}


def test_new_files_are_young_until_they_have_been_quiet(folder: Path) -> None:
    quiet = Quiet(3600)
    assert names(quiet.look([folder]).young, folder) == {"a.png", "a.txt", "sub/b.png"}
    quiet.settle_s = 1e-9
    assert quiet.look([folder]).young == frozenset()
    assert Quiet(0).look([folder]).young == frozenset()


def test_a_time_in_the_future_does_not_wait_for_ever(folder: Path) -> None:
    later = time.time_ns() + 10**15
    os.utime(folder / "a.png", ns=(later, later))
    quiet = Quiet(0.5)
    assert "a.png" in names(quiet.look([folder]).young, folder)
    time.sleep(0.6)
    assert quiet.look([folder]).young == frozenset()
    os.utime(folder / "a.png", ns=(later, later + 1))
    assert names(quiet.look([folder]).young, folder) == {"a.png"}


def test_a_file_that_grows_while_its_times_stay_old_is_young(folder: Path) -> None:
    path = folder / "a.png"
    quiet = Quiet(0.2)
    time.sleep(0.3)
    assert quiet.look([folder]).young == frozenset()
    quiet.remember([str(path)])
    path.write_text("longer than before")
    os.utime(path, ns=(1, 1))
    time.sleep(0.3)  # ctime is older than the settling time as well
    assert names(quiet.look([folder]).young, folder) == {"a.png"}
    time.sleep(0.3)
    assert quiet.look([folder]).young == frozenset()


def test_the_digest_changes_with_any_file_and_only_then(folder: Path) -> None:
    quiet, seen = Quiet(1), set[bytes]()
    for change in (
        lambda: None,
        lambda: (folder / "a.txt").write_text("other"),
        lambda: (folder / "new.bin").write_text(""),
        lambda: (folder / "new.bin").rename(folder / "sub/new.bin"),
        lambda: os.utime(folder / "a.png", ns=(5, 5)),
        (folder / "sub/b.png").unlink,
    ):
        change()
        digest = quiet.look([folder]).digest
        assert digest not in seen
        assert digest == Quiet(9).look([folder]).digest
        seen.add(digest)


def test_a_file_as_source_that_is_gone_is_told(folder: Path) -> None:
    assert names(Quiet(3600).look([folder / "a.txt"]).young, folder) == {"a.txt"}
    with pytest.raises(UserError, match="gone.tar: No such file"):
        Quiet(1).look([folder / "gone.tar"])
