"""The run folder: what was asked, what came of it step by step, and whether a resume is the same.

RUN/config.json, metrics.jsonl, validation.jsonl, validation/, samples/, checkpoints/, tensorboard/,
base/; and the files SAVE, SAMPLE and STOP, which a user touches to have it done at the next step.
"""

import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from filelock import BaseFileLock, FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import (
    TEMPORARY,
    fsync_file,
    fsync_folder,
    replacing,
    sweep,
    write_json,
)
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.runtime.own_files import is_run
from xlsd_train.checkpoints.resume import FIXED, LENGTH, Read, differing, refuse, told
from xlsd_train.config.train import FREE, TrainConfig
from xlsd_train.data.mixture import Mixture
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.optim.ema import forget_snapshots_after
from xlsd_train.optim.lr_scheduler import first_other_rate
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
    partial_checkpoints,
    steps_in,
)
from xlsd_train.runs.links import refuse_links
from xlsd_train.runs.metrics import METRICS
from xlsd_train.runs.record import Changes, RunRecord, read_state, record_to_resume
from xlsd_train.runs.validation_log import SETS, forget_after, save_losses, summaries

log = logging.getLogger("xlsd.train.checkpoints")

NUMERIC = ("torch", "diffusers", "transformers", "numpy")  # they decide the bits


