"""Images per second of `xlsd-cache build` against the best bare encode loop, and as peers do it.

    python benchmarks/cache/build.py                                SDXL's VAE shape, random weights
    python benchmarks/cache/build.py --vae sdxl --resolution 512    on a card, with the real one

All contenders encode the same photos with the same VAE at the same precision, and take turns in
every round, so that ratios hold when the machine's speed drifts. The bare loops find their pixels
decoded in memory and keep nothing: the best of them is what the machine can do at all. Latents of
every precision are held against float64.
"""

import contextlib
import copy
import gc
import io
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import skimage.data
import torch
import tyro
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.lib.real_step import machine
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.encoding.encoder import Encoder, to_input
from xlsd_cache.encoding.vae import Vae, load_vae
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.device import set_precision
from xlsd_cache.vocabulary import Precision

Batch = NDArray[np.uint8]  # [B, H, W, 3]


@dataclass(frozen=True)
class CacheConfig:
    """Measure the cache's build."""

    vae: str = "shape"
    """shape: SDXL's architecture with random weights. Or as in xlsd-cache build."""

    images: int = 24
    """Photos: crops of those that scikit-image ships, 512x512 JPEGs, one bucket."""

    resolution: int = 128
    """Pixels a side of what is encoded."""

    rounds: int = 3
    """Turns of every contender; the median counts."""

    precision: Precision = "fp32"
    """Of the rates; the latents' errors are measured for all."""

    workers: int = 4
    """As in xlsd-cache build."""


def main(config: CacheConfig, command: Sequence[str]) -> None:
    """Measure, and print one table of rates and one of errors."""
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = str(make_vae(folder / "vae")) if config.vae == "shape" else config.vae
        vae = load_vae(spec)
        paths = make_photos(folder / "images", config.images)
        print(f"machine: {machine(device.type)}")
        print(f"command: {shlex.join(('python', 'benchmarks/cache/build.py', *command))}")
        print(f"precision: {set_precision(config.precision)}")
        print(f"VAE: {config.vae}; {config.images} photos to {config.resolution}x", end="")
        print(f"{config.resolution}, median of {config.rounds} rounds")
        measure_rates(config, vae, spec, paths, device, folder)
        measure_errors(vae, pixels_of(paths[:4], config.resolution), device)


def measure_rates(
    config: CacheConfig, vae: Vae, spec: str, paths: list[Path], device: torch.device, folder: Path
) -> None:
    """images/s of every contender, and as a share of the best bare loop."""
    side = config.resolution
    ready = pixels_of(paths, side)
    fitted = Encoder.fitted(vae, config.precision, device, None, side**2)
    eight = Encoder(vae, config.precision, device, 8)
    stations: list[str] = []
    out = folder / "peer"
    out.mkdir()
    bare: dict[str, Callable[[], float]] = {
        "bare, 8 a call": lambda: clock(lambda: encode_all(eight, ready)),
        f"bare, {fitted.calls} x {fitted.batch} a call": lambda: clock(
            lambda: encode_all(fitted, ready)
        ),
    }
    whole: dict[str, Callable[[], float]] = {
        "xlsd-cache build": lambda: build(config, spec, paths[0].parent, stations),
        "as OneTrainer": lambda: clock(lambda: two_threads(eight, paths, side, out)),
        "as a script": lambda: clock(lambda: one_by_one(eight, paths, side, out)),
        "as kohya": lambda: clock(lambda: batches_and_gc(eight, paths, side, out)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*bare, *whole)}
    encode_all(eight, ready[:8])  # the first call chooses kernels
    for _ in range(config.rounds):
        for name, contender in (bare | whole).items():
            seconds[name].append(contender())
    rates = {name: len(paths) / statistics.median(times) for name, times in seconds.items()}
    best = max(rates[name] for name in bare)
    print(f"{'':<22}{'images/s':>9}{'of the best bare loop':>23}")
    for name, rate in rates.items():
        print(f"{name:<22}{rate:>9.3g}{rate / best:>23.3f}")
    print(f"build's {stations[-1]}")


