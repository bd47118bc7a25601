"""The command line `xlsd-train`, generated from each command's dataclass."""

import os
import sys
from collections.abc import Callable, Sequence
from inspect import getdoc
from typing import Any

from xlsd_cache import __version__
from xlsd_cache.console.libraries import quiet, quiet_libraries
from xlsd_cache.console.option_checks import refuse_empty
from xlsd_cache.console.suggestions import check_command, check_words
from xlsd_cache.console.terminal import ignore_closed_pipe, run, say, start
from xlsd_train.config.aliases import NAMES
from xlsd_train.config.model_options import ExportConfig, SampleConfig, ScoreConfig, SwapConfig
from xlsd_train.config.recipes import parse, show
from xlsd_train.config.run_options import (
    EmaConfig,
    PlanConfig,
    RecipesConfig,
    ReportConfig,
    SweepConfig,
    TagsConfig,
)
from xlsd_train.config.train import TrainConfig


# One a command, each importing late: --help need not wait for torch and diffusers.
def _run(config: TrainConfig, command: Sequence[str]) -> None:
    from xlsd_train.checkpoints.complete import complete

    if told := complete(config):
        if os.environ.get("RANK", "0") == "0":  # one of the processes that a launcher started
            say(told)
        return
    quiet_libraries()
    from xlsd_train.training.loop import train

    train(config, command)


def _plan(config: PlanConfig, _: Sequence[str]) -> None:
    from xlsd_train.commands.plan import show

    show(config)


def _recipes(config: RecipesConfig, _: Sequence[str]) -> None:
    show(config.name)


def _tags(config: TagsConfig, _: Sequence[str]) -> None:
    from xlsd_train.commands.tags import tags

    tags(config)


def _sweep(config: SweepConfig, command: Sequence[str]) -> None:
    from xlsd_train.commands.sweep import sweep

    sweep(config, command[2:])


def _report(config: ReportConfig, _: Sequence[str]) -> None:
    from xlsd_train.report.page import report

    report(config)


def _export(config: ExportConfig, _: Sequence[str]) -> None:
    from xlsd_train.export.export import export_model

    export_model(
        config.checkpoint, config.out, format=config.format, dtype=config.dtype,
        scaling_factor=config.scaling_factor, vae=config.vae, model_ema=config.model_ema,
        tokenizer=config.tokenizer,
    )  # fmt: skip


def _swap(config: SwapConfig, _: Sequence[str]) -> None:
    from xlsd_train.export.swap import swap

    swap(config)


def _ema(config: EmaConfig, _: Sequence[str]) -> None:
    from xlsd_train.commands.ema import reconstruct

    reconstruct(config)


def _sample(config: SampleConfig, _: Sequence[str]) -> None:
    from xlsd_train.commands.sample import compare

    compare(config)


def _score(config: ScoreConfig, _: Sequence[str]) -> None:
    from xlsd_train.commands.score import score

    score(config)


# command -> (its dataclass, what runs it given that and the words of the command line)
COMMANDS: dict[str, tuple[type[Any], Callable[[Any, Sequence[str]], None]]] = {
    "run": (TrainConfig, _run),
    "train": (TrainConfig, _run),
    "plan": (PlanConfig, _plan),
    "recipes": (RecipesConfig, _recipes),
    "tags": (TagsConfig, _tags),
    "ema": (EmaConfig, _ema),
    "sweep": (SweepConfig, _sweep),
    "report": (ReportConfig, _report),
    "sample": (SampleConfig, _sample),
    "score": (ScoreConfig, _score),
    "export": (ExportConfig, _export),
    "swap": (SwapConfig, _swap),
}

PRINT = {PlanConfig, RecipesConfig, TagsConfig, ScoreConfig}  # commands that make nothing but text
# Commands that need no torch; training finds out by itself whether it does.
LIGHT = {RecipesConfig, TagsConfig, ReportConfig, SweepConfig, TrainConfig}
THEIRS = "build info check captions preview export-index import"  # commands of xlsd-cache


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one sentence, no traceback.

    Without a command's name it is `train`; without `args` it is a program of its own.
    """
    if args is None:
        start()
    given = list(sys.argv[1:] if args is None else args)
    named = given[:1] if given[:1] and given[0] in COMMANDS else []
    kind, command = COMMANDS[named[0] if named else "run"]

    def run_it() -> int:
        words = given[len(named) :]
        if words[:1] == ["--version"]:
            print(f"xlsd-train {__version__}")
            return 0
        if not named:
            check_command("xlsd-train", words, list(COMMANDS), THEIRS)
        refuse_empty(words, kind)
        check_words(words, kind, NAMES)
        prog = " ".join(["xlsd-train", *named])
        config = parse(kind, words, prog=prog, description=_describe(kind))
        if kind not in PRINT:
            ignore_closed_pipe()
        quiet() if kind in LIGHT else quiet_libraries()
        command(config, ["xlsd-train", *given])
        return 0

    told = "; the last checkpoint stands" if kind is TrainConfig else ""
    return run("xlsd-train", run_it, f"stopped at once{told}")


def _describe(kind: type[Any]) -> str:
    """A command's description; training's also lists the other commands."""
    text = getdoc(kind) or ""
    if kind is not TrainConfig or len(COMMANDS) == 1:
        return text
    lines = [
        f"  xlsd-train {name:<8} {(getdoc(other) or '').partition(chr(10))[0]}"
        for name, (other, _) in COMMANDS.items()
        if other is not kind
    ]
    return "\n".join([text, "", "Other commands, each with its own --help:", *lines])