@dataclass
class Run:
    """A run folder, new or begun before."""

    folder: Path
    before: RunRecord | None  # of a run that is resumed
    forced: dict[str, Any] = field(default_factory=dict)  # name -> what --force changed of it
    _lengthened: bool = False
    _metrics: IO[str] | None = field(default=None)
    _board: SummaryWriter | None = field(default=None)
    _lock: BaseFileLock | None = field(default=None)

    @classmethod
    def open(cls, config: TrainConfig) -> "Run":
        """Look at the folder without writing to it.

        Raises UserError where it is something else, or holds links.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = config.out or Path("runs") / f"{config.phase}-{stamp}"
        path = folder / CONFIG
        refuse_links(folder)
        try:
            found = read_json(path)
        except FileNotFoundError:
            found = None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; name another --out") from error
        if is_run(found):
            before = record_to_resume(folder, found)
            _refuse_incomplete(folder)
            return cls(folder, before)
        if found is not None:
            raise UserError(
                f"--out {folder} is no run: its config.json is of another kind; name another"
            )
        if folder.exists() and (not folder.is_dir() or any(map(_foreign, folder.iterdir()))):
            raise UserError(
                f"--out {folder} is not empty and holds no run (no config.json); name another"
            )
        return cls(folder, None)

    @property
    def generations(self) -> list[int] | None:
        """The stores' generations that the run sees; None for a new run, which takes the newest."""
        return [store["generation"] for store in self.before.stores] if self.before else None

    @property
    def adapted(self) -> Changes | None:
        """What was adapted to small data when the run was started; None for a new run."""
        return None if self.before is None else self.before.adapted

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = checkpoints(self.folder)
        return found[-1] if found else None

    def state(self) -> dict[str, Any]:
        """Where the newest checkpoint stands."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return {"step": 0, "images_seen": 0, "smoothed": [0.0, 0.0]}
        return read_state(checkpoint)

    def compare(self, settings: dict[str, Any], config: TrainConfig, caption: Read) -> None:
        """Refuse to go on where a setting that could change a weight differs, naming each.

        With --force say so instead, but for what the checkpoint cannot do. `caption` gives a
        --caption's columns.
        """
        if self.before is None:
            return
        old = self._old_settings(settings, config)
        differ = differing(old, settings, caption)
        fixed = {name: was for name, was in differ.items() if name in FIXED}
        if settings["ema"] and not old.get("ema", False):
            fixed["ema"] = False
        if self.checkpoint and fixed and (config.force or "ema" in fixed):
            raise UserError(
                f"{self.folder} was begun with {told(fixed, settings)}, which its checkpoint "
                f"cannot do; give the same again, or begin from its weights: --model {self.folder} "
                f"and another --out"
            )
        self._inexact(differ, settings, config.force)

    def compare_length(self, config: TrainConfig, planned: int, warmup: float) -> tuple[int, float]:
        """(planned length, warm-up) to go on with, in steps.

        Raises UserError for others than the run's where a step so far would have had another rate.
        """
        if self.before is None:
            return planned, warmup
        was = self.before.planned_steps, self.before.warmup_steps
        old = self.before.settings
        new = {name: getattr(config, name) for name in LENGTH}
        differ = {name: old.get(name) for name in LENGTH if old.get(name) != new[name]}
        if not differ and not self.forced:  # as it was counted when it began
            return was
        if was == (planned, warmup):
            return was
        step = self.state()["step"]
        if planned < step:
            raise UserError(
                f"{self.folder} is at step {step} already, behind the {planned} planned now; give "
                f"--steps {step} or more, or another --out"
            )
        other = first_other_rate(config, was, (planned, warmup), step)
        if other is None:
            log.info(
                f"planned {planned} steps, and {was[0]} before: every step so far had the same "
                f"learning rate, so the run is exactly the one that was planned so from its start"
            )
            self._lengthened = True
            return planned, warmup
        why = f" (so step {other} would have had another learning rate)"
        self._inexact(differ, new, config.force, why)
        return planned, warmup

    def compare_batch(self, batch: int, plan: Sequence[Any], force: bool) -> None:
        """Note that --force chose another batch, or another way to pass it."""
        if self.before and force:
            was = {"batch": self.before.batch, "plan": list(self.before.plan)}
            now = {"batch": batch, "plan": list(plan)}
            differ = {name: value for name, value in was.items() if value != now[name]}
            self.forced = differ | self.forced

    def _inexact(
        self, differ: dict[str, Any], now: Mapping[str, Any], force: bool, why: str = ""
    ) -> None:
        if not differ:
            return
        if not force:
            raise refuse(self.folder, told(differ, now) + why)
        self.forced |= differ
        log.info(
            f"--force: {self.folder} was begun with {told(differ, now)}; not bit-exact from here"
        )

    def _old_settings(self, settings: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
        """The run's, with what they were in effect where it is written another way now."""
        assert self.before is not None
        old = dict(self.before.settings)
        if settings["batch"] in {"auto", self.before.batch}:
            old["batch"] = settings["batch"]
        kind = self.before.objective["kind"]
        if self.checkpoint and kind and settings["objective"] in {None, kind}:
            old["objective"] = settings["objective"]  # left out, it is as the checkpoint has it
        if "card" in settings:  # earlier versions wrote it down for people alone
            old.setdefault("card", self.before.machine.get("card"))
        if not (self.before.validation and config.validate_every):
            old["validation_images"] = settings["validation_images"]
        return old

    def inherited(self, config: TrainConfig, fraction: float | None) -> TrainConfig:
        """The config with what was not asked for as the run has it: the images held out."""
        if self.before is None or fraction is not None:
            return config
        held: float = self.before.settings.get("validation_fraction", 0.0)
        if config.validate_every and not held:
            raise UserError(
                f"{self.folder} was begun without held-out images, so that --validate-every "
                f"{config.validate_every} has nothing to measure; leave it out, or name another "
                f"--out"
            )
        return replace(config, validation_fraction=held)

    def compare_model(self, record: RunRecord, force: bool) -> None:
        """Refuse a run that was killed before its first checkpoint and now begins elsewhere."""
        if self.before is None or self.checkpoint is not None:
            return
        if record.model["sha256"] == self.before.model["sha256"]:
            return
        self.forced["model"] = self.before.model["source"]
        if not force:
            raise UserError(
                f"{self.folder} was begun with the model {self.before.model['source']}, whose "
                f"weights differ from those of {record.model['source']}; give the same --model, "
                f"another --out, or --force"
            )

    def begin(self, record: RunRecord, model: ModelBundle, config: TrainConfig) -> None:
        """Lock the folder, write what a new run starts from, and cut what outran the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK, blocking=False, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is training in {self.folder}; wait for it or name another --out"
            ) from None
        if (renewed := self._renewed(record)) != self.before:
            write_json(self.folder / CONFIG, renewed.to_json())
        if not self.checkpoint:
            shutil.rmtree(self.folder / BASE, ignore_errors=True)
        if not (self.folder / BASE).exists():
            self._save_base(model, config)
        for partial in partial_checkpoints(self.folder):
            shutil.rmtree(partial, ignore_errors=True)  # a kill met it
        samples = self.folder / SAMPLES
        for folder in (self.folder, samples, *steps_in(samples).values()):
            sweep(folder)
        step = self.state()["step"]
        last = step if self.checkpoint else -1  # without one even step 0 is measured again
        for name in (METRICS_LOG, VALIDATION_LOG):
            _cut(self.folder / name, last)
        forget_after(self.folder, last)
        forget_snapshots_after(self.folder, last)
        self._metrics = (self.folder / METRICS_LOG).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / BOARD), purge_step=step + 1)

    def _save_base(self, model: ModelBundle, config: TrainConfig) -> None:
        temporary = self.folder / f"{BASE}{TEMPORARY}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            model.save_base(temporary, config.phase)
            for path in temporary.rglob("*"):
                if path.is_file():
                    fsync_file(path)
            temporary.rename(self.folder / BASE)
            fsync_folder(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _renewed(self, record: RunRecord) -> RunRecord:
        """The record to write: of a resumed run the old one, with what has changed."""
        if self.before is None:
            return record
        if self.forced:
            names = {"command", "recipe"} | ({"model"} if self.checkpoint else set())
            kept = {name: getattr(self.before, name) for name in names & {*self.before.keys}}
            change = {"step": self.state()["step"], "was": self.forced}
            return replace(record, **kept, changed=[*self.before.changed, change])
        renewed = self.before
        if not renewed.validation:
            renewed = replace(renewed, validation=record.validation)
        if not self._lengthened:
            return renewed
        return replace(
            renewed,
            settings=renewed.settings | {name: record.settings[name] for name in LENGTH},
            config=renewed.config | {name: record.config[name] for name in LENGTH},
            planned_steps=record.planned_steps,
            warmup_steps=record.warmup_steps,
        )

    def log(self, line: dict[str, Any]) -> None:
        """Append one step's metrics, for programs and for TensorBoard."""
        assert self._metrics is not None
        assert self._board is not None
        assert line.keys() <= METRICS.keys(), "a metric that runs/metrics.py does not list"
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, metric in METRICS.items():
            if metric.board and name in line:
                self._board.add_scalar(name, line[name], line["step"])

    def log_validation(self, step: int, images_seen: int, losses: dict[str, Losses]) -> None:
        """Keep what a validation measured, WEIGHTS/SET -> losses, and a line for each WEIGHTS."""
        assert self._board is not None
        save_losses(self.folder, step, losses)
        with (self.folder / VALIDATION_LOG).open("a", encoding="utf-8") as file:
            for of, found in summaries(losses).items():
                at = {"step": step, "images_seen": images_seen, "weights": of, **found}
                file.write(json.dumps(at) + "\n")
                for name in (*SETS, "gap"):
                    self._board.add_scalar(f"validation/{of}/{name}", found[name]["mean"], step)
            file.flush()
            os.fsync(file.fileno())

    def sync(self) -> None:
        """The metrics so far are on the disk when this returns: called before a checkpoint."""
        assert self._metrics is not None
        os.fsync(self._metrics.fileno())

    def asked(self, name: str) -> bool:
        """Whether the user has touched RUN/NAME since; the file is taken away."""
        path = self.folder / name
        if path.is_dir() or not path.exists():  # what `touch` does not make asks for nothing
            return False
        path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Close files and unlock."""
        with suppress(OSError):  # a full disk, of which the session's error tells
            if self._metrics is not None:
                self._metrics.close()
        with suppress(OSError):
            if self._board is not None:
                self._board.close()
        if self._lock is not None:
            self._lock.release()


def _cut(path: Path, step: int) -> None:
    """Leave the whole lines of a log up to a step."""
    if not path.exists():
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        for lines in read_log(path):
            file.writelines(line for line, found in lines if _is_up_to(found, step))


def _is_up_to(line: dict[str, Any] | None, step: int) -> bool:
    at = (line or {}).get("step")
    return isinstance(at, int) and at <= step


def _refuse_incomplete(folder: Path) -> None:
    """Raises UserError for what has a checkpoint's name and is none: the run would save there."""
    whole = checkpoints(folder)
    for path in steps_in(folder / CHECKPOINTS).values():
        if path not in whole:
            raise UserError(
                f"{path} is no checkpoint, for it has no state.json; move it out of the run"
            )


