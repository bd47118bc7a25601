"""`xlsd-cache info`: describe a store, as text or JSON."""

import stat
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xlsd_cache.console.terminal import say, say_json, shown
from xlsd_cache.integrity.accounting import Accounting, account, saved_accounting
from xlsd_cache.integrity.statistics import are_tags, moments, word_counts
from xlsd_cache.options.inspection import InfoOptions
from xlsd_cache.store.index import cached_snapshot, make_snapshot
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.view import StoreView


def info(config: InfoOptions) -> dict[str, Any]:
    """Print and return what is in the store, which may be unfinished."""
    view = StoreView.open(config.store.expanduser())
    counts = saved_accounting(view.manifest.root, view.generation) or account(view)[0]
    with any_store(view) as store:
        value = describe(view, store, counts, config.tags)
    if config.json:
        say_json(value)
        return value
    vae, latents = value["vae"], value["latents"]
    rejected = ", ".join(f"{reason} {count}" for reason, count in value["rejected"].items())
    say(f"{config.store}: {value['live']} live images, {size_words(value['bytes'])}", end="")
    say(f", {value['pending']} not encoded yet" if value["pending"] else "")
    say(f"  scanned    {value['scanned']}")
    say(f"  encoded    {value['encoded']}")
    say(f"  reused     {value['reused']}")
    say(f"  duplicate  {value['duplicate']}")
    say(f"  rejected   {sum(value['rejected'].values())}" + (f" ({rejected})" if rejected else ""))
    say("  buckets    " + ", ".join(f"{name} {n}" for name, n in value["buckets"].items()))
    _say_captions(value)
    say(f"  VAE        {vae['name']} ({vae['sha256'][:12]}), scaling factor", end=" ")
    imported = isinstance(latents["preprocessing"], str)
    how = latents["preprocessing"] if imported else vae["precision"]
    padded = ", reflection padding" if vae["padding"] == "reflect" else ""
    say(f"{vae['scaling_factor']}{padded}, {'imported:' if imported else 'encoded in'} {how}")
    mean = " ".join(f"{x:+.3f}" for x in latents["mean"])
    std = " ".join(f"{x:.3f}" for x in latents["std"])
    say(f"  latents    {latents['dtype']}, raw, {latents['measured']} samples measured")
    say(f"             mean by channel {mean}")
    say(f"             std by channel  {std}")
    disk = ", ".join(f"{part} {size_words(nbytes)}" for part, nbytes in value["disk"].items())
    say(f"  disk       {disk}")
    return value


def _say_captions(value: dict[str, Any]) -> None:
    for name, count in value["captions"].items():
        words = value["words"][name]
        say(f"  captions   {name} {count} of {value['live']} images, words", end=" ")
        say(f"{words['median']:g} in the median, {words['max']} at most")
        tags = ", ".join(f"{_short(tag)} {n}" for tag, n in value["tags"].get(name, {}).items())
        print(textwrap.fill(shown(tags), 96, initial_indent=" " * 13, subsequent_indent=" " * 13))


def any_store(view: StoreView) -> LatentStore:
    """The store at the view's generation, which may be unfinished."""
    snapshot = cached_snapshot(view.manifest.root, view.generation) or make_snapshot(view)
    return LatentStore(view, snapshot)


def describe(
    view: StoreView, store: LatentStore, counts: Accounting, most_tags: int
) -> dict[str, Any]:
    """The value that `info --json` prints."""
    identity = view.identity
    mean, std, measured = moments(store)
    texts = {name: store.samples[name] for name in store.caption_columns}
    tags = {name: store.tags(name).counts(most_tags) for name in texts if are_tags(texts[name])}
    disk = _disk_use(store.root)
    return {
        "scanned": counts.scanned,
        "encoded": counts.encoded,
        "reused": counts.reused,
        "duplicate": counts.duplicate,
        "rejected": counts.rejected,
        "pending": counts.pending,
        "live": counts.live,
        "buckets": counts.buckets,
        "captions": {name: len(text) - text.null_count for name, text in texts.items()},
        "words": {name: _words(text) for name, text in texts.items()},
        "tags": tags,
        "vae": {
            "name": identity.vae_name,
            "source": identity.vae_source,
            "class": identity.vae_class,
            "sha256": identity.vae_sha256,
            "encoder_sha256": identity.encoder_sha256,
            "padding": identity.vae_padding,
            "scaling_factor": identity.scaling_factor,
            "shift_factor": identity.shift_factor,
            "precision": identity.precision,
        },
        "latents": {
            "dtype": identity.dtype,
            "preprocessing": identity.preprocessing,
            "channels": identity.channels,
            "mean": mean,
            "std": std,
            "measured": measured,
        },
        "generation": view.generation,
        "fingerprint": store.fingerprint,
        "rows_per_shard": view.rows_per_shard,
        "resolution": identity.resolution,
        "bytes": sum(disk.values()),
        "disk": disk,
    }


def _disk_use(root: Path) -> dict[str, int]:
    """Bytes of the store by part; files deleted meanwhile count nothing."""
    parts = {"latents": 0, "manifest": 0, "captions": 0, "other": 0}
    for path in root.rglob("*"):
        top = path.relative_to(root).parts[0].removesuffix(".zarr")
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            parts[top if top in parts else "other"] += status.st_size
    return parts


def _short(tag: str) -> str:
    """A tag, shortened: a caption without a comma counts as one tag."""
    return tag if len(tag) <= 96 else f"{tag[:93]}..."


def size_words(nbytes: int) -> str:
    """A size for people."""
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def _words(texts: pa.ChunkedArray) -> dict[str, float]:
    counts = word_counts(texts)
    if not len(counts):
        return {"median": 0.0, "max": 0}
    return {"median": float(np.median(counts)), "max": int(counts.max())}
