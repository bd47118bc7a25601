"""What trackers show of a run: TensorBoard and Weights & Biases, under the same names."""

import json
from collections.abc import Mapping
from typing import Any

from xlsd_train.config.train import FREE
from xlsd_train.runs.record import RunRecord
from xlsd_train.runs.validation_log import HELD_OUT, SETS

PHASES = {"unet": "the UNet", "te": "the text encoder", "both": "the UNet and the text encoder"}


def step_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl."""
    return {f"train/{name}": value for name, value in line.items() if name != "step"}


def validation_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The losses of a line of validation.jsonl: of each set, and held out by band of timesteps.

    Bands go from least noise to most.
    """
    weights, bands = line["weights"], line[HELD_OUT]["bands"]
    ends = [100 * band // len(bands) for band in range(len(bands) + 1)]
    return {
        **{f"validation/{weights}/{name}": line[name]["mean"] for name in (*SETS, "gap")},
        **{
            f"validation_bands/{weights}/{ends[i]:02d}-{ends[i + 1]}%": band["mean"]
            for i, band in enumerate(bands)
        },
    }


def hyperparameters(record: RunRecord) -> dict[str, str | float]:
    """The options that can change a weight, and what was chosen for them."""
    options = {name: each for name, each in record.config.items() if name not in FREE}
    options |= {"batch": record.batch, "planned_steps": record.planned_steps}
    options |= {"images": _images(record), "model": record.model["source"]}
    return {
        name: value if type(value) in {int, float, str} else json.dumps(value)
        for name, value in options.items()
        if value is not None
    }


def sentence(record: RunRecord) -> str:
    """What a run is, in one sentence."""
    trains = PHASES.get(record.config["phase"], "a model")
    images = record.batch * record.config.get("accum", 1)
    return (
        f"Trains {trains} of {record.model['source']} on {_images(record):,} images, for "
        f"{record.planned_steps:,} steps of {images} images in {record.config['precision']}."
    )


def _images(record: RunRecord) -> int:
    return sum(store["selected"] for store in record.stores)
