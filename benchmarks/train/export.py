"""Peak memory and time of `xlsd-train export` for a model of SD1.5's full size, random weights.

python benchmarks/train/export.py
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import torch

from benchmarks.demo.pipeline import make_pipeline
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.errors import UserError
from xlsd_train.config import sd15
from xlsd_train.weights.lazy_tensors import LazyTensor, write_tensors
from xlsd_train.weights.network import NetworkKind, empty_network, full_config, shapes_of

# The child process prints its peak resident memory before and after, as the kernel counts it.
CHILD = """
import re, sys, time
from pathlib import Path
import xlsd_train.export.export
from xlsd_train.cli import main

def peak():  # of this program alone: ru_maxrss starts at the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before, begun = peak(), time.perf_counter()
code = main(sys.argv[1:])
print("measured", before, peak(), time.perf_counter() - begun)
sys.exit(code)
"""


@dataclass(frozen=True)
class ExportBenchmarkConfig(JsonOption):
    """Export random weights of SD1.5 in two formats and two dtypes."""

    size: str = "sd15"
    """sd15, or nano for a quick test."""

    formats: tuple[str, ...] = ("diffusers", "single-file")
    """Values of `xlsd-train export --format`."""

    dtypes: tuple[str, ...] = ("fp32", "fp16")
    """Values of `xlsd-train export --dtype`."""

    folder: Path | None = None
    """Folder for the models, with twice their size free. Default: the temporary folder."""


def write_random(folder: Path) -> int:
    """Write SD1.5 in full size, one tensor at a time. Returns the bytes of the largest tensor."""
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
    """Export in a process of its own. Returns GB written, GiB before, peak GiB, seconds."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "export", str(source), str(out), *options],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if done.returncode:
        raise UserError(done.stderr)
    before, after, seconds = map(float, done.stdout.splitlines()[-1].split()[1:])
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    return written / 1e9, before / 2**30, after / 2**30, seconds


def main(config: ExportBenchmarkConfig, command: Sequence[str]) -> None:
    """Print one table."""
    report = Report("benchmarks/train/export.py", command, machine("torch", "safetensors"))
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
                memory = {"gib_before": before, "gib_peak": peak, "gib_more": peak - before}
                row = {"format": form, "dtype": dtype, "gb": written, **memory}
                report.add("export", **row, seconds=seconds, mb_per_s=rate)
                shutil.rmtree(out) if out.is_dir() else out.unlink()
    report.write(config.json)


if __name__ == "__main__":
    run_script(main, ExportBenchmarkConfig, __doc__)
