"""Compares a scan with the log: what is new, what is to wait, and what is suspiciously gone."""

import os
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.archives.members import printable
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column
from xlsd_cache.outcomes import RETRIED
from xlsd_cache.planning.caption_diff import caption_changes
from xlsd_cache.planning.plan import keep_unread_captions
from xlsd_cache.planning.unchanged import among, equal
from xlsd_cache.runtime.arrow import counts, lookup, take_or_null
from xlsd_cache.schema import IMAGES
from xlsd_cache.sources.records import ARCHIVE_SUFFIXES
from xlsd_cache.sources.scan import Scan
from xlsd_cache.tables.columns import is_table

_MEMBER = "(?s)//.*"  # of a source URI: what follows the archive's or table's path
_TIMES = ("inode", "ctime_ns")


@dataclass(frozen=True)
class Changes:
    """A scan in which what is not quiet is as the log has it, and how it differs from the log."""

    scan: Scan
    keys: pa.Array  # images that are new, changed, removed, or have another caption
    retried: int  # images whose file could not be read
    held: int  # images that wait until their files are quiet


def compare(
    found: Scan, young: Set[str], live: pa.Table, captions: pa.Table, suffixes: tuple[str, ...]
) -> Changes:
    """Compare a scan with the log's images, `live` (PLAN), and their `captions`.

    `young` are the paths of files that may still be written. An image is held back if it is one, is
    in one, or has one as caption: the log's line and captions stay, or it is not there yet. While
    an archive or a table is young, only images whose files are gone leave; while a file is young
    that an image may have been moved to, it stays. `suffixes` are those of --image-suffix.
    """
    held = found.images["key"].filter(_is_young(found.images["source"], young, suffixes))
    is_written = any(map(_is_container, young))
    scan = _hold(found, held, live, captions, is_written)
    # A row that a half-written table lacks takes no caption away.
    scan = replace(scan, unread=scan.unread or is_written)
    now, keys = scan.images, scan.images["key"].combine_chunks()
    logged = take_or_null(live, lookup(keys, live["key"]))
    same = equal(logged, now, "size") & equal(logged, now, "mtime_ns")
    for name in _TIMES:  # which older logs lack
        same &= np.asarray(pc.fill_null(pc.equal(logged[name], now[name]), True))
    gone = live["key"].filter(pc.invert(pc.is_in(live["key"], value_set=keys)))
    recaptioned = caption_changes(keys, scan.captions, scan.columns, captions)
    if scan.unread:
        recaptioned = keep_unread_captions(recaptioned)
    changed = [keys.filter(pa.array(~same)), *gone.chunks, *recaptioned["key"].chunks]
    return Changes(
        scan,
        pc.unique(pa.chunked_array(changed, pa.string())),
        int((same & among(logged["reason"], RETRIED)).sum()),
        max(len(held), is_written),  # of the rows of a half-written table nothing is known
    )


def refuse_vanished(found: Scan, live: pa.Table, forget: Set[str]) -> None:
    """Raise UserError where more than half of a source's images are gone, by name and by content.

    So is a source that was unmounted. Images that were moved within the source are not gone.
    """
    missing = live.filter(pc.invert(pc.is_in(live["key"], value_set=found.keys)))
    gone, had = counts(_owners(missing)), counts(_owners(live))
    suspects = [it for it in found.names if 2 * gone.get(it, 0) > had.get(it, 0)]
    for name in set(suspects) - forget:
        there = found.images.filter(pc.equal(_owners(found.images), name))
        lost = missing.filter(pc.equal(_owners(missing), name))
        is_moved = pc.is_in(_content(lost), value_set=_content(there).combine_chunks())
        count = len(is_moved) - int(pc.sum(is_moved).as_py() or 0)
        if 2 * count > had[name]:
            raise UserError(
                f"{count} of the {had[name]} images of the source {name!r} are gone, so the store "
                f"stays as it is; bring them back, or use --forget {name} to drop them"
            )


