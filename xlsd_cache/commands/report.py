"""`xlsd-cache report`: one self-contained HTML page about a store."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from xlsd_cache.commands.info import describe, size_words
from xlsd_cache.commands.preview import decoded
from xlsd_cache.console.progress import progress_bar
from xlsd_cache.encoding.compatibility import load_vae_for
from xlsd_cache.errors import UserError
from xlsd_cache.files.uri import read_source
from xlsd_cache.images.decode import MAX_PIXELS, max_bytes, shrunk
from xlsd_cache.images.sandbox import decoders
from xlsd_cache.integrity.accounting import account
from xlsd_cache.integrity.statistics import histogram, together, word_counts
from xlsd_cache.options import StoreReportOptions
from xlsd_cache.outcomes import REASONS, Rejected
from xlsd_cache.pages.render import render
from xlsd_cache.pages.thumbnails import SIDE, data_uri, small_webp
from xlsd_cache.runtime.atomic import write_bytes
from xlsd_cache.runtime.device import device_of
from xlsd_cache.runtime.own_files import is_page, refuse_foreign
from xlsd_cache.store.index import cached_snapshot, make_snapshot
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.view import StoreView

log = logging.getLogger("xlsd.cache.commands")

EXAMPLES = 6  # of a reason for rejection
TAGS, PAIRED = 30, 12  # most frequent tags: as bars, and by pairs
CAPTION = 1000  # characters of a caption that are shown
SHORT_SIDES = (256, 384, 512, 640, 768, 1024, 1536, 2048, 4096)  # pixels
RATIOS = (1 / 3, 1 / 2, 2 / 3, 0.8, 0.95, 1.05, 1.25, 1.5, 2, 3)
WORDS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)


class Channel(NamedTuple):
    """Raw latents of one channel."""

    mean: float
    std: float
    low: float  # one std below the mean
    high: float


def report(config: StoreReportOptions) -> Path:
    """Write the page and return its path.

    Raises UserError for a folder that is no store, a VAE that does not fit it, and an `out` that is
    another file or cannot be written.
    """
    path = config.out or config.store.expanduser() / "report.html"
    refuse_foreign(path, (".html",), is_page)
    html = _page(config)
    try:
        write_bytes(path, html.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; give another file with --out") from error
    log.info(f"report {path}")
    return path


def _page(config: StoreReportOptions) -> str:
    about = describe(config.store, TAGS)
    view = StoreView.open(config.store.expanduser())
    snapshot = cached_snapshot(view.manifest.root, view.generation) or make_snapshot(view)
    with LatentStore(view, snapshot) as store:
        column = next(iter(store.caption_columns), None)
        tags = about["tags"].get(column, {})
        samples, pictures, decoder = _samples(store, config, column)
        channels = [
            Channel(mean, std, mean - std, mean + std)
            for mean, std in zip(about["latents"]["mean"], about["latents"]["std"], strict=True)
        ]
        counts, rejected = _rejected(view)
        return render(
            "xlsd_cache.pages",
            "store.html",
            name=config.store.name or str(config.store),
            about=about,
            size=size_words(about["bytes"]),
            counts=counts,
            buckets=sorted(about["buckets"].items(), key=lambda it: -it[1]),
            shapes=_shapes(store),
            captions=[_captions(store, name, about) for name in store.caption_columns],
            channels=channels,
            low=min([0.0, *(it.low for it in channels)]),
            high=max([0.0, *(it.high for it in channels)]),
            rejected=rejected,
            pictures=pictures,
            decoder=decoder,
            frequent=list(tags),
            data={"samples": samples, "tags": bool(tags)},
        )


def _shapes(store: LatentStore) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """Of the images that were encoded: shorter sides, ratios of width to height."""
    width, height = (store.samples[name].to_numpy() for name in ("width", "height"))
    return [
        ("Shorter side", "pixels; images", _binned(np.minimum(width, height), SHORT_SIDES)),
        ("Width to height", "ratio; images", _binned(width / np.maximum(height, 1), RATIOS)),
    ]


def _binned(values: Any, edges: Sequence[float]) -> list[tuple[str, int]]:
    """(range, count), without empty ranges at both ends."""
    named = [f"{edge:.3g}" if edge < 1000 else f"{edge:,.0f}" for edge in edges]
    names = [f"below {named[0]}", *map(" to ".join, itertools.pairwise(named))]
    rows = list(zip([*names, f"{named[-1]} or more"], histogram(values, edges), strict=True))
    filled = [i for i, (_, count) in enumerate(rows) if count]
    return rows[filled[0] : filled[-1] + 1] if filled else []


def _captions(store: LatentStore, name: str, about: dict[str, Any]) -> dict[str, Any]:
    tags = about["tags"].get(name, {})
    paired = list(tags)[:PAIRED]
    shares = [
        (_short(tag), [both / max(1, tags[tag]) for both in row])
        for tag, row in zip(paired, together(store, name, paired), strict=True)
    ]
    return {
        "name": name,
        "captioned": about["captions"][name],
        "words": about["words"][name],
        "lengths": _binned(word_counts(store.samples[name]), WORDS),
        "tags": [(_short(tag), count) for tag, count in tags.items()],
        "together": shares if len(shares) > 1 else [],
    }


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _samples(
    store: LatentStore, config: StoreReportOptions, column: str | None
) -> tuple[list[dict[str, str]], list[str], str]:
    """Samples chosen at random, the pictures that their latents decode to, and the VAE's name."""
    count = min(config.count, len(store))
    if not count:
        return [], [], ""
    chosen = np.random.default_rng(config.seed).choice(len(store), count, replace=False)
    vae = load_vae_for(store.identity, config.vae, [store.root])
    device = device_of(config.device)
    vae.model.to(device)
    samples, pictures = [], []
    with torch.inference_mode():
        for index in progress_bar(chosen, "decoding", unit="image", leave=False):
            sample = store.samples.slice(int(index), 1).to_pylist()[0]
            raw = store.read(sample["bucket"], [sample["row"]])
            pictures.append(data_uri(small_webp(decoded(vae, raw, device))))
            place = f"{sample['bucket']} row {sample['row']}"
            samples.append(
                {
                    "key": sample["key"],
                    "caption": ((sample[column] if column else None) or "")[:CAPTION],
                    "about": f"{place}, of {sample['width']}x{sample['height']}",
                }
            )
    return samples, pictures, vae.name


