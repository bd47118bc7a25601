"""Names and types that are written to the disk, in one place."""

from typing import Literal

Precision = Literal["fp32", "tf32", "bf16"]
Padding = Literal["zeros", "reflect"]  # of a VAE's convolutions

# The store's own columns of a sample; any other column is a caption.
RESERVED = frozenset(
    ["key", "source", "bucket", "row", "width", "height", "crop", "content_hash", "crc32c"]
)
