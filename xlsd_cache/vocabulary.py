"""Names and types that are written to the disk and shared by options, store and training."""

import re
from functools import lru_cache
from typing import Literal, NamedTuple

Precision = Literal["fp32", "tf32", "bf16"]
Padding = Literal["zeros", "reflect"]  # of a VAE's convolutions

# The store's own columns of a sample; any other column is a caption.
RESERVED = frozenset(
    ["key", "source", "bucket", "row", "width", "height", "crop", "content_hash", "crc32c"]
)
DOWNSCALE = 8  # pixels a latent, in each direction, of every VAE known here
_BUCKET = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_MOST_PIXELS = 2**28  # of a bucket: one latent is read whole


class Bucket(NamedTuple):
    """An aspect-ratio bucket: the size in pixels that its images are resized and cropped to."""

    width: int
    height: int

    @property
    def name(self) -> str:
        """WIDTHxHEIGHT, the name of the bucket's array in the store."""
        return f"{self.width}x{self.height}"

    @classmethod
    @lru_cache(4096)
    def parse(cls, name: str) -> "Bucket":
        """The bucket called `name`. Raises ValueError for what is no size or too large."""
        match = _BUCKET.fullmatch(name)
        bucket = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 0 < bucket.width * bucket.height <= _MOST_PIXELS:
            raise ValueError(f"{name[:40]!r} is no name of a bucket")
        return bucket

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of its latents."""
        return self.height // DOWNSCALE, self.width // DOWNSCALE
