"""Checkpoints: weights and optimizer state as safetensors, the rest as JSON. Written atomically.

checkpoints/step-00000250/
  unet.safetensors, text_encoder.safetensors    under SD1.5's keys; frozen ones are links
  optimizer.safetensors                         NAME/STATE, e.g. unet.conv_in.weight/exp_avg
  ema.safetensors                               with --ema: see ema.py
  state.json                                    step, images seen, smoothed loss, optimizer scalars
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.encoding.finite import bad_values, not_finite
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import TEMPORARY, link_or_copy, replacing_folder, write_json
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.optim.ema import Ema
from xlsd_train.optim.factory import numbers, set_numbers, settle
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
from xlsd_train.weights.parts import TEXT_ENCODER, UNET

OPTIMIZER = "optimizer.safetensors"
# The remedy for an optimizer that finds its own rate.
CALMER = {"dlion": "a --d-max below the last d"}


def save_checkpoint(
    run: Path,
    model: ModelBundle,
    named: dict[str, Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ema: Ema | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]`; its folder appears once it is on the disk.

    Raises UserError, and writes nothing, if a weight or a state is nan or infinite.
    """
    final = checkpoint_at(run, state["step"])
    if is_checkpoint(final):  # stopped at the step that it was resumed from
        return final
    settle(optimizer)
    trained = {name.partition(".")[0] for name in named}
    states = {name: optimizer.state[parameter] for name, parameter in named.items()}
    scalars = numbers(optimizer)
    tensors = _trained_tensors(model, trained, states) | (ema.tensors() if ema else {})
    _refuse_not_finite(run, state["step"], tensors, scalars)
    with replacing_folder(final) as folder:
        folder.mkdir()
        for part, file in (("unet", UNET), ("text_encoder", TEXT_ENCODER)):
            if part in trained:
                save_file(model.weights(part), folder / file, {"format": "pt"})
            else:
                link_or_copy(run / BASE / file, folder / file)
        tensors = {
            f"{name}/{key}": value.contiguous()
            for name, values in states.items()
            for key, value in values.items()
        }
        save_file(tensors, folder / OPTIMIZER, {"format": "pt"})
        if ema:
            ema.save(folder)
        write_json(folder / STATE, {**state, "optimizer": scalars} if scalars else state)
    return final


def _trained_tensors(
    model: ModelBundle, trained: set[str], states: dict[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """Weights and optimizer state by name, not copied."""
    weights = {
        f"{part}.{name}": value
        for part in sorted(trained, reverse=True)
        for name, value in getattr(model, part).state_dict().items()
    }
    return weights | {
        f"{name}/{key}": value for name, state in states.items() for key, value in state.items()
    }


def _refuse_not_finite(
    run: Path, step: int, tensors: dict[str, Tensor], scalars: dict[str, float]
) -> None:
    """Raises UserError for a nan or an infinity in weights, optimizer state or averages.

    One device sync, after one pass over them.
    """
    bad = [f"{name} ({bad_values(tensors[name])})" for name in not_finite(tensors)]
    bad += [f"the optimizer's {name}" for name, x in scalars.items() if not math.isfinite(x)]
    if bad:
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        raise UserError(
            f"after step {step} there are nan or infinite values in {bad[0]}{more}; nothing was "
            f"saved: {remedy(run)}"
        )


def remedy(run: Path) -> str:
    """What to do after nan or infinite values, with a checkpoint or without one.

    A resume may only change these options with --force.
    """
    record = read_record(run) if (run / CONFIG).is_file() else EMPTY
    calmer = CALMER.get(record.config.get("optimizer", ""), "a lower --lr")
    saved = checkpoints(run)
    if not saved:
        return f"there is no checkpoint yet; start again with {calmer} and another --out"
    return (
        f"to resume from {saved[-1]}, run the same command with --out {run}, {calmer} and --force"
    )


def load_optimizer(
    checkpoint: Path, named: dict[str, Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Load a checkpoint's optimizer state into an optimizer whose state is allocated.

    Raises UserError for a file that is damaged or of another model.
    """
    settle(optimizer)
    try:
        tensors = read_tensors(checkpoint / OPTIMIZER)
        keys = {f"{name}/{key}" for name, p in named.items() for key in optimizer.state[p]}
        if keys != tensors.keys():
            raise ValueError(f"{min(keys ^ tensors.keys())} is in only one of them")
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
            f"run's: remove {checkpoint} to resume from the checkpoint before it"
        ) from error


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (0: keep all) and the one of step `best`.

    Also deletes what killed saves left.
    """
    for folder in partial_checkpoints(run):
        shutil.rmtree(folder, ignore_errors=True)
    for checkpoint in checkpoints(run)[:-keep] if keep else []:
        if step_of(checkpoint) == best:
            continue
        doomed = checkpoint.with_name(f".{checkpoint.name}{TEMPORARY}")
        checkpoint.rename(doomed)  # a kill leaves no incomplete one under its name
        shutil.rmtree(doomed, ignore_errors=True)
