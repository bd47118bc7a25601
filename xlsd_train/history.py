"""What a run's folder tells of it, for people: also of one that is going on, or was killed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xlsd_cache import UserError
from xlsd_train.thin import Series, Thinner

NUMBERS = (
    "loss", "loss_smoothed", "lr", "lr_effective", "d", "grad_norm", "images_per_s", "wait_s",
    "peak_gib",
)  # fmt: skip
CHUNK = 1 << 20  # bytes of a log that are parsed at once


@dataclass(frozen=True)
class History:
    """A run as its folder tells it now."""

    name: str
    folder: Path
    record: dict[str, Any]  # config.json
    last: dict[str, Any]  # the newest line of metrics.jsonl; {} before the first
    series: dict[str, Series]  # of NUMBERS those that were logged
    validation: list[dict[str, Any]]  # the lines of validation.jsonl
    samples: dict[int, list[Path]]  # step -> its pictures by prompt
    unread: int  # lines of both logs that are no JSON

    @property
    def config(self) -> dict[str, Any]:
        """The settings, with all defaults."""
        found: dict[str, Any] = self.record.get("config", {})
        return found


def stores_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The stores that a run trains on, each as config.json tells it."""
    found: list[dict[str, Any]] = record["stores"]
    return found


def histories(folders: Sequence[Path]) -> list[History]:
    """Each run by a name of its own. Raises UserError for a folder that is no run, or named twice.

    The logs are streamed, whatever their length.
    """
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"the run {folder} is named more than once; name each once")
    records = [read_record(folder) for folder in folders]
    return [_read(*each) for each in zip(_names(paths), folders, records, strict=True)]


def read_lines(path: Path) -> Iterator[list[dict[str, Any] | None]]:
    """A log's whole lines in order, some at a time; None for one that is no JSON object."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while lines := file.readlines(CHUNK):
            if not lines[-1].endswith(b"\n"):
                lines.pop()  # being written, or a kill met it
            yield _parse(lines)


def _parse(lines: list[bytes]) -> list[dict[str, Any] | None]:
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # at once: half the time
        if len(found) == len(lines) and all(isinstance(line, dict) for line in found):
            return list(found)
    except ValueError:
        if len(lines) <= 1:
            return [None] * len(lines)
    if len(lines) <= 1:
        return [None] * len(lines)
    half = len(lines) // 2
    return _parse(lines[:half]) + _parse(lines[half:])


def read_record(folder: Path) -> dict[str, Any]:
    """A run's config.json. Raises UserError for a folder that is no run."""
    path = folder / "config.json"
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no run (no config.json); name the folder of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; name the folder of a run") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is no run's; name the folder of a run")
    return record


def _names(paths: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = [Path(*path.parts[-parts:]).as_posix() for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read(name: str, folder: Path, record: dict[str, Any]) -> History:
    thinner, last, unread = Thinner(NUMBERS), {}, 0
    for lines in read_lines(folder / "metrics.jsonl"):
        told = [line for line in lines if line is not None and "step" in line]
        unread += len(lines) - len(told)
        if told:
            rows = [[line.get(number, np.nan) for line in told] for number in NUMBERS]
            thinner.add(np.array([line["step"] for line in told]), np.array(rows, np.float64))
            last = told[-1]
    series = {number: thinner.series(number) for number in NUMBERS}
    validation = [line for lines in read_lines(folder / "validation.jsonl") for line in lines]
    measured = [line for line in validation if line is not None]
    return History(
        name,
        folder,
        record,
        last,
        {number: found for number, found in series.items() if found.steps},
        measured,
        {
            int(path.name[5:]): sorted(path.glob("[0-9]*.png"))
            for path in sorted((folder / "samples").glob("step-????????"))
        },
        unread + len(validation) - len(measured),
    )
