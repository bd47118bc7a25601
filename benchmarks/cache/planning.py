"""Memory of `plan` and of the first unit's encoding: what grows with the number of images.

    python benchmarks/cache/planning.py                     300,000 images, 350 MB of disk
    python benchmarks/cache/planning.py --images 10000

The images are real, tiny, and distinct: 64x64 JPEGs with captions, in tar files of 10,000.
"""

import io
import multiprocessing
import resource
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import psutil
from PIL import Image

from benchmarks.demo.pipeline import VAE
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.scale import Memory
from xlsd_cache import BuildOptions, Worker, plan

A_TAR = 10_000  # images


@dataclass(frozen=True)
class PlanningConfig(JsonOption):
    """Measure the memory of a build before its encoding."""

    images: int = 300_000
    """Images to plan."""

    workers: int = 2
    """Threads, as in xlsd-cache build."""

    folder: Path | None = None
    """Folder for images and store. Default: the system's temporary folder."""


def main(config: PlanningConfig, command: Sequence[str]) -> None:
    """Print the peaks of each part, then the targets."""
    report = Report("benchmarks/cache/planning.py", command, machine("pyarrow", "numpy"))
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        write_tars(folder / "tars", config.images)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peaks = process.submit(measure, folder, config.workers).result()
    for part, peak in peaks.items():
        print(f"{part:<28}{peak:>8.0f} MiB at most")
        report.add("peak", part=part, mib=peak)
    growth = (peaks["encode a unit"] - peaks["scan and plan"]) * 2**20 / config.images
    report.target("MiB for 300,000 images", max(peaks.values()), most=900)
    report.target("bytes an image, from plan to work", growth, most=50)
    report.write(config.json)


def measure(folder: Path, workers: int) -> dict[str, float]:
    """The peak memory of this process in MiB: before, while it plans, while it encodes a unit."""
    options = BuildOptions(
        tuple(map(str, sorted((folder / "tars").iterdir()))), out=folder / "latents",
        vae=str(VAE), buckets="64x64", resolution=64, workers=workers,
    )  # fmt: skip
    peaks = {"libraries": psutil.Process().memory_info().rss / 2**20}
    with Memory() as memory:
        planned = plan(options)
    peaks["scan and plan"] = memory.peak_gb * 1e9 / 2**20
    with Memory() as memory, Worker(planned.store, workers=workers) as worker:
        peaks["between"] = psutil.Process().memory_info().rss / 2**20
        worker.encode(planned.units[0])
    peaks["encode a unit"] = memory.peak_gb * 1e9 / 2**20
    peaks["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return peaks


def write_tars(folder: Path, count: int) -> None:
    """Eight pictures, each image made distinct by its number in a JPEG comment."""
    folder.mkdir()
    rng, pictures = np.random.default_rng(0), []
    for _ in range(8):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(data := io.BytesIO(), "JPEG")
        pictures.append(data.getvalue())
    for start in range(0, count, A_TAR):
        with tarfile.open(folder / f"{start // A_TAR:05d}.tar", "w") as tar:
            for i in range(start, min(count, start + A_TAR)):
                note, picture = b"%012d" % i, pictures[i % 8]
                comment = b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note
                _add(tar, f"{i:09d}.jpg", picture[:2] + comment + picture[2:])
                _add(tar, f"{i:09d}.txt", b"woman, solo, tag%d, tag%d" % (i % 97, i % 1013))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    run_script(main, PlanningConfig, __doc__)
