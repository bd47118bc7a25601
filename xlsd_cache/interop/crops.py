"""Where SimpleTuner cropped each image: its latents do not say, a table among the images does."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from xlsd_cache.errors import UserError
from xlsd_cache.interop.formats import Contents, pixels
from xlsd_cache.interop.items import Peeked
from xlsd_cache.runtime.bounded_files import read_json

_TABLE_BYTES = 2**29
TABLE = "aspect_ratio_bucket_metadata*.json"


class _Crop(NamedTuple):
    offset: tuple[int, int]  # left, top, in the scaled image
    scaled: tuple[int, int]  # width, height


def add_crops(told: list[Peeked], folders: Iterable[Path]) -> list[Peeked]:
    """SimpleTuner's latents with their crops, of the tables directly in these folders.

    Raises UserError for a table that cannot be read.
    """
    crops: dict[str, _Crop | None] = {}
    for folder in folders:
        for path in sorted(folder.expanduser().glob(TABLE)):
            _read(path, crops)
    return [(file, _cropped(held, crops.get(file.path.stem))) for file, held in told]


def _cropped(held: Contents, crop: _Crop | None) -> Contents:
    if crop is None or not isinstance(held, list):
        return held
    return [replace(one, offset=crop.offset, scaled=crop.scaled) for one in held]


def _read(path: Path, crops: dict[str, _Crop | None]) -> None:
    """Add a table's crops, by both names that SimpleTuner gives a cache file; None: ambiguous."""
    try:
        table = read_json(path, _TABLE_BYTES)
        for image, told in table.items():
            top, left = told["crop_coordinates"]
            width, height = told["intermediary_size"]
            crop = _Crop((pixels(left), pixels(top)), (pixels(width), pixels(height)))
            if not all(crop.scaled):
                raise ValueError(f"an intermediary_size of {width}x{height}")
            stem = Path(image).stem
            for name in (stem, hashlib.sha256(stem.encode()).hexdigest()):
                crops[name] = crop if crops.get(name, crop) == crop else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(
            f"cannot read {path}, which says where SimpleTuner cropped the images: "
            f"{type(error).__name__}: {error}; restore it, or move it away"
        ) from error
