"""`xlsd-cache build`: plan, encode what is missing, finish. `xlsd-cache plan` is the first part."""

import logging
import time
from collections import Counter, deque
from contextlib import closing
from pathlib import Path
from typing import Any

from xlsd_cache.building.finish import conclude, warn_of_vanished, writing_store
from xlsd_cache.building.plan import plan, plan_of, write_plan
from xlsd_cache.building.ray import cluster, outcomes
from xlsd_cache.building.worker import Worker
from xlsd_cache.commands.encode import check_stopped, encode_until_stopped
from xlsd_cache.console.progress import event, progress_bar, working, writes_events
from xlsd_cache.console.terminal import say
from xlsd_cache.encoding.vae import Vae
from xlsd_cache.integrity.accounting import Accounting
from xlsd_cache.options.build import BuildOptions, PlanOptions
from xlsd_cache.planning.sessions import build_session
from xlsd_cache.planning.units import PlannedUnits
from xlsd_cache.runtime.device import device_of, set_precision
from xlsd_cache.runtime.signals import StopSignal
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.view import StoreView

log = logging.getLogger("xlsd.cache.commands")


def build(config: BuildOptions, began: float | None = None) -> Accounting | None:
    """Create the store, or update it to its sources. Returns the sums; None after a dry run.

    Args:
        config: the options of `xlsd-cache build`, e.g. BuildOptions(("photos",), out=Path("l")).
        began: when the command began, in seconds since the epoch; now by default.

    Raises UserError before anything is written if the request cannot be met, and after a stop or on
    a full disk, when everything encoded so far is kept. Several processes may build one store.

    """
    began = began or time.time()
    if not config.ray:
        device_of(config.device)  # refuses early
    elif not config.dry_run:
        with cluster(config.ray) as ray:
            return _build(config, began, ray)
    return _build(config, began)


def _build(config: BuildOptions, began: float, ray: Any = None) -> Accounting | None:
    store, vae = write_plan(config, began, decodes=ray is None)
    if config.dry_run:
        return None
    with writing_store(config.out), build_session(store, config.part, began) as before:
        if units := plan_of(store).units:
            if ray is None:
                _encode(config, units, vae)
            else:
                _encode_on(ray, config, units)
        with working("writing the index"):
            counts = conclude(store, before)
    warn_of_vanished(counts)
    return counts


def _encode(config: BuildOptions, units: tuple[str, ...], vae: Vae) -> None:
    """Encode in this process, its own part of the units first."""
    part, parts = config.part
    order = [*units[part::parts], *(it for n, it in enumerate(units) if n % parts != part)]
    with Worker(config.out, vae, device=config.device, workers=config.workers) as worker:
        encode_until_stopped(worker, order, waits=True)


def _encode_on(ray: Any, config: BuildOptions, units: tuple[str, ...]) -> None:
    """Encode on the workers of a Ray cluster, and show what they have done."""
    root, queue = config.out.absolute(), deque(units)
    sources = [Path(source).expanduser().absolute() for source in config.source]
    spans = PlannedUnits.read(StoreView.open(root), map(ShardId.parse, units)).spans
    images = {unit.name: count for unit, (_, count) in spans.items()}
    rejected, begun = Counter[str](), time.perf_counter()
    log.info(set_precision(config.precision))  # and so does each worker
    with (
        StopSignal("xlsd-cache: stopping") as stop,
        progress_bar(desc="encoding", total=sum(images.values()), unit="image") as bar,
        closing(outcomes(ray, root, sources, config.device, queue)) as done,
    ):
        for outcome in done:
            if outcome and outcome.status == "held":
                queue.append(outcome.unit)
            elif outcome:
                rejected.update(outcome.rejected)
                bar.update(images.pop(outcome.unit))
                rate = bar.n / (time.perf_counter() - begun)
                told = {"images_per_s": rate, "rejected": rejected}
                event("progress", images=bar.n, total=bar.total, **told)
            if stop.asked or not images:
                break
    check_stopped(stop, config.out)


def print_plan(options: PlanOptions) -> None:
    """Plan, and print the units that are to be encoded, one a line."""
    planned = plan(options)
    if writes_events():
        event("planned", generation=planned.generation, units=planned.units)
    else:
        for unit in planned.units:
            say(unit)
