"""Charts of runs as plotly figures, in plain lists and numbers; each chart shows all runs.

Points come from the logs alone. Plotly reads a subset of HTML in its texts, so names are escaped.
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
)  # Okabe and Ito's palette for colour-blind readers
MEASURED = 200  # validations of a run that are shown
DASHES = ("solid", "dash", "dashdot")  # weights: live, then averages
Trace = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One chart of the page."""

    title: str
    note: str
    figure: dict[str, Any]  # plotly's data and layout


def charts(runs: Sequence[History]) -> list[Chart]:
    """The charts that have data, in the order of the page."""
    made = [
        _metric_chart(runs, "loss", _loss, log=True),
        _metric_chart(runs, "lr", _rates, log=True, rangemode="tozero"),
        _metric_chart(runs, "d", partial(_mean, number="d"), log=True),
        _chart(runs, "Validation loss", _validation, "unweighted loss"),
        _chart(runs, "Generalisation gap", _gap, "held-out minus training loss"),
        _bands(runs),
        *(
            _metric_chart(runs, name, partial(traces, number=name), rangemode="tozero")
            for name, traces in (("images_per_s", _spread), ("wait_s", _mean), ("peak_gib", _mean))
        ),
        _metric_chart(runs, "grad_norm", partial(_spread, number="grad_norm"), log=True),
    ]
    return [chart for chart in made if chart.figure["data"]]


def shown_validations(validation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of at most MEASURED steps, with the first, the last and the best."""
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
    """What the points and intervals are, and what is left out."""
    if any("error_y" in trace for trace in data):
        many = max(len({line["step"] for line in run.validation}) for run in runs)
        some = f"; at most {MEASURED} of {many} validations, evenly spaced, and the best"
        return "mean and its 95% interval" + some * (many > MEASURED)
    every = {run.series["loss"].every for run in runs if "loss" in run.series}
    if not every or max(every) == 1:
        return ""
    return (
        f"a point is the mean of up to {max(every)} steps, at their middle; shaded: from their "
        f"minimum to their maximum"
    )


def _loss(run: History, colour: str) -> list[Trace]:
    if "loss" not in run.series:
        return []
    smoothed = _line(run, run.series["loss_smoothed"], "smoothed", colour, width=2)
    raw = _line(run, run.series["loss"], "raw", colour, width=1, opacity=0.35)
    return [*_shade(run.series["loss"], colour), raw, smoothed]


def _rates(run: History, colour: str) -> list[Trace]:
    """The effective rate; also --lr where the two differ."""
    if "lr" not in run.series:
        return []
    lr, effective = run.series["lr"], run.series["lr_effective"]
    traces = [_line(run, effective, "effective", colour, width=2)]
    return traces + [_line(run, lr, "lr", colour, dash="dot")] * (lr != effective)


def _mean(run: History, colour: str, number: str) -> list[Trace]:
    series = run.series.get(number)
    return [_line(run, series, "", colour)] if series else []


def _spread(run: History, colour: str, number: str) -> list[Trace]:
    series = run.series.get(number)
    return [*_shade(series, colour), _line(run, series, "", colour)] if series else []


def _validation(run: History, colour: str) -> list[Trace]:
    return [_intervals(run, weights, which, colour) for weights in _weights(run) for which in SETS]


def _gap(run: History, colour: str) -> list[Trace]:
    return [_intervals(run, weights, "gap", colour) for weights in _weights(run)]


def _bands(runs: Sequence[History]) -> Chart:
    """A small chart per band of timesteps; curves of averaged weights are hidden at first."""
    data, titles = [], []
    for band in range(BANDS):
        axis = str(band + 1) if band else ""
        for i, run in enumerate(runs):
            for weights in _weights(run):
                for which in SETS:
                    trace = _intervals(run, weights, which, COLOURS[i % len(COLOURS)], band)
                    shown = True if weights == "live" else "legendonly"
                    group = {"legendgroup": trace["name"], "showlegend": not band}
                    axes = {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
                    data.append({**trace, **group, "visible": shown, **axes})
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
    """The names of the weights that were validated, live first."""
    return list(dict.fromkeys(line["weights"] for line in run.validation))


def _intervals(
    run: History, weights: str, which: str, colour: str, band: int | None = None
) -> Trace:
    """Means by step with error bars; the intervals' ends are also in `customdata`."""
    lines = [line for line in shown_validations(run.validation) if line["weights"] == weights]
    means = [line[which] if band is None else line[which]["bands"][band] for line in lines]
    dash = DASHES[min(_weights(run).index(weights), len(DASHES) - 1)]
    label = which.replace("_", "-") + (f" {weights}" if weights != "live" else "")
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(f"{run.name} {label}"),
        "x": [line["step"] for line in lines],
        "y": [it["mean"] for it in means],
        "customdata": [[it["low"], it["high"]] for it in means],
        "error_y": {
            "type": "data", "symmetric": False, "thickness": 1, "width": 2,
            "array": [it["high"] - it["mean"] for it in means],
            "arrayminus": [it["mean"] - it["low"] for it in means],
        },
        "hovertemplate": "step %{x}: %{y:.5f} (%{customdata[0]:.5f} to %{customdata[1]:.5f})",
        "opacity": 1.0 if which != "training" else 0.5,
        "line": {"color": colour, "dash": dash if which != "training" else "dot", "width": 1.5},
        "marker": {"size": 4, "color": colour},
    }  # fmt: skip


def _line(
    run: History,
    series: Series,
    label: str,
    colour: str,
    width: float = 1.5,
    opacity: float = 1.0,
    dash: str = "solid",
) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines" if len(series.steps) > 1 else "markers",
        "name": escape(f"{run.name} {label}".strip()),
        "x": series.steps,
        "y": series.mean,
        "opacity": opacity,
        "line": {"color": colour, "width": width, "dash": dash},
    }


def _shade(series: Series, colour: str) -> list[Trace]:
    """The area from each point's minimum to its maximum; nothing if a point is one step."""
    if series.every == 1:
        return []
    rgb = ", ".join(str(int(part, 16)) for part in re.findall("[0-9a-f]{2}", colour))
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [*series.steps, *reversed(series.steps)],
            "y": [*series.low, *reversed(series.high)],
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
