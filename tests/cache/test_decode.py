import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tests.support import picture
from xlsd_cache.decode import MAX_PIXELS, Pixels, Rejected, decode, read_size

WIDTH, HEIGHT = 160, 128
WHOLE = (0.0, 0.0, float(WIDTH), float(HEIGHT))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> Pixels:
    pixels = decode(data, (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT))
    assert not isinstance(pixels, Rejected), pixels
    return pixels


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
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
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
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encoded(stored, kind, exif=exif, **options)
    path = tmp_path / "photo"
    path.write_bytes(data)
    assert read_size(path) == (WIDTH, HEIGHT)
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


def test_other_modes_load(photo: Image.Image) -> None:
    assert distance(decoded(encoded(photo.convert("CMYK"), "JPEG")), np.asarray(photo)) < 10
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


def test_animations_give_their_first_frame(photo: Image.Image) -> None:
    other = Image.fromarray(picture(1, WIDTH, HEIGHT))
    for kind in ("PNG", "WEBP", "TIFF"):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(photo, kind, save_all=True, append_images=[other], **options)
        assert distance(decoded(data), np.asarray(photo)) < 1


def test_cropping_and_resizing_is_covering_and_cutting(photo: Image.Image) -> None:
    big = photo.resize((480, 384), Image.Resampling.BICUBIC)
    pixels = decode(encoded(big, "PNG"), big.size, (60.0, 0.0, 420.0, 384.0), (120, 128))
    covered = big.resize((160, 128), Image.Resampling.LANCZOS).crop((20, 0, 140, 128))
    assert not isinstance(pixels, Rejected)
    assert distance(pixels[:, 4:-4], np.asarray(covered)[:, 4:-4]) < 0.1  # edges see no neighbours


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<html>404</html>", "not_an_image"),
        (b"version https://git-lfs.github.com/spec/v1", "not_an_image"),
        (b"GIF89a\0\0\0\0", "corrupt"),
        (b"\0\0\0\x18ftypheic\0\0\0\0heic", "unsupported"),
    ],
)
def test_files_that_are_no_images_have_a_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    size = read_size(path)
    assert isinstance(size, Rejected)
    assert size.reason == reason
    assert decode(data, (8, 8), (0, 0, 8, 8), (8, 8)) == size


def test_jpegs_with_twelve_bits_are_said_to_be_unsupported(photo: Image.Image) -> None:
    data = bytearray(encoded(photo, "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12  # the sample precision in the frame's header
    pixels = decode(bytes(data), (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT))
    assert isinstance(pixels, Rejected)
    assert pixels.reason == "unsupported"


def test_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 10
    data = encoded(Image.new("1", (8, 8)), "BMP")
    data = data[:18] + struct.pack("<ii", side, side) + data[26:]
    path = tmp_path / "bomb.bmp"
    path.write_bytes(data)
    size = read_size(path)
    assert isinstance(size, Rejected)
    assert size.reason == "too_many_pixels"


def test_missing_and_unreadable_files_have_a_reason(tmp_path: Path) -> None:
    gone, folder = read_size(tmp_path / "gone.jpg"), read_size(tmp_path)
    assert isinstance(gone, Rejected)
    assert gone.reason == "vanished"
    assert isinstance(folder, Rejected)
    assert folder.reason == "unreadable"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_files_are_never_half_a_picture(photo: Image.Image, kind: str) -> None:
    data = encoded(photo, kind)
    for cut in range(100, len(data) - 100, max(1, len(data) // 40)):
        pixels = decode(data[:cut], (WIDTH, HEIGHT), WHOLE, (WIDTH, HEIGHT))
        assert isinstance(pixels, Rejected)
        assert pixels.reason in {"truncated", "corrupt"}


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_files_give_pixels_or_a_reason(data: st.DataObject) -> None:
    kind = data.draw(
        st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "AVIF"])
    )
    original = bytearray(encoded(Image.fromarray(picture(2, 48, 40)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(original[: data.draw(st.integers(0, len(original)))])
    pixels = decode(damaged, (48, 40), (0, 0, 48, 40), (48, 40))
    if isinstance(pixels, Rejected):
        assert pixels.reason
    else:
        assert pixels.shape == (40, 48, 3)
