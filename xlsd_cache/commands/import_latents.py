"""`xlsd-cache import`: check other trainers' cached latents and copy them into a store."""

import json
import logging
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa

from xlsd_cache.building.finish import conclude, writing_store
from xlsd_cache.console.progress import event
from xlsd_cache.encoding.compatibility import identity_of, stored_identity
from xlsd_cache.encoding.vae import Vae, load_vae, require_vae
from xlsd_cache.errors import Stopped, UserError
from xlsd_cache.integrity.accounting import Accounting
from xlsd_cache.interop.cache_files import KEEPS, list_caches
from xlsd_cache.interop.crops import add_crops
from xlsd_cache.interop.items import ImportItem, Peeked, make_items, peek_all
from xlsd_cache.interop.latent_check import LatentCheck, mark_rejected
from xlsd_cache.interop.pairing import list_images
from xlsd_cache.interop.plausibility import CacheVerdict
from xlsd_cache.interop.transfer import DIVIDED, Transfer, order, plan_imports
from xlsd_cache.options.import_latents import ImportOptions
from xlsd_cache.planning.caption_diff import caption_changes
from xlsd_cache.planning.disk_space import check_disk_space
from xlsd_cache.planning.generation import create_group, plan_lock, write_generation
from xlsd_cache.planning.log_state import next_free_rows
from xlsd_cache.planning.sessions import build_session
from xlsd_cache.runtime.atomic import write_json
from xlsd_cache.runtime.device import device_of, set_precision
from xlsd_cache.schema import CAPTIONS, PLAN, PlanEntry
from xlsd_cache.store.identity import (
    Identity,
    check_compatible,
    choose_rows_per_shard,
    is_store,
    read_attributes,
)
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.view import StoreView

log = logging.getLogger("xlsd.cache.commands")


def import_caches(config: ImportOptions, began: float | None = None) -> Accounting | None:
    """Add the latents of the cache folders to the store; None after a dry run.

    An import removes nothing, so folders may be imported one after the other and deleted after.
    Raises UserError before anything is written where the latents are not the VAE's latents of their
    images, or where that is unknown and not forced.
    """
    began = began or time.time()
    for line in json.dumps(asdict(config), indent=2, default=str).splitlines():
        log.info(line)
    log.info(set_precision("fp32"))
    require_vae(config.vae)
    listing = list_caches(config.cache)
    peeked = peek_all(listing, config.workers)
    kind = _kind(config, peeked)
    if kind == "simpletuner":
        peeked = add_crops(peeked, (*config.cache, *([config.images] if config.images else [])))
    records = list_images(listing, config.images, config.caption_columns)
    vae = load_vae(config.vae, config.vae_scaling_factor, padding=config.vae_padding)
    check = LatentCheck(config, vae, device_of(config.device), kind, _is_divided(config.out))
    items, other = make_items(peeked, records, vae.channels, config.workers, check.choose)
    event("start", store=config.out, latents=len(items))
    _log_items(items, kind, listing.passed_over + other, config)
    manifest = Manifest(config.out)
    imports = plan_imports(manifest, items)
    fresh = _of(imports.fresh, items)
    verdict = check.run(
        [item for item in fresh if item.origin not in imports.again],
        [item for item in fresh if item.origin in imports.again],
    )
    items = mark_rejected(items, check.rejected)
    imports = plan_imports(manifest, items)
    identity = _identity(config.out, vae, kind, verdict, _of(imports.fresh, items))
    stored = stored_identity(config.out, vae, config.dry_run)
    check_compatible(config.out, identity, stored)
    rows_per_shard = choose_rows_per_shard(config.out, config.rows_per_shard, len(items))
    if config.dry_run:
        log.info(f"to import: {len(imports.fresh)} latents")
        return None
    with writing_store(config.out):
        store = StoreView(manifest, identity, rows_per_shard)
        generation = _write_plan(config, store, items)
        store = replace(store, generation=generation)
        with build_session(store, (0, 1), began) as before:
            if not Transfer(store, config.workers).run(items):
                raise Stopped(
                    f"stopped; every batch imported so far is kept in {config.out}: run the same "
                    f"command again to go on"
                )
            counts = conclude(store, before)
    return counts


def _of(entries: list[PlanEntry], items: list[ImportItem]) -> list[ImportItem]:
    """The items of these entries."""
    origins = {entry["detail"] for entry in entries}
    return [item for item in items if item.origin in origins]


