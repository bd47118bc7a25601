"""Join each cached latent with its image, bucket and crop, as an entry of the plan."""

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.files.uri import open_source
from xlsd_cache.images.buckets import STEP
from xlsd_cache.images.header import MOST_PIXELS, read_header
from xlsd_cache.interop.cache_files import CacheFile, CacheListing
from xlsd_cache.interop.formats import CachedLatent, Contents, peek
from xlsd_cache.interop.pairing import SourceImage, pair
from xlsd_cache.outcomes import Rejected
from xlsd_cache.schema import PlanEntry
from xlsd_cache.vocabulary import DOWNSCALE

Crop = tuple[float, float, float, float]
MOST_SIDE, MOST_AREA = 99_999, 2**28  # pixels of the largest bucket: latents are read whole
Peeked = tuple[CacheFile, Contents]


@dataclass(frozen=True)
class ImportItem:
    """One cached latent with its image, if there is one."""

    key: str  # the image's, or `origin` where there is no image or the latent is rejected
    origin: str  # CACHE_FOLDER_NAME/path/of/the/file#array, which does not depend on the image
    file: CacheFile
    latent: CachedLatent
    image: SourceImage | None = None
    size: tuple[int, int] = (0, 0)  # width, height of the upright image
    crop: Crop = (0.0, 0.0, 0.0, 0.0)  # in upright pixels
    bucket: str = ""
    rejected: Rejected | None = None

    def reject(self, why: Rejected) -> "ImportItem":
        """The same item rejected, with its origin as the key."""
        return replace(self, key=self.origin, bucket="", crop=(0.0, 0.0, 0.0, 0.0), rejected=why)

    def entry(self) -> PlanEntry:
        """The plan's entry. `size` and `mtime_ns` are the cache file's, since that is read."""
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


def peek_all(listing: CacheListing, workers: int) -> list[Peeked]:
    """Read the header of every cache file."""
    with ThreadPoolExecutor(workers) as pool:
        contents = pool.map(peek, listing.files)
        few = len(listing.files) < 99
        bar = progress_bar(
            contents, "reading headers", len(listing.files), unit="file", disable=few
        )
        return list(zip(listing.files, bar, strict=True))


def make_items(
    peeked: list[Peeked],
    records: list[SourceImage],
    channels: int,
    workers: int,
    choose: Callable[[list[ImportItem]], ImportItem],
) -> tuple[list[ImportItem], int]:
    """All latents of the cache files, sorted by key, and the number of files without latents.

    `choose` picks an image where a latent matches several by name.
    """
    with ThreadPoolExecutor(workers) as pool:
        paired = pair(((file, of[0]) for file, of in peeked if isinstance(of, list)), records)
        images = {record.key: record for of in paired.values() for record in of}
        sizes = dict(zip(images, pool.map(_size, images.values()), strict=True))
        hashes = _hashes(images, pool)
    items: list[ImportItem] = []
    taken: set[str] = set()
    claims: dict[str, str] = {}  # content hash -> key of the first image with it and a good latent
    other = 0
    for file, contents in sorted(peeked, key=lambda pair: (pair[0].variation, pair[0].key)):
        if contents is None:
            other += 1
        elif isinstance(contents, Rejected):
            nothing = CachedLatent(file.kind, "", (), False)
            items.append(ImportItem(file.key, file.key, file, nothing, rejected=contents))
        else:
            for latent in contents:
                origin = f"{file.key}#{latent.name}" if len(contents) > 1 else file.key
                bare = ImportItem(origin, origin, file, latent)
                of = [
                    replace(bare, image=image, size=sizes[image.key])
                    for image in paired.get(file, ())
                ]
                equal = [item for item in of if latent.original == item.size] or of or [bare]
                placed = [_placed(item, channels) for item in equal]
                item = choose(placed) if len(placed) > 1 else placed[0]
                if item.image:
                    item = replace(item, key=_unique(item.image.key, taken))
                items.append(_settled(item, hashes, claims))
    return sorted(items, key=lambda item: item.key), other


