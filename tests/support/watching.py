"""A real `xlsd-cache watch` in a process of its own, and what it tells."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import cache, spawn, wait_for
from xlsd_cache.store.reader import LatentStore

FAST = ("--every", 0.2, "--settle", 0.3, "--min-new", 1, "--batch", 1, "--workers", 1)
SIZES = ("--buckets", "64x64,128x64")
Command = Callable[..., int]


@dataclass
class Watched:
    """A watcher that runs."""

    process: Any
    out: Path
    log: Path

    def status(self) -> dict[str, Any]:
        """The status of this process; nothing before it has told any."""
        try:
            told: dict[str, Any] = json.loads((self.out / "status.json").read_text())
        except FileNotFoundError:
            return {}
        return told if told["pid"] == self.process.pid else {}

    def wait(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The first status for which the condition holds."""
        found: dict[str, Any] = {}

        def holds() -> bool:
            assert self.process.is_alive(), self.log.read_text()[-3000:]
            found.update(self.status())
            return bool(found and condition(found))

        wait_for(holds, 120)
        return found

    def reaches(self, state: str) -> dict[str, Any]:
        """The first status with this state."""
        return self.wait(lambda told: told["state"] == state)

    def passes(self, count: int = 2) -> dict[str, Any]:
        """The status after so many more passes that began from now on."""
        begun = self.status().get("passes", 0) + 1
        return self.wait(lambda told: told["passes"] >= begun + count)

    def live(self, count: int) -> dict[str, Any]:
        """The status once a generation has so many live images, and nothing waits."""
        return self.wait(
            lambda told: told["state"] == "idle" and (told["sums"] or {}).get("live") == count
        )

    def kill(self) -> None:
        """Kill it; what it started ends by itself."""
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """End it as a service is ended; it must succeed."""
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.join(60)
        assert self.process.exitcode == 0, self.log.read_text()[-3000:]
        assert "Traceback" not in self.log.read_text()


@contextmanager
def watching(
    images: Path, out: Path, vae: Path, *more: object, command: Command = cache
) -> Iterator[Watched]:
    """The watcher of a folder; it must end by SIGTERM, unless it was killed or stopped."""
    log = out.with_name(f"{out.name}.log")
    words = ("watch", images, "--out", out, "--vae", vae, *SIZES, *FAST, *more)
    it = Watched(spawn(command, *words, log=log), out, log)
    try:
        yield it
        if it.process.is_alive():
            it.stop()
    finally:
        it.kill()


def keys(out: Path) -> set[str]:
    """The names of the store's images, without their source."""
    with LatentStore.open(out) as store:
        return {key.partition("/")[2] for key in store.samples["key"].to_pylist()}
