"""Which samples of a store a run uses: by their tags, and by what validation holds out.

A mask is a boolean for each row of `store.samples`; masks are combined with & | ~. A tag is matched
whole and as it is written, by the store's index of tags.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from xlsd_cache.errors import UserError
from xlsd_train.data.captions import CaptionColumns
from xlsd_train.data.mixture import Mask, Ordinals, Store


@dataclass(frozen=True)
class Selection:
    """The samples of a store that are used, numbered 0, 1, ... within each bucket."""

    sizes: dict[str, int]  # bucket -> how many of it; none is 0
    of: int  # samples of the store
    chosen: dict[str, Ordinals] | None = None  # ascending; None: all samples of every bucket

    def __len__(self) -> int:
        """Selected samples of all buckets."""
        return sum(self.sizes.values())

    def ordinals(self, bucket: str, numbers: Ordinals) -> Ordinals:
        """The ordinals among the bucket's live samples of these selected ones."""
        return numbers if self.chosen is None else self.chosen[bucket][numbers]

    def rows(self, store: Store, numbers: Ordinals) -> Ordinals:
        """Rows of `store.samples` of selected samples, counted through all buckets."""
        names = list(self.sizes)
        starts = np.cumsum([0, *self.sizes.values()])
        bucket = np.searchsorted(starts, numbers, side="right") - 1
        rows = np.empty(len(numbers), np.int64)
        for at in np.unique(bucket).tolist():
            of_it = bucket == at
            ordinals = self.ordinals(names[at], numbers[of_it] - starts[at])
            rows[of_it] = store.sample_index(names[at], ordinals)
        return rows


def columns_of(store: Store, caption: str | None) -> CaptionColumns:
    """The columns of a --caption, by name or by default."""
    return CaptionColumns.parse(caption, store.caption_columns, store.root)


def select(store: Store, mask: Mask) -> Selection:
    """The samples that a mask leaves."""
    if mask.all():
        return Selection({name: len(rows) for name, rows in store.buckets.items()}, len(store))
    chosen = {name: _of_bucket(store, name, mask) for name in store.buckets}
    chosen = {name: ordinals for name, ordinals in chosen.items() if len(ordinals)}
    sizes = {name: len(ordinals) for name, ordinals in chosen.items()}
    return Selection(sizes, len(store), chosen)


class TagFilter(NamedTuple):
    """What tags leave."""

    mask: Mask
    unknown: tuple[str, ...]  # forbidden tags that no sample has: a slip of the pen?


def filter_by_tags(
    store: Store, columns: Sequence[str], require: Sequence[str], forbid: Sequence[str]
) -> TagFilter:
    """Samples with all the required tags and none of the forbidden, in any of the columns.

    Raises UserError where no sample is left, or none has a required tag.
    """
    mask = np.ones(len(store), np.bool_)
    for tag in require:
        having = _having(store, columns, tag)
        if not having.any():
            raise UserError(
                f"--require-tags: no sample of {store.root} has exactly the tag {tag!r} in "
                f"{' or '.join(columns)}; `xlsd-train tags {store.root}` lists those there are"
            )
        mask &= having
    unknown = []
    for tag in forbid:
        having = _having(store, columns, tag)
        mask &= ~having
        if not having.any():
            unknown.append(tag)
    if (require or forbid) and not mask.any():
        raise UserError(
            f"--require-tags {','.join(require) or '(none)'} and --forbid-tags "
            f"{','.join(forbid) or '(none)'} leave none of the {len(store)} samples of "
            f"{store.root}; require or forbid fewer"
        )
    return TagFilter(mask, tuple(unknown))


def held_out_mask(store: Store, fraction: float) -> Mask:
    """Which samples validation alone may use: those whose content's hash is below the fraction.

    sha256 is as good as uniform, so its first 64 bits decide: the same image is always on the same
    side, in whatever store and however that grows, and duplicates are together. Samples that were
    imported without their images go by their latent's crc32c.
    """
    if fraction <= 0:
        return np.zeros(len(store), np.bool_)
    hashes = store.samples["content_hash"]
    below = pc.less(pc.utf8_slice_codeunits(hashes, 0, 16), f"{int(fraction * 2**64):016x}")
    crc = store.samples["crc32c"].to_numpy().astype(np.float64) < fraction * 2**32
    mask: Mask = np.where(pc.equal(hashes, "").to_numpy(), crc, below.to_numpy())
    return mask


def evenly(mask: Mask, count: int) -> Mask:
    """At most `count` of the samples that a mask leaves, spread over all buckets and rows."""
    rows = np.flatnonzero(mask)
    count = min(count, len(rows))
    some = np.zeros_like(mask)
    some[rows[np.arange(count) * len(rows) // max(count, 1)]] = True
    return some


def _having(store: Store, columns: Sequence[str], tag: str) -> Mask:
    mask = store.tagged(columns[0], tag)
    for column in columns[1:]:
        mask |= store.tagged(column, tag)
    return mask


def _of_bucket(store: Store, bucket: str, mask: Mask) -> Ordinals:
    ends = store.sample_index(bucket, np.array([0, len(store.buckets[bucket])]))
    return np.flatnonzero(mask[slice(*ends.tolist())])
