"""What a run is about to do, in full, before it does it."""

import json
import math
from dataclasses import asdict
from typing import Any

from torch.nn import Parameter

from xlsd_cache.terminal import say
from xlsd_train.config import TrainConfig
from xlsd_train.lengths import told
from xlsd_train.run import Run
from xlsd_train.schedule import Schedule
from xlsd_train.validate import HELD_OUT


def announce(
    config: TrainConfig,
    record: dict[str, Any],
    schedule: Schedule,
    named: dict[str, Parameter],
    run: Run,
) -> None:
    """Print it, from the record that config.json keeps."""
    for name, value in asdict(config).items():
        say(f"  {name:<24}{value}")
    if record["recipe"]:
        say(_recipe(record["recipe"]))
    weights = sum(parameter.numel() for parameter in named.values())
    print(record["precision"])
    say(f"model {record['model']['source']}: {weights / 1e6:.1f} M weights train")
    objective = record["objective"]
    weight = "" if config.loss_weight == "none" else f", weighted by {config.loss_weight}"
    anew = f"; the model predicted {objective['before']} so far, and learns to anew"
    print(
        f"objective {objective['kind']}{weight}, {config.timesteps} timesteps"
        + (anew if objective["anew"] else "")
    )
    if record["latents"]["normalized"]:
        print("latents are normalised by channel, with " + json.dumps(record["latents"]))
    if record["vae"]["decoder"]:
        print(record["vae"]["decoder"])
    _stores(record["stores"])
    for tag in record["unknown_tags"]:
        say(f"  no image has the tag {tag!r} that --forbid-tags names")
    measured = len(record["validation"].get(HELD_OUT, ()))
    if measured:
        print(f"  {measured} held-out images are measured beside {measured} that train")
        meet = math.lcm(config.validate_every, config.save_every)
        if meet > config.validate_every:
            print(
                f"  of the validated steps every {meet // config.validate_every}th is saved: "
                f"--validate-every {config.validate_every} and --save-every {config.save_every} "
                f"meet every {meet} steps, and the best checkpoint is chosen from those"
            )
    print(told(record["captions"]))
    print(record["memory"])
    if config.ema:
        gib = 2 * 4 * weights / 2**30
        held = gib * 1.5 if record["settings"]["device"] == "cuda" else gib  # a copy on its way
        say(
            f"EMA: two averages in {held:.1f} GiB of the CPU's memory, and at most "
            f"{config.ema_snapshots} snapshots of {gib:.1f} GiB in {run.folder / 'ema'}"
        )
    for bucket, count in schedule.small_buckets(record["batch"]):
        print(f"  bucket {bucket} holds {count} images, so its batches do, not {record['batch']}")
    an_epoch = schedule.batches_an_epoch / config.accum
    falls = config.scheduler != "constant"
    then = f", then {config.scheduler} to {config.lr_floor or 0:g}" if falls else ""
    print(
        f"planned {record['planned_steps']} steps, {an_epoch:.1f} an epoch; warm-up over "
        f"{record['warmup_steps']:g} steps to {config.lr:g}{then}"
    )
    say(f"run {run.folder}" + (f", from step {run.state()['step']}" if run.before else ""))


def _recipe(record: dict[str, Any]) -> str:
    """Which recipe, and what of it the command line has otherwise."""
    told = f"recipe {record['name']} (sha256 {record['sha256'][:12]})"
    other = ", ".join(
        f"{name} {found['run']} for {found['recipe']}"
        for name, found in record["overridden"].items()
    )
    return f"{told}, with {other}" if other else told


def _stores(stores: list[dict[str, Any]]) -> None:
    """What each holds, which of that trains, and its share of an epoch."""
    uses = [store["selected"] * store["weight"] for store in stores]
    for store, used in zip(stores, uses, strict=True):
        line = f"store {store['path']}: {store['images']} images, generation {store['generation']}"
        later = store["newest_generation"] - store["generation"]
        if later:
            line += f", without the {later} later ones, unfinished or newer than the run"
        say(line)
        if store["tagged"] < store["images"]:
            print(f"  {store['tagged']} of {store['images']} images are selected by their tags")
        if store["selected"] < store["tagged"]:
            print(f"  {store['tagged'] - store['selected']} of them are held out for validation")
        if store["weight"] != 1 or len(stores) > 1:
            print(
                f"  an epoch uses each {store['weight']:g} times: {used / sum(uses):.1%} of what "
                f"it uses"
            )
