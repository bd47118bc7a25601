"""`xlsd-cache finish`, and the sums that end a build, an import and `finish`."""

from dataclasses import asdict
from pathlib import Path

from xlsd_cache.building.finish import finish
from xlsd_cache.console.progress import event, working, writes_events
from xlsd_cache.console.terminal import say
from xlsd_cache.errors import UserError
from xlsd_cache.integrity.accounting import Accounting
from xlsd_cache.options.build import FinishOptions


def finish_store(options: FinishOptions) -> None:
    """Finish a store and print its sums. Raises UserError while units are pending."""
    with working("writing the index"):
        counts = finish(options.store)
    say_sums(options.store, counts, "images could be encoded")


def say_sums(out: Path, counts: Accounting, done: str) -> None:
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
