"""`xlsd-cache build`: scan, plan under a lock, encode what is missing, account for all."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache import UserError
from xlsd_cache.accounting import Accounting
from xlsd_cache.arrays import grow_array, write_group
from xlsd_cache.buckets import Buckets
from xlsd_cache.commit import planning, tidy
from xlsd_cache.conclude import conclude, refuse_nothing, say_sums, writing
from xlsd_cache.config import BuildConfig
from xlsd_cache.decode import PREPROCESSING
from xlsd_cache.encode import Encoder
from xlsd_cache.fitting import stored_identity
from xlsd_cache.identity import Identity, agree, attributes_of, bucket_shape
from xlsd_cache.interrupt import StopSignal
from xlsd_cache.known import Known, by_unit, read_known, uncommitted
from xlsd_cache.manifest import Manifest
from xlsd_cache.match import look_up
from xlsd_cache.pipeline import Work
from xlsd_cache.plan import JOURNALS, Plan, make_plan, refuse_lost_sources
from xlsd_cache.precision import device_of, set_precision
from xlsd_cache.sources import Scan, scan
from xlsd_cache.tables import one
from xlsd_cache.vae import Vae, load_vae, require_vae


def build(config: BuildConfig) -> Accounting | None:
    """Bring the store up to date with the images; None after a dry run.

    Raises UserError before anything is written where the request cannot be met, and after a stop
    or a full disk, when everything encoded so far is kept.
    """
    print(json.dumps(asdict(config), indent=2, default=str))
    print(set_precision(config.precision))
    device = device_of(config.device)
    buckets = Buckets.make(config.buckets, config.resolution, config.max_ratio, config.upscale)
    require_vae(config.vae)  # a scan may take long
    found = scan(config.source, config.caption_columns, config.only, config.exclude, config.workers)
    _say_found(found, config)
    vae = load_vae(config.vae, config.vae_scaling_factor, padding=config.vae_padding)
    identity = _identity(config, vae)
    stored = stored_identity(config.out, vae, config.dry_run)
    manifest = Manifest(config.out)
    rows_per_shard = agree(
        config.out, identity, config.rows_per_shard, found.images.num_rows, stored
    )
    if config.dry_run:
        _say_plan(_plan(config, read_known(manifest, rows_per_shard), found, buckets))
        return None
    with writing(config.out):
        before = manifest.committed()
        generation = _write_plan(config, manifest, found, identity, rows_per_shard, buckets)
        largest = max(size.width * size.height for size in buckets.sizes)
        encoder = Encoder.fitted(vae, config.precision, device, config.batch, largest)
        _encode(config, manifest, generation, encoder, identity, rows_per_shard)
        counts = conclude(manifest, generation, rows_per_shard, before)
    _say_result(config, counts)
    return counts


def _write_plan(
    config: BuildConfig,
    manifest: Manifest,
    found: Scan,
    identity: Identity,
    rows_per_shard: int,
    buckets: Buckets,
) -> int:
    """Make the store's folders if need be and log the next generation; returns the newest."""
    manifest.make_folders()
    with planning(manifest):
        tidy(manifest)
        if not (manifest.root / "latents.zarr" / "zarr.json").exists():
            write_group(manifest, attributes_of(identity, rows_per_shard))
        known = read_known(manifest, rows_per_shard)
        plan = _plan(config, known, found, buckets, manifest.staging)
        _say_plan(plan)
        generations = manifest.generations()
        generation = generations[-1] + 1 if generations else 0
        if plan.is_empty and generations:
            return generations[-1]
        placed = plan.entries.filter(pc.greater_equal(plan.entries["row"], 0))
        last = placed.group_by("bucket").aggregate([("row", "max")]).to_pylist()
        for bucket, row in ((group["bucket"], group["row_max"]) for group in last):
            shape = bucket_shape(bucket, identity.channels)
            grow_array(manifest, bucket, row + 1, shape, identity.dtype, rows_per_shard)
        manifest.write_plan(generation, plan.entries, plan.removed, plan.captions)
        for name in JOURNALS:
            (manifest.staging / name).unlink(missing_ok=True)
        return generation


def _plan(
    config: BuildConfig, known: Known, found: Scan, buckets: Buckets, staging: Path | None = None
) -> Plan:
    """The next generation. Raises UserError where a source of before is missing."""
    columns, workers = config.caption_columns, config.workers
    plan = make_plan(found.images, found.captions, columns, known, buckets, workers, staging)
    refuse_lost_sources(plan, known, set(found.names), set(config.forget))
    return plan


