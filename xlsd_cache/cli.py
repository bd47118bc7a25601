"""The command line `xlsd-cache`: its commands, their help pages, and what runs each."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from xlsd_cache import __version__
from xlsd_cache.console.aliases import NAMES
from xlsd_cache.console.help import Command, asks_for_help, calls, help_page, program_page
from xlsd_cache.console.libraries import quiet, quiet_libraries
from xlsd_cache.console.option_checks import refuse_empty
from xlsd_cache.console.progress import choose, event, working, writes_events
from xlsd_cache.console.suggestions import check_command, check_words
from xlsd_cache.console.terminal import ignore_closed_pipe, run, say, start
from xlsd_cache.errors import UserError
from xlsd_cache.options.build import BuildOptions, EncodeOptions, FinishOptions, PlanOptions
from xlsd_cache.options.captions import CaptionsOptions
from xlsd_cache.options.import_latents import ImportOptions
from xlsd_cache.options.inspection import (
    CheckOptions,
    ExportIndexOptions,
    InfoOptions,
    PreviewOptions,
    StoreReportOptions,
)
from xlsd_cache.options.watch import WatchOptions
from xlsd_cache.options.work import ProgressOptions

if TYPE_CHECKING:
    from xlsd_cache.integrity.accounting import Accounting


# They import late: a help page need not wait for torch and diffusers.
def _build(options: BuildOptions, began: float) -> None:
    with working("loading libraries"):
        from xlsd_cache.commands.build import build

    if counts := build(options, began):
        _say_sums(options.out, counts, "images could be encoded")


def _finish(options: FinishOptions, _: float) -> None:
    from xlsd_cache.building.finish import finish

    with working("writing the index"):
        counts = finish(options.store)
    _say_sums(options.store, counts, "images could be encoded")


def _import(options: ImportOptions, began: float) -> None:
    from xlsd_cache.commands.import_latents import import_caches

    if counts := import_caches(options, began):
        _say_sums(options.out, counts, "latents could be imported")


def _say_sums(out: Path, counts: "Accounting", done: str) -> None:
    """Print what became of every input; `done` as in "images could be encoded".

    Raises UserError for a store of which nothing is live.
    """
    if writes_events():
        event("done", store=out, **asdict(counts))
    else:
        for bucket, count in counts.buckets.items():
            say(f"  {bucket:>9} {count:>9}")
        say(counts)
        if counts.rejected or counts.duplicate:
            say(f"listed in {out / 'rejected.parquet'}")
    if not counts.live:
        raise UserError(
            f"none of the {counts.scanned} {done}; {out / 'rejected.parquet'} lists the reasons"
        )


def _check(options: CheckOptions, _: float) -> int:
    from xlsd_cache.commands.check import check

    return 0 if check(options) else 1


def _watch(options: WatchOptions, _: float) -> None:
    # Arrow reads it when it is loaded; of its own pool 2 MB more would stay after each generation.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    from xlsd_cache.commands.watch import watch

    watch(options)


COMMANDS = {
    "build": Command(
        BuildOptions,
        _build,
        examples=(
            "xlsd-cache build photos --out latents",
            "xlsd-cache build photos scans.tar list.parquet --resolution 768 --captions txt",
        ),
        first=(
            "out", "vae", "resolution", "buckets", "upscale", "captions", "batch", "precision",
            "device", "dry_run",
        ),
    ),
    "plan": Command(
        PlanOptions,
        calls("xlsd_cache.commands.build:print_plan"),
        examples=(
            "xlsd-cache plan photos --out latents",
            "xlsd-cache plan photos --out latents --dry-run",
        ),
        first=("out", "vae", "resolution", "buckets", "upscale", "captions", "batch", "precision",
               "dry_run"),
    ),
    "encode": Command(
        EncodeOptions,
        calls("xlsd_cache.commands.encode:encode"),
        examples=(
            "xlsd-cache encode latents --units 512x512.0,512x512.1",
            "xlsd-cache encode latents --shard 3/64",
        ),
    ),
    "finish": Command(
        FinishOptions,
        _finish,
        examples=("xlsd-cache finish latents", "xlsd-cache finish /data/latents"),
    ),
    "watch": Command(
        WatchOptions,
        _watch,
        examples=(
            "xlsd-cache watch photos --out latents",
            "xlsd-cache watch photos --out latents --min-new 1000 --http 127.0.0.1:8787",
        ),
        first=("out", "every", "settle", "min_new", "max_wait", "http", "vae", "resolution",
               "captions", "device"),
    ),
    "info": Command(
        InfoOptions,
        calls("xlsd_cache.commands.info:info"),
        examples=("xlsd-cache info latents", "xlsd-cache info latents --json > latents.json"),
    ),
    "check": Command(
        CheckOptions,
        _check,
        examples=("xlsd-cache check latents --decode 8", "xlsd-cache check latents --repair"),
    ),
    "captions": Command(
        CaptionsOptions,
        calls("xlsd_cache.commands.captions:recaption"),
        examples=(
            "xlsd-cache captions latents --from photos --columns json:tags",
            "xlsd-cache captions latents --from captions.parquet --columns parquet:text --dry-run",
        ),
    ),
    "preview": Command(
        PreviewOptions,
        calls("xlsd_cache.commands.preview:preview"),
        examples=(
            "xlsd-cache preview latents sheet.png",
            "xlsd-cache preview latents cats.png --tags cat,solo --count 12 --columns 4",
        ),
    ),
    "report": Command(
        StoreReportOptions,
        calls("xlsd_cache.commands.report:report"),
        examples=("xlsd-cache report latents", "xlsd-cache report latents -o page.html --count 0"),
    ),
    "export-index": Command(
        ExportIndexOptions,
        calls("xlsd_cache.commands.export_index:export_index"),
        examples=(
            "xlsd-cache export-index latents samples.parquet",
            "duckdb -c \"select key, bucket from 'samples.parquet' limit 5\"",
        ),
    ),
    "import": Command(
        ImportOptions,
        _import,
        examples=(
            "xlsd-cache import cache --vae sdxl --images photos --out latents",
            "xlsd-cache import photos --vae sd --force --dry-run",
        ),
    ),
}  # fmt: skip
THEIRS = "train run recipes tags ema sweep sample score export swap"  # xlsd-train's


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one sentence, no traceback.

    Without `args` it takes those of the process, and prepares its streams.
    """
    if args is None:
        start()
    return run("xlsd-cache", lambda: _main(sys.argv[1:] if args is None else args))


