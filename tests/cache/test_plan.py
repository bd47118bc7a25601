import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support import picture, write_images
from xlsd_cache.buckets import Buckets
from xlsd_cache.durable import write_parquet
from xlsd_cache.known import CONTENT, NOTHING, Known, read_known
from xlsd_cache.manifest import CAPTIONS, COMMIT, PLAN, Manifest, Unit
from xlsd_cache.plan import Entry, Plan, make_plan
from xlsd_cache.sources import scan

BUCKETS = Buckets.make("square", 64, 4.0, upscale=False)


def known(*entries: Entry, encoded: bool = True, texts: dict[str, str] | None = None) -> Known:
    """The log after these entries, all of them committed or none, and `txt` captions."""
    placed = [entry for entry in entries if not entry["reason"]]
    content = [{name: entry[name] for name in CONTENT.names} for entry in placed]
    said = [{"key": key, "column": "txt", "text": text} for key, text in (texts or {}).items()]
    return Known(
        pa.Table.from_pylist(list(entries), PLAN),
        pa.Table.from_pylist(content if encoded else [], CONTENT),
        {"64x64": 8} if placed else {},
        pa.Table.from_pylist(said, CAPTIONS),
    )


def plan(folder: Path, before: Known = NOTHING, staging: Path | None = None) -> Plan:
    found = scan((str(folder),), ("txt",))
    return make_plan(found.images, found.captions, ("txt",), before, BUCKETS, 2, staging)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "in", ["a.png", "b.png", "c.png"])
    return tmp_path / "in"


def settled(folder: Path) -> list[Entry]:
    """The entries of a first planning, with the hashes that encoding adds."""
    return [
        {**entry, "content_hash": hashlib.sha256(Path(entry["source"]).read_bytes()).hexdigest()}
        for entry in plan(folder).entries.to_pylist()
    ]


def by_key(made: Plan) -> dict[str, Entry]:
    return {entry["key"].removeprefix("in/"): entry for entry in made.entries.to_pylist()}


def test_a_first_plan_places_every_image_in_a_row_of_its_own(folder: Path) -> None:
    made = plan(folder)
    assert [set(entry) for entry in made.entries.to_pylist()] == [set(PLAN.names)] * 3
    assert sorted(entry["row"] for entry in made.entries.to_pylist()) == [0, 1, 2]
    assert {entry["bucket"] for entry in made.entries.to_pylist()} == {"64x64"}
    assert made.removed == []
    assert made.captions.num_rows == 3


def test_rows_look_random_and_are_always_the_same(tmp_path: Path) -> None:
    write_images(tmp_path / "in", [f"{i:03d}.png" for i in range(40)], width=64, height=64)
    rows = [
        entry["row"]
        for entry in sorted(plan(tmp_path / "in").entries.to_pylist(), key=lambda e: e["key"])
    ]
    assert sorted(rows) == list(range(40))
    assert sum(a < b for a, b in itertools.pairwise(rows)) < 30
    again = [
        entry["row"]
        for entry in sorted(plan(tmp_path / "in").entries.to_pylist(), key=lambda e: e["key"])
    ]
    assert again == rows


def test_nothing_new_gives_an_empty_plan(folder: Path) -> None:
    texts = {f"in/{x}.png": f"picture {i}" for i, x in enumerate("abc")}
    made = plan(folder, known(*settled(folder), texts=texts))
    assert made.is_empty


def test_new_and_changed_images_start_a_shard_and_removed_ones_go(folder: Path) -> None:
    before = known(*settled(folder))
    write_images(folder, ["new.png", "b.png"], first_seed=10)
    (folder / "c.png").unlink()
    made = plan(folder, before)
    assert {key: entry["row"] >= 8 for key, entry in by_key(made).items()} == {
        "new.png": True, "b.png": True
    }  # fmt: skip
    assert made.removed == ["in/c.png"]


def test_renamed_touched_and_returning_images_keep_their_latent(folder: Path) -> None:
    first = settled(folder)
    rows = {entry["key"].removeprefix("in/"): entry["row"] for entry in first}
    (folder / "a.png").rename(folder / "renamed.png")
    os.utime(folder / "b.png", ns=(1, 1))
    returned = known(*first)
    here = pc.not_equal(returned.live["key"], "in/c.png")  # removed earlier, and now back
    returned = replace(returned, live=returned.live.filter(here))
    made = plan(folder, returned)
    assert {key: entry["row"] for key, entry in by_key(made).items()} == {
        "renamed.png": rows["a.png"], "b.png": rows["b.png"], "c.png": rows["c.png"]
    }  # fmt: skip
    assert made.removed == ["in/a.png"]


def test_duplicates_are_placed_once_and_promoted_when_their_original_goes(folder: Path) -> None:
    (folder / "z.png").write_bytes((folder / "a.png").read_bytes())
    first = plan(folder)
    copy = by_key(first)["z.png"]
    assert (copy["reason"], copy["detail"], copy["bucket"]) == ("duplicate", "in/a.png", "")
    rows = {entry["key"]: entry["row"] for entry in first.entries.to_pylist()}
    before = known(*settled(folder))
    assert not plan(folder, before).entries.num_rows
    (folder / "a.png").unlink()
    made = plan(folder, before)
    assert by_key(made)["z.png"]["row"] == rows["in/a.png"]
    assert by_key(made)["z.png"]["reason"] == ""


