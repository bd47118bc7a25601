"""Recipes: commented TOML files of a run's options, bundled in recipes/ or the user's own.

A recipe's keys are training's options. Its values go before the words of the command line, and of
two the later counts.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import tyro

from xlsd_cache.console.option_checks import refuse_empty
from xlsd_cache.console.suggestions import check_words, near, option_runs
from xlsd_cache.console.terminal import say, shown
from xlsd_cache.errors import UserError
from xlsd_cache.files.text import read_text
from xlsd_train.config.aliases import NAMES
from xlsd_train.config.run_options import RecipesConfig
from xlsd_train.config.train import TrainConfig

FOLDER = Path(__file__).parent / "recipes"
SIMILAR = 0.5  # how similar a suggested name must be, 0 to 1
# Options whose recipe values are dropped when the command line changes another option.
DEPENDENT = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "optimizer": ("lr", "lr_floor", "betas", "weight_decay", "d_max", "d_growth"),
    "scheduler": ("lr_floor",),
    "loss_weight": ("min_snr_gamma",),
}
Config = TypeVar("Config")


@dataclass(frozen=True)
class Recipe:
    """A recipe whose values were checked."""

    name: str  # as in --recipe
    text: str  # of the file
    words: dict[str, list[str]]  # field of TrainConfig -> words of a command line
    settings: dict[str, Any]  # field of TrainConfig -> value

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """Read a bundled recipe by name, or a .toml file.

        Raises UserError for an unknown name, a file that cannot be read, an unknown key, and an
        invalid value, each with a suggestion.
        """
        path = shipped().get(name, Path(name))
        if path.suffix != ".toml":
            raise UserError(
                f"--recipe {name}: no such recipe{near(name, list(shipped()), SIMILAR)}; "
                f"`xlsd-train recipes` lists them; a file of your own ends in .toml"
            )
        try:
            text = read_text(path, "the recipe")
            given = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # tomllib's is a ValueError
            raise UserError(f"cannot read the recipe {name}: {error}") from error
        try:
            words = _words(given)
            if "phase" not in words:
                raise UserError('it does not say what trains; add phase = "unet" or "te"')
            args = [word for own in words.values() for word in own]
            refuse_empty(args)
            check_words(args, TrainConfig, {})
            config = tyro.cli(TrainConfig, args=args)
        except UserError as error:
            raise UserError(f"recipe {name}: {error}") from error
        return cls(name, text, words, {field: getattr(config, field) for field in words})

    @property
    def summary(self) -> str:
        """Its first line, where that is a comment."""
        first = self.text.partition("\n")[0]
        return first.removeprefix("#").strip() if first.startswith("#") else ""

    def as_args(self, words: Sequence[str] = ()) -> list[str]:
        """Its values as words of a command line, to go before `words`.

        Values that depend on an option which `words` change are left out.
        """
        given = options_in(words)
        gone = {
            other
            for option, value in given.items()
            if str(self.settings.get(option)) != value
            for other in DEPENDENT.get(option, ())
        }
        if re.fullmatch(r"0*\.?0*", given.get("validation_fraction", "1")):
            gone.add("validate_every")  # nothing is held out, so nothing can be measured
        return [word for field, own in self.words.items() if field not in gone for word in own]

    def record(self, config: TrainConfig) -> dict[str, Any]:
        """For the run's config.json: the recipe, and the values that the run has otherwise."""
        return {
            "name": self.name,
            "sha256": sha256(self.text.encode()).hexdigest(),
            "text": self.text,
            "overridden": {
                name.replace("_", "-"): {"recipe": value, "run": getattr(config, name)}
                for name, value in self.settings.items()
                if getattr(config, name) != value
            },
        }


def shipped() -> dict[str, Path]:
    """Name -> file of the bundled recipes."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def show(config: RecipesConfig) -> None:
    """Print a recipe's file, or a line for each bundled recipe."""
    if config.name is not None:
        for line in Recipe.read(config.name).text.splitlines():
            print("\t".join(map(shown, line.split("\t"))))
        return
    recipes = [Recipe.read(name) for name in shipped()]
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        say(f"{recipe.name:<{width}}  {recipe.summary}")


def parse(kind: type[Config], words: Sequence[str], prog: str) -> Config:
    """The options of a command, with the values of a --recipe before its words.

    Raises UserError for an invalid recipe, and for options that do not go together.
    """
    name = recipe_in(kind, words)
    if name is None:
        return tyro.cli(kind, prog=prog, args=words)
    recipe = Recipe.read(name)
    try:
        config = tyro.cli(kind, prog=prog, args=[*recipe.as_args(words), *words])
    except UserError as error:
        raise UserError(
            f"{error} (options that are not given come from the recipe {name}; None unsets an "
            f"option that has no default, e.g. --max-tags None)"
        ) from error
    phase = recipe.settings["phase"]
    if isinstance(config, TrainConfig) and config.phase != phase:
        raise UserError(
            f"--phase {config.phase} does not go with the recipe {name}, whose learning rate and "
            f"length are for {phase}; leave --phase out, or use another recipe"
        )
    return config


def recipe_in(kind: type[Any], words: Sequence[str]) -> str | None:
    """The --recipe on a command line, where the command takes one."""
    name = options_in(words).get("recipe") if issubclass(kind, TrainConfig) else None
    return None if name == "None" else name


def options_in(words: Sequence[str]) -> dict[str, str]:
    """Field name -> the word after each option on a command line; the last one counts."""
    values = {}
    for word, following in option_runs(words)[1:]:
        _, is_, value = word.partition("=")
        values[field_of(word)] = value if is_ else "".join(following[:1])
    return values


def without(words: Sequence[str], *names: str) -> list[str]:
    """A command line less the options of these fields."""
    runs = option_runs(words)
    return [x for word, values in runs if field_of(word) not in names for x in (word, *values) if x]


def field_of(word: str) -> str:
    """The name of an option's field."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _words(given: dict[str, Any]) -> dict[str, list[str]]:
    """Field -> words of a command line. Raises UserError for a key that is no option."""
    keys = {field.name.replace("_", "-"): field.name for field in fields(TrainConfig)}
    del keys["recipe"]
    words = {}
    for key, value in given.items():
        if keys.get(key) == "on_event":
            raise UserError(
                f"{key} = {value!r}: a recipe is passed on, and must not run a program; give "
                f"--on-event on the command line"
            )
        if key not in keys:
            meant = NAMES.get(key.replace("_", "-"), "").removeprefix("--")
            instead = f"; here {meant}" if meant else near(key, list(keys), SIMILAR)
            told = json.dumps(value, default=str)
            raise UserError(f"{key} = {told}: training has no such option{instead}")
        if isinstance(value, dict):
            raise UserError(f"[{key}]: an option is not a table")
        if isinstance(value, bool):
            words[keys[key]] = [f"--{key}" if value else f"--no-{key}"]
        elif isinstance(value, list):
            words[keys[key]] = [f"--{key}", *map(str, value)]
        else:
            words[keys[key]] = [f"--{key}={value}"]
    return words
