"""What these programs have written themselves, told by its content and not by its name.

A command replaces a file only where that is of the kind that it writes; and what a command wrote
among images is no image to be trained on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.bounded_files import open_regular, read_json, require_regular

MARK = "xlsd"  # the name of a PNG's text and of a parquet file's metadata; in EXIF, a first word
GENERATOR = '<meta name="generator" content="xlsd-train report">'
_FIRST_PAGES = """content="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline';"""
SOFTWARE = 0x0131  # the EXIF tag
# What is ours in a folder that is a store, or a run: nothing in it is an image or a caption.
STORE = frozenset("latents.zarr manifest captions staging stray rejected.parquet".split())
RUN = frozenset("samples checkpoints base ema validation tensorboard".split())


def refuse_foreign(path: Path, suffixes: tuple[str, ...], is_ours: Callable[[Path], bool]) -> None:
    """Raises UserError where `path` has another suffix, or is there and not what `is_ours` knows.

    To be asked before any work.
    """
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path} does not end in {' or '.join(suffixes)}, as what it is to hold")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    if path.exists() and not is_ours(path):
        raise UserError(
            f"{path} exists, is not what this command writes, and is not overwritten; name another "
            f"file, or remove it"
        )


def is_index(path: Path) -> bool:
    """Whether export-index wrote this file."""
    try:
        require_regular(path)
        return MARK.encode() in (pq.read_metadata(path).metadata or {})
    except (OSError, ValueError, pa.ArrowException):
        return False


def is_page(path: Path) -> bool:
    """Whether `xlsd-train report` or a run wrote this page, of whatever version."""
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
    """Options of Pillow's `save` for a PNG, JPEG or WebP that `is_marked` is to know."""
    info = PngInfo()
    info.add_text(MARK, about)
    exif = Image.Exif()
    exif[SOFTWARE] = f"{MARK} {about}"
    return {"pnginfo": info, "exif": exif}


def is_marked(file: IO[bytes]) -> bool:
    """Whether a file holds a picture of ours; reads its header alone, and raises for no content."""
    try:
        with Image.open(file) as image:
            # PNG's own getexif would decode the whole file to look for a late eXIf chunk.
            software = Image.Image.getexif(image).get(SOFTWARE, "")
            return MARK in image.info or str(software).startswith(f"{MARK} ")
    except Exception:  # Pillow raises whatever a malformed header makes it stumble over
        return False


def own_names(folder: str, names: set[str]) -> frozenset[str]:
    """Which names in a folder are a store's parts or a run's; anything else there is the user's."""
    if "latents.zarr" in names:
        told = _read(Path(folder, "latents.zarr", "zarr.json")).get("attributes")
        if isinstance(told, dict) and told.get("format") == "xlsd-latents":
            return STORE.intersection(names)
    if "config.json" in names and is_run(_read(Path(folder, "config.json"))):
        return RUN.intersection(names)
    return frozenset()


def is_run(record: Any) -> bool:
    """Whether this is what a run's config.json holds: programs of all kinds have such a file."""
    return isinstance(record, dict) and isinstance(record.get("settings"), dict)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
