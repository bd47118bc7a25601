"""`xlsd-cache encode`: encode units of a plan, in this process."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from xlsd_cache.building.worker import Outcome, Worker
from xlsd_cache.console.progress import event, writes_events
from xlsd_cache.console.terminal import say
from xlsd_cache.errors import Stopped
from xlsd_cache.options.build import EncodeOptions
from xlsd_cache.options.work import part_of
from xlsd_cache.planning.units import planned_units
from xlsd_cache.runtime.signals import STOPPING, StopSignal
from xlsd_cache.store.view import StoreView

log = logging.getLogger("xlsd.cache.commands")


def encode(options: EncodeOptions) -> None:
    """Encode the units asked for, and print what became of each."""
    units = list(options.unit_names) or _part(options)
    with Worker(
        options.store, options.vae, device=options.device, workers=options.workers
    ) as worker:
        outcomes = encode_until_stopped(worker, units)
    for outcome in outcomes:
        if writes_events():
            event("unit", **asdict(outcome))
        else:
            say(f"{outcome.unit} {outcome.status}{_images(outcome)}")


def encode_until_stopped(
    worker: Worker, units: Sequence[str], waits: bool = False
) -> list[Outcome]:
    """Worker.encode_all. After a stop signal, raises Stopped once the batch is written."""
    with StopSignal(STOPPING) as stop:
        outcomes = worker.encode_all(units, stop, waits=waits)
    check_stopped(stop, worker.root)
    return outcomes


def check_stopped(stop: StopSignal, store: Path) -> None:
    """Raise Stopped after a stop signal."""
    if stop.asked:
        raise Stopped(
            f"stopped; every batch encoded so far is kept in {store}. Run the same command again "
            f"to resume."
        )


def _part(options: EncodeOptions) -> list[str]:
    """The units of this process that are not committed.

    Every unit of the log counts, in its order, so that neither what others commit meanwhile nor
    what others plan moves one to another part.
    """
    view = StoreView.open(options.store)
    part, parts = part_of(options.shard)
    mine, committed = planned_units(view)[part::parts], view.manifest.committed()
    pending = [unit.name for unit in sorted(mine) if unit not in committed]
    log.info(f"{len(pending)} of {len(mine)} units to encode")
    return pending


def _images(outcome: Outcome) -> str:
    if outcome.status in {"held", "stopped"}:
        return ""
    rejected = "".join(f", {reason} {count}" for reason, count in outcome.rejected.items())
    return f": {outcome.images} images{rejected}"
