"""A folder of small images in which something happens all the time, and a comparison of stores."""

import io
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image

from xlsd_cache.planning.log_state import read_live
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore

SIZES = ((64, 64), (128, 64), (72, 66))
# What happens, and how often; images become more.
SHARES = {
    "add": 36, "add_at_once": 12, "add_half": 10, "copy": 5, "change": 10, "change_at_once": 5,
    "change_half": 3, "caption": 5, "rename": 7, "delete": 7,
}  # fmt: skip


@dataclass
class Churn:
    """Adds, changes, renames and deletes images of `folder`, some of them written in two parts.

    What happens depends on the seed, when it does on the clock.
    """

    folder: Path
    seed: int = 0
    longest_s: float = 5.0  # between the two parts of a file, and until a late caption
    done: Counter[str] = field(default_factory=Counter)
    _later: list[tuple[float, Path, bytes]] = field(default_factory=list)  # when to append what

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
        self._count = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, seconds: float, per_second: float) -> None:
        """Let so much happen; what was begun is then finished."""
        begun = time.monotonic()
        while (now := time.monotonic() - begun) < seconds:
            while sum(self.done.values()) < now * per_second:
                self.step()
            self._finish(time.monotonic())
            time.sleep(0.5 / per_second)
        self._finish(float("inf"))

    def step(self) -> None:
        """Let one thing happen."""
        (kind,) = self._random.choices(list(SHARES), list(SHARES.values()))
        names = sorted(path for path in self.folder.rglob("*") if path.suffix in {".jpg", ".png"})
        busy = {path for _, path, _ in self._later}
        names = [path for path in names if path not in busy]
        if len(names) < 8 and not kind.startswith("add"):
            kind = "add"
        self.done[kind] += 1
        if kind.startswith("add"):
            return self._add(kind)
        path = self._random.choice(names)
        if kind == "copy":
            shutil.copy(path, path.with_name(f"{self._name()}-copy{path.suffix}"))
        elif kind.startswith("change"):
            self._write(path, self._picture(path.suffix), kind)
        elif kind == "caption":
            path.with_suffix(".txt").write_text(f"changed {self._random.random()}")
        else:
            caption = path.with_suffix(".txt")
            if kind == "delete":
                path.unlink()
                caption.unlink(missing_ok=True)
            else:
                target = path.with_name(f"{self._name()}{path.suffix}")
                path.rename(target)
                if caption.exists() and caption not in busy:
                    caption.rename(target.with_suffix(".txt"))
        return None

    def _add(self, kind: str) -> None:
        name = self._name()
        path = self.folder / f"{self._random.randrange(4)}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path = path.with_suffix(self._random.choice([".jpg", ".png"]))
        caption, when = path.with_suffix(".txt"), self._random.random()
        if when < 0.6:
            caption.write_text(f"picture {name}")
        elif when < 0.9:  # later than the image
            self._later.append((self._soon(), caption, f"late {name}".encode()))
        self._write(path, self._picture(path.suffix), kind)

    def _write(self, path: Path, data: bytes, kind: str) -> None:
        if kind.endswith("_at_once"):
            part = path.with_name(f"{path.name}.part")
            part.write_bytes(data)
            part.rename(path)
        elif kind.endswith("_half"):
            half = len(data) // 2
            path.write_bytes(data[:half])
            self._later.append((self._soon(), path, data[half:]))
        else:
            path.write_bytes(data)

    def pause(self, longest_s: float) -> float:
        """A random time."""
        return self._random.uniform(0, longest_s)

    def _soon(self) -> float:
        return time.monotonic() + self._random.uniform(0, self.longest_s)

    def _finish(self, until: float) -> None:
        due = [it for it in self._later if it[0] <= until]
        self._later = [it for it in self._later if it[0] > until]
        for _, path, data in due:
            with path.open("ab") as file:
                file.write(data)

    def _name(self) -> str:
        self._count += 1
        return f"{self._random.getrandbits(24):06x}-{self._count}"

    def _picture(self, suffix: str) -> bytes:
        """An image that no other equals: a random crop."""
        width, height = self._random.choice(SIZES)
        photo = self._random.choice(self._photos)
        x, y = (self._random.randrange(n - 200) for n in (photo.shape[1], photo.shape[0]))
        crop = Image.fromarray(np.ascontiguousarray(photo[y : y + 200, x : x + 200]))
        crop = crop.resize((width, height)).rotate(self._random.uniform(-8, 8))
        with io.BytesIO() as file:
            crop.save(file, {".jpg": "JPEG", ".png": "PNG"}[suffix])
            return file.getvalue()


def difference(ours: Path, fresh: Path) -> str:
    """What a store has otherwise than a fresh one of the same folder; nothing where all is equal.

    Keys, content hashes, captions, reasons, and bucket, crop and latent of each content. Of images
    with equal content one has the latent: the first that came, or in a fresh store the first by
    name. So such images are compared as a group.
    """
    with LatentStore.open(ours) as left, LatentStore.open(fresh) as right:
        for what, function in (("images", _images), ("captions", _captions)):
            if words := _first(what, function(ours), function(fresh)):
                return words
        return _first("latents", _latents(left), _latents(right))


def _images(store: Path) -> dict[str, Any]:
    manifest = Manifest(store)
    live = read_live(manifest, manifest.generations()[-1]).to_pylist()
    same = {"", "duplicate"}
    return {
        it["key"]: (it["content_hash"], "" if it["reason"] in same else it["reason"]) for it in live
    }


def _captions(store: Path) -> dict[str, Any]:
    manifest = Manifest(store)
    captions = manifest.captions(manifest.generations()[-1]).to_pylist()
    there = _images(store)
    return {f"{it['key']} {it['column']}": it["text"] for it in captions if it["key"] in there}


def _latents(store: LatentStore) -> dict[str, Any]:
    """Content -> bucket, crop, latent; a content that two samples have is an error."""
    found: dict[str, Any] = {}
    for it in store.samples.to_pylist():
        latent = store.read(it["bucket"], [it["row"]]).tobytes()
        assert it["content_hash"] not in found, it["key"]
        found[it["content_hash"]] = it["bucket"], it["crop"], latent
    return found


def _first(what: str, ours: dict[str, Any], fresh: dict[str, Any]) -> str:
    odd = sorted(it for it in ours.keys() | fresh.keys() if ours.get(it) != fresh.get(it))
    if not odd:
        return ""
    values = " and ".join(str(it.get(odd[0]))[:100] for it in (ours, fresh))
    return f"{len(odd)} {what} differ, e.g. {odd[0]}: {values}"


def sums(store: Path) -> dict[str, Any]:
    """What became of all images, without whether it was this build."""
    reasons = Counter(
        it["reason"] or "live"
        for it in read_live(Manifest(store), Manifest(store).generations()[-1]).to_pylist()
    )
    return dict(sorted(reasons.items()))
