"""What a run writes against what is free on its disk: before it begins, and when the disk is full.

A checkpoint holds the trained parts, the optimizer's state and, with --ema, both averages. While
the next one is written, --keep older ones and the best are there too.
"""

import errno
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from torch.nn import Parameter

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.disk import free_bytes, held_bytes, size
from xlsd_train.checkpoints.run_folder import Run
from xlsd_train.config.train import TrainConfig
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.runs.layout import SAMPLES, SNAPSHOTS, checkpoints, partial_checkpoints

log = logging.getLogger("xlsd.train.checkpoints")

STATES = {"lion": 1, "dlion": 2, "adamw": 2}  # copies of what trains
STEP_NBYTES = 700  # of metrics.jsonl and TensorBoard's log
SMALL_NBYTES = 2**18  # names and headers of a checkpoint's files
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Room:
    """Bytes that a run is yet to write."""

    base: int  # once
    checkpoint: int  # each
    first: int  # checkpoints that --keep holds, and the one being written
    most: int  # with the best one
    averages: int  # snapshots beyond the checkpoints
    others: int  # samples and logs

    @property
    def least(self) -> int:
        """Until the first checkpoint is removed: without this the run cannot go on."""
        return self.base + self.first * self.checkpoint

    @property
    def whole(self) -> int:
        """At the most, up to the end."""
        return self.base + self.most * self.checkpoint + self.averages + self.others


def needed(
    config: TrainConfig,
    run: Run,
    model: ModelBundle,
    named: Mapping[str, Parameter],
    planned: int,
    pictures_nbytes: int,
) -> Room:
    """What a resolved config writes from where the run is; `pictures_nbytes` is a step's samples.

    `named` is what trains.
    """
    step, there = run.state()["step"], len(checkpoints(run.folder))
    left = max(0, min(planned, config.stop_after or planned) - step)
    saves = math.ceil(left / config.save_every)
    held = there + saves if config.keep == 0 else min(there + saves, config.keep + 1)
    best = 1 if config.validate_every and config.keep and saves > config.keep else 0
    trains = sum(parameter.nbytes for parameter in named.values())
    parts = {"unet": model.unet, "text_encoder": model.text_encoder}
    sizes = {name: _nbytes(part) for name, part in parts.items()}
    trained = {name.partition(".")[0] for name in named}
    averages = 2 * trains if config.ema else 0
    checkpoint = sum(sizes[name] for name in trained) + _state_nbytes(config, named) + averages
    beyond = min(config.ema_snapshots or 0, there + saves) - held
    drawn = left // config.sample_every + 1 if config.sample_every and left else 0
    frozen = sum(sizes[name] for name in sizes.keys() - trained)
    return Room(
        base=0 if run.checkpoint else _nbytes(model.vae.model) + frozen,
        checkpoint=checkpoint + SMALL_NBYTES,
        first=min(saves, max(1, min(held, (config.keep or 1) + 1) - there)),
        most=min(saves, max(1, held + best - there)),
        averages=max(0, beyond) * averages,
        others=drawn * pictures_nbytes + left * STEP_NBYTES,
    )


def say_room(room: Room, run: Run, config: TrainConfig) -> None:
    """Say what is to be written and what is free.

    Raises UserError where the first checkpoints do not fit, unless forced.
    """
    free = free_bytes(run.folder)
    told = f"disk: a checkpoint takes {size(room.checkpoint)}, the run up to {size(room.whole)}"
    if free is None or not room.first:
        log.info(told)
        return
    # Those that a kill met are removed as the run begins.
    free += sum(held_bytes(path) for path in partial_checkpoints(run.folder))
    told += f", and {size(free)} are free on the disk of {run.folder}"
    if room.least > free and not config.force:
        lower = f"lower --keep {config.keep}, " if config.keep > 1 else ""
        raise UserError(
            f"too little room: {told}, less than its first {room.first} checkpoints; free "
            f"{size(room.least - free)} more, {lower}give --out on a larger disk, or --force"
        )
    log.info(told)
    if room.whole > free:
        log.warning(
            f"the disk of {run.folder} will be full before the run ends: free "
            f"{size(room.whole - free)} more, or lower --keep or --ema-snapshots"
        )


@contextmanager
def writing(run: Run) -> Iterator[None]:
    """What the system refuses to write within the block becomes a UserError that says how to go on.

    A checkpoint is whole or not there: what was being written is removed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(_stopped(run, error)) from error


def _stopped(run: Run, error: Exception) -> str:
    folder, newest = run.folder, run.checkpoint
    stands = f"the newest complete checkpoint is {newest}" if newest else "no checkpoint is whole"
    if _number(error) not in FULL:
        return (
            f"cannot go on writing {folder}: {error}; {stands}: mend that and run the same command "
            f"with --out {folder}"
        )
    return (
        f"the disk of {folder} is full: {error}; {stands}: remove {_removable(run)}, then run the "
        f"same command with --out {folder}"
    )


def _removable(run: Run) -> str:
    """What of a run it can do without, the largest first."""
    found = [(held_bytes(path), str(path)) for path in checkpoints(run.folder)[:-1]]
    others = (run.folder / name for name in (SNAPSHOTS, SAMPLES))
    found += [(held_bytes(path), str(path)) for path in others if path.is_dir()]
    told = [f"{path} ({size(nbytes)})" for nbytes, path in sorted(found, reverse=True) if nbytes]
    return " or ".join(told[:3]) if told else "other files from that disk"


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # as safetensors tells it
    return int(found[1]) if found else None


def _nbytes(module: Any) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _state_nbytes(config: TrainConfig, named: Mapping[str, Parameter]) -> int:
    return STATES[config.optimizer] * sum(parameter.nbytes for parameter in named.values())
