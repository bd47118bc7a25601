"""Which image goes where: the scan compared with the log, written down as the next generation."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from xlsd_cache.buckets import Buckets, Placement
from xlsd_cache.decode import Rejected, read_size
from xlsd_cache.manifest import CAPTIONS, Manifest
from xlsd_cache.sources import Record

RETRIED = frozenset({"vanished", "unreadable", "changed"})  # the moment's fault, not the image's
Entry = dict[str, Any]  # one row of manifest.PLAN


@dataclass(frozen=True)
class Plan:
    """The next generation, not yet written."""

    entries: list[Entry]  # of images that are new, changed, moved, renamed, rejected or duplicates
    removed: list[str]  # keys that the scan no longer found
    captions: pa.Table  # what changed of them

    @property
    def is_empty(self) -> bool:
        """Whether the log already says what the scan found."""
        return not (self.entries or self.removed or self.captions.num_rows)


@dataclass(frozen=True)
class Known:
    """What the log says, for planning."""

    live: dict[str, Entry]  # key -> entry, its content_hash and reason as committed
    content: dict[str, Entry]  # content hash -> the entry of its good latent, live or not
    next_rows: dict[str, int]  # bucket -> the first row of its next shard
    captions: dict[tuple[str, str], str]  # (key, column) -> text


def read_known(manifest: Manifest, rows_per_shard: int) -> Known:
    """Fold the whole log into dictionaries; an empty store gives empty ones."""
    generation = max(manifest.generations(), default=-1)
    committed = manifest.commits(manifest.committed())
    outcome = {(row["bucket"], row["row"]): row for row in committed.to_pylist()}
    live = {entry["key"]: entry for entry in manifest.live(generation).to_pylist()}
    for entry in live.values():
        row = outcome.get((entry["bucket"], entry["row"]))
        if row is not None:
            entry["content_hash"] = row["content_hash"] or entry["content_hash"]
            entry["reason"], entry["detail"] = row["reason"], row["detail"]
    damaged = {(row["bucket"], row["row"]) for row in manifest.damaged(generation).to_pylist()}
    content: dict[str, Entry] = {}
    next_rows: dict[str, int] = defaultdict(int)
    for entry in manifest.planned(generation).to_pylist():
        end = (entry["row"] // rows_per_shard + 1) * rows_per_shard
        next_rows[entry["bucket"]] = max(next_rows[entry["bucket"]], end)
        place = entry["bucket"], entry["row"]
        row = outcome.get(place)
        if row is None or row["status"] != "encoded" or place in damaged:
            continue
        if row["content_hash"]:  # unknown where a lost commit record was mended
            content[row["content_hash"]] = entry
    texts = manifest.captions(generation).to_pylist()
    captions = {(row["key"], row["column"]): row["text"] for row in texts}
    return Known(live, content, next_rows, captions)


def make_plan(
    records: list[Record], known: Known, buckets: Buckets, columns: tuple[str, ...], workers: int
) -> Plan:
    """What brings the log up to what the scan found.

    A file whose size and mtime are as logged counts as unchanged. Any other is told by its
    content: encoded before, it keeps that latent under its new name; equal to a live image, it is
    a duplicate; else it gets a row of its own behind its bucket's last shard.
    """
    unsettled = [record for record in records if not _settled(record, known.live.get(record.key))]
    changed = {record.key for record in unsettled}
    settled = [known.live[record.key] for record in records if record.key not in changed]
    sizes = _read_sizes(unsettled, workers)
    hashes = _read_hashes(records, unsettled, known, workers)
    claims = {hashes.get(e["key"]) or e["content_hash"]: e["key"] for e in settled if e["bucket"]}
    claims.pop("", None)
    entries = [
        {**entry, "source": str(record.path)}
        for record, entry in ((r, known.live[r.key]) for r in records if r.key not in changed)
        if entry["source"] != str(record.path)  # the source folder moved
    ]
    fresh: list[Entry] = []
    for record in unsettled:
        content_hash = hashes.get(record.key, "")
        entry = _entry(record, sizes[record.key], content_hash, buckets)
        if not entry["reason"] and content_hash in claims:
            original = claims[content_hash]
            entry |= {"bucket": "", "reason": "duplicate", "detail": original}
        elif not entry["reason"]:
            claims |= {content_hash: record.key} if content_hash else {}
            if content_hash in known.content:
                latent = known.content[content_hash]
                entry |= {name: latent[name] for name in ("bucket", "row", "crop")}
            else:
                fresh.append(entry)
                continue
        if entry != known.live.get(record.key):
            entries.append(entry)
    _give_rows(fresh, known.next_rows)
    removed = sorted(known.live.keys() - {record.key for record in records})
    return Plan(entries + fresh, removed, _caption_changes(records, columns, known.captions))


def _settled(record: Record, entry: Entry | None) -> bool:
    """Whether the log's word on this file still stands."""
    return (
        entry is not None
        and (entry["size"], entry["mtime_ns"]) == (record.size, record.mtime_ns)
        and entry["reason"] not in RETRIED
        and entry["reason"] != "duplicate"  # its original may be gone
    )


