import base64
import io
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import skimage.data
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tests.support import picture
from xlsd_cache.images.decode import Pixels, decode
from xlsd_cache.images.header import FORMATS, MAX_PIXELS, read_header
from xlsd_cache.outcomes import REASONS, Reason, Rejected

WIDTH, HEIGHT = 160, 128
WHOLE = (0.0, 0.0, float(WIDTH), float(HEIGHT))
# Red 4x, green 5y, blue 128 in 64x48, by libjpeg-turbo with arith_code: Pillow cannot write these.
ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4"
    "UG1RV19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2NjY2NjY2NjY2NjY2P/yQARCAAwAEADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AJyV"
    "yCMgllU9lenC0qyRwDGk+2Z/OwYBqpotTbZzES73bcDhBELNZbDnHU7Im748R1LViASp+iyg8Vk1dNOEkDR8065KsRAM"
    "eTTCUzXPY1FlPV5VEHvHBue06OSZP0qKfJfZ/9k="
)
ARITHMETIC_PROGRESSIVE = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4"
    "UG1RV19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2NjY2NjY2NjY2NjY2P/ygARCAAwAEADASIAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAAAf8AO4hxfmGV"
    "NNqyNNklXF2rjSrJKhdCNg5Lmj4lQeGJcEBIoXvfdNPepP/MAAQQBf/aAAgBAQABBQKWEwQZ44kSpSlKUqD/zAAEEQX/"
    "2gAIAQMBAT8BHlW4KjEaBN12fsPz/8wABBEF/9oACAECAQE/AX6COv/MAAQQBf/aAAgBAQAGPwKo/8wABBAF/9oACAEB"
    "AAE/Id9TiNZJJJJJJJL/2gAMAwEAAgADAAAAEOH/AIsVKqBCi0WA/8wABBEF/9oACAEDAQE/EHn/zAAEEQX/2gAIAQIB"
    "AT8QzGrg/8wABBAF/9oACAEBAAE/EHjW/9k="
)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> Pixels:
    pixels = decode(data, (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT))
    assert not isinstance(pixels, Rejected), pixels
    return pixels


def size_in(path: Path) -> tuple[int, int] | Rejected:
    with path.open("rb") as file:
        return read_header(file, path.stat().st_size)


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(picture(0, WIDTH, HEIGHT))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "QOI"])
def test_lossless_formats_come_back_exactly(photo: Image.Image, kind: str) -> None:
    assert np.array_equal(decoded(encoded(photo, kind)), np.asarray(photo))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_lossy_formats_come_back_nearly(photo: Image.Image, kind: str) -> None:
    assert distance(decoded(encoded(photo, kind, quality=95)), np.asarray(photo)) < 2


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_comes_out_upright(
    photo: Image.Image, kind: str, orientation: int, tmp_path: Path
) -> None:
    undo = {  # how a camera held that way stores the upright picture
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(undo[orientation]) if orientation in undo else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
    data = encoded(stored, kind, exif=exif, **options)
    path = tmp_path / "photo"
    path.write_bytes(data)
    assert size_in(path) == (WIDTH, HEIGHT)
    assert distance(decoded(data), np.asarray(photo)) < 3


def test_alpha_is_composited_on_white_and_hidden_colours_stay_hidden(photo: Image.Image) -> None:
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, 80:] = 255
    image = photo.copy()
    image.putalpha(Image.fromarray(alpha))
    pixels = decoded(encoded(image, "PNG"))
    assert (pixels[:, :79] == 255).all()
    assert np.array_equal(pixels[:, 81:], np.asarray(photo)[:, 81:])


def test_palette_grey_and_colour_key_transparency(photo: Image.Image) -> None:
    for image, key in ((photo.quantize(16), 3), (photo.convert("L"), 100)):
        transparent = np.asarray(image) == key
        assert transparent.any()
        pixels = decoded(encoded(image, "PNG", transparency=key))
        assert (pixels[transparent] == 255).all()
    rgb = np.asarray(photo).copy()
    rgb[:10] = (1, 2, 3)
    pixels = decoded(encoded(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3)))
    assert (pixels[:10] == 255).all()
    assert np.array_equal(pixels[10:], rgb[10:])


