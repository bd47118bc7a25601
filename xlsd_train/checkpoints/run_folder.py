"""The run folder: opened, locked and written to.

RUN/config.json, metrics.jsonl, validation.jsonl, validation/, samples/, checkpoints/, tensorboard/,
base/; and the files SAVE, SAMPLE and STOP, which a user touches to request an action.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, Timeout

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import (
    TEMPORARY,
    replacing,
    replacing_folder,
    sweep,
    write_json,
)
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.runtime.own_files import is_run
from xlsd_train.checkpoints.board import Board
from xlsd_train.checkpoints.resume import LENGTH
from xlsd_train.config.train import TrainConfig
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.optim.ema import forget_snapshots_after
from xlsd_train.runs.bootstrap import Losses
from xlsd_train.runs.json_files import read_log
from xlsd_train.runs.layout import (
    BASE,
    BOARD,
    CHECKPOINTS,
    CONFIG,
    LOCK,
    METRICS_LOG,
    SAMPLES,
    VALIDATION_LOG,
    checkpoints,
    is_checkpoint,
    partial_checkpoints,
    picture_name,
    samples_of,
    steps_in,
)
from xlsd_train.runs.links import refuse_links
from xlsd_train.runs.metrics import METRICS
from xlsd_train.runs.record import Changes, RunRecord, read_state, record_to_resume
from xlsd_train.runs.tracked import step_values, validation_values
from xlsd_train.runs.validation_log import forget_after, save_losses, summaries

log = logging.getLogger("xlsd.train.checkpoints")


@dataclass
class RunFolder:
    """The folder of a new run, or of one to resume."""

    folder: Path
    before: RunRecord | None  # None: a new run
    forced: dict[str, Any] = field(default_factory=dict)  # by --force: name -> old value
    lengthened: bool = False  # planned for longer or shorter, with the same rates so far
    _metrics: IO[str] | None = field(default=None)
    _board: Board | None = field(default=None)
    _lock: BaseFileLock | None = field(default=None)

    @classmethod
    def open(cls, config: TrainConfig) -> "RunFolder":
        """Open the folder without writing to it.

        Raises UserError for a folder that is not a run, or that has links in it.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = config.out or Path("runs") / f"{config.phase}-{stamp}"
        path = folder / CONFIG
        refuse_links(folder)
        try:
            value = read_json(path)
        except FileNotFoundError:
            value = None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; use another --out") from error
        if is_run(value):
            before = record_to_resume(folder, value)
            _refuse_incomplete(folder)
            return cls(folder, before)
        if value is not None:
            raise UserError(
                f"--out {folder} is not a run: its config.json is another program's; use another"
            )
        if folder.exists() and (not folder.is_dir() or any(map(_foreign, folder.iterdir()))):
            raise UserError(
                f"--out {folder} is not empty and not a run (no config.json); use another --out"
            )
        return cls(folder, None)

    @property
    def generations(self) -> list[int] | None:
        """The generation of each store that the run uses; None for a new run: the newest."""
        return [store["generation"] for store in self.before.stores] if self.before else None

    @property
    def adapted(self) -> Changes | None:
        """What was adapted to small data when the run was started; None for a new run."""
        return None if self.before is None else self.before.adapted

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        saved = checkpoints(self.folder)
        return saved[-1] if saved else None

    def state(self) -> dict[str, Any]:
        """state.json of the newest checkpoint; step 0 without one."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return {"step": 0, "images_seen": 0, "smoothed": [0.0, 0.0]}
        return read_state(checkpoint)

    def begin(self, record: RunRecord, model: ModelBundle, config: TrainConfig) -> None:
        """Lock the folder, write config.json and base/, and remove what follows the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK, blocking=False, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is training in {self.folder}; wait for it or use another --out"
            ) from None
        if (renewed := self._renewed(record)) != self.before:
            write_json(self.folder / CONFIG, renewed.to_json())
        if not self.checkpoint:
            shutil.rmtree(self.folder / BASE, ignore_errors=True)
        if not (self.folder / BASE).exists():
            self._save_base(model, config)
        for partial in partial_checkpoints(self.folder):
            shutil.rmtree(partial, ignore_errors=True)
        samples = self.folder / SAMPLES
        for folder in (self.folder, samples, *steps_in(samples).values()):
            sweep(folder)
        step = self.state()["step"]
        last = step if self.checkpoint else -1  # without a checkpoint step 0 is measured again
        for name in (METRICS_LOG, VALIDATION_LOG):
            _cut(self.folder / name, last)
        forget_after(self.folder, last)
        forget_snapshots_after(self.folder, last)
        self._metrics = (self.folder / METRICS_LOG).open("a", encoding="utf-8")
        self._board = Board(self.folder / BOARD, last, record)

    def _save_base(self, model: ModelBundle, config: TrainConfig) -> None:
        with replacing_folder(self.folder / BASE) as folder:
            folder.mkdir()
            model.save_base(folder, config.phase)

    def _renewed(self, record: RunRecord) -> RunRecord:
        """The record to write; for a resumed run the old one with its changes."""
        if self.before is None:
            return record
        if self.forced:
            names = {"command", "recipe"} | ({"model"} if self.checkpoint else set())
            kept = {name: getattr(self.before, name) for name in names & self.before.written.keys()}
            change = {"step": self.state()["step"], "was": self.forced}
            return replace(record, **kept, changed=[*self.before.changed, change])
        renewed = self.before
        if not renewed.validation:
            renewed = replace(renewed, validation=record.validation)
        if not self.lengthened:
            return renewed
        return replace(
            renewed,
            settings=renewed.settings | {name: record.settings[name] for name in LENGTH},
            config=renewed.config | {name: record.config[name] for name in LENGTH},
            planned_steps=record.planned_steps,
            warmup_steps=record.warmup_steps,
        )

    def log(self, line: dict[str, Any]) -> None:
        """Append a step's metrics to metrics.jsonl and TensorBoard."""
        assert self._metrics is not None
        assert self._board is not None
        assert line.keys() <= METRICS.keys(), "a metric that runs/metrics.py does not list"
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        self._board.log(step_values(line), line["step"])

    def log_validation(
        self, step: int, images_seen: int, losses: dict[str, Losses]
    ) -> list[dict[str, Any]]:
        """Save validation losses, WEIGHTS/SET -> losses, and log a summary for each WEIGHTS.

        Returns the lines of validation.jsonl.
        """
        assert self._board is not None
        save_losses(self.folder, step, losses)
        lines = []
        with (self.folder / VALIDATION_LOG).open("a", encoding="utf-8") as file:
            for weights, summary in summaries(losses).items():
                line = {"step": step, "images_seen": images_seen, "weights": weights, **summary}
                file.write(json.dumps(line) + "\n")
                lines.append(line)
                self._board.log(validation_values(line), step)
            file.flush()
            os.fsync(file.fileno())
        return lines

    def log_samples(self, step: int, prompts: Sequence[str]) -> None:
        """Add the samples of a step to TensorBoard."""
        assert self._board is not None
        drawn = samples_of(self.folder, step)
        pictures = [drawn / picture_name(i) for i in range(len(prompts))]
        self._board.log_samples(pictures, prompts, step)

    def complete(self, step: int) -> None:
        """Tell TensorBoard that the run is complete."""
        assert self._board is not None
        self._board.complete(step)

    def sync(self) -> None:
        """Write the metrics so far to the disk; called before a checkpoint."""
        assert self._metrics is not None
        assert self._board is not None
        os.fsync(self._metrics.fileno())
        self._board.flush()

    def take_request(self, name: str) -> bool:
        """Whether the user has touched RUN/NAME; the file is removed."""
        path = self.folder / name
        if path.is_dir() or not path.exists():  # a folder is no request
            return False
        path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Close files and unlock."""
        with suppress(OSError):  # a full disk, which the session reports
            if self._metrics is not None:
                self._metrics.close()
        with suppress(OSError):
            if self._board is not None:
                self._board.close()
        if self._lock is not None:
            self._lock.release()


def _cut(path: Path, step: int) -> None:
    """Remove lines after a step, and a torn last line."""
    if not path.exists():
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        for lines in read_log(path):
            file.writelines(line for line, value in lines if _is_up_to(value, step))


def _is_up_to(line: dict[str, Any] | None, step: int) -> bool:
    number = (line or {}).get("step")
    return isinstance(number, int) and number <= step


def _refuse_incomplete(folder: Path) -> None:
    """Raises UserError for an incomplete folder where the run would save a checkpoint."""
    for path in steps_in(folder / CHECKPOINTS).values():
        if not is_checkpoint(path):
            raise UserError(
                f"{path} is not a checkpoint: it has no state.json; move it out of the run"
            )


def _foreign(path: Path) -> bool:
    """Whether a file is neither a lock nor temporary, as a run killed at its start leaves."""
    return not path.name.startswith(".") and not path.name.endswith(TEMPORARY)
