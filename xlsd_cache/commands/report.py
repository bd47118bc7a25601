"""`xlsd-cache report`: one self-contained HTML page about a store."""

import itertools
import logging
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2.utils import htmlsafe_json_dumps
from PIL import Image

from xlsd_cache.commands.info import any_store, describe, size_words
from xlsd_cache.console.progress import progress_bar
from xlsd_cache.files.uri import read_source
from xlsd_cache.images.decode import shrunk
from xlsd_cache.images.header import MAX_PIXELS, max_bytes
from xlsd_cache.images.sandbox import decoders
from xlsd_cache.integrity.accounting import Accounting, account, saved_outcomes
from xlsd_cache.integrity.statistics import histogram, together, word_counts
from xlsd_cache.options.inspection import StoreReportOptions
from xlsd_cache.outcomes import REASONS, Rejected
from xlsd_cache.pages.render import render
from xlsd_cache.pages.thumbnails import SIDE, data_uri, small_webp
from xlsd_cache.runtime.arrow import counts
from xlsd_cache.runtime.atomic import write_bytes
from xlsd_cache.runtime.own_files import is_page, refuse_foreign, writing
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.view import StoreView
from xlsd_cache.vocabulary import Bucket

log = logging.getLogger("xlsd.cache.commands")

EXAMPLES = 6  # of a reason for rejection
TAGS, PAIRED = 30, 12  # most frequent tags: as bars, and by pairs
CAPTION = 1000  # bytes of a caption that are shown, and of all on the page
CAPTIONS = 150_000
TAG, KEY, DETAIL = 60, 160, 240  # characters that are shown
PIXELS = 1 << 18  # decoded at once: one picture of 512x512, or more that are smaller
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
    with writing(path):
        write_bytes(path, html.encode())
    log.info(f"report {path}")
    return path


def _page(config: StoreReportOptions) -> str:
    view = StoreView.open(config.store.expanduser())
    sums, left_out = saved_outcomes(view) or account(view)
    rejected = _rejected(view, left_out)  # before the samples are in memory, too
    with any_store(view) as store:
        about = describe(view, store, sums, TAGS)
        samples, pictures, decoder = _samples(store, config)
        channels = [
            Channel(mean, std, mean - std, mean + std)
            for mean, std in zip(about["latents"]["mean"], about["latents"]["std"], strict=True)
        ]
        return render(
            "xlsd_cache.pages",
            "store.html",
            name=config.store.name or str(config.store),
            about=about,
            size=size_words(about["bytes"]),
            counts=str(sums),
            then=_next(config.store, store, sums),
            buckets=sorted(about["buckets"].items(), key=lambda it: -it[1]),
            shapes=_shapes(store),
            captions=[_captions(store, name, about) for name in store.caption_columns],
            channels=channels,
            low=min([0.0, *(it.low for it in channels)]),
            high=max([0.0, *(it.high for it in channels)]),
            rejected=rejected,
            pictures=pictures,
            decoder=decoder,
            frequent=sorted({tag for tags in about["tags"].values() for tag in tags if _fits(tag)}),
            data={
                "samples": samples,
                "columns": store.caption_columns,
                "tags": [name in about["tags"] for name in store.caption_columns],
            },
        )


def _next(path: Path, store: LatentStore, sums: Accounting) -> tuple[str, str]:
    """What to do with the store, and the command for it."""
    if sums.pending:
        return "Finish the build", shlex.join(["xlsd-cache", "encode", str(path)])
    words = ["xlsd-train", "--recipe", "phase1-unet", "--data", str(path)]
    if len(store.caption_columns) > 1:
        words += ["--caption", store.caption_columns[0]]
    return "Train the UNet on it", shlex.join([*words, "--out", "runs/phase1"])


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


def _short(text: str, most: int = TAG) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _fits(text: str) -> bool:
    return len(text) <= TAG


