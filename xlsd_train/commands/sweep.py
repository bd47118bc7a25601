"""`xlsd-train sweep`: the same run at several rates, one after another, and which rate to take.

Each run is a process of its own, `xlsd-train run` with the sweep's own words: its memory is free
when it ends, and its crash is not the others'. DIR/lr-5e-06, one a rate, are ordinary runs; what
goes on, and from where, follows from them alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from xlsd_cache.console.terminal import say
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.own_files import is_page, refuse_foreign
from xlsd_cache.runtime.signals import StopSignal
from xlsd_train.checkpoints.resume import changes, differing
from xlsd_train.config.recipes import options_in, without
from xlsd_train.config.run_options import SweepConfig
from xlsd_train.config.train import TrainConfig
from xlsd_train.report.page import NAME, write_page
from xlsd_train.report.ranking import Standing, rank, table
from xlsd_train.runs.history import histories
from xlsd_train.runs.layout import CONFIG, checkpoints, step_of
from xlsd_train.runs.links import refuse_link
from xlsd_train.runs.record import read_record

POLL_S = 0.2


def sweep(config: SweepConfig, words: Sequence[str]) -> None:
    """Run or resume every rate; `words` are those after `sweep` on the command line.

    Raises UserError before anything runs if a run cannot be as asked, and at the end, after the
    comparison, if a run failed.
    """
    runs = config.runs("validate_every" in options_in(words))
    _check(runs)
    out, each = next((folder.parent, run.validate_every) for folder, run in runs.items())
    refuse_foreign(out / NAME, (".html",), is_page)
    if each and not config.validate_every:
        print(f"validating every {each} steps, to compare by; --validate-every chooses, 0 for none")
    given, failed = without(words, "lr", "out", "validate_every"), []
    with StopSignal() as stop:
        for number, (folder, asked) in enumerate(runs.items(), start=1):
            if _finished(folder, asked):
                say(f"--lr {asked.lr}: {folder} is finished")
                continue
            say(f"--lr {asked.lr}: run {number} of {len(runs)}, {folder}")
            sys.stdout.flush()  # before the run's own text
            own = {"lr": asked.lr, "out": folder, "validate-every": asked.validate_every}
            options = [word for name, value in own.items() for word in (f"--{name}", str(value))]
            code = _wait(start([*given, *options]), stop)
            if stop.asked:
                say(f"to go on from here, to the bit: the same command with --out {out}")
                return
            if asked.dry_run:
                print("the others are the same but for --lr")
                return
            if code:
                print(f"--lr {asked.lr}: failed with exit code {code}; the others go on")
                failed.append(folder)
    _conclude(runs, failed, out)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, as said above: "
            f"{', '.join(map(str, failed))}; the same command with --out {out} tries them again"
        )


def start(words: list[str]) -> "subprocess.Popen[bytes]":
    """A process of `xlsd-train run`, which writes to this one's terminal."""
    return subprocess.Popen([sys.executable, "-m", "xlsd_train", "run", *words])  # noqa: S603


def _wait(process: "subprocess.Popen[bytes]", stop: StopSignal) -> int:
    """Until the run ends, which a signal to this process makes it do at its next step.

    Ctrl-C and a closed terminal reach both; `kill` this one alone, and so it is handed on.
    """
    handed_on = False
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_S)
            if stop.asked and not handed_on and os.name == "posix":  # elsewhere it would kill
                process.terminate()
                handed_on = True
    except KeyboardInterrupt:  # the second Ctrl-C
        process.kill()
        process.wait()
        raise


def _check(runs: dict[Path, TrainConfig]) -> None:
    """Refuse what would fail late: each run that is there must be the one that is asked for."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "sweep starts processes of its own and is itself one; start it without a launcher"
        )
    for folder, asked in runs.items():
        refuse_link(folder)
        if not (folder / CONFIG).exists():
            continue
        before = read_record(folder).asked()
        wanted = json.loads(json.dumps(asked.to_json(), default=os.fspath))
        # What a run can tell only with its store and model open, it tells itself.
        differ = differing(before, wanted)
        if differ and not asked.force:
            raise UserError(
                f"{folder} was started with {changes(differ, wanted)}; use the same, or another "
                f"--out"
            )


def _finished(folder: Path, asked: TrainConfig) -> bool:
    """Whether its newest checkpoint is where it was to end."""
    found = checkpoints(folder)
    if not found:
        return False
    record = read_record(folder)
    planned = record.planned_steps or 2**62
    if any(record.config.get(x) != getattr(asked, x) for x in ("steps", "epochs")):
        planned = asked.steps or 2**62  # longer or shorter than it was: the run knows
    return step_of(found[-1]) >= min(planned, asked.stop_after or planned)


def _conclude(runs: dict[Path, TrainConfig], failed: list[Path], out: Path) -> None:
    """The table, the answer and the page, of all that began."""
    begun = [folder for folder in runs if (folder / CONFIG).exists()]
    if not begun:
        return
    named = []
    for run in histories(begun):
        asked = runs[run.folder]
        state = "" if _finished(run.folder, asked) else ", unfinished"
        state = ", failed" if run.folder in failed else state
        named.append(replace(run, name=f"--lr {asked.lr}{state}"))
    standings, answer = rank(named)
    for line in table(standings).splitlines():
        say(line)
    say(answer + _beyond(standings))
    say(f"report {write_page(named, out / NAME)}")


def _beyond(standings: list[Standing]) -> str:
    """Where the best rate is told apart from its only neighbour, the next one may be better yet."""
    if any(it.loss is None or (it.beyond and it.beyond.low <= 0) for it in standings):
        return ""
    rates = {it.name: float(it.name.split()[1].rstrip(",")) for it in standings}
    best = next(it for it in standings if it.beyond is None)
    for end, side in ((min, "lowest rate tried: a lower"), (max, "highest rate tried: a higher")):
        if best.best and best.best[0] and end(rates, key=rates.__getitem__) == best.name:
            return f"; it is the {side} one may do better"
    return ""
