"""Masks of a store's samples: by their tags, and held out for validation.

A mask has a boolean for each row of `store.samples`; combine masks with & | ~. Tags are matched
exactly, by the store's tag index.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from xlsd_cache.dataset.selection import Mask, SampleStore
from xlsd_cache.errors import UserError
from xlsd_train.data.captions import CaptionColumns


def columns_of(store: SampleStore, caption: str | None) -> CaptionColumns:
    """The caption columns of an option `--caption`, or the default ones."""
    return CaptionColumns.parse(caption, store.caption_columns, store.root)


class TagFilter(NamedTuple):
    """The samples that pass a filter by tags."""

    mask: Mask
    unknown: tuple[str, ...]  # forbidden tags that no sample has, perhaps misspelt


def filter_by_tags(
    store: SampleStore, columns: Sequence[str], require: Sequence[str], forbid: Sequence[str]
) -> TagFilter:
    """Samples with all required tags and no forbidden ones, in any of the columns.

    Raises UserError if no sample is left, or none has a required tag.
    """
    mask = np.ones(len(store), np.bool_)
    for tag in require:
        having = _having(store, columns, tag)
        if not having.any():
            raise UserError(
                f"--require-tags: no sample of {store.root} has exactly the tag {tag!r} in "
                f"{' or '.join(columns)}; `xlsd-train tags {store.root}` lists its tags"
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


def held_out_mask(store: SampleStore, fraction: float) -> Mask:
    """The samples reserved for validation: those whose content hash is below the fraction.

    The first 64 bits of the image's sha256 decide, so an image is on the same side in any store and
    as a store grows, and duplicates stay together. Samples imported without images go by their
    latent's crc32c.
    """
    if fraction <= 0:
        return np.zeros(len(store), np.bool_)
    hashes = store.samples["content_hash"]
    below = pc.less(pc.utf8_slice_codeunits(hashes, 0, 16), f"{int(fraction * 2**64):016x}")
    crc = store.samples["crc32c"].to_numpy().astype(np.float64) < fraction * 2**32
    mask: Mask = np.where(pc.equal(hashes, "").to_numpy(), crc, below.to_numpy())
    return mask


def spaced(mask: Mask, count: int) -> Mask:
    """At most `count` of a mask's samples, evenly spaced over all buckets and rows."""
    rows = np.flatnonzero(mask)
    count = min(count, len(rows))
    chosen = np.zeros_like(mask)
    chosen[rows[np.arange(count) * len(rows) // max(count, 1)]] = True
    return chosen


def _having(store: SampleStore, columns: Sequence[str], tag: str) -> Mask:
    mask = store.tagged(columns[0], tag)
    for column in columns[1:]:
        mask |= store.tagged(column, tag)
    return mask
