"""`xlsd-train`: the training loop, on one page."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.gpu_memory import is_full
from xlsd_cache.runtime.signals import StopSignal
from xlsd_train.checkpoints.checkpoint import prune, save_checkpoint
from xlsd_train.checkpoints.disk_space import writing
from xlsd_train.checkpoints.environment import peak_gib
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch, Loader
from xlsd_train.optim.ema import keep_snapshots
from xlsd_train.optim.factory import rates
from xlsd_train.optim.lr_scheduler import learning_rate
from xlsd_train.optim.plateau import PlateauWatch
from xlsd_train.report.page import leave_report
from xlsd_train.runs.layout import (
    METRICS_LOG,
    REQUESTS,
    SAMPLE,
    SAVE,
    STOP,
    checkpoints,
    grid_of,
    has_samples,
    step_of,
)
from xlsd_train.runs.validation_log import LIVE, best_of, describe_checkpoints, is_validated
from xlsd_train.step.distributed import Lost
from xlsd_train.training.meter import FailureWatch, Meter
from xlsd_train.training.pace import Pace
from xlsd_train.training.session import Session, open_session

log = logging.getLogger("xlsd.train.training")

Watches = tuple[PlateauWatch, Pace, FailureWatch]  # of what the metrics show


def train(config: TrainConfig, command: Sequence[str] = ()) -> Path:
    """Train, or resume the run in `config.out`.

    Args:
        config: the run's options; `phase`, `data` and `batch` have no useful defaults.
        command: the words of the command line, which the run records.

    Returns:
        The run's folder, with checkpoints, samples, logs and a report in it.

    Raises:
        UserError: an option or a file is wrong, before any weight has changed; or the disk or the
            card is full, or another process of the run ended: the last checkpoint stays.

    """
    with open_session(config, command) as session, StopSignal() as stop:
        folder = session.run.folder
        try:
            if not config.dry_run:
                with writing(session.run):
                    _train(session, stop)
                _say_end(session, stop)
        except (Lost, RuntimeError) as error:
            if is_full(error):
                raise UserError(
                    f"memory is full with {session.take_step.plan}, and no plan takes less; the "
                    f"last complete checkpoint stands: lower --batch, or free the card of other "
                    f"programs"
                ) from error
            if not session.processes.lost(error):
                raise
            raise UserError(
                f"another process of this run has ended ({str(error).partition(chr(10))[0]}); the "
                f"last complete checkpoint is {session.run.checkpoint}: the same command with "
                f"--out {folder} goes on from it"
            ) from error
        session.processes.close()
        return folder


def _train(session: Session, stop: StopSignal) -> None:
    config, run, accum = session.config, session.run, session.config.accum
    state = run.state()  # of the newest checkpoint; step 0 for a new run
    first, last = state["step"] + 1, min(session.planned_steps, config.stop_after or 2**62)
    if not _pause(
        session, stop, _missed(session, first - 1, last), first - 1, state["images_seen"]
    ):
        return
    plateau = PlateauWatch.of_run(config, run.folder / METRICS_LOG)
    watches = (plateau, Pace(last), FailureWatch())
    with (
        closing(
            Loader(session.source, (first - 1) * accum, last * accum, session.accelerator.device)
        ) as loader,
        progress_bar(total=last, initial=first - 1, unit="step", disable=not session.main) as bar,
    ):
        batches, meter = iter(loader), Meter(state["smoothed"], run.folder)

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
                "epoch": images_seen / session.schedule.samples_an_epoch,
                **rates(session.take_step.optimizer),
                "wait_s": loader.wait_s - waited,
            }
            images = sum(batch.images for batch in micro)
            _log(session, watches, bar, meter.add(line, images, loss, norm))
            bar.update()
            if session.main:
                _say_epoch(session, micro)

            due = _due(session, stop, step, last)
            if due.pauses:
                _log(session, watches, bar, meter.flush())  # its loss must be a number
            if not _pause(session, stop, due, step, images_seen):
                due = Due(saves=True, ends=True)
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


def _log(session: Session, watches: Watches, bar: Any, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        line["peak_gib"] = peak_gib(session.accelerator.device)
        if session.main:
            session.run.log(line)
            for watch in watches:
                watch.see(line)
        bar.set_postfix_str(f"loss {line['loss_smoothed']:.4f}", refresh=False)


class Due(NamedTuple):
    """What is due after a step."""

    samples: bool = False
    validates: bool = False
    saves: bool = False
    ends: bool = False

    @property
    def pauses(self) -> bool:
        """Whether something comes between this step and the next."""
        return self.samples or self.validates or self.saves


def _due(session: Session, stop: StopSignal, step: int, last: int) -> Due:
    """After a signal a checkpoint and no more; RUN/STOP ends as --stop-after would have here."""
    asked = _asked(session, stop)
    if "signal" in asked:
        return Due(saves=True, ends=True)
    ends = step == last or STOP in asked
    samples, validates = _regular(session, step, ends)
    saves = SAVE in asked or ends or step % session.config.save_every == 0
    return Due(samples or SAMPLE in asked, validates, saves, ends)


def _missed(session: Session, step: int, last: int) -> Due:
    """What is due at step 0; later what a signal left out after the checkpoint's step."""
    samples, validates = _regular(session, step, step == last)
    folder = session.run.folder
    if session.main:  # whose folder counts
        samples &= step == 0 or not has_samples(folder, step)
        validates &= not is_validated(folder, step)
    main = session.main
    return Due(*session.processes.any(main and samples, main and validates))


