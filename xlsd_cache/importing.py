"""`xlsd-cache import`: other programs' cached latents into a store, compared before they are."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xlsd_cache import UserError
from xlsd_cache.accounting import Accounting
from xlsd_cache.arrays import grow_array, write_group
from xlsd_cache.commit import planning, tidy
from xlsd_cache.compare import Sample, Verdict, compare, judge
from xlsd_cache.conclude import conclude, refuse_nothing, say_sums, writing
from xlsd_cache.config import ImportConfig
from xlsd_cache.decode import Rejected, decode
from xlsd_cache.delta import caption_changes
from xlsd_cache.durable import write_json
from xlsd_cache.fitting import stored_identity
from xlsd_cache.identity import Identity, agree, attributes_of, bucket_shape, read_attributes
from xlsd_cache.manifest import CAPTIONS, PLAN, Manifest
from xlsd_cache.pairing import Entry, Item, image_records, make_items
from xlsd_cache.peers import KEEPS, find, read
from xlsd_cache.precision import device_of, set_precision
from xlsd_cache.transfer import DIVIDED, Transfer, order, plan_imports
from xlsd_cache.vae import Vae, load_vae, require_vae


def import_caches(config: ImportConfig) -> Accounting | None:
    """Add what the cache folders hold to the store; None after a dry run.

    Nothing leaves a store by an import: folders may be given one after the other, and be gone
    afterwards. Raises UserError before anything is written where the latents are not those of the
    named VAE and of their images, or where that is not known and not forced.
    """
    print(json.dumps(asdict(config), indent=2, default=str))
    print(set_precision("fp32"))
    require_vae(config.vae)
    found = find(config.cache)
    records = image_records(found, config.images, config.caption_columns)
    kinds = {file.kind for file in found.files}
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(map(str, config.cache))} hold caches of {' and '.join(sorted(kinds))}, "
            f"which were made differently; import each kind into a store of its own"
        )
    kind = kinds.pop()
    vae = load_vae(config.vae, config.vae_scaling_factor, padding=config.vae_padding)
    items, other = make_items(found, records, vae.channels, config.workers)
    _say_found(items, kind, found.passed_over + other, config)
    manifest = Manifest(config.out)
    imports = plan_imports(manifest, items)
    verdict = _examine(config, vae, kind, _of(imports.fresh, items))
    identity = _identity(config.out, vae, kind, verdict, _of(imports.fresh, items))
    stored = stored_identity(config.out, vae, config.dry_run)
    rows_per_shard = agree(config.out, identity, config.rows_per_shard, len(items), stored)
    if config.dry_run:
        print(f"to import: {len(imports.fresh)} latents")
        return None
    with writing(config.out):
        before = manifest.committed()
        generation = _write_plan(config, manifest, items, identity, rows_per_shard)
        transfer = Transfer(manifest, identity, rows_per_shard, config.workers)
        if not transfer.run(generation, items):
            raise UserError(
                f"stopped; every batch imported so far is kept in {config.out}: run the same "
                f"command again to go on"
            )
        counts = conclude(manifest, generation, rows_per_shard, before)
    say_sums(config.out, counts)
    refuse_nothing(config.out, counts, "latents could be imported")
    return counts


def _of(entries: list[Entry], items: list[Item]) -> list[Item]:
    """The items that these entries are of."""
    origins = {entry["detail"] for entry in entries}
    return [item for item in items if item.origin in origins]


def _examine(config: ImportConfig, vae: Vae, kind: str, fresh: list[Item]) -> Verdict | None:
    """Compare some of the latents with their images and with the VAE; None where none is new.

    Raises UserError for what is disproved, and for what is doubtful and not forced.
    """
    if not fresh:
        return None
    # Spread over all by their names' hashes; those with an image first.
    spread = sorted(fresh, key=lambda i: (i.image is None, order(i.key)))
    samples: list[Sample] = []
    for item in spread:
        latent = read(item.file, item.held)
        if not isinstance(latent, Rejected):
            samples.append(Sample(item.key, latent, _pixels(item)))
        if len(samples) >= config.compare:
            break
    if not samples:
        return None  # every one of them is damaged, and will be told so
    likenesses = compare(samples, vae, device_of(config.device))
    print(f"compared {len(likenesses)} of {len(fresh)} latents with {vae.name}:")
    for likeness in likenesses:
        print(f"  {likeness}")
    verdict = judge(likenesses, vae, kind, KEEPS[kind])
    if verdict.disproved:
        raise UserError(verdict.disproved)
    if verdict.doubtful and not config.force:
        raise UserError(
            f"these latents cannot be trusted: {'; '.join(verdict.doubtful)}; build from the "
            f"images, or add --force to import them all the same"
        )
    for doubt in verdict.doubtful:
        print(f"forced: {doubt}", file=sys.stderr)
    return verdict


def _pixels(item: Item) -> NDArray[np.uint8] | None:
    """What should have gone into the VAE, if the image is there and readable."""
    if item.image is None or not all(item.size):
        return None
    try:
        data = item.image.read()
    except OSError:
        return None
    width, height = map(int, item.bucket.split("x"))
    pixels = decode(data, item.size, item.crop, (width, height))
    return None if isinstance(pixels, Rejected) else pixels


def _identity(
    out: Path, vae: Vae, kind: str, verdict: Verdict | None, fresh: list[Item]
) -> Identity:
    """What imported latents are valid for: never what ours are, so that no build mixes them.

    Where nothing new tells, the store's own word stands.
    """
    stored = None
    if (out / "latents.zarr" / "zarr.json").exists():
        stored = read_attributes(out)[0]
    made = f"{kind} {KEEPS[kind]}"
    divided = f"{made}{DIVIDED}{vae.scaling_factor:g}"
    scaled = verdict.scaled if verdict else stored is not None and stored.preprocessing == divided
    half = not scaled and all(item.held.half for item in fresh)
    if stored is not None and (stored.dtype == "float32" or not fresh):
        half = stored.dtype == "float16"
    return Identity(
        vae_name=vae.name,
        vae_source=vae.source,
        vae_class=vae.class_name,
        vae_sha256=vae.sha256,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        channels=vae.channels,
        dtype="float16" if half else "float32",
        precision="unknown",
        preprocessing=divided if scaled else made,
        resolution=0,  # of each image its own
        buckets="imported",
        max_ratio=0.0,
        upscale=False,
        vae_padding=vae.padding,
        encoder_sha256=vae.encoder_sha256,
    )


def _write_plan(
    config: ImportConfig,
    manifest: Manifest,
    items: list[Item],
    identity: Identity,
    rows_per_shard: int,
) -> int:
    """Make the store's folders if need be and log the next generation; returns the newest."""
    manifest.make_folders()
    with planning(manifest):
        tidy(manifest)
        if not (manifest.root / "latents.zarr" / "zarr.json").exists():
            attributes = attributes_of(identity, rows_per_shard)
            attributes["latents"] += f"; imported: {identity.preprocessing}"
            write_group(manifest, attributes)
        imports = plan_imports(manifest, items)  # again: another process may have planned
        generations = manifest.generations()
        captions = _caption_changes(manifest, items, config.caption_columns)
        if generations and not (imports.entries or imports.removed or captions.num_rows):
            return generations[-1]
        generation = generations[-1] + 1 if generations else 0
        taken: Counter[str] = Counter()
        for entry in manifest.planned(generation).to_pylist():
            end = (entry["row"] // rows_per_shard + 1) * rows_per_shard
            taken[entry["bucket"]] = max(taken[entry["bucket"]], end)
        # An order that looks random and depends on the keys alone, as a build's.
        for entry in sorted(imports.fresh, key=lambda e: order(e["key"])):
            entry["row"] = taken[entry["bucket"]]
            taken[entry["bucket"]] += 1
        for bucket, count in taken.items():
            shape = bucket_shape(bucket, identity.channels)
            grow_array(manifest, bucket, count, shape, identity.dtype, rows_per_shard)
        table = pa.Table.from_pylist(imports.entries, PLAN)
        manifest.write_plan(generation, table, imports.removed, captions)
        told = {**asdict(config), "generation": generation, "identity": asdict(identity)}
        path = manifest.root / "manifest" / "imported" / f"{generation:06d}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, told, manifest.staging)
        return generation


def _caption_changes(manifest: Manifest, items: list[Item], columns: tuple[str, ...]) -> pa.Table:
    """Captions of the images that are there, where they differ from the log's."""
    images = [(item.key, item.image) for item in items if item.image and not item.rejected]
    texts = [
        {"key": key, "column": column, "text": text}
        for key, image in images
        for column, text in image.captions.items()
    ]
    keys = pa.array([key for key, _ in images], pa.string())
    known = manifest.captions(max(manifest.generations(), default=-1))
    return caption_changes(keys, pa.Table.from_pylist(texts, CAPTIONS), columns, known)


def _say_found(items: list[Item], kind: str, passed_over: int, config: ImportConfig) -> None:
    with_image = sum(item.image is not None for item in items)
    print(
        f"found {len(items)} latents of {kind} ({KEEPS[kind]} of the posterior), {with_image} "
        f"with their image" + (f"; passed over {passed_over} other files" if passed_over else "")
    )
    for column in config.caption_columns:
        texts = sum(column in item.image.captions for item in items if item.image)
        if texts < len(items):
            print(
                f"no {column!r} caption: {len(items) - texts} of {len(items)} latents",
                file=sys.stderr,
            )
