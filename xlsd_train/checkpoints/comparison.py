"""Compares a run to be resumed with what is asked now: settings, length, batch and model.

What --force changes is noted in `RunFolder.forced`, and from there in config.json.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.resume import (
    FIXED,
    LENGTH,
    CaptionReader,
    changes,
    differing,
    plan_options,
    refusal,
)
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.optim.lr_scheduler import first_other_rate
from xlsd_train.runs.record import RunRecord

log = logging.getLogger("xlsd.train.checkpoints")


def compare_settings(
    run: RunFolder, settings: dict[str, Any], config: TrainConfig, caption: CaptionReader
) -> None:
    """Raise UserError for settings that could change a weight, unless forced.

    Some the checkpoint cannot do without, so that they cannot be forced. `caption` reads a
    --caption.
    """
    if run.before is None:
        return
    old = _old_settings(run, run.before, settings, config)
    differ = differing(old, settings, caption)
    fixed = {name: was for name, was in differ.items() if name in FIXED}
    if settings["ema"] and not old.get("ema", False):
        fixed["ema"] = False
    if run.checkpoint and fixed and (config.force or "ema" in fixed):
        raise UserError(
            f"{run.folder} was started with {changes(fixed, settings)}, which its checkpoint "
            f"cannot continue with; use the same, or start from its weights with --model "
            f"{run.folder} and another --out"
        )
    _note(run, differ, settings, config.force)


def compare_length(
    run: RunFolder, config: TrainConfig, planned: int, warmup: float
) -> tuple[int, float]:
    """(planned length, warm-up) to continue with, in steps.

    Raises UserError where another length would have given an earlier step another learning rate.
    """
    if run.before is None:
        return planned, warmup
    was = run.before.planned_steps, run.before.warmup_steps
    new = {name: getattr(config, name) for name in LENGTH}
    old = {name: run.before.settings.get(name) for name in LENGTH}
    differ = {name: value for name, value in old.items() if value != new[name]}
    if not differ and not run.forced:  # as it was counted when the run was started
        return was
    if was == (planned, warmup):
        return was
    step = run.state()["step"]
    if planned < step:
        raise UserError(
            f"{run.folder} is at step {step} already, past the {planned} steps planned now; use "
            f"--steps {step} or more, or another --out"
        )
    other = first_other_rate(config, was, (planned, warmup), step)
    if other is None:
        log.info(
            f"planned {planned} steps (before: {was[0]}): all learning rates so far are the same, "
            f"so the run equals one planned for {planned} steps from the start"
        )
        run.lengthened = True
        return planned, warmup
    why = f", so that step {other} would have had another learning rate"
    _note(run, differ, new, config.force, why)
    return planned, warmup


def compare_batch(run: RunFolder, batch: int, plan: Sequence[Any], force: bool) -> None:
    """Note that --force chose another batch, or another memory plan."""
    if run.before and force:
        was = {"batch": run.before.batch, "plan": list(run.before.plan)}
        now = {"batch": batch, "plan": list(plan)}
        differ = {name: value for name, value in was.items() if value != now[name]}
        run.forced = differ | run.forced


def compare_model(run: RunFolder, record: RunRecord, force: bool) -> None:
    """Raise UserError for another model, of a run that was killed before its first checkpoint."""
    if run.before is None or run.checkpoint is not None:
        return
    if record.model["sha256"] == run.before.model["sha256"]:
        return
    run.forced["model"] = run.before.model["source"]
    if not force:
        raise UserError(
            f"{run.folder} was started with the model {run.before.model['source']}, whose weights "
            f"differ from those of {record.model['source']}; use the same --model, another --out, "
            f"or --force"
        )


def inherit_held_out(run: RunFolder, config: TrainConfig, fraction: float | None) -> TrainConfig:
    """The options with the run's own --validation-fraction, where `fraction` is not given."""
    if run.before is None or fraction is not None:
        return config
    held: float = run.before.settings.get("validation_fraction", 0.0)
    if config.validate_every and not held:
        raise UserError(
            f"{run.folder} was started without held-out images, so --validate-every "
            f"{config.validate_every} has nothing to measure; leave it out, or use another --out"
        )
    return replace(config, validation_fraction=held)


def _note(
    run: RunFolder, differ: dict[str, Any], now: Mapping[str, Any], force: bool, why: str = ""
) -> None:
    if not differ:
        return
    if not force:
        raise refusal(run.folder, changes(differ, now) + why)
    run.forced |= differ
    log.info(
        f"--force: {run.folder} was started with {changes(differ, now)}; not bit-exact from here"
    )


def _old_settings(
    run: RunFolder, before: RunRecord, settings: dict[str, Any], config: TrainConfig
) -> dict[str, Any]:
    """The run's settings, rewritten where the same effect is written in another way now."""
    old = dict(before.settings)
    if settings["batch"] in {"auto", before.batch}:
        old["batch"] = settings["batch"]
    kind = before.objective["kind"]
    if run.checkpoint and kind and settings["objective"] in {None, kind}:
        old["objective"] = settings["objective"]  # left out, it is that of the checkpoint
    if "card" in settings:  # earlier versions recorded it only among the machine's facts
        old.setdefault("card", before.machine.get("card"))
    old |= plan_options(settings, [before.plan, run.state().get("plan", before.plan)])
    if not (before.validation and config.validate_every):
        old["validation_images"] = settings["validation_images"]
    return old
