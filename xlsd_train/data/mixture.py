"""Several weighted stores read as one LatentStore, as in `--data photos:3 cc12m`.

In each bucket the first store's live samples come first, then the second's, and so on; a sample's
index in that order is its row number here. A weight is how many times an epoch uses each of a
store's samples.
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


class WeightedStore(NamedTuple):
    """One store of a mixture."""

    store: LatentStore
    weight: Fraction


class Mixture:
    """The stores of a run. Use as a context manager, or `close()`."""

    def __init__(self, parts: Sequence[WeightedStore]) -> None:
        """Raises UserError unless all latents are from one VAE."""
        self.parts = list(parts)
        stores = [part.store for part in parts]
        self.root = " ".join(str(store.root) for store in stores)
        _identify_encoders(stores)
        self.identity = stores[0].identity
        for store in stores[1:]:
            _check_compatible(stores[0], store)
            if store.identity.dtype != self.identity.dtype:  # float32 holds all float16 values
                self.identity = replace(self.identity, dtype="float32")
        self.caption_columns = tuple(
            dict.fromkeys(name for store in stores for name in store.caption_columns)
        )
        names = sorted({name for store in stores for name in store.buckets})
        self._bounds = {  # bucket -> where each store's samples begin, and the end of the last
            name: np.cumsum([0, *(len(store.buckets.get(name, ())) for store in stores)])
            for name in names
        }
        ends = np.cumsum([0, *(bounds[-1] for bounds in self._bounds.values())]).tolist()
        self._starts = dict(zip(names, ends, strict=False))  # bucket -> its first row in `samples`
        self.buckets: dict[str, Ordinals] = {
            name: np.arange(bounds[-1]) for name, bounds in self._bounds.items()
        }

    def __len__(self) -> int:
        """Live samples of all stores."""
        return sum(len(part.store) for part in self.parts)

    @cached_property
    def samples(self) -> pa.Table:
        """The stores' tables by bucket; a caption column that a store lacks is null there."""
        if len(self.parts) == 1:
            return self.parts[0].store.samples
        slices = [
            self.parts[i].store.samples.slice(first, count) for i, first, count in self._slices()
        ]
        return pa.concat_tables(slices or [self.parts[0].store.samples], promote_options="default")

    def shape(self, bucket: str) -> tuple[int, int, int]:
        """(C, h, w) of a bucket's latents."""
        return self.parts[0].store.shape(bucket)

    def sample_index(self, bucket: str, ordinals: Ordinals) -> Ordinals:
        """Rows of `samples` for the n-th live samples of a bucket; `ordinals` are the n."""
        rows: Ordinals = self._starts[bucket] + ordinals
        return rows

    def read(
        self, bucket: str, rows: Sequence[int] | Ordinals, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Raw latents [n, C, h, w] of these live samples of a bucket, in this order.

        float16 if all stores are, else float32. Raises UserError as LatentStore.read does.
        """
        if out is None:
            out = np.empty((len(rows), *self.shape(bucket)), self.identity.dtype)
        for store, own_rows, places in self._by_store(bucket, rows):
            whole = len(places) == len(rows) and store.identity.dtype == self.identity.dtype
            latents = store.read(bucket, own_rows, out if whole else None)
            if not whole:
                out[places] = latents
        return out

    def will_need(self, bucket: str, rows: Sequence[int] | Ordinals) -> None:
        """Start reading these samples into the page cache, without waiting."""
        for store, own_rows, _ in self._by_store(bucket, rows):
            store.will_need(bucket, own_rows)

    def tagged(self, column: str, tag: str) -> Mask:
        """Which rows of `samples` have exactly this tag in a caption column.

        Raises UserError if no store has such a column.
        """
        having = [column in part.store.caption_columns for part in self.parts]
        masks = [
            part.store.tagged(column, tag)
            if has or not any(having)
            else np.zeros(len(part.store), np.bool_)
            for part, has in zip(self.parts, having, strict=True)
        ]
        slices = [masks[i][first : first + count] for i, first, count in self._slices()]
        return np.concatenate([*slices, np.empty(0, np.bool_)])

    def counts(self, mask: Mask) -> list[int]:
        """How many of each store's samples are in a mask of the rows of `samples`."""
        counts, row = [0] * len(self.parts), 0
        for i, _, count in self._slices():
            counts[i] += int(mask[row : row + count].sum())
            row += count
        return counts

    def shares(self, chosen: Mapping[str, Ordinals] | None) -> dict[str, list[Share]]:
        """For a BatchOrder: by bucket, each store's number of chosen samples and its weight.

        `chosen` has ascending ordinals of each bucket that is used; None: all samples.
        """
        shares = {}
        for name in self.buckets if chosen is None else chosen:
            bounds = self._bounds[name]
            if chosen is not None:
                bounds = np.searchsorted(chosen[name], bounds)
            sizes = np.diff(bounds).tolist()
            weights = [part.weight for part in self.parts]
            shares[name] = [Share(*each) for each in zip(sizes, weights, strict=True)]
        return shares

    def moments(self) -> Moments:
        """Mean and standard deviation by channel of the raw latents, weighted by their use."""
        each = [moments(part.store) for part in self.parts if len(part.store)]
        if len(each) < 2:
            return each[0] if each else Moments([], [], 0)
        uses = [float(part.weight * len(part.store)) for part in self.parts if len(part.store)]
        means, stds = np.array([x.mean for x in each]), np.array([x.std for x in each])
        mean = np.average(means, axis=0, weights=uses)
        square = np.average(stds**2 + means**2, axis=0, weights=uses)
        std = np.sqrt(np.maximum(0, square - mean**2))
        return Moments(mean.tolist(), std.tolist(), sum(x.samples for x in each))

    def close(self) -> None:
        """Close all shard files."""
        for part in self.parts:
            part.store.close()

    def __enter__(self) -> "Mixture":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _slices(self) -> Iterator[tuple[int, int, int]]:
        """(store's number, first row, rows) of the slices of the stores' tables in `samples`."""
        for name, bounds in self._bounds.items():
            for i, count in enumerate(np.diff(bounds).tolist()):
                if count:
                    (first,) = self.parts[i].store.sample_index(name, np.zeros(1, np.int64))
                    yield i, int(first), count

    def _by_store(
        self, bucket: str, rows: Sequence[int] | Ordinals
    ) -> Iterator[tuple[LatentStore, Ordinals, Ordinals]]:
        """(store, its row numbers, their places in `rows`) of each store that has any of them."""
        wanted = np.asarray(rows, np.int64)
        bounds = self._bounds[bucket].tolist()
        for part, (first, last) in zip(self.parts, pairwise(bounds), strict=True):
            places = np.flatnonzero((wanted >= first) & (wanted < last))
            if len(places):
                yield part.store, part.store.buckets[bucket][wanted[places] - first], places


def open_mixture(data: Sequence[str], generations: Sequence[int] | None = None) -> Mixture:
    """Open stores STORE[:WEIGHT], each at its generation or the newest complete one.

    Raises UserError as LatentStore.open does, and for an invalid weight.
    """
    weighted = [_weighted(store) for store in data]
    folders = [Path(path).expanduser().resolve() for path, _ in weighted]
    for (path, _), folder in zip(weighted, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"--data has {path} twice; give it once, with a weight: {path}:2")
    with ExitStack() as stack:
        parts = []
        for i, (path, weight) in enumerate(weighted):
            generation = generations[i] if generations and i < len(generations) else None
            store = stack.enter_context(LatentStore.open(path, generation))
            parts.append(WeightedStore(store, weight))
        mixture = Mixture(parts)
        stack.pop_all()
        return mixture


def _weighted(text: str) -> tuple[str, Fraction]:
    """The path and weight of STORE[:WEIGHT]; the colon may also be part of a folder's name."""
    path, colon, number = text.rpartition(":")
    if not colon or not path or Path(text).expanduser().exists() or {"/", "\\"} & set(number):
        return text, Fraction(1)
    try:  # as a float first: Fraction writes 1e999999999 out
        weight = Fraction(number) if 0 < float(number) <= MOST else Fraction(0)
    except ValueError:
        weight = Fraction(0)
    if not weight:
        raise UserError(
            f"--data {text}: {number!r} is no weight above 0 and up to {MOST}; give e.g. {path}:2 "
            f"to use each of its images twice an epoch, or leave the store out"
        )
    return path, weight


def _check_compatible(one: LatentStore, other: LatentStore) -> None:
    """Raises UserError for stores of different encoders or scaling."""
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
            f"({str(getattr(theirs, name))[:12]}); their latents must not mix: rebuild one of them"
        )


def _identify_encoders(stores: list[LatentStore]) -> None:
    """Record the encoder of stores of older versions, if they are mixed with others.

    It is known from another store of the same VAE, or from the VAE itself if it can be loaded.
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
            from xlsd_cache.encoding.compatibility import original_vae  # loads torch, rarely

            if vae := original_vae(store.identity):
                known[whole] = vae.encoder_sha256
        if known[whole] and not store.identity.encoder_sha256:
            record_encoder(store.root, whole, known[whole])
            store.identity = replace(store.identity, encoder_sha256=known[whole])
