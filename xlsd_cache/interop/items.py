"""Each cached latent with its image, bucket and crop; the log's line on each."""

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.files.uri import open_source
from xlsd_cache.images.buckets import STEP
from xlsd_cache.images.decode import MOST_PIXELS, read_header
from xlsd_cache.interop.cache_files import CacheFile, Found
from xlsd_cache.interop.formats import Contents, Held, peek
from xlsd_cache.interop.pairing import Record, pair
from xlsd_cache.outcomes import Rejected
from xlsd_cache.schema import PlanEntry
from xlsd_cache.vocabulary import DOWNSCALE

Crop = tuple[float, float, float, float]
MOST_SIDE, MOST_AREA = 99_999, 2**28  # pixels of a bucket: its latents are read whole
Peeked = tuple[CacheFile, Contents]


@dataclass(frozen=True)
class Item:
    """One latent of a cache, with what is known of its image."""

    key: str  # the image's, or the cache file's where there is none or the latent is rejected
    origin: str  # CACHE_FOLDER_NAME/path/of/the/file#array: stays whatever becomes of the image
    file: CacheFile
    held: Held
    image: Record | None = None
    size: tuple[int, int] = (0, 0)  # of the upright image
    crop: Crop = (0.0, 0.0, 0.0, 0.0)  # in upright pixels
    bucket: str = ""
    rejected: Rejected | None = None

    def refused(self, why: Rejected) -> "Item":
        """Rejected, and then under the cache file's name."""
        return replace(self, key=self.origin, bucket="", crop=(0.0, 0.0, 0.0, 0.0), rejected=why)

    def entry(self) -> PlanEntry:
        """The log's line. `size` and `mtime_ns` are the cache file's: it is what was read."""
        why = self.rejected
        return {
            "key": self.key,
            "source": self.image.source if self.image else str(self.file.path),
            "size": self.file.size,
            "mtime_ns": self.file.mtime_ns,
            "width": self.size[0],
            "height": self.size[1],
            "crop": list(self.crop),
            "bucket": self.bucket,
            "row": -1,
            "content_hash": "",
            "reason": why.reason if why else "",
            "detail": why.detail if why else self.origin,
        }


def peek_all(found: Found, workers: int) -> list[Peeked]:
    """What each cache file holds, by its header."""
    with ThreadPoolExecutor(workers) as pool:
        peeked = pool.map(peek, found.files)
        few = len(found.files) < 99
        shown = progress_bar(peeked, "reading headers", len(found.files), unit="file", disable=few)
        return list(zip(found.files, shown, strict=True))


def make_items(
    told: list[Peeked],
    records: list[Record],
    channels: int,
    workers: int,
    choose: Callable[[list[Item]], Item],
) -> tuple[list[Item], int]:
    """Every latent in the cache files, sorted by key, and how many files are of other things.

    `choose` says which of the images that a latent may be of by name it is of.
    """
    with ThreadPoolExecutor(workers) as pool:
        paired = pair(((file, held[0]) for file, held in told if isinstance(held, list)), records)
        images = {record.key: record for of in paired.values() for record in of}
        sizes = dict(zip(images, pool.map(_size, images.values()), strict=True))
        hashes = _hashes(images, pool)
    items: list[Item] = []
    given: set[str] = set()
    claims: dict[str, str] = {}  # content hash -> the first image that has it and a good latent
    other = 0
    for file, held in sorted(told, key=lambda pair: (pair[0].variation, pair[0].key)):
        if held is None:
            other += 1
        elif isinstance(held, Rejected):
            nothing = Held(file.kind, "", (), False)
            items.append(Item(file.key, file.key, file, nothing, rejected=held))
        else:
            for one in held:
                origin = f"{file.key}#{one.name}" if len(held) > 1 else file.key
                bare = Item(origin, origin, file, one)
                of = [
                    replace(bare, image=image, size=sizes[image.key])
                    for image in paired.get(file, ())
                ]
                equal = [item for item in of if one.original == item.size] or of or [bare]
                placed = [_placed(item, channels) for item in equal]
                item = choose(placed) if len(placed) > 1 else placed[0]
                if item.image:
                    item = replace(item, key=_unique(item.image.key, given))
                items.append(_settled(item, hashes, claims))
    return sorted(items, key=lambda item: item.key), other


