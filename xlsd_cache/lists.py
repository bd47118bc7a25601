"""Lists of images, a line each, that include or exclude: `--only` and `--exclude`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache import UserError
from xlsd_cache.match import look_up
from xlsd_cache.tables import one


def listed(images: pa.Table, only: tuple[Path, ...], exclude: tuple[Path, ...]) -> pa.Table:
    """The images that the lists leave."""
    for file, keep in [(file, True) for file in only] + [(file, False) for file in exclude]:
        named = _named_in(file, images)
        if not named.any():
            raise UserError(
                f"no line of {file} names an image; write keys (as in rejected.parquet), paths "
                f"within the source, or paths from the list's own folder"
            )
        images = images.filter(pa.array(named == keep))
    if not images.num_rows:
        raise UserError("the lists leave no image; mend what --only and --exclude name")
    return images


def _named_in(file: Path, images: pa.Table) -> NDArray[np.bool_]:
    """Boolean [images]: whether a line is the image's key, its path in its source, or its file."""
    try:
        lines = file.expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {file}: {error}; it must be UTF-8 text") from error
    written = [line.strip() for line in lines if line.strip()]
    folder = file.expanduser().absolute().parent
    names = pa.array([name.removeprefix("./") for name in written], pa.string())
    paths = pa.array([str(folder / name) for name in written], pa.string())
    key = one(images["key"])
    inside = pc.replace_substring_regex(key, "^[^/]*/", "")
    named = look_up(key, names) >= 0
    for wanted, have in ((inside, names), (one(images["source"]), paths)):
        named |= look_up(wanted, have) >= 0
    return named