def test_a_copy_of_an_image_that_is_planned_and_not_encoded_yet_is_a_duplicate(
    folder: Path,
) -> None:
    before = known(*plan(folder).entries.to_pylist(), encoded=False)
    (folder / "z.png").write_bytes((folder / "b.png").read_bytes())
    (made,) = plan(folder, before).entries.to_pylist()
    assert (made["key"], made["reason"], made["detail"]) == ("in/z.png", "duplicate", "in/b.png")


def test_a_moved_source_folder_changes_only_where_images_are(folder: Path) -> None:
    before = known(*settled(folder))
    moved = folder.parent / "there" / "in"
    moved.parent.mkdir()
    folder.rename(moved)
    live = {entry["key"]: entry for entry in before.live.to_pylist()}
    for entry in plan(moved, before).entries.to_pylist():
        old = live[entry["key"]]
        assert entry == {**old, "source": str(moved / Path(entry["key"]).name)}


def test_what_cannot_be_placed_has_its_reason_in_the_plan(folder: Path) -> None:
    write_images(folder, ["small.png"], width=40, height=40)
    Image.fromarray(picture(1, 64, 640)).save(folder / "long.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / os.fsdecode(b"latin-\xe9.png")).write_bytes((folder / "a.png").read_bytes())
    reasons = {key: entry["reason"] for key, entry in by_key(plan(folder)).items()}
    assert reasons == {
        "a.png": "", "b.png": "", "c.png": "", "small.png": "too_small",
        "long.png": "too_elongated", "broken.jpg": "not_an_image", "latin-\\udce9.png": "bad_name",
    }  # fmt: skip


def test_images_that_failed_for_a_passing_reason_are_tried_again(folder: Path) -> None:
    first = settled(folder)
    for entry, reason in zip(first, ("vanished", "changed", "corrupt"), strict=True):
        entry["reason"] = reason
    made = plan(folder, known(*first))
    assert {entry["key"] for entry in made.entries.to_pylist()} == {
        first[0]["key"],
        first[1]["key"],
    }
    assert all(entry["reason"] == "" for entry in made.entries.to_pylist())


def test_only_captions_that_changed_are_written(folder: Path) -> None:
    texts = {f"in/{x}.png": f"picture {i}" for i, x in enumerate("abc")}
    before = known(*settled(folder), texts=texts)
    (folder / "a.txt").write_text("new")
    (folder / "b.txt").unlink()
    made = plan(folder, before)
    assert made.captions.to_pylist() == [
        {"key": "in/a.png", "column": "txt", "text": "new"},
        {"key": "in/b.png", "column": "txt", "text": ""},
    ]


NAMES = ["a.png", "b.png", "sub/a.png", "sub/c.png"]
STEPS = st.lists(
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3), min_size=1), min_size=1, max_size=4
)


@settings(max_examples=25)
@given(steps=STEPS, encoding=st.lists(st.booleans(), min_size=4, max_size=4))
def test_whatever_files_become_every_name_has_its_contents_latent(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, int]], encoding: list[bool]
) -> None:
    """Generations of any files; after some of them everything planned is encoded."""
    root = tmp_path_factory.mktemp("steps")
    manifest = Manifest(root / "latents")
    manifest.make_folders()
    encoded: dict[tuple[str, int], str] = {}  # place -> content, once for ever
    for number, (files, encode) in enumerate(zip(steps, encoding, strict=False)):
        folder = root / str(number) / "in"
        for name, content in files.items():
            write_images(folder, [name], first_seed=content, width=64, height=64)
        made = plan(folder, read_known(manifest, 4))
        manifest.write_plan(number, made.entries, made.removed, made.captions)
        live = {entry["key"]: entry for entry in manifest.live(number).to_pylist()}
        assert live.keys() == {f"in/{name}" for name in files}
        contents = {f"in/{name}": sha256((folder / name).read_bytes()) for name in files}
        placed = {key: (e["bucket"], e["row"]) for key, e in live.items() if not e["reason"]}
        assert len(set(placed.values())) == len(placed)
        for key, entry in live.items():
            if entry["reason"]:
                assert entry["reason"] == "duplicate"
                assert entry["detail"] in placed
                assert contents[entry["detail"]] == contents[key]
            else:
                assert encoded.get(placed[key], contents[key]) == contents[key]
        assert len({contents[key] for key in placed}) == len(placed)
        again = plan(folder, read_known(manifest, 4))
        assert again.is_empty, again.entries.to_pylist()
        if encode:
            encoded |= commit_all(manifest, number, contents)


def commit_all(
    manifest: Manifest, generation: int, contents: dict[str, str]
) -> dict[tuple[str, int], str]:
    """Commit records as a build writes them; what was overtaken before its turn is rejected."""
    units: dict[Unit, list[Entry]] = {}
    live = {entry["key"]: entry for entry in manifest.live(generation).to_pylist()}
    encoded = {}
    for entry in manifest.planned(generation).to_pylist():
        unit = Unit(entry["bucket"], entry["row"] // 4)
        if unit in manifest.committed():
            continue
        now = live.get(entry["key"])
        alive = now is not None and (now["bucket"], now["row"]) == (entry["bucket"], entry["row"])
        row = {
            "row": entry["row"], "key": entry["key"], "detail": "", "crc32c": 0 if alive else None,
            "content_hash": contents[entry["key"]] if alive else "",
            "status": "encoded" if alive else "rejected", "reason": "" if alive else "removed",
        }  # fmt: skip
        units.setdefault(unit, []).append(row)
        if alive:
            encoded[entry["bucket"], entry["row"]] = contents[entry["key"]]
    for unit, rows in units.items():
        write_parquet(manifest.commit(unit), pa.Table.from_pylist(rows, COMMIT))
    return encoded


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
