"""Peak memory and time of exporting a model of SD1.5's full size, with random weights.

python benchmarks/train/export.py
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from anywhere, uninstalled

from benchmarks.demo.pipeline import make_pipeline
from benchmarks.lib.machine import machine
from xlsd_train.config import sd15
from xlsd_train.weights.lazy_tensors import LazyTensor, write_tensors
from xlsd_train.weights.network import NetworkKind, empty_network, full_config, shapes_of

# What the process says of itself, before and after: its own high-water mark, read from the kernel.
CHILD = """
import re, sys, time
from pathlib import Path
import xlsd_train.export.export
from xlsd_train.cli import main

def peak():  # of this program alone: ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before, begun = peak(), time.perf_counter()
code = main(sys.argv[1:])
print("measured", before, peak(), time.perf_counter() - begun)
sys.exit(code)
"""


@dataclass(frozen=True)
class ExportBenchmark:
    """Export random weights of SD1.5's shapes, both ways and in two dtypes."""

    size: str = "sd15"
    """sd15, or nano for a try."""

    formats: tuple[str, ...] = ("diffusers", "single-file")
    """Of `xlsd-train export`."""

    dtypes: tuple[str, ...] = ("fp32", "fp16")
    """Of `xlsd-train export`."""

    folder: Path | None = None
    """Where to write; needs twice the model's size. Default: the system's temporary folder."""


def write_random(folder: Path) -> int:
    """SD1.5 in full, a tensor at a time; returns the largest tensor's bytes."""
    configs: dict[NetworkKind, dict[str, object]] = {
        "unet": sd15.UNET,
        "text_encoder": sd15.TEXT_ENCODER,
        "vae": {**sd15.VAE, "scaling_factor": 0.13025},
    }
    largest = 0
    for kind, config in configs.items():
        network = empty_network(kind, config)
        generator = torch.Generator().manual_seed(0)

        def tensor(shape: tuple[int, ...], source: torch.Generator = generator) -> LazyTensor:
            return LazyTensor(
                shape, torch.float32, lambda: torch.randn(shape, generator=source) * 0.02
            )

        tensors = {name: tensor(shape) for name, shape in shapes_of(kind, network).items()}
        largest = max([largest, *(stored.nbytes for stored in tensors.values())])
        stem = "model" if kind == "text_encoder" else "diffusion_pytorch_model"
        shutil.rmtree(folder / kind)
        (folder / kind).mkdir()
        full = full_config(kind, network, config)
        (folder / kind / "config.json").write_text(json.dumps(full))
        write_tensors(folder / kind / f"{stem}.safetensors", tensors, {"format": "pt"})
    return largest


def measure(source: Path, out: Path, *options: str) -> tuple[float, float, float, float]:
    """(GB written, GiB before, GiB at most, seconds) of one export in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "export", str(source), str(out), *options],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    before, after, seconds = map(float, done.stdout.splitlines()[-1].split()[1:])
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    return written / 1e9, before / 2**30, after / 2**30, seconds


def main(config: ExportBenchmark) -> None:
    """Print one table."""
    print("machine:", machine("torch", "safetensors"))
    print("command: python benchmarks/train/export.py", *sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        source = folder / "model"
        make_pipeline(source, "nano", ["a cat"])
        largest = 0
        begun = time.perf_counter()
        if config.size == "sd15":
            largest = write_random(source)
        print(f"{config.size}, written in {time.perf_counter() - begun:.1f} s; "
              f"largest tensor {largest / 2**30:.3f} GiB")  # fmt: skip
        print(f"{'format':<14}{'dtype':<8}{'GB':>8}{'GiB before':>12}{'GiB peak':>10}"
              f"{'GiB more':>10}{'s':>8}{'MB/s':>8}")  # fmt: skip
        for form in config.formats:
            for dtype in config.dtypes:
                out = folder / ("out.safetensors" if form == "single-file" else "out")
                written, before, peak, seconds = measure(
                    source, out, "--format", form, "--dtype", dtype
                )
                rate = written * 1e3 / seconds
                print(f"{form:<14}{dtype:<8}{written:>8.2f}{before:>12.3f}{peak:>10.3f}"
                      f"{peak - before:>10.3f}{seconds:>8.1f}{rate:>8.0f}")  # fmt: skip
                shutil.rmtree(out) if out.is_dir() else out.unlink()


if __name__ == "__main__":
    main(tyro.cli(ExportBenchmark))
