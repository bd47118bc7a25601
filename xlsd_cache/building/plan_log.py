"""Logs what a scan found and what a plan will do."""

import logging

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.errors import UserError
from xlsd_cache.options.build import PlanOptions
from xlsd_cache.planning.plan import GenerationPlan
from xlsd_cache.runtime.arrow import counts
from xlsd_cache.sources.scan import Scan

log = logging.getLogger("xlsd.cache.building")


def log_scan(found: Scan, config: PlanOptions) -> None:
    """Log the images and captions found. Raises UserError for a new store without captions."""
    images = found.images.num_rows
    over = ", ".join(f"{count} {kind}" for kind, count in sorted(found.passed_over.items()))
    log.info(
        f"found {images} images in {', '.join(config.source)}"
        + (f"; ignored {over}" if over else "")
    )
    for sentence in found.notes:
        log.info(sentence)
    for sentence in found.damaged:
        log.warning(sentence)
    for column in found.columns:
        with_text = pc.sum(pc.equal(found.captions["column"], column)).as_py() or 0
        said = [
            f"{n} {what}" for (name, what), n in sorted(found.remarks.items()) if name == column
        ]
        log.info(
            f"{column} captions: {with_text} of {images} images"
            + (f" ({', '.join(said)})" if said else "")
        )
    if not config.out.exists():
        refuse_no_captions(found, config)


def refuse_no_captions(found: Scan, config: PlanOptions) -> None:
    """Raise UserError where captions are wanted and no image has one."""
    if found.columns and not found.captions.num_rows:
        where = ", ".join(found.columns)
        if config.caption_columns is None:
            where = "a .txt next to it, or in the text or caption column of a table"
        raise UserError(
            f"none of the {found.images.num_rows} images has a caption in {where}. Put captions "
            f"next to the images, give other columns with --captions, or use --captions none."
        )


def log_plan(plan: GenerationPlan) -> None:
    """Log how many images are new, removed and newly rejected."""
    fresh = plan.entries.filter(pa.array(plan.fresh))
    shown = ", ".join(sorted(f"{name} {n}" for name, n in counts(fresh["bucket"]).items()))
    log.info(f"to encode: {fresh.num_rows} images" + (f" ({shown})" if shown else ""))
    reasons = counts(plan.leaving["reason"])
    if removed := reasons.pop("", 0):
        log.info(
            f"{removed} images are no longer in the sources and are dropped from training; their "
            f"latents are kept in case they return"
        )
    if reasons:
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        log.info(f"{sum(reasons.values())} images are newly rejected and dropped ({why})")
