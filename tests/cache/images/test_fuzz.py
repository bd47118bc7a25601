"""Any file gives pixels or a known reason for rejection, in bounded memory and time.

Everything runs in a sandbox's child, so that a crash or a hang is a reason too and ends no test.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support import picture
from xlsd_cache.images.decode import decode
from xlsd_cache.images.header import FORMATS, MAX_PIXELS, read_header
from xlsd_cache.images.sandbox import Sandbox
from xlsd_cache.outcomes import Reason, Rejected

SIZE = (24, 16)  # of the pixels asked for
# What a file's own bytes may be refused for: the other reasons are the system's or the plan's.
OF_BYTES: set[Reason] = {
    "not_an_image", "unsupported", "truncated", "corrupt",
    "too_many_pixels", "too_much_memory", "decoder_crashed", "decoder_hung",
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(seconds=30, nbytes=3 * 2**30) as sandbox:
        yield sandbox


def valid() -> list[bytes]:
    """A small file of every format, and of the variants that are decoded by code of their own."""
    photo = Image.fromarray(picture(2, 48, 40))
    grey, other = photo.convert("L"), Image.fromarray(picture(3, 48, 40))
    clear = photo.copy()
    clear.putalpha(grey)
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    animated: dict[str, Any] = {"save_all": True, "append_images": [other]}
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((photo, kind, {}) for kind in FORMATS),
        (photo, "JPEG", {"progressive": True, "exif": turned}),
        (photo.resize((400, 300)), "JPEG", {"quality": 20}),  # large enough to be DCT-scaled
        (photo.convert("CMYK"), "JPEG", {}),
        (photo, "MPO", animated),
        (photo.quantize(16), "PNG", {"transparency": 3}),
        (wide, "PNG", {}),
        (photo, "PNG", animated),
        (clear, "WEBP", {"lossless": True}),
        (photo, "WEBP", animated),
        (photo, "GIF", animated),
        (photo.convert("1"), "TIFF", {"compression": "group4"}),
        (photo, "TIFF", {"compression": "jpeg", "exif": turned}),
        (clear, "TIFF", {"compression": "tiff_lzw"}),
        (grey.convert("F"), "TIFF", {"compression": "tiff_deflate"}),
        (clear, "AVIF", {"exif": turned}),
        (photo, "JPEG2000", {"tile_size": (16, 16)}),
        (photo.quantize(16), "BMP", {}),
        (wide, "PPM", {}),
        (clear, "QOI", {}),
    ]
    return [_saved(*one) for one in made]


def _saved(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


VALID = valid()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file with bytes changed, parts left out or doubled, its end cut off or other's."""
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        # Half of all damage near the beginning, where the structure is.
        at = draw(st.integers(0, min(len(data), 200)) | st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from([1, 2, 4, 16, 300])))
        match draw(st.sampled_from(["flip", "set", "cut", "double", "drop", "graft"])):
            case "flip" if at < end:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[at:end] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f"])) * (end - at)
            case "cut":
                del data[end:]
            case "double":
                data[at:at] = data[at:end]
            case "drop":
                del data[at:end]
            case "graft":
                data[at:] = draw(st.sampled_from(VALID))[at:]
    return bytes(data)


def check(sandbox: Sandbox, data: bytes) -> None:
    size = sandbox.call(read_header, io.BytesIO(data), len(data))
    if isinstance(size, Rejected):
        assert size.reason in OF_BYTES, size
        size = (48, 40)  # decode must do without the plan's help
    else:
        width, height = size
        assert 0 < width * height <= MAX_PIXELS
    crop = (0.0, 0.0, float(size[0]), float(size[1]))
    pixels = sandbox.call(decode, data, size, crop, SIZE)
    if isinstance(pixels, Rejected):
        assert pixels.reason in OF_BYTES, pixels
    else:
        assert pixels.shape == (SIZE[1], SIZE[0], 3)
        assert pixels.dtype == np.dtype(np.uint8)


def test_undamaged_files_of_every_format_decode(sandbox: Sandbox) -> None:
    for data in VALID:
        size = sandbox.call(read_header, io.BytesIO(data), len(data))
        assert not isinstance(size, Rejected)
        crop = (0.0, 0.0, float(size[0]), float(size[1]))
        assert not isinstance(sandbox.call(decode, data, size, crop, SIZE), Rejected)


@given(data=damaged())
@settings(max_examples=600)
def test_damaged_files_give_pixels_or_a_reason(sandbox: Sandbox, data: bytes) -> None:
    check(sandbox, data)


@given(head=st.sampled_from(VALID), kept=st.integers(0, 32), rest=st.binary(max_size=300))
@settings(max_examples=200)
def test_noise_gives_a_reason(sandbox: Sandbox, head: bytes, kept: int, rest: bytes) -> None:
    check(sandbox, head[:kept] + rest)
