"""Options of `xlsd-cache build` and of its parts: `plan`, `encode` and `finish`."""

import os
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from xlsd_cache.console.option_checks import Threads
from xlsd_cache.errors import UserError
from xlsd_cache.options.captions import CaptionColumnOptions, check_columns
from xlsd_cache.options.sources import SourceOptions
from xlsd_cache.options.store import SizeOptions, StoreArgument, StoreOptions, VaeOptions
from xlsd_cache.options.work import (
    Device,
    ProcessOptions,
    ProgressOptions,
    WorkOptions,
    part_of,
)


@dataclass(frozen=True)
class PlanOptions(
    ProgressOptions,
    WorkOptions,
    StoreOptions,
    SizeOptions,
    VaeOptions,
    CaptionColumnOptions,
    SourceOptions,
):
    """Plan what `build` would encode, and print its units for `xlsd-cache encode`.

    A unit is one shard file, called BUCKET.N. Options are those of `build`. Re-running updates the
    plan to the sources.
    """

    few_rows = 256  # rows per shard of a new store of few images

    def check(self) -> None:
        """Raise UserError for what cannot be a caption column."""
        check_columns("--captions", self.caption_columns or ())


@dataclass(frozen=True)
class BuildOptions(ProcessOptions, PlanOptions):
    """Encode images once into a store of latents, or update an existing store.

    Re-running updates the store: new and changed images are encoded, deleted ones dropped, renamed
    ones keep their latents, and duplicates are encoded once. It may be interrupted at any moment;
    the same command continues.
    """

    def check(self) -> None:
        """Raise UserError for what no build can use."""
        PlanOptions.check(self)
        if self.shard:
            part_of(self.shard)
        if self.ray and self.shard:
            raise UserError("--ray and --shard both share out the work; give one of them")


@dataclass(frozen=True)
class EncodeOptions(ProgressOptions, StoreArgument):
    """Encode units of a plan: all, a part, or some by name. Sources are not scanned.

    Any number of processes may encode one store. A unit that is encoded already, or that another
    process encodes, is left alone. A unit that was interrupted is continued from its last batch.
    """

    units: Annotated[str | None, arg(metavar="BUCKET.N,...")] = None
    """Encode these units, comma-separated, as `xlsd-cache plan` prints them."""

    shard: Annotated[str | None, arg(metavar="I/N")] = None
    """Encode part I of N (from 0) of all units. Default: as set by torchrun, else all."""

    vae: str | None = None
    """The VAE, if the plan's is somewhere else on this machine: one with the same encoder."""

    device: Device = "auto"
    """auto: the GPU if there is one."""

    workers: Threads = os.cpu_count() or 4
    """Images to read and decode at once while the VAE works. Default: one per core."""

    json: bool = False
    """Print events on stdout, a JSON object per line: progress, and unit, stopped or failed. No
    bars."""

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The names in --units, each once."""
        return tuple(dict.fromkeys(self.units.split(","))) if self.units else ()

    def check(self) -> None:
        """Raise UserError for what chooses no units."""
        if self.shard:
            part_of(self.shard)
        if self.units and self.shard:
            raise UserError("--units and --shard both choose units; give one of them")


@dataclass(frozen=True)
class FinishOptions(StoreArgument):
    """Finish a store whose units are all encoded: sums, index, table of rejected images.

    While units are pending, it lists them, writes nothing and exits with status 1.
    """
