"""Scans the sources and writes the next generation, with all that a worker needs to encode it."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.building.finish import writing_store
from xlsd_cache.building.plan_log import log_plan, log_scan, refuse_no_captions
from xlsd_cache.building.settings import EncodeSettings
from xlsd_cache.console.option_checks import as_flags
from xlsd_cache.console.progress import event, working
from xlsd_cache.encoding.compatibility import identity_of, stored_identity
from xlsd_cache.encoding.vae import NAMES, Vae, load_vae, require_vae
from xlsd_cache.images.buckets import Buckets
from xlsd_cache.images.decode import PREPROCESSING
from xlsd_cache.images.sandbox import check_memory, decoders
from xlsd_cache.options.build import PlanOptions
from xlsd_cache.planning.caption_diff import caption_changes
from xlsd_cache.planning.disk_space import check_plan_space
from xlsd_cache.planning.generation import create_group, plan_lock, write_generation
from xlsd_cache.planning.log_state import LogState, former_names, read_log_state
from xlsd_cache.planning.plan import (
    JOURNALS,
    GenerationPlan,
    contents,
    keep_unread_captions,
    make_plan,
    refuse_lost_sources,
)
from xlsd_cache.planning.sessions import build_session
from xlsd_cache.planning.units import pending_units
from xlsd_cache.sources.scan import Scan, scan
from xlsd_cache.store.identity import Identity, check_compatible, choose_rows_per_shard, is_store
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.view import StoreView

log = logging.getLogger("xlsd.cache.building")


@dataclass(frozen=True)
class BuildPlan:
    """What is to be encoded. A unit is one shard: it is claimed, encoded and committed whole."""

    store: Path
    generation: int  # the newest
    units: tuple[str, ...]  # names BUCKET.N of the units that are not committed


def plan(options: PlanOptions, vae: Vae | None = None) -> BuildPlan:
    """Create the store or update its plan to the sources; nothing is encoded.

    Args:
        options: those of `build`; what concerns the encoding process is not used.
        vae: the loaded VAE; `options.vae` by default. Only its hashes are used.

    Images that are committed from now on count as encoded in the sums of `finish`. A dry run gives
    a plan without units. Raises UserError as `build` does.

    """
    began = time.time()
    store, _ = write_plan(options, began, vae)
    if options.dry_run:
        return BuildPlan(options.out, store.generation, ())
    with writing_store(options.out), build_session(store, (0, 1), began):
        return plan_of(store)


def plan_of(store: StoreView) -> BuildPlan:
    """The plan that a store has."""
    units = tuple(unit.name for unit in pending_units(store))
    return BuildPlan(store.manifest.root, store.generation, units)


def write_plan(
    config: PlanOptions,
    began: float,
    vae: Vae | None = None,
    decodes: bool = False,
    found: Scan | None = None,
) -> tuple[StoreView, Vae]:
    """Write the next generation, unless the store is up to date; returns the newest, and the VAE.

    With `decodes`, the processes that decode start while the VAE loads. A dry run writes nothing.
    The sources are scanned, unless what was `found` in them is given.
    """
    settings = as_flags(config, type(config)(), {"source", "out", "workers"})
    if settings and found is None:
        log.info(f"settings other than the defaults: {settings}")
    check_memory(config.max_pixels, config.workers)
    buckets = Buckets.make(config.buckets, config.resolution, config.max_ratio, config.upscale)
    if vae is None:
        require_vae(config.vae)  # before the scan, which may take long
    if found is None:
        found = scan_sources(config)
        log_scan(found, config)
    images = found.images.num_rows
    event("start", store=config.out, images=images)
    if decodes and not config.dry_run and not is_store(config.out):  # all are to be encoded
        decoders(config.workers, config.max_pixels).start(images)
    if vae is None:
        with working("loading the VAE"):
            vae = load_vae(config.vae, config.vae_scaling_factor, padding=config.vae_padding)
    identity = store_identity(config, vae)
    store = StoreView(Manifest(config.out), identity, _rows_per_shard(config, images))
    if config.dry_run:
        state = read_log_state(store.manifest, store.rows_per_shard)
        planned = _make(config, store, state, found, buckets, config.rehash)
        log_plan(planned)
        check_plan_space(store, planned, state)
        generations = store.manifest.generations()
        return replace(store, generation=max(generations, default=-1)), vae
    named = vae.name if vae.name in NAMES else vae.source
    left = EncodeSettings(named, config.batch, config.max_pixels)
    with writing_store(config.out):
        store = _write(config, store, found, buckets, began, left)
    del found
    pa.default_memory_pool().release_unused()  # before the VAE works
    return store, vae


def _rows_per_shard(config: PlanOptions, images: int) -> int:
    return choose_rows_per_shard(config.out, config.rows_per_shard, images, config.few_rows)


def _write(
    config: PlanOptions,
    store: StoreView,
    found: Scan,
    buckets: Buckets,
    began: float,
    settings: EncodeSettings,
) -> StoreView:
    """Create the store if there is none and write the next generation; returns the newest.

    Of several processes that build with --rehash, only the first reads every image.
    """
    manifest = store.manifest
    with plan_lock(manifest):
        # Another process may have made the store since.
        store = replace(store, rows_per_shard=_rows_per_shard(config, found.images.num_rows))
        state = read_log_state(manifest, store.rows_per_shard)
        rehashed = manifest.root / "manifest" / "rehashed"  # touched by the last --rehash
        rehash = config.rehash and not (rehashed.exists() and rehashed.stat().st_mtime >= began)
        planned = _make(config, store, state, found, buckets, rehash, manifest.staging)
        log_plan(planned)
        check_plan_space(store, planned, state)
        create_group(store)
        settings.write(manifest)
        generations = manifest.generations()
        if planned.is_empty and generations:
            newest = generations[-1]
        else:
            changes = planned.entries, planned.removed, planned.captions
            newest = write_generation(store, *changes)
        _forget_journals(manifest, config.rehash)
        return replace(store, generation=newest)


def _forget_journals(manifest: Manifest, rehash: bool) -> None:
    """Delete the journals of planning: their content is in the generation now."""
    for name in JOURNALS:
        (manifest.staging / name).unlink(missing_ok=True)
    if rehash:
        (manifest.root / "manifest" / "rehashed").touch()


def _make(
    config: PlanOptions,
    store: StoreView,
    state: LogState,
    found: Scan,
    buckets: Buckets,
    rehash: bool,
    staging: Path | None = None,
) -> GenerationPlan:
    """Plan the next generation. Raises UserError where an earlier source is missing."""
    planned = make_plan(
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
    refuse_lost_sources(planned, state, set(found.names), set(config.forget))
    keys = found.images["key"].combine_chunks()
    if state.live.num_rows and pc.any(found.matches.missing()).as_py():
        former = former_names(store.manifest, store.rows_per_shard, keys)
        found = found.with_former_names(former, contents(planned, state))
        captions = caption_changes(keys, found.captions, found.columns, state.captions)
        planned = replace(planned, captions=captions)
    for line in found.matches.summary():
        log.info(line)
    refuse_no_captions(found, config)
    if found.unread:
        planned = replace(planned, captions=keep_unread_captions(planned.captions))
    return planned


def scan_sources(config: PlanOptions) -> Scan:
    """The images and captions of the sources. Raises UserError as `scan` does."""
    found = scan(
        config.source,
        config.caption_columns,
        config.only,
        config.exclude,
        config.workers,
        config.image_suffixes,
        allow_outside=config.allow_outside,
    )
    pa.default_memory_pool().release_unused()  # to the system: the scan's tables were twice as many
    return found


def store_identity(config: PlanOptions, vae: Vae) -> Identity:
    """What the latents will be. Raises UserError where the store's are something else."""
    identity = identity_of(
        vae,
        dtype=config.store_dtype,
        precision=config.precision,
        preprocessing=PREPROCESSING,
        resolution=config.resolution,
        buckets=config.buckets,
        max_ratio=config.max_ratio,
        upscale=config.upscale,
    )
    check_compatible(config.out, identity, stored_identity(config.out, vae, config.dry_run))
    return identity
