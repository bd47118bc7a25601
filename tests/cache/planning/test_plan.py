import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support import picture, write_images
from xlsd_cache.images.buckets import Buckets
from xlsd_cache.images.header import MAX_PIXELS
from xlsd_cache.outcomes import Reason, Rejected
from xlsd_cache.planning import probe as headers
from xlsd_cache.planning.log_state import CONTENT, LogState, former_names, read_log_state
from xlsd_cache.planning.plan import GenerationPlan, make_plan
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.schema import CAPTIONS, COMMIT, PLAN
from xlsd_cache.sources.scan import scan
from xlsd_cache.store.manifest import Manifest, ShardId

Entry = dict[str, Any]  # of PLAN
BUCKETS = Buckets.make("square", 64, 4.0, upscale=False)


def known(*entries: Entry, encoded: bool = True, texts: dict[str, str] | None = None) -> LogState:
    """The log after these entries, all of them committed or none, and `txt` captions."""
    placed = [entry for entry in entries if not entry["reason"]]
    content = [{name: entry[name] for name in CONTENT.names} for entry in placed]
    said = [{"key": key, "column": "txt", "text": text} for key, text in (texts or {}).items()]
    return LogState(
        pa.Table.from_pylist(list(entries), PLAN),
        pa.Table.from_pylist(content if encoded else [], CONTENT),
        {"64x64": 8} if placed else {},
        pa.Table.from_pylist(said, CAPTIONS),
    )


EMPTY_LOG = known()


def plan(
    folder: Path,
    before: LogState = EMPTY_LOG,
    staging: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    refused: dict[str, Rejected] | None = None,
    rehash: bool = False,
) -> GenerationPlan:
    """The plan of a folder; `refused` are the images that the scan rejects, by name."""
    found = scan((str(folder),), ("txt",))
    images = found.images
    why = [(refused or {}).get(key[3:]) for key in images["key"].to_pylist()]
    for name in ("reason", "detail"):
        column = pa.array([getattr(rejected, name, "") for rejected in why], pa.string())
        images = images.set_column(images.schema.get_field_index(name), name, column)
    return make_plan(
        images, found.captions, ("txt",), before, BUCKETS, 2, staging, max_pixels, rehash
    )


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


def by_key(made: GenerationPlan) -> dict[str, Entry]:
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


def test_rehash_tries_again_what_a_decoder_could_not(folder: Path) -> None:
    first = settled(folder)
    first[0]["reason"], first[1]["reason"] = "decoder_crashed", "corrupt"
    before = known(*first)
    assert not plan(folder, before).entries.num_rows
    (made,) = plan(folder, before, rehash=True).entries.to_pylist()
    assert (made["key"], made["reason"]) == (first[0]["key"], "")


def test_files_that_had_too_many_bytes_are_tried_again_when_they_have_not(folder: Path) -> None:
    first = settled(folder)
    first[0] |= {"reason": "too_many_bytes", "width": 0, "height": 0, "row": -1, "bucket": ""}
    (made,) = plan(folder, known(*first)).entries.to_pylist()
    assert (made["key"], made["reason"]) == (first[0]["key"], "")


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


MASK = Rejected("mask", "in/a.png is its image")


def test_what_the_scan_rejects_is_planned_so_unread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "open_source", None)  # reading any would raise
    every = dict.fromkeys(("a.png", "b.png", "c.png"), MASK)
    made = plan(folder, refused=every)
    assert [(e["reason"], e["detail"]) for e in made.entries.to_pylist()] == [
        ("mask", "in/a.png is its image")
    ] * 3
    assert {(e["bucket"], e["row"], e["content_hash"]) for e in made.entries.to_pylist()} == {
        ("", -1, "")
    }
    before = known(*made.entries.to_pylist())
    texts = known(
        *made.entries.to_pylist(),
        texts={f"in/{x}.png": f"picture {i}" for i, x in enumerate("abc")},
    )
    assert plan(folder, texts, refused=every).is_empty
    (folder / "b.png").chmod(0o600)
    assert not plan(folder, before, refused=every).entries.num_rows
    other = {**every, "b.png": Rejected("mask", "in/z.png is its image")}
    assert list(by_key(plan(folder, before, refused=other))) == ["b.png"]


