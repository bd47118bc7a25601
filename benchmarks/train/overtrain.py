"""Whether held-out validation detects overfitting, on a small model and few images.

    python benchmarks/train/overtrain.py

Photos of scikit-image are cut into tiles, most of which are held out. A small SD1.5 trains on the
rest for far too many steps. Its training loss keeps falling; the held-out loss has to rise again.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import skimage.data
from PIL import Image

from benchmarks.demo.pipeline import make_pipeline
from benchmarks.lib.commands import run_command
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.cli import main as xlsd_cache
from xlsd_train.cli import main as xlsd_train
from xlsd_train.runs.bootstrap import intervals, overall
from xlsd_train.runs.layout import checkpoints, step_of
from xlsd_train.runs.validation_log import best_of, describe_best, read_losses

PICTURES = ("astronaut", "coffee", "chelsea", "rocket", "retina", "immunohistochemistry")
SIDE = 64  # pixels of a tile


@dataclass(frozen=True)
class OvertrainConfig(JsonOption):
    """Train too long, and compare training and held-out loss."""

    tiles: int = 40
    """Tiles to cut from the photos."""

    held_out: float = 0.8
    """Share of the tiles that is held out."""

    steps: int = 1200
    """Optimizer steps, with 12 validations."""

    lr: float = 5e-4
    """AdamW's learning rate."""

    size: str = "demo"
    """Size of the model: nano or demo."""

    seed: int = 0
    """Seed of the run, not of validation."""


def main(config: OvertrainConfig, command: Sequence[str]) -> None:
    """Cut the tiles, encode them, train, and print the losses."""
    libraries = machine("torch", "diffusers", "numpy")
    report = Report("benchmarks/train/overtrain.py", command, libraries)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, Path(folder))
        compare(run, report)
    print(f"{time.monotonic() - begun:.0f} s in total")
    report.write(config.json)


def train(config: OvertrainConfig, folder: Path) -> Path:
    """Build a store and train a run that saves a checkpoint at every validation."""
    cut(config.tiles, folder / "images")
    make_pipeline(folder / "model", config.size, list(PICTURES))  # type: ignore[arg-type]
    every, run = max(1, config.steps // 12), folder / "run"
    run_command(
        xlsd_cache, "build", folder / "images", "--out", folder / "latents", "--resolution", SIDE,
        "--vae", folder / "model" / "vae",
    )  # fmt: skip
    run_command(
        xlsd_train, "--phase", "unet", "--batch", 4, "--data", folder / "latents", "--out", run,
        "--model", folder / "model", "--optimizer", "adamw", "--lr", config.lr, "--steps",
        config.steps, "--seed", config.seed, "--sample-every", 0, "--validate-every", every,
        "--save-every", every, "--keep", 0, "--validation-fraction", config.held_out,
        "--threads", 1,
    )  # fmt: skip
    return run


def cut(tiles: int, out: Path) -> None:
    """Write tiles of all photos in turn; no two overlap."""
    out.mkdir()
    grids = []
    for name in PICTURES:
        pixels = np.asarray(getattr(skimage.data, name)())
        height, width = (size // SIDE for size in pixels.shape[:2])
        grids.append([(name, pixels, y, x) for y in range(height) for x in range(width)])
    order = np.random.default_rng(0).permutation
    shuffled = [[grid[i] for i in order(len(grid))] for grid in grids]
    every = [tile for turn in zip(*shuffled, strict=False) for tile in turn]
    for i, (name, pixels, y, x) in enumerate(every[:tiles]):
        part = pixels[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE]
        Image.fromarray(part).save(out / f"{name}-{i:03d}.png")
        (out / f"{name}-{i:03d}.txt").write_text(name)


def compare(run: Path, report: Report) -> None:
    """Print and record the losses of each checkpoint, and of the last against the best."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step_of(path) for path in checkpoints(run)]
    losses = {step: loss for step in (0, *steps) if (loss := read_losses(run, step))}
    sets = [len(losses[0][f"live/{name}"]) for name in ("training", "held_out")]
    trained = json.loads((run / "config.json").read_text())["stores"][0]["selected"]
    print(f"{trained} tiles train; {sets[0]} of them and {sets[1]} held-out tiles are measured")
    print(f"{'step':>6}{'loss, smoothed':>16}{'training set':>14}{'held out (95% interval)':>32}")
    for step, loss in losses.items():
        smoothed = lines[step - 1]["loss_smoothed"] if step else None
        training = float(loss["live/training"].mean(dtype=np.float64))
        held_out = intervals(loss["live/held_out"])[0]
        cell = f"{smoothed:.5f}" if step else ""
        print(f"{step:>6}{cell:>16}{training:>14.5f}{held_out!s:>32}")
        row = {"training": training, "held_out": held_out._asdict()}
        report.add("checkpoint", step=step, loss_smoothed=smoothed, **row)
    best = best_of(run, (0, *steps))
    assert best
    report.add("best", step=best.best[0], held_out=best.loss._asdict())
    print(describe_best(best))
    last, first = losses[steps[-1]], losses[best.best[0]]
    for name in ("training", "held_out"):
        more = (overall(last[f"live/{name}"]) - overall(first[f"live/{name}"])).interval
        print(f"{name} loss of step {steps[-1]} minus step {best.best[0]}: {more}")
        report.add("last minus best", images=name, loss=more._asdict())


if __name__ == "__main__":
    run_script(main, OvertrainConfig, __doc__)