def test_sixteen_bit_and_float_samples_are_scaled_not_clipped(photo: Image.Image) -> None:
    grey = np.asarray(photo.convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    for data in (encoded(wide, "PNG"), encoded(wide, "TIFF"), encoded(wide, "PPM")):
        assert np.array_equal(decoded(data)[..., 0], grey)
    unit = Image.fromarray(grey.astype(np.float32) / 255)
    assert np.array_equal(decoded(encoded(unit, "TIFF"))[..., 1], grey)
    beyond = decode(
        encoded(Image.fromarray(grey.astype(np.float32) - 300), "TIFF"),
        (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT),
    )  # fmt: skip
    assert isinstance(beyond, Rejected)
    assert beyond.reason == "unsupported"


def test_sixteen_bit_colours_are_scaled_not_clipped(photo: Image.Image) -> None:
    rgb = np.asarray(photo)
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    for samples, colour in ((rgb, 2), (np.concatenate([rgb, alpha], 2), 6)):
        wide = (samples.astype(np.uint16) * 257).astype(">u2").reshape(HEIGHT, -1)
        rows = b"".join(b"\0" + row.tobytes() for row in wide)
        idat = (b"IDAT", zlib.compress(rows))
        pixels = decoded(png((WIDTH, HEIGHT), idat, depth=16, colour=colour))
        assert np.array_equal(pixels, rgb)
    file = io.BytesIO()
    tifffile.imwrite(file, rgb.astype(np.uint16) * 257, photometric="rgb")
    assert np.array_equal(decoded(file.getvalue()), rgb)


def test_cmyk_with_and_without_adobe_s_marker(photo: Image.Image) -> None:
    cmyk = photo.convert("CMYK")
    marked = encoded(cmyk, "JPEG", quality=95)
    start = marked.index(b"\xff\xee")  # APP14, which says that the inks are stored inverted
    plain = marked[:start] + marked[start + 16 :]
    assert marked[start + 4 : start + 9] == b"Adobe"
    for data in (marked, plain, encoded(cmyk, "TIFF")):  # unmarked ones are inverted just as often
        assert distance(decoded(data), np.asarray(photo)) < 3


@pytest.mark.parametrize("data", [ARITHMETIC, ARITHMETIC_PROGRESSIVE])
def test_arithmetic_coded_jpegs_load(data: str) -> None:
    y, x = np.mgrid[:48, :64]
    ramp = np.stack([4 * x, 5 * y, 128 + 0 * x], axis=-1)
    pixels = decode(base64.b64decode(data), (64, 48), (0, 0, 64, 48), (64, 48))
    assert not isinstance(pixels, Rejected)
    assert np.abs(pixels - ramp).mean() < 5


def test_palettes_with_alpha_and_grey_with_alpha(photo: Image.Image) -> None:
    palette = photo.quantize(8)
    table = bytes([0, 64, 128, 255, 255, 255, 255, 255])
    pixels = decoded(encoded(palette, "PNG", transparency=table)).astype(float)
    colours = np.asarray(palette.convert("RGB")).astype(float)
    opacity = np.frombuffer(table, np.uint8)[np.asarray(palette)][..., None] / 255
    assert np.abs(pixels - (colours * opacity + 255 * (1 - opacity))).max() <= 1
    grey = photo.convert("L")
    grey.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
    for kind in ("PNG", "TIFF"):
        pixels = decoded(encoded(grey, kind)).astype(float)
        value, alpha = (np.asarray(band).astype(float) for band in grey.split())
        expected = value * alpha / 255 + 255 - alpha
        assert np.abs(pixels - expected[..., None]).max() <= 2


def test_other_modes_load(photo: Image.Image) -> None:
    assert set(np.unique(decoded(encoded(photo.convert("1"), "PNG")))) == {0, 255}
    lab = ImageCms.profileToProfile(
        photo, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    assert distance(decoded(encoded(lab, "TIFF")), np.asarray(photo)) < 2


def swapped_profile() -> bytes:
    """An ICC profile (ICC.1:2004-10, matrix/TRC) with sRGB's red and blue primaries swapped."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = {
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.4360, 0.2225, 0.0139),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78,
    }  # fmt: skip
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    header = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ "
    )
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + xyz(0.9642, 1.0, 0.8249)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def test_icc_profiles_are_applied_and_broken_ones_ignored(photo: Image.Image) -> None:
    rgb = np.asarray(photo)
    pixels = decoded(encoded(photo, "PNG", icc_profile=swapped_profile()))
    assert distance(pixels, rgb[..., ::-1]) < 4
    assert distance(pixels, rgb) > 20
    alpha = photo.copy()
    alpha.putalpha(255)
    assert distance(decoded(encoded(alpha, "PNG", icc_profile=swapped_profile())), pixels) < 1
    assert np.array_equal(decoded(encoded(photo, "PNG", icc_profile=b"nonsense")), rgb)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "AVIF", "MPO"])
def test_animations_give_their_first_frame(photo: Image.Image, kind: str) -> None:
    other = Image.fromarray(picture(1, WIDTH, HEIGHT))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(photo, kind, save_all=True, append_images=[other], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert distance(decoded(data), np.asarray(photo)) < (8 if kind == "GIF" else 3)


def test_cropping_and_resizing_is_covering_and_cutting(photo: Image.Image) -> None:
    big = photo.resize((480, 384), Image.Resampling.BICUBIC)
    pixels = decode(encoded(big, "PNG"), big.size, (60.0, 0.0, 420.0, 384.0), (120, 128))
    covered = big.resize((160, 128), Image.Resampling.LANCZOS).crop((20, 0, 140, 128))
    assert not isinstance(pixels, Rejected)
    assert distance(pixels[:, 4:-4], np.asarray(covered)[:, 4:-4]) < 0.1  # edges see no neighbours


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_dct_scaled_jpegs_are_within_a_grey_level_of_fully_decoded_ones(
    mode: str, orientation: int
) -> None:
    """At sizes that no divisor divides, so that a part of a pixel at any edge would show."""
    photo = Image.fromarray(skimage.data.astronaut()).resize((1021, 907)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = encoded(photo, "JPEG", quality=90, exif=exif)
    with Image.open(io.BytesIO(jpeg)) as stored:
        lossless = encoded(stored, "PNG", exif=exif)
    upright = read_header(io.BytesIO(jpeg), len(jpeg))
    assert not isinstance(upright, Rejected)
    width, height = upright
    for shrink in (7.01, 8, 14.5):
        crop = (20.25, 11.5, width - 3.75, height - 8.0)
        size = (int((crop[2] - crop[0]) / shrink), int((crop[3] - crop[1]) / shrink))
        scaled, full = (decode(data, upright, crop, size) for data in (jpeg, lossless))
        assert not isinstance(scaled, Rejected)
        assert not isinstance(full, Rejected)
        assert scaled.shape == full.shape == (*size[::-1], 3)
        rms = np.sqrt(np.square(scaled.astype(float) - full).mean())
        assert 0 < rms <= 1  # 0 would mean that nothing was scaled


def test_jpegs_that_shrink_less_are_decoded_fully() -> None:
    jpeg = encoded(Image.fromarray(skimage.data.astronaut()), "JPEG")
    with Image.open(io.BytesIO(jpeg)) as stored:
        lossless = encoded(stored, "PNG")
    args = ((512, 512), (0.0, 0.0, 512.0, 512.0), (74, 74))
    one, other = decode(jpeg, *args), decode(lossless, *args)
    assert not isinstance(one, Rejected)
    assert not isinstance(other, Rejected)
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "truncated"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avif", "corrupt"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "corrupt"),
        (b"RIFF\xff\0\0\0WEBPVP8 ", "truncated"),
        (b"<html>404</html>", "not_an_image"),
        (b"version https://git-lfs.github.com/spec/v1", "not_an_image"),
        (b"GIF89a\0\0\0\0", "corrupt"),
        (b"\0\0\0\x18ftypheic\0\0\0\0heic", "unsupported"),
    ],
)
def test_files_that_are_no_images_have_a_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    size = size_in(path)
    assert isinstance(size, Rejected)
    assert size.reason == reason
    assert decode(data, (8, 8), (0, 0, 8, 8), (8, 8)) == size


def test_jpegs_with_twelve_bits_are_said_to_be_unsupported(photo: Image.Image) -> None:
    data = bytearray(encoded(photo, "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12  # the sample precision in the frame's header
    pixels = decode(bytes(data), (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT))
    assert isinstance(pixels, Rejected)
    assert pixels.reason == "unsupported"


SIDE = int(MAX_PIXELS**0.5) + 10
NOTHING = zlib.compress(bytes(2**27), 9)  # 128 MiB of zeros in 128 KiB


def png(
    size: tuple[int, int], *more: tuple[bytes, bytes], depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG of these chunks after its header (PNG 3rd edition, 11.2)."""
    header = (b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (header, *more, (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    return data


@pytest.mark.parametrize(
    "data",
    [
        png((SIDE, SIDE), (b"IDAT", NOTHING)),
        b"GIF89a" + struct.pack("<HH3x", SIDE, SIDE)
        + b"," + struct.pack("<4x2Hx", SIDE, SIDE) + b"\2\2\x44\1\0;",
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, SIDE, SIDE, 1, 24, *[0] * 6),
        b"P6 %d %d 255\n" % (SIDE, SIDE),
        b"qoif" + struct.pack(">IIBB", SIDE, SIDE, 3, 0) + bytes(40),
    ],
    ids=["PNG", "GIF", "BMP", "PPM", "QOI"],
)  # fmt: skip
def test_pixel_bombs_are_refused_by_their_header(data: bytes) -> None:
    size = read_header(io.BytesIO(data), len(data))
    assert isinstance(size, Rejected)
    assert size.reason == "too_many_pixels"
    assert decode(data, (SIDE, SIDE), (0, 0, SIDE, SIDE), (8, 8)) == size


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"Comment\0\0" + NOTHING),
        (b"iTXt", b"Comment\0\1\0\0\0" + NOTHING),
        (b"iCCP", b"sRGB\0\0" + NOTHING),
    ],
    ids=lambda chunk: chunk[0].decode(),
)
def test_bombs_in_compressed_text_and_profiles_are_refused(chunk: tuple[bytes, bytes]) -> None:
    data = png((WIDTH, HEIGHT), chunk, (b"IDAT", zlib.compress(bytes(HEIGHT * (3 * WIDTH + 1)))))
    tracemalloc.start()
    size = read_header(io.BytesIO(data), len(data))
    pixels = decode(data, (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(size, Rejected)
    assert size.reason == "corrupt"
    assert pixels == size
    assert peak < 2**23  # bytes, of 2**27


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs a file that cannot be read, even by root"
)
def test_an_error_while_reading_is_not_the_image_s_fault() -> None:
    size = size_in(Path("/proc/self/mem"))  # nothing is mapped at its beginning
    assert isinstance(size, Rejected)
    assert size.reason == "unreadable"


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_an_extension_says_nothing(photo: Image.Image, kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.png" if kind == "JPEG" else "x.jpg")
    path.write_bytes(encoded(photo, kind))
    assert size_in(path) == (WIDTH, HEIGHT)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in FORMATS),
    ("JPEG", {"progressive": True}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("JPEG2000", {"tile_size": (12, 12)}),
]


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_cut_at_any_byte_a_file_is_a_whole_picture_or_refused(
    kind: str, options: dict[str, Any]
) -> None:
    data = encoded(Image.fromarray(picture(2, 20, 14)), kind, **options)
    args = ((20, 14), (0.0, 0.0, 20.0, 14.0), (20, 14))
    whole = decode(data, *args)
    assert not isinstance(whole, Rejected)
    for cut in range(len(data)):
        pixels = decode(data[:cut], *args)
        if isinstance(pixels, Rejected):
            assert pixels.reason in {"not_an_image", "truncated", "corrupt"}
        else:  # all that is missing is how the file says that it ends
            assert np.array_equal(pixels, whole)
            assert cut >= len(data) - 24


def ftyp(*brands: bytes) -> bytes:
    """An ISO media file of these brands, the first the major one, and nothing in it."""
    head = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (len(head) + 4).to_bytes(4, "big") + head + bytes(60)


def dng(tag: int, value: int) -> bytes:
    """A TIFF whose small picture stands for another, as in raw camera files."""
    out = io.BytesIO()
    Image.fromarray(picture(1, 64, 64)).save(out, "TIFF", tiffinfo={tag: value})
    return out.getvalue()


NOT_DECODED = {
    "JPEG XL": (b"\xff\x0a" + bytes(60), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), b"\xff\x0a"),
    "HEIF": (
        *(ftyp(brand) for brand in b"heic heix heim heis hevc hevx hevm hevs".split()),
        *(ftyp(brand) for brand in b"mif1 msf1 miaf".split()),
        ftyp(b"mif1", b"miaf", b"heic"), ftyp(b"isom", b"mif1", b"heic"),
    ),
    "JPEG XR": (b"II\xbc\x01" + bytes(60),),
    "Photoshop": (b"8BPS\0\1" + bytes(60),),
    "OpenEXR": (b"v/1\x01" + bytes(60),),
    "Radiance HDR": (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe",),
    "SVG": (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='x'></svg>",
    ),
    "raw camera data": (
        b"II*\0\x10\0\0\0CR\2\0" + bytes(60), b"IIRO\x08\0\0\0" + bytes(60), ftyp(b"crx "),
        b"FUJIFILMCCD-RAW 0201", dng(254, 1), dng(50706, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_DECODED)
def test_formats_that_are_not_decoded_are_named(name: str, tmp_path: Path) -> None:
    """Whatever the suffix says, and with what to do."""
    for data in NOT_DECODED[name]:
        (tmp_path / "x.jpg").write_bytes(data)
        for found in (
            size_in(tmp_path / "x.jpg"),
            decode(data, (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT)),
        ):
            assert isinstance(found, Rejected)
            assert found.reason == "unsupported"
            assert found.detail == f"{name}, which is not decoded; convert it to PNG or JPEG"


@pytest.mark.parametrize("brand", [b"avif", b"mif1"])
def test_avif_is_decoded_whatever_heif_brands_it_has(photo: Image.Image, brand: bytes) -> None:
    data = encoded(photo, "AVIF")
    data = data[:8] + brand + data[12:]
    assert b"avif" in data[:32]
    assert not isinstance(decode(data, (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT)), Rejected)
    cut = decode(data[:200], (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT))
    assert isinstance(cut, Rejected)
    assert cut.reason in ("corrupt", "truncated")


def test_what_is_no_image_is_not_called_one() -> None:
    pages = (b"<!DOCTYPE html><html><svg></svg></html>", b"<html><body>404</body></html>")
    for data in (*pages, ftyp(b"isom", b"mp42"), b"%PDF-1.7\n", b"<?xml version='1.0'?><a/>"):
        found = read_header(io.BytesIO(data), len(data))
        assert isinstance(found, Rejected)
        assert found.reason == "not_an_image"


def test_every_reason_has_a_meaning() -> None:
    assert tuple(REASONS) == get_args(Reason)  # mypy holds all else to these
