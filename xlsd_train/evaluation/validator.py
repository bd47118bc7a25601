"""Unweighted losses of images that never train, and of as many that do; training is untouched.

Each image is measured at one timestep in every band, with noise of its own; both follow from the
image's key alone, so that steps, checkpoints and runs are compared on the same draws.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xlsd_cache.dataset import rng as draw
from xlsd_cache.dataset.selection import Mask, Selection, select
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.gpu_memory import give_back
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch, BatchSource
from xlsd_train.data.selection import evenly
from xlsd_train.runs.bootstrap import Losses
from xlsd_train.runs.validation_log import BANDS, LIVE, SETS
from xlsd_train.step.distributed import ALONE, Processes
from xlsd_train.step.step import Step

SEED = 0  # not the run's: runs of all seeds are measured alike
Numbers = NDArray[np.int64]
Part = tuple[str, Numbers, Numbers, Numbers]  # of a batch: bucket, ordinals, positions, timesteps


@dataclass(frozen=True)
class Validator:
    """What is measured, in batches that are always the same."""

    source: BatchSource
    sets: dict[str, Selection]  # SETS -> samples
    batch: int  # forward passes at once

    def __call__(
        self,
        step: Step,
        weights: Mapping[str, AbstractContextManager[Any]],
        processes: Processes = ALONE,
        stopped: Callable[[], bool] = bool,
    ) -> dict[str, Losses] | None:
        """WEIGHTS/SET -> losses [samples, BANDS], of the weights that each context sets in place.

        The processes of a run measure a batch each, in turn, with the weights that the first one
        has; it alone gets the losses, which are those of one process to the bit. None, for all of
        them, where any was `stopped`. No gradient, no random state, no module's mode changes.
        """
        plain = replace(step.objective, weight=torch.ones_like(step.objective.weight))
        measured, found = replace(step, objective=plain), {}
        for name in processes.names(list(weights)):
            context = processes.together(
                () if name == LIVE else step.parameters, weights.get(name, nullcontext())
            )
            with context, torch.no_grad():
                for which in SETS:
                    parts = list(self._parts(which))
                    work = partial(self._measure, measured, parts)
                    losses = processes.deal(len(parts), work, stopped)
                    if losses is None:
                        return None
                    if losses:
                        found[f"{name}/{which}"] = np.concatenate(losses).reshape(-1, BANDS)
        give_back(step.accelerator.device)  # its shapes are not training's
        return found

    def batches(self, name: str) -> Iterator[Batch]:
        """A set's samples by bucket, each BANDS times in succession."""
        return (self.source.fixed(*part, SEED) for part in self._parts(name))

    def _measure(self, step: Step, parts: Sequence[Part], number: int) -> Losses:
        batch = self.source.fixed(*parts[number], SEED).to(step.accelerator.device)
        losses: Losses = step.loss(batch).cpu().numpy()
        return losses

    def _parts(self, name: str) -> Iterator[Part]:
        """What makes each batch of a set."""
        noising = self.source.noising
        for bucket, ordinals in self._buckets(name):
            every = np.repeat(ordinals, BANDS)
            band = np.tile(np.arange(BANDS), len(ordinals))
            positions = self._positions(bucket, every, band)
            drawn = (band + draw.uniform(SEED, "validation timestep", positions)) / BANDS
            timesteps = noising.first + np.floor(drawn * noising.count).astype(np.int64)
            for start in range(0, len(every), self.batch):
                part = slice(start, start + self.batch)
                yield bucket, every[part], positions[part], timesteps[part]

    def keys(self) -> dict[str, list[str]]:
        """SETS -> the keys of its samples, in the order of its losses."""
        return {
            name: [key for part in self._buckets(name) for key in self.source.keys(*part)]
            for name in SETS
        }

    def _buckets(self, name: str) -> Iterator[tuple[str, NDArray[np.int64]]]:
        chosen = self.sets[name]
        for bucket, size in chosen.sizes.items():
            yield bucket, chosen.ordinals(bucket, np.arange(size))

    def _positions(
        self, bucket: str, ordinals: NDArray[np.int64], band: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Where each forward pass stands in the streams of draw.py, by its key and band."""
        keys = self.source.keys(bucket, ordinals)
        names = [f"{key}\n{b}".encode() for key, b in zip(keys, band.tolist(), strict=True)]
        digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
        return np.frombuffer(digests, "<i8").astype(np.int64)


def measured(config: TrainConfig, held: Mask, trains: Mask) -> int:
    """How many samples of each set are measured; 0 without validation.

    Raises UserError where there are too few of either.
    """
    if not config.validate_every:
        return 0
    count = min(config.validation_images, int(held.sum()), int(trains.sum()))
    if count < 2:
        raise UserError(
            f"--validation-fraction {config.validation_fraction:g} holds out {held.sum()} of the "
            f"{(held | trains).sum()} images of {' '.join(config.data)}, too few to measure; "
            f"raise it"
        )
    return count


def make_validator(
    source: BatchSource, held: Mask, trains: Mask, count: int, batch: int
) -> Validator:
    """Over `count` of the samples that are held out and as many that train."""
    parts = (select(source.dataset.store, evenly(mask, count)) for mask in (held, trains))
    return Validator(source, dict(zip(SETS, parts, strict=True)), batch)
