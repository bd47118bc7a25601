"""Which options a resume compares, by their effect. Loads no torch.

Options that only start a run (START) are part of its checkpoint. Options of its length (LENGTH) are
compared by the learning rates that follow. FREE options change no weight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from xlsd_cache.errors import UserError
from xlsd_train.config.train import FREE, TrainConfig
from xlsd_train.data.caption_edits import tag_list

PLACES = ("model", "unet", "text_encoder", "tokenizer", "vae")  # paths or hub ids
START = (*PLACES, "model_ema", "tokens", "reinit")
LENGTH = ("steps", "epochs", "warmup")
SPECIAL = {*FREE, *START, *LENGTH, "data"}  # not compared by value
# A checkpoint's optimizer state fits no other value.
FIXED = ("phase", "train", "optimizer")
_IMPLY_TAGS = ("tags", "drop_tags", "underscores_to_spaces", "tag_dropout", "max_tags")
_OPTIONS = {option.name for option in fields(TrainConfig)}
_DEFAULTS = {x.name: x.default for x in fields(TrainConfig) if x.default is not MISSING}

CaptionReader = Callable[[str | None], Any]  # --caption -> columns


def differing(
    old: Mapping[str, Any], new: Mapping[str, Any], caption: CaptionReader = lambda given: given
) -> dict[str, Any]:
    """Name -> old value of each differing setting that could change a weight.

    `old` may be of an earlier version: a missing option had the effect of its default, and other
    missing settings were not recorded.
    """
    differ = {}
    old = {**{name: _DEFAULTS[name] for name in new if name in _DEFAULTS}, **old}
    for name in sorted((old.keys() & new.keys()) - SPECIAL):
        was, now = (_effect(name, values, caption) for values in (old, new))
        if was != now:
            differ[name] = old[name]
    for name in _unneeded(old, new):
        differ.pop(name, None)
    return differ


def plan_options(asked: Mapping[str, Any], plans: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Name -> old value of the options that choose a memory plan: what is asked, where it is used.

    `plans` are the run's first and those that it used later, as in config.json and state.json.
    """
    old = {"attention": (*plans[0], "sdpa")[2]}  # older plans had only the first two
    if asked.get("attention") == "auto":
        old["attention"] = "auto"
    for place, name in enumerate(("memory", "micro_batch")):
        if asked.get(name) in {plan[place] for plan in plans}:
            old[name] = asked[name]
    return old


def _unneeded(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Options that change no weight, given the values of others."""
    if old.get("ema") and not new.get("ema"):  # averages may end, but not start later
        return ["ema", "ema_every"]
    return []


def _effect(name: str, values: Mapping[str, Any], caption: CaptionReader) -> Any:
    """An option's value, normalised so that values of the same effect are equal."""
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
    """Name -> old value of each given option that would have started the run differently.

    Options that are not given are not compared: the checkpoint has them.
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
    return name in old and _effect(name, old, str) == _effect(name, new, str)


def place(given: str) -> Path:
    """A path, normalised; hub ids stay comparable too."""
    return Path(given).expanduser().resolve()


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Each setting with its old and its new value, in words."""
    return ", ".join(f"{_label(name)} {value} (now {now.get(name)})" for name, value in was.items())


def refusal(folder: object, differ: str) -> UserError:
    """The error for a run that cannot be resumed bit-exactly."""
    return UserError(
        f"{folder} was started with {differ}; use the same, another --out, or --force (not "
        f"bit-exact)"
    )


def _label(name: str) -> str:
    return f"--{name.replace('_', '-')}" if name in _OPTIONS else name
