"""Which image a row of a table is about.

A row speaks for the image that it names, wherever that lies: by path, absolute or from the table's
folder; by key, such a path without the image's suffix; by the url that the image is from. A table
that embeds its images speaks for those alone. Where no image is there of the name that a row gives,
less may tell, among the images that its table speaks for: those in the table's folder and below;
or, where none lies there and the user gave the table, all.

    INSIDE  path or key from the root of an image's source, for a table that the user gave
    FORMER  the image was renamed, which its content proves
    NAME    the only image of that full file name; of that stem, for a key or id without folders

What names several images, or names one by its file name as other rows do, matches nothing.
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
from xlsd_cache.tables.row_outcomes import NOBODY, SEVERAL, How, Matches, Table

_FEW = 8  # folders that are looked for without sorting all images
_ODD = r"\\|/\.\.?/|[^\x00-\x7f]"  # what one image's path may be written with in several ways


class Images:
    """What rows may be about: a table with the columns key, source and url, which may be null."""

    def __init__(self, images: pa.Table) -> None:
        self.key, self.url = images["key"].combine_chunks(), images["url"].combine_chunks()
        # A member's place is left out: ARCHIVE//1536+48211/a.jpg is looked for as ARCHIVE/a.jpg.
        location = images["source"].combine_chunks()
        if pc.any(pc.match_substring(location, "//")).as_py():
            location = pc.replace_substring_regex(location, "//[^/]*/", "/", max_replacements=1)
        if os.sep != "/":
            location = pc.replace_substring(location, os.sep, "/")
        self.location = pc.if_else(pc.equal(location, ""), NOTHING, location)
        self._asked: Counter[str] = Counter()
        self._sorted: dict[str, tuple[pa.Array, Ints]] = {}

    def below(self, what: str, folder: str) -> Ints:
        """The images whose `location` or `key` lies below a folder, ascending."""
        self._asked[what] += 1
        names = getattr(self, what)
        if self._asked[what] <= _FEW:
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
    """All rows of all tables matched with the images (key, source, url)."""
    there = Images(images)
    found = _start(tables)
    _take(found, How.PATH, found.path, there.location)
    odd = pc.and_(pc.match_substring_regex(found.path, _ODD), pa.array(found.image == NOBODY))
    if pc.any(odd).as_py():
        path = canonical(pc.if_else(odd, found.path, NOTHING))
        _take(found, How.PATH, path, canonical(there.location))
    if _may_lie_there(tables, there):
        _take(found, How.KEY, found.key, stemmed(there.location))
    _take(found, How.URL, joined([table.rows.url for table in tables]), there.url)
    for group in _groups(tables):
        _by_less(found, group, there)
    return found


def _may_lie_there(tables: list[Table], images: Images) -> bool:
    """Whether a key could be a path of an image, as most are not of tables that lie elsewhere."""
    keyed = [table for table in tables if table.rows.key.null_count < len(table.rows)]
    folders = {table.folder for table in keyed}
    if len(folders) > _FEW or any(len(images.below("location", name)) for name in folders):
        return True
    away = (pc.match_substring_regex(table.rows.key, r"^/|\.\./|\\") for table in keyed)
    return any(pc.any(keys).as_py() for keys in away)


def _start(tables: list[Table]) -> Matches:
    starts = np.cumsum([0, *(len(table.rows) for table in tables)])
    path = joined([_located(table, table.rows.path) for table in tables])
    key = joined([_located(table, table.rows.key) for table in tables])
    image, how = np.full(starts[-1], NOBODY), np.zeros(starts[-1], np.int8)
    return Matches(tables, starts, image, how, path, key)


def _groups(tables: list[Table]) -> Iterator[list[int]]:
    """The numbers of tables that speak for the same images."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, table in enumerate(tables):
        embeds = number if table.rows.labels is not None else None
        named = (table.folder, table.place, table.given, table.sidecars, embeds)
        groups.setdefault(named, []).append(number)
    yield from groups.values()


def _by_less(found: Matches, group: list[int], images: Images) -> None:
    """The rows whose image is not there by its name, in the images that their tables speak for."""
    at = np.concatenate([np.arange(found.starts[n], found.starts[n + 1]) for n in group])
    if not (found.image[at] == NOBODY).any():
        return
    table, rows = found.tables[group[0]], [found.tables[n].rows for n in group]
    labels = rows[0].labels
    if labels is not None and not (found.image[at] >= 0).any():
        _take(found, How.MOVED, below_folder(table.own_place, labels), images.key, at)
    path, key, id_ = (joined([getattr(r, n) for r in rows]) for n in ("path", "key", "id"))
    path = canonical(path)
    scope = images.below("location", table.folder)
    if not len(scope) and table.place:
        scope = images.below("key", table.place)
        keys = images.key.take(pa.array(scope))
        _take(found, How.MOVED, below_folder(table.place, path), canonical(keys), at, scope)
        _take(found, How.MOVED, below_folder(table.place, key), stemmed(keys), at, scope)
    everywhere = not len(scope) and table.given
    if everywhere:
        scope = np.arange(len(images.key))
    names = images.key.take(pa.array(scope))
    if everywhere or (table.given and not table.sidecars):
        _by_place_in_source(found, at, path, key, names, scope)
    if everywhere or not table.sidecars:
        _by_file_name(found, at, path, pc.coalesce(key, id_), names, scope)


def _by_place_in_source(
    found: Matches, at: Ints, path: pa.Array, key: pa.Array, images: pa.Array, scope: Ints
) -> None:
    """Rows that name an image of `scope` from the root of its source, or with the source's name."""
    for called in (pc.replace_substring_regex(images, "^[^/]*/", ""), images):
        if not (found.image[at] == NOBODY).any():
            return
        if path.null_count < len(path):
            _take(found, How.INSIDE, path, canonical(called), at, scope)
        if key.null_count < len(key):
            _take(found, How.INSIDE, key, stemmed(called), at, scope)


