"""Options of the commands about runs: one frozen dataclass per command."""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

from xlsd_cache.console.option_checks import CheckedOptions, Every, File, Folder, MayBeEmpty, Within
from xlsd_cache.errors import UserError
from xlsd_train.config.optimization import Rate
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.caption_edits import require_and_forbid


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Predict a run's peak memory by item and its speed, for every memory plan.

    Takes the options of training. Needs neither a GPU nor images: each plan is run on meta tensors,
    which takes some seconds. Speeds are at 100% of a GPU's peak; half of that is good.
    """

    size: tuple[str, ...] = ()
    """Image sizes, e.g. 512x512. Default: the buckets of --data, or 512x512 without a store."""

    cards: Annotated[int, Within(1, 1024)] = 1
    """Plan for this many GPUs in one machine, which share --batch and sum their gradients."""

    link: Annotated[float, Within(0, 10**5, above=True)] | None = None
    """With --cards: bandwidth of each GPU to the others in GB/s each way, as all-reduce tests
    measure it (bus bandwidth)."""

    json: bool = False
    """Print JSON."""

    def check(self) -> None:
        """Refuse several cards without a link, and a link without them."""
        super().check()
        if self.cards > 1 and self.link is None:
            raise UserError(
                f"--cards {self.cards} needs --link, the GB/s between them; give e.g. --link 10"
            )
        if self.cards == 1 and self.link is not None:
            raise UserError(f"--link {self.link:g} does nothing with one card; add --cards")


@dataclass(frozen=True)
class RecipesConfig(CheckedOptions):
    """List the recipes for --recipe, or print one, e.g. as a start for your own.

    A recipe is a TOML file whose keys are the options of training. Options on the command line
    override it, and --phase is not needed.
    """

    name: Positional[str | None] = None
    """Print this recipe, or .toml file. Default: list all, a line each."""


@dataclass(frozen=True)
class TagsConfig(CheckedOptions):
    """Count the tags in a store's captions, and the samples that a selection by tags leaves."""

    store: Positional[Path]
    """A latent store made by `xlsd-cache build`."""

    caption: str | None = None
    """Caption columns as in training: txt, or txt=3,jsonl:wd=1. Default: the only column."""

    require_tags: str | None = None
    """Count only samples that have all of these tags, A,B. Exact match of whole tags."""

    forbid_tags: str | None = None
    """Skip samples that have any of these tags, A,B. Exact match of whole tags."""

    most: Every = 50
    """Show this many tags per column, the most frequent first. 0: all."""

    json: bool = False
    """Print JSON."""

    def check(self) -> None:
        """Refuse what cannot work before the store is opened."""
        require_and_forbid(self.require_tags, self.forbid_tags)


@dataclass(frozen=True)
class EmaConfig(CheckedOptions):
    """Derive an EMA of any length from the snapshots of a run trained with --ema.

    The length is relative to the training so far: sigma_rel, the standard deviation of the EMA
    profile (arXiv 2312.02696). The result can be given to --model.
    """

    run: Positional[Path]
    """The run's folder."""

    out: Positional[Folder]
    """The folder to create."""

    sigma_rel: Annotated[float, Within(0, 12**-0.5, above=True)] = 0.10
    """Length of the average, above 0 and below 0.288, which weights all steps equally."""

    step: Every | None = None
    """End of the average. Default: the step of the newest snapshot."""

    def check(self) -> None:
        """Refuse lengths that no power function has."""
        if self.sigma_rel == 12**-0.5:
            raise UserError(
                f"--sigma-rel {self.sigma_rel:g} is not above 0 and below {12**-0.5:.3f}; give "
                f"e.g. 0.1"
            )


