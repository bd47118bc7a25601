"""Files whose content changed at the same size and mtime are detected and re-encoded."""

import hashlib
import io
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import cache, files, write_images
from xlsd_cache.encoding.pipeline import _read_and_decode
from xlsd_cache.files.uri import read_source, stat_source
from xlsd_cache.images.sandbox import decoders
from xlsd_cache.planning.plan import JOURNALS
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore

NAMES = [f"{folder}/{i}.bmp" for folder in "ab" for i in range(3)]
WHEN = (10**18, 10**18)  # atime and mtime of every file, ns
Build = Callable[..., int]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Pictures of one size in bytes and pixels, and of one time; one is there twice."""
    write_images(tmp_path / "images", NAMES, width=64, height=64)
    shutil.copy(tmp_path / "images/a/0.bmp", tmp_path / "images/b/copy.bmp")
    (tmp_path / "images/a/broken.bmp").write_bytes(bytes(12342))
    one_time(tmp_path / "images")
    return tmp_path / "images"


def one_time(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, ns=WHEN)


@pytest.fixture
def build(images: Path, vae: Path, tmp_path: Path) -> Build:
    """Build `images` into tmp_path/latents."""

    def run(*more: object, source: Path = images) -> int:
        return cache(
            "build", source, "--out", tmp_path / "latents", "--vae", vae, "--resolution", 64,
            "--buckets", "square", "--captions", "none", "--batch", 4, "--workers", 1, *more,
        )  # fmt: skip

    return run


def follows(store: Path) -> None:
    """Every sample is of what its file holds now."""
    with LatentStore.open(store) as opened:
        samples = opened.samples.to_pylist()
    for sample in samples:
        assert sha256(read_source(sample["source"])) == sample["content_hash"], sample["key"]
    assert len({sample["content_hash"] for sample in samples}) == len(samples)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def generations(store: Path) -> int:
    return len(Manifest(store).generations())


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


def touch_r(images: Path) -> None:
    """Written over, its time set back: `touch -r`, and editors that keep it."""
    write_images(images, ["a/1.bmp"], first_seed=50, width=64, height=64)
    os.utime(images / "a/1.bmp", ns=WHEN)


def restore(images: Path) -> None:
    """Another folder put in place with its files' times: rsync -t, a backup."""
    write_images(images.parent / "backup", NAMES[::-1], width=64, height=64)
    one_time(images.parent / "backup")
    shutil.rmtree(images)
    shutil.copytree(images.parent / "backup", images)


