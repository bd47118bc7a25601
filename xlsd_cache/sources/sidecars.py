"""Finds and reads the files next to an image: its captions, and the .json of img2dataset."""

import errno
import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import CAPTION_BYTES, TOO_LARGE, NotRead, read_object
from xlsd_cache.runtime.bounded_files import open_regular, read_regular
from xlsd_cache.runtime.threads import map_blocks
from xlsd_cache.tables.columns import URLS

_BLOCK = 256  # files per task of a thread


class Names:
    """The names in a folder or archive, found in either Unicode normal form.

    macOS writes accents as separate characters (NFD), most other systems do not (NFC).
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._composed = {_composed(n): n for n in self._names if not n.isascii()}

    def find(self, name: str) -> str | None:
        """The name as it is spelled there: the exact one, or else the other normal form."""
        if name in self._names:
            return name
        return None if name.isascii() else self._composed.get(_composed(name))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def read_sidecar(
    folder: str,
    names: Names | None,
    stem: str,
    within: Callable[[str], bool],
    suffix: str,
) -> bytes | NotRead | None:
    """The file STEM.SUFFIX of a folder, None if missing or not `within` what may be read.

    `names` are the names in the folder, where they are known: most calls then need no disk.
    """
    wanted = f"{stem}.{suffix}"
    if names is not None:
        name = names.find(wanted)
        return None if name is None else _read_caption(f"{folder}{os.sep}{name}")
    forms = unicodedata.normalize("NFD", wanted), _composed(wanted)
    spellings = [wanted] if wanted.isascii() else dict.fromkeys([wanted, *forms])
    paths = (f"{folder}{os.sep}{name}" for name in spellings)
    texts = (_read_caption(path) for path in paths if os.path.lexists(path) and within(path))
    return next((text for text in texts if text is not None), None)


def anywhere(path: str) -> bool:
    """Any file may be read: in a folder that the user gave, links are followed."""
    del path
    return True


def _read_caption(path: str) -> bytes | NotRead | None:
    """The content, or None where there is no regular file."""
    try:
        with open_regular(path, buffered=False) as file:
            data = file.read(CAPTION_BYTES + 1)
        return TOO_LARGE if len(data) > CAPTION_BYTES else data
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO):  # a pipe, a folder, a socket
            return None
        raise UserError(
            f"cannot read the caption {path}: {error.strerror}; repair or remove it"
        ) from error


def member_sidecar(
    texts: dict[str, bytes | NotRead], names: Names, stem: str, suffix: str
) -> bytes | NotRead | None:
    """The text of STEM.SUFFIX among the members of an archive; None if missing."""
    name = names.find(f"{stem}.{suffix}")
    return None if name is None else texts[name]


def no_sidecar(suffix: str) -> bytes | None:
    """None: an image in a table's cell has no files next to it."""
    del suffix
    return None


def url_of(data: bytes | NotRead | None) -> str | None:
    """The url of an image, from the .json next to it."""
    value, _ = read_object(data)
    if not isinstance(value, dict):
        return None
    return next((url for name in URLS if isinstance(url := value.get(name), str)), None)


def read_urls(sources: list[str]) -> pa.Array:
    """The urls of images that are files, from the .json next to each."""
    blocks = map_blocks(_read_urls, sources, _BLOCK, 8)
    return pa.array([url for block in blocks for url in block], pa.string())


def _read_urls(sources: list[str]) -> list[str | None]:
    urls: list[str | None] = []
    for source in sources:
        try:
            urls.append(url_of(read_regular(Path(source).with_suffix(".json"), CAPTION_BYTES)))
        except (OSError, ValueError):
            urls.append(None)
    return urls
