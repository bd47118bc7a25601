"""The command line `xlsd-cache`, generated from the dataclasses in config.py."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Annotated

import tyro

from xlsd_cache.config import (
    BuildConfig,
    CaptionsConfig,
    CheckConfig,
    ExportIndexConfig,
    ImportConfig,
    InfoConfig,
    PreviewConfig,
)
from xlsd_cache.options import refuse_empty
from xlsd_cache.terminal import go_on_alone, run, start

Command = (
    Annotated[BuildConfig, tyro.conf.subcommand("build")]
    | Annotated[InfoConfig, tyro.conf.subcommand("info")]
    | Annotated[CheckConfig, tyro.conf.subcommand("check")]
    | Annotated[CaptionsConfig, tyro.conf.subcommand("captions")]
    | Annotated[PreviewConfig, tyro.conf.subcommand("preview")]
    | Annotated[ExportIndexConfig, tyro.conf.subcommand("export-index")]
    | Annotated[ImportConfig, tyro.conf.subcommand("import")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one sentence, no traceback.

    Without `args` it is a program of its own, and its words are the command line's.
    """
    if args is None:
        start()
    return run("xlsd-cache", lambda: _main(args))


def _main(args: Sequence[str] | None) -> int:
    began = time.time()
    refuse_empty(sys.argv[1:] if args is None else args)
    config = tyro.cli(
        Command,
        prog="xlsd-cache",
        description="Encode images once into a zarr store of latents, and look after it.",
        args=args,
    )
    prints = isinstance(config, InfoConfig) or (
        isinstance(config, CheckConfig) and not config.repair
    )
    if not prints:
        go_on_alone()
    # Imported late: neither --help nor captions need wait for torch and diffusers.
    if isinstance(config, CaptionsConfig):
        from xlsd_cache.recaption import recaption

        recaption(config)
        return 0
    quiet_libraries()
    if isinstance(config, BuildConfig):
        from xlsd_cache.build import build

        build(config, began)
        return 0
    if isinstance(config, InfoConfig):
        from xlsd_cache.info import info

        info(config)
        return 0
    if isinstance(config, ImportConfig):
        from xlsd_cache.importing import import_caches

        import_caches(config, began)
        return 0
    if isinstance(config, PreviewConfig):
        from xlsd_cache.preview import preview

        preview(config)
        return 0
    if isinstance(config, ExportIndexConfig):
        from xlsd_cache.export_index import export_index

        export_index(config)
        return 0
    from xlsd_cache.check import check

    return 0 if check(config) else 1


def quiet_libraries() -> None:
    """No bars and notices of the libraries' own between ours; their errors still raise.

    In a log file our own bars are renewed every ten seconds instead of ten times a second.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # tqdm reads it when it is imported
    # What Pillow stumbles over in files that it does not name: they get a reason where it matters.
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