OTHERS: dict[str, Callable[[Path], None]] = {
    "names swapped": lambda images: swap(images / "a/0.bmp", images / "b/1.bmp"),
    "folders swapped": lambda images: swap(images / "a", images / "b"),
    "original and broken swapped": lambda i: swap(i / "a/0.bmp", i / "a/broken.bmp"),
    "copy and another swapped": lambda i: swap(i / "b/copy.bmp", i / "a/2.bmp"),
    "touch -r": touch_r,
    "restored": restore,
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_file_of_the_same_size_and_mtime_is_noticed(
    build: Build, images: Path, tmp_path: Path, other: str, opened: list[str], encoded: list[int]
) -> None:
    assert build() == 0
    encoded.clear()
    OTHERS[other](images)
    assert build("--dry-run") == 0
    assert build() == 0
    assert sum(encoded) == (1 if other == "touch -r" else 0)  # else all were encoded before
    follows(tmp_path / "latents")
    assert cache("check", tmp_path / "latents", "--decode", 9) == 0
    count = generations(tmp_path / "latents")
    opened.clear()
    assert build() == 0
    assert opened == []
    assert generations(tmp_path / "latents") == count


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_another_archive_of_the_same_size_and_mtime_is_noticed(
    build: Build, images: Path, tmp_path: Path, suffix: str, encoded: list[int]
) -> None:
    source = tmp_path / f"all.{suffix}"
    pictures = [(images / name).read_bytes() for name in NAMES]
    for _ in range(2):
        if suffix == "tar":
            with tarfile.open(source, "w") as tar:
                for name, data in zip(NAMES, pictures, strict=True):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        else:
            table = pa.table({"image": pictures, "path": NAMES})
            pq.write_table(table, source, compression="none", use_dictionary=False)
        os.utime(source, ns=WHEN)
        assert build(source=source) == 0
        follows(tmp_path / "latents")
        pictures.reverse()
    assert sum(encoded) == len(NAMES)


def test_a_chmod_encodes_nothing_and_is_read_once(
    build: Build, images: Path, tmp_path: Path, opened: list[str], encoded: list[int]
) -> None:
    assert build() == 0
    latents = files(tmp_path / "latents", "latents.zarr/**/*")
    with LatentStore.open(tmp_path / "latents") as store:
        samples = store.samples.to_pylist()
    encoded.clear()
    for path in images.rglob("*.bmp"):
        path.chmod(0o600)
    opened.clear()
    assert build() == 0
    assert sorted(opened) == sorted(map(str, images.rglob("*.bmp")))
    assert encoded == []
    assert files(tmp_path / "latents", "latents.zarr/**/*") == latents
    with LatentStore.open(tmp_path / "latents") as store:
        assert store.samples.to_pylist() == samples
    opened.clear()
    assert build() == 0
    assert opened == []


def age(store: Path) -> None:
    """As a version that did not log inode and ctime would have left the store."""
    for path in (store / "manifest/plan").iterdir():
        write_parquet(path, pq.read_table(path).drop_columns(["inode", "ctime_ns"]))
    (store / "index.arrow").unlink()


def test_an_older_store_is_trusted_until_rehash_records_what_it_lacks(
    build: Build, images: Path, tmp_path: Path, opened: list[str], encoded: list[int]
) -> None:
    assert build() == 0
    age(tmp_path / "latents")
    swap(images / "a/0.bmp", images / "b/1.bmp")
    opened.clear()
    encoded.clear()
    assert build() == 0
    assert opened == []
    assert generations(tmp_path / "latents") == 1
    assert cache("check", tmp_path / "latents", "--decode", 9) == 1
    assert build("--rehash") == 0
    assert len(set(opened)) == 8
    follows(tmp_path / "latents")
    swap(images / "a/0.bmp", images / "b/1.bmp")
    assert build() == 0
    follows(tmp_path / "latents")
    assert encoded == []


def test_rehash_reads_everything_whatever_the_times_say(
    build: Build, images: Path, tmp_path: Path, opened: list[str]
) -> None:
    assert build() == 0
    for _ in range(2):
        opened.clear()
        assert build("--rehash") == 0
        assert set(opened) == set(map(str, images.rglob("*.bmp")))
        assert generations(tmp_path / "latents") == 1
        assert not [name for name in JOURNALS if (tmp_path / "latents/staging" / name).exists()]


def test_of_several_processes_one_rehashes(
    build: Build, images: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build() == 0
    now = time.time()
    opened.clear()
    for shard in ("0/2", "1/2"):
        with monkeypatch.context() as together:
            together.setattr(time, "time", lambda: now)
            assert build("--rehash", "--shard", shard) == 0
    assert sorted(opened) == sorted(set(opened)) != []
    assert cache("check", tmp_path / "latents") == 0


def entry_of(path: Path) -> dict[str, Any]:
    stat = stat_source(str(path))._asdict()
    placed = {"width": 64, "height": 64, "crop": [0.0, 0.0, 64.0, 64.0], "bucket": "64x64"}
    return {"key": path.name, "source": str(path), "content_hash": "", **placed, **stat}


def test_what_changes_between_scan_and_reading_is_never_taken_for_what_was_scanned(
    images: Path,
) -> None:
    one, other = images / "a/1.bmp", images / "a/2.bmp"
    entry = entry_of(one)
    hashed = {**entry, "content_hash": sha256(one.read_bytes())}
    older = {**entry, "inode": None, "ctime_ns": None}

    def outcome(entry: Any) -> tuple[str, str]:
        content, pixels = _read_and_decode(decoders(1), 10**6, entry, live=True)
        return content, getattr(pixels, "reason", "")

    one.chmod(0o600)  # the same content: encoded all the same
    assert outcome(entry) == outcome(hashed) == (hashed["content_hash"], "")
    swap(one, other)  # as good as the one that was scanned, if its own hash is recorded
    assert outcome(entry) == outcome(older) == (sha256(one.read_bytes()), "")
    assert outcome(hashed)[1] == "changed"
    swap(one, images / "a/broken.bmp")  # which says nothing about what was scanned
    assert outcome(entry)[1] == "changed"
    assert outcome(older)[1] == "not_an_image"
    os.utime(one)
    assert outcome(older) == ("", "changed")