def _rejected(view: StoreView) -> tuple[str, list[dict[str, Any]]]:
    """The sums as a sentence, and each reason with a few images."""
    counts, left_out = account(view)
    found = []
    if left_out.num_rows:
        live = view.manifest.live(view.generation)
        sandbox = decoders(1)
        for reason in pc.unique(left_out["reason"]).to_pylist():
            rows = left_out.filter(pc.equal(left_out["reason"], reason))
            first = rows.slice(0, EXAMPLES).to_pylist()
            wanted = live.filter(
                pc.is_in(live["key"], value_set=rows["key"].slice(0, EXAMPLES).combine_chunks())
            )
            sources = dict(
                zip(wanted["key"].to_pylist(), wanted["source"].to_pylist(), strict=True)
            )
            for row in first:
                row["picture"] = _picture_of(sources.get(row["key"], ""), sandbox)
            found.append(
                {
                    "reason": reason,
                    "count": rows.num_rows,
                    "meaning": REASONS.get(reason, ""),
                    "examples": first,
                }
            )
    return str(counts), sorted(found, key=lambda it: -it["count"])


def _picture_of(source: str, sandbox: Any) -> str | None:
    """A thumbnail of a rejected image; None where it cannot be read or decoded."""
    try:
        data = read_source(source, max_bytes(MAX_PIXELS))
    except OSError:
        return None
    pixels = sandbox.call(shrunk, data, SIDE)
    if isinstance(pixels, Rejected):
        return None
    return data_uri(small_webp(Image.fromarray(pixels)))
