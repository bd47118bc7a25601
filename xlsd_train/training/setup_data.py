"""Build the data of a run: samples that train or are held out, sample prompts, batch source."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from xlsd_cache.dataset.dataset import LatentDataset
from xlsd_cache.dataset.sampler import BucketBatchSampler
from xlsd_cache.dataset.selection import Mask, Selection, select
from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.comparison import compare_settings, inherit_held_out
from xlsd_train.checkpoints.environment import resume_settings
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.adapt import adapt
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.captions import CaptionColumns, Captions
from xlsd_train.data.loader import BatchSource
from xlsd_train.data.mixture import Mixture
from xlsd_train.data.noise import Noising
from xlsd_train.data.selection import TagFilter, columns_of, filter_by_tags, held_out_mask
from xlsd_train.evaluation.images import Picture
from xlsd_train.evaluation.sampler import read_prompts
from xlsd_train.evaluation.validator import measured
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.runs.record import Changes, StoreRecord
from xlsd_train.step.objective import Objective


@dataclass(frozen=True)
class Samples:
    """Which samples of the stores a run uses, and for what."""

    columns: CaptionColumns
    tagged: TagFilter
    held_out: Mask  # for validation only
    trains: Mask
    selection: Selection  # those that train
    measured: int  # by validation, from each set

    def records(self, stores: Mixture) -> list[StoreRecord]:
        """A record of each store for config.json."""
        tagged, selected = stores.counts(self.tagged.mask), stores.counts(self.trains)
        return [
            {
                "path": str(part.store.root.absolute()),
                "weight": float(part.weight),
                "generation": part.store.generation,
                "newest_generation": part.store.newest_generation,
                "fingerprint": part.store.fingerprint,
                "resolution": part.store.identity.resolution,
                "images": len(part.store),
                "tagged": tagged[i],
                "selected": selected[i],
            }
            for i, part in enumerate(stores.parts)
        ]


@dataclass(frozen=True)
class RunData:
    """What a run trains on, and its config adapted to that."""

    config: TrainConfig
    adapted: Changes
    store: Mixture
    samples: Samples
    settings: dict[str, Any]  # that a resume must share
    pictures: list[Picture]  # to draw as samples


def build_data(
    config: TrainConfig, given: frozenset[str], fraction: float | None, store: Mixture,
    run: RunFolder, device: torch.device,
) -> RunData:  # fmt: skip
    """Choose samples and prompts. Of a resolved config `given` names the options that were given.

    `fraction` is --validation-fraction, None if not given. Raises UserError for too few samples,
    and for settings that a resumed run cannot continue with.
    """
    config, adapted = adapt(config, store, given, run.adapted)
    config = inherit_held_out(run, config, fraction)
    samples = choose_samples(config, store)
    shared = resume_settings(config, store, device)
    compare_settings(run, shared, config, partial(columns_of, store))
    pictures = read_prompts(config, store, samples.selection, samples.columns, run.before)
    return RunData(config, adapted, store, samples, shared, pictures)


def choose_samples(config: TrainConfig, store: Mixture) -> Samples:
    """Select by tags, and hold out for validation. Raises UserError for fewer than --batch."""
    columns = columns_of(store, config.caption)
    tagged = filter_by_tags(store, columns.names, *config.selected_tags())
    held_out = tagged.mask & held_out_mask(store, config.validation_fraction or 0)
    trains = tagged.mask & ~held_out
    selection = select(store, trains)
    _check_batch(config, selection, store.root)
    count = measured(config, held_out, trains)
    return Samples(columns, tagged, held_out, trains, selection, count)


def _check_batch(config: TrainConfig, selection: Selection, data: str) -> None:
    count = len(selection)
    if not selection.of:
        raise UserError(f"{data} holds no live image; build it from images that load")
    if not count:
        raise UserError(
            f"--validation-fraction {config.validation_fraction:g} holds out every selected image; "
            f"lower it"
        )
    if config.batch != "auto" and config.batch > count:
        which = "images" if count == selection.of else "selected images"
        raise UserError(
            f"--batch {config.batch} is larger than the {count} {which} of {data}; "
            f"lower it to {count} or less"
        )


def make_source(
    data: RunData, batch: int, model: ModelBundle, objective: Objective, accelerator: Accelerator
) -> BatchSource:
    """The source of this process's part of any batch."""
    config, samples = data.config, data.samples
    captions = Captions(
        model.tokenizer, model.tokens, config.seed, config.caption_dropout, config.caption_edits()
    )
    stratified = config.timesteps == "stratified"
    noising = Noising(objective.first, objective.count, stratified, config.noise_offset)
    dataset = LatentDataset(
        data.store, samples.columns.names[0], scaled=False, selection=samples.selection
    )
    sampler = BucketBatchSampler(
        dataset, batch, config.seed,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
    )  # fmt: skip
    return BatchSource(dataset, sampler, captions, samples.columns, noising)