@dataclass(frozen=True)
class ReportConfig(CheckedOptions):
    """Write a self-contained HTML page about a run, or about several side by side.

    Shows settings, loss, learning rate, validation, speed and samples so far, also of a run that is
    still running or was killed.
    """

    runs: Positional[tuple[Path, ...]]
    """The folders of runs."""

    out: Annotated[File | None, arg(aliases=["-o"])] = None
    """The page, .html. Default: RUN/report.html for one run, else report.html."""

    def check(self) -> None:
        """Refuse what cannot work before a log is read."""
        if not self.runs:
            raise UserError("no run is given; give the folder of one run or several")
        if self.out is not None and (self.out.suffix != ".html" or self.out.is_dir()):
            raise UserError(
                f"--out {self.out} is a folder, or does not end in .html; give a file name"
            )


@dataclass(frozen=True)
class LiveConfig(CheckedOptions):
    """Follow runs that go on, in a browser: the page of `report`, which grows by itself.

    Only reads the runs, and only this machine can connect. From another one use e.g. `ssh -L
    8321:localhost:8321`. Closing it, or the page, stops no run.
    """

    runs: Positional[tuple[Path, ...]]
    """The folders of runs, or of a sweep, whose runs appear when they begin."""

    host: str = "127.0.0.1"
    """Serve at this address or name of this machine, to all who reach it, without a password."""

    port: Annotated[int, Within(0, 65535)] = 8321
    """TCP port. 0: any free one."""

    def check(self) -> None:
        """Refuse what cannot work before a run is read."""
        if not self.runs:
            raise UserError("no run is given; give the folder of one run or several")
        if self.host in {"0.0.0.0", "::", "*"}:  # noqa: S104 - refused
            raise UserError(
                f"--host {self.host} is no address that a browser can open; give the one that "
                f"readers use, e.g. 192.168.1.5"
            )


@dataclass(frozen=True)
class SweepConfig(TrainConfig):
    """Train at several learning rates, one after another, and say which is best.

    Takes the options of training. Each rate is an ordinary run in OUT/lr-RATE, with the same seed,
    samples and held-out images. The same command with the same --out resumes. Prints a table and an
    answer, and writes OUT/report.html, which compares all runs.
    """

    rates: Annotated[str, arg(name="lr"), MayBeEmpty()] = ""  # which is then no list of rates
    """Learning rates, e.g. 5e-6,4e-6,3e-6,2e-6."""

    lr: Annotated[Rate | None, Suppress] = None  # each run's own

    out: Folder | None = None
    """Folder of the runs. Default: runs/sweep-PHASE-DATE-TIME."""

    validate_every: Every = 0
    """Measure the loss on held-out images every this many steps, at step 0 and at the end. 0:
    never. Default: a tenth of --stop-after or --steps, or 250 if the length is in epochs."""

    def check_rate(self) -> None:
        """Each run checks its own rate."""
        if self.lr is not None:
            super().check_rate()

    def runs(self, validate_every_given: bool) -> dict[Path, TrainConfig]:
        """Folder -> options of its run, in the order of --lr.

        Raises UserError for fewer than two rates, and for options that no run can have.
        """
        try:
            rates = [float(word) for word in self.rates.split(",")]
        except ValueError:
            raise UserError(
                f"--lr {self.rates!r} is not a list of rates; give e.g. 4e-6,2e-6"
            ) from None
        if len(set(rates)) < 2 or len(set(rates)) < len(rates):
            raise UserError(
                f"--lr {self.rates} has fewer than two rates, or one twice; give e.g. 4e-6,2e-6"
            )
        given = {field.name: getattr(self, field.name) for field in fields(TrainConfig)}
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = self.out or Path("runs") / f"sweep-{self.phase}-{stamp}"
        if (out / "config.json").exists() or (out.exists() and not out.is_dir()):
            raise UserError(f"--out {out} is a run or a file; use another folder for the sweep")
        if not self.validate_every and not validate_every_given:
            length = self.stop_after or self.steps
            given["validate_every"] = max(1, length // 10) if length else 250
        runs = {out / f"lr-{rate}": TrainConfig(**{**given, "lr": rate}) for rate in rates}
        return {folder: replace(run.resolved(), out=folder) for folder, run in runs.items()}
