"""Checkpoints: weights and optimizer as safetensors, everything human as JSON, whole or not there.

checkpoints/step-00000250/
  unet.safetensors, text_encoder.safetensors    under SD1.5's names; what is frozen is a link
  optimizer.safetensors                         NAME/STATE, say unet.conv_in.weight/exp_avg
  ema.safetensors                               with --ema: see ema.py
  state.json                                    where the run stands; the optimizer's numbers
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.encoding.finite import bad_values, not_finite
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import TEMPORARY, fsync_file, fsync_folder, link_or_copy, write_json
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.optim.ema import Ema
from xlsd_train.optim.factory import numbers, set_numbers
from xlsd_train.runs.layout import (
    BASE,
    CONFIG,
    STATE,
    checkpoint_at,
    checkpoints,
    is_checkpoint,
    partial_checkpoints,
    step_of,
)
from xlsd_train.runs.record import EMPTY, read_record, read_state
from xlsd_train.weights.lazy_tensors import read_tensors
from xlsd_train.weights.locate import TEXT_ENCODER, UNET

OPTIMIZER = "optimizer.safetensors"
# What holds back an optimizer that finds its rate, of which --lr is a factor.
CALMER = {"dlion": "a --d-max below what d came to"}


def save_checkpoint(
    run: Path,
    model: ModelBundle,
    named: dict[str, Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ema: Ema | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]`; its folder appears when all of it is on the disk.

    Raises UserError, and writes nothing, where a number of it is nan or infinite.
    """
    final = checkpoint_at(run, state["step"])
    if is_checkpoint(final):  # stopped at the step it was resumed from
        return final
    trained = {name.partition(".")[0] for name in named}
    states = {name: optimizer.state[parameter] for name, parameter in named.items()}
    found = numbers(optimizer)
    tensors = _trained_tensors(model, trained, states) | (ema.tensors() if ema else {})
    _refuse_unfit(run, state["step"], tensors, found)
    folder = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")
    folder.mkdir(parents=True)
    try:
        for part, file in (("unet", UNET), ("text_encoder", TEXT_ENCODER)):
            if part in trained:
                save_file(model.weights(part), folder / file, {"format": "pt"})
            else:
                link_or_copy(run / BASE / file, folder / file)
        tensors = {
            f"{name}/{key}": value.contiguous()
            for name, held in states.items()
            for key, value in held.items()
        }
        save_file(tensors, folder / OPTIMIZER, {"format": "pt"})
        if ema:
            ema.save(folder)
        write_json(folder / STATE, {**state, "optimizer": found} if found else state)
        for path in folder.iterdir():
            fsync_file(path)
        fsync_folder(folder)
        folder.rename(final)
        fsync_folder(final.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return final


def _trained_tensors(
    model: ModelBundle, trained: set[str], states: dict[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """Weights and optimizer by name, where they are, not copied."""
    weights = {
        f"{part}.{name}": value
        for part in sorted(trained, reverse=True)
        for name, value in getattr(model, part).state_dict().items()
    }
    return weights | {
        f"{name}/{key}": value for name, held in states.items() for key, value in held.items()
    }


def _refuse_unfit(
    run: Path, step: int, tensors: dict[str, Tensor], counted: dict[str, float]
) -> None:
    """Raises UserError where a weight, the optimizer or an average is nan or infinite.

    It names the first, and says what to do. On a card it waits once, for one pass over them.
    """
    bad = [f"{name} ({bad_values(tensors[name])})" for name in not_finite(tensors)]
    bad += [f"the optimizer's {name}" for name, x in counted.items() if not math.isfinite(x)]
    if bad:
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        raise UserError(
            f"after step {step} some numbers are nan or infinite, those of {bad[0]}{more}; nothing "
            f"of it was kept: {remedy(run)}"
        )


def remedy(run: Path) -> str:
    """What to do where numbers have become nan or infinite, with a checkpoint or without one.

    What a run was begun with may not change on resuming, but by --force.
    """
    record = read_record(run) if (run / CONFIG).is_file() else EMPTY
    calmer = CALMER.get(record.config.get("optimizer", ""), "a lower --lr")
    there = checkpoints(run)
    if not there:
        return (
            f"no checkpoint is there yet to go on from, so begin again with {calmer} and another "
            f"--out"
        )
    return (
        f"{there[-1]} stands: to go on from it, give the same command with --out {run}, {calmer} "
        f"and --force"
    )


def load_optimizer(
    checkpoint: Path, named: dict[str, Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Load the checkpoint's optimizer state into an optimizer whose state is allocated.

    Raises UserError where the file is damaged or another model's.
    """
    try:
        tensors = read_tensors(checkpoint / OPTIMIZER)
        there = {f"{name}/{key}" for name, p in named.items() for key in optimizer.state[p]}
        if there != tensors.keys():
            raise ValueError(f"{min(there ^ tensors.keys())} is in only one of them")
        if bad := not_finite(tensors):
            raise ValueError(f"{bad[0]} has {bad_values(tensors[bad[0]])} that are nan or infinite")
        for path, value in tensors.items():
            name, _, key = path.rpartition("/")
            state = optimizer.state[named[name]]
            if value.shape != state[key].shape:
                raise ValueError(f"{path} has shape {tuple(value.shape)}")
            state[key].copy_(value)
        set_numbers(optimizer, read_state(checkpoint).get("optimizer", {}))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint / OPTIMIZER} does not fit this run ({error}); it is damaged or another "
            f"run's: remove {checkpoint} to go on from the checkpoint before it"
        ) from error


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (0: none) and step `best`'s.

    And what killed saves left.
    """
    for folder in partial_checkpoints(run):
        shutil.rmtree(folder, ignore_errors=True)
    for checkpoint in checkpoints(run)[:-keep] if keep else []:
        if step_of(checkpoint) == best:
            continue
        doomed = checkpoint.with_name(f".{checkpoint.name}{TEMPORARY}")
        checkpoint.rename(doomed)  # so that a kill leaves no half of one that looks whole
        shutil.rmtree(doomed, ignore_errors=True)
