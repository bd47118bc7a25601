"""One frozen dataclass for each command that is about runs; their command lines are generated."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

from xlsd_cache.console.option_checks import Every, File, Folder, MayBeEmpty, Within, check_options
from xlsd_cache.errors import UserError
from xlsd_train.config.optimization import Rate
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.caption_edits import require_and_forbid


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Show what a run would take, before it takes it: peak memory by item, and how fast it can be.

    The flags are those of training. No card and no images are needed: every way of passing the
    batch is run on tensors without data, which takes some seconds. Speeds are what a card does at
    100% of its peaks; half of that is good.
    """

    size: tuple[str, ...] = ()
    """Pictures, say 512x512. Default: the buckets of --data; without a store 512x512."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class RecipesConfig:
    """List the recipes that --recipe knows, or print one, say to begin one's own with.

    A recipe is TOML, its keys the names of training's options. What the command line says beside it
    counts, and --phase need not be said.
    """

    name: Positional[str | None] = None
    """Print this one, whose name may be a .toml file's, as it is. Default: a line for each."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        check_options(self)


@dataclass(frozen=True)
class TagsConfig:
    """Count the tags of a store's captions, and what a selection by tags leaves."""

    store: Positional[Path]
    """The latent store that `xlsd-cache build` made."""

    caption: str | None = None
    """Caption columns as in training: txt, or txt=3,jsonl:wd=1. Default: the store's only one."""

    require_tags: str | None = None
    """Count only samples that have all of these tags, A,B: each whole and as it is written."""

    forbid_tags: str | None = None
    """Count no sample that has any of these tags, A,B: each whole and as it is written."""

    most: Every = 50
    """Tell so many tags of each column, the most frequent first; 0: all."""

    json: bool = False
    """For programs."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before the store is opened."""
        check_options(self)
        require_and_forbid(self.require_tags, self.forbid_tags)


@dataclass(frozen=True)
class EmaConfig:
    """Make an average of a run's weights, of any length, from the snapshots that --ema kept.

    The length is relative to the training so far: sigma_rel, the spread of the moments that count
    (arXiv 2312.02696). What is written is as --model takes it.
    """

    run: Positional[Path]
    """The run's folder."""

    out: Positional[Folder]
    """A new folder for the average."""

    sigma_rel: Annotated[float, Within(0, 12**-0.5, above=True)] = 0.10
    """Length of the average, above 0 and below 0.288, which is all of training alike."""

    step: Every | None = None
    """The average as of this step. Default: the newest snapshot's."""

    def __post_init__(self) -> None:
        """Refuse lengths that no power function has."""
        check_options(self)
        if self.sigma_rel == 12**-0.5:
            raise UserError(
                f"--sigma-rel {self.sigma_rel:g} is not above 0 and below {12**-0.5:.3f}; give say "
                f"0.1"
            )


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about a run, or about several side by side; it needs nothing else.

    Settings, loss, learning rate, validation, speed and samples, as far as a run has come: also of
    one that is going on, or was killed.
    """

    runs: Positional[tuple[Path, ...]]
    """The folders of runs."""

    out: Annotated[File | None, arg(aliases=["-o"])] = None
    """The page, .html. Default: RUN/report.html for one run, else report.html."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before a log is read."""
        check_options(self)
        if not self.runs:
            raise UserError("no run is named; give the folder of one or several")
        if self.out is not None and (self.out.suffix != ".html" or self.out.is_dir()):
            raise UserError(f"--out {self.out} is no name of a page; let it end in .html")


@dataclass(frozen=True)
class SweepConfig(TrainConfig):
    """Train the same at several learning rates, one after another, and say which to take.

    The flags are those of training, and each run is one: in OUT/lr-RATE, of the same seed, samples
    and held-out images. The same command with the same --out goes on where it was. It ends with a
    table, an answer, and OUT/report.html, where all runs lie side by side.
    """

    rates: Annotated[str, arg(name="lr"), MayBeEmpty()] = ""  # which is then no list of rates
    """The rates, say 5e-6,4e-6,3e-6,2e-6."""

    lr: Annotated[Rate | None, Suppress] = None  # each run's own

    out: Folder | None = None
    """The folder of the runs. Default: runs/sweep-PHASE-DATE-TIME."""

    validate_every: Every = 0
    """Measure the loss on held-out images every so many steps, at step 0 and the end; 0 never.
    Default: a tenth of --stop-after or --steps; 250 of a length in epochs."""

    def runs(self, validate_every_given: bool) -> dict[Path, TrainConfig]:
        """Folder -> the run in it, in the order of --lr.

        Raises UserError for rates that are none or fewer than two, and for what no run could be.
        """
        try:
            rates = [float(word) for word in self.rates.split(",")]
        except ValueError:
            raise UserError(
                f"--lr {self.rates!r} is no list of rates; give say 4e-6,2e-6"
            ) from None
        if len(set(rates)) < 2 or len(set(rates)) < len(rates):
            raise UserError(
                f"--lr {self.rates} names no two different rates, or one twice; give say 4e-6,2e-6"
            )
        given = {field.name: getattr(self, field.name) for field in fields(TrainConfig)}
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = self.out or Path("runs") / f"sweep-{self.phase}-{stamp}"
        if (out / "config.json").exists() or (out.exists() and not out.is_dir()):
            raise UserError(f"--out {out} is a run or a file; name another folder for the sweep")
        if not self.validate_every and not validate_every_given:
            length = self.stop_after or self.steps
            given["validate_every"] = max(1, length // 10) if length else 250
        runs = {out / f"lr-{rate}": TrainConfig(**{**given, "lr": rate}) for rate in rates}
        return {folder: replace(run.resolved(), out=folder) for folder, run in runs.items()}


def without(words: Sequence[str], *options: str) -> list[str]:
    """The words of a command line less these options, each of one value."""
    kept, words = [], list(words)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name[2:].replace("_", "-") in options:
            if not equals and words:
                words.pop(0)
        else:
            kept.append(word)
    return kept
