"""Runs as charts, several side by side in one: what plotly draws, as plain lists and numbers.

All points are those of the logs. What plotly shows as text is its own small HTML, so that names are
escaped for it here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from xlsd_train.runs.downsample import Series, evenly
from xlsd_train.runs.history import History
from xlsd_train.runs.metrics import METRICS
from xlsd_train.runs.validation_log import BANDS, HELD_OUT, SETS

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#7f7f7f",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # Okabe and Ito's, told apart by the colour-blind too
MEASURED = 200  # validations of a run that are drawn
DASHES = ("solid", "dash", "dashdot")  # weights: live, then averages
Trace = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    title: str
    note: str
    figure: dict[str, Any]  # plotly's data and layout


def charts(runs: Sequence[History]) -> list[Chart]:
    """Those that there is anything to draw in, in the order of the page."""
    made = [
        _metric_chart(runs, "loss", _loss, log=True),
        _metric_chart(runs, "lr", _rates, log=True, rangemode="tozero"),
        _metric_chart(runs, "d", partial(_mean, number="d"), log=True),
        _chart(runs, "Validation loss", _validation, "unweighted loss"),
        _chart(runs, "Gap: held-out loss less training images' loss", _gap, "gap"),
        _bands(runs),
        *(
            _metric_chart(runs, name, partial(traces, number=name), rangemode="tozero")
            for name, traces in (("images_per_s", _spread), ("wait_s", _mean), ("peak_gib", _mean))
        ),
        _metric_chart(runs, "grad_norm", partial(_spread, number="grad_norm"), log=True),
    ]
    return [chart for chart in made if chart.figure["data"]]


def drawn(validation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of some steps where there are many: the first, the last and the best among them."""
    steps = list(dict.fromkeys(line["step"] for line in validation))
    chosen = {steps[i] for i in evenly(len(steps), MEASURED - 1)}
    if validation:
        chosen.add(min(validation, key=lambda line: line[HELD_OUT]["mean"])["step"])
    return [line for line in validation if line["step"] in chosen]


def _metric_chart(
    runs: Sequence[History],
    name: str,
    traces: Callable[[History, str], list[Trace]],
    **options: Any,
) -> Chart:
    return _chart(runs, METRICS[name].chart, traces, METRICS[name].unit, **options)


def _chart(
    runs: Sequence[History],
    title: str,
    traces: Callable[[History, str], list[Trace]],
    unit: str,
    log: bool = False,
    rangemode: str = "normal",
) -> Chart:
    data = [trace for i, run in enumerate(runs) for trace in traces(run, COLOURS[i % len(COLOURS)])]
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": unit}, "exponentformat": "e", "rangemode": rangemode},
    }
    if log:
        layout["updatemenus"] = [_linear_or_log()]
    return Chart(title, _note(runs, data), {"data": data, "layout": layout})


def _note(runs: Sequence[History], data: list[Trace]) -> str:
    """What was left out to draw it."""
    if any("error_y" in trace for trace in data):
        many = max(len({line["step"] for line in run.validation}) for run in runs)
        some = f"; of {many} validations some are drawn, evenly, and the best" * (many > MEASURED)
        return f"mean and 95% interval of it{some}"
    every = {run.series["loss"].every for run in runs if "loss" in run.series}
    if not every or max(every) == 1:
        return ""
    return (
        f"a point is the mean of up to {max(every)} steps, at their middle; shaded: from the "
        f"least to the most of them"
    )


def _loss(run: History, colour: str) -> list[Trace]:
    if "loss" not in run.series:
        return []
    smoothed = _line(run, run.series["loss_smoothed"], "smoothed", colour, width=2)
    raw = _line(run, run.series["loss"], "raw", colour, width=1, opacity=0.35)
    return [*_shade(run.series["loss"], colour), raw, smoothed]


def _rates(run: History, colour: str) -> list[Trace]:
    """The rate asked for only where another one comes of it."""
    if "lr" not in run.series:
        return []
    asked, effective = run.series["lr"], run.series["lr_effective"]
    traces = [_line(run, effective, "effective", colour, width=2)]
    return traces + [_line(run, asked, "lr", colour, dash="dot")] * (asked != effective)


def _mean(run: History, colour: str, number: str) -> list[Trace]:
    found = run.series.get(number)
    return [_line(run, found, "", colour)] if found else []


