"""Options of the images to encode."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from xlsd_cache.console.option_checks import CheckedOptions, Within
from xlsd_cache.images.header import MAX_PIXELS, MOST_PIXELS
from xlsd_cache.options.captions import split_columns


@dataclass(frozen=True)
class SourceOptions(CheckedOptions):
    """Images."""

    source: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES")] = ("images",)
    """Folders (searched recursively), archives (.tar, .tar.gz, .zip), and tables of images or of
    image paths (.parquet, .arrow, .jsonl, .json, .csv). Any number."""

    only: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Use only these images: names (key, path in the source, or file name), patterns such as
    'good/*.png', or text files with one of them per line."""

    exclude: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Skip these images, given as in --only, e.g. '*_mask.*'."""

    image_suffix: str | None = None
    """For samples of several images (webdataset): the suffix of the one to use, e.g. image.jpg for
    0000.image.jpg, whose caption is 0000.txt. Comma-separated. Default: every image is a sample."""

    max_megapixels: Annotated[float, Within(0, MOST_PIXELS / 1e6, above=True)] = MAX_PIXELS / 1e6
    """Reject larger images. Decoding takes up to 24 MiB of memory per megapixel."""

    allow_outside: bool = False
    """Allow rows of tables to name files outside the table's folder and the given sources."""

    rehash: bool = False
    """Read every image again and re-encode those whose content has changed. Without it, an image
    counts as unchanged if its size, mtime, inode and ctime are."""

    forget: Annotated[tuple[str, ...], arg(metavar="SOURCE ...")] = ()
    """Sources of earlier builds that no longer exist: drop their images from the store."""

    @property
    def image_suffixes(self) -> tuple[str, ...]:
        """Suffixes of the images to use, without the first dot; empty: every image."""
        return split_columns(self.image_suffix) if self.image_suffix else ()

    @property
    def max_pixels(self) -> int:
        """--max-megapixels, in pixels."""
        return round(self.max_megapixels * 1e6)
