"""Recognises files that these programs wrote, by content rather than by name.

A command overwrites only files of the kind that it writes, and images that a command has drawn are
not trained on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.bounded_files import open_regular, read_json, require_regular

MARK = "xlsd"  # key of a PNG's text and of parquet metadata; first word of the EXIF software tag
GENERATOR = '<meta name="generator" content="xlsd-'  # the command follows
_FIRST_PAGES = """content="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline';"""
SOFTWARE = 0x0131  # the EXIF tag
# The parts of a store, and of a run: nothing in them is an image or a caption.
STORE = frozenset(
    "latents.zarr manifest captions staging stray rejected.parquet status.json".split()
)
RUN = frozenset("samples checkpoints base ema validation tensorboard wandb".split())


def refuse_foreign(path: Path, suffixes: tuple[str, ...], is_ours: Callable[[Path], bool]) -> None:
    """Raise UserError if `path` has another suffix, or is an existing file that is not ours.

    To be called before any work.
    """
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file")
    if path.exists() and not is_ours(path):
        raise UserError(
            f"{path} exists and was not written by this command, so it is not overwritten; give "
            f"another file, or remove it"
        )


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turn an OSError from writing `path` into a UserError.

    `kept` says what is safe where the same command can be run again.
    """
    try:
        yield
    except OSError as error:
        again = f". {kept}. Fix that and run the same command again."
        then = again if kept else "; give a path with room for it"
        raise UserError(f"cannot write {path}: {error.strerror or error}{then}") from error


def is_index(path: Path) -> bool:
    """Whether export-index wrote this file."""
    try:
        require_regular(path)
        return MARK.encode() in (pq.read_metadata(path).metadata or {})
    except (OSError, ValueError, pa.ArrowException):
        return False


def is_page(path: Path) -> bool:
    """Whether a command or a run wrote this page, in any version."""
    try:
        with open_regular(path) as file:
            head = file.read(1024)
    except OSError:
        return False
    return any(sign.encode() in head for sign in (GENERATOR, _FIRST_PAGES))


def is_picture(path: Path) -> bool:
    """Whether one of our commands drew this picture."""
    try:
        with open_regular(path) as file:
            return is_marked(file)
    except OSError:
        return False


def marking(about: str) -> dict[str, Any]:
    """Options of Pillow's `save` that mark a PNG, JPEG or WebP for `is_marked`."""
    info = PngInfo()
    info.add_text(MARK, about)
    exif = Image.Exif()
    exif[SOFTWARE] = f"{MARK} {about}"
    return {"pnginfo": info, "exif": exif}


def is_marked(file: IO[bytes]) -> bool:
    """Whether a file is an image that we drew. Reads only the header, and never raises."""
    try:
        with Image.open(file) as image:
            # PNG's own getexif would decode the whole file to look for a late eXIf chunk.
            software = Image.Image.getexif(image).get(SOFTWARE, "")
            return MARK in image.info or str(software).startswith(f"{MARK} ")
    except Exception:  # Pillow raises errors of all kinds for a malformed header
        return False


def own_names(folder: str, names: set[str]) -> frozenset[str]:
    """The names in a folder that are parts of a store or a run; the others are the user's."""
    if "latents.zarr" in names:
        attributes = _read(Path(folder, "latents.zarr", "zarr.json")).get("attributes")
        if isinstance(attributes, dict) and attributes.get("format") == "xlsd-latents":
            return STORE.intersection(names)
    if "config.json" in names and is_run(_read(Path(folder, "config.json"))):
        return RUN.intersection(names)
    return frozenset()


def is_run(record: Any) -> bool:
    """Whether this is the content of a run's config.json, a name that many programs use."""
    return isinstance(record, dict) and isinstance(record.get("settings"), dict)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
