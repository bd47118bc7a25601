"""Which file names are images'."""

# Decoded or not. Not raw camera files, PSD and the like: they lie beside the picture that was made
# of them, and would share its name.
IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe"}
    | {".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".pgm", ".png", ".ppm", ".qoi", ".tif", ".tiff"}
    | {".webp"}
)
# The same for Arrow's regular expressions: what ends a file name that is an image's.
SUFFIX_PATTERN = rf"(?i)\.(?:{'|'.join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))})$"


def is_image(name: str) -> bool:
    """Whether the name ends like an image's."""
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in IMAGE_SUFFIXES
