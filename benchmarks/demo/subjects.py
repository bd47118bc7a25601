"""Write the photos of `make article`: crops of scikit-image's photos with tags.

Two folders: OUT/narrow with five subjects, OUT/broad with six others. Crops are random with a
seed and contain their subject. A crop has the tags of all objects that it shows completely.

    python -m benchmarks.demo.subjects OUT
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import tyro
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions
LEAST = 128  # pixels of a crop's shorter side: the training resolution


@dataclass(frozen=True)
class Subject:
    """A photo, the part that every crop contains, and objects that some crops contain."""

    picture: str  # a function of skimage.data
    core: Box  # contained in every crop
    tags: str  # for the core
    more: tuple[tuple[str, Box], ...] = ()


NARROW = (
    Subject(
        "astronaut",
        (0.32, 0.01, 0.55, 0.30),
        "woman, solo, smiling, short hair, brown hair, looking at viewer, photo, realistic",
        (
            ("orange suit", (0.25, 0.30, 0.60, 0.60)),
            ("patch", (0.22, 0.66, 0.44, 0.84)),
            ("flag", (0.02, 0.02, 0.18, 0.40)),
            ("space shuttle", (0.70, 0.03, 0.98, 0.52)),
            ("helmet", (0.52, 0.66, 0.99, 0.99)),
        ),
    ),
    Subject(
        "camera",
        (0.26, 0.10, 0.66, 0.48),
        "man, solo, profile, black coat, camera, greyscale, photo, realistic",
        (("tripod", (0.50, 0.45, 0.80, 0.98)), ("tower", (0.76, 0.20, 0.87, 0.38))),
    ),
    Subject(
        "chelsea",
        (0.16, 0.20, 0.86, 0.86),
        "cat, solo, tabby, green eyes, whiskers, photo, realistic",
        (("ears", (0.02, 0.0, 0.92, 0.4)),),
    ),
    Subject(
        "coffee",
        (0.30, 0.05, 0.66, 0.70),
        "coffee, cup, red cup, wooden table, photo, realistic",
        (("saucer", (0.12, 0.05, 0.82, 0.93)), ("spoon", (0.53, 0.3, 0.72, 0.82))),
    ),
    Subject(
        "rocket",
        (0.40, 0.25, 0.62, 0.98),
        "rocket, launch pad, night, sky, photo, realistic",
        (("tower", (0.02, 0.05, 0.14, 0.95)), ("floodlight", (0.14, 0.80, 0.36, 0.99))),
    ),
)
BROAD = (
    Subject(
        "stereo_motorcycle",
        (0.10, 0.15, 0.95, 0.95),
        "motorcycle, red, garage, photo, realistic",
    ),
    Subject("coins", (0.2, 0.2, 0.6, 0.6), "coins, rows, greyscale, photo, realistic"),
    Subject(
        "moon",
        (0.4, 0.2, 0.8, 0.5),
        "moon, craters, from above, greyscale, photo, realistic",
        (("large crater", (0.15, 0.05, 0.35, 0.27)),),
    ),
    Subject("gravel", (0.3, 0.3, 0.6, 0.6), "gravel, stones, texture, greyscale, photo, realistic"),
    Subject(
        "hubble_deep_field", (0.3, 0.3, 0.6, 0.6), "galaxies, stars, black sky, photo, realistic"
    ),
    Subject(
        "retina",
        (0.3, 0.3, 0.7, 0.7),
        "retina, blood vessels, orange, close-up, realistic",
    ),
)


def crop_around(core: Box, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A random window, nearly square, that contains the core and has sides of at least LEAST."""
    side = rng.uniform(LEAST, min(size))
    window = [0.0, 0.0, 1.0, 1.0]
    for i, length in enumerate(size):
        wide = max(side * rng.uniform(1.0, 1.15) / length, core[i + 2] - core[i])
        wide = min(wide, 1.0)
        first, last = max(0.0, core[i + 2] - wide), min(core[i], 1.0 - wide)
        window[i] = first + (last - first) * rng.random()  # uniform() may raise
        window[i + 2] = window[i] + wide
    return window[0], window[1], window[2], window[3]


def inside(box: Box, crop: Box) -> bool:
    """Whether a crop contains the whole box."""
    return all(crop[i] <= box[i] and box[i + 2] <= crop[i + 2] for i in (0, 1))


def write_subjects(out: Path, subjects: tuple[Subject, ...], each: int, seed: int = 0) -> None:
    """Write `each` crops of every subject, with the tags in a .txt next to each."""
    out.mkdir(parents=True, exist_ok=True)
    for i, subject in enumerate(subjects):
        loaded = getattr(skimage.data, subject.picture)()
        pixels = np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded)  # a stereo pair
        photo = Image.fromarray(pixels).convert("RGB")
        rng = np.random.default_rng([seed, i])
        for n in range(each):
            crop = crop_around(subject.core, photo.size, rng)
            shown = [tag for tag, box in subject.more if inside(box, crop)]
            path = out / f"{subject.picture}_{n:02}.jpg"
            pixel_box = [round(x * photo.size[j % 2]) for j, x in enumerate(crop)]
            photo.crop(pixel_box).save(path, quality=95)  # type: ignore[arg-type]
            path.with_suffix(".txt").write_text(", ".join([subject.tags, *shown]) + "\n")


def main(out: tyro.conf.Positional[Path], each: int = 16) -> None:
    """Write both folders of photos into OUT."""
    for name, subjects in (("narrow", NARROW), ("broad", BROAD)):
        write_subjects(out / name, subjects, each)
        print(f"{each * len(subjects)} photos of {len(subjects)} subjects in {out / name}")


if __name__ == "__main__":
    tyro.cli(main)