def paths_of(images: pa.Table) -> pa.ChunkedArray:
    """The file of each image: its own, or that of its archive or table."""
    return pc.replace_substring_regex(images["source"], _MEMBER, "")


def _owners(images: pa.Table) -> pa.ChunkedArray:
    """The source's name of each image."""
    return pc.replace_substring_regex(images["key"], "(?s)/.*", "")


def _content(images: pa.Table) -> pa.ChunkedArray:
    """What renaming a file keeps."""
    size, mtime = (pc.cast(images[name], pa.string()) for name in ("size", "mtime_ns"))
    return pc.binary_join_element_wise(size, mtime, " ")


def _is_young(sources: pa.ChunkedArray, young: Set[str], suffixes: tuple[str, ...]) -> pa.Array:
    """Whether the file of each source, or one next to it that may be its caption, is young."""
    paths = pc.replace_substring_regex(sources, _MEMBER, "").combine_chunks()
    ends = "|".join(map(re.escape, suffixes)) or r"[^./\\]*"
    stems = pc.replace_substring_regex(paths, rf"(?i)\.(?:{ends})$", "")
    young = set(map(printable, young))
    next_to = {stem for path in young for stem in _stems(path)}
    is_young = pc.is_in(paths, value_set=pa.array(sorted(young), pa.string()))
    return pc.or_(is_young, pc.is_in(stems, value_set=pa.array(sorted(next_to), pa.string())))


def _stems(path: str) -> Iterator[str]:
    """What may be the stem of a caption: a.wd.txt has the stem a.wd for txt, and a for wd.txt."""
    dot = path.rfind(".")
    while dot > path.rfind(os.sep):
        yield path[:dot]
        dot = path.rfind(".", 0, dot)


def _is_container(path: str) -> bool:
    return path.endswith(ARCHIVE_SUFFIXES) or is_table(path)


def _hold(
    found: Scan, held: pa.ChunkedArray, live: pa.Table, captions: pa.Table, is_written: bool
) -> Scan:
    """The scan with the log's lines and captions of the images `held`; new ones are left out."""
    is_kept = pc.is_in(live["key"], value_set=held.combine_chunks())
    # What could not be read has no line to keep: planning would read it again.
    is_kept = pc.and_(is_kept, pa.array(~among(live["reason"], RETRIED)))
    is_held = pc.is_in(found.images["key"], value_set=held.combine_chunks())
    moving = _content(found.images.filter(is_held)).combine_chunks()
    stays = pc.is_in(_content(live), value_set=moving)
    is_gone = pc.invert(pc.is_in(live["key"], value_set=found.keys))
    if is_written:
        gone = paths_of(live.filter(is_gone)).unique().to_pylist()
        there = pa.array([path for path in gone if Path(path).exists()], pa.string())
        stays = pc.or_(stays, pc.is_in(paths_of(live), value_set=there))
    is_kept = pc.or_(is_kept, pc.and_(is_gone, stays))
    kept = live.filter(is_kept)
    if not (len(held) or kept.num_rows):
        return found
    by_scan = pc.less(kept["width"], 0)
    lines = {name: kept[name] for name in IMAGES.names if name != "url"} | {
        "url": pa.nulls(kept.num_rows, pa.string()),
        **{name: pc.if_else(by_scan, kept[name], "") for name in ("reason", "detail")},
    }
    lines = pa.table(lines).select(IMAGES.names).cast(IMAGES)
    images = pa.concat_tables([found.images.filter(pc.invert(is_held)), lines]).sort_by("key")
    sidecars = [name for name in found.columns if Column.parse(name).suffix]
    own = pc.and_(
        pc.is_in(captions["key"], value_set=kept["key"].combine_chunks()),
        pc.is_in(captions["column"], value_set=pa.array(sidecars, pa.string())),
    )
    read = found.sidecar_captions
    read = read.filter(pc.invert(pc.is_in(read["key"], value_set=held.combine_chunks())))
    texts = pa.concat_tables([read, captions.filter(own)])
    return replace(found, images=images, sidecar_captions=texts).with_rows()