def clock(work: Callable[[], None]) -> float:
    """Seconds that `work` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def encode_all(encoder: Encoder, pixels: Batch) -> None:
    """Encode pixels that are decoded already, and drop the latents."""
    calls = [pixels[i : i + encoder.batch] for i in range(0, len(pixels), encoder.batch)]
    with encoder.threads(spare=0) as pool:
        for future in [pool.submit(encoder.encode, call) for call in calls]:
            future.result()


def build(config: CacheConfig, spec: str, images: Path, stations: list[str]) -> float:
    """The real build into a new store; its own clock, from the first decode to the last commit."""
    with tempfile.TemporaryDirectory() as out:
        options = ("--out", out, "--vae", spec, "--captions", "none", "--workers", config.workers,
                   "--resolution", config.resolution, "--buckets", "square",
                   "--precision", config.precision)  # fmt: skip
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if xlsd_cache(["build", str(images), *map(str, options)]):
                raise UserError("the build failed; see above")
    (time_line,) = re.findall(r"^time: .*$", printed.getvalue(), re.MULTILINE)
    stations.append(time_line)
    return float(time_line.split()[1])


def load(path: Path, side: int) -> Batch:
    """One photo as a plain loop decodes it: [1, H, W, 3]."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return np.array(small)[None]


def pixels_of(paths: list[Path], side: int) -> Batch:
    """All photos in memory."""
    return np.concatenate([load(path, side) for path in paths])


def one_by_one(encoder: Encoder, paths: list[Path], side: int, out: Path) -> None:
    """Load, encode, save one image after the other, a safetensors file each."""
    for path in paths:
        save_file({"latent": encoder.encode(load(path, side))[0]}, out / f"{path.stem}.safetensors")


def two_threads(encoder: Encoder, paths: list[Path], side: int, out: Path) -> None:
    """Two threads, each loading, encoding and saving an image at a time; torch's threads shared."""

    def cache(path: Path) -> None:
        latent = torch.from_numpy(encoder.encode(load(path, side))[0])
        torch.save(latent, out / f"{path.stem}.pt")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cache, paths))


def batches_and_gc(encoder: Encoder, paths: list[Path], side: int, out: Path) -> None:
    """Batches of eight, each loaded, encoded, saved as npz and followed by `gc.collect()`."""
    for start in range(0, len(paths), 8):
        part = paths[start : start + 8]
        latents = encoder.encode(pixels_of(part, side))
        for path, latent in zip(part, latents, strict=True):
            size = np.array([side, side])
            np.savez(out / f"{path.stem}.npz", latents=latent, original_size=size, crop_ltrb=size)
        gc.collect()


def measure_errors(vae: Vae, pixels: Batch, device: torch.device) -> None:
    """Root mean square error of the latents of each precision, relative to their spread."""
    double = replace(vae, model=copy.deepcopy(vae.model).cpu().double())
    with torch.inference_mode():
        exact = double.encode(to_input(torch.from_numpy(pixels)).double()).numpy()
    print("error of the latents against float64, relative to their spread:")
    for precision in ("fp32", "tf32", "bf16"):
        if precision == "tf32" and device.type == "cpu":
            continue  # a CPU has no TF32
        set_precision(precision)
        latents = Encoder(vae, precision, device).encode(pixels)
        error = np.sqrt(np.mean(np.square(latents - exact))) / exact.std()
        print(f"  {precision}  {error:.1e}")


def make_vae(folder: Path) -> Path:
    """SDXL's VAE with random weights: what encoding costs does not depend on them."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        scaling_factor=0.13025,
    ).save_pretrained(folder)
    return folder


def make_photos(folder: Path, count: int) -> list[Path]:
    """512x512 JPEGs, each another crop of one of scikit-image's photos."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    paths = []
    for i in range(count):
        image = Image.fromarray(sources[i % len(sources)])
        side = float(rng.uniform(0.5, 1.0)) * min(image.size)
        x, y = (float(rng.uniform(0, length - side)) for length in image.size)
        box = (x, y, x + side, y + side)
        crop = image.resize((512, 512), Image.Resampling.LANCZOS, box)
        paths.append(folder / f"{i:04d}.jpg")
        crop.save(paths[-1], quality=92)
    return paths


if __name__ == "__main__":
    try:
        main(tyro.cli(CacheConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"cache: {error}")
