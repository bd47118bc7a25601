"""Which steps of a run were kept: what there is to know of checkpoints without loading torch."""

from pathlib import Path

from xlsd_cache.durable import TEMPORARY


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def partial_checkpoints(run: Path) -> list[Path]:
    """What killed saves left."""
    return list((run / "checkpoints").glob(f".*{TEMPORARY}"))


def samples_of(run: Path, step: int) -> Path:
    """The folder of what was drawn after a step."""
    return run / "samples" / f"step-{step:08d}"


def has_samples(run: Path, step: int) -> bool:
    """Whether anything was."""
    return any(samples_of(run, step).glob("*.png"))


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name[5:])
