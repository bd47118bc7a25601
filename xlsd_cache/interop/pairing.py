"""Which images each cached latent may be of, by name."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from xlsd_cache.files.folders import IMAGE_SUFFIXES
from xlsd_cache.files.uri import BETWEEN, read_source
from xlsd_cache.interop.cache_files import LATENT_CACHE, CacheFile, Found, image_names
from xlsd_cache.interop.formats import Held
from xlsd_cache.sources.scan import scan


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


def image_records(found: Found, images: Path | None, columns: tuple[str, ...]) -> list[Record]:
    """The images that the latents may be of, with captions: in `images`, else where they lay.

    kohya and the safetensors caches lie beside them, ai-toolkit's in a folder beside them;
    OneTrainer's say where they were. SimpleTuner's lie anywhere else.
    """
    roots = {images.expanduser().absolute()} if images else set(found.images)
    for file in () if images else found.files:
        if file.path.parent.name == LATENT_CACHE:
            roots.add(file.path.parent.parent)
        elif file.kind == "onetrainer" and Path(file.image).is_file():
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


@dataclass(frozen=True)
class _Named:
    """An image of one of a latent's possible names, with the most folders in common."""

    name: str
    score: float  # see _in_common
    record: Record


def pair(
    files: Iterable[tuple[CacheFile, Held]], records: list[Record]
) -> dict[CacheFile, list[Record]]:
    """The images that each cache file may be of by name, the surest first; most often one.

    Not where two images fit a name equally well, nor where another cache file fits the image
    better: nothing is better than the wrong caption. What may be part of the name or kohya's own,
    as `_512x768`, is both where images of both names exist.
    """
    files = list(files)
    named = _by_stem(records, any(held.kind == "simpletuner" for _, held in files))
    found: dict[CacheFile, list[_Named]] = {}
    best: dict[str, dict[str, float]] = defaultdict(dict)  # image -> name in the cache -> score
    for file, held in files:
        found[file] = _fitting(image_names(file, held.kind, held.image), named)
        for first in found[file][:1]:
            best[first.record.key][first.name] = first.score
    images = {
        file: [
            one.record
            for one in fitting
            if not any(
                name != one.name and other >= one.score
                for name, other in best[one.record.key].items()
            )
        ]
        for file, fitting in found.items()
    }
    return {file: of for file, of in images.items() if of}


def _by_stem(records: list[Record], hashed: bool) -> dict[str, list[Record]]:
    """The images by name without suffix, and if asked for by its hash as SimpleTuner makes it."""
    named = defaultdict(list)
    for record in records:
        named[record.path.stem].append(record)
    for stem in list(named) if hashed else ():
        named[hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()] += named[stem]
    return named


def _fitting(names: list[str], named: dict[str, list[Record]]) -> list[_Named]:
    """The one image of each name that fits it best; the whole name's alone where it is as near."""
    found: list[_Named] = []
    for name in names:
        said = PurePosixPath(name.replace("\\", "/"))
        stem = said.stem if said.suffix.lower() in IMAGE_SUFFIXES else said.name
        scores = [(_in_common(said, record.path), record) for record in named.get(stem, ())]
        top = max((score for score, _ in scores), default=0.0)
        fitting = [_Named(name, top, record) for score, record in scores if score == top]
        whole = found and found[0].name == names[0] and found[0].score >= top
        if len(fitting) > 1 or (fitting and whole):
            break
        found += fitting
    return found


def _in_common(said: PurePosixPath, path: Path) -> float:
    """How many folders, from the file up, have the same names; an equal suffix breaks ties."""
    count = 0.5 * (said.name == path.name)
    for mine, theirs in zip(reversed(said.parts[:-1]), reversed(path.parts[:-1]), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
