"""Which steps of a run were kept: what there is to know of checkpoints without loading torch."""

from pathlib import Path


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name[5:])
