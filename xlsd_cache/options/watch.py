"""Options of `xlsd-cache watch`."""

import re
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Suppress, arg

from xlsd_cache.console.option_checks import CheckedOptions, Count, Within
from xlsd_cache.errors import UserError
from xlsd_cache.options.build import BuildOptions
from xlsd_cache.options.store import RowsPerShard


@dataclass(frozen=True)
class WatchingOptions(CheckedOptions):
    """Watching."""

    every: Annotated[float, Within(0.1, 86400)] = 60.0
    """Seconds between two looks at the sources. Changes on this machine's disks are noticed at
    once, those made by other machines by looking."""

    settle: Annotated[float, Within(0, 86400)] = 10.0
    """Seconds without a change after which a file counts as complete. Until then a new image is not
    there yet, and one that is replaced keeps its latent."""

    min_new: Count = 256
    """Update the store once so many images are new, changed or removed."""

    max_wait: Annotated[str, arg(metavar="TIME")] = "30m"
    """Update the store once a change has waited for so long, whatever --min-new is: 90s, 30m, 12h,
    1d."""

    http: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Serve a page, /status.json, /metrics (Prometheus) and /healthz, e.g. at 127.0.0.1:8787, to
    all who reach it, without a password."""

    @property
    def max_wait_s(self) -> float:
        """--max-wait in seconds. Raises UserError for what is no time."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", self.max_wait, re.ASCII)
        if match is None:
            raise UserError(
                f"--max-wait {self.max_wait!r} is no time; give a number with a unit, e.g. 30m"
            )
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]

    @property
    def address(self) -> tuple[str, int]:
        """--http as host and port. Raises UserError for another form."""
        host, _, port = (self.http or "").rpartition(":")
        if not (host and re.fullmatch(r"\d{1,5}", port, re.ASCII) and int(port) < 2**16):
            raise UserError(f"--http {self.http!r} is not HOST:PORT; e.g. 127.0.0.1:8787")
        if host in {"0.0.0.0", "[::]", "*"}:  # noqa: S104 - refused
            raise UserError(
                f"--http {self.http} is no address that a browser can open; give the one that "
                f"readers use, e.g. 192.168.1.5:8787"
            )
        return host, int(port)


@dataclass(frozen=True)
class WatchOptions(WatchingOptions, BuildOptions):
    """Keep a store up to date with its sources: a build whenever enough has changed.

    Runs next to a downloader until it is stopped. The VAE stays loaded. Files that are still being
    written wait. A source that vanishes, or of which more than half is suddenly gone, is not
    emptied: the store stays as it is until the source is back. A full disk pauses. OUT/status.json
    says how it goes. A `build` of the same store may run at the same time.
    """

    few_rows = 32  # a shard may get the few new images of a generation, and no more

    rows_per_shard: RowsPerShard | None = None
    """Latents per shard file, fixed when the store is created. Default: 32 below 30k images, 1024,
    or 4096 above 4 million."""

    shard: Annotated[str | None, Suppress] = None
    ray: Annotated[str | None, Suppress] = None
    dry_run: Annotated[bool, Suppress] = False
    rehash: Annotated[bool, Suppress] = False

    def check(self) -> None:
        """Raise UserError for what no watcher can use."""
        super().check()
        _ = self.max_wait_s, self.http and self.address
