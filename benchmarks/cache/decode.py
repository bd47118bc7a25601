"""Images a second that `decode` gives: by format, by the JPEG's route, and through the sandbox.

    python benchmarks/cache/decode.py                    scikit-image's photos, enlarged
    python benchmarks/cache/decode.py PHOTOS             every JPEG of a folder

What is compared takes turns in one run, so that ratios hold when the machine's speed drifts. RMS is
in grey levels over all samples, against the same file decoded fully; one is the most allowed.
"""

import io
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import skimage.data
import tyro
from PIL import Image, features

import xlsd_cache.images.decode
from benchmarks.lib.machine import machine
from xlsd_cache.errors import UserError
from xlsd_cache.images.decode import DRAFT_MARGIN, FORMATS, Pixels, decode, read_header
from xlsd_cache.images.sandbox import Sandbox
from xlsd_cache.outcomes import Rejected

LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class DecodeConfig:
    """Measure decoding."""

    images: tyro.conf.Positional[Path | None] = None
    """A folder of JPEGs to measure on. Default: four photos that scikit-image ships, enlarged."""

    resolution: int = 512
    """Pixels: the side of what comes out."""

    megapixels: float = 24.0
    """Of the enlarged photos, where the JPEG's routes are compared; a 24th of it elsewhere."""

    repeats: int = 5
    """Timed rounds after a warm-up; the median counts."""

    children: int = 2
    """Processes that the sandbox decodes in."""


def main(config: DecodeConfig, args: Sequence[str]) -> None:
    """Print what was measured, and how."""
    turbo = features.version("libjpeg_turbo")
    print(f"machine: {machine('pillow', 'numpy')}, libjpeg-turbo {turbo}")
    print(f"command: {shlex.join(['python', 'benchmarks/cache/decode.py', *args])}")
    small, large = photos(config, config.megapixels / 24), photos(config, config.megapixels)
    by_format(config, small)
    by_route(config, large)
    margins(large)
    through_guard(config, small)


