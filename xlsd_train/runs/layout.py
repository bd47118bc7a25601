"""Which steps of a run were kept: what there is to know of checkpoints without loading torch."""

import re
from pathlib import Path

STATE = "state.json"  # of a checkpoint
STEP = re.compile(r"step-([0-9]{8})")
_PARTIAL = re.compile(r"\.step-[0-9]{8}(\.[0-9]+)?\.tmp")


def steps_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Step -> what has its name in a folder, in order; other names are not a run's."""
    there = sorted(folder.glob(f"step-????????{suffix}"))
    found = ((STEP.fullmatch(path.name.removesuffix(suffix)), path) for path in there)
    return {int(match[1]): path for match, path in found if match}


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    there = steps_in(run / "checkpoints").values()
    return [path for path in there if (path / STATE).is_file()]


def partial_checkpoints(run: Path) -> list[Path]:
    """What saving or pruning left of some, where it was killed."""
    found = sorted((run / "checkpoints").glob(".step-*.tmp"))
    return [path for path in found if _PARTIAL.fullmatch(path.name)]


def samples_of(run: Path, step: int) -> Path:
    """The folder of what was drawn after a step."""
    return run / "samples" / f"step-{step:08d}"


def has_samples(run: Path, step: int) -> bool:
    """Whether anything was."""
    return any(samples_of(run, step).glob("*.png"))


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name[5:])