def _unique(key: str, taken: set[str]) -> str:
    """The image's key, numbered where the cache has several latents of it (augmentations)."""
    name, number = key, 2
    while name in taken:
        name, number = f"{key}~{number}", number + 1
    taken.add(name)
    return name


def _size(record: SourceImage) -> tuple[int, int]:
    """Width and height of the upright image, or zeros where its header cannot be read."""
    try:
        with open_source(record.source) as file:
            size = read_header(file, record.size, MOST_PIXELS)
    except OSError:
        return 0, 0
    return (0, 0) if isinstance(size, Rejected) else size


def _hashes(images: dict[str, SourceImage], pool: ThreadPoolExecutor) -> dict[str, str]:
    """Content hashes of the images that may be duplicates, i.e. share their file size."""
    sizes = Counter(record.size for record in images.values())
    doubtful = [key for key, record in images.items() if sizes[record.size] > 1]
    hashes = pool.map(content_hash, (images[key] for key in doubtful))
    return {key: content for key, content in zip(doubtful, hashes, strict=True) if content}


def content_hash(record: SourceImage | None) -> str:
    """sha256 of the image file, or empty where it cannot be read."""
    if record is None:
        return ""
    try:
        return hashlib.sha256(record.read()).hexdigest()
    except OSError:
        return ""


def _placed(item: ImportItem, channels: int) -> ImportItem:
    """The item with its bucket and crop, or rejected."""
    why = _unfit(item, channels)
    if why:
        return replace(item, rejected=why)
    _, height, width = (side * DOWNSCALE for side in item.latent.shape)
    crop = (0.0, 0.0, 0.0, 0.0)
    if all(item.size):
        crop = crop_box(item.size, (width, height), item.latent.offset, item.latent.scaled)
    return replace(item, bucket=f"{width}x{height}", crop=crop)


def _settled(item: ImportItem, hashes: dict[str, str], claims: dict[str, str]) -> ImportItem:
    """Reject a duplicate image's latent; the key of a rejected item is its origin."""
    content = hashes.get(item.image.key, "") if item.image else ""
    if not item.rejected and item.image and content:
        original = claims.setdefault(content, item.image.key)
        if original != item.image.key:
            return item.reject(Rejected("duplicate", original))
    return item.reject(item.rejected) if item.rejected else item


def _unfit(item: ImportItem, channels: int) -> Rejected | None:
    """Why the latent cannot be used, or None."""
    latent = item.latent
    if len(latent.shape) != 3 or latent.shape[0] != channels:
        return Rejected(
            "other_shape",
            f"{latent.name} has shape {latent.shape}, the VAE has {channels} channels",
        )
    if any(not side or side * DOWNSCALE % STEP for side in latent.shape[1:]):
        height, width = (side * DOWNSCALE for side in latent.shape[1:])
        return Rejected("other_size", f"{width}x{height} is not a multiple of {STEP} pixels")
    height, width = (side * DOWNSCALE for side in latent.shape[1:])
    if max(height, width) > MOST_SIDE or height * width > MOST_AREA:
        return Rejected("other_size", f"{width}x{height} is larger than any bucket")
    if latent.original and all(item.size) and latent.original != item.size:
        was, now = ("x".join(map(str, size)) for size in (latent.original, item.size))
        return Rejected("changed_image", f"was cached at {was}, the upright image is {now} now")
    return None


def crop_box(
    size: tuple[int, int],
    bucket: tuple[int, int],
    offset: tuple[int, int] | None,
    scaled: tuple[int, int] | None = None,
) -> Crop:
    """The crop of an image, in its own pixels, that filled the bucket.

    The image was scaled to `scaled`, by default to just cover the bucket, and cropped at `offset`
    in the scaled image, by default at its centre. kohya's `trim_and_resize_if_required`, mgds'
    ScaleCropImage and ppbrown's `make_cover_resize_center_crop` agree on it up to rounding.
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