def _foreign(path: Path) -> bool:
    """Whether a file is no lock or temporary file, as a run killed at its very start leaves."""
    return not path.name.startswith(".") and not path.name.endswith(TEMPORARY)


def settings(config: TrainConfig, stores: Mixture, device: torch.device) -> dict[str, Any]:
    """What a resume must share with the run for its numbers to be the same, bit for bit.

    The number of processes is not among them: they cut one batch, and sums are equal to rounding.
    """
    given = {name: value for name, value in config.to_json().items() if name not in FREE}
    given.pop("data")  # stores may move: their fingerprints tell
    given["betas"] = list(config.betas or ())
    return {
        **given,
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "stores": " ".join(
            f"{part.store.fingerprint[:16]}:{float(part.weight):g}" for part in stores.parts
        ),
        **{f"{name} version": version(name) for name in NUMERIC},
        **(_card(device) if device.type == "cuda" else {}),
    }


def _card(device: torch.device) -> dict[str, Any]:
    """Other cards, and other versions of cuDNN, choose other kernels, which round otherwise."""
    return {
        "card": torch.cuda.get_device_name(device),
        "cudnn version": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Where the run runs, for people."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "card": card,
        "cuda": torch.version.cuda,
    }


def peak_gib(device: torch.device) -> float:
    """The most memory held so far: of the card by torch's allocator, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float(psutil.Process().memory_info().peak_wset) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
