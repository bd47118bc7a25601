"""Unweighted losses of images that never train, and of as many that do; training is untouched.

Each image is measured at one timestep in every band, with noise of its own; both follow from the
image's key alone, so that steps, checkpoints and runs are compared on the same draws.

RUN/validation/step-00000250.safetensors    WEIGHTS/SET: losses f32 [samples, BANDS]
RUN/config.json, "validation"               the keys of each set's samples, in that order
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from xlsd_cache import UserError
from xlsd_cache.durable import replacing
from xlsd_cache.full import give_back
from xlsd_train import draw
from xlsd_train.batches import Batch, BatchSource
from xlsd_train.config import TrainConfig
from xlsd_train.mixture import Mask
from xlsd_train.selection import Selection, evenly, selected
from xlsd_train.step import Step
from xlsd_train.verdict import Losses, Verdict, summary, verdict

BANDS = 10
SEED = 0  # not the run's: runs of all seeds are measured alike
HELD_OUT, TRAINING = SETS = ("held_out", "training")
Candidate = tuple[int, str]  # step, WEIGHTS


@dataclass(frozen=True)
class Validator:
    """What is measured, in batches that are always the same."""

    source: BatchSource
    sets: dict[str, Selection]  # SETS -> samples
    batch: int  # forward passes at once

    def __call__(
        self, step: Step, weights: Mapping[str, AbstractContextManager[Any]]
    ) -> dict[str, Losses]:
        """WEIGHTS/SET -> losses [samples, BANDS], of the weights that each context sets in place.

        No gradient, no random state, no module's mode changes.
        """
        plain = replace(step.objective, weight=torch.ones_like(step.objective.weight))
        measured, found = replace(step, objective=plain), {}
        for name, context in weights.items():
            with context, torch.no_grad():
                for which in SETS:
                    each = [
                        measured.loss(x.to(step.accelerator.device)).cpu()
                        for x in self.batches(which)
                    ]
                    found[f"{name}/{which}"] = torch.cat(each).view(-1, BANDS).numpy()
        give_back(step.accelerator.device)  # its shapes are not training's
        return found

    def batches(self, name: str) -> Iterator[Batch]:
        """A set's samples by bucket, each BANDS times in succession."""
        noising = self.source.noising
        for bucket, ordinals in self._buckets(name):
            every = np.repeat(ordinals, BANDS)
            band = np.tile(np.arange(BANDS), len(ordinals))
            positions = self._positions(bucket, every, band)
            drawn = (band + draw.uniform(SEED, "validation timestep", positions)) / BANDS
            timesteps = noising.first + np.floor(drawn * noising.count).astype(np.int64)
            for start in range(0, len(every), self.batch):
                part = slice(start, start + self.batch)
                yield self.source.fixed(bucket, every[part], positions[part], timesteps[part], SEED)

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
    parts = (selected(source.store, evenly(mask, count)) for mask in (held, trains))
    return Validator(source, dict(zip(SETS, parts, strict=True)), batch)


def save_losses(run: Path, step: int, losses: dict[str, Losses]) -> None:
    """Write what a step's validation found, as WEIGHTS/SET."""
    path = _path(run, step)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        save_file(losses, temporary)


def read_losses(run: Path, step: int) -> dict[str, Losses]:
    """WEIGHTS/SET -> losses; empty for a step that was not validated."""
    path = _path(run, step)
    return load_file(path) if path.exists() else {}


def forget_after(run: Path, step: int) -> None:
    """Remove what outran the checkpoint of `step`."""
    for path in (run / "validation").glob("step-????????.safetensors"):
        if int(path.stem[5:]) > step:
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


def say(found: Verdict[Candidate]) -> str:
    """The verdict in words."""
    told = f"best on held-out images: {named(found.best)}, loss {found.loss}"
    if found.best[0] == 0:
        told += "; that is the model it began from"
    if found.alike:
        told += "; not told apart from it: " + ", ".join(map(named, found.alike))
    return told


def named(candidate: Candidate) -> str:
    """A candidate in words."""
    step, weights = candidate
    return f"step {step}" if weights == "live" else f"step {step} {weights}"


def _path(run: Path, step: int) -> Path:
    return run / "validation" / f"step-{step:08d}.safetensors"
