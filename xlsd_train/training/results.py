"""What a run has made, and the commands that use it, at its end."""

import logging
import shlex

from xlsd_cache.runtime.signals import StopSignal
from xlsd_train.report.page import leave_report
from xlsd_train.runs.layout import REPORT, checkpoints, grid_of, step_of
from xlsd_train.runs.validation_log import describe_checkpoints
from xlsd_train.training.session import Session

log = logging.getLogger("xlsd.train.training")


def log_results(session: Session, stop: StopSignal) -> None:
    """Log them, write the report, and tell whether the run is done or stopped."""
    if not session.main:
        return
    run, planned = session.run, session.planned_steps
    step = run.state()["step"]
    log.info(f"step {step} of {planned}; checkpoint {run.checkpoint}")
    if session.config.sample_every:
        log.info(f"samples {grid_of(run.folder)}")
    if verdict := describe_checkpoints(run.folder, list(map(step_of, checkpoints(run.folder)))):
        log.info(verdict)
    if not stop.hurries:
        session.status.doing("writing the report")
        why = leave_report(run.folder, ended=True)
        again = f"all else is saved. `xlsd-train report {run.folder}` writes it"
        log.info(f"no report: {why}; {again}" if why else f"report {run.folder / REPORT}")
    stopped = bool(stop.asked) or step < planned
    session.status.ended("stopped" if stopped else "done", step, planned, run.checkpoint)
    if stopped:
        log.info(f"to resume bit-exactly, use the same command with --out {run.folder}")
    else:
        folder = shlex.quote(str(run.folder))
        model = shlex.quote(f"{run.folder.name}.safetensors")
        log.info("next:")
        log.info(f"  xlsd-train sample {folder} --prompts prompts.txt")
        log.info(f"  xlsd-train export {folder} {model} --format single-file")
