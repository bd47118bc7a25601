"""What a resume compares: what could change a weight, by what it means and not how it is written.

What only begins a run (START) is in its checkpoint; what says how long it is (LENGTH) matters by
the rates that follow from it; and FREE changes no weight at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from xlsd_cache.errors import UserError
from xlsd_train.config.train import FREE, TrainConfig
from xlsd_train.data.caption_edits import tag_list

PLACES = ("model", "unet", "text_encoder", "tokenizer", "vae")  # options that name a place
START = (*PLACES, "model_ema", "tokens", "reinit")
LENGTH = ("steps", "epochs", "warmup")
APART = {*FREE, *START, *LENGTH, "data"}  # not compared as they are
# Without the one that a checkpoint was made with, its optimizer's state fits nothing.
FIXED = ("phase", "train", "optimizer")
_IMPLY_TAGS = ("tags", "drop_tags", "underscores_to_spaces", "tag_dropout", "max_tags")
_DEFAULTS = {x.name: x.default for x in fields(TrainConfig) if x.default is not MISSING}

Read = Callable[[str | None], Any]  # --caption -> columns


def differing(
    old: Mapping[str, Any], new: Mapping[str, Any], caption: Read = lambda given: given
) -> dict[str, Any]:
    """Name -> the old value of each setting that could make another weight.

    `old` may be of an earlier version: an option that it lacks had the effect of its default, and
    what else it lacks was not written down.
    """
    found = {}
    old = {**{name: _DEFAULTS[name] for name in new if name in _DEFAULTS}, **old}
    for name in sorted((old.keys() & new.keys()) - APART):
        was, now = (_meaning(name, values, caption) for values in (old, new))
        if was != now:
            found[name] = old[name]
    for name in _unneeded(old, new):
        found.pop(name, None)
    return found


def _unneeded(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Options that change no weight by the values of others."""
    if old.get("ema") and not new.get("ema"):  # averages may end; they cannot begin in the middle
        return ["ema", "ema_every"]
    return []


def _meaning(name: str, values: Mapping[str, Any], caption: Read) -> Any:
    """An option's value such that two which do the same are equal."""
    value = values[name]
    if name in {"require_tags", "forbid_tags", "drop_tags"}:
        return frozenset(tag_list(name, value))
    if name in {"train", "reinit"}:
        return value and frozenset(piece.strip() for piece in value.split(",") if piece.strip())
    if name == "tags":
        return any(values.get(x) for x in _IMPLY_TAGS) or values.get("shuffle") == "tags"
    if name == "lr_floor":
        return value or 0.0
    if name == "caption":
        return caption(value)
    return list(value or ()) if name == "betas" else value


def other_start(old: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Name -> the old value of each option that is given and would begin the run otherwise.

    What is left out asks for nothing: the checkpoint holds it.
    """
    new = {name: getattr(config, name) for name in START}
    return {
        name: old.get(name)
        for name, value in new.items()
        if value and not _same_start(name, old, new)
    }


def _same_start(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    was: Any = old.get(name)
    now: Any = new[name]
    if name in PLACES:
        return was is not None and place(was) == place(now)
    return name in old and _meaning(name, old, str) == _meaning(name, new, str)


def place(given: str) -> Path:
    """A path however it is written; other names, as of the hub, come to no harm by it."""
    return Path(given).expanduser().resolve()


def told(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """For people: each option, what it was and what it is."""
    return ", ".join(f"{name} {value} and not {now.get(name)}" for name, value in was.items())


def refuse(folder: object, differ: str) -> UserError:
    """The sentence for a run that would not go on as it began."""
    return UserError(
        f"{folder} was begun with {differ}; give the same again, another --out, or --force to go "
        f"on inexactly"
    )
