"""Check a cache's latents against their images, all together and one by one."""

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.encoding.vae import Vae
from xlsd_cache.errors import UserError
from xlsd_cache.images.decode import Pixels, decode
from xlsd_cache.images.header import MOST_PIXELS
from xlsd_cache.images.sandbox import decoders
from xlsd_cache.interop.cache_files import KEEPS
from xlsd_cache.interop.formats import read
from xlsd_cache.interop.items import ImportItem
from xlsd_cache.interop.plausibility import (
    DISPROVED,
    NO_IMAGE,
    OTHER,
    PROVED_OTHER,
    CacheVerdict,
    Compared,
    Likeness,
    compare,
    judge,
    refusal,
)
from xlsd_cache.interop.thumbnails import Thumbnails
from xlsd_cache.interop.transfer import order
from xlsd_cache.options.import_latents import ImportOptions
from xlsd_cache.outcomes import REASONS, Reason, Rejected
from xlsd_cache.store.identity import is_store
from xlsd_cache.vocabulary import DOWNSCALE, Bucket

log = logging.getLogger("xlsd.cache.interop")


@dataclass
class LatentCheck:
    """Compares latents with their images and rejects those that do not match."""

    config: ImportOptions
    vae: Vae
    device: torch.device
    kind: str
    scaled: bool  # whether the store's latents were; new ones are measured
    rejected: dict[str, Rejected] = field(default_factory=dict)  # by origin
    forced: Counter[Reason] = field(default_factory=Counter)  # reason -> latents imported anyway

    def choose(self, items: list[ImportItem]) -> ImportItem:
        """Of the possible images of one latent, choose the one that it is most alike."""
        latent = read(items[0].file, items[0].latent)
        if items[0].rejected or isinstance(latent, Rejected):
            return items[0]
        samples = (Compared(item.key, latent, self._pixels(item)) for item in items)
        found = compare(samples, self.vae, self.device, rounds=0)
        alike = [-1.0 if one.alike is None else one.alike for one in found]
        return items[alike.index(max(alike))]

    def run(self, new: list[ImportItem], again: list[ImportItem]) -> CacheVerdict | None:
        """Check new latents, and those that were rejected before; None where nothing is new.

        Raises UserError where the cache as a whole is disproved, or is doubtful and not forced.
        """
        # A pseudo-random order, those with an image first.
        spread = sorted(new, key=lambda i: (i.image is None, order(i.key)))
        samples = dict(islice(self._samples(spread), self.config.compare))
        verdict, limit, guess = None, PROVED_OTHER, None
        if samples:
            found = dict(
                zip(samples, compare(samples.values(), self.vae, self.device), strict=True)
            )
            verdict = self._judge(list(found.values()), len(new))
            if verdict:
                limit, self.scaled = verdict.limit, verdict.scaled
            self._weigh(found, limit)
            guess = self._fit([i for i in spread if i.origin in samples], samples, found)
        rest = [item for item in (*spread, *again) if item.origin not in samples]
        self._check_rest(rest, guess, limit)
        self._log_rejected()
        return verdict

    def _samples(self, items: list[ImportItem]) -> Iterator[tuple[str, Compared]]:
        """The items whose latents can be read."""
        for item in items:
            latent = read(item.file, item.latent)
            if not isinstance(latent, Rejected):
                yield item.origin, Compared(item.key, latent, self._pixels(item))

    def _judge(self, found: list[Likeness], count: int) -> CacheVerdict | None:
        """The conclusion from all; None where they match no image but earlier latents did."""
        log.info(f"compared {len(found)} of {count} latents with {self.vae.name}:")
        for likeness in found:
            log.info(f"  {likeness}")
        adding = is_store(self.config.out)
        if adding and all(one.alike is not None and one.alike < OTHER for one in found):
            return None
        verdict = judge(found, self.vae, self.kind, KEEPS[self.kind])
        if verdict.disproved:
            raise UserError(verdict.disproved)
        if verdict.doubtful and not self.config.force:
            raise UserError(
                f"these latents are doubtful: {'; '.join(verdict.doubtful)}. Build from the "
                f"images, or import them anyway with --force."
            )
        for doubt in verdict.doubtful:
            log.warning(f"forced: {doubt}")
        return verdict

    def _fit(
        self, items: list[ImportItem], samples: dict[str, Compared], found: dict[str, Likeness]
    ) -> Thumbnails | None:
        """Fit the map from latents to thumbnails to the samples that were not rejected."""
        pairs = []
        for item in items:
            thumbnail = self._pixels(item, DOWNSCALE)
            if thumbnail is not None and item.origin not in self.rejected:
                mirrored = found[item.origin].mirrored
                latent = samples[item.origin].latent.astype(np.float32)
                pairs.append((latent, thumbnail[:, ::-1] if mirrored else thumbnail))
        return Thumbnails.fit(pairs) if pairs else None

    def _check_rest(self, items: list[ImportItem], guess: Thumbnails | None, limit: float) -> None:
        """Compare all thumbnails, and with the VAE where those are not conclusive."""
        with_image = [item for item in items if item.image]
        without = [item.origin for item in items if not item.image]
        if self.config.force:
            self.forced[NO_IMAGE.reason] += len(without)
        else:
            self.rejected |= dict.fromkeys(without, NO_IMAGE)
        doubted = self._doubted(with_image, guess) if guess else with_image
        few = len(doubted) < 99
        shown = progress_bar(
            self._samples(doubted), "comparing", len(doubted), unit="latent", disable=few
        )
        for origin, sample in shown:
            (found,) = compare([sample], self.vae, self.device, rounds=0)
            self._weigh({origin: found}, limit)
        if with_image:
            log.info(
                f"checked the other {len(with_image)}: {len(with_image) - len(doubted)} by "
                f"thumbnail, {len(doubted)} with the VAE"
            )

    def _doubted(self, items: list[ImportItem], guess: Thumbnails) -> list[ImportItem]:
        """The items that their thumbnails do not confirm."""
        doubted = []
        few = len(items) < 999
        with (
            ThreadPoolExecutor(self.config.workers) as pool,
            progress_bar(desc="thumbnails", total=len(items), unit="latent", disable=few) as bar,
        ):
            for start in range(0, len(items), 1024):
                some = items[start : start + 1024]
                sure = pool.map(partial(self._is_sure, guess), some)
                doubted += [item for item, is_sure in zip(some, sure, strict=True) if not is_sure]
                bar.update(len(some))
        return doubted

    def _is_sure(self, guess: Thumbnails, item: ImportItem) -> bool:
        latent, thumbnail = read(item.file, item.latent), self._pixels(item, DOWNSCALE)
        if isinstance(latent, Rejected):
            return True  # rejected when it is copied
        return thumbnail is not None and guess.agree(latent.astype(np.float32), thumbnail)

    def _weigh(self, found: dict[str, Likeness], limit: float) -> None:
        for origin, likeness in found.items():
            why = refusal(likeness, self.vae, limit, self.scaled)
            if why and (why.reason in DISPROVED or not self.config.force):
                self.rejected[origin] = why
            elif why:
                self.forced[why.reason] += 1

    def _log_rejected(self) -> None:
        """Log some of the rejected latents; all are in rejected.parquet."""
        for reason, count in sorted(self.forced.items()):
            if count:
                log.warning(f"forced: {count} latents, {reason}: {REASONS[reason]}")
        for origin, why in islice(self.rejected.items(), 20):
            log.warning(f"rejected {origin}: {why.reason}: {why.detail}")
        if len(self.rejected) > 20:
            log.warning(f"rejected {len(self.rejected) - 20} more")

    def _pixels(self, item: ImportItem, divisor: int = 1) -> Pixels | None:
        """The image's crop at the bucket's size over `divisor`; None where it cannot be read."""
        if item.image is None or not all(item.size):
            return None
        try:
            data = item.image.read()
        except OSError:
            return None
        width, height = (side // divisor for side in Bucket.parse(item.bucket))
        sandbox = decoders(self.config.workers)
        pixels = sandbox.call(decode, data, item.size, item.crop, (width, height), MOST_PIXELS)
        if isinstance(pixels, Rejected):
            return None
        return pixels[::-1] if item.latent.upside_down else pixels


def mark_rejected(items: list[ImportItem], rejected: dict[str, Rejected]) -> list[ImportItem]:
    """The items, with those rejected that the check rejected."""
    return [
        item.reject(rejected[item.origin]) if item.origin in rejected else item for item in items
    ]