def _by_file_name(
    found: Matches, at: Ints, path: pa.Array, key: pa.Array, images: pa.Array, scope: Ints
) -> None:
    """Rows whose file name only one image of `scope` has, which no other row names."""
    open_ = found.image[at] == NOBODY
    if not open_.any():
        return
    claimed = np.unique(found.image[at])
    files = last_part(canonical(images))
    bare = pc.invert(pc.match_substring(canonical(key), "/"))
    for names, have, may in ((path, files, True), (key, stemmed(files), bare)):
        wanted = last_part(pc.if_else(pa.array(open_), canonical(names), NOTHING))
        alone = pc.if_else(may, unique_or_null(wanted), NOTHING)
        _take(found, How.NAME, alone, have, at, scope)
        shared = pc.and_(pc.and_(pc.is_valid(wanted), pc.is_null(alone)), may)
        shared = pc.fill_null(shared, False).to_numpy(zero_copy_only=False)
        found.image[at[shared & (lookup(wanted, have) >= 0)]] = SEVERAL
    named = open_ & (found.image[at] >= 0)
    taken = np.isin(found.image[at], claimed)
    for row in np.flatnonzero(named & ~taken).tolist():
        where = found.path[int(at[row])].as_py()  # it names a file that is no image of ours
        taken[row] = where is not None and os.path.lexists(where)
    found.image[at[named & taken]] = NOBODY


def by_former_names(found: Matches, content: pa.Array, former: pa.Table) -> None:
    """Match rows that name an image as it was called before it was renamed.

    `content` are the images' content hashes, null where unknown; `former` is a table (key, source,
    content_hash) of files that were encoded.
    """
    open_ = found.missing()
    before = Images(former.append_column("url", pa.nulls(former.num_rows, pa.string())))
    for wanted, have in ((found.path, before.location), (found.key, stemmed(before.location))):
        at = lookup(pc.if_else(open_, wanted, NOTHING), have)
        hashes = take_or_null(former["content_hash"].combine_chunks(), at)
        now = lookup(hashes, unique_or_null(content))
        for row in np.flatnonzero(now >= 0).tolist():  # few: those that were renamed
            if not os.path.lexists(wanted[row].as_py()):
                found.image[row], found.how[row] = now[row], How.FORMER


def captions_of(found: Matches, keys: pa.Array, columns: Iterable[str]) -> pa.Table:
    """schema.CAPTIONS that the rows give to the images called `keys`.

    Of several rows about one image the most exact counts, then the one of the nearest table, then
    the last.
    """
    depth = np.array([table.depth for table in found.tables], np.int64)
    depth = np.repeat(depth, np.diff(found.starts))
    tables = [CAPTIONS.empty_table()]
    for column in columns:
        texts = found.texts(column)
        at = np.flatnonzero((found.image >= 0) & texts.is_valid().to_numpy(zero_copy_only=False))
        image = found.image[at]
        order = np.lexsort([at, depth[at], -found.how[at].astype(np.int64), image])
        last = np.append(np.diff(image[order]) > 0, True)[: len(order)]
        chosen = at[order[last]]
        told = texts.take(pa.array(chosen))
        mine = keys.take(pa.array(found.image[chosen]))
        tables.append(pa.table([mine, pa.repeat(column, len(mine)), told], schema=CAPTIONS))
    return pa.concat_tables(tables)


def _take(
    found: Matches,
    how: How,
    wanted: pa.Array,
    have: pa.Array,
    at: Ints | None = None,
    scope: Ints | None = None,
) -> None:
    """Give the rows `at` without an image the one of `scope` that is called as they want.

    `wanted` is aligned with the rows, `have` with the images; None stands for all of them.
    """
    image = found.image if at is None else found.image[at]
    if wanted.null_count == len(wanted):
        return
    wanted = pc.if_else(pa.array(image == NOBODY), wanted, NOTHING)
    place = lookup(wanted, have)
    hit = np.flatnonzero(place >= 0)
    if not len(hit):
        return
    named = wanted.take(pa.array(hit))
    several = _several(named, place[hit], have)
    place = place[hit] if scope is None else scope[place[hit]]
    rows = hit if at is None else at[hit]
    found.image[rows] = np.where(several, SEVERAL, place)
    found.how[rows] = how


def _several(named: pa.Array, place: Ints, have: pa.Array) -> NDArray[np.bool_]:
    """Which of the names are there more than once; `place` is where the last of each is."""
    there = pc.is_in(have, value_set=named)
    once = np.zeros(len(have), np.bool_)  # numpy's unique is far slower
    once[place] = True
    if pc.sum(there).as_py() == once.sum():
        return np.zeros(len(named), np.bool_)
    return np.asarray(pc.is_in(named, value_set=repeated(have.filter(there))))


def _located(table: Table, written: pa.Array) -> pa.Array:
    """The absolute paths that rows name; of an image in a table, where it is."""
    tidy = written
    if pc.any(pc.or_(pc.match_substring(written, "./"), pc.match_substring(written, "//"))).as_py():
        tidy = pc.replace_substring_regex(written, r"^(\./+)+", "")
        tidy = pc.replace_substring_regex(tidy, r"//+", "/")
    path = below_folder(table.folder, tidy)
    if pc.any(pc.starts_with(tidy, "/")).as_py():
        path = pc.if_else(pc.starts_with(tidy, "/"), tidy, path)
    if table.rows.labels is None or written is not table.rows.path:
        return path
    return pc.coalesce(below_folder(table.rows.file.as_posix(), table.rows.labels), path)
