"""Log what a run is about to do, before its first step, and each epoch's end."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from xlsd_cache.console.option_checks import as_flags
from xlsd_cache.console.progress import event
from xlsd_cache.dataset.batch_order import BatchOrder
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.caption_lengths import describe_truncation
from xlsd_train.data.loader import Batch, BatchSource
from xlsd_train.memory.measure import describe
from xlsd_train.progress.pace import describe_epochs, describe_hours
from xlsd_train.runs.record import RunRecord, StoreRecord
from xlsd_train.runs.validation_log import HELD_OUT
from xlsd_train.step.backend import MemoryPlan

log = logging.getLogger("xlsd.train.progress")

COLUMN = 11  # where the texts of the block's rows start
SHOWN = {"phase", "data", "model", "out", "epochs", "steps"}  # by other rows


def announce(
    config: TrainConfig,
    record: RunRecord,
    order: BatchOrder,
    named: dict[str, Parameter],
    run: RunFolder,
) -> None:
    """Log it, from the record that goes into config.json: a block of rows, then remarks."""
    folder, step = run.folder, run.state()["step"]
    event(
        "start", run=folder, phase=config.phase, step=step, planned_steps=record.planned_steps,
        batch=record.batch, memory=record.memory,
    )  # fmt: skip
    weights = sum(parameter.numel() for parameter in named.values())
    _row("run", f"{folder}: " + (f"resumed at step {step}" if run.before else "new"))
    _row(
        "model",
        f"{record.model['source']}: {weights / 1e6:.1f} M weights to train ({config.phase})",
    )
    _row("", _objective(config, record))
    _stores(record.stores)
    _measured(config, record)
    _memory(record)
    _row("precision", record.precision.partition(" (")[0])
    _row("rate", _rate(config, record))
    _length(config, record, order)
    if settings := as_flags(config, _usual(config), SHOWN):
        _row("settings", settings)
    log.info(describe_truncation(record.captions))
    for line in _chosen(record):
        log.info(line)
    if record.latents["normalized"]:
        log.info("latents are normalised per channel: " + json.dumps(record.latents))
    if record.vae["decoder"]:
        log.info(record.vae["decoder"])
    for tag in record.unknown_tags:
        log.info(f"no image has the --forbid-tags tag {tag!r}")
    for line in record.remarks if config.sample_every else ():
        log.info(line)
    if config.ema:
        gib = 2 * 4 * weights / 2**30
        held = gib * 1.5 if record.settings["device"] == "cuda" else gib  # and a staging copy
        log.info(
            f"EMA: two averages in {held:.1f} GiB of CPU memory, and at most "
            f"{config.ema_snapshots} snapshots of {gib:.1f} GiB in {folder / 'ema'}"
        )
    for bucket, count in order.small_buckets(record.batch):
        log.info(f"bucket {bucket} has {count} images: using batch size {count}")


def _row(name: str, text: str) -> None:
    """A row of the block; one without a name continues the row above."""
    log.info(f"{name:<{COLUMN}}{text}")


def _usual(config: TrainConfig) -> TrainConfig:
    """The defaults, where some depend on other options on those of the run."""
    return TrainConfig(
        phase=config.phase, data=config.data, optimizer=config.optimizer, ema=config.ema,
        validate_every=config.validate_every, loss_weight=config.loss_weight,
        objective=config.objective,
    ).resolved()  # fmt: skip


def _objective(config: TrainConfig, record: RunRecord) -> str:
    objective = record.objective
    weight = "" if config.loss_weight == "none" else f", weighted by {config.loss_weight}"
    changed = f"; the model was trained to predict {objective['before']} before"
    return f"objective {objective['kind']}{weight}, {config.timesteps} timesteps" + (
        changed if objective["anew"] else ""
    )


def _rate(config: TrainConfig, record: RunRecord) -> str:
    falls = config.scheduler != "constant"
    then = f", then {config.scheduler} to {config.lr_floor or 0:g}" if falls else ""
    steps = config.warmup or ""
    short = steps.isdecimal() and int(steps) > record.planned_steps
    tenth = f" (a tenth of the run, which is shorter than the recipe's {steps})" if short else ""
    return f"warm-up over {record.warmup_steps:g} steps to {config.lr:g}{then}{tenth}"


def _memory(record: RunRecord) -> None:
    """The memory plan, how to get it again, and what was measured to choose it."""
    used = MemoryPlan(*record.plan)
    _row("memory", record.memory)
    _row("", f"the same plan again: {used.flags()}")
    for row in record.measured:
        plan = MemoryPlan(*row["plan"])
        _row("", f"{'*' if plan == used else ' '} {plan!s:<44}{describe(row)}")


def _measured(config: TrainConfig, record: RunRecord) -> None:
    """What validation measures, and whether validated steps are saved."""
    measured = len(record.validation.get(HELD_OUT, ()))
    if measured:
        _row("validation", f"{measured} held-out images and {measured} training images")
        meet = math.lcm(config.validate_every, config.save_every)
        if meet > config.validate_every:
            _row(
                "",
                f"only every {meet} steps a step is both validated and saved (--validate-every "
                f"{config.validate_every}, --save-every {config.save_every}); the best checkpoint "
                f"is chosen from those",
            )


def _length(config: TrainConfig, record: RunRecord, order: BatchOrder) -> None:
    """The run's length in steps, epochs and hours, and whether that is absurd."""
    planned, an_epoch = record.planned_steps, order.batches_an_epoch / config.accum
    last = config.last_step(planned)
    images = sum(store["selected"] for store in record.stores)
    stops = f" (stopping after {last})" if last < planned else ""
    _row(
        "length",
        f"planned {planned} steps{stops}, {an_epoch:.1f} per epoch: "
        f"{describe_epochs(last / an_epoch, images)}",
    )
    if hours := describe_hours(record, last * config.accum):
        _row("", hours)


