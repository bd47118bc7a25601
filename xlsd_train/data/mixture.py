"""Several stores as one: `--data photos:3 cc12m`. It reads as a LatentStore does.

In each bucket the first store's live samples come first, then the second's, and so on; by that
place among them a sample is read. A weight is how many times an epoch uses each of a store's
samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xlsd_cache.dataset.batch_order import Share
from xlsd_cache.dataset.selection import Mask, Ordinals
from xlsd_cache.errors import UserError
from xlsd_cache.integrity.statistics import Moments, moments
from xlsd_cache.store.identity import record_encoder, unknown_encoder
from xlsd_cache.store.reader import LatentStore

MOST = 10**6  # of a weight
MUST_AGREE = ("channels", "scaling_factor", "shift_factor", "vae_padding")  # and the encoder


class Part(NamedTuple):
    """One store of a mixture."""

    store: LatentStore
    weight: Fraction


class Mixture:
    """The stores of a run. Use as a context manager, or `close()`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Raises UserError where the parts' latents are not of one VAE."""
        self.parts = list(parts)
        stores = [part.store for part in parts]
        self.root = " ".join(str(store.root) for store in stores)
        _prove(stores)
        self.identity = stores[0].identity
        for store in stores[1:]:
            _agree(stores[0], store)
            if store.identity.dtype != self.identity.dtype:  # float16's values are all float32's
                self.identity = replace(self.identity, dtype="float32")
        self.caption_columns = tuple(
            dict.fromkeys(name for store in stores for name in store.caption_columns)
        )
        names = sorted({name for store in stores for name in store.buckets})
        self._bounds = {  # of each bucket, where each store's samples begin, and their end
            name: np.cumsum([0, *(len(store.buckets.get(name, ())) for store in stores)])
            for name in names
        }
        ends = np.cumsum([0, *(bounds[-1] for bounds in self._bounds.values())]).tolist()
        self._starts = dict(zip(names, ends, strict=False))  # of each bucket in `samples`
        self.buckets: dict[str, Ordinals] = {
            name: np.arange(bounds[-1]) for name, bounds in self._bounds.items()
        }

    def __len__(self) -> int:
        """Live samples of all stores."""
        return sum(len(part.store) for part in self.parts)

    @cached_property
    def samples(self) -> pa.Table:
        """The stores' tables, by bucket; a caption column that a store has not is empty there."""
        if len(self.parts) == 1:
            return self.parts[0].store.samples
        pieces = [
            self.parts[at].store.samples.slice(first, count) for at, first, count in self._pieces()
        ]
        return pa.concat_tables(pieces or [self.parts[0].store.samples], promote_options="default")

    def shape(self, bucket: str) -> tuple[int, int, int]:
        """(C, h, w) of a bucket's latents."""
        return self.parts[0].store.shape(bucket)

    def sample_index(self, bucket: str, ordinals: Ordinals) -> Ordinals:
        """Rows of `samples` for the n-th live samples of a bucket."""
        rows: Ordinals = self._starts[bucket] + ordinals
        return rows

    def read(
        self, bucket: str, rows: Sequence[int] | Ordinals, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Raw latents [n, C, h, w] of these live samples of a bucket, in this order.

        In float32 where not all stores hold float16. Raises UserError as LatentStore does.
        """
        if out is None:
            out = np.empty((len(rows), *self.shape(bucket)), self.identity.dtype)
        for store, there, places in self._of_stores(bucket, rows):
            whole = len(places) == len(rows) and store.identity.dtype == self.identity.dtype
            found = store.read(bucket, there, out if whole else None)
            if not whole:
                out[places] = found
        return out

    def will_need(self, bucket: str, rows: Sequence[int] | Ordinals) -> None:
        """Start reading these samples into the page cache, without waiting."""
        for store, there, _ in self._of_stores(bucket, rows):
            store.will_need(bucket, there)

    def tagged(self, column: str, tag: str) -> Mask:
        """Which rows of `samples` have exactly this tag in a caption column.

        Raises UserError where no store has such a column.
        """
        having = [column in part.store.caption_columns for part in self.parts]
        masks = [
            part.store.tagged(column, tag)
            if has or not any(having)
            else np.zeros(len(part.store), np.bool_)
            for part, has in zip(self.parts, having, strict=True)
        ]
        pieces = [masks[at][first : first + count] for at, first, count in self._pieces()]
        return np.concatenate([*pieces, np.empty(0, np.bool_)])

    def counts(self, mask: Mask) -> list[int]:
        """How many of each store's samples are in a mask of the rows of `samples`."""
        counts, row = [0] * len(self.parts), 0
        for at, _, count in self._pieces():
            counts[at] += int(mask[row : row + count].sum())
            row += count
        return counts

    def shares(self, chosen: Mapping[str, Ordinals] | None) -> dict[str, list[Share]]:
        """Of each bucket how many of the chosen samples each store has, and how often it is used.

        `chosen` are ascending, of each bucket that is used; None: all samples. For a BatchOrder.
        """
        found = {}
        for name in self.buckets if chosen is None else chosen:
            bounds = self._bounds[name]
            if chosen is not None:
                bounds = np.searchsorted(chosen[name], bounds)
            sizes = np.diff(bounds).tolist()
            weights = [part.weight for part in self.parts]
            found[name] = [Share(*each) for each in zip(sizes, weights, strict=True)]
        return found

    def moments(self) -> Moments:
        """Mean and standard deviation by channel of the raw latents, as often as each is used."""
        found = [moments(part.store) for part in self.parts if len(part.store)]
        if len(found) < 2:
            return found[0] if found else Moments([], [], 0)
        uses = [float(part.weight * len(part.store)) for part in self.parts if len(part.store)]
        means, stds = np.array([x.mean for x in found]), np.array([x.std for x in found])
        mean = np.average(means, axis=0, weights=uses)
        square = np.average(stds**2 + means**2, axis=0, weights=uses)
        std = np.sqrt(np.maximum(0, square - mean**2))
        return Moments(mean.tolist(), std.tolist(), sum(x.samples for x in found))

    def close(self) -> None:
        """Close all shard files."""
        for part in self.parts:
            part.store.close()

    def __enter__(self) -> "Mixture":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """(store, its first row, rows) of the pieces of their tables that make up `samples`."""
        for name, bounds in self._bounds.items():
            for at, count in enumerate(np.diff(bounds).tolist()):
                if count:
                    (first,) = self.parts[at].store.sample_index(name, np.zeros(1, np.int64))
                    yield at, int(first), count

    def _of_stores(
        self, bucket: str, rows: Sequence[int] | Ordinals
    ) -> Iterator[tuple[LatentStore, Ordinals, Ordinals]]:
        """(store, its row numbers, places in `rows`) of each store that holds any of them."""
        wanted = np.asarray(rows, np.int64)
        bounds = self._bounds[bucket].tolist()
        for part, (first, last) in zip(self.parts, pairwise(bounds), strict=True):
            places = np.flatnonzero((wanted >= first) & (wanted < last))
            if len(places):
                yield part.store, part.store.buckets[bucket][wanted[places] - first], places


def open_mixture(data: Sequence[str], generations: Sequence[int] | None = None) -> Mixture:
    """Open the stores that --data names, each as of its generation or the newest complete one.

    Raises UserError as LatentStore.open does, and for a weight that is none.
    """
    named = [_weighed(given) for given in data]
    folders = [Path(path).expanduser().resolve() for path, _ in named]
    twice = [path for (path, _), at in zip(named, folders, strict=True) if folders.count(at) > 1]
    if twice:
        raise UserError(f"--data names {twice[0]} twice; name it once, with a weight: PATH:2")
    with ExitStack() as stack:
        parts = []
        for at, (path, weight) in enumerate(named):
            generation = generations[at] if generations and at < len(generations) else None
            parts.append(Part(stack.enter_context(LatentStore.open(path, generation)), weight))
        mixture = Mixture(parts)
        stack.pop_all()
        return mixture


def _weighed(given: str) -> tuple[str, Fraction]:
    """The path and the weight of STORE[:WEIGHT]; a folder of that whole name is that folder."""
    path, colon, number = given.rpartition(":")
    if not colon or not path or Path(given).expanduser().exists() or {"/", "\\"} & set(number):
        return given, Fraction(1)
    try:  # as a float first: Fraction writes 1e999999999 out
        weight = Fraction(number) if 0 < float(number) <= MOST else Fraction(0)
    except ValueError:
        weight = Fraction(0)
    if not weight:
        raise UserError(
            f"--data {given}: {number!r} is no weight above 0 and up to {MOST}; write {path}:2 to "
            f"use each of its images twice an epoch, or leave the store out"
        )
    return path, weight


def _agree(one: LatentStore, other: LatentStore) -> None:
    """Latents of two encoders must not be trained on together."""
    ours, theirs = one.identity, other.identity
    same = ours.encoder_is(theirs.vae_sha256, theirs.encoder_sha256)
    if same is None:
        old, new = (other, ours) if ours.encoder_sha256 else (one, theirs)
        raise UserError(unknown_encoder(old.root, old.identity, new.vae_name, new.vae_sha256))
    differing = [name for name in MUST_AGREE if getattr(ours, name) != getattr(theirs, name)]
    for name in [*([] if same else ["encoder_sha256"]), *differing]:
        raise UserError(
            f"--data {one.root} was encoded with {ours.vae_name} ({name} "
            f"{str(getattr(ours, name))[:12]}) and {other.root} with {theirs.vae_name} "
            f"({str(getattr(theirs, name))[:12]}); their latents must not mix: build one of them "
            f"again"
        )


def _prove(stores: list[LatentStore]) -> None:
    """Find out which encoder stores of older versions have, where they are mixed with others.

    Another store of the same VAE says it, or the VAE that encoded them if it is there.
    """
    known = {store.identity.vae_sha256: store.identity.encoder_sha256 for store in stores}
    known |= {
        store.identity.vae_sha256: store.identity.encoder_sha256
        for store in stores
        if store.identity.encoder_sha256
    }
    for store in stores:
        whole = store.identity.vae_sha256
        if not known[whole] and len(known) > 1:
            from xlsd_cache.encoding.compatibility import (
                original_vae,  # loads torch; mostly not needed
            )

            if vae := original_vae(store.identity):
                known[whole] = vae.encoder_sha256
        if known[whole] and not store.identity.encoder_sha256:
            record_encoder(store.root, whole, known[whole])
            store.identity = replace(store.identity, encoder_sha256=known[whole])
