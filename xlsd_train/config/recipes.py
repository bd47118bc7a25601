"""Recipes: settings of a run as commented TOML, shipped in recipes/ or one's own.

A recipe's keys are the names of training's options. It gives defaults: what the command line says
counts, though it be the default that there would be without a recipe.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from xlsd_cache.console.suggestions import near
from xlsd_cache.console.terminal import say, shown
from xlsd_cache.errors import UserError
from xlsd_cache.files.text import read_text
from xlsd_train.config.aliases import NAMES
from xlsd_train.config.train import TrainConfig

FOLDER = Path(__file__).parent / "recipes"
ALIKE = 0.5  # how near a name must be to be taken for a slip
# An option that changes what others are about: with another value of it these are not the recipe's.
GOES_WITH = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "optimizer": ("lr", "lr_floor", "betas", "weight_decay", "d_max", "d_growth"),
    "scheduler": ("lr_floor",),
    "loss_weight": ("min_snr_gamma",),
}
Config = TypeVar("Config")


@dataclass(frozen=True)
class Recipe:
    """One recipe, read and found to be possible settings."""

    name: str  # as --recipe has it
    text: str  # of the file
    settings: dict[str, Any]  # field of TrainConfig -> value

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """A shipped recipe by name, or a .toml file.

        Raises UserError for another name, a file that cannot be read, and an unknown key or a value
        that is none of its key's, each with the nearest right one.
        """
        path = shipped().get(name, Path(name))
        if path.suffix != ".toml":
            raise UserError(
                f"--recipe {name}: there is none of this name{near(name, list(shipped()), ALIKE)}; "
                f"`xlsd-train recipes` lists them, and one's own is a file that ends in .toml"
            )
        try:
            text = read_text(path, "the recipe")
            given = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # tomllib's is a ValueError
            raise UserError(f"cannot read the recipe {name}: {error}") from error
        hints = get_type_hints(TrainConfig)
        keys = {field.name.replace("_", "-"): field.name for field in fields(TrainConfig)}
        del keys["recipe"]
        settings = {}
        for key, value in given.items():
            told = f"recipe {name}: {key} = {json.dumps(value, default=str)}"
            if key not in keys:
                meant = NAMES.get(key.replace("_", "-"), "").removeprefix("--")
                instead = f"; here {meant}" if meant else near(key, list(keys), ALIKE)
                raise UserError(f"{told}: training has no such option{instead}")
            settings[keys[key]] = _fitted(value, hints[keys[key]], told)
        if "phase" not in settings:
            raise UserError(f'recipe {name} does not say what trains; add phase = "unet" or "te"')
        try:
            TrainConfig(**settings)
        except UserError as error:
            raise UserError(f"recipe {name}: {error}") from error
        return cls(name, text, settings)

    @property
    def summary(self) -> str:
        """Its first line, where that is a comment."""
        first = self.text.partition("\n")[0]
        return first.removeprefix("#").strip() if first.startswith("#") else ""

    def defaults(self, words: Sequence[str]) -> dict[str, Any]:
        """The settings, but for those that go with an option which the command line changes."""
        given = options_in(words)
        gone = {
            other
            for option, value in given.items()
            if str(self.settings.get(option)) != value
            for other in GOES_WITH.get(option, ())
        }
        if re.fullmatch(r"0*\.?0*", given.get("validation_fraction", "1")):
            gone.add("validate_every")  # with what is held out goes what measures it
        return {name: value for name, value in self.settings.items() if name not in gone}

    def record(self, config: TrainConfig) -> dict[str, Any]:
        """For the run's config.json: what it was, and which of its settings are not the run's."""
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
    """Name -> file of the recipes that come with the program."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def show(name: str | None) -> None:
    """Print a recipe as it is, or a line for each that is shipped."""
    if name is not None:
        for line in Recipe.read(name).text.splitlines():
            print("\t".join(map(shown, line.split("\t"))))
        return
    recipes = [Recipe.read(name) for name in shipped()]
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        say(f"{recipe.name:<{width}}  {recipe.summary}")


def parse(kind: type[Config], words: Sequence[str], prog: str, description: str) -> Config:
    """A command's settings from its words, with the defaults of a --recipe among them.

    Raises UserError for a recipe that is none, and for what training refuses.
    """
    name = options_in(words).get("recipe") if issubclass(kind, TrainConfig) else None
    if name is None or name == "None":
        return tyro.cli(kind, prog=prog, description=description, args=words)
    recipe = Recipe.read(name)
    try:
        default = kind(**recipe.defaults(words))
        config = tyro.cli(kind, prog=prog, description=description, args=words, default=default)
    except UserError as error:
        raise UserError(
            f"{error} (what the command line leaves out is as the recipe {name} has it; an option "
            f"that has no default is left out by None, as in --max-tags None)"
        ) from error
    phase = recipe.settings["phase"]
    if isinstance(config, TrainConfig) and config.phase != phase:
        raise UserError(
            f"--phase {config.phase} with the recipe {name}, whose rates and length are for "
            f"{phase}; leave --phase out, or take another recipe"
        )
    return config


def options_in(words: Sequence[str]) -> dict[str, str]:
    """Field name -> the word behind each option; of those given twice the last, as tyro has it."""
    found = {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word.startswith("--"):
            option, is_, value = word[2:].partition("=")
            found[option.replace("-", "_")] = value if is_ else following
    return found


def _fitted(value: object, hint: Any, told: str) -> Any:
    """A TOML value as a field of this type has it. Raises UserError where it cannot be."""
    kinds = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if any(value == x and type(value) is type(x) for x in get_args(kind)):
                return value
        elif get_origin(kind) is tuple:
            of = get_args(kind)
            if isinstance(value, list) and of[-1] is Ellipsis:
                return tuple(_fitted(x, of[0], told) for x in value)
            if isinstance(value, list) and len(value) == len(of):
                return tuple(_fitted(x, y, told) for x, y in zip(value, of, strict=True))
        elif kind is float and type(value) in {int, float}:
            return float(value)  # type: ignore[arg-type]
        elif kind is Path and isinstance(value, str) and value:
            return Path(value)
        elif type(value) is kind:
            return value
    right = [x for kind in kinds if get_origin(kind) is Literal for x in get_args(kind)]
    wanted = " or ".join(_called(kind) for kind in kinds if kind is not type(None))
    raise UserError(f"{told} is not {wanted}{near(str(value), [str(x) for x in right], ALIKE)}")


def _called(kind: Any) -> str:
    """A type in words, as TOML writes it."""
    if get_origin(kind) is Literal:
        return " or ".join(json.dumps(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        of = get_args(kind)
        count = "" if of[-1] is Ellipsis else f" of {len(of)}"
        return f"a list{count}, each {_called(of[0])}"
    names = {float: "a number", int: "a whole number", bool: "true or false"}
    return names.get(kind, "text in quotes")
