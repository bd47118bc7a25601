"""Image file bytes -> upright sRGB uint8 pixels of the bucket's size, or the reason for rejection.

Handles what `Image.open(path).convert("RGB")` silently gets wrong: EXIF orientation, truncated
files, decompression bombs, and files that are not images (header.py), transparency (hidden colours
under alpha), ICC profiles, 16-bit and float samples (color.py).
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xlsd_cache.images.color import UnsupportedSamples, eight_bit, to_srgb
from xlsd_cache.images.header import (
    MAX_PIXELS,
    ORIENTATION,
    SIDEWAYS,
    header_of,
    is_cut_webp,
    message,
    open_image,
    refused,
)
from xlsd_cache.outcomes import Rejected

PREPROCESSING = 2  # part of a store's identity: increment it whenever a pixel may change
# A JPEG is decoded DCT-scaled if the result is still this many times the wanted size. The worst of
# 113 photos then differs by 0.91 grey levels (RMS) from its full decode; with 3 it is 1.13.
DRAFT_MARGIN = 3.5
LANCZOS = Image.Resampling.LANCZOS
# EXIF orientation -> the transposition that makes the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = NDArray[np.uint8]  # [H, W, 3]


def decode(
    data: bytes,
    upright_size: tuple[int, int],
    crop: tuple[float, float, float, float],
    size: tuple[int, int],
    max_pixels: int = MAX_PIXELS,
) -> Pixels | Rejected:
    """Decode `data` and resize its crop box to `size` = (width, height): uint8 [H, W, 3].

    `crop` is in pixels of the upright image, whose size was `upright_size` when the store was
    planned. Resizing is Lanczos over the box, in the stored orientation and colour space;
    conversion to sRGB and rotation follow. Invalid content is rejected and never raises.
    """
    try:
        image = open_image(io.BytesIO(data), len(data), max_pixels)
        if isinstance(image, Rejected):
            return image
        with image:
            whole = image.size
            divisor = _draft(image, crop, size)
            image.load()
            whole = whole if divisor > 1 else image.size
            orientation = image.getexif().get(ORIENTATION, 1)
            if orientation in SIDEWAYS:
                whole, size = whole[::-1], size[::-1]
            if whole != upright_size:
                return Rejected("corrupt", f"its header gave {upright_size}, its content {whole}")
            if image.format == "JPEG2000" and _cut_jpeg2000(data):
                return Rejected("truncated", "the end of its codestream is missing")
            samples = eight_bit(image)
            box = _stored_box(crop, upright_size, orientation)
            # reducing_gap stays off: it is faster, and up to several grey levels wrong.
            left, top, right, bottom = (edge / divisor for edge in box)
            resized = samples.resize(size, LANCZOS, (left, top, right, bottom))
            profile = image.info.get("icc_profile")
            picture = to_srgb(resized, profile)
            if orientation in _UPRIGHT:
                picture = picture.transpose(_UPRIGHT[orientation])
            return np.asarray(picture, dtype=np.uint8)
    except MemoryError:
        return Rejected("too_much_memory", "decoding it ran out of memory")
    except UnsupportedSamples as error:
        return Rejected("unsupported", str(error))
    except OSError as error:
        return refused(error, is_cut_webp(data, len(data)))
    except Exception as error:  # see read_header
        return Rejected("corrupt", message(error))


def shrunk(data: bytes, side: int) -> Pixels | Rejected:
    """Decode a whole image into at most `side` x `side` pixels: uint8 [H, W, 3]."""
    size = header_of(data)
    if isinstance(size, Rejected):
        return size
    width, height = (max(1, round(it * min(1.0, side / max(size)))) for it in size)
    return decode(data, size, (0, 0, *size), (width, height))


def _draft(
    image: Image.Image, crop: tuple[float, float, float, float], size: tuple[int, int]
) -> int:
    """Have a JPEG decoded at 1/8, 1/4 or 1/2 where it makes no visible difference.

    Returns the divisor: 8, 4, 2, or 1. With an odd size, the last pixel lies partly beyond the
    edge; pixel x still starts at x times the divisor.
    """
    if image.format not in ("JPEG", "MPO"):
        return 1
    shrink = min((crop[2] - crop[0]) / size[0], (crop[3] - crop[1]) / size[1])
    for divisor in (8, 4, 2):
        if shrink >= divisor * DRAFT_MARGIN:
            drafted = image.draft(None, (image.width // divisor, image.height // divisor))
            return divisor if drafted else 1
    return 1


def _stored_box(
    crop: tuple[float, float, float, float], upright_size: tuple[int, int], orientation: int
) -> tuple[float, float, float, float]:
    """Convert a box of the upright image to the stored orientation."""
    (left, top, right, bottom), (width, height) = crop, upright_size
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation in SIDEWAYS else (left, top, right, bottom)


def _cut_jpeg2000(data: bytes) -> bool:
    """Whether the end of the codestream is missing; Pillow leaves missing tiles black."""
    last_tile = data.rfind(b"\xff\x90")  # within tiles, no byte above 8F follows an FF
    return last_tile < 0 or data.find(b"\xff\xd9", last_tile) < 0
