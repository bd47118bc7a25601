"""What validation found of a run, in its folder, and the verdict on its checkpoints.

RUN/validation/step-00000250.safetensors    WEIGHTS/SET: losses f32 [samples, BANDS]
RUN/config.json, "validation"               the keys of each set's samples, in that order
RUN/validation.jsonl                        a line for each step and WEIGHTS: means and intervals
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import replacing
from xlsd_train.runs.bootstrap import Losses, Verdict, summary, verdict
from xlsd_train.runs.json_files import objects_in
from xlsd_train.runs.layout import LOSSES, TENSORS, VALIDATION_LOG, losses_of, steps_in

HELD_OUT, TRAINING = SETS = ("held_out", "training")
_LINE = {"step!": int, "weights!": str, f"{HELD_OUT}!": {"mean!": float}}
BANDS = 10  # of timesteps, from least noise to most
MOST_NBYTES = 2**28  # of a step's losses: some 100,000 images, as often as there are averages
LIVE = "live"  # WEIGHTS: those that train, beside averages of them
Candidate = tuple[int, str]  # step, WEIGHTS


def save_losses(run: Path, step: int, losses: dict[str, Losses]) -> None:
    """Write what a step's validation found, as WEIGHTS/SET."""
    path = losses_of(run, step)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        save_file(losses, temporary)


def read_losses(run: Path, step: int) -> dict[str, Losses]:
    """WEIGHTS/SET -> losses; empty for a step that was not validated.

    Raises UserError for a file that holds no losses.
    """
    path = losses_of(run, step)
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > MOST_NBYTES:
            raise ValueError("it is too large")
        found = load_file(path)
        for name, losses in found.items():
            fits = losses.ndim == 2 and losses.dtype == np.float32 and 0 not in losses.shape
            if not fits or name.count("/") != 1:
                raise ValueError(f"{name} is {losses.dtype} of shape {losses.shape}")
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path} holds no validation's losses: {error}; remove it") from error
    return found


def is_validated(run: Path, step: int) -> bool:
    """Whether there are losses of a step, which are not read."""
    return losses_of(run, step).exists()


def forget_after(run: Path, step: int) -> None:
    """Remove what outran the checkpoint of `step`."""
    for at, path in steps_in(run / LOSSES, TENSORS).items():
        if at > step:
            path.unlink()


def summaries(losses: dict[str, Losses]) -> dict[str, dict[str, Any]]:
    """WEIGHTS -> what validation.jsonl says of them."""
    names = [name.removesuffix(f"/{HELD_OUT}") for name in losses if name.endswith(HELD_OUT)]
    return {
        name: summary(losses[f"{name}/{HELD_OUT}"], losses[f"{name}/{TRAINING}"]) for name in names
    }


def best_of(run: Path, steps: Iterable[int]) -> Verdict[Candidate] | None:
    """The best weights by held-out loss among those of validated steps; None without any."""
    candidates = {
        (step, name.removesuffix(f"/{HELD_OUT}")): found
        for step in steps
        for name, found in read_losses(run, step).items()
        if name.endswith(HELD_OUT)
    }
    return verdict(candidates) if candidates else None


def tell(run: Path, saved: Sequence[int]) -> str | None:
    """The verdict on a run's checkpoints in words, and what it does not cover; None without any.

    `saved`: the steps of the checkpoints, ascending.
    """
    found = best_of(run, (0, *saved))
    if found is None:
        return None
    told = [say(found)]
    if all(step == 0 or not is_validated(run, step) for step in saved):
        told = [
            f"held-out loss of the model it began from: {found.loss}",
            "no checkpoint that trained was measured, so none can be called the best",
        ]
    elif not is_validated(run, saved[-1]):
        told.append(f"step {saved[-1]}, the newest checkpoint, was not measured")
    lost = _lost(run, {0, *saved}, found.loss.mean)
    if lost:
        told.append(f"{lost} was lower, but no checkpoint holds it")
    return "; ".join(told)


def _lost(run: Path, saved: set[int], loss: float) -> str | None:
    """The lowest loss below `loss` of a validated step that is not saved, in words."""
    lowest: dict[Candidate, float] = {}
    for told in objects_in(run / VALIDATION_LOG, _LINE):
        step, mean = told["step"], told[HELD_OUT]["mean"]
        if step not in saved and mean < min([loss, *lowest.values()]):
            lowest = {(step, told["weights"]): mean}
    return next((f"{named(one)}, loss {mean:.5f}," for one, mean in lowest.items()), None)


def say(found: Verdict[Candidate]) -> str:
    """A verdict in words."""
    told = f"best on held-out images: {named(found.best)}, loss {found.loss}"
    if found.best[0] == 0:
        told += "; that is the model it started from"
    if found.alike:
        told += "; statistically tied: " + ", ".join(map(named, found.alike))
    return told


def named(candidate: Candidate) -> str:
    """A candidate in words."""
    step, weights = candidate
    return f"step {step}" if weights == LIVE else f"step {step} {weights}"
