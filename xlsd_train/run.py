"""The run folder: what was asked, what came of it step by step, and whether a resume is the same.

RUN/config.json, metrics.jsonl, validation.jsonl, validation/, samples/, checkpoints/, tensorboard/,
base/; and the files SAVE, SAMPLE and STOP, which a user touches to have it done at the next step.
"""

import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from filelock import BaseFileLock, FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter

from xlsd_cache import UserError
from xlsd_cache.durable import (
    TEMPORARY,
    fsync_file,
    fsync_folder,
    sweep,
    write_bytes,
    write_json,
)
from xlsd_cache.ours import is_run
from xlsd_cache.terminal import say
from xlsd_train.checkpoint import STATE
from xlsd_train.config import FREE, TrainConfig
from xlsd_train.ema import forget_snapshots_after
from xlsd_train.losses import SETS, forget_after, save_losses, summaries
from xlsd_train.mixture import Mixture
from xlsd_train.model import Model
from xlsd_train.steps import checkpoints
from xlsd_train.verdict import Losses

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
NUMERIC = ("torch", "diffusers", "transformers", "prodigyopt", "numpy")  # they decide the bits


@dataclass
class Run:
    """A run folder, new or begun before."""

    folder: Path
    before: dict[str, Any] | None  # config.json as it was when the run began; None: a new run
    _metrics: IO[str] | None = field(default=None)
    _board: SummaryWriter | None = field(default=None)
    _lock: BaseFileLock | None = field(default=None)

    @classmethod
    def open(cls, config: TrainConfig) -> "Run":
        """Look at the folder without writing to it. Raises UserError where it is something else."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = config.out or Path("runs") / f"{config.phase}-{stamp}"
        path = folder / "config.json"
        try:
            before = json.loads(path.read_bytes())
        except FileNotFoundError:
            before = None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; name another --out") from error
        if is_run(before):
            return cls(folder, before)
        if before is not None:
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
        return [store["generation"] for store in self.before["stores"]] if self.before else None

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
        value: dict[str, Any] = json.loads((checkpoint / STATE).read_bytes())
        return value

    def compare(self, settings: dict[str, Any], force: bool) -> None:
        """Refuse to go on where a setting differs from the run's, naming each; or say so."""
        if self.before is None:
            return
        old = self.before["settings"]
        differ = {name for name in old.keys() | settings if old.get(name) != settings.get(name)}
        if not differ:
            return
        told = ", ".join(
            f"{name} {old.get(name)} and not {settings.get(name)}" for name in sorted(differ)
        )
        if not force:
            raise UserError(
                f"{self.folder} was begun with {told}; give the same again, another --out, or "
                f"--force to go on inexactly"
            )
        say(f"--force: {self.folder} was begun with {told}; it goes on, but not exactly")

    def compare_model(self, record: dict[str, Any], force: bool) -> None:
        """Refuse a run that was killed before its first checkpoint and now begins elsewhere."""
        if self.before is None or self.checkpoint is not None or force:
            return
        if record["model"]["sha256"] != self.before["model"]["sha256"]:
            raise UserError(
                f"{self.folder} was begun with the model {self.before['model']['source']}, whose "
                f"weights differ from those of {record['model']['source']}; give the same --model, "
                f"another --out, or --force"
            )

    def begin(self, record: dict[str, Any], model: Model, config: TrainConfig) -> None:
        """Lock the folder, write what a new run starts from, and cut what outran the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock", blocking=False, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is training in {self.folder}; wait for it or name another --out"
            ) from None
        if self.before is None:
            write_json(self.folder / "config.json", record)
        base = self.folder / "base"
        if not base.exists():
            temporary = self.folder / f"base{TEMPORARY}"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            model.save_base(temporary, config.phase)
            for path in temporary.rglob("*"):
                if path.is_file():
                    fsync_file(path)
            temporary.rename(base)
            fsync_folder(self.folder)
        for folder in (self.folder, *self.folder.glob("samples/**")):
            sweep(folder)
        step = self.state()["step"]
        last = step if self.checkpoint else -1  # without one even step 0 is measured again
        for name in (METRICS, VALIDATION):
            _cut(self.folder / name, last)
        forget_after(self.folder, last)
        forget_snapshots_after(self.folder, last)
        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def log(self, line: dict[str, Any]) -> None:
        """Append one step's metrics, for programs and for TensorBoard."""
        assert self._metrics is not None
        assert self._board is not None
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name in ("loss", "loss_smoothed", "lr_effective", "d", "grad_norm", "images_per_s"):
            if name in line:  # d is D-Lion's and Prodigy's
                self._board.add_scalar(name, line[name], line["step"])

    def log_validation(self, step: int, images_seen: int, losses: dict[str, Losses]) -> None:
        """Keep what a validation measured, WEIGHTS/SET -> losses, and a line for each WEIGHTS."""
        assert self._board is not None
        save_losses(self.folder, step, losses)
        with (self.folder / VALIDATION).open("a", encoding="utf-8") as file:
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
        if not path.exists():
            return False
        path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Close files and unlock."""
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.release()


def _cut(path: Path, step: int) -> None:
    """Leave the whole lines of a log up to a step."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        whole = (line for line in lines if line.endswith(b"\n"))
        write_bytes(path, b"".join(x for x in whole if json.loads(x)["step"] <= step))


def _foreign(path: Path) -> bool:
    """Whether a file is no lock or temporary file, as a run killed at its very start leaves."""
    return not path.name.startswith(".") and not path.name.endswith(TEMPORARY)


def settings(config: TrainConfig, stores: Mixture, device: torch.device) -> dict[str, Any]:
    """What a resume must share with the run for its numbers to be the same, bit for bit.

    The number of processes is not among them: they cut one batch, and sums are equal to rounding.
    """
    given = {name: value for name, value in asdict(config).items() if name not in FREE}
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
