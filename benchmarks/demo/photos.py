"""Write the demo's photos with tag captions: what scikit-image ships, whole and in crops.

python -m benchmarks.demo.photos OUT
"""

from pathlib import Path

import numpy as np
import skimage.data
import tyro
from PIL import Image

# name -> the tags of the whole picture, most important first
TAGS = {
    "astronaut": "woman, solo, astronaut, orange suit, smiling, flag",
    "chelsea": "cat, solo, tabby, close-up, green eyes",
    "coffee": "coffee, cup, saucer, spoon, wooden table",
    "rocket": "rocket, launch pad, night, floodlight",
    "retina": "eye, retina, medical, orange, round",
    "hubble_deep_field": "galaxies, stars, space, black sky",
    "immunohistochemistry": "cells, microscope, tissue, blue, brown",
}
# (left, top, right, bottom) as fractions: other subjects and other aspect ratios
CROPS = {
    "astronaut": {"face": (0.30, 0.0, 0.60, 0.42), "tall": (0.15, 0.0, 0.75, 1.0)},
    "chelsea": {"face": (0.2, 0.0, 0.8, 0.95), "wide": (0.0, 0.1, 1.0, 0.9)},
    "coffee": {"cup": (0.15, 0.1, 0.75, 1.0), "wide": (0.0, 0.2, 1.0, 0.85)},
    "rocket": {"tall": (0.35, 0.0, 0.75, 1.0), "wide": (0.0, 0.2, 1.0, 0.9)},
}


def write_photos(out: Path) -> int:
    """Write every photo and crop as a JPEG or PNG with its tags in a .txt; returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, tags in TAGS.items():
        whole = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
        pictures = {"": whole}
        for crop, (left, top, right, bottom) in CROPS.get(name, {}).items():
            width, height = whole.size
            box = (left * width, top * height, right * width, bottom * height)
            pictures[f"_{crop}"] = whole.crop(box)
        for suffix, picture in pictures.items():
            extra = f", {suffix[1:]} crop" if suffix else ""
            kind = "png" if name == "chelsea" else "jpg"
            picture.convert("RGB").save(out / f"{name}{suffix}.{kind}", quality=95)
            (out / f"{name}{suffix}.txt").write_text(f"{tags}{extra}\n")
            count += 1
    return count


def main(out: tyro.conf.Positional[Path]) -> None:
    """Write the demo's photos into OUT."""
    print(f"{write_photos(out)} photos with captions in {out}")


if __name__ == "__main__":
    tyro.cli(main)
