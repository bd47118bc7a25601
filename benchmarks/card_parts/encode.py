"""images/s of the best bare encode loop on a GPU, and the share of it that `build` reaches."""

import os
import shutil
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.card_parts.bench import Bench, Results
from benchmarks.lib.commands import build_time, run_command
from benchmarks.lib.flops import FlopCounter
from benchmarks.lib.plain_loop import vae_of
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.encoding.encoder import to_input
from xlsd_cache.encoding.vae import Vae, load_vae
from xlsd_cache.images.sandbox import decoders
from xlsd_cache.runtime.device import set_precision
from xlsd_cache.runtime.gpu_memory import is_full
from xlsd_cache.vocabulary import Precision

NCHW, NHWC = torch.contiguous_format, torch.channels_last


@dataclass(frozen=True)
class Loop:
    """A bare loop: from pixels in pinned memory to latents in pinned memory, and nothing else."""

    batch: int = 16
    pixels: torch.memory_format = NCHW
    weights: torch.memory_format = NCHW
    in_flight: int = 2  # calls that are launched before the first is waited for

    def __str__(self) -> str:
        layouts = {NCHW: "NCHW", NHWC: "NHWC"}
        layout = f"pixels {layouts[self.pixels]}, weights {layouts[self.weights]}"
        return f"{self.in_flight} x {self.batch}, {layout}"

    def seconds(self, bench: Bench, vae: Vae, precision: Precision, images: Tensor) -> float:
        """The time of all images, after a call to choose kernels."""
        vae.model.to(memory_format=self.weights)
        self._run(bench, vae, precision, images[: self.batch])
        bench.sync()
        begun = time.perf_counter()
        self._run(bench, vae, precision, images)
        return time.perf_counter() - begun

    @torch.inference_mode()
    def _run(self, bench: Bench, vae: Vae, precision: Precision, images: Tensor) -> None:
        waiting: deque[torch.cuda.Event] = deque()
        for start in range(0, len(images), self.batch):
            pixels = images[start : start + self.batch]
            on_device = pixels.to(bench.device, non_blocking=True)
            x = to_input(on_device).contiguous(memory_format=self.pixels)
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=precision == "bf16"):
                latents = vae.encode(x)
            latents.float().to("cpu", non_blocking=True)
            if not bench.tiny:
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
                waiting.append(copied)
            if len(waiting) == self.in_flight:
                waiting.popleft().synchronize()
        bench.sync()


def encode(bench: Bench) -> Results:
    """images/s of bare loops and of `build`, in each precision."""
    torch.use_deterministic_algorithms(False)  # as `build` leaves it
    bench.free()
    side, timed, built = (64, 4, 4) if bench.tiny else (512, 64, 256)
    results: Results = {}
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir=_memory()) as ram:
        folder, quick = Path(name), Path(ram)
        vae_of(bench.model, "cpu").save_pretrained(folder / "vae")
        vae = load_vae(str(folder / "vae"))
        images = np.random.default_rng(0).integers(0, 256, (timed, side, side, 3), dtype=np.uint8)
        _write(quick / "images", images, built)
        tflop = _tflop(vae, side)
        results["image"] = {"tflop": tflop}
        vae.model.to(bench.device)
        precisions: tuple[Precision, ...] = ("fp32",) if bench.tiny else ("fp32", "bf16")
        for precision in precisions:
            set_precision(precision)
            peak = bench.card.tflops(precision) if bench.card else None
            rates = _bare(bench, vae, precision, torch.from_numpy(images))
            bench.free()
            best = max(rates, key=rates.__getitem__)
            log = _build(bench, folder, quick, precision, side)
            seconds, stages = build_time(log)
            rates["build"] = built / seconds
            for loop, rate in rates.items():
                share = rate * tflop / peak if peak else None
                told = {"images_per_s": rate, "of_best": rate / rates[best], "of_peak": share}
                results[f"{precision}, {loop}"] = told
            results[f"{precision}, build"] |= {
                "best": best,
                "stations": stages,
                "encoder": next(line for line in log if line.startswith("encoding on")),
            }
    return results


def _bare(bench: Bench, vae: Vae, precision: Precision, images: Tensor) -> dict[str, float]:
    """images/s of each loop: layouts, then batches in the best one, then one call at a time."""
    images = images if bench.tiny else images.pin_memory()
    rates: dict[Loop, float] = {}

    def measure(*loops: Loop) -> Loop:
        for loop in loops:
            bench.free()
            try:
                rates[loop] = len(images) / loop.seconds(bench, vae, precision, images)
            except RuntimeError as error:
                if not is_full(error):
                    raise
        return max(rates, key=rates.__getitem__)

    best = measure(Loop(), Loop(pixels=NHWC), Loop(pixels=NHWC, weights=NHWC))
    best = measure(replace(best, batch=8), replace(best, batch=32))
    measure(replace(best, in_flight=1))
    vae.model.to(memory_format=NCHW)
    return {f"bare, {loop}": rate for loop, rate in rates.items()}


def _tflop(vae: Vae, side: int) -> float:
    """10^12 floating-point operations to encode one image, counted on meta tensors."""
    with torch.device("meta"):
        model = type(vae.model).from_config(vae.model.config)
        pixels = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    with torch.no_grad(), FlopCounter() as counter:  # inference mode hides the convolutions
        replace(vae, model=model).encode(to_input(pixels))
    return float(counter.total / 1e12)


def _memory() -> str | None:
    """A folder in memory with room for the images and latents, where there is one."""
    with suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > 2**28 and os.access("/dev/shm", os.W_OK):
            return "/dev/shm"
    return None


def _write(folder: Path, images: NDArray[np.uint8], count: int) -> None:
    """JPEGs as smooth as photos, of the images in turn."""
    folder.mkdir()
    side = images.shape[1]
    for number in range(count):
        image = images[number % len(images), : side // 8, : side // 8] ^ np.uint8(number % 251)
        picture = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:04d}.jpg", quality=92)


def _build(bench: Bench, folder: Path, quick: Path, precision: Precision, side: int) -> list[str]:
    """Run `xlsd-cache build`, its decoders started by itself. Returns its log."""
    decoders.cache_clear()
    options = ["--out", quick / precision, "--vae", folder / "vae", "--captions", "none"]
    options += ["--resolution", side, "--buckets", "square", "--precision", precision]
    options += ["--device", "cpu"] if bench.tiny else []
    return run_command(xlsd_cache, "build", quick / "images", *options)
