"""A run's config.json and a checkpoint's state.json: read, and found to be what a run writes.

A run may come from anywhere, so what its files say is looked at once, here, and believed after.
Keys that earlier versions did not write may be missing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_train.runs.json_files import misfit
from xlsd_train.runs.layout import STATE
from xlsd_train.runs.links import refuse_links

CONFIG = "config.json"
_TEXT, _TEXTS = (None, str), [str]
_SETTINGS = {  # those of whose values more is asked than whether they are equal
    "phase": str, "model": _TEXT, "unet": _TEXT, "text_encoder": _TEXT, "tokenizer": _TEXT,
    "vae": _TEXT, "train": _TEXT, "reinit": _TEXT, "caption": _TEXT, "require_tags": _TEXT,
    "forbid_tags": _TEXT, "drop_tags": _TEXT, "betas": (None, [float]), "optimizer": str,
    "accum": int, "validation_fraction": (None, float), "clip_skip": int,
}  # fmt: skip
_ADAPTED = {
    "batch": int, "validation_fraction": float, "validate_every": int, "require_tags": _TEXT,
    "warmup": _TEXT,
}  # fmt: skip
_STORE = {
    "path!": str, "fingerprint!": str, "generation!": int, "images!": int, "selected!": int,
    "resolution": int, "weight": float, "newest_generation": int, "tagged": int,
}  # fmt: skip
RECORD: dict[str, Any] = {
    "settings!": _SETTINGS,
    "config!": _SETTINGS,
    "stores!": [_STORE],
    "adapted": {
        name: {"from!": object, "to!": kind, "why": str} for name, kind in _ADAPTED.items()
    },
    "batch": int,
    "captions": {
        "looked_at!": int, "selected!": int, "without!": int, "limit!": int, "cut!": int,
        "over_median!": int, "over_max!": int,
    },
    "changed": list,
    "command": _TEXTS,
    "latents": dict,
    "machine": dict,
    "memory": str,
    "model": {"source!": str, "sha256": {str: str}},
    "objective": {"kind!": str, "before!": str},
    "plan": [str, int],
    "planned_steps": int,
    "precision": str,
    "processes": int,
    "prompts": _TEXTS,
    "recipe": (None, {"name!": str, "sha256!": str}),
    "samples": {"size!": str},
    "step_s": (None, [str, float]),
    "validation": {str: _TEXTS},
    "warmup_steps": float,
    "xlsd": str,
}  # fmt: skip
# What a run that goes on needs.
_RESUMED = ("batch", "memory", "model", "plan", "planned_steps", "warmup_steps")
_STATE = {
    "step!": int, "images_seen": int, "smoothed": [float, float], "plan": [str, int],
    "optimizer": {str: float},
}  # fmt: skip


def read_record(folder: Path) -> dict[str, Any]:
    """A run's config.json. Raises UserError for a folder that is no run, or holds links."""
    refuse_links(folder)
    path = folder / CONFIG
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no run (no config.json); name the folder of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; name the folder of a run") from error
    if why := misfit(record, RECORD):
        raise UserError(f"{path} is no run's: {why}; name the folder of a run")
    found: dict[str, Any] = record
    return found


def refuse_unfit(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises UserError where a run cannot go on by what its config.json says."""
    why = misfit(record, RECORD | {f"{name}!": RECORD[name] for name in _RESUMED})
    if why:
        raise UserError(
            f"{folder / CONFIG} is not as a run writes it: {why}; name another --out, or begin "
            f"from the run's weights with --model {folder}"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises UserError where it is damaged."""
    path = checkpoint / STATE
    try:
        state = read_json(path)
        if why := misfit(state, _STATE):
            raise ValueError(why)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    found: dict[str, Any] = state
    return found


def unreadable(path: Path, error: Exception) -> UserError:
    """What to say of a checkpoint's file that is damaged."""
    return UserError(
        f"cannot read {path}: {error}; remove {path.parent}, so that the checkpoint before it "
        f"counts"
    )
