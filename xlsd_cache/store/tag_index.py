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


class Tags:
    """The tags of one caption column.

    The index is rebuilt where it is missing, of another log or damaged. A query checks only what it
    reads: the index of ten million captions has 600 MB.
    """

    def __init__(self, root: Path, column: str, texts: pa.ChunkedArray, fingerprint: str) -> None:
        """Open or build the index of a column's captions, in memory if the store is read-only."""
        self._path, self._staging = root / f"tags.{quote(column, safe='')}.arrow", root / "staging"
        self._texts, self._fingerprint = texts, fingerprint
        mapped = self._mapped()
        self._batch = self._built() if mapped is None else mapped

    @property
    def names(self) -> pa.Array:
        """The tags: large_string, unique, sorted."""
        return self._batch["tag"]

    @property
    def postings(self) -> pa.Array:
        """A list of int32 for each name: its samples, ascending."""
        if not self._exist(self._batch["samples"].values):
            self._batch = self._built()
        return self._batch["samples"]

    def samples(self, tag: str) -> NDArray[np.int32]:
        """Rows of the store's `samples` with this tag, ascending."""
        samples = self._samples(tag)
        if not self._exist(samples):
            self._batch = self._built()
            samples = self._samples(tag)
        rows: NDArray[np.int32] = samples.to_numpy()
        return rows

    def counts(self, most: int | None = None) -> dict[str, int]:
        """Samples of each tag, the most frequent tag first, equals by name; the first `most`."""
        lengths = self.postings.value_lengths().to_numpy()
        order = np.argsort(-lengths, kind="stable")[:most]
        names = self.names.take(pa.array(order)).to_pylist()
        return dict(zip(names, lengths[order].tolist(), strict=True))

    def _samples(self, tag: str) -> pa.Array:
        at = bisect.bisect_left(self.names, tag, key=methodcaller("as_py"))
        if at == len(self.names) or self.names[at].as_py() != tag:
            return pa.array([], pa.int32())
        return self._batch["samples"][at].values

    def _exist(self, samples: pa.Array) -> bool:
        """Whether all of them are samples of the store, as in any index that is not damaged."""
        numbers = pc.min_max(samples).as_py()
        least, most = numbers["min"] or 0, numbers["max"] or 0
        return 0 <= least <= most < max(1, len(self._texts))

    def _mapped(self) -> pa.RecordBatch | None:
        with suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            table = map_table(self._path, TAGS)
            (batch,) = table.to_batches()
            if table.schema.metadata[b"fingerprint"] == self._fingerprint.encode():
                return batch
        return None

    def _built(self) -> pa.RecordBatch:
        batch = _make(self._texts).replace_schema_metadata({"fingerprint": self._fingerprint})
        with (
            suppress(OSError),
            replacing(self._path, self._staging) as temporary,
            pa.ipc.new_file(temporary, batch.schema) as writer,
        ):
            writer.write_batch(batch)
        mapped = self._mapped()
        return batch if mapped is None else mapped


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