def _read_sizes(records: list[Record], workers: int) -> dict[str, tuple[int, int] | Rejected]:
    with ThreadPoolExecutor(workers) as pool:
        sizes = pool.map(lambda record: read_size(record.path), records)
        shown = tqdm(sizes, "reading headers", len(records), unit="file", disable=len(records) < 99)
        return dict(zip((record.key for record in records), shown, strict=True))


def _read_hashes(
    records: list[Record], unsettled: list[Record], known: Known, workers: int
) -> dict[str, str]:
    """Content hashes of the unsettled files that can equal anything, and of what they can equal.

    Equal files have equal sizes, so a file with a size of its own is not read twice.
    """
    changed = {record.key for record in unsettled}
    have = Counter(record.size for record in unsettled)
    have.update({entry["size"] for entry in known.content.values()})
    have.update({entry["size"] for key, entry in known.live.items() if key not in changed})
    wanted = {record.size for record in unsettled if have[record.size] > 1}
    to_read = [
        record
        for record in records
        if record.size in wanted
        and (record.key in changed or not known.live[record.key]["content_hash"])
    ]
    with ThreadPoolExecutor(workers) as pool:
        hashes = pool.map(hash_file, to_read)
        shown = tqdm(hashes, "finding duplicates", len(to_read), disable=len(to_read) < 99)
        return dict(zip((record.key for record in to_read), shown, strict=True))


def hash_file(record: Record) -> str:
    """sha256 of the file; empty where it cannot be read, which its header or encoding will say."""
    try:
        return hashlib.sha256(record.read()).hexdigest()
    except OSError:
        return ""


def _entry(
    record: Record, size: tuple[int, int] | Rejected, content_hash: str, buckets: Buckets
) -> Entry:
    """The log's line on a file, its row not given yet."""
    placed = size if isinstance(size, Rejected) else buckets.place(*size)
    source = str(record.path).encode(errors="backslashreplace").decode()
    if source != str(record.path):
        placed = Rejected("bad_name", "its name is not UTF-8; rename it")
    width, height = (0, 0) if isinstance(size, Rejected) else size
    where = placed if isinstance(placed, Placement) else None
    why = placed if isinstance(placed, Rejected) else Rejected("")
    return {
        "key": record.key,
        "source": source,
        "size": record.size,
        "mtime_ns": record.mtime_ns,
        "width": width,
        "height": height,
        "crop": list(where.crop if where else (0.0, 0.0, 0.0, 0.0)),
        "bucket": where.bucket.name if where else "",
        "row": -1,
        "content_hash": content_hash,
        "reason": why.reason,
        "detail": why.detail,
    }


def _give_rows(entries: list[Entry], next_rows: dict[str, int]) -> None:
    """Rows in an order that looks random and depends on the keys alone.

    So that a contiguous block of a bucket is a random sample of it, and planning is repeatable.
    """
    taken = dict(next_rows)
    for entry in sorted(entries, key=lambda e: hashlib.blake2b(e["key"].encode()).digest()):
        entry["row"] = taken.get(entry["bucket"], 0)
        taken[entry["bucket"]] = entry["row"] + 1


def _caption_changes(
    records: Iterable[Record], columns: tuple[str, ...], known: dict[tuple[str, str], str]
) -> pa.Table:
    """Captions that differ from the log's, an empty text where one is gone."""
    rows = [
        {"key": record.key, "column": column, "text": record.captions.get(column, "")}
        for record in records
        for column in columns
        if record.captions.get(column, "") != known.get((record.key, column), "")
    ]
    return pa.Table.from_pylist(rows, CAPTIONS)
