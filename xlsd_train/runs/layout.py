"""Paths in a run's folder, and which of its checkpoints are complete. Loads no torch."""

import re
from pathlib import Path

CONFIG, METRICS_LOG, VALIDATION_LOG = "config.json", "metrics.jsonl", "validation.jsonl"
LOCK, REPORT = ".lock", "report.html"
REQUESTS = SAVE, SAMPLE, STOP = "SAVE", "SAMPLE", "STOP"  # a user touches them
FILES = (CONFIG, METRICS_LOG, VALIDATION_LOG, LOCK, *REQUESTS, REPORT)
CHECKPOINTS, SAMPLES, LOSSES, SNAPSHOTS = "checkpoints", "samples", "validation", "ema"
BASE, BOARD = "base", "tensorboard"
WANDB, WANDB_ID = "wandb", "wandb/id"
FOLDERS = (CHECKPOINTS, SAMPLES, LOSSES, SNAPSHOTS, BASE, f"{BASE}.tmp", BOARD)
BY_STEP = {CHECKPOINTS: True, SAMPLES: True, LOSSES: False, SNAPSHOTS: False}  # a folder a step?
STATE = "state.json"  # in a checkpoint; written last
GRID = "grid.png"
STEP = re.compile(r"step-([0-9]{8})")
TENSORS = ".safetensors"
_PARTIAL = re.compile(r"\.step-[0-9]{8}(\.[0-9]+)?\.tmp")


def step_name(step: int) -> str:
    """The name of what belongs to a step, without a suffix."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name[5:])


def steps_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Step -> file or folder of that step, in order; other names are ignored."""
    paths = sorted(folder.glob(f"step-????????{suffix}"))
    matches = ((STEP.fullmatch(path.name.removesuffix(suffix)), path) for path in paths)
    return {int(match[1]): path for match, path in matches if match}


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a complete checkpoint."""
    return (path / STATE).is_file()


def is_run_folder(path: Path) -> bool:
    """Whether a folder has a place for checkpoints."""
    return (path / CHECKPOINTS).is_dir()


def run_of(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to."""
    return checkpoint.parent.parent


def checkpoint_at(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / CHECKPOINTS / step_name(step)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in steps_in(run / CHECKPOINTS).values() if is_checkpoint(path)]


def partial_checkpoints(run: Path) -> list[Path]:
    """Temporary folders of saves and deletions that were killed."""
    paths = sorted((run / CHECKPOINTS).glob(".step-*.tmp"))
    return [path for path in paths if _PARTIAL.fullmatch(path.name)]


def samples_of(run: Path, step: int) -> Path:
    """The folder of the samples drawn after a step."""
    return run / SAMPLES / step_name(step)


def picture_name(prompt: int) -> str:
    """The file of the prompt of this number among a step's samples."""
    return f"{prompt:02d}.png"


def has_samples(run: Path, step: int) -> bool:
    """Whether samples were drawn after a step."""
    return any(samples_of(run, step).glob("*.png"))


def grid_of(run: Path) -> Path:
    """The contact sheet of all samples."""
    return run / SAMPLES / GRID


def losses_of(run: Path, step: int) -> Path:
    """The file of a step's validation losses."""
    return run / LOSSES / f"{step_name(step)}{TENSORS}"
