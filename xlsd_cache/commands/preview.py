"""`xlsd-cache preview`: draw a contact sheet of decoded latents."""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.encoding.compatibility import decoder_notice, load_vae_for
from xlsd_cache.encoding.vae import Vae
from xlsd_cache.errors import UserError
from xlsd_cache.options.inspection import PreviewOptions
from xlsd_cache.pages.lettering import Font, cut, wrapped
from xlsd_cache.runtime.atomic import replacing
from xlsd_cache.runtime.device import device_of
from xlsd_cache.runtime.own_files import is_picture, marking, refuse_foreign, writing
from xlsd_cache.store.reader import LatentStore

log = logging.getLogger("xlsd.cache.commands")

CAPTION_LINES = 5
INK, FAINT, PAPER, CROP = "#222222", "#999999", "#ffffff", "#4477aa"


def preview(config: PreviewOptions) -> None:
    """Draw the chosen samples and write the sheet atomically.

    Raises UserError if there are none, for a VAE that does not fit the store, and if `out` is not a
    preview or cannot be written.
    """
    refuse_foreign(config.out, (".png", ".jpg", ".jpeg", ".webp"), is_picture)
    with LatentStore.open(config.store) as store:
        column = _column(store, config.caption)
        chosen = _chosen(store, config, column)
        vae = load_vae_for(store.identity, config.vae, [store.root])
        if told := decoder_notice(vae, store.identity):
            log.info(told)
        device = device_of(config.device)
        vae.model.to(device)
        sheet = _Sheet(config.columns, config.thumbnail, len(chosen))
        for place, index in enumerate(progress_bar(chosen, "decoding", unit="image", leave=False)):
            sample = store.samples.slice(int(index), 1).to_pylist()[0]
            raw = store.read(sample["bucket"], [sample["row"]])
            caption = sample[column] if column else None
            (picture,) = decoded(vae, raw, device)
            sheet.draw(place, picture, sample, caption or "(no caption)")
    with writing(config.out), replacing(config.out) as temporary:
        # given, because the temporary file has another suffix
        kind = Image.registered_extensions()[config.out.suffix.lower()]
        sheet.image.save(temporary, format=kind, **marking("preview"))
    log.info(f"{config.out}: {len(chosen)} of {len(store)} samples, decoded with {vae.name}")


def _column(store: LatentStore, wanted: str | None) -> str | None:
    there = store.caption_columns
    if wanted is not None and wanted not in there:
        raise UserError(
            f"{store.root} has no caption column {wanted!r} (it has {', '.join(there) or 'none'}); "
            f"choose one with --caption"
        )
    return wanted or next(iter(there), None)


def _chosen(store: LatentStore, config: PreviewOptions, column: str | None) -> NDArray[np.int64]:
    """Rows of `store.samples` to draw, in order; those of --rows in the order given."""
    if config.rows:
        return np.array([_place(store, row.strip()) for row in config.rows.split(",")])
    among = np.arange(len(store))
    if config.tags is not None:
        if column is None:
            raise UserError(f"--tags needs captions, and {config.store} has none; leave it out")
        having = [store.tagged(column, tag.strip()) for tag in config.tags.split(",")]
        among = np.flatnonzero(np.all(having, axis=0))
        if not len(among):
            raise UserError(
                f"no sample of {config.store} has the tags {config.tags!r} in its caption column "
                f"{column!r}; `xlsd-cache info {config.store}` lists the most frequent ones"
            )
    if not len(among):
        raise UserError(f"{config.store} has no live samples; run `xlsd-cache build` first")
    rng = np.random.default_rng(config.seed)
    return np.sort(rng.choice(among, min(config.count, len(among)), replace=False))


def _place(store: LatentStore, name: str) -> int:
    """The row of `store.samples` at BUCKET:ROW."""
    bucket, _, row = name.partition(":")
    if bucket not in store.buckets or not row.isdecimal():
        raise UserError(
            f"--rows {name!r} is not BUCKET:ROW with one of the buckets "
            f"{', '.join(store.buckets)}, e.g. {next(iter(store.buckets), '512x512')}:0"
        )
    rows = store.buckets[bucket]
    at = int(np.searchsorted(rows, int(row)))
    if at == len(rows) or rows[at] != int(row):
        raise UserError(
            f"--rows {name}: row {row} of bucket {bucket} is not live; its {len(rows)} live rows "
            f"are between {rows[0]} and {rows[-1]}"
        )
    return int(store.sample_index(bucket, np.array([at]))[0])


@torch.inference_mode()
def decoded(vae: Vae, raw: NDArray[Any], device: torch.device) -> list[Image.Image]:
    """Decode latents [n, C, h, w]. The last bits depend on n: some bytes differ by one."""
    decoded = vae.decode(torch.from_numpy(raw).float().to(device))
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(one) for one in pixels.permute(0, 2, 3, 1).cpu().numpy()]


class _Sheet:
    """A page of equal cells, each a picture with text below it."""

    def __init__(self, columns: int, thumbnail: int, count: int) -> None:
        self.columns, self.thumbnail = min(columns, count), thumbnail
        size = max(11, thumbnail // 18)
        self.font: Font = ImageFont.load_default(size)
        self.gap, self.leading = size, round(size * 1.3)
        self.cell = thumbnail + self.gap
        self.tall = self.cell + (2 + CAPTION_LINES) * self.leading + self.gap
        rows = -(-count // self.columns)
        page = self.columns * self.cell + self.gap, rows * self.tall + self.gap
        self.image = Image.new("RGB", page, PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def draw(self, place: int, picture: Image.Image, sample: dict[str, Any], caption: str) -> None:
        """Draw one sample into cell number `place`."""
        row, across = divmod(place, self.columns)
        x, y = self.gap + across * self.cell, self.gap + row * self.tall
        scale = self.thumbnail / max(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        small = picture.resize((width, height), Image.Resampling.LANCZOS)
        self.image.paste(small, (x, y + self.thumbnail - height))
        y += self.thumbnail + self.gap // 3
        self._crop_box(x, y, sample)
        left, top, right, bottom = (round(side) for side in sample["crop"])
        place_told = f"{sample['bucket']} row {sample['row']}"
        crop_told = f"{left},{top}-{right},{bottom} of {sample['width']}x{sample['height']}"
        indent = 3 * self.leading
        for number, (line, colour) in enumerate(((place_told, INK), (crop_told, FAINT))):
            told = cut(line, self.font, self.thumbnail - indent)
            self.pen.text((x + indent, y + number * self.leading), told, colour, self.font)
        for number, line in enumerate(
            wrapped(caption, self.font, self.thumbnail, CAPTION_LINES), start=2
        ):
            self.pen.text((x, y + number * self.leading), line, INK, self.font)

    def _crop_box(self, x: int, y: int, sample: dict[str, Any]) -> None:
        """Draw the image as an outline, two lines tall, and its crop."""
        room = 2 * self.leading - 6
        scale = room / max(1, sample["width"], sample["height"])
        whole = (x, y + 3, x + sample["width"] * scale, y + 3 + sample["height"] * scale)
        left, top, right, bottom = (side * scale for side in sample["crop"])
        self.pen.rectangle((x + left, y + 3 + top, x + right, y + 3 + bottom), CROP)
        self.pen.rectangle(whole, outline=INK)
