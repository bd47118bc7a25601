"""Matches the rows of tables with the images that they describe.

A row describes the image that it names, wherever that is: by path, absolute or relative to the
table's folder; by key, such a path without the image's suffix; by the url that the image came from.
A table with embedded images describes only those. Where no image has the name that a row gives, a
weaker match counts, among the images of the table's folder and below; or, if none is there and the
user gave the table, among all images:

    INSIDE  path or key from the root of an image's source, for a table that the user gave
    FORMER  the image was renamed, which its content proves
    NAME    the only image with that full file name; with that stem, for a key or id without folders

A name that fits several images, or a file name that several rows have, matches nothing.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.runtime.arrow import Ints, lookup, repeated, take_or_null, unique_or_null
from xlsd_cache.schema import CAPTIONS
from xlsd_cache.tables.columns import NOTHING
from xlsd_cache.tables.names import (
    below_folder,
    bisect,
    canonical,
    joined,
    last_part,
    stemmed,
)
from xlsd_cache.tables.row_outcomes import NO_IMAGE, SEVERAL, Matches, MatchKind, Table

_FEW = 8  # folders that are searched for without sorting all images
_AMBIGUOUS = r"\\|/\.\.?/|[^\x00-\x7f]"  # characters of paths that have several spellings


class ImageNames:
    """The names of images: a table with the columns key, source and url, which may be null."""

    def __init__(self, images: pa.Table) -> None:
        self.key, self.url = images["key"].combine_chunks(), images["url"].combine_chunks()
        # Without a member's offset: ARCHIVE//1536+48211/a.jpg is compared as ARCHIVE/a.jpg.
        location = images["source"].combine_chunks()
        if pc.any(pc.match_substring(location, "//")).as_py():
            location = pc.replace_substring_regex(location, "//[^/]*/", "/", max_replacements=1)
        if os.sep != "/":
            location = pc.replace_substring(location, os.sep, "/")
        self.location = pc.if_else(pc.equal(location, ""), NOTHING, location)
        self._searches: Counter[str] = Counter()
        self._sorted: dict[str, tuple[pa.Array, Ints]] = {}

    def below(self, what: str, folder: str) -> Ints:
        """The images whose `location` or `key` lies below a folder, ascending."""
        self._searches[what] += 1
        names = getattr(self, what)
        if self._searches[what] <= _FEW:
            inside = pc.starts_with(names, folder.rstrip("/") + "/")
            return np.flatnonzero(pc.fill_null(inside, False).to_numpy(zero_copy_only=False))
        if what not in self._sorted:
            order = pc.sort_indices(names).to_numpy().astype(np.int64)
            self._sorted[what] = names, order
        names, order = self._sorted[what]
        prefix = folder.rstrip("/")
        low, high = (bisect(names, order, prefix + end) for end in ("/", "0"))  # "0" follows "/"
        return np.sort(order[low:high])


def match(tables: list[Table], images: pa.Table) -> Matches:
    """Match the rows of all tables with the images (key, source, url)."""
    names = ImageNames(images)
    matches = _start(tables)
    _assign(matches, MatchKind.PATH, matches.path, names.location)
    odd = pc.and_(
        pc.match_substring_regex(matches.path, _AMBIGUOUS), pa.array(matches.image == NO_IMAGE)
    )
    if pc.any(odd).as_py():
        path = canonical(pc.if_else(odd, matches.path, NOTHING))
        _assign(matches, MatchKind.PATH, path, canonical(names.location))
    if _may_be_paths(tables, names):
        _assign(matches, MatchKind.KEY, matches.key, stemmed(names.location))
    _assign(matches, MatchKind.URL, joined([table.rows.url for table in tables]), names.url)
    for group in _groups(tables):
        _match_weakly(matches, group, names)
    return matches


def _may_be_paths(tables: list[Table], images: ImageNames) -> bool:
    """Whether keys may be paths of images; in tables outside the images' folders most are not."""
    keyed = [table for table in tables if table.rows.key.null_count < len(table.rows)]
    folders = {table.folder for table in keyed}
    if len(folders) > _FEW or any(len(images.below("location", name)) for name in folders):
        return True
    leading_out = (pc.match_substring_regex(table.rows.key, r"^/|\.\./|\\") for table in keyed)
    return any(pc.any(keys).as_py() for keys in leading_out)


