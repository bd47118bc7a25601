"""Decoding in images/s: by format, by JPEG route (full or DCT-scaled), and in sandbox processes.

    python benchmarks/cache/decode.py                    scikit-image's photos, enlarged
    python benchmarks/cache/decode.py PHOTOS             all JPEGs of a folder

Alternatives run in turns, so that ratios are valid when the machine's speed drifts. RMS is in grey
levels over all samples, against the same file decoded at full size. At most 1 is allowed.
"""

import io
import math
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
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.errors import UserError
from xlsd_cache.images.decode import DRAFT_MARGIN, Pixels, decode
from xlsd_cache.images.header import FORMATS, read_header
from xlsd_cache.images.sandbox import Sandbox
from xlsd_cache.outcomes import Rejected

LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class DecodeConfig(JsonOption):
    """Measure decoding."""

    images: tyro.conf.Positional[Path | None] = None
    """A folder with JPEGs. Default: four photos that scikit-image ships, enlarged."""

    resolution: int = 512
    """Side of the decoded squares in pixels."""

    megapixels: float = 24.0
    """Size of the enlarged photos for the JPEG routes. The other tables use 1/24 of it."""

    repeats: int = 5
    """Timed rounds after a warm-up; the median is reported."""

    children: int = 2
    """Sandbox processes."""


def main(config: DecodeConfig, args: Sequence[str]) -> None:
    """Print four tables."""
    turbo = f"libjpeg-turbo {features.version('libjpeg_turbo')}"
    report = Report("benchmarks/cache/decode.py", args, f"{machine('pillow', 'numpy')}, {turbo}")
    small, large = photos(config, config.megapixels / 24), photos(config, config.megapixels)
    by_format(config, small, report)
    by_route(config, large, report)
    margins(large, report)
    in_sandbox(config, small, report)
    report.write(config.json)


