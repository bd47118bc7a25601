"""`xlsd-train report`: one self-contained HTML page about one or several runs."""

import logging
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from xlsd_cache.pages.render import render
from xlsd_cache.runtime.atomic import write_bytes
from xlsd_cache.runtime.own_files import is_page, refuse_foreign, writing
from xlsd_train.config.run_options import ReportConfig
from xlsd_train.report.changes import bands, by_rate, scale
from xlsd_train.report.curves import axes, charts
from xlsd_train.report.pace import is_going
from xlsd_train.report.pictures import Timeline, served, timeline
from xlsd_train.report.ranking import HEADER, rank
from xlsd_train.report.summary import next_of_several, summary
from xlsd_train.report.tables import facts, left_out, settings_table
from xlsd_train.report.trend import diverged, shown_validations, trend
from xlsd_train.runs.bootstrap import Interval
from xlsd_train.runs.history import History, histories
from xlsd_train.runs.validation_log import HELD_OUT, LIVE

log = logging.getLogger("xlsd.train.report")

NAME = "report.html"
ABREAST = 4  # prompts of one run, or runs, on the first screen


def report(config: ReportConfig) -> Path:
    """Write the page of `config.runs`; return its path. Errors are those of `write_report`."""
    path = write_report(config.runs, config.out)
    log.info(f"report {path}")
    return path


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about one or several runs.

    Args:
        runs: folders of runs, finished or still training.
        out: the page; by default RUN/report.html for one run, report.html for several.

    Returns:
        The page's path. A page that this function wrote is replaced.

    Raises:
        UserError: a folder is no run, or `out` is another file.

    """
    folders = [Path(run) for run in runs]
    path = Path(out or (folders[0] / NAME if len(folders) == 1 else NAME))
    refuse_foreign(path, (".html",), is_page)
    return write_page(histories(folders), path)


def write_page(runs: list[History], path: Path, ended: bool = False) -> Path:
    """Write the page of these runs, under their names; return its path.

    `ended`: no run goes on, whenever its last step was.
    """
    html = page(runs, path, ended=ended)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, html.encode())
    return path


def leave_report(folder: Path, ended: bool) -> str | None:
    """Write a run's page into its folder; return why that failed, which does not fail the run."""
    path = folder / NAME
    try:
        refuse_foreign(path, (".html",), is_page)
        write_page(histories([folder]), path, ended)
    except Exception as error:
        return repr(error)
    return None


def page(
    runs: list[History], path: Path, live: dict[str, Any] | None = None, ended: bool = False
) -> str:
    """The HTML of a page at this path; all text is escaped.

    The same runs give the same page, but for the next command while one goes on. With `live` for
    its script, it is that of a server: it fetches pictures and follows the runs.
    """
    one = runs[0] if len(runs) == 1 else None
    standings, answer = ([], "") if one else rank(runs)
    trends, ends = [trend(run) for run in runs], [diverged(run) for run in runs]
    going = [not ended and is_going(run) for run in runs]
    samples, drawn = served(runs) if live else timeline(runs, path), charts(runs)
    lacks = [(run.name, text) for run in runs for text in left_out(run)]
    for name, text in [] if live else lacks:
        log.warning(f"{name}: left out of the report: {text}")
    settings = settings_table(runs)
    return render(
        __package__,
        "report.html",
        runs=runs,
        one=summary(one, trends[0], going[0]) if one else None,
        trends=trends,
        diverged=ends,
        left_out=lacks,
        held_out=len(runs[0].record.validation.get(HELD_OUT, ())),
        standings=standings,
        answer=answer,
        then=None if one else next_of_several(standings, runs, going),
        header=HEADER,
        scale=scale(standings),
        rates=by_rate(standings),
        settings=settings,
        differs=[row for row in settings[0] if row.differs],
        facts=facts(runs),
        charts=drawn,
        validations=_validations(runs),
        bands=bands(trends),
        samples=samples,
        live=live,
        hero=hero(runs, samples),
        data={
            "runs": [run.name for run in runs],
            "axes": [axes(run) for run in runs],
            "charts": [chart.data for chart in drawn],
            "samples": samples.data,
            "live": live,
        },
    )


def hero(runs: Sequence[History], samples: Timeline) -> list[tuple[str, list[tuple[str, str]]]]:
    """Prompt -> (label, picture): the first sample, and the newest of each run."""
    if len(runs) == 1:
        return [
            (prompt, [(f"step {step:,}", uri) for step, uri in shown])
            for prompt, shown in samples.first_and_newest(0)[:ABREAST]
        ]
    drawn = [
        (j, i, prompt, shown)
        for i in range(min(ABREAST, len(runs)))
        for j, (prompt, shown) in enumerate(samples.first_and_newest(i))
    ]
    found: dict[str, dict[int, list[tuple[int, str]]]] = {}
    for _, i, prompt, shown in sorted(drawn, key=itemgetter(0, 1)):
        found.setdefault(prompt, {}).setdefault(i, shown)
    # The prompts that most of the runs have.
    chosen = sorted(found.items(), key=lambda it: -len(it[1]))[:2]
    return [
        (
            prompt,
            [
                (f"{runs[i].name}, step {step:,}", uri)
                for n, (i, shown) in enumerate(by_run.items())
                for step, uri in shown[-1 if n else 0 :]
            ],
        )
        for prompt, by_run in chosen
    ]


def _validations(runs: Sequence[History]) -> tuple[list[str], list[list[str]]] | None:
    """Held-out losses with intervals: names, and a row for each step."""
    of = [
        {line["step"]: str(Interval(**{x: line[HELD_OUT][x] for x in Interval._fields}))
         for line in shown_validations(run, LIVE)}
        for run in runs
    ]  # fmt: skip
    steps = sorted(set().union(*of))
    rows = [[str(step), *(column.get(step, "") for column in of)] for step in steps]
    return ([run.name for run in runs], rows) if rows else None
