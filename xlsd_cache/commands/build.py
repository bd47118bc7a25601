"""`xlsd-cache build`: plan, encode what is missing, finish. `xlsd-cache plan` is the first part."""

import time

from xlsd_cache.building.finish import conclude, warn_of_vanished, writing
from xlsd_cache.building.plan import plan, plan_of, write_plan
from xlsd_cache.building.worker import Worker
from xlsd_cache.commands.encode import encode_until_stopped
from xlsd_cache.console.progress import event, working, writes_events
from xlsd_cache.console.terminal import say
from xlsd_cache.integrity.accounting import Accounting
from xlsd_cache.options import BuildOptions, PlanOptions
from xlsd_cache.planning.sessions import build_session
from xlsd_cache.runtime.device import device_of


def build(config: BuildOptions, began: float | None = None) -> Accounting | None:
    """Create the store, or update it to its sources. Returns the sums; None after a dry run.

    Args:
        config: the options of `xlsd-cache build`, e.g. BuildOptions(("photos",), out=Path("l")).
        began: when the command began, in seconds since the epoch; now by default.

    Raises UserError before anything is written if the request cannot be met, and after a stop or on
    a full disk, when everything encoded so far is kept. Several processes may build one store.

    """
    began = began or time.time()
    device_of(config.device)  # refuses early
    store, vae = write_plan(config, began, decodes=True)
    if config.dry_run:
        return None
    with writing(config.out), build_session(store, config.part, began) as before:
        if units := plan_of(store).units:
            part, parts = config.part
            order = [*units[part::parts], *(it for n, it in enumerate(units) if n % parts != part)]
            with Worker(config.out, vae, device=config.device, workers=config.workers) as worker:
                encode_until_stopped(worker, order, waits=True)
        with working("writing the index"):
            counts = conclude(store, before)
    warn_of_vanished(counts)
    return counts


def print_plan(options: PlanOptions) -> None:
    """Plan, and print the units that are to be encoded, one a line."""
    planned = plan(options)
    if writes_events():
        event("planned", generation=planned.generation, units=planned.units)
    else:
        for unit in planned.units:
            say(unit)
