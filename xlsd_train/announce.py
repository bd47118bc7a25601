"""What a run is about to do, in full, before it does it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch.nn import Parameter

from xlsd_train.config import TrainConfig
from xlsd_train.lengths import told
from xlsd_train.run import Run
from xlsd_train.schedule import Schedule


def announce(
    config: TrainConfig,
    record: dict[str, Any],
    schedule: Schedule,
    named: dict[str, Parameter],
    run: Run,
    unknown: Sequence[str],
) -> None:
    """Print it, from the record that config.json keeps."""
    for name, value in asdict(config).items():
        print(f"  {name:<24}{value}")
    weights = sum(parameter.numel() for parameter in named.values())
    print(record["precision"])
    print(f"model {record['model']['source']}: {weights / 1e6:.1f} M weights train")
    store = record["store"]
    print(
        f"store {store['path']}: {store['images']} images, generation {store['generation']}", end=""
    )
    later = store["newest_generation"] - store["generation"]
    print(f", without the {later} later ones, unfinished or newer than the run" if later else "")
    if store["selected"] < store["images"]:
        print(f"  {store['selected']} of {store['images']} images are selected by their tags")
    for tag in unknown:
        print(f"  no image has the tag {tag!r} that --forbid-tags names")
    print(told(record["captions"]))
    print(record["memory"])
    for bucket, count in schedule.small_buckets(record["batch"]):
        print(f"  bucket {bucket} holds {count} images, so its batches do, not {record['batch']}")
    an_epoch = schedule.batches_an_epoch / config.accum
    falls = config.scheduler != "constant"
    then = f", then {config.scheduler} to {config.lr_floor or 0:g}" if falls else ""
    print(
        f"planned {record['planned_steps']} steps, {an_epoch:.1f} an epoch; warm-up over "
        f"{record['warmup_steps']:g} steps to {config.lr:g}{then}"
    )
    print(f"run {run.folder}" + (f", from step {run.state()['step']}" if run.before else ""))