def photos(config: DecodeConfig, megapixels: float) -> list[bytes]:
    """The JPEGs of the folder, or four photos enlarged to this size, 4:2:0 at quality 90."""
    if config.images:
        paths = sorted(path for path in config.images.rglob("*") if path.is_file())
        files = [data for data in (path.read_bytes() for path in paths) if data[:2] == b"\xff\xd8"]
        if not files:
            raise UserError(f"{config.images}: no JPEG in this folder; give a folder with JPEGs")
        return files
    files = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = Image.fromarray(np.asarray(getattr(skimage.data, name)())).convert("RGB")
        scale = math.sqrt(megapixels * 1e6 / (image.width * image.height))
        size = (round(image.width * scale), round(image.height * scale))
        files.append(encoded(image.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90))
    return files


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode the image in this format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_format(config: DecodeConfig, files: list[bytes], report: Report) -> None:
    """Decode the same pictures from every format to the same size."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    inputs = {kind: [encoded(image, kind) for image in images] for kind in FORMATS}
    seconds = in_turns(
        {kind: partial(decode_all, inputs[kind], config) for kind in FORMATS}, config.repeats
    )
    mega = sum(image.width * image.height for image in images) / 1e6
    print(f"\nformat     images/s    MP/s  KB/image   ({mega / len(images):.1f} MP per image)")
    for kind in FORMATS:
        rate, size = len(images) / seconds[kind], sum(map(len, inputs[kind])) / len(images) / 1e3
        print(f"{kind:9s} {rate:9.1f} {mega / seconds[kind]:7.1f} {size:10.0f}")
        report.add("format", format=kind, images_per_s=rate, kb_per_image=size)


def by_route(config: DecodeConfig, files: list[bytes], report: Report) -> None:
    """Decode JPEGs at full size, as `build` does it, with bare Pillow, and with simplejpeg."""
    routes: dict[str, Callable[[], list[Pixels]]] = {
        "full": lambda: decode_all(files, config, math.inf),
        "as built": lambda: decode_all(files, config),
        "pillow, bare": lambda: [bare_pillow(data, config) for data in files],
    }
    if find_spec("simplejpeg"):
        routes["simplejpeg, bare"] = lambda: [bare_simplejpeg(data, config) for data in files]
    pixels = {name: route() for name, route in routes.items()}
    seconds = in_turns(routes, config.repeats)
    print("\nJPEG route          images/s   RMS of the worst photo")
    for name in routes:
        against = pixels["pillow, bare" if name.endswith("bare") else "full"]
        worst = max(rms(a, b) for a, b in zip(pixels[name], against, strict=True))
        rate = len(files) / seconds[name]
        print(f"{name:17s} {rate:10.1f} {worst:10.3f}")
        report.add("route", route=name, images_per_s=rate, worst_rms=worst)
    if not find_spec("simplejpeg"):
        print("simplejpeg is not installed, so it is not compared")


def margins(files: list[bytes], report: Report) -> None:
    """Compare DCT-scaled with full decoding at the smallest reduction that allows each scale."""
    print("\nDCT scale   reduction   photos  RMS: median  worst")
    for divisor in (2, 4, 8):
        shrink = divisor * DRAFT_MARGIN
        errors = []
        for data in files:
            size = upright(data)
            wanted = (int(size[0] / shrink), int(size[1] / shrink))
            if min(wanted) < 64:
                continue
            crop = (0.0, 0.0, wanted[0] * shrink, wanted[1] * shrink)
            full = with_margin(math.inf, data, size, crop, wanted)
            errors.append(rms(with_margin(DRAFT_MARGIN, data, size, crop, wanted), full))
        median, worst = (statistics.median(errors), max(errors)) if errors else (None, None)
        cells = f"{median:12.3f} {worst:6.3f}" if errors else f"{'-':>12s}"
        print(f"1/{divisor} {shrink:18.1f} {len(errors):7d} {cells}")
        row = {"photos": len(errors), "median_rms": median, "worst_rms": worst}
        report.add("margin", scale=f"1/{divisor}", reduction=shrink, **row)


def in_sandbox(config: DecodeConfig, files: list[bytes], report: Report) -> None:
    """Decode in this process, in one sandbox process and in several."""
    files = files * 8
    shape = (config.resolution, config.resolution, 3)
    with (
        Sandbox(60, 3 * 2**30, config.children) as sandbox,
        ThreadPoolExecutor(config.children) as threads,
    ):

        def in_child(data: bytes) -> Pixels | Rejected:
            return sandbox.call(decode, data, *placed(data, config))

        def transferred(data: bytes) -> object:  # only the transfer: the file there, pixels back
            sandbox.call(len, data)
            return sandbox.call(np.ones, shape, np.uint8)

        seconds = in_turns(
            {
                "in this process": lambda: decode_all(files, config),
                "in one child": lambda: [in_child(data) for data in files],
                f"in {config.children} children": lambda: list(threads.map(in_child, files)),
                "transfer alone": lambda: [transferred(data) for data in files],
            },
            config.repeats,
        )
    print("\nsandbox            images/s     ms/image")
    for name, total in seconds.items():
        rate = len(files) / total
        print(f"{name:17s} {rate:9.1f} {1e3 / rate:12.2f}")
        report.add("sandbox", where=name, images_per_s=rate)


def decode_all(
    files: list[bytes], config: DecodeConfig, margin: float = DRAFT_MARGIN
) -> list[Pixels]:
    """Decode every file, with the default margin as a build does it."""
    return [with_margin(margin, data, *placed(data, config)) for data in files]


Crop = tuple[float, float, float, float]


def with_margin(
    margin: float, data: bytes, size: tuple[int, int], crop: Crop, wanted: tuple[int, int]
) -> Pixels:
    """`decode` with this DRAFT_MARGIN; infinity never scales in the DCT."""
    xlsd_cache.images.decode.DRAFT_MARGIN = margin
    try:
        pixels = decode(data, size, crop, wanted)
    finally:
        xlsd_cache.images.decode.DRAFT_MARGIN = DRAFT_MARGIN
    if isinstance(pixels, Rejected):
        raise UserError(f"an image cannot be decoded ({pixels}); remove it")
    return pixels


def placed(data: bytes, config: DecodeConfig) -> tuple[tuple[int, int], Crop, tuple[int, int]]:
    """The size, the crop box, and the size that the crop is resized to."""
    size = upright(data)
    return size, square(*size), (config.resolution, config.resolution)


def square(width: int, height: int) -> Crop:
    """The largest centred square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def upright(data: bytes) -> tuple[int, int]:
    """Width and height by the header, after the EXIF orientation."""
    size = read_header(io.BytesIO(data), len(data))
    if isinstance(size, Rejected):
        raise UserError(f"an image cannot be decoded ({size}); remove it")
    return size


def bare_pillow(data: bytes, config: DecodeConfig) -> Pixels:
    """Decode and resize with Pillow alone: no orientation, no colour profile, no checks."""
    side = config.resolution
    with Image.open(io.BytesIO(data)) as image:
        picture = image.resize((side, side), LANCZOS, square(*image.size))
        return np.asarray(picture.convert("RGB"))


def bare_simplejpeg(data: bytes, config: DecodeConfig) -> Pixels:
    """Decode with simplejpeg and resize with Pillow."""
    import simplejpeg  # type: ignore[import-not-found,unused-ignore]

    side = config.resolution
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    return np.asarray(image.resize((side, side), LANCZOS, square(*image.size)))


def rms(a: Pixels, b: Pixels) -> float:
    """Root mean square difference."""
    return float(np.sqrt(np.square(a.astype(np.float64) - b).mean()))


def in_turns(todo: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in todo}
    for i in range(rounds + 1):
        for name, work in todo.items():
            begun = time.perf_counter()
            work()
            if i:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    run_script(main, DecodeConfig, __doc__)
