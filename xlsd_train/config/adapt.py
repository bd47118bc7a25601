"""Adapts defaults and recipe values to small data, which recipes are not written for.

Options on the command line, and values in a config that differ from the default, are never changed:
if they are impossible, the run is refused. Changes are recorded in config.json, "adapted", and a
resumed run takes them from there, so that it holds out the same images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xlsd_cache.dataset.selection import Mask
from xlsd_cache.errors import UserError
from xlsd_train.config.recipes import Recipe, options_in
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.mixture import Mixture
from xlsd_train.data.selection import columns_of, filter_by_tags, held_out_mask

# Images to hold out -> fractions to try. They are few, so that a store that grows a little, or runs
# on different parts of it, mostly hold out the same images.
SHARES: dict[int, Sequence[float]] = {8: (0.01, 0.02, 0.05, 0.1), 4: (0.1, 0.2)}
AT_ANY_RATE: dict[int, Sequence[float]] = {
    2: (0.2, 0.3, 0.5)
}  # where the command line asks for validation
PLENTY = 100  # with so many nothing is counted, which takes a while in stores of millions
Changes = dict[str, dict[str, Any]]  # option -> from, to, why; written to config.json


def chosen(config: TrainConfig, command: Sequence[str]) -> frozenset[str]:
    """The fields that the user chose: on the command line, or other than the default."""
    default = Recipe.read(config.recipe).settings if config.recipe else {}
    adaptable = ("batch", "validation_fraction", "validate_every", "require_tags", "warmup")
    return frozenset(options_in(command)) | {
        name
        for name in adaptable
        if getattr(config, name) != default.get(name, getattr(TrainConfig, name))
    }


def adapt(
    config: TrainConfig, store: Mixture, given: frozenset[str], before: Changes | None
) -> tuple[TrainConfig, Changes]:
    """The resolved options, adapted to the store, and what was changed.

    `before` are the changes of a run that is resumed. Raises UserError if validation is asked
    for and there are too few images.
    """
    if before is not None:
        changes = {
            name: each
            for name, each in before.items()
            if name not in given and getattr(config, name) == each["from"]
        }
        return _changed(config, changes), changes
    changes = {}
    for adaptation in (_tags, _validation, _batch):
        changes |= adaptation(_changed(config, changes), store, given)
    return _changed(config, changes), changes


def _changed(config: TrainConfig, changes: Changes) -> TrainConfig:
    return replace(config, **{name: each["to"] for name, each in changes.items()})


def _tags(config: TrainConfig, store: Mixture, given: frozenset[str]) -> Changes:
    if config.require_tags is None or "require_tags" in given or not len(store):
        return {}
    try:
        _selected(config, store)
    except UserError:
        why = (
            f"no image of {store.root} has the tags {config.require_tags} that the recipe asks "
            f"for: images are not chosen by tags"
        )
        return {"require_tags": {"from": config.require_tags, "to": None, "why": why}}
    return {}


def _validation(config: TrainConfig, store: Mixture, given: frozenset[str]) -> Changes:
    if not config.validate_every or "validation_fraction" in given:
        return {}
    mask, old = _selected(config, store), config.validation_fraction or 0.0
    if old * mask.sum() > PLENTY:
        return {}
    asked = "validate_every" in given
    for least, share in _shares(old, SHARES | (AT_ANY_RATE if asked else {})):
        held = int((mask & held_out_mask(store, share)).sum())
        if min(held, int(mask.sum()) - held) >= min(least, config.validation_images):
            if share == old:
                return {}
            why = (
                f"--validation-fraction {share:g} in place of {old:g}, for so few images: {held} "
                f"of {mask.sum()} are held out"
            )
            return {"validation_fraction": {"from": old, "to": share, "why": why}}
    if asked:
        raise UserError(
            f"--validate-every {config.validate_every} is not possible: the {mask.sum()} images of "
            f"{store.root} are too few to hold some out; leave it out, or use 0"
        )
    why = f"nothing is measured: {mask.sum()} images are too few to hold any out"
    return {
        "validate_every": {"from": config.validate_every, "to": 0, "why": why},
        "validation_fraction": {"from": old, "to": 0.0, "why": ""},
    }


def _batch(config: TrainConfig, store: Mixture, given: frozenset[str]) -> Changes:
    if config.batch == "auto" or "batch" in given:
        return {}
    mask = _selected(config, store)
    if mask.sum() * (1 - (config.validation_fraction or 0.0)) > PLENTY * config.batch:
        return {}
    count = int((mask & ~held_out_mask(store, config.validation_fraction or 0.0)).sum())
    if not 0 < count < config.batch:
        return {}
    why = f"--batch {count} in place of {config.batch}: there are no more images to train on"
    return {"batch": {"from": config.batch, "to": count, "why": why}}


def _shares(old: float, wanted: Mapping[int, Sequence[float]]) -> Iterator[tuple[int, float]]:
    for least, shares in wanted.items():
        for share in (old, *shares):
            if share >= old:
                yield least, share


def _selected(config: TrainConfig, store: Mixture) -> Mask:
    """Samples that the tags leave."""
    columns = columns_of(store, config.caption)
    return filter_by_tags(store, columns.names, *config.selected_tags()).mask
