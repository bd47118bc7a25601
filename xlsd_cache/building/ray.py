"""`build --ray`: encodes units on a Ray cluster. The store remembers what is done, not Ray.

An actor has one unit at a time, which returns to the queue if the actor or its node is lost.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection
from typing import Any

from xlsd_cache.building.shared_files import check_shared, locked_probe
from xlsd_cache.building.worker import Outcome, Worker
from xlsd_cache.console.progress import only_events_on_stdout
from xlsd_cache.errors import UserError, one_line


class RemoteWorker:
    """A Worker in an actor's process."""

    def start(self, seen: tuple[Path, list[Path]], store: Path, device: Any, cpus: int) -> None:
        """Prepare; the VAE is loaded with the first unit, its precision set explicitly."""
        check_shared(*seen)
        self._worker = Worker(store, device=device, workers=cpus)

    def encode(self, unit: str) -> Outcome:
        """Worker.encode, with a pause where another process holds the unit."""
        outcome = self._worker.encode(unit)
        time.sleep(outcome.status == "held")
        return outcome


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Connect to a Ray cluster, or start one for `local`; yields the module ray."""
    try:
        import ray  # not needed without --ray

        host, _, port = address.rpartition(":")
        if host and "/" not in host:  # Ray itself would wait for minutes
            create_connection((host, int(port)), 10).close()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        session = ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        give = "give HOST:PORT as `ray start --head` prints it, auto, or local"
        fix = "`pip install 'xlsd[ray]'`" if isinstance(error, ImportError) else give
        raise UserError(f"--ray {address}: {one_line(error).rstrip('.')}; {fix}") from error
    with session, only_events_on_stdout():  # Ray prints what becomes of its nodes
        yield ray


def outcomes(
    ray: Any, store: Path, sources: list[Path], device: str, queue: deque[str]
) -> Generator[Outcome | None]:
    """What becomes of the units of a queue that may grow, until it is closed; at times None."""
    actors, free, lost = dict[Any, Any](), set[Any](), Counter[Any]()
    running: dict[Any, tuple[Any, str]] = {}  # call -> place, unit
    with locked_probe(store) as probe:
        while True:
            for place, options in _places(ray, device).items():
                if place not in actors:
                    actor = actors[place] = ray.remote(RemoteWorker).options(**options).remote()
                    given = (probe, sources), store, device, options["num_cpus"]
                    running[actor.start.remote(*given)] = place, ""
            while queue and free:
                place, unit = free.pop(), queue.popleft()
                running[actors[place].encode.remote(unit)] = place, unit
            time.sleep(not running)
            yield None
            for call in ray.wait([*running], timeout=1)[0]:
                place, unit = running.pop(call)
                try:
                    yield ray.get(call)
                    free.add(place)
                except ray.exceptions.RayTaskError as error:
                    raise UserError(f"Ray node {error.ip}: {one_line(error.cause, 999)}") from error
                except ray.exceptions.RayError as error:
                    ray.kill(actors.pop(place))
                    queue.extendleft([unit] if unit else [])
                    lost[unit or place] += 1
                    if lost[unit or place] == 5:
                        raise UserError(f"Ray lost 5 workers: {one_line(error, 999)}") from error


def _places(ray: Any, device: str) -> dict[Any, dict[str, Any]]:
    """Each GPU, or each node where there are none: (node, number) -> options of its actor."""
    nodes = {it["NodeID"]: it["Resources"] for it in ray.nodes() if it["Alive"]}
    gpus = device != "cpu" and any("GPU" in has for has in nodes.values())
    pin, places = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy, dict[Any, Any]()
    for node, has in nodes.items():
        cpus = int(has.get("CPU", 0))
        count = int(has.get("GPU", 0)) if gpus else min(cpus, 1)
        there = {"num_gpus": int(gpus), "scheduling_strategy": pin(node, soft=False)}
        there["num_cpus"] = max(1, cpus // max(1, count))
        places |= {(node, number): there for number in range(count)}
    return places
