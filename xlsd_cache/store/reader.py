"""Reads a latent store: its samples as an Arrow table, and their latents.

store = LatentStore.open("latents")
store.buckets                       # {"512x512": live row numbers, ...}
store.read("512x512", rows)         # raw latents [n, C, h, w]; verifies every crc32c
store.samples                       # Arrow: key, source, bucket, row, ..., caption columns
store.tagged("txt", "woman")        # which of the samples have that tag
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xlsd_cache.errors import UserError
from xlsd_cache.store.identity import Identity
from xlsd_cache.store.index import Snapshot, cached_snapshot, make_snapshot, save_snapshot
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.shard import CorruptShard
from xlsd_cache.store.tag_index import Tags
from xlsd_cache.store.view import StoreView
from xlsd_cache.vocabulary import RESERVED

__all__ = ["Identity", "LatentStore"]

Latents = NDArray[Any]  # float16 or float32 [n, C, h, w], raw


class LatentStore:
    """One complete generation of a store; it does not change while the store grows.

    Reading is safe from several threads, and after fork and spawn. A context manager; `close()`
    closes the shard files that reading opened.
    """

    def __init__(self, view: StoreView, snapshot: Snapshot) -> None:
        self.root, self.identity = view.manifest.root, view.identity
        self.rows_per_shard = view.rows_per_shard
        self.samples: pa.Table = snapshot.samples  # sorted by (bucket, row)
        self.generation, self.fingerprint = snapshot.generation, snapshot.fingerprint
        self.newest_generation = snapshot.generation  # higher where later images are not encoded
        self._dtype = np.dtype(view.identity.dtype)
        self._tags: dict[str, Tags] = {}
        self._ranges = snapshot.ranges
        self.buckets: dict[str, NDArray[np.int64]] = {
            bucket: snapshot.samples["row"].slice(start, stop - start).to_numpy()
            for bucket, (start, stop) in snapshot.ranges.items()
        }
        # The least recently used are dropped, and close with their last reader. The cache has no
        # lock: a process forked while another thread reads can read too.
        self._shard = lru_cache(_raise_file_limit())(  # by the cheapest key: asked for every row
            lambda bucket, number: view.open_shard(ShardId(bucket, number))
        )

    @classmethod
    def open(cls, path: str | Path, generation: int | None = None) -> "LatentStore":
        """Open the newest complete generation, or the one asked for.

        Raises UserError where there is no store, no such generation, or none is complete yet.
        """
        root = Path(path).expanduser()
        newest = StoreView.open(root)
        generations = newest.manifest.generations()
        if generation is not None and generation not in generations:
            raise UserError(
                f"{root} has no generation {generation} (it has {len(generations)}): the store was "
                f"built again since; start a new run"
            )
        pending = 0
        for number in reversed(generations) if generation is None else [generation]:
            view, snapshot = replace(newest, generation=number), cached_snapshot(root, number)
            if snapshot is None:
                snapshot = make_snapshot(view)
                if not snapshot.pending and number == generations[-1]:
                    save_snapshot(root, snapshot)
                    snapshot = cached_snapshot(root, number) or snapshot
            if not snapshot.pending:
                store = cls(view, snapshot)
                store.newest_generation = generations[-1]
                return store
            pending = pending or snapshot.pending
        raise UserError(
            f"{root} is not finished: {pending} images are not encoded yet; run the same "
            f"`xlsd-cache build` again to finish it"
        )

    def __len__(self) -> int:
        """Number of live samples."""
        return int(self.samples.num_rows)

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns of `samples` that are captions."""
        return tuple(name for name in self.samples.column_names if name not in RESERVED)

    def shape(self, bucket: str) -> tuple[int, int, int]:
        """(C, h, w) of a bucket's latents."""
        return self.identity.shape(bucket)

    def sample_index(self, bucket: str, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of `samples` of a bucket's live samples, given by ordinal."""
        return self._ranges[bucket][0] + ordinals

    def shares(self, chosen: Mapping[str, NDArray[np.int64]] | None) -> dict[str, int]:
        """How many samples of each bucket are chosen, by ordinal; None: all of them."""
        buckets = self.buckets if chosen is None else chosen
        return {name: len(samples) for name, samples in buckets.items()}

    def read(
        self, bucket: str, rows: Sequence[int] | NDArray[np.int64], out: Latents | None = None
    ) -> Latents:
        """Raw latents [n, C, h, w] of these row numbers, in this order, in the store's dtype.

        `out`, if given, is filled and returned; it must be C-contiguous, of that shape and dtype.
        Raises UserError, with the image's key, where a latent is missing or its crc32c is wrong.
        """
        shape = (len(rows), *self.shape(bucket))
        if out is None:
            out = np.empty(shape, self._dtype)
        elif out.shape != shape or out.dtype != self._dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous {self._dtype}{shape}, not {out.shape}")
        flat = out.reshape(len(rows), int(np.prod(shape[1:]))).view(np.uint8)
        for number, slot, place in self._in_order(rows):
            try:
                self._shard(bucket, number).read_into(slot, flat[place])
            except (CorruptShard, OSError) as error:
                row = number * self.rows_per_shard + slot
                raise UserError(
                    f"cannot read {self._key(bucket, row)} (bucket {bucket}, row {row}) from "
                    f"{self.root}: {error}; run `xlsd-cache check {self.root}` to see what is "
                    f"damaged"
                ) from error
        return out

    def will_need(self, bucket: str, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Start reading these rows into the page cache, without waiting."""
        for number, slot, _ in self._in_order(rows):
            try:
                self._shard(bucket, number).will_need(slot)
            except (CorruptShard, OSError):
                return  # only a hint; `read` reports it

    def tagged(self, column: str, tag: str) -> NDArray[np.bool_]:
        """Mask of the rows of `samples` with exactly this tag in a caption column.

        The first call for a column builds its index, which takes a minute for ten million
        captions. Raises UserError where there is no such column.
        """
        mask = np.zeros(len(self), np.bool_)
        mask[self.tags(column).samples(tag)] = True
        return mask

    def tags(self, column: str) -> Tags:
        """The tag index of a caption column; see `tagged`."""
        if column not in self.caption_columns:
            columns = ", ".join(self.caption_columns) or "none"
            raise UserError(
                f"{self.root} has no caption column {column!r} to look for tags in (it has "
                f"{columns}); give another"
            )
        if column not in self._tags:
            self._tags[column] = Tags(self.root, column, self.samples[column], self.fingerprint)
        return self._tags[column]

    def close(self) -> None:
        """Close all shard files; `read` opens them again."""
        self._shard.cache_clear()

    def __enter__(self) -> "LatentStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentStore.open, (self.root, self.generation)

    def _in_order(self, rows: Sequence[int] | NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """(shard, slot, position in `rows`) of each row, in the order of the array."""
        wanted = np.asarray(rows, np.int64)
        order = np.argsort(wanted)
        numbers, slots = np.divmod(wanted[order], self.rows_per_shard)
        return zip(numbers.tolist(), slots.tolist(), order.tolist(), strict=True)

    def _key(self, bucket: str, row: int) -> str:
        rows = self.buckets.get(bucket, np.empty(0, np.int64))
        at = int(np.searchsorted(rows, row))
        if at == len(rows) or rows[at] != row:
            return "an image that is not live"
        return str(self.samples["key"][self._ranges[bucket][0] + at])


def _raise_file_limit() -> int:
    """Raise the limit of open files as far as allowed; returns how many shards to keep open."""
    try:
        import resource
    except ImportError:  # Windows allows thousands
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(64, soft // 2)
