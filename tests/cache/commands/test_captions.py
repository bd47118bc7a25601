import json
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import cache, files, printed, write_images
from xlsd_cache.store.reader import LatentStore

Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def built(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of six images in two folders, and those; not to be written to."""
    root = tmp_path_factory.mktemp("built")
    names = ["x/a.png", "x/b.png", "x/c.png", "y/a.png", "y/d.png", "y/e.png"]
    write_images(root / "images", names, width=64, height=64)
    for i, name in enumerate(names):
        about = {"url": f"https://example.org/{i}", "caption": f"json {i}"}
        (root / "images" / name).with_suffix(".json").write_text(json.dumps(about))
    options = ("--out", root / "latents", "--vae", vae, "--resolution", 64)
    assert cache("build", root / "images", *options) == 0
    return root


@pytest.fixture
def latents(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built / "latents", tmp_path / "latents"))


def texts(store: Path, column: str) -> dict[str, str | None]:
    with LatentStore.open(store) as opened:
        columns = (opened.samples["key"].to_pylist(), opened.samples[column].to_pylist())
        return {key.removeprefix("images/"): text for key, text in zip(*columns, strict=True)}


def said(capsys: Out, column: str) -> str:
    """What the command last said of a column."""
    lines = [line for line in printed(capsys).splitlines() if line.startswith(f"{column}: ")]
    return lines[-1].removeprefix(f"{column}: ")


def test_sidecars_beside_the_images_are_matched_by_key(
    built: Path, latents: Path, tmp_path: Path, capsys: Out
) -> None:
    """A folder of captions alone, named like the images' own."""
    captions = tmp_path / "images"
    for name, text in {"x/a": "one", "x/b": "two", "y/a": "three", "y/none": "four"}.items():
        (captions / name).parent.mkdir(parents=True, exist_ok=True)
        (captions / f"{name}.moon").write_text(text)
    before = files(latents, "latents.zarr/**/*")
    assert cache("captions", latents, "--from", captions, "--columns", "moon") == 0
    assert said(capsys, "moon") == (
        "3 added, 0 changed, 0 kept; 3 images without one, 1 captions without an image"
    )
    assert texts(latents, "moon") == {
        "x/a.png": "one", "x/b.png": "two", "x/c.png": None, "y/a.png": "three", "y/d.png": None,
        "y/e.png": None,
    }  # fmt: skip
    assert texts(latents, "txt")["x/a.png"] == "picture 0"
    assert files(latents, "latents.zarr/**/*") == before
    assert cache("check", latents) == 0

    (captions / "x" / "a.moon").write_text("changed")
    (captions / "x" / "b.moon").unlink()
    (captions / "y" / "d.moon").write_text("new")
    assert (
        cache("captions", latents, "--from", captions, "--columns", "moon", "--clear-missing") == 0
    )
    assert said(capsys, "moon") == (
        "1 added, 1 changed, 1 kept, 1 cleared; 3 images without one, 1 captions without an image"
    )
    assert texts(latents, "moon") == {
        "x/a.png": "changed", "x/b.png": None, "x/c.png": None, "y/a.png": "three",
        "y/d.png": "new", "y/e.png": None,
    }  # fmt: skip


def test_where_keys_differ_stems_match_unless_ambiguous(
    latents: Path, tmp_path: Path, capsys: Out
) -> None:
    captions = tmp_path / "elsewhere"
    captions.mkdir()
    for stem in "abd":
        (captions / f"{stem}.txt").write_text(f"new {stem}")
    (captions / "again").mkdir()
    (captions / "again" / "d.txt").write_text("which d?")
    assert cache("captions", latents, "--from", captions, "--columns", "txt") == 0
    assert said(capsys, "txt") == (  # a is two images, d is two captions
        "0 added, 1 changed, 0 kept; 5 images without one, 3 captions without an image"
    )
    assert texts(latents, "txt")["x/b.png"] == "new b"
    assert texts(latents, "txt")["y/d.png"] == "picture 4"


def test_rows_match_by_path_key_and_url(built: Path, latents: Path, tmp_path: Path) -> None:
    rows = [
        {"file_name": "x/a.png", "wd": "by path"},
        {"key": "x/b", "wd": ["by", "key"]},
        {"key": "c", "wd": "by stem"},
        {"url": "https://example.org/3", "wd": "by url"},
        {"image": str(built / "images" / "y" / "d.png"), "wd": "by file"},
        {"url": "https://example.org/none", "wd": "lost"},
        {"key": "a", "wd": "ambiguous"},
    ]
    (tmp_path / "wd.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert cache("captions", latents, "--from", tmp_path / "wd.jsonl", "--columns", "jsonl:wd") == 0
    assert texts(latents, "jsonl:wd") == {
        "x/a.png": "by path", "x/b.png": "by, key", "x/c.png": "by stem", "y/a.png": "by url",
        "y/d.png": "by file", "y/e.png": None,
    }  # fmt: skip


def test_several_sources_and_columns_at_once(built: Path, latents: Path, tmp_path: Path) -> None:
    table = pa.table({"key": ["x/a", "x/b"], "text": ["table a", "table b"]})
    pq.write_table(table, tmp_path / "t.parquet")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(built / "images", ".")
    done = cache(
        "captions", latents, "--from", tmp_path / "images.tar", tmp_path / "t.parquet",
        "--columns", "json:caption,parquet:text",
    )  # fmt: skip
    assert done == 0
    assert texts(latents, "json:caption")["y/e.png"] == "json 5"
    assert texts(latents, "parquet:text")["x/b.png"] == "table b"
    with LatentStore.open(latents) as opened:
        assert opened.caption_columns == ("json:caption", "parquet:text", "txt")


def test_what_is_there_already_writes_nothing(built: Path, latents: Path, capsys: Out) -> None:
    before = files(latents, "**/*")
    command = ("captions", latents, "--from", built / "images", "--columns", "txt")
    assert cache(*command) == 0
    assert said(capsys, "txt").startswith("0 added, 0 changed, 6 kept")
    assert cache(*command[:-1], "json:caption", "--dry-run") == 0
    assert said(capsys, "json:caption").startswith("6 added")
    assert files(latents, "**/*") == before


def test_the_sums_of_the_last_build_stay(built: Path, latents: Path, capsys: Out) -> None:
    def told() -> dict[str, object]:
        capsys.readouterr()
        assert cache("info", latents, "--json") == 0
        value: dict[str, object] = json.loads(capsys.readouterr().out)
        return {name: value[name] for name in ("scanned", "encoded", "reused", "rejected")}

    before = told()
    command = ("captions", latents, "--from", built / "images", "--columns", "json:caption")
    assert cache(*command) == 0
    assert told() == before


def test_a_build_after_it_keeps_columns_that_it_does_not_read(
    built: Path, latents: Path, vae: Path
) -> None:
    images = built / "images"
    assert cache("captions", latents, "--from", images, "--columns", "json:caption") == 0
    assert cache("build", images, "--out", latents, "--vae", vae, "--resolution", 64) == 0
    assert texts(latents, "json:caption")["x/a.png"] == "json 0"


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ("moon", "no caption in .* belongs to an image"),
        ("tsv:a", "--columns 'tsv:a' cannot be a caption column"),
        ("key", "--columns 'key' cannot be a caption column"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_writes_nothing(
    built: Path, latents: Path, capsys: Out, columns: str, told: str
) -> None:
    before = files(latents, "**/*")
    assert cache("captions", latents, "--from", built / "images", "--columns", columns) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()  # after the log
    assert re.search(told, line)
    assert files(latents, "**/*") == before
    assert cache("captions", built, "--from", built / "images", "--columns", "txt") == 1
    assert "no latent store" in capsys.readouterr().err


def build(root: Path, vae: Path, *sources: Path, columns: str = "jsonl:text") -> None:
    options = ("--vae", vae, "--resolution", 64, "--captions", columns)
    assert cache("build", *sources, "--out", root / "latents", *options) == 0


def test_a_row_follows_its_image_when_that_is_renamed(vae: Path, tmp_path: Path) -> None:
    """Proved by content, in this build and in later ones, and by `captions`; never by the name."""
    images, store = tmp_path / "im", tmp_path / "latents"
    write_images(images, ["a.png", "b.png"], width=64, height=64)
    rows = [{"file_name": "a.png", "text": "of a"}, {"file_name": "b.png", "text": "of b"}]
    table = images / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    build(tmp_path, vae, images)
    (images / "a.png").rename(images / "moved.png")
    write_images(images / "sub", ["a.png"], first_seed=5, width=64, height=64)
    expected = {"im/moved.png": "of a", "im/b.png": "of b", "im/sub/a.png": None}
    for _ in range(2):
        build(tmp_path, vae, images)
        assert texts(store, "jsonl:text") == expected
    table.write_text(json.dumps({"file_name": "a.png", "text": "a again", "wd": "tag"}))
    assert cache("captions", store, "--from", images, "--columns", "jsonl:wd") == 0
    assert texts(store, "jsonl:wd") == {
        "im/moved.png": "tag",
        "im/b.png": None,
        "im/sub/a.png": None,
    }


def test_captions_of_a_source_that_moved_are_its_own_images(vae: Path, tmp_path: Path) -> None:
    """By key, for the store was built elsewhere; but not of another folder that is called so."""
    images, store = tmp_path / "here/im", tmp_path / "latents"
    write_images(images, ["a.png", "x/b.png"], width=64, height=64)
    build(tmp_path, vae, images, columns="txt")
    moved = Path(shutil.move(images, tmp_path / "there"))
    other = tmp_path / "other/im"
    write_images(other, ["a.png", "x/b.png"], first_seed=5, width=64, height=64)
    for folder, text in ((other, "another's"), (moved, "its own")):
        rows = [{"file_name": "a.png", "text": text}, {"key": "x/b", "text": text}]
        (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for name in ("a", "x/b"):
            (folder / f"{name}.moon").write_text(text)
    command = ("captions", store, "--columns", "jsonl:text,moon", "--from")
    assert cache(*command, other) == 1
    # the folder must be called as the source was, or lie elsewhere with captions alone
    shutil.rmtree(other)
    assert cache(*command, Path(shutil.move(moved, other))) == 0
    for column in ("jsonl:text", "moon"):
        assert texts(store, column) == {"im/a.png": "its own", "im/x/b.png": "its own"}


def test_captions_beside_one_source_say_nothing_of_another(vae: Path, tmp_path: Path) -> None:
    for name in "AB":
        write_images(tmp_path / name, ["1.png"], first_seed=ord(name), width=64, height=64)
    write_images(tmp_path / "B", ["2.png"], first_seed=9, width=64, height=64)
    build(tmp_path, vae, tmp_path / "A", tmp_path / "B", columns="none")
    (tmp_path / "A/2.moon").write_text("of an image that is gone")
    (tmp_path / "A/1.moon").write_text("A's")
    lines = [{"file_name": "1.png", "text": "A's"}, {"file_name": "2.png", "text": "gone"}]
    (tmp_path / "A/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = tmp_path / "latents"
    command = ("captions", store, "--from", tmp_path / "A", "--columns", "moon,jsonl:text")
    assert cache(*command) == 0
    for column in ("moon", "jsonl:text"):
        assert texts(store, column) == {"A/1.png": "A's", "B/1.png": None, "B/2.png": None}


def test_a_table_that_embeds_images_recaptions_those_alone(vae: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["0.png", "1.png"], width=64, height=64)
    data = [(tmp_path / "im" / f"{i}.png").read_bytes() for i in range(2)]

    def write(folder: str, images: list[bytes], said: list[str]) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": images, "text": said}), tmp_path / folder / "t.parquet")
        return tmp_path / folder / "t.parquet"

    first = write("one", data, ["a", "b"])
    build(tmp_path, vae, first, columns="parquet:text")
    store = tmp_path / "latents"
    keys = ["t.parquet/000000000", "t.parquet/000000001"]
    command = ("captions", store, "--columns", "parquet:text", "--from")
    assert cache(*command, write("two", data[::-1], ["wrong", "wrong"])) == 1  # of other images
    assert texts(store, "parquet:text") == dict(zip(keys, ["a", "b"], strict=True))
    assert cache(*command, write("two", data, ["new a", "new b"])) == 0  # the same, moved
    assert texts(store, "parquet:text") == dict(zip(keys, ["new a", "new b"], strict=True))


def test_a_table_that_cannot_be_read_takes_no_caption_away(vae: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "im", ["a.png", "b.png"], width=64, height=64)
    table, store = tmp_path / "im/metadata.csv", tmp_path / "latents"
    table.write_text("file_name,text\na.png,one\nb.png,two\n")
    build(tmp_path, vae, tmp_path / "im", columns="csv:text")
    table.write_bytes(b"")
    write_images(tmp_path / "im", ["c.png"], first_seed=7, width=64, height=64)
    (tmp_path / "im/more.csv").write_text("file_name,text\nc.png,three\n")
    build(tmp_path, vae, tmp_path / "im", columns="csv:text")
    assert texts(store, "csv:text") == {"im/a.png": "one", "im/b.png": "two", "im/c.png": "three"}
    table.write_text("file_name,text\na.png,one\n")
    build(tmp_path, vae, tmp_path / "im", columns="csv:text")
    assert texts(store, "csv:text") == {"im/a.png": "one", "im/b.png": None, "im/c.png": "three"}
