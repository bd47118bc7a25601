"""Read SimpleTuner's crops from its metadata table, since its latent files do not hold them."""

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


def add_crops(peeked: list[Peeked], folders: Iterable[Path]) -> list[Peeked]:
    """Add the crops from tables directly in these folders to SimpleTuner's latents.

    Raises UserError for a table that cannot be read.
    """
    crops: dict[str, _Crop | None] = {}
    for folder in folders:
        for path in sorted(folder.expanduser().glob(TABLE)):
            _read(path, crops)
    return [(file, _cropped(latents, crops.get(file.path.stem))) for file, latents in peeked]


def _cropped(latents: Contents, crop: _Crop | None) -> Contents:
    if crop is None or not isinstance(latents, list):
        return latents
    return [replace(latent, offset=crop.offset, scaled=crop.scaled) for latent in latents]


def _read(path: Path, crops: dict[str, _Crop | None]) -> None:
    """Add a table's crops under both names that a cache file may have; None where ambiguous."""
    try:
        table = read_json(path, _TABLE_BYTES)
        for image, entry in table.items():
            top, left = entry["crop_coordinates"]
            width, height = entry["intermediary_size"]
            crop = _Crop((pixels(left), pixels(top)), (pixels(width), pixels(height)))
            if not all(crop.scaled):
                raise ValueError(f"an intermediary_size of {width}x{height}")
            stem = Path(image).stem
            for name in (stem, hashlib.sha256(stem.encode()).hexdigest()):
                crops[name] = crop if crops.get(name, crop) == crop else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(
            f"cannot read {path}, SimpleTuner's table of crops: "
            f"{type(error).__name__}: {error}. Restore it, or move it away."
        ) from error