def _unique(key: str, given: set[str]) -> str:
    """The image's key, numbered where the cache has several latents of it, as augmentations are."""
    name, number = key, 2
    while name in given:
        name, number = f"{key}~{number}", number + 1
    given.add(name)
    return name


def _size(record: Record) -> tuple[int, int]:
    """Width and height of the upright image; zeros where its header cannot be read."""
    try:
        with open_source(record.source) as file:
            size = read_header(file, record.size, MOST_PIXELS)
    except OSError:
        return 0, 0
    return (0, 0) if isinstance(size, Rejected) else size


def _hashes(images: dict[str, Record], pool: ThreadPoolExecutor) -> dict[str, str]:
    """Content hashes of the images that may equal another: equal files have equal sizes."""
    have = Counter(record.size for record in images.values())
    doubtful = [key for key, record in images.items() if have[record.size] > 1]
    hashes = pool.map(content_hash, (images[key] for key in doubtful))
    return {key: content for key, content in zip(doubtful, hashes, strict=True) if content}


def content_hash(record: Record | None) -> str:
    """sha256 of the image; empty where there is none to read."""
    if record is None:
        return ""
    try:
        return hashlib.sha256(record.read()).hexdigest()
    except OSError:
        return ""


def _placed(item: Item, channels: int) -> Item:
    """With its bucket and crop, or rejected."""
    why = _unfit(item, channels)
    if why:
        return replace(item, rejected=why)
    _, height, width = (side * DOWNSCALE for side in item.held.shape)
    crop = (0.0, 0.0, 0.0, 0.0)
    if all(item.size):
        crop = crop_box(item.size, (width, height), item.held.offset, item.held.scaled)
    return replace(item, bucket=f"{width}x{height}", crop=crop)


def _settled(item: Item, hashes: dict[str, str], claims: dict[str, str]) -> Item:
    """Rejected where an equal image has a latent; what is rejected has the cache file's key."""
    content = hashes.get(item.image.key, "") if item.image else ""
    if not item.rejected and item.image and content:
        original = claims.setdefault(content, item.image.key)
        if original != item.image.key:
            return item.refused(Rejected("duplicate", original))
    return item.refused(item.rejected) if item.rejected else item


def _unfit(item: Item, channels: int) -> Rejected | None:
    """Why the latent cannot be used, if it cannot."""
    held = item.held
    if len(held.shape) != 3 or held.shape[0] != channels:
        return Rejected("other_shape", f"{held.name} is {held.shape}, the VAE has {channels} rows")
    if any(not side or side * DOWNSCALE % STEP for side in held.shape[1:]):
        height, width = (side * DOWNSCALE for side in held.shape[1:])
        return Rejected("other_size", f"{width}x{height} is not in steps of {STEP} pixels")
    height, width = (side * DOWNSCALE for side in held.shape[1:])
    if max(height, width) > MOST_SIDE or height * width > MOST_AREA:
        return Rejected("other_size", f"{width}x{height} is larger than any bucket")
    if held.original and all(item.size) and held.original != item.size:
        was, now = ("x".join(map(str, size)) for size in (held.original, item.size))
        return Rejected("changed_image", f"cached from {was}, upright the image is {now} now")
    return None


def crop_box(
    size: tuple[int, int],
    bucket: tuple[int, int],
    offset: tuple[int, int] | None,
    scaled: tuple[int, int] | None = None,
) -> Crop:
    """The part of an image that fills the bucket, at its centre or at `offset` once scaled.

    The image was scaled to `scaled`, or where that is not told, to cover the bucket barely.

    kohya's `trim_and_resize_if_required`, mgds' ScaleCropImage and ppbrown's
    `make_cover_resize_center_crop` agree on it, but for rounding.
    """
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    scale = [now / was for now, was in zip(scaled, size, strict=True)] if scaled else [cover] * 2
    free = [max(0.0, size[axis] - bucket[axis] / scale[axis]) for axis in (0, 1)]
    left, top = (
        (free[0] / 2, free[1] / 2)
        if offset is None
        else (min(offset[0] / scale[0], free[0]), min(offset[1] / scale[1], free[1]))
    )
    right, bottom = left + size[0] - free[0], top + size[1] - free[1]
    return left, top, min(right, float(size[0])), min(bottom, float(size[1]))  # rounding
