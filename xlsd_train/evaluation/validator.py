"""Measures the unweighted loss on held-out images, and on as many training images.

Each image is measured at one timestep in every band. Timesteps and noise follow from the image's
key alone, so that steps, checkpoints and runs are compared on the same draws.
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
from xlsd_train.data.selection import spaced
from xlsd_train.runs.bootstrap import Losses
from xlsd_train.runs.validation_log import BANDS, LIVE, SETS
from xlsd_train.step.distributed import ALONE, Processes, Progress, silent
from xlsd_train.step.step import Step

SEED = 0  # not the run's: the same draws whatever its seed
Numbers = NDArray[np.int64]
BatchSpec = tuple[str, Numbers, Numbers, Numbers]  # bucket, ordinals, stream positions, timesteps


@dataclass(frozen=True)
class Validator:
    """Measures the same batches at every validated step."""

    source: BatchSource
    sets: dict[str, Selection]  # each of SETS -> its samples
    batch: int  # forward passes per batch

    def __call__(
        self,
        step: Step,
        weights: Mapping[str, AbstractContextManager[Any]],
        processes: Processes = ALONE,
        stopped: Callable[[], bool] = bool,
        progress: Progress = silent,
    ) -> dict[str, Losses] | None:
        """WEIGHTS/SET -> losses f32 [samples, BANDS], of the weights that each context applies.

        The processes of a run share the batches in turn, all with the first process's weights. Only
        the first process gets the losses, bit-exactly those of one process. If any process was
        `stopped`, all get None. No gradient, random state or module mode changes.
        """
        unweighted = replace(step.objective, weight=torch.ones_like(step.objective.weight))
        measured, results, done = replace(step, objective=unweighted), {}, 0
        names, specs_of = processes.names(list(weights)), {w: [*self._batch_specs(w)] for w in SETS}
        total = len(names) * sum(map(len, specs_of.values()))

        def work(specs: Sequence[BatchSpec], before: int, number: int) -> Losses:
            progress(before + number + 1, total)
            return self._measure(measured, specs[number])

        for name in names:
            context = processes.together(
                () if name == LIVE else step.parameters, weights.get(name, nullcontext())
            )
            with context, torch.no_grad():
                for which, specs in specs_of.items():
                    losses = processes.deal(len(specs), partial(work, specs, done), stopped)
                    done += len(specs)
                    if losses is None:
                        return None
                    if losses:
                        results[f"{name}/{which}"] = np.concatenate(losses).reshape(-1, BANDS)
        give_back(step.backend.device)  # its shapes are not training's
        return results

    def batches(self, name: str) -> Iterator[Batch]:
        """A set's samples by bucket, each BANDS times in succession."""
        return (self.source.fixed(*spec, SEED) for spec in self._batch_specs(name))

    def _measure(self, step: Step, spec: BatchSpec) -> Losses:
        batch = self.source.fixed(*spec, SEED).to(step.backend.device)
        losses: Losses = step.loss(batch).cpu().numpy()
        return losses

    def _batch_specs(self, name: str) -> Iterator[BatchSpec]:
        """The batches of a set."""
        noising = self.source.noising
        for bucket, ordinals in self._buckets(name):
            repeated = np.repeat(ordinals, BANDS)
            band = np.tile(np.arange(BANDS), len(ordinals))
            positions = self._positions(bucket, repeated, band)
            drawn = (band + draw.uniform(SEED, "validation timestep", positions)) / BANDS
            timesteps = noising.first + np.floor(drawn * noising.count).astype(np.int64)
            for start in range(0, len(repeated), self.batch):
                rows = slice(start, start + self.batch)
                yield bucket, repeated[rows], positions[rows], timesteps[rows]

    def keys(self) -> dict[str, list[str]]:
        """Set -> keys of its samples, in the order of its losses."""
        return {
            name: [key for bucket in self._buckets(name) for key in self.source.keys(*bucket)]
            for name in SETS
        }

    def _buckets(self, name: str) -> Iterator[tuple[str, NDArray[np.int64]]]:
        selection = self.sets[name]
        for bucket, size in selection.sizes.items():
            yield bucket, selection.ordinals(bucket, np.arange(size))

    def _positions(
        self, bucket: str, ordinals: NDArray[np.int64], band: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Position of each forward pass in the random streams: a hash of its key and band."""
        keys = self.source.keys(bucket, ordinals)
        names = [f"{key}\n{b}".encode() for key, b in zip(keys, band.tolist(), strict=True)]
        digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
        return np.frombuffer(digests, "<i8").astype(np.int64)


def measured(config: TrainConfig, held: Mask, trains: Mask) -> int:
    """Number of samples measured in each set; 0 without validation.

    Raises UserError if either set has fewer than two.
    """
    if not config.validate_every:
        return 0
    count = min(config.validation_images, int(held.sum()), int(trains.sum()))
    if count < 2:
        raise UserError(
            f"--validation-fraction {config.validation_fraction:g} holds out {held.sum()} of the "
            f"{(held | trains).sum()} images of {' '.join(config.data)}, too few for validation; "
            f"raise it"
        )
    return count


def make_validator(
    source: BatchSource, held: Mask, trains: Mask, count: int, batch: int
) -> Validator | None:
    """A validator of `count` held-out samples and as many training samples; None for 0."""
    if not count:
        return None
    sets = (select(source.dataset.store, spaced(mask, count)) for mask in (held, trains))
    return Validator(source, dict(zip(SETS, sets, strict=True)), batch)