def test_an_image_that_the_scan_takes_for_a_mask_and_back_keeps_its_latent(folder: Path) -> None:
    first = settled(folder)
    before = known(*first)
    made = plan(folder, before, refused={"b.png": MASK})
    (entry,) = made.entries.to_pylist()
    assert (entry["key"], entry["reason"], entry["row"]) == ("in/b.png", "mask", -1)
    assert made.leaving.to_pylist() == [{"key": "in/b.png", "reason": "mask"}]
    was = {e["key"]: e for e in first}
    now = known(*({**was, "in/b.png": entry}).values())
    now = replace(now, content=before.content)
    back = plan(folder, now)
    (entry,) = back.entries.to_pylist()
    assert entry == was["in/b.png"]
    assert not back.fresh.any()
    assert back.leaving.num_rows == 0


@pytest.mark.parametrize("reason", ["corrupt", "unsupported", "not_an_image", "mask"])
def test_a_verdict_of_the_scan_and_one_by_the_header_are_two(folder: Path, reason: Reason) -> None:
    """Whatever they are called: a member that could not be read, and a header that could not."""
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    by_scan = known(*plan(folder, refused={"a.png": Rejected(reason, "x")}).entries.to_pylist())
    by_header = plan(folder, by_scan)
    assert by_key(by_header)["a.png"]["reason"] == "corrupt"
    assert list(by_key(by_header)) == ["a.png"]
    rest = {e["key"]: e for e in by_scan.live.to_pylist()}
    entry = {**by_key(by_header)["a.png"], "reason": reason, "detail": "x"}
    before = known(*({**rest, "in/a.png": entry}).values())
    assert not plan(folder, before).entries.num_rows
    again = plan(folder, before, refused={"a.png": Rejected(reason, "x")})
    assert list(by_key(again)) == ["a.png"]


def test_only_what_was_trained_on_leaves_training(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    before = known(*settled(folder))
    for name in ("copy", "broken", "b"):
        (folder / f"{name}.png").unlink()
    (folder / "a.png").rename(folder / "renamed.png")
    made = plan(folder, before)
    assert len(made.removed) == 4
    assert made.leaving.to_pylist() == [{"key": "in/b.png", "reason": ""}]
    pending = known(*settled(folder), encoded=False)
    (folder / "c.png").unlink()
    assert plan(folder, pending).leaving.num_rows == 0


def test_an_original_whose_copy_stays_does_not_leave(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    before = known(*settled(folder))
    (folder / "a.png").unlink()
    made = plan(folder, before)
    assert (made.removed, made.leaving.num_rows) == (["in/a.png"], 0)


SMALL, LARGE = 64 * 64, 200 * 200


def test_images_over_the_limit_are_tried_again_when_it_is_raised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(folder, ["wide.png"], width=150, height=100)
    staging = tmp_path / "staging"
    staging.mkdir()
    first = plan(folder, EMPTY_LOG, staging, SMALL)
    assert {e["reason"] for e in first.entries.to_pylist()} == {"too_many_pixels"}
    assert "160x128 is over 0.004096 megapixels" in by_key(first)["a.png"]["detail"]
    raised = plan(folder, EMPTY_LOG, staging, 150 * 100)  # the headers are in the journal
    assert {k: e["reason"] for k, e in by_key(raised).items()} == {
        "a.png": "too_many_pixels", "b.png": "too_many_pixels", "c.png": "too_many_pixels",
        "wide.png": "",
    }  # fmt: skip
    before = known(*first.entries.to_pylist())
    assert by_key(plan(folder, before, max_pixels=150 * 100)).keys() == {"wide.png"}
    assert by_key(plan(folder, before, max_pixels=LARGE)).keys() == by_key(first).keys()
    monkeypatch.setattr(headers, "open_source", None)
    assert not plan(folder, before, max_pixels=10**4).entries.num_rows


def test_an_older_log_does_not_say_how_large_what_it_refused_was(folder: Path) -> None:
    entries = [
        {**e, "reason": "too_many_pixels", "width": 0, "height": 0, "bucket": "", "row": -1}
        for e in plan(folder).entries.to_pylist()
    ]
    before = known(*entries)
    assert not plan(folder, before).entries.num_rows
    raised = plan(folder, before, max_pixels=MAX_PIXELS + 1)
    assert [e["reason"] for e in raised.entries.to_pylist()] == [""] * 3


def test_a_lowered_limit_throws_out_nothing_that_is_encoded(folder: Path) -> None:
    before = known(*settled(folder))
    assert not plan(folder, before, max_pixels=SMALL).entries.num_rows
    rows = {e["key"]: e["row"] for e in before.live.to_pylist()}
    os.utime(folder / "a.png", ns=(1, 1))
    (folder / "b.png").rename(folder / "renamed.png")
    write_images(folder, ["new.png"], first_seed=30)
    made = by_key(plan(folder, before, max_pixels=SMALL))
    assert {key: (e["reason"], e["row"]) for key, e in made.items()} == {
        "a.png": ("", rows["in/a.png"]), "renamed.png": ("", rows["in/b.png"]),
        "new.png": ("too_many_pixels", -1),
    }  # fmt: skip
    assert (made["renamed.png"]["width"], made["renamed.png"]["height"]) == (160, 128)


def test_former_names_give_what_was_encoded_under_them(tmp_path: Path) -> None:
    """Over all generations: renamed, removed, changed and duplicate images, moved sources."""
    folder, manifest = tmp_path / "in", Manifest(tmp_path / "latents")
    manifest.make_folders()

    def generation(number: int) -> None:
        made = plan(folder, read_log_state(manifest, 4))
        manifest.write_plan(number, made.entries, made.removed, made.captions)
        live = {f"in/{p.name}": sha256(p.read_bytes()) for p in folder.glob("*.png")}
        commit_all(manifest, number, live)

    write_images(folder, ["a.png", "b.png", "gone.png"])
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    hashes = {p.stem: sha256(p.read_bytes()) for p in folder.glob("*.png")}
    generation(0)
    (folder / "gone.png").unlink()
    write_images(folder, ["b.png"], first_seed=40)
    changed = sha256((folder / "b.png").read_bytes())
    generation(1)
    for name in ("a", "b", "copy"):
        (folder / f"{name}.png").rename(folder / f"new-{name}.png")
    present = scan((str(folder),), ()).images["key"].combine_chunks()
    found = former_names(manifest, 4, present)  # before they are planned
    assert {(e["key"], e["content_hash"]) for e in found.to_pylist()} == {
        ("in/a.png", hashes["a"]), ("in/copy.png", hashes["a"]), ("in/b.png", changed),
        ("in/gone.png", hashes["gone"]),
    }  # fmt: skip
    assert {e["source"] for e in found.to_pylist()} == {
        str(folder / f"{name}.png") for name in ("a", "b", "copy", "gone")
    }
    generation(2)
    assert former_names(manifest, 4, present).sort_by("key").equals(found.sort_by("key"))
    assert former_names(Manifest(tmp_path / "none"), 4, present).num_rows == 0


NAMES = ["a.png", "b.png", "sub/a.png", "sub/c.png"]
STEPS = st.lists(
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3), min_size=1), min_size=1, max_size=4
)