def _regular(session: Session, step: int, ends: bool) -> tuple[bool, bool]:
    """Whether samples and validation are due: every so many steps, and where a run ends."""
    config = session.config
    samples, validates = (
        every > 0 and (ends or step % every == 0)
        for every in (config.sample_every, config.validate_every)
    )
    return samples, validates


def _pause(session: Session, stop: StopSignal, due: Due, step: int, images_seen: int) -> bool:
    """What looks at the weights and leaves them; False where a signal broke it off."""

    def stopped() -> bool:
        return stop.asked > 0

    return not (
        (due.samples and not _sample(session, step, stopped))
        or (due.validates and not _validate(session, step, images_seen, stopped))
    )


def _sample(session: Session, step: int, stopped: Callable[[], bool]) -> bool:
    sampler, folder = session.sampler, session.run.folder
    grid = sampler(session.model, folder, step, session.accelerator, session.processes, stopped)
    return grid is not None


def _validate(session: Session, step: int, images_seen: int, stopped: Callable[[], bool]) -> bool:
    """Measure held-out images, of the weights and of their averages."""
    assert session.validator is not None
    averages = session.ema.contexts() if session.ema else {}
    losses = session.validator(
        session.take_step, {LIVE: nullcontext(), **averages}, session.processes, stopped
    )
    if losses is not None and session.main:
        session.run.log_validation(step, images_seen, losses)
    return losses is not None


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
    session.processes.wait()


def _asked(session: Session, stop: StopSignal) -> set[str]:
    """What signals and trigger files ask of this step; all processes agree on it."""
    names = (*REQUESTS, "signal")
    flags = [session.main and session.run.take_request(name) for name in REQUESTS]
    flags = session.processes.any(*flags, stop.asked > 0)
    return {name for name, flag in zip(names, flags, strict=True) if flag}


def _say_epoch(session: Session, micro: Sequence[Batch]) -> None:
    """At an epoch's end: how many images it used, of how many; of short epochs not every one."""
    schedule = session.schedule
    for batch in micro:
        epoch = int(batch.epoch) + 1
        ended = batch.number + 1 == schedule.batches(epoch)
        if ended and (schedule.batches_an_epoch >= 20 or epoch.bit_count() == 1):
            used = schedule.images(epoch) - schedule.images(epoch - 1)
            there = schedule.samples_an_epoch
            weighted = there != len(session.source.dataset)
            times = f"its store's weight x {epoch} times" if weighted else f"{epoch} times"
            log.info(
                f"epoch {epoch} ended: it used {used} samples of {there}; so far each was used "
                f"{times}, give or take one"
            )


def _say_end(session: Session, stop: StopSignal) -> None:
    if not session.main:
        return
    run, planned = session.run, session.planned_steps
    step = run.state()["step"]
    log.info(f"step {step} of {planned} planned; checkpoint {run.checkpoint}")
    if session.config.sample_every:
        log.info(f"samples {grid_of(run.folder)}")
    told = describe_checkpoints(run.folder, list(map(step_of, checkpoints(run.folder))))
    if told:
        log.info(told)
    if not stop.hurries:
        log.info(leave_report(run.folder))
    if stop.asked or step < planned:
        log.info(f"to go on from here, to the bit: the same command with --out {run.folder}")
