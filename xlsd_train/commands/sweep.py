"""`xlsd-train sweep`: trains at several learning rates, one after another, and compares them.

Each run is a process of its own, `xlsd-train run` with the sweep's command line: its memory is free
when it ends, and a crash does not affect the others. OUT/lr-5e-06, one per rate, are ordinary runs;
resuming depends on them alone.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from xlsd_cache.console.progress import event, writes_events
from xlsd_cache.console.terminal import say
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.own_files import is_page, refuse_foreign
from xlsd_cache.runtime.signals import StopSignal
from xlsd_train.checkpoints.resume import changes, differing, plan_options
from xlsd_train.config.recipes import options_in, without
from xlsd_train.config.run_options import SweepConfig
from xlsd_train.config.train import TrainConfig
from xlsd_train.progress.events import Events
from xlsd_train.report.page import NAME, write_page
from xlsd_train.report.ranking import Standing, rank, table
from xlsd_train.runs.history import histories
from xlsd_train.runs.layout import CONFIG, checkpoints, step_of
from xlsd_train.runs.links import refuse_link
from xlsd_train.runs.record import read_record, read_state

log = logging.getLogger("xlsd.train.commands")

POLL_S = 0.2


def sweep(config: SweepConfig, words: Sequence[str]) -> None:
    """Run or resume every rate; `words` are the command line after `sweep`.

    Raises UserError before anything runs if the options do not fit a run that exists, and after
    the comparison if a run failed.
    """
    runs = config.runs("validate_every" in options_in(words))
    _check(runs)
    out, each = next((folder.parent, run.validate_every) for folder, run in runs.items())
    refuse_foreign(out / NAME, (".html",), is_page)
    if each and not config.validate_every:
        log.info(f"validating every {each} steps, to compare; change it with --validate-every")
    given, failed = without(words, "lr", "out", "validate_every"), []
    with StopSignal() as stop:
        for number, (folder, asked) in enumerate(runs.items(), start=1):
            if _finished(folder, asked):
                log.info(f"--lr {asked.lr}: {folder} is finished")
                continue
            log.info(f"--lr {asked.lr}: run {number} of {len(runs)}, {folder}")
            own = {"lr": asked.lr, "out": folder, "validate-every": asked.validate_every}
            options = [word for name, value in own.items() for word in (f"--{name}", str(value))]
            code = _wait(start([*given, *options]), stop)
            given = without(given, "remeasure")  # the other runs take what the first measured
            if stop.asked:
                log.info(f"to resume bit-exactly, use the same command with --out {out}")
                return
            if asked.dry_run:
                log.info("the other runs differ only in --lr")
                return
            if code:
                log.warning(f"--lr {asked.lr}: failed with exit code {code}; the others continue")
                failed.append(folder)
    answer = _conclude(runs, failed, out)
    if answer:
        with Events(out, config.on_event) as events:
            events.tell("compared", 0, answer, out / NAME)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, with the errors above: "
            f"{', '.join(map(str, failed))}; use the same command with --out {out} to retry"
        )


def start(words: list[str]) -> "subprocess.Popen[bytes]":
    """Start `xlsd-train run`; it writes to this process's terminal."""
    return subprocess.Popen([sys.executable, "-m", "xlsd_train", "run", *words])  # noqa: S603


def _wait(process: "subprocess.Popen[bytes]", stop: StopSignal) -> int:
    """Wait until the run ends; after a signal to this process it ends at its next step.

    Ctrl-C and a closed terminal reach both processes; `kill` only this one, which forwards it.
    """
    forwarded = False
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_S)
            if stop.asked and not forwarded and os.name == "posix":  # elsewhere it would kill
                process.terminate()
                forwarded = True
    except KeyboardInterrupt:  # the second Ctrl-C
        process.kill()
        process.wait()
        raise


def _check(runs: dict[Path, TrainConfig]) -> None:
    """Raises UserError if a folder's run has other options than are given now."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "sweep starts one process per run; start it without a launcher such as torchrun"
        )
    for folder, asked in runs.items():
        refuse_link(folder)
        if not (folder / CONFIG).exists():
            continue
        wanted = json.loads(json.dumps(asked.to_json(), default=os.fspath))
        record, saved = read_record(folder), checkpoints(folder)
        used = [record.plan, *(read_state(path).get("plan", record.plan) for path in saved[-1:])]
        before = record.asked() | plan_options(wanted, used)
        # A run itself checks what needs its store and model.
        differ = differing(before, wanted)
        if differ and not asked.force:
            raise UserError(
                f"{folder} was started with {changes(differ, wanted)}; use the same, or another "
                f"--out"
            )


def _finished(folder: Path, asked: TrainConfig) -> bool:
    """Whether the newest checkpoint is of the run's last step."""
    saved = checkpoints(folder)
    if not saved:
        return False
    record = read_record(folder)
    planned = record.planned_steps or 2**62
    if any(record.config.get(x) != getattr(asked, x) for x in ("steps", "epochs")):
        planned = asked.steps or 2**62  # the length is changed
    return step_of(saved[-1]) >= asked.last_step(planned)


def _conclude(runs: dict[Path, TrainConfig], failed: list[Path], out: Path) -> str:
    """Print the table and the answer and write the page, of all runs that started."""
    started = [folder for folder in runs if (folder / CONFIG).exists()]
    if not started:
        return ""
    named = []
    for run in histories(started):
        asked = runs[run.folder]
        state = "" if _finished(run.folder, asked) else ", unfinished"
        state = ", failed" if run.folder in failed else state
        named.append(replace(run, name=f"--lr {asked.lr}{state}"))
    standings, answer = rank(named)
    answer += rate_hint(standings)
    if writes_events():
        event("compared", answer=answer)
    else:
        for line in [*table(standings).splitlines(), answer]:
            say(line)
    log.info(f"report {write_page(named, out / NAME, ended=True)}")
    return answer


def rate_hint(standings: list[Standing]) -> str:
    """A remark if the best rate is the lowest or highest tried and no other is tied; else empty."""
    if any(run.best is None or run.tied for run in standings):
        return ""
    best = next(run for run in standings if run.excess is None)
    rates = [run.rate for run in standings if run.rate is not None]
    for end, side in ((min, "lowest rate tried: a lower"), (max, "highest rate tried: a higher")):
        if best.best and best.best[0] and best.rate == end(rates):
            return f"; it is the {side} one may be better"
    return ""