def _chosen(record: RunRecord) -> Iterator[str]:
    """Where settings come from that were not given."""
    if record.recipe:
        yield _recipe(record.recipe)
    yield from (change["why"] for change in record.adapted.values() if change["why"])


def _recipe(record: dict[str, Any]) -> str:
    """Which recipe, and what the command line overrides."""
    recipe = f"recipe {record['name']} (sha256 {record['sha256'][:12]})"
    overridden = ", ".join(
        f"{name} {'unset' if values['run'] is None else values['run']} (recipe: {values['recipe']})"
        for name, values in record["overridden"].items()
    )
    return f"{recipe}, with {overridden}" if overridden else recipe


def _stores(stores: list[StoreRecord]) -> None:
    """The images of each store, how many train, and its share of an epoch."""
    uses = [store["selected"] * store["weight"] for store in stores]
    for store, used in zip(stores, uses, strict=True):
        path, here = Path(store["path"]), Path.cwd()
        shown = path.relative_to(here) if path.is_relative_to(here) else path
        line = f"{shown}: {store['images']} images, generation {store['generation']}"
        later = store["newest_generation"] - store["generation"]
        if later:
            line += f" ({later} later ones are unfinished or newer than the run)"
        _row("data", line)
        if store["tagged"] < store["images"]:
            _row("", f"{store['tagged']} of {store['images']} images are selected by tags")
        if store["selected"] < store["tagged"]:
            _row("", f"{store['tagged'] - store['selected']} of them are held out for validation")
        if store["weight"] != 1 or len(stores) > 1:
            often = "once" if store["weight"] == 1 else f"{store['weight']:g} times"
            _row("", f"each is used {often} per epoch: {used / sum(uses):.1%} of the epoch")


def log_epochs(source: BatchSource, batches: Sequence[Batch]) -> None:
    """Log each epoch that ends with one of the batches; of short epochs only some.

    Without store weights each image was used once per epoch so far, plus or minus one: a batch that
    holds a bucket's last images of an epoch is filled with its first ones of the next.
    """
    order = source.sampler.order
    for batch in batches:
        epoch = int(batch.epoch) + 1
        ends = batch.number + 1 == order.batches(epoch)
        if ends and (order.batches_an_epoch >= 20 or epoch.bit_count() == 1):
            seen, each = order.images(epoch), order.samples_an_epoch
            notes = ["images times store weights"] if each != len(source.dataset) else []
            notes += ["some batches span two epochs"] if seen != epoch * each else []
            told = f" ({'; '.join(notes)})" if notes else ""
            log.info(f"epoch {epoch} done: {seen} images seen, {each} per epoch{told}")