def photos(config: DecodeConfig, megapixels: float) -> list[bytes]:
    """JPEGs: those given, or the four photos enlarged to this size, 4:2:0 at quality 90."""
    if config.images:
        paths = sorted(path for path in config.images.rglob("*") if path.is_file())
        files = [data for data in (path.read_bytes() for path in paths) if data[:2] == b"\xff\xd8"]
        if not files:
            raise UserError(f"no JPEG in {config.images}; name a folder that has some")
        return files
    files = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = Image.fromarray(np.asarray(getattr(skimage.data, name)())).convert("RGB")
        scale = math.sqrt(megapixels * 1e6 / (image.width * image.height))
        size = (round(image.width * scale), round(image.height * scale))
        files.append(encoded(image.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90))
    return files


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of this format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_format(config: DecodeConfig, files: list[bytes]) -> None:
    """The same pictures in every format, decoded to the same size."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    inputs = {kind: [encoded(image, kind) for image in images] for kind in FORMATS}
    seconds = in_turns(
        {kind: partial(everything, inputs[kind], config) for kind in FORMATS}, config.repeats
    )
    mega = sum(image.width * image.height for image in images) / 1e6
    print(f"\nformat     images/s    MP/s  KB an image   ({mega / len(images):.1f} MP an image)")
    for kind in FORMATS:
        rate, size = len(images) / seconds[kind], sum(map(len, inputs[kind])) / len(images) / 1e3
        print(f"{kind:9s} {rate:9.1f} {mega / seconds[kind]:7.1f} {size:12.0f}")


def by_route(config: DecodeConfig, files: list[bytes]) -> None:
    """A JPEG decoded fully, DCT-scaled where that is allowed, and by simplejpeg where installed."""
    routes: dict[str, Callable[[], list[Pixels]]] = {
        "full": lambda: fully(files, config),
        "as built": lambda: everything(files, config),
        "pillow, bare": lambda: [bare_pillow(data, config) for data in files],
    }
    if find_spec("simplejpeg"):
        routes["simplejpeg, bare"] = lambda: [bare_simplejpeg(data, config) for data in files]
    pixels = {name: route() for name, route in routes.items()}
    seconds = in_turns(routes, config.repeats)
    print("\nJPEG route          images/s   RMS, worst photo's")
    for name in routes:
        against = pixels["pillow, bare" if name.endswith("bare") else "full"]
        worst = max(rms(a, b) for a, b in zip(pixels[name], against, strict=True))
        print(f"{name:17s} {len(files) / seconds[name]:10.1f} {worst:10.3f}")
    if not find_spec("simplejpeg"):
        print("simplejpeg is not installed, and not compared")


def margins(files: list[bytes]) -> None:
    """DCT-scaled against full, each at the smallest shrinking at which it is allowed."""
    print("\nDCT-scaled  shrinks by  photos  RMS: median  worst")
    for divisor in (2, 4, 8):
        shrink = divisor * DRAFT_MARGIN
        found = []
        for data in files:
            size = upright(data)
            wanted = (int(size[0] / shrink), int(size[1] / shrink))
            if min(wanted) < 64:
                continue
            crop = (0.0, 0.0, wanted[0] * shrink, wanted[1] * shrink)
            full = with_margin(math.inf, data, size, crop, wanted)
            found.append(rms(with_margin(DRAFT_MARGIN, data, size, crop, wanted), full))
        told = f"{statistics.median(found):12.3f} {max(found):6.3f}" if found else f"{'-':>12s}"
        print(f"1/{divisor} {shrink:18.1f} {len(found):7d} {told}")


def through_guard(config: DecodeConfig, files: list[bytes]) -> None:
    """What it costs to decode in another process, and what several give together."""
    files = files * 8
    shape = (config.resolution, config.resolution, 3)
    with (
        Sandbox(60, 3 * 2**30, config.children) as sandbox,
        ThreadPoolExecutor(config.children) as threads,
    ):

        def guarded(data: bytes) -> Pixels | Rejected:
            return sandbox.call(decode, data, *placed(data, config))

        def undecoded(data: bytes) -> object:  # the file goes there, and pixels come back
            sandbox.call(len, data)
            return sandbox.call(np.ones, shape, np.uint8)

        seconds = in_turns(
            {
                "in this process": lambda: everything(files, config),
                "in one child": lambda: [guarded(data) for data in files],
                f"in {config.children} children": lambda: list(threads.map(guarded, files)),
                "the way alone": lambda: [undecoded(data) for data in files],
            },
            config.repeats,
        )
    print("\nguard              images/s  ms an image")
    for name, total in seconds.items():
        print(f"{name:17s} {len(files) / total:9.1f} {total / len(files) * 1e3:12.2f}")


def everything(files: list[bytes], config: DecodeConfig) -> list[Pixels]:
    """Every file decoded, as a build does it."""
    return [with_margin(DRAFT_MARGIN, data, *placed(data, config)) for data in files]


def fully(files: list[bytes], config: DecodeConfig) -> list[Pixels]:
    """Every file decoded, none of them DCT-scaled."""
    return [with_margin(math.inf, data, *placed(data, config)) for data in files]


Crop = tuple[float, float, float, float]


def with_margin(
    margin: float, data: bytes, size: tuple[int, int], crop: Crop, wanted: tuple[int, int]
) -> Pixels:
    """`decode` with another DRAFT_MARGIN than its own, which nobody else needs to set."""
    xlsd_cache.images.decode.DRAFT_MARGIN = margin
    try:
        pixels = decode(data, size, crop, wanted)
    finally:
        xlsd_cache.images.decode.DRAFT_MARGIN = DRAFT_MARGIN
    if isinstance(pixels, Rejected):
        raise UserError(f"an image does not decode ({pixels}); remove it")
    return pixels


def placed(data: bytes, config: DecodeConfig) -> tuple[tuple[int, int], Crop, tuple[int, int]]:
    """Size, crop box, and what that is resized to."""
    size = upright(data)
    return size, square(*size), (config.resolution, config.resolution)


def square(width: int, height: int) -> Crop:
    """The largest centred square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def upright(data: bytes) -> tuple[int, int]:
    """Width and height by the header."""
    size = read_header(io.BytesIO(data), len(data))
    if isinstance(size, Rejected):
        raise UserError(f"an image does not decode ({size}); remove it")
    return size


def bare_pillow(data: bytes, config: DecodeConfig) -> Pixels:
    """Decoded and resized, with no regard to anything else that may be in the file."""
    side = config.resolution
    with Image.open(io.BytesIO(data)) as image:
        picture = image.resize((side, side), LANCZOS, square(*image.size))
        return np.asarray(picture.convert("RGB"))


def bare_simplejpeg(data: bytes, config: DecodeConfig) -> Pixels:
    """The same with simplejpeg's decoder, into the image that Pillow resizes."""
    import simplejpeg  # type: ignore[import-not-found,unused-ignore]

    side = config.resolution
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    return np.asarray(image.resize((side, side), LANCZOS, square(*image.size)))


def rms(a: Pixels, b: Pixels) -> float:
    """The root of the mean squared difference."""
    return float(np.sqrt(np.square(a.astype(np.float64) - b).mean()))


def in_turns(todo: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in todo}
    for i in range(rounds + 1):
        for name, work in todo.items():
            begun = time.perf_counter()
            work()
            if i:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    try:
        main(tyro.cli(DecodeConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"decode: {error}")