def _main(words: Sequence[str]) -> int:
    began = time.time()
    if "--version" in words[:2]:
        print(f"xlsd-cache {__version__}")
        return 0
    check_command("xlsd-cache", words, list(COMMANDS), THEIRS)
    command = COMMANDS.get(words[0]) if words else None
    if asks_for_help(words):
        print(_page(words[0], command))
        return 0
    if command is None:
        raise UserError("no command is given; `xlsd-cache --help` lists them all")
    refuse_empty(words)
    check_words(words[1:], command.options, NAMES)
    options = tyro.cli(
        command.options,
        prog=f"xlsd-cache {words[0]}",
        args=words[1:],
        config=(tyro.conf.PositionalMetavarFromFieldName,),
    )
    if not _only_prints(options):
        ignore_closed_pipe()
    if isinstance(options, ProgressOptions):
        choose(options.quiet, options.json)
    quiet()
    if not _is_light(options):
        with working("loading libraries"):
            quiet_libraries()
    return command.run(options, began) or 0


def _page(name: str, command: Command | None) -> str:
    if command is not None:
        return help_page(f"xlsd-cache {name}", command)
    told = "Encode images once into a zarr store of latents, and look after it."
    return program_page("xlsd-cache", told, COMMANDS)


def _is_light(options: Any) -> bool:
    """Whether the command loads neither torch nor diffusers."""
    return isinstance(options, InfoOptions | CaptionsOptions | ExportIndexOptions) or (
        isinstance(options, StoreReportOptions) and options.count == 0
    )


def _only_prints(options: Any) -> bool:
    return isinstance(options, InfoOptions) or (
        isinstance(options, CheckOptions) and not options.repair
    )
