"""Options of how a command runs: its processes, device, threads, and what it prints."""

import os
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from xlsd_cache.console.option_checks import CheckedOptions, Threads, Within
from xlsd_cache.errors import UserError

Device = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class ProgressOptions(CheckedOptions):
    """Running."""

    quiet: bool = False
    """Show no progress bars: only lines, as without a terminal."""

    json: bool = False
    """Print events on stdout, a JSON object per line: start, progress, and done, stopped or failed.
    No bars."""


@dataclass(frozen=True)
class WorkOptions(CheckedOptions):
    """Running."""

    batch: Annotated[int, Within(1, 10**4)] | None = None
    """Images per VAE call. Default: on a CPU one per core, on a GPU what fits, up to 16, and then
    the same in every build of the store."""

    workers: Threads = os.cpu_count() or 4
    """Images to read and decode at once while the VAE works. Default: one per core."""

    dry_run: bool = False
    """Scan and plan, print what would be done, and write nothing."""


@dataclass(frozen=True)
class ProcessOptions(CheckedOptions):
    """Process."""

    device: Device = "auto"
    """auto: the GPU if there is one."""

    shard: Annotated[str | None, arg(metavar="I/N")] = None
    """This is process I of N (from 0) that build one store together. Each starts with its own part
    and then helps the others. Default: as set by torchrun or accelerate launch."""

    ray: Annotated[str | None, arg(metavar="ADDRESS")] = None
    """Encode on the GPUs of a Ray cluster: HOST:PORT, auto, or local to start one here. All its
    nodes need the store and the sources at the same paths. Needs `pip install 'xlsd[ray]'`."""

    @property
    def part(self) -> tuple[int, int]:
        """(this process's number, number of processes)."""
        return part_of(self.shard)


def part_of(shard: str | None) -> tuple[int, int]:
    """(I, N) of --shard I/N; by default this process of torchrun's or accelerate's.

    Raises UserError for another form.
    """
    if shard is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard, re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard {shard!r} is not I/N with 0 <= I < N; e.g. 0/2")
    return int(match[1]), int(match[2])
