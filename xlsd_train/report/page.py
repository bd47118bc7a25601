"""`xlsd-train report`: one self-contained HTML page about one or several runs.

Plotly's JavaScript is inlined once; the page's content security policy forbids any download.
"""

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_bytes
from xlsd_cache.runtime.own_files import GENERATOR, is_page, refuse_foreign
from xlsd_train.config.run_options import ReportConfig
from xlsd_train.report.charts import charts
from xlsd_train.report.ranking import HEADER, rank
from xlsd_train.report.tables import facts, settings_table
from xlsd_train.runs.downsample import evenly
from xlsd_train.runs.history import History, histories

log = logging.getLogger("xlsd.train.report")

NAME = "report.html"
STEPS, PROMPTS = 10, 8  # of samples shown, at most
PICTURE = 64 << 20  # bytes of one image: 4096 x 4096 pixels of noise; larger ones are left out
PICTURES = 24 << 20  # bytes of all images; beyond, fewer steps are shown, but at least two
PAGE = (
    """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
"""
    + GENERATOR
    + """
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ runs | map(attribute="name") | join(" | ") }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 1rem 1.5rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
thead th, tr.differs th { border-bottom: 1px solid #bbb; }
tr.differs { background: #fff4d6; }
td { max-width: 44rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.samples th:first-child { white-space: nowrap; }
.samples td { padding: 2px; max-width: 16rem; }
.samples th { max-width: 16rem; font-weight: normal; overflow-wrap: anywhere; }
.samples img { display: block; max-width: 16rem; }
.answer { font-size: 1.1rem; }
small, .note { color: #666; font-size: .85rem; }
</style>
</head>
<body>
<h1>{{ runs | map(attribute="name") | join(", ") }}</h1>
{%- if standings %}
<h2>Comparison</h2>
<p class="answer" id="answer">{{ answer }}</p>
<div class="scroll"><table id="standings">
<thead><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr></thead>
{%- for standing in standings %}
<tr>{% for cell in standing.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table></div>
{%- endif %}
<h2>Settings</h2>
{%- macro rows(table) %}
{%- for row in table %}
<tr{% if row.differs %} class="differs"{% endif %}><th>{{ row.name }}</th>
{%- for value in row.values %}<td>{{ value }}</td>{% endfor %}</tr>
{%- endfor %}
{%- endmacro %}
{%- macro head() %}
<thead><tr><th></th>{% for run in runs %}<th>{{ run.name }}</th>{% endfor %}</tr></thead>
{%- endmacro %}
<div class="scroll"><table id="settings">{{ head() }}{{ rows(settings[0]) }}</table></div>
<div class="scroll"><table id="facts">{{ head() }}{{ rows(facts) }}</table></div>
<details><summary>All other settings</summary>
<div class="scroll"><table id="others">{{ head() }}{{ rows(settings[1]) }}</table></div>
</details>
{%- for chart in charts %}
<h2>{{ chart.title }}</h2>
{%- if chart.note %}
<p class="note">{{ chart.note }}</p>
{%- endif %}
<div class="chart"></div>
{%- endfor %}
{%- if samples.rows %}
<h2>Samples</h2>
<p class="note">{{ samples.note }}</p>
<div class="scroll"><table class="samples">
<thead><tr><th>step</th>
{%- for run, prompt in samples.columns %}<th>
{%- if runs | length > 1 %}<b>{{ run }}</b><br>{% endif %}{{ prompt or "(no prompt)" }}</th>
{%- endfor %}</tr></thead>
{%- for step, pictures in samples.rows %}
<tr><th>{{ step }}</th>
{%- for picture in pictures %}<td>
{%- if picture %}<img src="{{ picture }}" loading="lazy" \
alt="step {{ step }}: {{ samples.columns[loop.index0][1] }}">{% endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</table></div>
{%- endif %}
<p class="note">Made by xlsd-train report. Use the wheel or drag to zoom a chart, double-click to
reset it. Click a name in the legend to hide or show its curve.</p>
<script>{{ plotly }}</script>
<script>
const charts = {{ charts | map(attribute="figure") | list | tojson }};
document.querySelectorAll(".chart").forEach((place, i) => {
  const layout = {
    height: 380, margin: {l: 70, r: 20, t: 40, b: 45}, legend: {orientation: "h", y: -0.22},
    hovermode: "closest", showlegend: true, ...charts[i].layout,
  };
  Plotly.newPlot(place, charts[i].data, layout, {responsive: true, displaylogo: false});
});
</script>
</body>
</html>
"""
)


@dataclass(frozen=True)
class SampleTable:
    """Sample images: steps down, prompts across, the runs side by side within each prompt."""

    columns: list[tuple[str, str]]  # run, prompt
    rows: list[tuple[int, list[str | None]]]  # step, a data URI for each column
    note: str


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


def write_page(runs: list[History], path: Path) -> Path:
    """Write the page of these runs, under their names; return its path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, page(runs).encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; give another file with --out") from error
    return path


def leave_report(folder: Path) -> str:
    """Write the page of a run that ends; return a log line. A failure does not fail the run."""
    try:
        return f"report {write_report([folder])}"
    except Exception as error:
        return f"no report: {error!r}; all else is saved. `xlsd-train report {folder}` writes it"


def page(runs: list[History]) -> str:
    """The HTML; all text is escaped. The same runs give the same page."""
    environment = Environment(undefined=StrictUndefined, autoescape=True)
    standings, answer = rank(runs) if len(runs) > 1 else ([], "")
    return environment.from_string(PAGE).render(
        runs=runs,
        standings=standings,
        answer=answer,
        header=HEADER,
        settings=settings_table(runs),
        facts=facts(runs),
        charts=charts(runs),
        samples=choose_samples(runs),
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - the library's own text, made to be inlined
    )


def choose_samples(runs: list[History]) -> SampleTable:
    """The first PROMPTS prompts at up to STEPS evenly spaced steps, with the first and the last."""
    steps = sorted({step for run in runs for step in run.samples})
    prompts = max((len(paths) for run in runs for paths in run.samples.values()), default=0)
    columns = [(run, i) for i in range(min(prompts, PROMPTS)) for run in runs if run.samples]
    files = {step: [_picture(run, step, i) for run, i in columns] for step in steps}
    size = sum(_nbytes(path) for paths in files.values() for path in paths if path)
    most = max(2, min(STEPS, PICTURES * len(steps) // max(1, size)))
    chosen = [steps[i] for i in evenly(len(steps), most)]
    notes = [
        f"{len(chosen)} of {len(steps)} steps, evenly spaced" if len(chosen) < len(steps) else "",
        f"the first {PROMPTS} of {prompts} prompts" if prompts > PROMPTS else "",
    ]
    return SampleTable(
        [(run.name, _prompt(run, i)) for run, i in columns],
        [(step, [data_uri(path) if path else None for path in files[step]]) for step in chosen],
        "; ".join(note for note in notes if note),
    )


def _picture(run: History, step: int, prompt: int) -> Path | None:
    paths = {path.stem: path for path in run.samples.get(step, ())}
    path = paths.get(f"{prompt:02d}")
    return path if path and _nbytes(path) <= PICTURE else None


def _nbytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _prompt(run: History, i: int) -> str:
    prompts = run.record.prompts
    return str(prompts[i]) if i < len(prompts) else ""


def data_uri(path: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
