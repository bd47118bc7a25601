"""`xlsd-cache info`: what is in a store, for people and for programs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache import UserError
from xlsd_cache.accounting import account, saved_accounting
from xlsd_cache.config import InfoConfig
from xlsd_cache.identity import read_attributes
from xlsd_cache.index import make_view
from xlsd_cache.manifest import Manifest
from xlsd_cache.store import LatentStore

MEASURED = 2048  # samples whose latents are read for the statistics: the mean to 0.1% of the spread


def info(config: InfoConfig) -> dict[str, Any]:
    """Print what is in the store, and return it. Reads an unfinished store as well."""
    value = describe(config.store)
    if config.json:
        print(json.dumps(value, indent=2, ensure_ascii=False))
        return value
    vae, latents = value["vae"], value["latents"]
    rejected = ", ".join(f"{reason} {count}" for reason, count in value["rejected"].items())
    print(f"{config.store}: {value['live']} live images, {value['bytes'] / 2**20:.1f} MiB", end="")
    print(f", {value['pending']} not encoded yet" if value["pending"] else "")
    print(f"  scanned    {value['scanned']}")
    print(f"  encoded    {value['encoded']}\n  reused     {value['reused']}")
    print(f"  duplicate  {value['duplicate']}")
    print(
        f"  rejected   {sum(value['rejected'].values())}" + (f" ({rejected})" if rejected else "")
    )
    print("  buckets    " + ", ".join(f"{name} {n}" for name, n in value["buckets"].items()))
    print("  captions   " + ", ".join(f"{name} {n}" for name, n in value["captions"].items()))
    print(f"  VAE        {vae['name']} ({vae['sha256'][:12]}), scaling factor", end=" ")
    print(f"{vae['scaling_factor']}, encoded in {vae['precision']}")
    mean = " ".join(f"{x:+.3f}" for x in latents["mean"])
    std = " ".join(f"{x:.3f}" for x in latents["std"])
    print(f"  latents    {latents['dtype']}, raw, {latents['measured']} samples measured")
    print(f"             mean by channel {mean}\n             std by channel  {std}")
    return value


def describe(path: Path) -> dict[str, Any]:
    """Everything that `info --json` prints."""
    root = path.expanduser()
    identity, rows_per_shard = read_attributes(root)
    manifest = Manifest(root)
    generations = manifest.generations()
    if not generations:
        raise UserError(
            f"{root} is not planned yet; run the same `xlsd-cache build` again to finish it"
        )
    counts = saved_accounting(root, generations[-1])
    if counts is None:
        counts, _ = account(manifest, generations[-1], rows_per_shard, frozenset())
    view = make_view(manifest, generations[-1], rows_per_shard)
    with LatentStore(root, identity, rows_per_shard, view) as store:
        mean, std, measured = _statistics(store)
        captions = {
            name: int(pc.count(store.samples[name]).as_py()) for name in store.caption_columns
        }
    files = (file for file in root.rglob("*") if file.is_file())
    return {
        "scanned": counts.scanned,
        "encoded": counts.encoded,
        "reused": counts.reused,
        "duplicate": counts.duplicate,
        "rejected": counts.rejected,
        "pending": counts.pending,
        "live": counts.live,
        "buckets": counts.buckets,
        "captions": captions,
        "vae": {
            "name": identity.vae_name,
            "source": identity.vae_source,
            "class": identity.vae_class,
            "sha256": identity.vae_sha256,
            "scaling_factor": identity.scaling_factor,
            "shift_factor": identity.shift_factor,
            "precision": identity.precision,
        },
        "latents": {
            "dtype": identity.dtype,
            "channels": identity.channels,
            "mean": mean,
            "std": std,
            "measured": measured,
        },
        "generation": generations[-1],
        "fingerprint": view.fingerprint,
        "rows_per_shard": rows_per_shard,
        "resolution": identity.resolution,
        "bytes": sum(file.stat().st_size for file in files),
    }


def _statistics(store: LatentStore) -> tuple[list[float], list[float], int]:
    """Mean and standard deviation by channel over up to MEASURED samples, evenly spread."""
    stride = max(1, len(store) // MEASURED)
    sums: Counter[str] = Counter()
    total = np.zeros(store.identity.channels)
    squares = np.zeros(store.identity.channels)
    for bucket, rows in store.buckets.items():
        for row in rows[::stride]:
            latent: NDArray[np.float64] = store.read(bucket, [row])[0].astype(np.float64)
            total += latent.sum(axis=(1, 2))
            squares += np.square(latent).sum(axis=(1, 2))
            sums.update(samples=1, values=latent[0].size)
    if not sums["samples"]:
        return [], [], 0
    mean = total / sums["values"]
    std = np.sqrt(np.maximum(0, squares / sums["values"] - mean**2))
    return mean.tolist(), std.tolist(), sums["samples"]