@settings(max_examples=25)
@given(steps=STEPS, encoding=st.lists(st.booleans(), min_size=4, max_size=4), alike=st.booleans())
def test_whatever_files_become_every_name_has_its_contents_latent(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[dict[str, int]],
    encoding: list[bool],
    alike: bool,
) -> None:
    """Generations of any files; after some of them everything planned is encoded.

    Where they are `alike`, all have the same size and mtime, whatever they hold.
    """
    root = tmp_path_factory.mktemp("steps")
    manifest = Manifest(root / "latents")
    manifest.make_folders()
    encoded: dict[tuple[str, int], str] = {}  # place -> content, once for ever
    for number, (files, encode) in enumerate(zip(steps, encoding, strict=False)):
        folder = root / str(number) / "in"
        for name, content in files.items():
            write_images(folder, [name], first_seed=content, width=64, height=64)
            if alike:
                pixels = Image.fromarray(picture(content, 64, 64))
                pixels.save(folder / name, format="BMP")
                os.utime(folder / name, ns=(1, 1))
        made = plan(folder, read_log_state(manifest, 4))
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
        again = plan(folder, read_log_state(manifest, 4))
        assert again.is_empty, again.entries.to_pylist()
        if encode:
            encoded |= commit_all(manifest, number, contents)


def commit_all(
    manifest: Manifest, generation: int, contents: dict[str, str]
) -> dict[tuple[str, int], str]:
    """Commit records as a build writes them; what was overtaken before its turn is rejected."""
    units: dict[ShardId, list[Entry]] = {}
    live = {entry["key"]: entry for entry in manifest.live(generation).to_pylist()}
    encoded = {}
    for entry in manifest.planned(generation).to_pylist():
        unit = ShardId(entry["bucket"], entry["row"] // 4)
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
