"""`xlsd-cache build`: scan the sources, plan under a lock, encode what is missing, account."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.commands.finish import conclude, writing
from xlsd_cache.console.option_checks import as_flags
from xlsd_cache.console.progress import event, working
from xlsd_cache.encoding.compatibility import identity_of, stored_identity
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.encoding.kept_batch import keep_batch
from xlsd_cache.encoding.pipeline import EncodePipeline
from xlsd_cache.encoding.vae import Vae, load_vae, require_vae
from xlsd_cache.errors import Stopped, UserError
from xlsd_cache.images.buckets import Buckets
from xlsd_cache.images.decode import MAX_PIXELS, PREPROCESSING
from xlsd_cache.images.sandbox import decode_nbytes, decoders
from xlsd_cache.integrity.accounting import Accounting
from xlsd_cache.options import BuildOptions
from xlsd_cache.planning.caption_diff import caption_changes
from xlsd_cache.planning.disk_space import check_plan_space
from xlsd_cache.planning.generation import create_group, plan_lock, write_generation
from xlsd_cache.planning.log_state import (
    LogState,
    by_shard,
    former_names,
    read_log_state,
    uncommitted,
)
from xlsd_cache.planning.plan import (
    JOURNALS,
    GenerationPlan,
    contents,
    keep_unread_captions,
    make_plan,
    refuse_lost_sources,
)
from xlsd_cache.planning.sessions import build_session
from xlsd_cache.runtime.arrow import counts, lookup_rows
from xlsd_cache.runtime.device import device_of, set_precision
from xlsd_cache.runtime.gpu_memory import free_on
from xlsd_cache.runtime.signals import STOPPING, StopSignal
from xlsd_cache.schema import PLACE
from xlsd_cache.sources.scan import Scan, scan
from xlsd_cache.store.identity import (
    Identity,
    check_compatible,
    choose_rows_per_shard,
    is_store,
)
from xlsd_cache.store.manifest import Manifest
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
    if settings := as_flags(config, BuildOptions(), {"source", "out", "workers"}):
        log.info(f"settings other than the defaults: {settings}")
    log.info(set_precision(config.precision))
    _check_memory(config)
    device_of(config.device)  # refuses early
    buckets = Buckets.make(config.buckets, config.resolution, config.max_ratio, config.upscale)
    require_vae(config.vae)  # before the scan, which may take long
    found = scan(
        config.source,
        config.caption_columns,
        config.only,
        config.exclude,
        config.workers,
        config.image_suffixes,
        allow_outside=config.allow_outside,
    )
    _log_scan(found, config)
    event("start", store=config.out, images=found.images.num_rows)
    if not config.dry_run and not is_store(config.out):  # all images are to be encoded
        decoders(config.workers, config.max_pixels).start(found.images.num_rows)
    with working("loading the VAE"):
        vae = load_vae(config.vae, config.vae_scaling_factor, padding=config.vae_padding)
    identity = _identity(config, vae)
    stored = stored_identity(config.out, vae, config.dry_run)
    check_compatible(config.out, identity, stored)
    rows_per_shard = choose_rows_per_shard(config.out, config.rows_per_shard, found.images.num_rows)
    store = StoreView(Manifest(config.out), identity, rows_per_shard)
    if config.dry_run:
        state = read_log_state(store.manifest, rows_per_shard)
        plan = _plan(config, store, state, found, buckets, config.rehash)
        _say_plan(plan)
        check_plan_space(store, plan, state)
        return None
    with writing(config.out):
        generation = _write_plan(config, store, found, buckets, began)
        store = replace(store, generation=generation)
        largest = max(size.width * size.height for size in buckets.sizes)
        with build_session(store.manifest, generation, config.part, began) as before:
            _encode(config, store, vae, largest)
            with working("writing the index"):
                counts = conclude(store, before)
    if gone := counts.rejected.get("vanished"):
        log.warning(
            f"{gone} images were deleted before they were encoded; restore them and run the same "
            f"command again"
        )
    return counts


def _write_plan(
    config: BuildOptions, store: StoreView, found: Scan, buckets: Buckets, began: float
) -> int:
    """Create the store if there is none and write the next generation; returns the newest.

    Of several processes that build with --rehash, only the first reads every image.
    """
    manifest = store.manifest
    with plan_lock(manifest):
        state = read_log_state(manifest, store.rows_per_shard)
        rehashed = manifest.root / "manifest" / "rehashed"  # touched by the last --rehash
        rehash = config.rehash and not (rehashed.exists() and rehashed.stat().st_mtime >= began)
        plan = _plan(config, store, state, found, buckets, rehash, manifest.staging)
        _say_plan(plan)
        check_plan_space(store, plan, state)
        create_group(store)
        generations = manifest.generations()
        if plan.is_empty and generations:
            newest = generations[-1]
        else:
            changes = plan.entries, plan.removed, plan.captions
            newest = write_generation(store, *changes)
        _forget_journals(manifest, config.rehash)
        return newest


def _forget_journals(manifest: Manifest, rehash: bool) -> None:
    """Delete the journals of planning: their content is in the generation now."""
    for name in JOURNALS:
        (manifest.staging / name).unlink(missing_ok=True)
    if rehash:
        (manifest.root / "manifest" / "rehashed").touch()


def _plan(
    config: BuildOptions,
    store: StoreView,
    state: LogState,
    found: Scan,
    buckets: Buckets,
    rehash: bool,
    staging: Path | None = None,
) -> GenerationPlan:
    """Plan the next generation. Raises UserError where an earlier source is missing."""
    plan = make_plan(
        found.images,
        found.captions,
        found.columns,
        state,
        buckets,
        config.workers,
        staging,
        config.max_pixels,
        rehash,
    )
    refuse_lost_sources(plan, state, set(found.names), set(config.forget))
    keys = found.images["key"].combine_chunks()
    if state.live.num_rows and pc.any(found.matches.missing()).as_py():
        former = former_names(store.manifest, store.rows_per_shard, keys)
        found = found.with_former_names(former, contents(plan, state))
        captions = caption_changes(keys, found.captions, found.columns, state.captions)
        plan = replace(plan, captions=captions)
    for line in found.matches.summary():
        log.info(line)
    _refuse_no_captions(found, config)
    return keep_unread_captions(plan) if found.unread else plan


def _encode(config: BuildOptions, store: StoreView, vae: Vae, largest: int) -> None:
    """Encode every planned row that is not committed, this process's own part first.

    No bucket has more than `largest` pixels.
    """
    manifest, generation = store.manifest, store.generation
    planned = uncommitted(manifest, manifest.planned(generation), store.rows_per_shard)
    if not planned.num_rows:
        return
    # If they have not been started: while CUDA starts and the VAE moves to the GPU.
    decoders(config.workers, config.max_pixels).start(planned.num_rows)
    device = device_of(config.device)
    encoder = Encoder.fitted(vae, config.precision, device, config.batch, largest)
    if free_on(device) is not None:
        keep_batch(encoder, manifest, config.batch)
    entries = planned.drop_columns(["reason", "detail"]).to_pylist()
    todo = by_shard(entries, store.rows_per_shard)
    alive = (lookup_rows(planned, manifest.live(generation), ["key", *PLACE]) >= 0).tolist()
    live = {entry["key"]: entry for entry, is_alive in zip(entries, alive, strict=True) if is_alive}
    part, parts = config.part
    units = sorted(todo)
    order = units[part::parts] + [it for n, it in enumerate(units) if n % parts != part]
    work = EncodePipeline(store, encoder, live, config.workers, config.max_pixels)
    log.info(encoder)
    with StopSignal(STOPPING) as stop:
        work.run(todo, order, stop)
    if stop.asked:
        raise Stopped(
            f"stopped; every batch encoded so far is kept in {config.out}. Run the same command "
            f"again to resume."
        )
    log.info(f"time: {work.seconds:.2f} s: {work.shares()}")
    if work.rounding:
        rounding = float(np.sqrt(np.mean(np.square(work.rounding))))
        log.info(f"float16 rounding: {rounding:.1e} of the latents' spread")


def _identity(config: BuildOptions, vae: Vae) -> Identity:
    return identity_of(
        vae,
        dtype=config.store_dtype,
        precision=config.precision,
        preprocessing=PREPROCESSING,
        resolution=config.resolution,
        buckets=config.buckets,
        max_ratio=config.max_ratio,
        upscale=config.upscale,
    )


def _check_memory(config: BuildOptions) -> None:
    """Log the memory for decoding above the default limit. Raises UserError if it cannot fit."""
    if config.max_pixels <= MAX_PIXELS:
        return
    one, workers = decode_nbytes(config.max_pixels) / 2**30, config.workers
    there = psutil.virtual_memory().total / 2**30
    fitting = int(there / one)
    if not fitting:
        raise UserError(
            f"--max-megapixels {config.max_megapixels:g}: decoding one such image may take "
            f"{one:.1f} GiB, and this machine has {there:.1f} GiB; lower it"
        )
    log.info(
        f"images of up to {config.max_megapixels:g} megapixels: decoding one may take {one:.1f} "
        f"GiB, {workers} at once {workers * one:.1f} GiB of this machine's {there:.1f} GiB"
    )
    if workers > fitting:
        log.warning(f"{workers} such images do not fit in memory; --workers {fitting} is safe")


def _log_scan(found: Scan, config: BuildOptions) -> None:
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
        _refuse_no_captions(found, config)


def _refuse_no_captions(found: Scan, config: BuildOptions) -> None:
    if found.columns and not found.captions.num_rows:
        where = ", ".join(found.columns)
        if config.caption_columns is None:
            where = "a .txt next to it, or in the text or caption column of a table"
        raise UserError(
            f"none of the {found.images.num_rows} images has a caption in {where}. Put captions "
            f"next to the images, give other columns with --captions, or use --captions none."
        )


def _say_plan(plan: GenerationPlan) -> None:
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
