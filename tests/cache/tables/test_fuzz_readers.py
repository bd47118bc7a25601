"""Any dataset, cache or store from elsewhere is read, or refused with one error.

A valid file of each format with bytes changed, cut and doubled, and JSON of any shape. Images are
in images/test_fuzz.py, since their decoders are C and run in processes of their own.
"""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.support.stores import IDENTITY
from xlsd_cache.archives.reader import read_members
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column, field_text, read_object, read_text
from xlsd_cache.files.uri import read_source
from xlsd_cache.interop.cache_files import CacheFile, list_caches
from xlsd_cache.interop.crops import add_crops
from xlsd_cache.interop.formats import CachedLatent, peek
from xlsd_cache.interop.formats import read as read_latent
from xlsd_cache.outcomes import Rejected
from xlsd_cache.schema import CAPTIONS, COMMIT, PLAN, REMOVED
from xlsd_cache.sources.records import Search, Tally, archive_records, given_table, row_records
from xlsd_cache.store.identity import attributes_of, read_attributes
from xlsd_cache.store.index import Snapshot, cached_snapshot, save_snapshot
from xlsd_cache.store.log_files import read_log
from xlsd_cache.store.shard import CorruptShard, ShardReader, index_of, read_journal
from xlsd_cache.store.tag_index import Tags
from xlsd_cache.tables.row_outcomes import Table

