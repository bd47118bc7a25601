"""Disk space: what a run will write against what is free, and errors when the disk is full.

A checkpoint holds the trained networks, the optimizer state and, with --ema, both averages. While
the next one is written, --keep older ones and the best exist too.
"""

import errno
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch.nn import Parameter

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.disk import free_bytes, held_bytes, size
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.evaluation.images import Picture
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.runs.layout import SAMPLES, SNAPSHOTS, checkpoints, partial_checkpoints
from xlsd_train.runs.validation_log import BANDS

log = logging.getLogger("xlsd.train.checkpoints")

STATES = {"lion": 1, "dlion": 2, "adamw": 2}  # copies of what trains
STEP_NBYTES = 800  # of metrics.jsonl and TensorBoard's log
WANDB_STEP_NBYTES = 1500  # of W&B's log, which stays also when it is uploaded
VALIDATED_NBYTES = 6000  # of validation.jsonl and TensorBoard's log, for each of the weights
SMALL_PICTURE_NBYTES = 160_000  # a thumbnail and TensorBoard's, of noise; of photos a fifth
SMALL_NBYTES = 2**18  # names and headers of a checkpoint's files
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run has yet to write."""

    base: int  # once
    checkpoint: int  # each
    first: int  # checkpoints that --keep holds, and the one being written
    most: int  # with the best one
    averages: int  # snapshots beyond the checkpoints
    others: int  # samples and logs

    @property
    def least(self) -> int:
        """Until the first checkpoint is deleted: the run needs at least this."""
        return self.base + self.first * self.checkpoint

    @property
    def whole(self) -> int:
        """Up to the end, at most."""
        return self.base + self.most * self.checkpoint + self.averages + self.others


def needed(
    config: TrainConfig,
    run: RunFolder,
    model: ModelBundle,
    named: Mapping[str, Parameter],
    planned: int,
    pictures: Sequence[Picture],
) -> DiskPlan:
    """What the run has yet to write; `named` trains, `pictures` are drawn at each sampled step."""
    step, saved = run.state()["step"], len(checkpoints(run.folder))
    left = max(0, config.last_step(planned) - step)
    saves = math.ceil(left / config.save_every)
    held = saved + saves if config.keep == 0 else min(saved + saves, config.keep + 1)
    best = 1 if config.validate_every and config.keep and saves > config.keep else 0
    trains = sum(parameter.nbytes for parameter in named.values())
    parts = {"unet": model.unet, "text_encoder": model.text_encoder}
    sizes = {name: _nbytes(part) for name, part in parts.items()}
    trained = {name.partition(".")[0] for name in named}
    averages = 2 * trains if config.ema else 0
    checkpoint = sum(sizes[name] for name in trained) + _state_nbytes(config, named) + averages
    beyond = min(config.ema_snapshots or 0, saved + saves) - held
    drawn, validated = (
        left // every + 1 if every and left else 0
        for every in (config.sample_every, config.validate_every)
    )
    wandb = config.log_with == "wandb"
    small = SMALL_PICTURE_NBYTES * (2 if wandb else 1)
    picture = sum(3 * each.width * each.height + small for each in pictures)
    losses = 2 * config.validation_images * BANDS * np.float32().nbytes + VALIDATED_NBYTES
    frozen = sum(sizes[name] for name in sizes.keys() - trained)
    return DiskPlan(
        base=0 if run.checkpoint else _nbytes(model.vae.model) + frozen,
        checkpoint=checkpoint + SMALL_NBYTES,
        first=min(saves, max(1, min(held, (config.keep or 1) + 1) - saved)),
        most=min(saves, max(1, held + best - saved)),
        averages=max(0, beyond) * averages,
        others=drawn * picture
        + validated * (3 if config.ema else 1) * losses
        + left * (STEP_NBYTES + (WANDB_STEP_NBYTES if wandb else 0)),
    )


def check_disk(plan: DiskPlan, run: RunFolder, config: TrainConfig) -> None:
    """Log what will be written and what is free.

    Raises UserError if the first checkpoints do not fit, unless forced.
    """
    free = free_bytes(run.folder)
    space = f"disk: {size(plan.checkpoint)} per checkpoint, up to {size(plan.whole)} for the run"
    if free is None or not plan.first:
        log.info(space)
        return
    # These are deleted when the run starts.
    free += sum(held_bytes(path) for path in partial_checkpoints(run.folder))
    space += f", {size(free)} free on the disk of {run.folder}"
    if plan.least > free and not config.force:
        lower = f"lower --keep {config.keep}, " if config.keep > 1 else ""
        raise UserError(
            f"not enough disk space for the first {plan.first} checkpoints: {space}; free "
            f"{size(plan.least - free)} more, {lower}put --out on a larger disk, or use --force"
        )
    log.info(space)
    if plan.whole > free:
        log.warning(
            f"the disk of {run.folder} will be full before the run ends; free "
            f"{size(plan.whole - free)} more, or lower --keep or --ema-snapshots"
        )


@contextmanager
def writing(run: RunFolder) -> Iterator[None]:
    """Turn write errors within the block into a UserError that says how to resume.

    Checkpoints are atomic: an incomplete one is removed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(_write_error(run, error)) from error


def _write_error(run: RunFolder, error: Exception) -> str:
    folder, newest = run.folder, run.checkpoint
    saved = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
    if _number(error) not in FULL:
        return (
            f"cannot write to {folder}: {error}; {saved}; fix the cause and run the same command "
            f"with --out {folder}"
        )
    return (
        f"the disk of {folder} is full: {error}; {saved}; remove {_removable(run)}, then run the "
        f"same command with --out {folder}"
    )


def _removable(run: RunFolder) -> str:
    """Parts of a run that may be deleted, the largest first."""
    folders = [run.folder / name for name in (SNAPSHOTS, SAMPLES)]
    sizes = [(held_bytes(path), str(path)) for path in checkpoints(run.folder)[:-1]]
    sizes += [(held_bytes(path), str(path)) for path in folders if path.is_dir()]
    parts = [f"{path} ({size(nbytes)})" for nbytes, path in sorted(sizes, reverse=True) if nbytes]
    return " or ".join(parts[:3]) if parts else "other files from that disk"


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os error (\d+)", str(error))  # in safetensors' message
    return int(match[1]) if match else None


def _nbytes(module: Any) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _state_nbytes(config: TrainConfig, named: Mapping[str, Parameter]) -> int:
    return STATES[config.optimizer] * sum(parameter.nbytes for parameter in named.values())
