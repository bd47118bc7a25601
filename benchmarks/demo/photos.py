"""Write the demo's photos with captions: two crops of each of four photos of scikit-image.

Each photo has tags in a .txt and a title in a .title. The words of the titles are not in the tags.

    python -m benchmarks.demo.photos OUT
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import tyro
from PIL import Image


@dataclass(frozen=True)
class Photo:
    """One file: its picture, the crop, and the two captions."""

    picture: str  # a function of skimage.data
    crop: tuple[float, float, float, float]  # left, top, right, bottom as fractions
    tags: str
    title: str


WHOLE = (0.0, 0.0, 1.0, 1.0)
PHOTOS = {
    "astronaut_face.jpg": Photo(
        "astronaut",
        (0.30, 0.0, 0.60, 0.42),
        "woman, solo, portrait, smiling",
        "eileen",
    ),
    "astronaut_suit.jpg": Photo(
        "astronaut",
        (0.15, 0.0, 0.75, 1.0),
        "woman, solo, astronaut, orange suit, flag",
        "eileen in uniform",
    ),
    "cat.png": Photo(
        "chelsea",
        WHOLE,
        "cat, solo, tabby, close-up, green eyes",
        "chelsea",
    ),
    "cat_wide.png": Photo(
        "chelsea",
        (0.0, 0.1, 1.0, 0.9),
        "cat, solo, tabby, wide",
        "chelsea in landscape",
    ),
    "coffee.jpg": Photo(
        "coffee",
        WHOLE,
        "coffee, cup, saucer, spoon, wooden table",
        "an espresso",
    ),
    "coffee_wide.jpg": Photo(
        "coffee",
        (0.0, 0.2, 1.0, 0.85),
        "coffee, cup, wooden table, wide",
        "an espresso in landscape",
    ),
    "rocket.jpg": Photo(
        "rocket",
        WHOLE,
        "rocket, launch pad, night, floodlight",
        "a falcon 9",
    ),
    "rocket_wide.jpg": Photo(
        "rocket",
        (0.0, 0.2, 1.0, 0.9),
        "rocket, launch pad, wide",
        "a falcon 9 in landscape",
    ),
}


def write_photos(out: Path) -> None:
    """Write every photo with its two captions."""
    out.mkdir(parents=True, exist_ok=True)
    for name, photo in PHOTOS.items():
        whole = Image.fromarray(np.asarray(getattr(skimage.data, photo.picture)()))
        width, height = whole.size
        left, top, right, bottom = photo.crop
        part = whole.crop((left * width, top * height, right * width, bottom * height))
        path = out / name
        part.convert("RGB").save(path, quality=95)
        path.with_suffix(".txt").write_text(f"{photo.tags}\n")
        path.with_suffix(".title").write_text(f"{photo.title}\n")


def main(out: tyro.conf.Positional[Path]) -> None:
    """Write the demo's photos into OUT."""
    write_photos(out)
    print(f"{len(PHOTOS)} photos, each with tags and a title, in {out}")


if __name__ == "__main__":
    tyro.cli(main)
