"""The command line `xlsd-cache`, generated from the dataclasses in config.py."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import tyro

from xlsd_cache import __version__
from xlsd_cache.console.aliases import NAMES
from xlsd_cache.console.libraries import quiet, quiet_libraries
from xlsd_cache.console.option_checks import refuse_empty
from xlsd_cache.console.suggestions import check_command, check_words
from xlsd_cache.console.terminal import go_on_alone, run, start
from xlsd_cache.options import (
    BuildConfig,
    CaptionsConfig,
    CheckConfig,
    ExportIndexConfig,
    ImportConfig,
    InfoConfig,
    PreviewConfig,
)

COMMANDS: dict[str, type[Any]] = {
    "build": BuildConfig,
    "info": InfoConfig,
    "check": CheckConfig,
    "captions": CaptionsConfig,
    "preview": PreviewConfig,
    "export-index": ExportIndexConfig,
    "import": ImportConfig,
}
THEIRS = "train run plan recipes tags ema sweep report sample score export swap"  # xlsd-train's


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one sentence, no traceback.

    Without `args` it is a program of its own, and its words are the command line's.
    """
    if args is None:
        start()
    return run("xlsd-cache", lambda: _main(args))


def _main(args: Sequence[str] | None) -> int:  # noqa: C901
    began = time.time()
    words = list(sys.argv[1:] if args is None else args)
    if "--version" in words[:2]:
        print(f"xlsd-cache {__version__}")
        return 0
    refuse_empty(words)
    check_command("xlsd-cache", words, list(COMMANDS), THEIRS)
    if words and words[0] in COMMANDS:
        check_words(words[1:], COMMANDS[words[0]], NAMES)
    config = tyro.extras.subcommand_cli_from_dict(
        {**COMMANDS},
        prog="xlsd-cache",
        description="Encode images once into a zarr store of latents, and look after it.",
        args=words,
    )
    prints = isinstance(config, InfoConfig) or (
        isinstance(config, CheckConfig) and not config.repair
    )
    if not prints:
        go_on_alone()
    # Imported late: neither --help nor captions need wait for torch and diffusers.
    if isinstance(config, CaptionsConfig):
        from xlsd_cache.commands.captions import recaption

        recaption(config)
        return 0
    if isinstance(config, InfoConfig):
        quiet()
        from xlsd_cache.commands.info import info

        info(config)
        return 0
    quiet_libraries()
    if isinstance(config, BuildConfig):
        from xlsd_cache.commands.build import build
        from xlsd_cache.commands.finish import say_sums

        if counts := build(config, began):
            say_sums(config.out, counts, "images could be encoded")
        return 0
    if isinstance(config, ImportConfig):
        from xlsd_cache.commands.finish import say_sums
        from xlsd_cache.commands.import_latents import import_caches

        if counts := import_caches(config, began):
            say_sums(config.out, counts, "latents could be imported")
        return 0
    if isinstance(config, PreviewConfig):
        from xlsd_cache.commands.preview import preview

        preview(config)
        return 0
    if isinstance(config, ExportIndexConfig):
        from xlsd_cache.commands.export_index import export_index

        export_index(config)
        return 0
    from xlsd_cache.commands.check import check

    return 0 if check(config) else 1
