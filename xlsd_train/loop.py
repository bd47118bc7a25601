"""`xlsd-train`: the training loop, on one page."""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from xlsd_cache import UserError, terminal
from xlsd_cache.full import is_full
from xlsd_cache.interrupt import StopSignal
from xlsd_train.batches import Batch, Loader
from xlsd_train.checkpoint import checkpoints, prune, save_checkpoint, step_of
from xlsd_train.config import TrainConfig
from xlsd_train.ema import keep_snapshots
from xlsd_train.meter import Meter
from xlsd_train.optim import rates
from xlsd_train.plateau import PlateauWatch
from xlsd_train.rate import learning_rate
from xlsd_train.report import leave_report
from xlsd_train.run import peak_gib
from xlsd_train.session import Session, open_session
from xlsd_train.validate import best_of, say


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
        except RuntimeError as error:
            if not is_full(error):
                raise
            raise UserError(
                f"memory is full with {session.take_step.plan}, and no plan takes less; the last "
                f"complete checkpoint stands: lower --batch, or free the card of other programs"
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
        _pause(session, Due(config.sample_every > 0, config.validate_every > 0, False, False), 0, 0)
    watch = PlateauWatch.of_run(config, run.folder / "metrics.jsonl")
    with (
        closing(
            Loader(session.source, (first - 1) * accum, last * accum, session.accelerator.device)
        ) as loader,
        tqdm(total=last, initial=first - 1, unit="step", disable=not session.main) as bar,
    ):
        batches, meter = iter(loader), Meter(state["smoothed"])

        meter.begin()
        for step in range(first, last + 1):
            waited = loader.wait_s
            micro = list(islice(batches, accum))
            lr = learning_rate(
                config.lr or 0.0, session.warmup_steps, step,
                config.scheduler, session.planned_steps, config.lr_floor or 0.0,
            )  # fmt: skip
            loss, norm = session.take_step(micro, lr)
            session.average(step)
            images_seen = micro[-1].images_before + micro[-1].images
            line = {
                "step": step,
                "images_seen": images_seen,
                "epoch": images_seen / len(session.source.selection),
                **rates(session.take_step.optimizer),
                "wait_s": loader.wait_s - waited,
            }
            images = sum(batch.images for batch in micro)
            _log(session, watch, bar, meter.add(line, images, loss, norm))
            bar.update()
            if session.main:
                _say_epoch(session, micro)

            due = _due(session, stop, step, last)
            if due.pauses:
                _log(session, watch, bar, meter.flush())  # its loss must be a number
            _pause(session, due, step, images_seen)
            if due.saves:
                state = {
                    "step": step,
                    "images_seen": images_seen,
                    "smoothed": meter.smoothed,
                    "phase": config.phase,
                    "plan": session.take_step.plan,
                }
                _save(session, state)  # last: what belongs to the step is on the disk before it
            if due.pauses:
                meter.begin()
            if due.ends:
                break
    if session.main:
        _say_end(session, state["step"], stop.asked)


def _log(session: Session, watch: PlateauWatch, bar: Any, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        line["peak_gib"] = peak_gib(session.accelerator.device)
        if session.main:
            session.run.log(line)
            watch.see(line)
        bar.set_postfix_str(f"loss {line['loss_smoothed']:.4f}", refresh=False)


class Due(NamedTuple):
    """What is due after a step."""

    samples: bool
    validates: bool
    saves: bool
    ends: bool

    @property
    def pauses(self) -> bool:
        """Whether something comes between this step and the next."""
        return self.samples or self.validates or self.saves


def _due(session: Session, stop: StopSignal, step: int, last: int) -> Due:
    config, asked = session.config, _asked(session, stop)
    ends = step == last or "STOP" in asked
    samples, validates = (
        every > 0 and (step == last or step % every == 0)
        for every in (config.sample_every, config.validate_every)
    )
    saves = "SAVE" in asked or ends or step % config.save_every == 0
    return Due(samples or "SAMPLE" in asked, validates, saves, ends)


def _pause(session: Session, due: Due, step: int, images_seen: int) -> None:
    """What looks at the weights and leaves them."""
    if due.samples:
        _sample(session, step)
    if due.validates:
        _validate(session, step, images_seen)


def _sample(session: Session, step: int) -> None:
    if session.main:
        session.sampler(session.model, session.run.folder, step, session.accelerator)
    session.accelerator.wait_for_everyone()


def _validate(session: Session, step: int, images_seen: int) -> None:
    """Measure held-out images, of the weights and of their averages."""
    if session.main and session.validator:
        averages = session.ema.contexts() if session.ema else {}
        losses = session.validator(session.take_step, {"live": nullcontext(), **averages})
        session.run.log_validation(step, images_seen, losses)
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
            weights = " by its store's weight" if len(session.config.data) > 1 else ""
            tqdm.write(
                f"epoch {epoch} ended: it used {used} samples of {there}; so far each was used "
                f"{epoch} times{weights}, give or take one"
            )


def _say_end(session: Session, step: int, signalled: int) -> None:
    run, planned = session.run, session.planned_steps
    terminal.say(f"step {step} of {planned} planned; checkpoint {run.checkpoint}")
    if session.config.sample_every:
        terminal.say(f"samples {run.folder / 'samples' / 'grid.png'}")
    best = best_of(run.folder, (0, *map(step_of, checkpoints(run.folder))))
    if best:
        print(say(best))
    terminal.say(leave_report(run.folder))
    if signalled or step < planned:
        terminal.say(f"to go on from here, to the bit: the same command with --out {run.folder}")
