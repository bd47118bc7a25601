"""What a run is about to do, in full, before it does it."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch.nn import Parameter

from xlsd_cache.dataset.batch_order import BatchOrder
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.caption_lengths import describe_truncation
from xlsd_train.runs.record import RunRecord, StoreRecord
from xlsd_train.runs.validation_log import HELD_OUT
from xlsd_train.training.pace import epochs_told, hours_told

log = logging.getLogger("xlsd.train.training")


def announce(
    config: TrainConfig,
    record: RunRecord,
    schedule: BatchOrder,
    named: dict[str, Parameter],
    run: RunFolder,
) -> None:
    """Print it, from the record that config.json keeps."""
    for name, value in asdict(config).items():
        log.info(f"  {name:<24}{value}")
    for line in _chosen(record):
        log.info(line)
    weights = sum(parameter.numel() for parameter in named.values())
    log.info(record.precision)
    log.info(f"model {record.model['source']}: {weights / 1e6:.1f} M weights train")
    objective = record.objective
    weight = "" if config.loss_weight == "none" else f", weighted by {config.loss_weight}"
    anew = f"; the model predicted {objective['before']} so far, and learns to anew"
    log.info(
        f"objective {objective['kind']}{weight}, {config.timesteps} timesteps"
        + (anew if objective["anew"] else "")
    )
    if record.latents["normalized"]:
        log.info("latents are normalised by channel, with " + json.dumps(record.latents))
    if record.vae["decoder"]:
        log.info(record.vae["decoder"])
    _stores(record.stores)
    for tag in record.unknown_tags:
        log.info(f"  no image has the tag {tag!r} that --forbid-tags names")
    _measured(config, record)
    log.info(describe_truncation(record.captions))
    for line in record.remarks if config.sample_every else ():
        log.info(line)
    log.info(record.memory)
    if config.ema:
        gib = 2 * 4 * weights / 2**30
        held = gib * 1.5 if record.settings["device"] == "cuda" else gib  # a copy on its way
        log.info(
            f"EMA: two averages in {held:.1f} GiB of the CPU's memory, and at most "
            f"{config.ema_snapshots} snapshots of {gib:.1f} GiB in {run.folder / 'ema'}"
        )
    for bucket, count in schedule.small_buckets(record.batch):
        log.info(f"  bucket {bucket} holds {count} images, so its batches do, not {record.batch}")
    falls = config.scheduler != "constant"
    then = f", then {config.scheduler} to {config.lr_floor or 0:g}" if falls else ""
    steps = config.warmup or ""
    short = steps.isdecimal() and int(steps) > record.planned_steps
    tenth = f"; a tenth of the plan, which is shorter than the recipe's {steps}" if short else ""
    log.info(f"warm-up over {record.warmup_steps:g} steps to {config.lr:g}{then}{tenth}")
    _length(config, record, schedule)
    log.info(f"run {run.folder}" + (f", from step {run.state()['step']}" if run.before else ""))


def _measured(config: TrainConfig, record: RunRecord) -> None:
    """What validation measures, and whether its steps are those that are saved."""
    measured = len(record.validation.get(HELD_OUT, ()))
    if measured:
        log.info(f"  {measured} held-out images are measured beside {measured} that train")
        meet = math.lcm(config.validate_every, config.save_every)
        if meet > config.validate_every:
            log.info(
                f"  one of {meet // config.validate_every} validated steps is saved: "
                f"--validate-every {config.validate_every} and --save-every {config.save_every} "
                f"meet every {meet} steps, and the best checkpoint is chosen from those"
            )


def _length(config: TrainConfig, record: RunRecord, schedule: BatchOrder) -> None:
    """How long the run is to be, in all units that there are, and whether that is absurd."""
    planned, an_epoch = record.planned_steps, schedule.batches_an_epoch / config.accum
    last = min(planned, config.stop_after or planned)
    images = sum(store["selected"] for store in record.stores)
    stops = f", of which it stops after {last}" if last < planned else ""
    log.info(
        f"planned {planned} steps{stops}, {an_epoch:.1f} an epoch: "
        f"{epochs_told(last / an_epoch, images)}"
    )
    if record.step_s:
        card, step_s = record.step_s
        log.info(hours_told(card, last * config.accum * step_s))


def _chosen(record: RunRecord) -> Iterator[str]:
    """Where settings come from that nobody gave."""
    if record.recipe:
        yield _recipe(record.recipe)
    yield from (change["why"] for change in record.adapted.values() if change["why"])


def _recipe(record: dict[str, Any]) -> str:
    """Which recipe, and what of it the command line has otherwise."""
    told = f"recipe {record['name']} (sha256 {record['sha256'][:12]})"
    other = ", ".join(
        f"{name} {found['run']} for {found['recipe']}"
        for name, found in record["overridden"].items()
    )
    return f"{told}, with {other}" if other else told


def _stores(stores: list[StoreRecord]) -> None:
    """What each holds, which of that trains, and its share of an epoch."""
    uses = [store["selected"] * store["weight"] for store in stores]
    for store, used in zip(stores, uses, strict=True):
        line = f"store {store['path']}: {store['images']} images, generation {store['generation']}"
        later = store["newest_generation"] - store["generation"]
        if later:
            line += f", without the {later} later ones, unfinished or newer than the run"
        log.info(line)
        if store["tagged"] < store["images"]:
            log.info(f"  {store['tagged']} of {store['images']} images are selected by their tags")
        if store["selected"] < store["tagged"]:
            log.info(f"  {store['tagged'] - store['selected']} of them are held out for validation")
        if store["weight"] != 1 or len(stores) > 1:
            log.info(
                f"  an epoch uses each {store['weight']:g} times: {used / sum(uses):.1%} of what "
                f"it uses"
            )
