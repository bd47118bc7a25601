"""Reads a run's folder for reports and model cards, also while it is running or after a kill."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.errors import UserError
from xlsd_train.config.optimization import MOST_STEPS
from xlsd_train.runs.downsample import Downsampler, Series
from xlsd_train.runs.json_files import Log, misfit, objects_in
from xlsd_train.runs.layout import (
    CONFIG,
    METRICS_LOG,
    SAMPLES,
    STATE,
    VALIDATION_LOG,
    grid_of,
    run_of,
    steps_in,
)
from xlsd_train.runs.metrics import CHARTED, METRICS
from xlsd_train.runs.record import EMPTY, RunRecord, read_record, read_state
from xlsd_train.runs.validation_log import BANDS, SETS

AXES = ["images_seen", "epoch", "hours"]  # what a chart may have instead of steps
_ENDS = ("mean", "low", "high")
_INTERVAL = {f"{end}!": float for end in _ENDS}
_MEASURED = {
    "step!": int, "weights!": str, "gap!": _INTERVAL,
    **{f"{name}!": {**_INTERVAL, "bands!": [_INTERVAL]} for name in SETS},
}  # fmt: skip


@dataclass(frozen=True)
class History:
    """A run as it is now."""

    name: str
    folder: Path
    record: RunRecord
    last: dict[str, Any]  # the newest line of metrics.jsonl; {} before the first
    series: dict[str, Series]  # of the CHARTED metrics and the AXES that were logged
    validation: list[dict[str, Any]]  # the lines of validation.jsonl, without bands
    samples: dict[int, list[Path]]  # step -> images by prompt
    unread: int  # invalid lines of both logs

    @property
    def config(self) -> dict[str, Any]:
        """The options, with all defaults."""
        return self.record.config


def histories(folders: Sequence[Path]) -> list[History]:
    """Read several runs, each with a unique name; the logs are streamed.

    Raises UserError for a folder that is not a run, or is given twice.
    """
    names = run_names(folders)
    records = [read_record(folder) for folder in folders]
    return [
        RunReader(folder).read(name, record)
        for folder, name, record in zip(folders, names, records, strict=True)
    ]


def run_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as make them unique. Raises UserError as `histories`."""
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"the run {folder} is given more than once; give it once")
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = [Path(*path.parts[-parts:]).as_posix() for path in paths]
        if len(set(names)) == len(names):
            break
    return names


class RunReader:
    """Reads a run again and again; of its logs each time only what was appended.

    It keeps a bounded number of points per metric, and the validations. Logs that were cut or
    replaced, as when a run resumes, are read from the start.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics, self._validation = Log(folder / METRICS_LOG), Log(folder / VALIDATION_LOG)
        self._sampler, self._clock = Downsampler([*CHARTED, *AXES]), _Clock()
        self._last: dict[str, Any] = {}
        self._measured: list[dict[str, Any]] = []
        self._unread = 0

    def read(self, name: str, record: RunRecord) -> History:
        """The run as it is now."""
        if self._metrics.replaced() or self._validation.replaced():
            self.__init__(self._folder)  # type: ignore[misc]
        for lines in self._metrics.read():
            self._add_steps([line for _, line in lines])
        for lines in self._validation.read():
            measured = [_shown(line) for _, line in lines if line and _is_measured(line)]
            self._measured += measured
            self._unread += len(lines) - len(measured)
        series = {name: self._sampler.series(name) for name in self._sampler.names}
        samples = steps_in(self._folder / SAMPLES).items()
        return History(
            name,
            self._folder,
            record,
            dict(self._last),
            {name: points for name, points in series.items() if points.steps},
            list(self._measured),
            {step: sorted(path.glob("[0-9]*.png")) for step, path in samples},
            self._unread,
        )

    def _add_steps(self, lines: list[dict[str, Any] | None]) -> None:
        valid = [line for line in lines if line is not None and _is_step(line.get("step"))]
        self._unread += len(lines) - len(valid)
        if not valid:
            return
        names = [name for name in self._sampler.names if name != "hours"]
        rows = np.array([_numbers([line.get(name) for line in valid]) for name in names])
        hours = self._clock.hours(*(rows[names.index(x)] for x in ("images_seen", "images_per_s")))
        self._sampler.add(np.array([line["step"] for line in valid]), np.vstack([rows, hours]))
        self._last = {k: v for k, v in valid[-1].items() if k not in METRICS or _is_number(v)}


@dataclass
class _Clock:
    """Hours of training so far; pauses between steps do not count."""

    images: float = 0.0
    seconds: float = 0.0

    def hours(self, images: NDArray[np.float64], rates: NDArray[np.float64]) -> Any:
        """After each of the next steps, given all images so far and images per second."""
        with np.errstate(all="ignore"):  # a stranger's log may hold any numbers
            took = np.diff(images, prepend=self.images) / rates
            took[~(np.isfinite(took) & (took > 0))] = 0
            total = self.seconds + np.cumsum(took)
        self.images, self.seconds = float(images[-1]), float(total[-1])
        return total / 3600


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or misfit(value, int) is None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_STEPS


def _numbers(values: list[Any]) -> Any:
    """For a chart; nan, which is skipped, for what is not a number."""
    if set(map(type, values)) <= {float, NoneType}:  # nearly all columns, in a tenth of the time
        return np.array(values, np.float64)  # None becomes nan
    return [float(value) if _is_number(value) else math.nan for value in values]


def _is_measured(line: dict[str, Any]) -> bool:
    return (
        misfit(line, _MEASURED) is None
        and _is_step(line["step"])
        and all(len(line[name]["bands"]) == BANDS for name in SETS)
    )


def _shown(line: dict[str, Any]) -> dict[str, Any]:
    """What pages show of a validation: without the bands, which are ten times as much."""
    parts = {part: {end: line[part][end] for end in _ENDS} for part in (*SETS, "gap")}
    return {"step": line["step"], "weights": line["weights"], **parts}


@dataclass(frozen=True)
class CheckpointHistory:
    """What a run's folder records of one checkpoint; empty for any other model."""

    record: RunRecord = EMPTY
    state: dict[str, Any] = field(default_factory=dict)  # state.json
    metrics: dict[str, Any] = field(default_factory=dict)  # the checkpoint's line of metrics.jsonl
    validation: dict[str, Any] = field(default_factory=dict)  # the newest up to the checkpoint
    date: str | None = None  # ISO 8601
    grid: Path | None = None  # the run's sample grid


def checkpoint_history(checkpoint: Path | None) -> CheckpointHistory:
    """Read a checkpoint's history from its run; what is missing there stays empty."""
    if checkpoint is None:
        return CheckpointHistory()
    run, state = run_of(checkpoint), read_state(checkpoint)
    written, grid = (checkpoint / STATE).stat().st_mtime, grid_of(run)
    return CheckpointHistory(
        read_record(run) if (run / CONFIG).is_file() else EMPTY,
        state,
        _newest_line(run / METRICS_LOG, state["step"]),
        _newest_line(run / VALIDATION_LOG, state["step"]),
        datetime.fromtimestamp(int(written), UTC).isoformat(),
        grid if grid.is_file() else None,
    )


_LINE = {"step!": int, **{name: {"mean!": float} for name in (*SETS, "gap")}}


def _newest_line(log: Path, step: int) -> dict[str, Any]:
    """A log's newest line up to this step, of the live weights; {} if there is none."""
    newest: dict[str, Any] = {}
    for line in objects_in(log, _LINE):
        if line.get("weights", "live") == "live" and line["step"] <= step:
            newest = line
    return newest
