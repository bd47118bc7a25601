"""What runs were, in words, side by side: their settings, and all else that config.json tells."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from xlsd_train.config.train import TrainConfig
from xlsd_train.data.caption_lengths import describe_truncation
from xlsd_train.runs.history import History
from xlsd_train.runs.layout import checkpoints, step_of
from xlsd_train.runs.validation_log import tell

MATTER = (
    "phase", "model", "data", "batch", "accum", "optimizer", "lr", "scheduler", "warmup", "steps",
    "epochs", "stop_after", "objective", "precision", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One thing told of every run."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Between the runs."""
        return len(set(self.values)) > 1


def settings_table(runs: Sequence[History]) -> tuple[list[Row], list[Row]]:
    """Those that differ, then those that matter or are not the default; and all others."""
    defaults = {field.name: _words(field.default) for field in fields(TrainConfig)}
    names = dict.fromkeys(name for run in runs for name in (*MATTER, *run.config))
    rows = [Row(name, [_words(run.config.get(name)) for run in runs]) for name in names]
    # Where a run lies is told beside it.
    chosen = [row for row in rows if row.differs and row.name != "out"]
    chosen += [row for row in rows if not row.differs and row.name in MATTER and any(row.values)]
    chosen += [
        row
        for row in rows
        if row not in chosen
        and row.name not in {"out", *MATTER}
        and row.values[0] != defaults.get(row.name)
    ]
    return chosen, [row for row in rows if row not in chosen]


def facts(runs: Sequence[History]) -> list[Row]:
    """All but settings; what no run tells is left out."""
    asked: dict[str, Callable[[History], Any]] = {
        "stands at": _state,
        "verdict": _verdict,
        "precision": lambda run: run.record.precision,
        "model": _model,
        "store": _stores,
        "captions": lambda run: (
            describe_truncation(run.record.captions) if run.record.captions else None
        ),
        "objective": _objective,
        "how a batch passes": lambda run: run.record.memory,
        "versions": _versions,
        "machine": _machine,
        "command line": lambda run: shlex.join(run.record.command),
        "folder": lambda run: run.folder.absolute(),
        "logs": lambda run: f"{run.unread} lines are no JSON, left out" if run.unread else None,
    }
    rows = [Row(name, [_words(tell(run)) for run in runs]) for name, tell in asked.items()]
    return [row for row in rows if any(row.values)]


def _state(run: History) -> str:
    planned = run.record.planned_steps or "unknown"
    if not run.last:
        return f"no step of {planned} planned yet"
    last = run.last
    done = f"step {last['step']} of {planned} planned"
    return f"{done}: {last.get('images_seen')} images, epoch {last.get('epoch', 0):.2f}"


def _verdict(run: History) -> str | None:
    return tell(run.folder, list(map(step_of, checkpoints(run.folder))))


def _model(run: History) -> str | None:
    model = run.record.model
    hashes = [f"{part} {digest[:16]}" for part, digest in model["sha256"].items()]
    return "; ".join([model["source"], *hashes]) if model["source"] else None


def _stores(run: History) -> str:
    return "; ".join(
        f"{store['path']}: {store['selected']} of {store['images']} images train, generation "
        f"{store['generation']}, fingerprint {store['fingerprint'][:16]}"
        for store in run.record.stores
    )


def _objective(run: History) -> str | None:
    found = run.record.objective
    return (
        f"{found['kind']} (the model predicted {found['before']} before)" if found["kind"] else None
    )


def _versions(run: History) -> str:
    settings = run.record.settings
    suffix = " version"
    of = {k.removesuffix(suffix): v for k, v in settings.items() if k.endswith(suffix)}
    return ", ".join(f"{k} {v}" for k, v in {"xlsd": run.record.xlsd or None, **of}.items())


def _machine(run: History) -> str:
    machine, settings = run.record.machine, run.record.settings
    card = machine.get("card") or f"CPU, {settings.get('threads')} threads"
    processes = run.record.processes
    each = f"{processes} x " if processes > 1 else ""
    about = ", ".join(f"{k} {v}" for k, v in machine.items() if v and k != "card")
    return f"{each}{card}; {about}"


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
