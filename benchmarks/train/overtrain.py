"""Does validation catch over-training that the training loss rewards? A small model, few pictures.

    python benchmarks/train/overtrain.py

Scikit-image's photos are cut into tiles, most of them held out, and a small SD1.5 is trained on the
rest for much too long. Its training loss falls all the way; the held-out loss must turn.
"""

import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import skimage.data
import tyro
from PIL import Image

from benchmarks.demo.pipeline import make_pipeline
from benchmarks.lib.machine import machine
from xlsd_cache.cli import main as xlsd_cache
from xlsd_cache.errors import UserError
from xlsd_train.cli import main as xlsd_train
from xlsd_train.runs.bootstrap import intervals, overall
from xlsd_train.runs.layout import checkpoints, step_of
from xlsd_train.runs.validation_log import best_of, read_losses, say

PICTURES = ("astronaut", "coffee", "chelsea", "rocket", "retina", "immunohistochemistry")
SIDE = 64  # pixels of a tile


@dataclass(frozen=True)
class OvertrainConfig:
    """Train too long, and see who notices."""

    tiles: int = 40
    """Tiles cut from the photos."""

    held_out: float = 0.8
    """Share of them that never trains."""

    steps: int = 1200
    """Optimizer steps; 12 validations are spread over them."""

    lr: float = 5e-4
    """AdamW's learning rate."""

    size: str = "demo"
    """Of the model: nano or demo."""

    seed: int = 0
    """Of the run, not of validation."""


def main(config: OvertrainConfig, words: list[str]) -> None:
    """Cut, encode, train, tell."""
    print(f"machine: {machine('torch', 'diffusers', 'numpy')}")
    print(f"command: {shlex.join(('python', 'benchmarks/train/overtrain.py', *words))}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, Path(folder))
        tell(run)
    print(f"{time.monotonic() - begun:.0f} s in all")


def train(config: OvertrainConfig, folder: Path) -> Path:
    """A run that is validated and saved together."""
    cut(config.tiles, folder / "images")
    make_pipeline(folder / "model", config.size, list(PICTURES))  # type: ignore[arg-type]
    every, run = max(1, config.steps // 12), folder / "run"
    commands = (
        (xlsd_cache, "build", folder / "images", "--out", folder / "latents", "--resolution", SIDE,
         "--vae", folder / "model" / "vae"),
        (xlsd_train, "--phase", "unet", "--batch", 4, "--data", folder / "latents", "--out", run,
         "--model", folder / "model", "--optimizer", "adamw", "--lr", config.lr, "--steps",
         config.steps, "--seed", config.seed, "--sample-every", 0, "--validate-every", every,
         "--save-every", every, "--keep", 0, "--validation-fraction", config.held_out,
         "--threads", 1),
    )  # fmt: skip
    printed = sys.stdout
    sys.stdout = sys.stderr  # the table alone belongs on stdout
    try:
        for command, *words in commands:
            if command(list(map(str, words))):
                raise UserError("see above")
    finally:
        sys.stdout = printed
    return run


def cut(tiles: int, out: Path) -> None:
    """Write tiles of all photos in turn, none overlapping another."""
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


def tell(run: Path) -> None:
    """What each checkpoint's losses are, and what they say of the last against the best."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step_of(path) for path in checkpoints(run)]
    losses = {step: found for step in (0, *steps) if (found := read_losses(run, step))}
    sets = [len(losses[0][f"live/{name}"]) for name in ("training", "held_out")]
    trained = json.loads((run / "config.json").read_text())["stores"][0]["selected"]
    print(f"{trained} tiles train; {sets[0]} of them and {sets[1]} held out are measured")
    print(f"{'step':>6}{'loss, smoothed':>16}{'training set':>14}{'held out (95% interval)':>32}")
    for step, found in losses.items():
        smoothed = f"{lines[step - 1]['loss_smoothed']:.5f}" if step else ""
        training = found["live/training"].mean(dtype=np.float64)
        print(f"{step:>6}{smoothed:>16}{training:>14.5f}", end="")
        print(f"{intervals(found['live/held_out'])[0]!s:>32}")
    best = best_of(run, (0, *steps))
    assert best
    print(say(best))
    last, first = losses[steps[-1]], losses[best.best[0]]
    for name, told in (("training", "training set"), ("held_out", "held-out images")):
        more = (overall(last[f"live/{name}"]) - overall(first[f"live/{name}"])).interval
        print(f"on the {told} step {steps[-1]} loses {more} more than step {best.best[0]}")


if __name__ == "__main__":
    try:
        main(tyro.cli(OvertrainConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"overtrain: {error}")
