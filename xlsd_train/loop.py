"""`xlsd-train`: the training loop, on one page."""

import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from xlsd_cache import UserError
from xlsd_cache.interrupt import StopSignal
from xlsd_train.batches import Batch, Loader
from xlsd_train.checkpoint import checkpoints, prune, save_checkpoint, step_of
from xlsd_train.config import TrainConfig
from xlsd_train.ema import keep_snapshots
from xlsd_train.optim import learning_rate
from xlsd_train.run import peak_gib
from xlsd_train.session import Session, open_session
from xlsd_train.validate import best_of, say

SMOOTHING = 0.99  # weight of the past in the smoothed loss, a step


def train(config: TrainConfig, command: Sequence[str] = ()) -> Path:
    """Train as configured, or go on with the run in `config.out`; returns the run's folder.

    Raises UserError for what cannot work, before any weight has changed; and later where the disk
    or the card is full, when the last checkpoint stands.
    """
    with open_session(config, command) as session, StopSignal() as stop:
        folder = session.run.folder
        try:
            if not config.dry_run:
                _train(session, stop)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"batch {config.batch} needs more memory than the card has; lower --batch and "
                f"raise --accum by the same factor, or leave --gradient-checkpointing on"
            ) from error
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot go on writing {folder}: {error}; the last complete checkpoint is "
                f"{session.run.checkpoint}: mend that and run the same command with --out {folder}"
            ) from error
        return folder


def _train(session: Session, stop: StopSignal) -> None:
    config, run, accum = session.config, session.run, session.config.accum
    state = run.state()  # of the newest checkpoint; step 0 for a new run
    first, last = state["step"] + 1, min(session.planned_steps, config.stop_after or 2**62)
    if first == 1:
        if config.sample_every:
            _sample(session, 0)
        _validate(session, state, last)
    with (
        closing(
            Loader(session.source, (first - 1) * accum, last * accum, session.accelerator.device)
        ) as loader,
        tqdm(total=last, initial=first - 1, unit="step", disable=not session.main) as bar,
    ):
        batches = iter(loader)
        for step in range(first, last + 1):
            begun, waited = time.perf_counter(), loader.wait_s
            micro = list(islice(batches, accum))
            lr = learning_rate(config.lr or 0.0, session.warmup_steps, step)
            loss, norm = session.take_step(micro, lr)
            session.average(step)
            seconds = time.perf_counter() - begun

            total, weight = (SMOOTHING * part for part in state["smoothed"])
            state = {
                "step": step,
                "images_seen": micro[-1].images_before + micro[-1].images,
                "smoothed": [total + loss, weight + 1],  # their ratio needs no start-up correction
                "phase": config.phase,
            }
            line = {
                "step": step,
                "images_seen": state["images_seen"],
                "epoch": state["images_seen"] / len(session.source.selection),
                "loss": loss,
                "loss_smoothed": (total + loss) / (weight + 1),
                "lr": lr,
                "lr_effective": lr,  # what Lion moves each weight by; D-Lion's will differ
                "grad_norm": norm,
                "images_per_s": sum(batch.images for batch in micro) / seconds,
                "wait_s": loader.wait_s - waited,
                "peak_gib": peak_gib(session.accelerator.device),
            }
            if session.main:
                run.log(line)
                _say_epoch(session, micro)
            bar.set_postfix_str(f"loss {line['loss_smoothed']:.4f}", refresh=False)
            bar.update()

            asked = _asked(session, stop)
            ends = step == last or "STOP" in asked
            due = config.sample_every and (step == last or step % config.sample_every == 0)
            if due or "SAMPLE" in asked:
                _sample(session, step)
            _validate(session, state, last)
            if "SAVE" in asked or ends or step % config.save_every == 0:
                _save(session, state)  # last: what belongs to the step is on the disk before it
            if ends:
                break
    if session.main:
        _say_end(session, state["step"], stop.asked)


def _sample(session: Session, step: int) -> None:
    if session.main:
        session.sampler(session.model, session.run.folder, step, session.accelerator)
    session.accelerator.wait_for_everyone()


def _validate(session: Session, state: dict[str, Any], last: int) -> None:
    """Measure held-out images, where that is due at this step."""
    step, every = state["step"], session.config.validate_every
    if not every or (step % every and step != last):
        return
    if session.main and session.validator:
        averages = session.ema.contexts() if session.ema else {}
        losses = session.validator(session.take_step, {"live": nullcontext(), **averages})
        session.run.log_validation(step, state["images_seen"], losses)
    session.accelerator.wait_for_everyone()


def _save(session: Session, state: dict[str, Any]) -> None:
    if session.main:
        run, step = session.run, session.take_step
        run.sync()
        save_checkpoint(
            run.folder, session.model, session.named, step.optimizer, state, session.ema
        )
        if session.ema:
            most = session.config.ema_snapshots or 0
            keep_snapshots(run.folder, checkpoints(run.folder), most)
        best = best_of(run.folder, map(step_of, checkpoints(run.folder)))
        prune(run.folder, session.config.keep, best.best[0] if best else None)
    session.accelerator.wait_for_everyone()


def _asked(session: Session, stop: StopSignal) -> set[str]:
    """What signals and trigger files ask of this step; all processes agree on it."""
    names = ("SAVE", "SAMPLE", "STOP")
    asked = {name for name in names if session.main and session.run.asked(name)}
    if stop.asked:
        asked.add("STOP")
    if session.accelerator.num_processes > 1:
        flags = torch.tensor([name in asked for name in names], device=session.accelerator.device)
        flags = session.accelerator.reduce(flags.int())
        asked = {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}
    return asked


def _say_epoch(session: Session, micro: Sequence[Batch]) -> None:
    """At an epoch's end: how many images it used, of how many; of short epochs not every one."""
    schedule = session.schedule
    for batch in micro:
        epoch = int(batch.epoch) + 1
        ended = batch.number + 1 == schedule.batches(epoch)
        if ended and (schedule.batches_an_epoch >= 20 or epoch.bit_count() == 1):
            used = schedule.images(epoch) - schedule.images(epoch - 1)
            there = len(session.source.selection)
            tqdm.write(
                f"epoch {epoch} ended: it used {used} samples of {there}; so far each was used "
                f"{epoch} times, give or take one"
            )


def _say_end(session: Session, step: int, signalled: int) -> None:
    run, planned = session.run, session.planned_steps
    print(f"step {step} of {planned} planned; checkpoint {run.checkpoint}")
    if session.config.sample_every:
        print(f"samples {run.folder / 'samples' / 'grid.png'}")
    best = best_of(run.folder, (0, *map(step_of, checkpoints(run.folder))))
    if best:
        print(say(best))
    if signalled or step < planned:
        print(f"to go on from here, to the bit: the same command with --out {run.folder}")
