"""images/s of the VAE on a GPU, and the share of it that `build` reaches."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.card_parts.bench import Bench, Results
from benchmarks.lib.commands import build_time, run_command
from benchmarks.lib.plain_loop import vae_of
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.encoding.vae import Vae, load_vae
from xlsd_cache.runtime.device import set_precision
from xlsd_cache.vocabulary import Precision


def encode(bench: Bench) -> Results:
    """images/s of the VAE alone in each precision, and of the build in fp32."""
    torch.use_deterministic_algorithms(False)  # as `build` leaves it
    bench.free()
    side, count = (64, 4) if bench.tiny else (512, 64)
    results: Results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vae_of(bench.model, "cpu").save_pretrained(folder / "vae")
        vae = load_vae(str(folder / "vae"))
        images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        precisions: tuple[Precision, ...] = ("fp32",) if bench.tiny else ("fp32", "bf16")
        for precision in precisions:
            set_precision(precision)
            results[precision] = {"images_per_s": count / _bare(bench, vae, precision, images)}
        set_precision("fp32")
        seconds, stages = build_time(_build(bench, folder, images))
    rate = count / seconds
    of_bare = rate / results["fp32"]["images_per_s"]
    return {**results, "build": {"images_per_s": rate, "of_bare": of_bare, "stations": stages}}


def _bare(bench: Bench, vae: Vae, precision: Precision, images: NDArray[np.uint8]) -> float:
    """Seconds for all images, encoded in the calls that `build` makes."""
    side = images.shape[1]
    encoder = Encoder.fitted(vae, precision, bench.device, None, side**2)
    parts = [images[i : i + encoder.batch] for i in range(0, len(images), encoder.batch)]
    with encoder.threads(spare=0) as pool:
        return bench.clock(lambda: list(pool.map(encoder.encode, parts)), 1)


def _build(bench: Bench, folder: Path, images: NDArray[np.uint8]) -> list[str]:
    """Run `xlsd-cache build` on pictures as smooth as photos. Returns its log."""
    (folder / "images").mkdir()
    side = images.shape[1]
    for number, image in enumerate(images):
        picture = Image.fromarray(image[: side // 8, : side // 8])
        picture.resize((side, side), Image.Resampling.BICUBIC).save(
            folder / "images" / f"{number:04d}.jpg", quality=92
        )
    options = ["--out", folder / "latents", "--vae", folder / "vae", "--captions", "none"]
    options += ["--resolution", side, "--buckets", "square"]
    options += ["--device", "cpu"] if bench.tiny else []
    return run_command(xlsd_cache, "build", folder / "images", *options)
