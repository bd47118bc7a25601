"""`--only` and `--exclude`: select images by names and patterns, or by files of such."""

import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.errors import UserError
from xlsd_cache.files.text import read_lines
from xlsd_cache.runtime.arrow import filtered, lookup
from xlsd_cache.tables.names import canonical, last_part

log = logging.getLogger("xlsd.cache.sources")

_WILD = re.compile(r"[*?\[]")
_PARTS = re.compile(r"\*+|\?|\[!?[^\[\]\\]+\]|.", re.DOTALL)
Mask = NDArray[np.bool_]


def select_images(images: pa.Table, only: tuple[str, ...], exclude: tuple[str, ...]) -> pa.Table:
    """The images that the patterns select. Raises UserError where they select none.

    A name is an image's key, its path in its source, or its file. A pattern (* ? []) without a
    slash is matched with file names, one with a slash with keys and paths in the source.
    """
    kept = np.full(images.num_rows, not only)
    for names in only:
        kept |= _selected(names, images)
    for names in exclude:
        out = _selected(names, images, must=Path(names).expanduser().is_file())
        if not out.any():
            log.warning(f"--exclude {names} matches no image")
        kept &= ~out
    images = filtered(images, kept)
    if not images.num_rows:
        raise UserError("--only and --exclude leave no image; correct their names and patterns")
    return images


def _selected(names: str, images: pa.Table, *, must: bool = True) -> Mask:
    """Boolean [images]: those that a name or pattern, or a file of such, selects."""
    file = Path(names).expanduser()
    lines, folder = [names], Path.cwd()
    if file.is_file():
        lines, folder = read_lines(file, "the list"), file.absolute().parent
    selected = _by_name(lines, folder, images) if lines else np.zeros(images.num_rows, bool)
    if must and not selected.any():
        what = f"no line of {names}" if file.is_file() else f"{names} is no file, and no name that"
        raise UserError(
            f"{what} matches an image; give a key (as in rejected.parquet), a path within the "
            f"source, a pattern such as *_mask.*, or a file of these"
        )
    return selected


def _by_name(lines: list[str], folder: Path, images: pa.Table) -> Mask:
    names = canonical(pa.array(lines, pa.string()))
    paths = canonical(pa.array([str(folder / name) for name in lines], pa.string()))
    key, source = (canonical(images[name].combine_chunks()) for name in ("key", "source"))
    in_source = pc.replace_substring_regex(key, "^[^/]*/", "")
    selected = np.zeros(images.num_rows, bool)
    literal = np.zeros(len(lines), bool)  # a name with brackets is no pattern
    for wanted, have in ((key, names), (in_source, names), (source, paths)):
        selected |= lookup(wanted, have) >= 0
        literal |= lookup(have, wanted) >= 0
    rest = [name for name, is_name in zip(names.to_pylist(), literal, strict=True) if not is_name]
    patterns = [f"{name}*" if name.endswith("/") else name for name in rest]
    patterns = [pattern for pattern in patterns if _WILD.search(pattern)]
    plain, deep = ([p for p in patterns if ("/" in p) == has] for has in (False, True))
    for wild, against in ((plain, [last_part(key)]), (deep, [key, in_source])):
        for texts in against if wild else []:
            regex = f"(?s)^(?:{'|'.join(map(_regex, wild))})$"
            selected |= np.asarray(pc.match_substring_regex(texts, regex))
    return selected


def _regex(pattern: str) -> str:
    """A pattern of * ? [a-z] [!a-z] in RE2's syntax; * matches slashes, too."""
    return "".join(
        ".*" if part[0] == "*"
        else "." if part == "?"
        else f"[{'^' * (part[1] == '!')}{part[1:-1].removeprefix('!')}]"
        if part[0] == "[" and len(part) > 2
        else re.escape(part)
        for part in _PARTS.findall(pattern)
    )  # fmt: skip