def _start(tables: list[Table]) -> Matches:
    starts = np.cumsum([0, *(len(table.rows) for table in tables)])
    path = joined([_located(table, table.rows.path) for table in tables])
    key = joined([_located(table, table.rows.key) for table in tables])
    image, how = np.full(starts[-1], NO_IMAGE), np.zeros(starts[-1], np.int8)
    return Matches(tables, starts, image, how, path, key)


def _groups(tables: list[Table]) -> Iterator[list[int]]:
    """The numbers of tables that may describe the same images."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, table in enumerate(tables):
        embeds = number if table.rows.labels is not None else None
        scope = (table.folder, table.place, table.given, table.sidecars, embeds)
        groups.setdefault(scope, []).append(number)
    yield from groups.values()


def _match_weakly(matches: Matches, group: list[int], images: ImageNames) -> None:
    """Match the rows that name no image exactly, among the images of their tables."""
    at = np.concatenate([np.arange(matches.starts[n], matches.starts[n + 1]) for n in group])
    if not (matches.image[at] == NO_IMAGE).any():
        return
    table, rows = matches.tables[group[0]], [matches.tables[n].rows for n in group]
    labels = rows[0].labels
    if labels is not None and not (matches.image[at] >= 0).any():
        _assign(matches, MatchKind.MOVED, below_folder(table.own_place, labels), images.key, at)
    path, key, id_ = (joined([getattr(r, n) for r in rows]) for n in ("path", "key", "id"))
    path = canonical(path)
    scope = images.below("location", table.folder)
    if not len(scope) and table.place:
        scope = images.below("key", table.place)
        keys = images.key.take(pa.array(scope))
        _assign(
            matches, MatchKind.MOVED, below_folder(table.place, path), canonical(keys), at, scope
        )
        _assign(matches, MatchKind.MOVED, below_folder(table.place, key), stemmed(keys), at, scope)
    everywhere = not len(scope) and table.given
    if everywhere:
        scope = np.arange(len(images.key))
    names = images.key.take(pa.array(scope))
    if everywhere or (table.given and not table.sidecars):
        _by_place_in_source(matches, at, path, key, names, scope)
    if everywhere or not table.sidecars:
        _by_file_name(matches, at, path, pc.coalesce(key, id_), names, scope)


def _by_place_in_source(
    matches: Matches, at: Ints, path: pa.Array, key: pa.Array, images: pa.Array, scope: Ints
) -> None:
    """Match rows that name an image of `scope` from the root, or the name, of its source."""
    for paths in (pc.replace_substring_regex(images, "^[^/]*/", ""), images):
        if not (matches.image[at] == NO_IMAGE).any():
            return
        if path.null_count < len(path):
            _assign(matches, MatchKind.INSIDE, path, canonical(paths), at, scope)
        if key.null_count < len(key):
            _assign(matches, MatchKind.INSIDE, key, stemmed(paths), at, scope)


def _by_file_name(
    matches: Matches, at: Ints, path: pa.Array, key: pa.Array, images: pa.Array, scope: Ints
) -> None:
    """Match rows whose file name occurs once in the rows and once in the images of `scope`."""
    open_ = matches.image[at] == NO_IMAGE
    if not open_.any():
        return
    claimed = np.unique(matches.image[at])
    files = last_part(canonical(images))
    bare = pc.invert(pc.match_substring(canonical(key), "/"))
    for names, have, may in ((path, files, True), (key, stemmed(files), bare)):
        wanted = last_part(pc.if_else(pa.array(open_), canonical(names), NOTHING))
        alone = pc.if_else(may, unique_or_null(wanted), NOTHING)
        _assign(matches, MatchKind.NAME, alone, have, at, scope)
        shared = pc.and_(pc.and_(pc.is_valid(wanted), pc.is_null(alone)), may)
        shared = pc.fill_null(shared, False).to_numpy(zero_copy_only=False)
        matches.image[at[shared & (lookup(wanted, have) >= 0)]] = SEVERAL
    named = open_ & (matches.image[at] >= 0)
    taken = np.isin(matches.image[at], claimed)
    for row in np.flatnonzero(named & ~taken).tolist():
        path_named = matches.path[int(at[row])].as_py()  # an existing file is not one of our images
        taken[row] = path_named is not None and os.path.lexists(path_named)
    matches.image[at[named & taken]] = NO_IMAGE


def by_former_names(matches: Matches, content: pa.Array, former: pa.Table) -> None:
    """Match rows that name an image by its name before it was renamed.

    `content` are the images' content hashes, null where unknown; `former` is a table (key, source,
    content_hash) of files that were encoded.
    """
    open_ = matches.missing()
    before = ImageNames(former.append_column("url", pa.nulls(former.num_rows, pa.string())))
    for wanted, have in ((matches.path, before.location), (matches.key, stemmed(before.location))):
        at = lookup(pc.if_else(open_, wanted, NOTHING), have)
        hashes = take_or_null(former["content_hash"].combine_chunks(), at)
        now = lookup(hashes, unique_or_null(content))
        for row in np.flatnonzero(now >= 0).tolist():  # few: those that were renamed
            if not os.path.lexists(wanted[row].as_py()):
                matches.image[row], matches.kind[row] = now[row], MatchKind.FORMER


def captions_of(matches: Matches, keys: pa.Array, columns: Iterable[str]) -> pa.Table:
    """CAPTIONS from the rows, for the images with these keys.

    Of several rows about one image the most exact match counts, then the table in the deepest
    folder, then the last row.
    """
    depth = np.array([table.depth for table in matches.tables], np.int64)
    depth = np.repeat(depth, np.diff(matches.starts))
    tables = [CAPTIONS.empty_table()]
    for column in columns:
        texts = matches.texts(column)
        at = np.flatnonzero((matches.image >= 0) & texts.is_valid().to_numpy(zero_copy_only=False))
        image = matches.image[at]
        order = np.lexsort([at, depth[at], -matches.kind[at].astype(np.int64), image])
        last = np.append(np.diff(image[order]) > 0, True)[: len(order)]
        chosen = at[order[last]]
        text = texts.take(pa.array(chosen))
        mine = keys.take(pa.array(matches.image[chosen]))
        tables.append(pa.table([mine, pa.repeat(column, len(mine)), text], schema=CAPTIONS))
    return pa.concat_tables(tables)


def _assign(
    matches: Matches,
    kind: MatchKind,
    wanted: pa.Array,
    have: pa.Array,
    at: Ints | None = None,
    scope: Ints | None = None,
) -> None:
    """Match the rows `at` that have no image yet with the images of `scope`, by equal names.

    `wanted` are the names of these rows, `have` those of the images; None stands for all of them.
    """
    image = matches.image if at is None else matches.image[at]
    if wanted.null_count == len(wanted):
        return
    wanted = pc.if_else(pa.array(image == NO_IMAGE), wanted, NOTHING)
    place = lookup(wanted, have)
    hit = np.flatnonzero(place >= 0)
    if not len(hit):
        return
    named = wanted.take(pa.array(hit))
    several = _several(named, place[hit], have)
    place = place[hit] if scope is None else scope[place[hit]]
    rows = hit if at is None else at[hit]
    matches.image[rows] = np.where(several, SEVERAL, place)
    matches.kind[rows] = kind


def _several(named: pa.Array, place: Ints, have: pa.Array) -> NDArray[np.bool_]:
    """Whether `have` has each name more than once; `place` is the position of its last one."""
    is_named = pc.is_in(have, value_set=named)
    once = np.zeros(len(have), np.bool_)  # numpy's unique is far slower
    once[place] = True
    if pc.sum(is_named).as_py() == once.sum():
        return np.zeros(len(named), np.bool_)
    return np.asarray(pc.is_in(named, value_set=repeated(have.filter(is_named))))


def _located(table: Table, names: pa.Array) -> pa.Array:
    """The absolute paths of names; of an embedded image the table's path and its label."""
    tidy = names
    if pc.any(pc.or_(pc.match_substring(names, "./"), pc.match_substring(names, "//"))).as_py():
        tidy = pc.replace_substring_regex(names, r"^(\./+)+", "")
        tidy = pc.replace_substring_regex(tidy, r"//+", "/")
    path = below_folder(table.folder, tidy)
    if pc.any(pc.starts_with(tidy, "/")).as_py():
        path = pc.if_else(pc.starts_with(tidy, "/"), tidy, path)
    if table.rows.labels is None or names is not table.rows.path:
        return path
    return pc.coalesce(below_folder(table.rows.file.as_posix(), table.rows.labels), path)
