"""`xlsd-cache build`: scan, plan under a lock, encode what is missing, account for all."""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout

from xlsd_cache import UserError
from xlsd_cache.accounting import Accounting, account, save_accounting
from xlsd_cache.arrays import grow_array, write_group
from xlsd_cache.buckets import Buckets
from xlsd_cache.commit import tidy
from xlsd_cache.config import BuildConfig
from xlsd_cache.decode import PREPROCESSING
from xlsd_cache.durable import write_parquet
from xlsd_cache.encode import Encoder
from xlsd_cache.identity import Identity, agree, attributes_of, bucket_shape
from xlsd_cache.index import make_view, save_view
from xlsd_cache.interrupt import StopSignal
from xlsd_cache.manifest import PLAN, Manifest, Unit
from xlsd_cache.pipeline import Todo, Work
from xlsd_cache.plan import Plan, make_plan, read_known
from xlsd_cache.precision import set_precision
from xlsd_cache.sources import Scan, scan
from xlsd_cache.vae import Vae, load_vae


def build(config: BuildConfig) -> Accounting | None:
    """Bring the store up to date with the images; None after a dry run.

    Raises UserError before anything is written where the request cannot be met, and after a stop
    or a full disk, when everything encoded so far is kept.
    """
    print(json.dumps(asdict(config), indent=2, default=str))
    print(set_precision(config.precision))
    device = _device(config.device)
    buckets = Buckets.make(config.buckets, config.resolution, config.max_ratio, config.upscale)
    found = scan(config.source, config.caption_columns)
    _say_found(found, config)
    vae = load_vae(config.vae, config.vae_scaling_factor)
    identity = _identity(config, vae)
    manifest = Manifest(config.out)
    rows_per_shard = agree(config.out, identity, config.rows_per_shard, len(found.records))
    if config.dry_run:
        known = read_known(manifest, rows_per_shard)
        columns = config.caption_columns
        _say_plan(make_plan(found.records, known, buckets, columns, config.workers))
        return None
    try:
        before = manifest.committed()
        generation = _write_plan(config, manifest, found, identity, rows_per_shard, buckets)
        largest = max(size.width * size.height for size in buckets.sizes)
        encoder = Encoder.fitted(vae, config.precision, device, config.batch, largest)
        _encode(config, manifest, generation, encoder, identity, rows_per_shard)
        counts, left_out = account(manifest, generation, rows_per_shard, before)
        view = make_view(manifest, generation, rows_per_shard)
        save_view(manifest.root, view)
        write_parquet(config.out / "rejected.parquet", left_out, manifest.staging)
        save_accounting(manifest, generation, counts)
        tidy(manifest)
    except OSError as error:
        raise UserError(
            f"cannot go on writing {config.out}: {error.strerror or error}; what is committed is "
            f"safe, so mend that and run the same command again"
        ) from error
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
    lock = FileLock(manifest.staging / "plan.lock", thread_local=False)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print("another process is planning; waiting for it")
        lock.acquire()
    try:
        tidy(manifest)
        if not (manifest.root / "latents.zarr" / "zarr.json").exists():
            write_group(manifest, attributes_of(identity, rows_per_shard))
        known = read_known(manifest, rows_per_shard)
        columns = config.caption_columns
        plan = make_plan(found.records, known, buckets, columns, config.workers)
        _say_plan(plan)
        generations = manifest.generations()
        generation = generations[-1] + 1 if generations else 0
        if plan.is_empty and generations:
            return generations[-1]
        rows: Counter[str] = Counter()
        for entry in plan.entries:
            rows[entry["bucket"]] = max(rows[entry["bucket"]], entry["row"] + 1)
        rows.pop("", None)
        for bucket, count in rows.items():
            shape = bucket_shape(bucket, identity.channels)
            grow_array(manifest, bucket, count, shape, identity.dtype, rows_per_shard)
        table = pa.Table.from_pylist(plan.entries, PLAN)
        manifest.write_plan(generation, table, plan.removed, plan.captions)
        return generation
    finally:
        lock.release()


def _encode(
    config: BuildConfig,
    manifest: Manifest,
    generation: int,
    encoder: Encoder,
    identity: Identity,
    rows_per_shard: int,
) -> None:
    """Encode every planned row that is not committed, this process's own part first."""
    committed = manifest.committed()
    todo: Todo = {}
    for entry in manifest.planned(generation).to_pylist():
        unit = Unit(entry["bucket"], entry["row"] // rows_per_shard)
        if unit not in committed:
            todo.setdefault(unit, {})[entry["row"] % rows_per_shard] = entry
    if not todo:
        return
    live = {entry["key"]: entry for entry in manifest.live(generation).to_pylist()}
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
    )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA card; leave it out or use cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _say_found(found: Scan, config: BuildConfig) -> None:
    images = len(found.records)
    print(f"found {images} images in {', '.join(config.source)}", end="")
    print(f"; passed over {found.passed_over} other files" if found.passed_over else "")
    for column in config.caption_columns:
        with_text = sum(column in record.captions for record in found.records)
        if with_text < images:
            print(
                f"no {column!r} caption: {images - with_text} of {images} images", file=sys.stderr
            )
    if config.caption_columns and not any(record.captions for record in found.records):
        suffixes = ", ".join(f".{column}" for column in config.caption_columns)
        raise UserError(
            f"no captions: none of the {images} images has a {suffixes} file beside it; write "
            f"them, name another suffix with --captions, or say --captions none"
        )


def _say_plan(plan: Plan) -> None:
    fresh = Counter(entry["bucket"] for entry in plan.entries if not entry["reason"])
    shown = ", ".join(f"{bucket} {count}" for bucket, count in sorted(fresh.items()))
    print(f"to place: {sum(fresh.values())} images" + (f" ({shown})" if shown else ""))
    if plan.removed:
        print(
            f"{len(plan.removed)} images are no longer among the sources and leave training; "
            f"their latents stay, for when they come back"
        )


def _say_result(config: BuildConfig, counts: Accounting) -> None:
    for bucket, count in counts.buckets.items():
        print(f"  {bucket:>9} {count:>9}")
    print(counts)
    if counts.rejected or counts.duplicate:
        print(f"listed in {config.out / 'rejected.parquet'}")
    if not counts.live:
        raise UserError(
            f"none of the {counts.scanned} images could be encoded; "
            f"{config.out / 'rejected.parquet'} says why of each"
        )
