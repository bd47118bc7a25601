"""Validation losses in a run's folder, and which checkpoint is best.

RUN/validation/step-00000250.safetensors    WEIGHTS/SET: losses f32 [samples, BANDS]
RUN/config.json, "validation"               the keys of each set's samples, in that order
RUN/validation.jsonl                        a line for each step and WEIGHTS: means and intervals
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from xlsd_cache.runtime.atomic import replacing
from xlsd_train.runs.bootstrap import Comparison, Losses, compare, summary
from xlsd_train.runs.json_files import objects_in
from xlsd_train.runs.layout import LOSSES, TENSORS, VALIDATION_LOG, losses_of, steps_in

HELD_OUT, TRAINING = SETS = ("held_out", "training")
_LINE = {"step!": int, "weights!": str, f"{HELD_OUT}!": {"mean!": float}}
BANDS = 10  # of timesteps, from least noise to most
MOST_NBYTES = 2**28  # per file: losses of about 100,000 images, live and averaged
LIVE = "live"  # WEIGHTS: the trained ones; others are averages
Candidate = tuple[int, str]  # step, WEIGHTS
UNREADABLE = (OSError, ValueError, KeyError, AttributeError, SafetensorError)  # of a damaged file


def save_losses(run: Path, step: int, losses: dict[str, Losses]) -> None:
    """Write the losses of a step, WEIGHTS/SET -> losses."""
    path = losses_of(run, step)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        save_file(losses, temporary)


def read_losses(run: Path, step: int) -> dict[str, Losses]:
    """WEIGHTS/SET -> losses; empty for a step that was not validated, or whose file is damaged."""
    path = losses_of(run, step)
    try:
        return _load(path) if path.exists() else {}
    except UNREADABLE:
        return {}


def damaged_losses(run: Path) -> list[Path]:
    """The files that `read_losses` leaves out."""
    return [path for path in steps_in(run / LOSSES, TENSORS).values() if _is_damaged(path)]


def _is_damaged(path: Path) -> bool:
    try:
        status = path.stat()
        return _was_damaged(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError:
        return True


@lru_cache(1 << 14)
def _was_damaged(path: Path, *_: int) -> bool:
    """A run that goes on has ever more files: each is read once, and again if it changed."""
    try:
        _load(path)
    except OSError:  # perhaps not for long: it is not kept
        raise
    except UNREADABLE:
        return True
    return False


def _load(path: Path) -> dict[str, Losses]:
    if path.stat().st_size > MOST_NBYTES:
        raise ValueError("it is too large")
    stored = load_file(path)
    for name, losses in stored.items():
        fits = losses.ndim == 2 and losses.dtype == np.float32 and 0 not in losses.shape
        if not fits or name.count("/") != 1:
            raise ValueError(f"{name} is {losses.dtype} of shape {losses.shape}")
    return stored


def is_validated(run: Path, step: int) -> bool:
    """Whether a step was validated."""
    return losses_of(run, step).exists()


def forget_after(run: Path, step: int) -> None:
    """Remove losses after the checkpoint of `step`."""
    for number, path in steps_in(run / LOSSES, TENSORS).items():
        if number > step:
            path.unlink()


def summaries(losses: dict[str, Losses]) -> dict[str, dict[str, Any]]:
    """WEIGHTS -> their summary for validation.jsonl."""
    names = [name.removesuffix(f"/{HELD_OUT}") for name in losses if name.endswith(HELD_OUT)]
    return {
        name: summary(losses[f"{name}/{HELD_OUT}"], losses[f"{name}/{TRAINING}"]) for name in names
    }


def best_of(run: Path, steps: Iterable[int]) -> Comparison[Candidate] | None:
    """The best weights by held-out loss among those of validated steps; None without any."""
    candidates = {
        (step, name.removesuffix(f"/{HELD_OUT}")): losses
        for step in steps
        for name, losses in read_losses(run, step).items()
        if name.endswith(HELD_OUT)
    }
    return compare(candidates) if candidates else None


def describe_checkpoints(run: Path, saved: Sequence[int]) -> str | None:
    """Which of a run's checkpoints is best, in words; None without validation.

    `saved`: the steps of the checkpoints, ascending.
    """
    best = best_of(run, (0, *saved))
    if best is None:
        return None
    parts = [describe_best(best)]
    if all(step == 0 or not is_validated(run, step) for step in saved):
        parts = [
            f"held-out loss of the model it started from: {best.loss}",
            "no trained checkpoint was validated, so there is no best one",
        ]
    elif not is_validated(run, saved[-1]):
        parts.append(f"step {saved[-1]}, the newest checkpoint, was not validated")
    lost = _lost(run, {0, *saved}, best.loss.mean)
    if lost:
        parts.append(f"{lost} was lower, but has no checkpoint")
    return "; ".join(parts)


def _lost(run: Path, saved: set[int], loss: float) -> str | None:
    """The lowest loss below `loss` of a validated step that is not saved, in words."""
    lowest: dict[Candidate, float] = {}
    for line in objects_in(run / VALIDATION_LOG, _LINE):
        step, mean = line["step"], line[HELD_OUT]["mean"]
        if step not in saved and mean < min([loss, *lowest.values()]):
            lowest = {(step, line["weights"]): mean}
    return next((f"{candidate_name(one)}, loss {mean:.5f}," for one, mean in lowest.items()), None)


def describe_best(found: Comparison[Candidate]) -> str:
    """The best weights, and those tied with them, in words."""
    text = f"best on held-out images: {candidate_name(found.best)}, loss {found.loss}"
    if found.best[0] == 0:
        text += "; that is the model it started from"
    if found.tied:
        text += "; statistically tied: " + ", ".join(map(candidate_name, found.tied))
    return text


def candidate_name(candidate: Candidate) -> str:
    """A candidate in words."""
    step, weights = candidate
    return f"step {step}" if weights == LIVE else f"step {step} {weights}"
