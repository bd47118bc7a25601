"""Inverted index of a caption column: tag -> samples, built once and then mapped.

Tags are separated by commas and line ends, stripped of white space, and matched exactly.
`tags.COLUMN.arrow` is derived and may be deleted at any time: it records the fingerprint of the log
that it is built from, and is rebuilt for any other.
"""

import bisect
from contextlib import suppress
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xlsd_cache.runtime.arrow_files import map_table
from xlsd_cache.runtime.atomic import replacing
from xlsd_cache.schema import TAGS

PART = 1 << 18  # captions split at a time: some hundred MiB of tags


@dataclass(frozen=True)
class Tags:
    """The tags of one caption column."""

    names: pa.Array  # unique, sorted
    postings: pa.Array  # list of int32 a name: its samples, ascending

    def samples(self, tag: str) -> NDArray[np.int32]:
        """Rows of the store's `samples` with this tag, ascending."""
        at = bisect.bisect_left(self.names, tag, key=methodcaller("as_py"))
        if at == len(self.names) or self.names[at].as_py() != tag:
            return np.empty(0, np.int32)
        samples: NDArray[np.int32] = self.postings[at].values.to_numpy()
        return samples

    def counts(self, most: int | None = None) -> dict[str, int]:
        """Samples of each tag, the most frequent tag first, equals by name; the first `most`."""
        lengths = self.postings.value_lengths().to_numpy()
        order = np.argsort(-lengths, kind="stable")[:most]
        names = self.names.take(pa.array(order)).to_pylist()
        return dict(zip(names, lengths[order].tolist(), strict=True))


def open_tags(root: Path, column: str, texts: pa.ChunkedArray, fingerprint: str) -> Tags:
    """The index of a caption column; built where it is missing or of another log.

    It is kept in memory where the store is read-only.
    """
    path = root / f"tags.{quote(column, safe='')}.arrow"
    batch = _mapped(path, fingerprint, len(texts))
    if batch is None:
        batch = _make(texts).replace_schema_metadata({"fingerprint": fingerprint})
        with (
            suppress(OSError),
            replacing(path, root / "staging") as temporary,
            pa.ipc.new_file(temporary, batch.schema) as writer,
        ):
            writer.write_batch(batch)
        batch = _mapped(path, fingerprint, len(texts)) or batch
    return Tags(batch["tag"], batch["samples"])


def _mapped(path: Path, fingerprint: str, samples: int) -> pa.RecordBatch | None:
    try:
        table = map_table(path, TAGS)
        if table.schema.metadata[b"fingerprint"] != fingerprint.encode():
            return None
        batch, *more = table.to_batches()
        numbers = pc.min_max(batch["samples"].values).as_py()
        if more or not -1 < (numbers["min"] or 0) <= (numbers["max"] or 0) < max(1, samples):
            return None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return batch


@dataclass(frozen=True)
class _TagRun:
    """The tags of a run of captions."""

    names: pa.Array  # unique
    counts: NDArray[np.int64]  # captions of each
    samples: NDArray[np.int32]  # those of the first tag, ascending, then of the second, ...

    @classmethod
    def of(cls, texts: pa.Array, first: int) -> "_TagRun":
        """Split the captions of the samples from `first` on."""
        pieces = pc.split_pattern(pc.replace_substring_regex(texts, "[\\r\\n]", ","), ",")
        tags = pc.utf8_trim_whitespace(pc.list_flatten(pieces)).dictionary_encode()
        code = tags.indices.to_numpy().astype(np.int64)
        sample = pc.list_parent_indices(pieces).to_numpy() + first
        pairs = code << 32 | sample
        nothing = pc.index(tags.dictionary, "").as_py()
        pairs = pairs[code != nothing]
        pairs.sort()
        pairs = pairs[np.diff(pairs, prepend=-1) != 0]  # a repeated tag counts once
        counts = np.bincount(pairs >> 32, minlength=len(tags.dictionary))
        names = tags.dictionary.cast(pa.large_string())
        return cls(names, counts, (pairs & 0xFFFFFFFF).astype(np.int32))


def _make(texts: pa.ChunkedArray) -> pa.RecordBatch:
    """Merge the sorted parts: of each tag, a part's samples follow the previous part's."""
    starts = np.cumsum([0, *map(len, texts.chunks)]).tolist()
    parts = [
        _TagRun.of(chunk.slice(i, PART), start + i)
        for chunk, start in zip(texts.chunks, starts, strict=False)
        for i in range(0, len(chunk), PART)
    ]
    names, codes = _sorted_names(parts)
    counts = np.zeros(len(names), np.int64)
    for part, code in zip(parts, codes, strict=True):
        counts[code] += part.counts
    ends = np.cumsum(counts)
    free = ends - counts  # each tag's next free position
    samples = np.empty(counts.sum(), np.int32)
    for part, code in zip(parts, codes, strict=True):
        shift = free[code] - (np.cumsum(part.counts) - part.counts)
        samples[np.repeat(shift, part.counts) + np.arange(len(part.samples))] = part.samples
        free[code] += part.counts
    postings = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), samples)
    batch = pa.record_batch([names, postings], TAGS)
    return batch.slice(int((counts == 0).sum()))  # without the empty tag, which is first


def _sorted_names(parts: list[_TagRun]) -> tuple[pa.Array, list[NDArray[np.int64]]]:
    """All names, sorted, and the positions of each part's names among them."""
    if not parts:
        return pa.array([], pa.large_string()), []
    named = [
        pa.DictionaryArray.from_arrays(np.arange(len(part.names), dtype=np.int32), part.names)
        for part in parts
    ]
    unified = pa.chunked_array(named).unify_dictionaries().chunks
    order = pc.array_sort_indices(unified[0].dictionary)
    rank = np.empty(len(order), np.int64)
    rank[order.to_numpy()] = np.arange(len(order))
    return unified[0].dictionary.take(order), [rank[part.indices.to_numpy()] for part in unified]
