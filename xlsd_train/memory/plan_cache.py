"""Remembers which memory plans were measured: one small JSON file in the user's cache folder.

Only a convenience: a file that is damaged or cannot be written is no error. Its content is checked
like that of any file from elsewhere.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, get_args

import torch

from xlsd_cache import __version__
from xlsd_cache.runtime.atomic import write_json
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_train.config.train import TrainConfig
from xlsd_train.memory.planner import GIB
from xlsd_train.runs.json_files import misfit
from xlsd_train.runs.record import MEASURED, MeasuredPlan
from xlsd_train.step.backend import Momentum, Way
from xlsd_train.step.blocks import Attention

log = logging.getLogger("xlsd.train.memory")

MOST_ENTRIES = 100  # the oldest leave
MOST_BYTES = 2**20
_LINUX_DRIVER = Path("/proc/driver/nvidia/version")
# Options that change a step's time or memory, or what may be chosen. Others, as --lr, do not.
_OPTIONS = (
    "phase", "train", "optimizer", "precision", "deterministic", "channels_last", "compile",
    "attention", "momentum", "micro_batch", "clip_skip",
)  # fmt: skip


def key_of(
    config: TrainConfig, networks: tuple[dict[str, Any], dict[str, Any]], card: str,
    device: torch.device, batch: int, processes: int, size: tuple[int, int], limit: float,
) -> str:  # fmt: skip
    """SHA-256 of everything that decides which plan is the fastest and whether it fits."""
    facts = {
        **{name: getattr(config, name) for name in _OPTIONS},
        "accumulates": config.accum > 1,
        "networks": [  # without what names the file and its version
            {name: x for name, x in each.items() if not name.startswith("_")} for each in networks
        ],
        "card": card,
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "xlsd": __version__,
        "batch": batch,
        "shares": processes > 1,
        "size": size,
        "limit": limit // GIB,  # free memory differs a little from run to run
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _driver() -> str:
    """The NVIDIA driver's version: of the kernel module, else of the CUDA API that it has.

    torch knows only the latter, which is the same for many drivers. nvidia-smi would take a second,
    and is not everywhere.
    """
    try:
        return _LINUX_DRIVER.read_text().partition("\n")[0]
    except OSError:  # Windows, WSL, ROCm
        known = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)  # noqa: SLF001
        return f"CUDA {known()}"


def cache_file() -> Path:
    """Where it is: XDG_CACHE_HOME or ~/.cache, on Windows LOCALAPPDATA, and there `xlsd`."""
    root = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "xlsd" / "plans.json"


def recall(key: str) -> list[MeasuredPlan]:
    """What was measured with this key; nothing if nothing was, or if the file is damaged."""
    rows = _entries().get(key, [])
    return rows if all(_is_plan(row["plan"]) for row in rows) else []


def _is_plan(values: list[Any]) -> bool:
    allowed = get_args(Way), range(1, 2**31), get_args(Attention), get_args(Momentum)
    return len(values) == 4 and all(x in y for x, y in zip(values, allowed, strict=True))


def remember(key: str, rows: list[MeasuredPlan]) -> None:
    """Add it. Of two runs that do so at the same moment, one may be forgotten."""
    entries = _entries()
    entries.pop(key, None)
    entries[key] = rows
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(list(entries.items())[-MOST_ENTRIES:]))
    except OSError as error:
        log.info(f"cannot write {path}: {error}; the next run measures its memory plans again")


def _entries() -> dict[str, list[MeasuredPlan]]:
    path = cache_file()
    try:
        entries: dict[str, list[MeasuredPlan]] = read_json(path, MOST_BYTES)
        if why := misfit(entries, {str: [MEASURED]}):
            raise ValueError(why)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.info(f"ignoring {path}: {error}")
        return {}
    return entries
