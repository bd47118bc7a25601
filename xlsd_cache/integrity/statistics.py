"""Statistics of a store: mean and spread of its latents, length and kind of its captions."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.store.reader import LatentStore

MEASURED = 2048  # samples whose latents are read: enough for a mean within 0.1% of the std
AT_ONCE = 65536  # captions: bounds the memory
TAG_WORDS = 3.0  # most words per tag, on average; with two tags a caption or more


class Moments(NamedTuple):
    """Result of `moments`; both lists are empty for a store without samples."""

    mean: list[float]  # of raw latents, a value per channel
    std: list[float]
    samples: int  # that were read


def moments(store: LatentStore) -> Moments:
    """Mean and standard deviation per channel over up to 2 * MEASURED samples, evenly spread.

    The same generation of a store gives the same numbers, bit for bit.
    """
    stride = max(1, len(store) // MEASURED)
    sums: Counter[str] = Counter()
    total = np.zeros(store.identity.channels)
    squares = np.zeros(store.identity.channels)
    for bucket, rows in store.buckets.items():
        for row in rows[::stride]:
            latent: NDArray[np.float64] = store.read(bucket, [row])[0].astype(np.float64)
            total += latent.sum(axis=(1, 2))
            squares += np.square(latent).sum(axis=(1, 2))
            sums.update(samples=1, values=latent[0].size)
    if not sums["samples"]:
        return Moments([], [], 0)
    mean = total / sums["values"]
    std = np.sqrt(np.maximum(0, squares / sums["values"] - mean**2))
    return Moments(mean.tolist(), std.tolist(), sums["samples"])


def word_counts(texts: pa.ChunkedArray) -> NDArray[np.int64]:
    """Words of every caption; each line of a text is an alternative caption."""
    counts = [np.empty(0, np.int64)]
    for part in _parts(texts):
        lines = pc.list_flatten(pc.split_pattern(part, "\n"))
        lines = lines.filter(pc.not_equal(lines, ""))
        words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(lines))
        counts.append(pc.list_value_length(words).to_numpy().astype(np.int64))
    return np.concatenate(counts)


def are_tags(texts: pa.ChunkedArray) -> bool:
    """Whether a column holds comma-separated tags, not sentences; decided by its first captions."""
    part = next(_parts(texts), None)
    if part is None:
        return False
    pieces = pc.split_pattern(pc.replace_substring(part, "\n", ","), ",")
    tags = pc.utf8_trim_whitespace(pc.list_flatten(pieces))
    tags = tags.filter(pc.not_equal(tags, ""))
    words = pc.sum(pc.list_value_length(pc.utf8_split_whitespace(tags))).as_py() or 0
    return bool(2 * len(part) <= len(tags) and words <= TAG_WORDS * len(tags))


def histogram(values: NDArray[Any], edges: Sequence[float]) -> list[int]:
    """How many values are below the first edge, between each two, and from the last on."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    return [int(count) for count in counts]


def together(store: LatentStore, column: str, tags: Sequence[str]) -> list[list[int]]:
    """[i][j]: samples whose caption has both tag i and tag j."""
    masks = [store.tagged(column, tag) for tag in tags]
    return [[int(np.count_nonzero(one & other)) for other in masks] for one in masks]


def _parts(texts: pa.ChunkedArray) -> Iterator[pa.Array]:
    """The existing captions in chunks of at most AT_ONCE, none empty."""
    for chunk in texts.drop_null().chunks:
        for start in range(0, len(chunk), AT_ONCE):
            yield chunk.slice(start, AT_ONCE)
