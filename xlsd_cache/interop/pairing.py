"""Match cached latents with images by name."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from xlsd_cache.files.folders import IMAGE_SUFFIXES
from xlsd_cache.files.uri import SEPARATOR, read_source
from xlsd_cache.interop.cache_files import LATENT_CACHE, CacheFile, CacheListing, image_names
from xlsd_cache.interop.formats import CachedLatent
from xlsd_cache.sources.scan import scan


@dataclass(frozen=True)
class SourceImage:
    """An image that a cached latent may belong to."""

    key: str
    source: str  # see files/uri.py
    size: int  # bytes
    captions: dict[str, str] = field(default_factory=dict)  # column -> text

    @property
    def path(self) -> Path:
        """Its name and folders; for a member of an archive, folders inside the archive."""
        return Path(self.source.replace(SEPARATOR, "/"))

    def read(self) -> bytes:
        """The image file's bytes. Raises OSError."""
        return read_source(self.source)


def list_images(
    listing: CacheListing, images: Path | None, columns: tuple[str, ...]
) -> list[SourceImage]:
    """List the images of a cache with their captions, in `images` or where the cache expects them.

    kohya's and safetensors caches are next to the images, ai-toolkit's in a subfolder. OneTrainer's
    record the image paths. SimpleTuner's may be anywhere, so they need `images`.
    """
    roots = {images.expanduser().absolute()} if images else set(listing.image_folders)
    for file in () if images else listing.files:
        if file.path.parent.name == LATENT_CACHE:
            roots.add(file.path.parent.parent)
        elif file.kind == "onetrainer" and Path(file.image).is_file():
            roots.add(Path(file.image).absolute().parent)
    outer = sorted(str(root) for root in roots if not roots & set(root.parents))
    if not outer:
        return []
    scanned = scan(tuple(outer), columns)
    captions: dict[str, dict[str, str]] = defaultdict(dict)
    for row in scanned.captions.to_pylist():
        captions[row["key"]][row["column"]] = row["text"]
    rows = scanned.images.select(["key", "source", "size"]).to_pylist()
    return [SourceImage(**row, captions=captions.get(row["key"], {})) for row in rows]


@dataclass(frozen=True)
class _Candidate:
    """The image that best fits one of a latent's possible names."""

    name: str
    score: float  # see _common_folders
    record: SourceImage


def pair(
    files: Iterable[tuple[CacheFile, CachedLatent]], records: list[SourceImage]
) -> dict[CacheFile, list[SourceImage]]:
    """Find the images that each cache file may belong to by name, the best first; usually one.

    An image is left out where two fit a name equally well, or where another cache file fits it
    better: no caption is better than a wrong one. A suffix such as `_512x768` may be kohya's or
    part of the name, so both readings count where images of both names exist.
    """
    files = list(files)
    named = _by_stem(records, any(latent.kind == "simpletuner" for _, latent in files))
    candidates: dict[CacheFile, list[_Candidate]] = {}
    best: dict[str, dict[str, float]] = defaultdict(dict)  # image key -> name in cache -> score
    for file, latent in files:
        candidates[file] = _candidates(image_names(file, latent.kind, latent.image), named)
        for first in candidates[file][:1]:
            best[first.record.key][first.name] = first.score
    images = {
        file: [
            it.record
            for it in of_file
            if not any(
                name != it.name and other >= it.score for name, other in best[it.record.key].items()
            )
        ]
        for file, of_file in candidates.items()
    }
    return {file: of for file, of in images.items() if of}


def _by_stem(records: list[SourceImage], hashed: bool) -> dict[str, list[SourceImage]]:
    """Index images by stem and, where `hashed`, by the stem's hash as SimpleTuner computes it."""
    named = defaultdict(list)
    for record in records:
        named[record.path.stem].append(record)
    for stem in list(named) if hashed else ():
        named[hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()] += named[stem]
    return named


def _candidates(names: list[str], named: dict[str, list[SourceImage]]) -> list[_Candidate]:
    """The best image for each name; only the full name's where no shorter name fits better."""
    found: list[_Candidate] = []
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        stem = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
        scores = [(_common_folders(path, record.path), record) for record in named.get(stem, ())]
        top = max((score for score, _ in scores), default=0.0)
        fitting = [_Candidate(name, top, record) for score, record in scores if score == top]
        whole = found and found[0].name == names[0] and found[0].score >= top
        if len(fitting) > 1 or (fitting and whole):
            break
        found += fitting
    return found


def _common_folders(wanted: PurePosixPath, path: Path) -> float:
    """How many parent folders, from the file up, have equal names; an equal suffix breaks ties."""
    count = 0.5 * (wanted.name == path.name)
    for mine, theirs in zip(reversed(wanted.parts[:-1]), reversed(path.parts[:-1]), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
