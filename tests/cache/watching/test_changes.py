"""What is held back, and what counts as vanished."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.support import cache, write_images
from xlsd_cache.errors import UserError
from xlsd_cache.planning.log_state import read_live
from xlsd_cache.schema import CAPTIONS, PLAN
from xlsd_cache.sources.scan import scan
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.watching.changes import Changes, compare, paths_of, refuse_vanished


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", ["a.png", "b.png", "b.c.png", "c.png"], width=64, height=64)
    return tmp_path / "images"


def compared(
    source: Path, young: set[str], out: Path | None = None, columns: Any = ("txt",), **more: Any
) -> Changes:
    """A scan of the source compared with the store, or with nothing."""
    found = scan((str(source),), columns, **more)
    live, captions = PLAN.empty_table(), CAPTIONS.empty_table()
    if out:
        manifest = Manifest(out)
        live = read_live(manifest, manifest.generations()[-1])
        captions = manifest.captions(manifest.generations()[-1])
    paths = frozenset(str(source.parent / name) for name in young)
    return compare(found, paths, live, captions, more.get("image_suffixes", ()))


def names(table: pa.Table) -> list[str]:
    return [key.rpartition("/")[2] for key in table["key"].to_pylist()]


def build(source: Path, out: Path, vae: Path, *more: object) -> Path:
    words = ("--out", out, "--vae", vae, "--buckets", "64x64", "--batch", 1, *more)
    assert cache("build", source, *words) == 0
    return out


@pytest.mark.parametrize(
    ("young", "left"),
    [
        ((), "a.png b.c.png b.png c.png"),
        (("a.png",), "b.c.png b.png c.png"),
        (("a.txt",), "b.c.png b.png c.png"),
        (("b.c.txt",), "a.png c.png"),  # or a caption c.txt of b.png
        (("a.json", "other.txt"), "b.c.png b.png c.png"),
        (("a.txt", "\udcff.png", "a.\udcff.part"), "b.c.png b.png c.png"),  # not UTF-8
    ],
)
def test_images_wait_for_their_files(images: Path, young: tuple[str, ...], left: str) -> None:
    found = compared(images, {f"images/{name}" for name in young})
    assert names(found.scan.images) == left.split()
    assert names(found.scan.captions) == left.split()
    assert found.held == 4 - len(left.split())
    assert sorted(found.keys.to_pylist()) == [f"images/{name}" for name in left.split()]


def test_suffixes_of_several_images_share_a_caption(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_images(folder, ["0.image.jpg", "1.image.jpg"], width=64, height=64)
    found = compared(folder, {"images/0.txt"}, image_suffixes=("image.jpg",))
    assert names(found.scan.images) == ["1.image.jpg"]


def test_what_is_held_is_as_the_log_has_it(images: Path, vae: Path, tmp_path: Path) -> None:
    out = build(images, tmp_path / "latents", vae)
    assert len(compared(images, set(), out).keys) == 0
    (images / "a.png").write_bytes(b"half")
    (images / "b.txt").write_text("other")
    (images / "c.png").unlink()
    found = compared(images, {"images/a.png"}, out)
    assert set(names(found.scan.images)) == {"a.png", "b.png", "b.c.png"}
    line = found.scan.images.to_pylist()[0]
    assert line["size"] != 4
    assert sorted(found.keys.to_pylist()) == ["images/b.png", "images/c.png"]
    found = compared(images, {"images/a.png", "images/b.txt"}, out)
    texts = {it["key"]: it["text"] for it in found.scan.captions.to_pylist()}
    assert texts["images/b.png"] == "picture 1"
    assert found.keys.to_pylist() == ["images/c.png"]
    assert found.held == 2
    assert all(Path(path).is_absolute() for path in paths_of(found.scan.images).to_pylist())


def test_an_image_that_is_moved_stays_until_it_is_quiet(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    out = build(images, tmp_path / "latents", vae)
    for end in ("png", "txt"):
        (images / f"a.{end}").rename(images / f"moved.{end}")
    (images / "b.png").unlink()
    found = compared(images, {"images/moved.png", "images/moved.txt"}, out)
    assert names(found.scan.images) == ["a.png", "b.c.png", "c.png"]
    assert "images/a.png" in found.scan.captions["key"].to_pylist()
    assert found.keys.to_pylist() == ["images/b.png"]
    found = compared(images, set(), out)
    assert names(found.scan.images) == ["b.c.png", "c.png", "moved.png"]


def test_no_image_leaves_while_its_archive_is_written(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    with tarfile.open(source / "0.tar", "w") as tar:
        for path in sorted(images.iterdir()):
            tar.add(path, path.name)
    out = build(source, tmp_path / "latents", vae)
    whole = (source / "0.tar").read_bytes()
    (source / "0.tar").write_bytes(whole[: len(whole) // 2])
    found = compared(source, {"tars/0.tar"}, out)
    assert len(found.scan.images) == 4
    assert len(found.scan.captions) == 4
    assert found.keys.to_pylist() == []
    assert len(compared(source, set(), out).keys) >= 2
    (source / "0.tar").write_bytes(b"")
    write_images(source, ["other.png"], 9, width=64, height=64)
    found = compared(source, {"tars/0.tar"}, out)
    assert found.keys.to_pylist() == ["tars/other.png"]
    assert found.held, "or it would not be looked at again"
    (source / "0.tar").rename(tmp_path / "elsewhere.tar")
    assert len(compared(source, {"tars/1.csv"}, out).keys) == 5


def test_a_table_that_is_written_takes_nothing_away(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    rows = [{"file_name": path.name, "text": f"of {path.name}"} for path in images.glob("*.png")]
    table = images / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("txt", "jsonl:text")
    out = build(images, tmp_path / "latents", vae, "--captions", ",".join(columns))
    table.write_text(json.dumps(rows[0] | {"text": "new"}) + "\n")
    found = compared(images, {"images/rows.jsonl"}, out, columns)
    assert found.scan.unread  # so the plan removes no caption
    texts = {
        it["key"]: it["text"] for it in found.scan.captions.to_pylist() if it["column"] != "txt"
    }
    assert texts == {f"images/{rows[0]['file_name']}": "new"}
    assert found.keys.to_pylist() == list(texts)


def test_half_of_a_source_may_go_and_more_may_not(images: Path, vae: Path, tmp_path: Path) -> None:
    out = build(images, tmp_path / "latents", vae)
    live = read_live(Manifest(out), 0)

    def found() -> Any:
        return scan((str(images),), ("txt",))

    (images / "a.png").unlink()
    (images / "b.png").unlink()
    refuse_vanished(found(), live, set())
    (images / "c.png").rename(images / "renamed.png")
    refuse_vanished(found(), live, set())
    (images / "renamed.png").unlink()
    with pytest.raises(UserError, match="3 of the 4 images of the source 'images' are gone"):
        refuse_vanished(found(), live, set())
    refuse_vanished(found(), live, {"images"})
    # Other images in their place do not make up for them.
    write_images(images, [f"new{i}.png" for i in range(9)], 50, width=64, height=64)
    with pytest.raises(UserError, match="3 of the 4"):
        refuse_vanished(found(), live, set())
