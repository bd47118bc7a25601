"""images/s of `xlsd-cache build`, of a bare encode loop, and of loops like other programs'.

    python benchmarks/cache/build.py                                SDXL's VAE, random weights
    python benchmarks/cache/build.py --vae sdxl --resolution 512    on a GPU, with SDXL's weights

All loops encode the same photos with the same VAE at the same precision. They alternate within each
round, so that ratios are valid when the machine's speed drifts. The bare loops start from decoded
pixels in memory and drop the latents: the best of them is the upper limit. Latents of every
precision are compared with float64.
"""

import copy
import gc
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
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.lib.commands import build_time, run_command
from benchmarks.lib.real_step import machine_of
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.encoding.encoder import Encoder, to_input
from xlsd_cache.encoding.vae import Vae, load_vae
from xlsd_cache.runtime.device import set_precision
from xlsd_cache.vocabulary import Precision

Batch = NDArray[np.uint8]  # [B, H, W, 3]


@dataclass(frozen=True)
class BuildBenchmarkConfig(JsonOption):
    """Measure `xlsd-cache build`."""

    vae: str = "shape"
    """shape: SDXL's architecture with random weights. Otherwise as in xlsd-cache build."""

    images: int = 24
    """Photos: 512x512 JPEG crops of those that scikit-image ships, one bucket."""

    resolution: int = 128
    """Side of the encoded squares in pixels."""

    rounds: int = 3
    """Turns of every loop; the median is reported."""

    precision: Precision = "fp32"
    """Precision of the rates. Errors of the latents are measured for all precisions."""

    workers: int = 4
    """As in xlsd-cache build."""


def main(config: BuildBenchmarkConfig, command: Sequence[str]) -> None:
    """Print a table of rates and one of errors."""
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = str(make_vae(folder / "vae")) if config.vae == "shape" else config.vae
        vae = load_vae(spec)
        paths = make_photos(folder / "images", config.images)
        report = Report("benchmarks/cache/build.py", command, machine_of(device.type))
        report.fact("precision", set_precision(config.precision))
        print(f"VAE: {config.vae}; {config.images} photos to {config.resolution}x", end="")
        print(f"{config.resolution}, median of {config.rounds} rounds")
        measure_rates(config, vae, spec, paths, device, folder, report)
        measure_errors(vae, pixels_of(paths[:4], config.resolution), device, report)
    report.write(config.json)


def measure_rates(
    config: BuildBenchmarkConfig, vae: Vae, spec: str, paths: list[Path], device: torch.device,
    folder: Path, report: Report,
) -> None:  # fmt: skip
    """images/s of every loop, also as a share of the best bare loop."""
    side = config.resolution
    ready = pixels_of(paths, side)
    fitted = Encoder.fitted(vae, config.precision, device, None, side**2)
    eight = Encoder(vae, config.precision, device, 8)
    stages: list[str] = []
    out = folder / "peer"
    out.mkdir()
    bare: dict[str, Callable[[], float]] = {
        "bare, 8 per call": lambda: clock(lambda: encode_all(eight, ready)),
        f"bare, {fitted.calls} x {fitted.batch} per call": lambda: clock(
            lambda: encode_all(fitted, ready)
        ),
    }
    whole: dict[str, Callable[[], float]] = {
        "xlsd-cache build": lambda: build(config, spec, paths[0].parent, stages),
        "as OneTrainer": lambda: clock(lambda: two_threads(eight, paths, side, out)),
        "as a script": lambda: clock(lambda: one_by_one(eight, paths, side, out)),
        "as kohya": lambda: clock(lambda: batches_and_gc(eight, paths, side, out)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*bare, *whole)}
    encode_all(eight, ready[:8])  # the first call chooses kernels
    for _ in range(config.rounds):
        for name, loop in (bare | whole).items():
            seconds[name].append(loop())
    rates = {name: len(paths) / statistics.median(times) for name, times in seconds.items()}
    best = max(rates[name] for name in bare)
    print(f"{'':<22}{'images/s':>9}{'of the best bare loop':>23}")
    for name, rate in rates.items():
        print(f"{name:<22}{rate:>9.3g}{rate / best:>23.3f}")
        bare_loop = name in bare
        report.add("rate", loop=name, bare=bare_loop, images_per_s=rate, of_best_bare=rate / best)
    report.fact("stages of build", stages[-1])


def clock(work: Callable[[], None]) -> float:
    """Seconds that `work` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def encode_all(encoder: Encoder, pixels: Batch) -> None:
    """Encode pixels from memory and drop the latents."""
    calls = [pixels[i : i + encoder.batch] for i in range(0, len(pixels), encoder.batch)]
    with encoder.threads(spare=0) as pool:
        for future in [pool.submit(encoder.encode, call) for call in calls]:
            future.result()


def build(config: BuildBenchmarkConfig, spec: str, images: Path, stages: list[str]) -> float:
    """Build a new store; the seconds are those that `build` logs: first decode to last commit."""
    with tempfile.TemporaryDirectory() as out:
        options = ("--out", out, "--vae", spec, "--captions", "none", "--workers", config.workers,
                   "--resolution", config.resolution, "--buckets", "square",
                   "--precision", config.precision)  # fmt: skip
        seconds, line = build_time(run_command(xlsd_cache, "build", images, *options))
    stages.append(line.removeprefix("time: "))
    return seconds


def load(path: Path, side: int) -> Batch:
    """One photo as a plain loop decodes it: uint8 [1, H, W, 3]."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return np.array(small)[None]


def pixels_of(paths: list[Path], side: int) -> Batch:
    """All photos: uint8 [n, H, W, 3]."""
    return np.concatenate([load(path, side) for path in paths])


def one_by_one(encoder: Encoder, paths: list[Path], side: int, out: Path) -> None:
    """Load, encode and save one image after the other as safetensors."""
    for path in paths:
        save_file({"latent": encoder.encode(load(path, side))[0]}, out / f"{path.stem}.safetensors")


def two_threads(encoder: Encoder, paths: list[Path], side: int, out: Path) -> None:
    """Two threads, each loading, encoding and saving one image at a time."""

    def cache(path: Path) -> None:
        latent = torch.from_numpy(encoder.encode(load(path, side))[0])
        torch.save(latent, out / f"{path.stem}.pt")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cache, paths))


def batches_and_gc(encoder: Encoder, paths: list[Path], side: int, out: Path) -> None:
    """Load, encode and save batches of eight as npz, with `gc.collect()` after each batch."""
    for start in range(0, len(paths), 8):
        part = paths[start : start + 8]
        latents = encoder.encode(pixels_of(part, side))
        for path, latent in zip(part, latents, strict=True):
            size = np.array([side, side])
            np.savez(out / f"{path.stem}.npz", latents=latent, original_size=size, crop_ltrb=size)
        gc.collect()


def measure_errors(vae: Vae, pixels: Batch, device: torch.device, report: Report) -> None:
    """Root mean square error of the latents in each precision, relative to their spread."""
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
        report.add("error", precision=precision, relative_rms=float(error))


def make_vae(folder: Path) -> Path:
    """SDXL's VAE with random weights: the cost of encoding does not depend on them."""
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
    """Write 512x512 JPEGs, each a random crop of one of scikit-image's photos."""
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
    run_script(main, BuildBenchmarkConfig, __doc__)