def _samples(
    store: LatentStore, config: StoreReportOptions
) -> tuple[list[dict[str, Any]], list[str], str]:
    """Samples chosen at random, the pictures that their latents decode to, and the VAE's name."""
    count = min(config.count, len(store))
    if not count:
        return [], [], ""
    chosen = np.random.default_rng(config.seed).choice(len(store), count, replace=False)
    found = [store.samples.slice(int(index), 1).to_pylist()[0] for index in chosen]
    columns = store.caption_columns
    room = min(CAPTION, CAPTIONS // (count * max(1, len(columns))))
    samples = [
        {
            "key": _end(it["key"]),
            "captions": [_cut(it[name] or "", room) for name in columns],
            "about": f"{it['bucket']} row {it['row']}, of {it['width']}x{it['height']}",
        }
        for it in found
    ]
    return samples, *_pictures(store, found, config)


def _pictures(
    store: LatentStore, samples: list[dict[str, Any]], config: StoreReportOptions
) -> tuple[list[str], str]:
    """The samples' latents, decoded in batches of one bucket, and the VAE's name."""
    from xlsd_cache.commands.preview import decoded  # torch takes 0.3 GB: only pictures need it
    from xlsd_cache.encoding.compatibility import load_vae_for
    from xlsd_cache.runtime.device import device_of

    vae, device = load_vae_for(store.identity, config.vae, [store.root]), device_of(config.device)
    vae.model.to(device)
    batches: list[list[int]] = []
    for bucket in dict.fromkeys(it["bucket"] for it in samples):
        members = [i for i, it in enumerate(samples) if it["bucket"] == bucket]
        shape = Bucket.parse(bucket)
        at_once = max(1, PIXELS // (shape.width * shape.height))
        batches += [members[i : i + at_once] for i in range(0, len(members), at_once)]
    pictures = [""] * len(samples)
    with progress_bar(None, "decoding", total=len(samples), unit="image", leave=False) as bar:
        for batch in batches:
            rows = [samples[i]["row"] for i in batch]
            raw = store.read(samples[batch[0]]["bucket"], rows)
            for i, picture in zip(batch, decoded(vae, raw, device), strict=True):
                pictures[i] = data_uri(small_webp(picture))
            bar.update(len(batch))
    return pictures, vae.name


def _cut(text: str, room: int) -> str:
    """The text, shortened to at most `room` bytes of the page's JSON."""
    whole, text = text, text[:room]
    while (size := len(htmlsafe_json_dumps(text)) - 2) > room:
        text = text[: len(text) * room // size]
    return text if text == whole else f"{text}..."


def _end(key: str) -> str:
    return key if len(key) <= KEY else f"...{key[-KEY:]}"


def _rejected(view: StoreView, left_out: pa.Table) -> list[dict[str, Any]]:
    """Each reason, with a few images."""
    found = []
    for reason, count in counts(left_out["reason"]).items():
        rows = left_out.filter(pc.equal(left_out["reason"], reason)).slice(0, EXAMPLES)
        found.append((reason, count, rows.to_pylist()))
    if not found:
        return []
    sources = _sources(view, [row["key"] for *_, rows in found for row in rows])
    sandbox = decoders(1)
    return [
        {
            "reason": reason,
            "count": count,
            "meaning": REASONS.get(reason, ""),
            "examples": [
                {
                    "key": _end(row["key"]),
                    "detail": _short(row["detail"] or "", DETAIL),
                    "picture": _picture_of(sources.get(row["key"]) or "", sandbox),
                }
                for row in rows
            ],
        }
        for reason, count, rows in sorted(found, key=lambda it: -it[1])
    ]


def _sources(view: StoreView, keys: list[str]) -> dict[str, str]:
    """Where the images of these keys were last; one column of the log is in memory at a time."""
    log = partial(view.manifest.plan_lines, view.generation)
    lines = log(["key"])["key"]
    wanted = pc.is_in(lines, value_set=pa.array(keys))
    lines = lines.filter(wanted)
    found = log(["source"])["source"].filter(wanted)
    return dict(zip(lines.to_pylist(), found.to_pylist(), strict=True))


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
