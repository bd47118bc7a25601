"""Bytes of an image file -> upright sRGB uint8 at its bucket's size, or the reason why not.

What `Image.open(path).convert("RGB")` gets silently wrong is done right here: EXIF orientation,
transparency (hidden colours under alpha), ICC profiles, 16-bit and float samples, and files that
are truncated, are bombs, or are no image at all.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

PREPROCESSING = 1  # part of a store's identity: raise it whenever a pixel may come out different
MAX_PIXELS = 128_000_000  # an image this large takes about 0.5 GB while it is decoded
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "QOI",
)
# Pillow's own limit only warns up to twice itself; ours is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

# Files that Pillow does not identify: what their first bytes say about why.
_MAGIC = (
    (b"\xff\xd8\xff", "unsupported"),  # JPEG: 12-bit or lossless
    (b"\x89PNG\r\n\x1a\n", "corrupt"),
    (b"GIF8", "corrupt"),
    (b"BM", "corrupt"),
    (b"II*\0", "corrupt"),
    (b"MM\0*", "corrupt"),
)
_SRGB = ImageCms.createProfile("sRGB")

Pixels = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class Rejected:
    """Why an image is not in the store: a reason to count by, and the detail of this one."""

    reason: str
    detail: str = ""


def read_size(path: Path) -> tuple[int, int] | Rejected:
    """Width and height of the upright image, from the file's header alone."""
    try:
        with path.open("rb") as file:
            return read_header(file, path.stat().st_size)
    except FileNotFoundError:
        return Rejected("vanished", "gone between the scan and its reading")
    except OSError as error:
        return Rejected("unreadable", _told(error))


def read_header(file: IO[bytes], nbytes: int) -> tuple[int, int] | Rejected:
    """Width and height of the upright image in an open file of so many bytes. Never raises."""
    try:
        image = _open(file, nbytes)
        if isinstance(image, Rejected):
            return image
        with image:
            width, height = image.size
            if image.format == "TIFF":  # Pillow gives a TIFF's size upright already
                return width, height
            # PNG's own getexif would decode the whole file to look for a late eXIf chunk.
            orientation = Image.Image.getexif(image).get(0x0112, 1)
            return (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    except OSError as error:  # Pillow's own have no number
        return Rejected("unreadable" if error.errno else "corrupt", _told(error))
    except Exception as error:  # Pillow raises whatever a malformed header makes it stumble over
        return Rejected("corrupt", _told(error))


def decode(
    data: bytes,
    upright_size: tuple[int, int],
    crop: tuple[float, float, float, float],
    size: tuple[int, int],
) -> Pixels | Rejected:
    """The crop box of the image in `data`, resized to `size` = (width, height).

    `crop` is in pixels of the upright image, whose size was `upright_size` when its place in the
    store was planned. Lanczos over the box, in the image's own colours; sRGB after. Never raises
    for what `data` holds.
    """
    try:
        image = _open(io.BytesIO(data), len(data))
        if isinstance(image, Rejected):
            return image
        with image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.size != upright_size:
                detail = f"its header gave {upright_size}, its content {upright.size}"
                return Rejected("corrupt", detail)
            samples = _eight_bit(upright)
            if isinstance(samples, Rejected):
                return samples
            # reducing_gap stays off: it is faster, and up to several grey levels wrong.
            resized = samples.resize(size, Image.Resampling.LANCZOS, box=crop)
            profile = image.info.get("icc_profile")
            return np.asarray(_on_white(_to_srgb(resized, profile)), dtype=np.uint8)
    except MemoryError:
        return Rejected("too_many_pixels", "decoding it ran out of memory")
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) or _cut_webp(data) else "corrupt"
        return Rejected(reason, _told(error))
    except Exception as error:  # see read_size
        return Rejected("corrupt", _told(error))


def _open(file: IO[bytes], nbytes: int) -> Image.Image | Rejected:
    """The image, its header parsed and its size within bounds, nothing decoded yet."""
    head = file.read(16)
    file.seek(0)
    if not nbytes:
        return Rejected("not_an_image", "the file is empty")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
            return Rejected("unsupported", "HEIF, which Pillow does not decode")
        for magic, reason in _MAGIC:
            if head.startswith(magic):
                return Rejected(reason, f"starts like an image ({magic!r}) but is not readable")
        return Rejected("not_an_image", f"starts with {head!r}")
    except OSError as error:
        file.seek(0)
        reason = "truncated" if _cut_webp(file.read(12), nbytes) else "corrupt"
        return Rejected(reason, _told(error))
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        detail = f"{width}x{height} is over {MAX_PIXELS / 1e6:.0f} megapixels"
        return Rejected("too_many_pixels", detail)
    return image


def _eight_bit(image: Image.Image) -> Image.Image | Rejected:
    """The same picture in a mode with 8 bits a sample that Pillow resizes well."""
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        samples = np.asarray(image, dtype=np.float64)
        top = float(samples.max(initial=0.0))
        if not np.isfinite(samples).all() or samples.min(initial=0.0) < 0 or top > 65535:
            return Rejected("unsupported", f"mode {mode} with values outside 0..65535")
        # Integers are 16-bit; floats are 0..1 unless they say otherwise.
        white = 65535 if mode != "F" or top > 255 else 255 if top > 1 else 1
        grey = Image.fromarray(np.rint(samples * (255 / white)).astype(np.uint8))
        key = image.info.get("transparency")
        if isinstance(key, int):  # one grey value is see-through
            opaque = Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8))
            return Image.merge("LA", (grey, opaque))
        return grey
    if image.has_transparency_data:
        return image if mode in ("RGBA", "LA") else image.convert("RGBA")
    return image if mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours as sRGB has them; a profile that is broken or does not fit the mode is ignored."""
    if image.mode == "LAB":
        return _convert(image, ImageCms.createProfile("LAB"), "RGB")
    target = "RGBA" if image.mode in ("RGBA", "LA") else "RGB"
    if profile and image.mode != "LA":
        try:
            return _convert(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), target)
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert(target)


def _convert(image: Image.Image, source: object, mode: str) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode=mode)  # type: ignore[arg-type]
    assert converted is not None  # only in-place conversion returns None
    if image.mode == "RGBA":  # LittleCMS leaves alpha undefined
        converted.putalpha(image.getchannel("A"))
    return converted


def _on_white(image: Image.Image) -> Image.Image:
    """Alpha composited on white."""
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _cut_webp(data: bytes, nbytes: int | None = None) -> bool:
    """Whether a RIFF file is shorter than its own header says."""
    declared = int.from_bytes(data[4:8], "little") + 8
    return data[:4] == b"RIFF" and declared > (len(data) if nbytes is None else nbytes)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
