"""The training loop, on one page."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.gpu_memory import is_full
from xlsd_cache.runtime.signals import StopSignal
from xlsd_train.checkpoints.checkpoint import prune, save_checkpoint
from xlsd_train.checkpoints.disk_space import writing
from xlsd_train.checkpoints.environment import peak_gib
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Loader
from xlsd_train.optim.ema import keep_snapshots
from xlsd_train.optim.factory import rates
from xlsd_train.optim.lr_scheduler import learning_rate
from xlsd_train.optim.plateau import PlateauWatch
from xlsd_train.progress.announce import log_epochs
from xlsd_train.progress.pace import Pace
from xlsd_train.progress.status import Status
from xlsd_train.progress.wandb_run import following
from xlsd_train.runs.layout import METRICS_LOG, checkpoints, step_of
from xlsd_train.runs.validation_log import LIVE, best_of
from xlsd_train.step.distributed import Lost
from xlsd_train.training.due import Due
from xlsd_train.training.meter import FailureWatch, Meter, require_finite
from xlsd_train.training.results import log_results
from xlsd_train.training.session import Session, open_session

STOPPING = "xlsd-train: stopping with a checkpoint; press Ctrl-C again to stop without"
Watches = tuple[PlateauWatch, Pace, FailureWatch]  # they read the metrics and log


def train(config: TrainConfig, command: Sequence[str] = (), status: Status | None = None) -> Path:
    """Train, or resume the run in `config.out`.

    Args:
        config: the run's options; `phase`, `data` and `batch` have no useful defaults.
        command: the words of the command line, which the run records.
        status: shows what goes on; by default only the log does.

    Returns:
        The run's folder, with checkpoints, samples, logs and a report in it.

    Raises:
        UserError: an option or a file is wrong, before any weight has changed; or the disk or the
            card is full, or another process of the run ended: the last checkpoint stays.

    """
    with (
        open_session(config, command, status or Status()) as session,
        StopSignal(STOPPING if session.main else "", raises=True) as stop,
        session.events,
        _tracked(session),
    ):
        folder = session.run.folder
        try:
            if not config.dry_run:
                with writing(session.run), session.events.report_of_failure():
                    _train(session, stop)
                log_results(session, stop)
        except (Lost, RuntimeError) as error:
            if is_full(error):
                raise UserError(
                    f"out of memory with {session.take_step.plan}, and no memory plan takes less; "
                    f"the last checkpoint is complete: lower --batch, or close other programs on "
                    f"the GPU"
                ) from error
            if not session.processes.lost(error):
                raise
            raise UserError(
                f"another process of this run has ended ({str(error).partition(chr(10))[0]}); the "
                f"last complete checkpoint is {session.run.checkpoint}: resume with the same "
                f"command and --out {folder}"
            ) from error
        session.processes.close()
        return folder


def _tracked(session: Session) -> AbstractContextManager[None]:
    """Log the run to W&B, if asked to."""
    config, run = session.config, session.run
    if config.log_with == "wandb" and session.main and not config.dry_run:
        return following(run.folder, run.state()["step"])
    return nullcontext()


def _train(session: Session, stop: StopSignal) -> None:
    config, run, accum = session.config, session.run, session.config.accum
    state = run.state()  # of the newest checkpoint; step 0 for a new run
    done, last = state["step"], config.last_step(session.planned_steps)
    session.status.begin(config, done, last, session.events)
    due = Due.before_first(session, done, last)
    if not _pause(session, stop, due, done, state["images_seen"]):
        return
    pace = Pace(last, session.ceiling, config.precision)
    watches = PlateauWatch.of_run(config, run.folder / METRICS_LOG), pace, FailureWatch()
    loader = Loader(session.source, done * accum, last * accum, session.accelerator.device)
    with closing(loader):
        batches, meter = iter(loader), Meter(state["smoothed"])

        session.status.refresh_report()
        meter.begin()
        for step in range(done + 1, last + 1):
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
                "epoch": images_seen / session.batch_order.samples_an_epoch,
                **rates(session.take_step.optimizer),
                "wait_s": loader.wait_s - waited,
            }
            images = sum(batch.images for batch in micro)
            _log(session, watches, meter.add(line, images, loss, norm))
            if session.main:
                log_epochs(session.source, micro)

            due = Due.after(session, stop, step, last)
            if due.pauses:
                _log(session, watches, meter.flush())  # raises if its loss is not finite
            if not _pause(session, stop, due, step, images_seen):
                due = Due(saves=True, ends=True)
            if due.saves:
                state = {
                    "step": step,
                    "images_seen": images_seen,
                    "smoothed": meter.smoothed,
                    "phase": config.phase,
                    "plan": session.take_step.plan[:3],  # see record.py
                }
                _save(session, state)  # last: the step's samples and losses are on the disk before
            if due.ends:
                if session.main and step == session.planned_steps:
                    run.complete(step)
                break
            if due.pauses:
                session.status.refresh_report()
                meter.begin()


def _log(session: Session, watches: Watches, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        line["peak_gib"] = peak_gib(session.accelerator.device)
        if session.main:
            session.run.log(line)
        require_finite(line, session.run.folder)
        if session.main:
            for watch in watches:
                watch.see(line)
        session.status.trained(line)


def _pause(session: Session, stop: StopSignal, due: Due, step: int, images_seen: int) -> bool:
    """Sample and validate if due; False if a signal interrupted it."""

    def stopped() -> bool:
        return stop.asked > 0

    return not (
        (due.samples and not _sample(session, step, stopped))
        or (due.validates and not _validate(session, step, images_seen, stopped))
    )


def _sample(session: Session, step: int, stopped: Callable[[], bool]) -> bool:
    folder = session.run.folder
    with session.status.during("sampling") as progress:
        grid = session.sampler(
            session.model, folder, step, session.accelerator, session.processes, stopped, progress
        )
    if grid is not None:
        if session.main:
            session.run.log_samples(step, session.sampler.prompts)
        session.status.sampled(folder, step)
    return grid is not None


def _validate(session: Session, step: int, images_seen: int, stopped: Callable[[], bool]) -> bool:
    """Measure the validation losses of the weights and of their averages."""
    assert session.validator is not None
    averages = session.ema.contexts() if session.ema else {}
    weights: dict[str, AbstractContextManager[Any]] = {LIVE: nullcontext(), **averages}
    with session.status.during("validating") as progress:
        losses = session.validator(session.take_step, weights, session.processes, stopped, progress)
        if losses is not None and session.main:
            lines = session.run.log_validation(step, images_seen, losses)
            session.status.validated(session.run.folder, lines)
    return losses is not None


def _save(session: Session, state: dict[str, Any]) -> None:
    run, step = session.run, session.take_step
    with session.status.during("saving"):
        if session.main:
            run.sync()
            saved = save_checkpoint(
                run.folder, session.model, session.named, step.optimizer, state, session.ema
            )
            if session.ema:
                most = session.config.ema_snapshots or 0
                keep_snapshots(run.folder, checkpoints(run.folder), most)
            best = best_of(run.folder, map(step_of, checkpoints(run.folder)))
            prune(run.folder, session.config.keep, best.best[0] if best else None)
            session.status.saved(state["step"], saved)
        session.processes.wait()
