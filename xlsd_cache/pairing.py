"""Which image each cached latent is of, its bucket and crop; the log's line on each."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from xlsd_cache.buckets import STEP
from xlsd_cache.decode import MOST_PIXELS, Rejected, read_header
from xlsd_cache.formats import IMAGE_SUFFIXES
from xlsd_cache.identity import DOWNSCALE
from xlsd_cache.locate import BETWEEN, open_source, read_source
from xlsd_cache.peers import CacheFile, Found, Held, peek
from xlsd_cache.sources import scan

Entry = dict[str, Any]  # one row of manifest.PLAN
Crop = tuple[float, float, float, float]


@dataclass(frozen=True)
class Record:
    """An image that latents may be of."""

    key: str
    source: str  # see locate.py
    size: int  # bytes
    captions: dict[str, str] = field(default_factory=dict)  # column -> text

    @property
    def path(self) -> Path:
        """For its name and folders only: of an archive's member, they end in the archive."""
        return Path(self.source.replace(BETWEEN, "/"))

    def read(self) -> bytes:
        """The image file's bytes. Raises OSError."""
        return read_source(self.source)


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

    def entry(self) -> Entry:
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


def image_records(found: Found, images: Path | None, columns: tuple[str, ...]) -> list[Record]:
    """The images that the latents may be of, with captions: in `images`, else where they lay.

    kohya and the safetensors caches lie beside them; OneTrainer's say where they were.
    """
    roots = {images.expanduser().absolute()} if images else set(found.images)
    for file in () if images else found.files:
        if file.kind == "onetrainer" and Path(file.image).is_file():
            roots.add(Path(file.image).absolute().parent)
    outer = sorted(str(root) for root in roots if not roots & set(root.parents))
    if not outer:
        return []
    seen = scan(tuple(outer), columns)
    captions: dict[str, dict[str, str]] = defaultdict(dict)
    for row in seen.captions.to_pylist():
        captions[row["key"]][row["column"]] = row["text"]
    rows = seen.images.select(["key", "source", "size"]).to_pylist()
    return [Record(**row, captions=captions.get(row["key"], {})) for row in rows]


def pair(files: Iterable[CacheFile], records: list[Record]) -> dict[CacheFile, Record]:
    """The image of each cache file: the one of that name with the most folders in common.

    None where two images fit equally well, or where another cache file fits the image better:
    nothing is better than the wrong caption.
    """
    named = defaultdict(list)
    for record in records:
        named[record.path.stem].append(record)
    found: dict[CacheFile, tuple[float, Record]] = {}
    best: dict[str, dict[str, float]] = defaultdict(dict)  # image -> name in the cache -> score
    for file in files:
        said = PurePosixPath(file.image.replace("\\", "/"))
        stem = said.stem if said.suffix.lower() in IMAGE_SUFFIXES else said.name
        scores = [(_in_common(said, record.path), record) for record in named.get(stem, ())]
        top = max((score for score, _ in scores), default=0.0)
        fitting = [record for score, record in scores if score == top]
        if len(fitting) == 1:
            found[file] = top, fitting[0]
            best[fitting[0].key][file.image] = top
    return {
        file: record
        for file, (score, record) in found.items()
        if not any(
            name != file.image and other >= score for name, other in best[record.key].items()
        )
    }


def _in_common(said: PurePosixPath, path: Path) -> float:
    """How many folders, from the file up, have the same names; an equal suffix breaks ties."""
    count = 0.5 * (said.name == path.name)
    for mine, theirs in zip(reversed(said.parts[:-1]), reversed(path.parts[:-1]), strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def make_items(
    found: Found, records: list[Record], channels: int, workers: int
) -> tuple[list[Item], int]:
    """Every latent in the cache files, sorted by key, and how many files are of other things."""
    with ThreadPoolExecutor(workers) as pool:
        few = len(found.files) < 99
        peeked = pool.map(peek, found.files)
        shown = tqdm(peeked, "reading headers", len(found.files), unit="file", disable=few)
        told = list(zip(found.files, shown, strict=True))
        paired = pair((file for file, held in told if isinstance(held, list)), records)
        images = {record.key: record for record in paired.values()}
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
            items.append(Item(file.key, file.key, file, Held("", (), False), rejected=held))
        else:
            for one in held:
                origin = f"{file.key}#{one.name}" if len(held) > 1 else file.key
                image = paired.get(file)
                item = Item(_unique(image.key, given) if image else origin, origin, file, one)
                if image:
                    item = replace(item, image=image, size=sizes[image.key])
                items.append(_placed(item, channels, hashes, claims))
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


def _placed(item: Item, channels: int, hashes: dict[str, str], claims: dict[str, str]) -> Item:
    """With its bucket and crop; or rejected, and then under the cache file's name."""
    why = _unfit(item, channels)
    content = hashes.get(item.image.key, "") if item.image else ""
    if why is None and item.image and content:
        original = claims.setdefault(content, item.image.key)
        why = None if original == item.image.key else Rejected("duplicate", original)
    if why:
        return replace(item, key=item.origin, rejected=why)
    _, height, width = (side * DOWNSCALE for side in item.held.shape)
    crop = (0.0, 0.0, 0.0, 0.0)
    if all(item.size):
        crop = crop_box(item.size, (width, height), item.held.offset)
    return replace(item, bucket=f"{width}x{height}", crop=crop)


def _unfit(item: Item, channels: int) -> Rejected | None:
    """Why the latent cannot be used, if it cannot."""
    held = item.held
    if len(held.shape) != 3 or held.shape[0] != channels:
        return Rejected("other_shape", f"{held.name} is {held.shape}, the VAE has {channels} rows")
    if any(not side or side * DOWNSCALE % STEP for side in held.shape[1:]):
        height, width = (side * DOWNSCALE for side in held.shape[1:])
        return Rejected("other_size", f"{width}x{height} is not in steps of {STEP} pixels")
    if held.original and all(item.size) and held.original != item.size:
        was, now = ("x".join(map(str, size)) for size in (held.original, item.size))
        return Rejected("changed_image", f"cached from {was}, upright the image is {now} now")
    return None


def crop_box(
    size: tuple[int, int], bucket: tuple[int, int], offset: tuple[int, int] | None
) -> Crop:
    """The part of an image that fills the bucket, at its centre or at `offset` once scaled.

    kohya's `trim_and_resize_if_required`, mgds' ScaleCropImage and ppbrown's
    `make_cover_resize_center_crop` agree on it, but for rounding.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    free = [max(0.0, side - fill / scale) for side, fill in zip(size, bucket, strict=True)]
    left, top = (
        (free[0] / 2, free[1] / 2)
        if offset is None
        else (min(offset[0] / scale, free[0]), min(offset[1] / scale, free[1]))
    )
    right, bottom = left + size[0] - free[0], top + size[1] - free[1]
    return left, top, min(right, float(size[0])), min(bottom, float(size[1]))  # rounding
