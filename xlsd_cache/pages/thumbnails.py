"""Small WebP copies of pictures, for pages: a file next to each picture, made when it is drawn."""

import base64
import io
from contextlib import suppress
from pathlib import Path

from PIL import Image

from xlsd_cache.runtime.atomic import write_bytes
from xlsd_cache.runtime.own_files import marking

SIDE, QUALITY = 384, 75  # pixels; about 12 kB
NBYTES = 1 << 18  # a larger file is not ours
MOST_PIXELS = 1 << 24  # of a picture: 4096 x 4096


def save_thumbnail(image: Image.Image, picture: Path) -> None:
    """Write the thumbnail of a picture that was just written to this path."""
    write_bytes(_path_of(picture), small_webp(image))


def thumbnail(picture: Path, keep: bool = True) -> bytes | None:
    """The thumbnail of a PNG file; made if it is missing or older. None for a damaged picture.

    Unless `keep`, nothing is written.
    """
    path = _path_of(picture)
    try:
        if path.stat().st_mtime_ns >= picture.stat().st_mtime_ns and path.stat().st_size <= NBYTES:
            found = path.read_bytes()
            if found[:4] == b"RIFF" and found[8:12] == b"WEBP":
                return found
    except OSError:
        pass
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            made = small_webp(image)
    except Exception:  # a damaged file may raise anything in Pillow
        return None
    if keep:
        with suppress(OSError):  # the folder may be read-only
            write_bytes(path, made)
    return made


def data_uri(content: bytes, kind: str = "webp") -> str:
    """An image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _path_of(picture: Path) -> Path:
    return picture.with_suffix(".webp")


def small(image: Image.Image) -> Image.Image:
    """A copy in RGB, of at most SIDE pixels a side."""
    copy = image.convert("RGB")
    copy.thumbnail((SIDE, SIDE))
    return copy


def small_webp(image: Image.Image) -> bytes:
    """A thumbnail: a WebP file of at most SIDE pixels a side."""
    file = io.BytesIO()
    small(image).save(file, "WEBP", quality=QUALITY, exif=marking("thumbnail")["exif"])
    return file.getvalue()