FEW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
COLUMNS = tuple(map(Column.parse, ("jsonl:text", "csv:text", "parquet:text", "arrow:text")))
SEARCH = Search(lambda name: name.endswith(".jpg"), frozenset(["txt"]), COLUMNS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["text", "file_name", "key", "url", "attributes", "identity", "0", "a.jpg"]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What changes bytes, leaves parts out, doubles them, or cuts the end off, anywhere."""
    changes = draw(
        st.lists(
            st.tuples(
                st.floats(0, 1),
                st.sampled_from([1, 2, 4, 8, 40]),
                st.sampled_from(["flip", "zero", "ones", "cut", "double", "drop"]),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def damaged(valid: bytes) -> bytes:
        data = bytearray(valid)
        for where, count, how in changes:
            at = int(where * len(data))
            end = min(len(data), at + count)
            match how:
                case "flip" if at < end:
                    data[at] ^= 1 << (count % 8)
                case "zero" | "ones":
                    data[at:end] = (b"\0" if how == "zero" else b"\xff") * (end - at)
                case "cut":
                    del data[max(at, 1) :]
                case "double":
                    data[at:at] = data[at:end]
                case "drop":
                    del data[at:end]
        return bytes(data)

    return damaged


def a_tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("a.jpg", b"x" * 600), ("a.txt", b"one"), ("é" * 60 + ".jpg", b"y")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def a_zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.jpg", b"x" * 600)
        file.writestr("a.txt", b"one")
    return made.getvalue()


ROWS = pa.table(
    {
        "image": pa.array(
            [{"bytes": b"x" * 40, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}]
        ),
        "text": ["one", "two"],
        "tags": [["a", "b"], None],
    }
)


def a_parquet(table: pa.Table = ROWS) -> bytes:
    made = io.BytesIO()
    pq.write_table(table, made)
    return made.getvalue()


def an_arrow(table: pa.Table = ROWS) -> bytes:
    made = io.BytesIO()
    with pa.ipc.new_file(made, table.schema) as writer:
        writer.write_table(table)
    return made.getvalue()


LINES = b'{"file_name": "a.jpg", "text": "one"}\n{"file_name": "../b.jpg", "text": ["t", "u"]}\n'
TABLES = {
    "r.jsonl": LINES,
    "r.jsonl.gz": gzip.compress(LINES),
    "r.json": b"[" + LINES.replace(b"\n", b",", 1) + b"]",
    "r.csv": b'file_name,text\na.jpg,"one, two"\n"b.jpg",three\n',
    "r.parquet": a_parquet(),
    "r.arrow": an_arrow(),
}
ARCHIVES = {"a.tar": a_tar(), "a.tar.gz": gzip.compress(a_tar()), "a.zip": a_zip()}


def rows_of(file: Path) -> None:
    """Read a table as a source: every row's image, every caption, every cell."""
    tally = Tally()
    table = given_table("s", file, SEARCH, tally)
    if table is None:
        assert tally.damaged
        return
    for record in row_records(table, tally):
        assert isinstance(record.key, str)
        read(record.source)
    for texts in table.rows.captions.values():
        texts.to_pylist()


def read(source: str) -> None:
    with suppress(OSError):  # BadSource among them
        read_source(source, 2**20)


@pytest.mark.parametrize("name", TABLES)
@FEW
@given(damaged=damage())
def test_a_damaged_table_gives_rows_or_a_sentence(
    tmp_path: Path, name: str, damaged: Callable[[bytes], bytes]
) -> None:
    (tmp_path / name).write_bytes(damaged(TABLES[name]))
    rows_of(tmp_path / name)


@FEW
@given(values=st.lists(JSON, max_size=4), name=st.sampled_from(["r.jsonl", "r.json"]))
def test_json_of_any_shape_gives_rows_or_a_sentence(
    tmp_path: Path, values: list[Any], name: str
) -> None:
    text = json.dumps(values) if name == "r.json" else "\n".join(map(json.dumps, values))
    (tmp_path / name).write_text(text)
    rows_of(tmp_path / name)
    for value in values:
        told, _ = field_text(value, "text.0.a")
        told.encode()


@pytest.mark.parametrize("name", ARCHIVES)
@FEW
@given(damaged=damage())
def test_a_damaged_archive_gives_members_or_a_sentence(
    tmp_path: Path, name: str, damaged: Callable[[bytes], bytes]
) -> None:
    (tmp_path / name).write_bytes(damaged(ARCHIVES[name]))
    try:
        read_members(tmp_path / name, SEARCH)
    except UserError:
        return
    for record in archive_records("s", tmp_path / name, SEARCH, Tally()):
        record.sidecar("txt")
        read(record.source)


@FEW
@given(data=st.binary(max_size=60))
def test_any_bytes_beside_an_image_give_a_caption_or_a_remark(data: bytes) -> None:
    text, said = read_text(data)
    assert text or said
    read_object(data)


def an_npz() -> bytes:
    made = io.BytesIO()
    np.savez(made, latents=np.zeros((4, 8, 8), np.float32), original_size=np.array([64, 64]))
    return made.getvalue()


def a_pt() -> bytes:
    made = io.BytesIO()
    told = {"latent_image": torch.zeros(4, 8, 8), "original_resolution": (64, 64)}
    torch.save(told, made)
    return made.getvalue()


METADATA = {"latent_space_version": "1", "crop_x": "1", "scale_to_width": "9", "filename": "a.jpg"}
LATENTS = {
    "a.npz": an_npz(),
    "a.pt": a_pt(),
    "a.safetensors": save({"latent": torch.zeros(4, 8, 8)}, METADATA),
}


@pytest.mark.parametrize("name", LATENTS)
@FEW
@given(damaged=damage())
def test_a_damaged_cache_file_gives_latents_or_a_reason(
    tmp_path: Path, name: str, damaged: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(damaged(LATENTS[name]))
    file = CacheFile("kohya", path, "s/a", "", path.stat().st_size, 0)
    told = peek(file)
    for held in told if isinstance(told, list) else []:
        assert isinstance(held, CachedLatent)
        if len(held.shape) == 3 and max(held.shape) < 4096:  # others are never read
            assert isinstance(read_latent(file, held), np.ndarray | Rejected)


@FEW
@given(value=JSON)
def test_an_index_of_a_cache_gives_names_or_a_sentence(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a.npz").write_bytes(b"")
    (tmp_path / "cache.json").write_text(json.dumps({"entries": value}))
    (tmp_path / "aspect_ratio_bucket_metadata_x.json").write_text(json.dumps(value))
    for read_it in (lambda: list_caches((tmp_path,)), lambda: add_crops([], [tmp_path])):
        try:
            read_it()
        except UserError:
            continue


def put_json(root: Path, told: Any) -> None:
    (root / "latents.zarr").mkdir(exist_ok=True)
    (root / "latents.zarr" / "zarr.json").write_text(json.dumps(told))


@FEW
@given(field=st.sampled_from(sorted(asdict(IDENTITY))), value=JSON, rows=JSON)
def test_odd_metadata_gives_an_identity_or_a_sentence(
    tmp_path: Path, field: str, value: Any, rows: Any
) -> None:
    for told in ({"identity": {**asdict(IDENTITY), field: value}}, {"rows_per_shard": rows}):
        put_json(tmp_path, {"attributes": attributes_of(IDENTITY, 256) | told})
        try:
            identity, count = read_attributes(tmp_path)
        except UserError:
            continue
        assert type(count) is int
        assert 0 < count <= 2**20
        assert 0 < identity.channels <= 64


@FEW
@given(value=JSON)
def test_metadata_of_any_shape_gives_a_sentence(tmp_path: Path, value: Any) -> None:
    put_json(tmp_path, value)
    with pytest.raises(UserError):
        read_attributes(tmp_path)


def log_line(bucket: str = "64x64", row: int = 0) -> dict[str, Any]:
    crop = [0.0, 0.0, 64.0, 64.0]
    return {"key": f"s/{row}.jpg", "source": "/s/0.jpg", "size": 9, "mtime_ns": 9, "width": 64,
            "height": 64, "crop": crop, "bucket": bucket, "row": row, "content_hash": "",
            "reason": "", "detail": ""}  # fmt: skip


COMMITTED = {"row": 0, "key": "k", "status": "encoded"}
LOG = {
    "plan": (PLAN, a_parquet(pa.Table.from_pylist([log_line(), log_line(row=1)], PLAN))),
    "commit": (COMMIT, a_parquet(pa.Table.from_pylist([COMMITTED], COMMIT))),
    "captions": (CAPTIONS, a_parquet(pa.table([["k"], ["txt"], ["one"]], schema=CAPTIONS))),
    "removed": (REMOVED, a_parquet(pa.table([["k"]], schema=REMOVED))),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOG)
@FEW
@given(damaged=damage())
def test_a_damaged_log_gives_a_table_or_a_sentence(
    tmp_path: Path, kind: str, damaged: Callable[[bytes], bytes]
) -> None:
    schema, valid = LOG[kind]
    path = tmp_path / "manifest" / kind / "000000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damaged(valid))
    try:
        table = read_log(path, schema.names)
    except UserError:
        return
    assert table.schema == schema
    table.to_pylist()


def samples() -> Snapshot:
    columns = {name: [value] * 3 for name, value in log_line().items()}
    columns |= {"row": [0, 1, 2], "crc32c": [1, 2, 3], "txt": ["woman, red", "man", None]}
    order = "key source width height crop bucket row content_hash crc32c txt".split()
    fields = {field.name: field.type for field in (*PLAN, *COMMIT)} | {"txt": pa.string()}
    table = pa.table({name: pa.array(columns[name], fields[name]) for name in order})
    return Snapshot(0, table, {"64x64": (0, 3)}, 0, "f")


@FEW
@given(damaged=damage())
def test_a_damaged_index_is_right_or_not_used(
    tmp_path: Path, damaged: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "staging").mkdir(exist_ok=True)
    save_snapshot(tmp_path, samples())
    path = tmp_path / "index.arrow"
    assert cached_snapshot(tmp_path, 0) is not None
    path.write_bytes(damaged(path.read_bytes()))
    view = cached_snapshot(tmp_path, 0)
    if view is not None:
        view.samples.to_pylist()
        tags = Tags(tmp_path, "txt", view.samples["txt"], "f")
        tags.counts(5)
        path = tmp_path / "tags.txt.arrow"
        path.write_bytes(damaged(path.read_bytes()))
        tags = Tags(tmp_path, "txt", view.samples["txt"], "f")
        for name in tags.counts():
            assert all(0 <= row < 3 for row in tags.samples(name))


@FEW
@given(damaged=damage(), lines=st.lists(JSON, max_size=3))
def test_a_damaged_shard_or_journal_gives_rows_or_none(
    tmp_path: Path, damaged: Callable[[bytes], bytes], lines: list[Any]
) -> None:
    path = tmp_path / "c.0.0.0.0"
    path.write_bytes(damaged(b"x" * 40 + index_of([0, 1], 4, 16)))
    out = np.empty(16, np.uint8)
    try:
        reader = ShardReader(path, 4, 16)
        for slot in range(4):
            reader.read_into(slot, out)
    except CorruptShard:
        pass
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_journal(path) == {}


def test_what_is_not_damaged_is_read(tmp_path: Path) -> None:
    """The files above are of the formats that they stand for."""
    for name, data in (TABLES | ARCHIVES).items():
        (tmp_path / name).write_bytes(data)
    for name in TABLES:
        table = given_table("s", tmp_path / name, SEARCH, Tally())
        assert isinstance(table, Table)
        assert len(table.rows) == 2
    for name in ARCHIVES:
        assert read_members(tmp_path / name, SEARCH).members[0].name == "a.jpg"
    for name, data in LATENTS.items():
        (tmp_path / name).write_bytes(data)
        (held,) = peek(CacheFile("kohya", tmp_path / name, "s/a", "", 1, 0))  # type: ignore[misc]
        assert held.shape == (4, 8, 8)
