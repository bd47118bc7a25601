"""Tables of the report: runs side by side, with their settings and the facts of config.json."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from xlsd_train.config.train import TrainConfig
from xlsd_train.data.caption_lengths import describe_truncation
from xlsd_train.runs.history import History
from xlsd_train.runs.layout import checkpoints, step_of
from xlsd_train.runs.validation_log import damaged_losses, describe_checkpoints

MATTER = (
    "phase", "model", "data", "batch", "accum", "optimizer", "lr", "scheduler", "warmup", "steps",
    "epochs", "stop_after", "objective", "precision", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One setting or fact, with its value for every run."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether the runs have different values."""
        return len(set(self.values)) > 1

    @property
    def cells(self) -> list[str]:
        """Cells of a table's row: the name and the values."""
        return [self.name, *self.values]


def settings_table(runs: Sequence[History]) -> tuple[list[Row], list[Row]]:
    """(settings that differ, matter or are not the default, in this order; all others)."""
    defaults = {field.name: _words(field.default) for field in fields(TrainConfig)}
    names = dict.fromkeys(name for run in runs for name in (*MATTER, *run.config))
    rows = [Row(name, [_words(run.config.get(name)) for run in runs]) for name in names]
    # `out` is among the facts, as the folder.
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
    """Everything but settings; facts that no run has are left out."""
    facts: dict[str, Callable[[History], Any]] = {
        "progress": _progress,
        "verdict": _verdict,
        "precision": lambda run: run.record.precision,
        "model": _model,
        "store": _stores,
        "captions": lambda run: (
            describe_truncation(run.record.captions) if run.record.captions else None
        ),
        "objective": _objective,
        "memory plan": lambda run: run.record.memory,
        "versions": _versions,
        "machine": _machine,
        "command line": lambda run: shlex.join(run.record.command),
        "folder": lambda run: run.folder.absolute(),
    }
    rows = [Row(name, [_words(value(run)) for run in runs]) for name, value in facts.items()]
    return [row for row in rows if any(row.values)]


def left_out(run: History) -> list[str]:
    """What of a run is damaged, so that its page lacks it, in words."""
    damaged = [f"{path.relative_to(run.folder)}" for path in damaged_losses(run.folder)]
    found = [f"validation losses that cannot be read: {', '.join(damaged)}"] if damaged else []
    lines = "1 line" if run.unread == 1 else f"{run.unread} lines"
    return [*found, *([f"{lines} of its logs: no valid JSON"] if run.unread else [])]


def _progress(run: History) -> str:
    last, planned = run.last, run.record.planned_steps or "unknown"
    if not last:
        return f"step 0 of {planned}"
    images, epoch = last.get("images_seen"), last.get("epoch", 0)
    return f"step {last['step']} of {planned}: {images} images, epoch {epoch:.2f}"


def _verdict(run: History) -> str | None:
    return describe_checkpoints(run.folder, list(map(step_of, checkpoints(run.folder))))


def _model(run: History) -> str | None:
    model = run.record.model
    hashes = [f"{part} {digest[:16]}" for part, digest in model["sha256"].items()]
    return "; ".join([model["source"], *hashes]) if model["source"] else None


def _stores(run: History) -> str:
    return "; ".join(
        f"{store['path']}: trains on {store['selected']} of {store['images']} images, generation "
        f"{store['generation']}, fingerprint {store['fingerprint'][:16]}"
        for store in run.record.stores
    )


def _objective(run: History) -> str | None:
    kind, before = run.record.objective["kind"], run.record.objective["before"]
    return f"{kind} (the starting model predicted {before})" if kind else None


def _versions(run: History) -> str:
    settings = run.record.settings
    suffix = " version"
    libraries = {k.removesuffix(suffix): v for k, v in settings.items() if k.endswith(suffix)}
    versions = {"xlsd": run.record.xlsd or None, **libraries}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _machine(run: History) -> str:
    machine, settings = run.record.machine, run.record.settings
    card = machine.get("card") or f"CPU, {settings.get('threads')} threads"
    processes = run.record.processes
    times = f"{processes} x " if processes > 1 else ""
    rest = ", ".join(f"{k} {v}" for k, v in machine.items() if v and k != "card")
    return f"{times}{card}; {rest}"


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
