"""`--only` and `--exclude`: images by name or pattern, given themselves or in files of them."""

import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.errors import UserError
from xlsd_cache.files.text import read_lines
from xlsd_cache.runtime.arrow import lookup
from xlsd_cache.tables.names import canonical, last_part

log = logging.getLogger("xlsd.cache.sources")

_WILD = re.compile(r"[*?\[]")
_PARTS = re.compile(r"\*+|\?|\[!?[^\[\]\\]+\]|.", re.DOTALL)
Mask = NDArray[np.bool_]


def listed(images: pa.Table, only: tuple[str, ...], exclude: tuple[str, ...]) -> pa.Table:
    """The images that the patterns leave. Raises UserError where they leave none.

    A name is an image's key, its path in its source, or its file; a pattern with * ? [] and no
    slash is held against file names, one with a slash against keys and paths in the source.
    """
    kept = np.full(images.num_rows, not only)
    for given in only:
        kept |= _named(given, images)
    for given in exclude:
        out = _named(given, images, must=Path(given).expanduser().is_file())
        if not out.any():
            log.warning(f"--exclude {given} names no image")
        kept &= ~out
    images = images.filter(pa.array(kept))
    if not images.num_rows:
        raise UserError("the lists leave no image; mend what --only and --exclude name")
    return images


def _named(given: str, images: pa.Table, *, must: bool = True) -> Mask:
    """Boolean [images]: those that a pattern, or a file of patterns, names."""
    file = Path(given).expanduser()
    lines, folder = [given], Path.cwd()
    if file.is_file():
        lines, folder = read_lines(file, "the list"), file.absolute().parent
    named = _by_name(lines, folder, images) if lines else np.zeros(images.num_rows, bool)
    if must and not named.any():
        what = (
            f"no line of {given} names" if file.is_file() else f"{given} is no file, and names not"
        )
        raise UserError(
            f"{what} an image; give a file of names and patterns, or one itself: a key (as in "
            f"rejected.parquet), a path within the source, or a pattern such as *_mask.*"
        )
    return named


def _by_name(lines: list[str], folder: Path, images: pa.Table) -> Mask:
    names = canonical(pa.array(lines, pa.string()))
    paths = canonical(pa.array([str(folder / name) for name in lines], pa.string()))
    key, source = (canonical(images[name].combine_chunks()) for name in ("key", "source"))
    inside = pc.replace_substring_regex(key, "^[^/]*/", "")
    named = np.zeros(images.num_rows, bool)
    literal = np.zeros(len(lines), bool)  # a name with brackets in it is no pattern
    for wanted, have in ((key, names), (inside, names), (source, paths)):
        named |= lookup(wanted, have) >= 0
        literal |= lookup(have, wanted) >= 0
    rest = [name for name, is_name in zip(names.to_pylist(), literal, strict=True) if not is_name]
    patterns = [f"{name}*" if name.endswith("/") else name for name in rest]
    patterns = [pattern for pattern in patterns if _WILD.search(pattern)]
    plain, deep = ([p for p in patterns if ("/" in p) == has] for has in (False, True))
    for wild, against in ((plain, [last_part(key)]), (deep, [key, inside])):
        for texts in against if wild else []:
            regex = f"(?s)^(?:{'|'.join(map(_regex, wild))})$"
            named |= np.asarray(pc.match_substring_regex(texts, regex))
    return named


def _regex(pattern: str) -> str:
    """A pattern of * ? [a-z] [!a-z] as RE2 takes it; * goes across folders."""
    return "".join(
        ".*" if part[0] == "*"
        else "." if part == "?"
        else f"[{'^' * (part[1] == '!')}{part[1:-1].removeprefix('!')}]"
        if part[0] == "[" and len(part) > 2
        else re.escape(part)
        for part in _PARTS.findall(pattern)
    )  # fmt: skip