def _encode(
    config: BuildConfig,
    manifest: Manifest,
    generation: int,
    encoder: Encoder,
    identity: Identity,
    rows_per_shard: int,
) -> None:
    """Encode every planned row that is not committed, this process's own part first."""
    planned = uncommitted(manifest, generation, rows_per_shard)
    if not planned.num_rows:
        return
    entries = planned.drop_columns(["content_hash", "reason", "detail"]).to_pylist()
    todo = by_unit(entries, rows_per_shard)
    now = manifest.live(generation)
    at = look_up(one(planned["key"]), one(now["key"]))
    now = now.take(pa.array(at, mask=at < 0))
    same = pc.and_(*(pc.equal(now[name], planned[name]) for name in ("bucket", "row")))
    alive = pc.fill_null(same, False).to_pylist()
    live = {entry["key"]: entry for entry, is_alive in zip(entries, alive, strict=True) if is_alive}
    part, parts = config.part
    units = sorted(todo)
    mine = units[part::parts]
    order = mine + [unit for unit in units if unit not in set(mine)]
    dtype = identity.dtype
    work = Work(manifest, encoder, live, rows_per_shard, dtype, config.workers)
    print(encoder)
    with StopSignal() as stop:
        work.run(todo, order, stop)
    if stop.asked:
        raise UserError(
            f"stopped; every batch encoded so far is kept in {config.out}: run the same command "
            f"again to go on"
        )
    print(f"time: {work.seconds:.2f} s: {work.shares()}")
    if work.rounding:
        rounding = float(np.sqrt(np.mean(np.square(work.rounding))))
        print(f"float16 rounding: {rounding:.1e} of the latents' spread")


def _identity(config: BuildConfig, vae: Vae) -> Identity:
    return Identity(
        vae_name=vae.name,
        vae_source=vae.source,
        vae_class=vae.class_name,
        vae_sha256=vae.sha256,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        channels=vae.channels,
        dtype=config.store_dtype,
        precision=config.precision,
        preprocessing=PREPROCESSING,
        resolution=config.resolution,
        buckets=config.buckets,
        max_ratio=config.max_ratio,
        upscale=config.upscale,
        vae_padding=vae.padding,
        encoder_sha256=vae.encoder_sha256,
    )


def _say_found(found: Scan, config: BuildConfig) -> None:
    images = found.images.num_rows
    print(f"found {images} images in {', '.join(config.source)}", end="")
    over = ", ".join(f"{count} {kind}" for kind, count in sorted(found.passed_over.items()))
    print(f"; passed over {over}" if over else "")
    for sentence in found.damaged:
        print(f"WARNING: {sentence}", file=sys.stderr)
    for column in config.caption_columns:
        with_text = pc.sum(pc.equal(found.captions["column"], column)).as_py() or 0
        said = [
            f"{n} {what}" for (name, what), n in sorted(found.remarks.items()) if name == column
        ]
        print(f"{column} captions: {with_text} of {images} images", end="")
        print(f" ({', '.join(said)})" if said else "")
    if config.caption_columns and not found.captions.num_rows:
        columns = ", ".join(config.caption_columns)
        raise UserError(
            f"no captions: none of the {images} images has one in {columns}; put them beside the "
            f"images, name other columns with --captions, or say --captions none"
        )


def _say_plan(plan: Plan) -> None:
    placed = plan.entries.filter(pc.equal(plan.entries["reason"], ""))
    fresh = placed["bucket"].value_counts().to_pylist()
    shown = ", ".join(sorted(f"{count['values']} {count['counts']}" for count in fresh))
    print(f"to place: {placed.num_rows} images" + (f" ({shown})" if shown else ""))
    if plan.removed:
        print(
            f"{len(plan.removed)} images are no longer among the sources and leave training; "
            f"their latents stay, for when they come back"
        )


def _say_result(config: BuildConfig, counts: Accounting) -> None:
    say_sums(config.out, counts)
    if gone := counts.rejected.get("vanished"):
        print(
            f"WARNING: {gone} images were gone when their turn came; bring back what holds them "
            f"and run the same command again, which takes them up",
            file=sys.stderr,
        )
    refuse_nothing(config.out, counts, "images could be encoded")
