"""Which of a cache's latents are what they are said to be: together, and each by itself."""

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
from xlsd_cache.images.decode import MOST_PIXELS, Pixels, decode
from xlsd_cache.images.sandbox import decoders
from xlsd_cache.interop.cache_files import KEEPS
from xlsd_cache.interop.formats import read
from xlsd_cache.interop.items import Item
from xlsd_cache.interop.plausibility import (
    DISPROVED,
    NO_IMAGE,
    OTHER,
    PROVED_OTHER,
    Likeness,
    Sample,
    Verdict,
    compare,
    judge,
    refusal,
)
from xlsd_cache.interop.thumbnails import Thumbnails
from xlsd_cache.interop.transfer import order
from xlsd_cache.options import ImportOptions
from xlsd_cache.outcomes import REASONS, Reason, Rejected
from xlsd_cache.vocabulary import DOWNSCALE, Bucket

log = logging.getLogger("xlsd.cache.interop")


@dataclass
class Prover:
    """Compares latents with their images, and says which are refused."""

    config: ImportOptions
    vae: Vae
    device: torch.device
    kind: str
    scaled: bool  # the store's own latents were; what is new says it by itself
    refused: dict[str, Rejected] = field(default_factory=dict)  # by origin
    forced: Counter[Reason] = field(default_factory=Counter)  # reason -> latents taken all the same

    def choose(self, items: list[Item]) -> Item:
        """Of one latent with each of its possible images, the one that it is most alike."""
        latent = read(items[0].file, items[0].held)
        if items[0].rejected or isinstance(latent, Rejected):
            return items[0]
        samples = (Sample(item.key, latent, self._pixels(item)) for item in items)
        found = compare(samples, self.vae, self.device, rounds=0)
        alike = [-1.0 if one.alike is None else one.alike for one in found]
        return items[alike.index(max(alike))]

    def prove(self, new: list[Item], again: list[Item]) -> Verdict | None:
        """Compare what is `new`, and `again` what was refused before; None where nothing is new.

        Raises UserError for what is disproved of all, and for what is doubtful and not forced.
        """
        # Spread over all by their names' hashes; those with an image first.
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
        self._prove_rest(rest, guess, limit)
        self._say()
        return verdict

    def _samples(self, items: list[Item]) -> Iterator[tuple[str, Sample]]:
        """Those of the items whose latents can be read."""
        for item in items:
            latent = read(item.file, item.held)
            if not isinstance(latent, Rejected):
                yield item.origin, Sample(item.key, latent, self._pixels(item))

    def _judge(self, found: list[Likeness], count: int) -> Verdict | None:
        """Of all together; None where they are not their images' and others of the cache were."""
        log.info(f"compared {len(found)} of {count} latents with {self.vae.name}:")
        for likeness in found:
            log.info(f"  {likeness}")
        adding = (self.config.out / "latents.zarr" / "zarr.json").exists()
        if adding and all(one.alike is not None and one.alike < OTHER for one in found):
            return None
        verdict = judge(found, self.vae, self.kind, KEEPS[self.kind])
        if verdict.disproved:
            raise UserError(verdict.disproved)
        if verdict.doubtful and not self.config.force:
            raise UserError(
                f"these latents cannot be trusted: {'; '.join(verdict.doubtful)}; build from the "
                f"images, or add --force to import them all the same"
            )
        for doubt in verdict.doubtful:
            log.warning(f"forced: {doubt}")
        return verdict

    def _fit(
        self, items: list[Item], samples: dict[str, Sample], found: dict[str, Likeness]
    ) -> Thumbnails | None:
        """The map from latents to thumbnails, of the samples that were not refused."""
        pairs = []
        for item in items:
            thumbnail = self._pixels(item, DOWNSCALE)
            if thumbnail is not None and item.origin not in self.refused:
                mirrored = found[item.origin].mirrored
                latent = samples[item.origin].latent.astype(np.float32)
                pairs.append((latent, thumbnail[:, ::-1] if mirrored else thumbnail))
        return Thumbnails.fit(pairs) if pairs else None

    def _prove_rest(self, items: list[Item], guess: Thumbnails | None, limit: float) -> None:
        """Look at each thumbnail, and with the VAE at those that are not surely right."""
        seen = [item for item in items if item.image]
        lonely = [item.origin for item in items if not item.image]
        if self.config.force:
            self.forced[NO_IMAGE.reason] += len(lonely)
        else:
            self.refused |= dict.fromkeys(lonely, NO_IMAGE)
        doubted = self._doubted(seen, guess) if guess else seen
        few = len(doubted) < 99
        shown = progress_bar(
            self._samples(doubted), "comparing", len(doubted), unit="latent", disable=few
        )
        for origin, sample in shown:
            (found,) = compare([sample], self.vae, self.device, rounds=0)
            self._weigh({origin: found}, limit)
        if seen:
            log.info(
                f"the thumbnails of {len(seen) - len(doubted)} of the other {len(seen)} are their "
                f"images'; the other {len(doubted)} were compared as well"
            )

    def _doubted(self, items: list[Item], guess: Thumbnails) -> list[Item]:
        """Those of which the thumbnail does not show that they are right."""
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

    def _is_sure(self, guess: Thumbnails, item: Item) -> bool:
        latent, thumbnail = read(item.file, item.held), self._pixels(item, DOWNSCALE)
        if isinstance(latent, Rejected):
            return True  # and rejected when it is to be imported
        return thumbnail is not None and guess.agree(latent.astype(np.float32), thumbnail)

    def _weigh(self, found: dict[str, Likeness], limit: float) -> None:
        for origin, likeness in found.items():
            why = refusal(likeness, self.vae, limit, self.scaled)
            if why and (why.reason in DISPROVED or not self.config.force):
                self.refused[origin] = why
            elif why:
                self.forced[why.reason] += 1

    def _say(self) -> None:
        """Name some of what is refused; all are in the table of the rejected."""
        for reason, count in sorted(self.forced.items()):
            if count:
                log.warning(f"forced: {count} latents, {reason}: {REASONS[reason]}")
        for origin, why in islice(self.refused.items(), 20):
            log.warning(f"refused {origin}: {why.reason}: {why.detail}")
        if len(self.refused) > 20:
            log.warning(f"and {len(self.refused) - 20} more were refused")

    def _pixels(self, item: Item, divisor: int = 1) -> Pixels | None:
        """What should have gone into the VAE, or smaller, if the image is there and readable."""
        if item.image is None or not all(item.size):
            return None
        try:
            data = item.image.read()
        except OSError:
            return None
        width, height = (side // divisor for side in Bucket.parse(item.bucket))
        guard = decoders(self.config.workers)
        pixels = guard.call(decode, data, item.size, item.crop, (width, height), MOST_PIXELS)
        if isinstance(pixels, Rejected):
            return None
        return pixels[::-1] if item.held.upside_down else pixels


def settle(items: list[Item], refused: dict[str, Rejected]) -> list[Item]:
    """The items, with those rejected that are refused."""
    return [
        item.refused(refused[item.origin]) if item.origin in refused else item for item in items
    ]