def _spread(run: History, colour: str, number: str) -> list[Trace]:
    found = run.series.get(number)
    return [*_shade(found, colour), _line(run, found, "", colour)] if found else []


def _validation(run: History, colour: str) -> list[Trace]:
    return [_intervals(run, weights, which, colour) for weights in _weights(run) for which in SETS]


def _gap(run: History, colour: str) -> list[Trace]:
    return [_intervals(run, weights, "gap", colour) for weights in _weights(run)]


def _bands(runs: Sequence[History]) -> Chart:
    """A small chart for each band of timesteps; those of averages wait in the legend."""
    data, titles = [], []
    for band in range(BANDS):
        axis = str(band + 1) if band else ""
        for i, run in enumerate(runs):
            for weights in _weights(run):
                for which in SETS:
                    trace = _intervals(run, weights, which, COLOURS[i % len(COLOURS)], band)
                    shown = True if weights == "live" else "legendonly"
                    told = {"legendgroup": trace["name"], "showlegend": not band, "visible": shown}
                    data.append({**trace, **told, "xaxis": f"x{axis}", "yaxis": f"y{axis}"})
        percent = 100 // BANDS
        titles.append({
            "text": f"timesteps {band * percent} to {(band + 1) * percent}%", "showarrow": False,
            "x": 0.5, "y": 1.0, "yanchor": "bottom", "font": {"size": 11},
            "xref": f"x{axis} domain", "yref": f"y{axis} domain",
        })  # fmt: skip
    layout = {
        "grid": {"rows": 2, "columns": BANDS // 2, "pattern": "independent", "ygap": 0.3},
        "annotations": titles,
        "height": 560,
    }
    title = "Validation loss by timestep, from least noise to most"
    return Chart(title, _note(runs, data), {"data": data, "layout": layout})


def _weights(run: History) -> list[str]:
    """Live first."""
    return list(dict.fromkeys(line["weights"] for line in run.validation))


def _intervals(
    run: History, weights: str, which: str, colour: str, band: int | None = None
) -> Trace:
    """Means over the steps with their intervals, whose ends are also in `customdata`."""
    lines = [line for line in drawn(run.validation) if line["weights"] == weights]
    told = [line[which] if band is None else line[which]["bands"][band] for line in lines]
    dash = DASHES[min(_weights(run).index(weights), len(DASHES) - 1)]
    of = which.replace("_", "-") + (f" {weights}" if weights != "live" else "")
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(f"{run.name} {of}"),
        "x": [line["step"] for line in lines],
        "y": [it["mean"] for it in told],
        "customdata": [[it["low"], it["high"]] for it in told],
        "error_y": {
            "type": "data", "symmetric": False, "thickness": 1, "width": 2,
            "array": [it["high"] - it["mean"] for it in told],
            "arrayminus": [it["mean"] - it["low"] for it in told],
        },
        "hovertemplate": "step %{x}: %{y:.5f} (%{customdata[0]:.5f} to %{customdata[1]:.5f})",
        "opacity": 1.0 if which != "training" else 0.5,
        "line": {"color": colour, "dash": dash if which != "training" else "dot", "width": 1.5},
        "marker": {"size": 4, "color": colour},
    }  # fmt: skip


def _line(
    run: History,
    found: Series,
    which: str,
    colour: str,
    width: float = 1.5,
    opacity: float = 1.0,
    dash: str = "solid",
) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines" if len(found.steps) > 1 else "markers",
        "name": escape(f"{run.name} {which}".strip()),
        "x": found.steps,
        "y": found.mean,
        "opacity": opacity,
        "line": {"color": colour, "width": width, "dash": dash},
    }


def _shade(found: Series, colour: str) -> list[Trace]:
    """From the least to the most that each point stands for; nothing where that is one step."""
    if found.every == 1:
        return []
    rgb = ", ".join(str(int(part, 16)) for part in re.findall("[0-9a-f]{2}", colour))
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [*found.steps, *reversed(found.steps)],
            "y": [*found.low, *reversed(found.high)],
            "fill": "toself",
            "fillcolor": f"rgba({rgb}, 0.15)",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]


def _linear_or_log() -> dict[str, Any]:
    buttons = [
        {"label": kind, "method": "relayout", "args": [{"yaxis.type": kind}]}
        for kind in ("linear", "log")
    ]
    place = {"x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"}
    return {"type": "buttons", "direction": "left", "buttons": buttons, **place}
