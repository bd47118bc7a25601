"""The command line `xlsd-train`: its commands, their help pages, and what runs each."""

import sys
from collections.abc import Sequence

from xlsd_cache import __version__
from xlsd_cache.console.help import Command, asks_for_help, calls, help_page
from xlsd_cache.console.libraries import quiet, quiet_libraries
from xlsd_cache.console.option_checks import refuse_empty
from xlsd_cache.console.progress import choose, working
from xlsd_cache.console.suggestions import check_command, check_words
from xlsd_cache.console.terminal import ignore_closed_pipe, run, start
from xlsd_train.config.aliases import NAMES
from xlsd_train.config.model_options import ExportConfig, SampleConfig, ScoreConfig, SwapConfig
from xlsd_train.config.recipes import parse, recipe_in
from xlsd_train.config.run_options import (
    EmaConfig,
    LiveConfig,
    PlanConfig,
    RecipesConfig,
    ReportConfig,
    SweepConfig,
    TagsConfig,
)
from xlsd_train.config.train import TrainConfig


def _train(config: TrainConfig, command: Sequence[str]) -> None:
    from xlsd_train.checkpoints.complete import complete
    from xlsd_train.progress.status import Status

    choose(config.quiet, config.json)
    with Status() as status:
        if told := complete(config):
            status.complete(told)
            return
        quiet_libraries()
        from xlsd_train.training.loop import train

        train(config, command, status)


def _sweep(config: SweepConfig, command: Sequence[str]) -> None:
    from xlsd_train.commands.sweep import sweep

    choose(config.quiet, config.json)
    sweep(config, command[2:])


def _export(config: ExportConfig, _: Sequence[str]) -> None:
    from xlsd_train.export.export import export_model

    export_model(**vars(config))


MOST_USED = (
    "phase", "data", "model", "out", "batch", "steps", "epochs", "optimizer", "lr", "recipe",
)  # fmt: skip
TRAIN = Command(
    TrainConfig, _train, first=MOST_USED,
    examples=(
        "xlsd-train train --phase unet --data latents --batch 32 --epochs 2 --out runs/a",
        "xlsd-train train --recipe phase1-te --data latents --model runs/a --out runs/b",
    ),
)  # fmt: skip
COMMANDS = {
    "train": TRAIN,
    "run": TRAIN,
    "plan": Command(
        PlanConfig, calls("xlsd_train.commands.plan:show"),
        first=("phase", "vram", "size", "batch", "json"),
        examples=(
            "xlsd-train plan --phase unet --vram 24",
            "xlsd-train plan --phase te --batch 64 --size 768x768 --json",
        ),
    ),
    "recipes": Command(
        RecipesConfig, calls("xlsd_train.config.recipes:show"),
        examples=("xlsd-train recipes", "xlsd-train recipes phase1-unet > mine.toml"),
    ),
    "tags": Command(
        TagsConfig, calls("xlsd_train.commands.tags:tags"),
        examples=(
            "xlsd-train tags latents",
            "xlsd-train tags latents --require-tags solo --forbid-tags sketch --most 20",
        ),
    ),
    "sweep": Command(
        SweepConfig, _sweep, first=("rates", *MOST_USED, "stop_after"),
        examples=(
            "xlsd-train sweep --lr 5e-6,4e-6,3e-6 --phase te --data latents --stop-after 250",
            "xlsd-train sweep --lr 2e-6,1e-6 --recipe phase2-unet --steps 500 --out runs/sweep",
        ),
    ),
    "report": Command(
        ReportConfig, calls("xlsd_train.report.page:report"),
        examples=("xlsd-train report runs/a", "xlsd-train report runs/a runs/b -o both.html"),
    ),
    "live": Command(
        LiveConfig, calls("xlsd_train.live.server:live"),
        examples=("xlsd-train live runs/a", "xlsd-train live runs/a runs/b --port 9000"),
    ),
    "sample": Command(
        SampleConfig, calls("xlsd_train.commands.sample:compare"),
        examples=(
            "xlsd-train sample runs/a runs/b --prompts prompts.txt",
            "xlsd-train sample before=swapped after=runs/a --prompts prompts.txt --out compared",
        ),
    ),
    "score": Command(
        ScoreConfig, calls("xlsd_train.commands.score:score"),
        examples=("xlsd-train score comparison", "xlsd-train score comparison --real photos"),
    ),
    "export": Command(
        ExportConfig, _export,
        examples=(
            "xlsd-train export runs/a model",
            "xlsd-train export runs/a model.safetensors --format single-file --dtype fp16",
        ),
    ),
    "swap": Command(
        SwapConfig, calls("xlsd_train.export.swap:swap"),
        examples=("xlsd-train swap start", "xlsd-train swap start --vae taesdxl --model runs/a"),
    ),
    "ema": Command(
        EmaConfig, calls("xlsd_train.commands.ema:reconstruct"),
        examples=(
            "xlsd-train ema runs/a averaged",
            "xlsd-train ema runs/a averaged --sigma-rel 0.05 --step 5000",
        ),
    ),
}  # fmt: skip
PRINT = {PlanConfig, RecipesConfig, TagsConfig, ScoreConfig}  # commands that make nothing but text
# Commands that need no torch; training finds out by itself whether it does.
LIGHT = {RecipesConfig, TagsConfig, ReportConfig, LiveConfig, SweepConfig, TrainConfig}
# commands of xlsd-cache
THEIRS = "build watch encode finish info check captions preview export-index import"


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one sentence, no traceback.

    Without a command's name it is `train`. Without `args` it takes those of the process, and
    prepares its streams.
    """
    if args is None:
        start()
    given = list(sys.argv[1:] if args is None else args)
    training = COMMANDS.get(given[0] if given else "", TRAIN) is TRAIN
    told = "; saved checkpoints stand" if training else ""
    return run("xlsd-train", lambda: _main(given), f"stopped at once{told}")


def _main(given: list[str]) -> int:
    named = given[:1] if given[:1] and given[0] in COMMANDS else []
    command, words = COMMANDS[named[0] if named else "train"], given[len(named) :]
    kind, prog = command.options, " ".join(["xlsd-train", *named])
    if words[:1] == ["--version"]:
        print(f"xlsd-train {__version__}")
        return 0
    if not named:
        check_command("xlsd-train", words, list(COMMANDS), THEIRS)
    if asks_for_help(words):
        print(_page(prog, command, words))
        return 0
    refuse_empty(words, kind)
    check_words(words, kind, NAMES)
    config = parse(kind, words, prog)
    if kind not in PRINT:
        ignore_closed_pipe()
    quiet()
    if kind not in LIGHT:
        with working("loading libraries"):
            quiet_libraries()
    return command.run(config, ["xlsd-train", *given]) or 0


def _page(prog: str, command: Command, words: Sequence[str]) -> str:
    """The help of a command, with the defaults of a --recipe; training's lists all commands."""
    recipe = recipe_in(command.options, words)
    default = parse(command.options, ["--recipe", recipe], prog) if recipe else None
    others = {name: it for name, it in COMMANDS.items() if it is not TRAIN}
    return help_page(prog, command, default, others if command is TRAIN else None)
