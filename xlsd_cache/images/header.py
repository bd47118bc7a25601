"""Image file bytes -> the size of the image, or the reason for rejection. Decodes nothing."""

import io
import re
from typing import IO

from PIL import AvifImagePlugin, Image, JpegImagePlugin, UnidentifiedImageError

from xlsd_cache.outcomes import Rejected

MAX_PIXELS = 128_000_000  # the default; decoding that many takes 0.5 to 2.3 GiB
MOST_PIXELS = 2**31 - 1  # of any image: its sides must fit the log's int32
ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # its values that swap width and height
FORMATS = tuple("JPEG PNG WEBP GIF BMP DIB TIFF PPM AVIF JPEG2000 QOI".split())
# Pillow only warns up to twice its own limit; ours is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are decoded in parallel already

# First bytes of files that are images even if Pillow does not recognise them.
_MAGIC = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|BM|II[*+]\0|MM\0[*+]|RIFF....WEBP|....ftypavi[fs]"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|qoif",
    re.DOTALL,
)
# Formats whose header is parsed by a C library, which Pillow gives the whole file.
PARSED_IN_C = re.compile(rb"RIFF....WEBP|....ftyp(avi[fs]|mif1|msf1)", re.DOTALL)
# First bytes of image formats that Pillow does not decode here, and their names.
_NOT_DECODED = {
    re.compile(magic, re.DOTALL): name
    for magic, name in (
        (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (rb"II\xbc\x01", "JPEG XR"),
        (rb"8BP[SB]", "Photoshop"),
        (rb"v/1\x01", "OpenEXR"),
        (rb"#\?(RADIANCE|RGBE)", "Radiance HDR"),
        (rb"DDS ", "DDS"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
        (rb"(\xef\xbb\xbf)?\s*<(svg|(\?xml|!--|!DOCTYPE svg).*<svg)\b", "SVG"),
        (rb"II(RO|RS|U\0)|MMOR|FUJIFILM|FOVb|\0MRM|....ftypcrx ", "raw camera data"),
    )
}
# Brands of ISO media files (ISO/IEC 23008-12, 23000-22) that contain images, except AVIF's.
_HEIF = frozenset(
    b"heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 miaf MiHA MiHB MiHE avci j2ki".split()
)
_AVIF = frozenset({b"avif", b"avis"})
_DNG_VERSION, _NEW_SUBFILE_TYPE = 0xC612, 0x00FE  # TIFF tags


def read_header(
    file: IO[bytes], nbytes: int, max_pixels: int = MAX_PIXELS
) -> tuple[int, int] | Rejected:
    """Width and height of the upright image in a seekable file of `nbytes` bytes, at position 0.

    Reads only the header. Invalid content is rejected and never raises.
    """
    try:
        image = open_image(file, nbytes, max_pixels)
        if isinstance(image, Rejected):
            return image
        with image:
            width, height = image.size
            if image.format == "TIFF":  # Pillow reports the upright size of a TIFF
                return width, height
            # PNG's own getexif would decode the whole file to look for a late eXIf chunk.
            orientation = Image.Image.getexif(image).get(ORIENTATION, 1)
            return (height, width) if orientation in SIDEWAYS else (width, height)
    except MemoryError:
        return Rejected("too_much_memory", "reading its header ran out of memory")
    except OSError as error:
        return refused(error)
    except Exception as error:  # Pillow raises errors of all kinds for a malformed header
        return Rejected("corrupt", message(error))


def header_of(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | Rejected:
    """`read_header` of a file in memory."""
    return read_header(io.BytesIO(data), len(data), max_pixels)


def too_large(width: int, height: int, max_pixels: int) -> Rejected | None:
    """The rejection of an image with more than `max_pixels`; None if it has fewer."""
    if width * height <= max_pixels:
        return None
    told = f"{width}x{height} is over {max_pixels / 1e6:g} megapixels; raise --max-megapixels"
    return Rejected("too_many_pixels", told)


def max_bytes(max_pixels: int) -> int:
    """The largest allowed file size: `max_pixels` of 16-bit RGBA, plus room for headers."""
    return 8 * max(MAX_PIXELS, max_pixels) + 2**26


def open_image(file: IO[bytes], nbytes: int, max_pixels: int) -> Image.Image | Rejected:
    """Parse the header and check the size, without decoding anything."""
    head = file.read(16)
    file.seek(0)
    if not nbytes:
        return Rejected("not_an_image", "the file is empty")
    if head[:4] == b"II*\0" and head[8:10] == b"CR":  # Pillow would take it for a TIFF
        return _not_decoded("raw camera data")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        return _unidentified(file, file.read(4096))
    except OSError as error:
        file.seek(0)
        return refused(error, is_cut_webp(file.read(12), nbytes))
    why = too_large(*image.size, max_pixels)
    if why is None and image.format == "TIFF" and _is_preview(image):
        why = _not_decoded("raw camera data")
    if why:
        image.close()
        return why
    return image


def _unidentified(file: IO[bytes], head: bytes) -> Rejected:
    """The rejection of a file that begins with `head` and that Pillow does not recognise."""
    brands = _brands(head)
    for magic, name in _NOT_DECODED.items():
        if magic.match(head):
            return _not_decoded(name)
    if brands & _HEIF and not brands & _AVIF:
        return _not_decoded("HEIF")
    if head.startswith(b"\xff\xd8\xff"):
        file.seek(0)
        try:  # Image.open hides the error
            JpegImagePlugin.JpegImageFile(file).close()
        except SyntaxError as error:
            return Rejected("unsupported" if "-bit" in str(error) else "corrupt", message(error))
    if _MAGIC.match(head) or brands & _AVIF:
        return Rejected("corrupt", f"starts like an image but is not readable: {head[:16]!r}")
    return Rejected("not_an_image", f"starts with {head[:16]!r}")


def _not_decoded(name: str) -> Rejected:
    return Rejected("unsupported", f"{name}, which is not decoded; convert it to PNG or JPEG")


def _brands(head: bytes) -> set[bytes]:
    """The brands of an ISO media file that begins with `head`: the formats that it claims."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head) - 3)
    return {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}


def _is_preview(image: Image.Image) -> bool:
    """Whether a TIFF's first image is a preview of another, as in raw camera files."""
    tags = getattr(image, "tag_v2", {})
    return _DNG_VERSION in tags or bool(tags.get(_NEW_SUBFILE_TYPE, 0) & 1)


def refused(error: OSError, cut: bool = False) -> Rejected:
    """The rejection for an OSError: the system's have an errno, Pillow's do not."""
    if error.errno:
        return Rejected("unreadable", message(error))
    cut = cut or "truncated" in str(error).lower()
    return Rejected("truncated" if cut else "corrupt", message(error))


def is_cut_webp(head: bytes, nbytes: int) -> bool:
    """Whether a RIFF file of `nbytes` bytes is shorter than its header says."""
    return head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > nbytes


def message(error: Exception) -> str:
    """Type and text of an error, cut to what a table can show."""
    return f"{type(error).__name__}: {error}"[:200]