def _kind(config: ImportOptions, peeked: list[Peeked]) -> str:
    """The program that made the caches. Raises UserError where several did."""
    files: dict[str, Path] = {}
    for file, contents in peeked:
        if isinstance(contents, list):
            files.setdefault(contents[0].kind, file.path)
    if len(files) > 1:
        raise UserError(
            f"{', '.join(map(str, config.cache))}: caches of {' and '.join(sorted(files))}, e.g. "
            f"{', '.join(str(files[kind]) for kind in sorted(files))}. Import each kind into a "
            f"store of its own."
        )
    return next(iter(files), peeked[0][0].kind)


def _is_divided(out: Path) -> bool:
    """Whether the store's latents were imported scaled, and divided."""
    return is_store(out) and DIVIDED in str(read_attributes(out)[0].preprocessing)


def _identity(
    out: Path, vae: Vae, kind: str, verdict: CacheVerdict | None, fresh: list[ImportItem]
) -> Identity:
    """The identity of imported latents, which differs from a build's, so that the two never mix.

    Where nothing new was measured, the store's identity stays.
    """
    stored = read_attributes(out)[0] if is_store(out) else None
    made = f"{kind} {KEEPS[kind]}"
    divided = f"{made}{DIVIDED}{vae.scaling_factor:g}"
    scaled = verdict.scaled if verdict else stored is not None and stored.preprocessing == divided
    half = not scaled and all(item.latent.half for item in fresh)
    if stored is not None and (stored.dtype == "float32" or not fresh):
        half = stored.dtype == "float16"
    return identity_of(
        vae,
        dtype="float16" if half else "float32",
        precision="unknown",
        preprocessing=divided if scaled else made,
        resolution=0,  # differs by image
        buckets="imported",
        max_ratio=0.0,
        upscale=False,
    )


def _write_plan(config: ImportOptions, store: StoreView, items: list[ImportItem]) -> int:
    """Create the store if there is none and log the next generation; returns the newest."""
    manifest, identity = store.manifest, store.identity
    with plan_lock(manifest):
        imports = plan_imports(manifest, items)  # again, since another process may have planned
        generations = manifest.generations()
        captions = _caption_changes(manifest, items, config.caption_columns)
        if generations and not (imports.entries or imports.removed or captions.num_rows):
            return generations[-1]
        newest = max(generations, default=-1)
        next_rows = next_free_rows(manifest.planned(newest), store.rows_per_shard)
        # A pseudo-random order that depends on the keys alone, as in a build.
        for entry in sorted(imports.fresh, key=lambda e: order(e["key"])):
            entry["row"] = next_rows.get(entry["bucket"], 0)
            next_rows[entry["bucket"]] = entry["row"] + 1
        table = pa.Table.from_pylist(imports.entries, PLAN)
        planned = pa.concat_tables([table, manifest.live(newest)])
        check_disk_space(store, planned)
        create_group(store, f"; imported: {identity.preprocessing}")
        changes = table, imports.removed, captions
        generation = write_generation(store, *changes)
        told = {**asdict(config), "generation": generation, "identity": asdict(identity)}
        path = manifest.root / "manifest" / "imported" / f"{generation:06d}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, told, manifest.staging)
        return generation


def _caption_changes(
    manifest: Manifest, items: list[ImportItem], columns: tuple[str, ...]
) -> pa.Table:
    """The captions that differ from the journal's."""
    images = [(item.key, item.image) for item in items if item.image and not item.rejected]
    texts = [
        {"key": key, "column": column, "text": text}
        for key, image in images
        for column, text in image.captions.items()
    ]
    keys = pa.array([key for key, _ in images], pa.string())
    known = manifest.captions(max(manifest.generations(), default=-1))
    return caption_changes(keys, pa.Table.from_pylist(texts, CAPTIONS), columns, known)


def _log_items(items: list[ImportItem], kind: str, passed_over: int, config: ImportOptions) -> None:
    with_image = sum(item.image is not None for item in items)
    log.info(
        f"found {len(items)} latents of {kind} ({KEEPS[kind]} of the posterior), {with_image} "
        f"with their image" + (f"; ignored {passed_over} other files" if passed_over else "")
    )
    ignored = Counter(name for item in items for name in item.latent.ignored)
    for name, what in (("latents_flipped", "flipped latents"), ("alpha_mask", "alpha masks")):
        if ignored[name]:
            log.warning(f"ignored {ignored[name]} {what} ({name})")
    for column in config.caption_columns:
        texts = sum(column in item.image.captions for item in items if item.image)
        if texts < len(items):
            log.warning(f"{len(items) - texts} of {len(items)} latents have no {column!r} caption")
