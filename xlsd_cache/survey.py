"""What captions say, vectorised: how many there are, how long, and which tags they hold."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

AT_ONCE = 65536  # captions: bounds the memory of their pieces
TAG_WORDS = 3.0  # a column of tags has at most so many words a piece, and two pieces a caption


def word_counts(texts: pa.ChunkedArray) -> NDArray[np.int64]:
    """Words of every caption; each line of a text is one, an alternative to the others."""
    counts = [np.empty(0, np.int64)]
    for part in _parts(texts):
        lines = pc.list_flatten(pc.split_pattern(part, "\n"))
        lines = lines.filter(pc.not_equal(lines, ""))
        words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(lines))
        counts.append(pc.list_value_length(words).to_numpy().astype(np.int64))
    return np.concatenate(counts)


def tag_counts(texts: pa.ChunkedArray, most: int) -> list[tuple[str, int]]:
    """The most frequent tags and in how many images each is; equally frequent ones by name.

    A tag is what stands between commas or line ends, stripped; said twice of an image it counts
    once.
    """
    tables = []
    for part in _parts(texts):
        at, tags = _tags(part)
        codes = tags.dictionary_encode()
        names, indices = codes.dictionary, codes.indices.to_numpy()
        pairs = np.sort(at * len(names) + indices)  # np.unique hashes: forty times slower here
        first = np.diff(pairs, prepend=-1) > 0
        counts = np.bincount(pairs[first] % max(1, len(names)), minlength=len(names))
        tables.append(pa.table({"tag": names, "n": pa.array(counts, pa.int64())}))
    if not tables:
        return []
    summed = pa.concat_tables(tables).group_by("tag").aggregate([("n", "sum")])
    ranked = summed.sort_by([("n_sum", "descending"), ("tag", "ascending")]).slice(0, most)
    return list(zip(ranked["tag"].to_pylist(), ranked["n_sum"].to_pylist(), strict=True))


def has_tags(texts: pa.ChunkedArray, wanted: Sequence[str]) -> NDArray[np.bool_]:
    """Which captions have all these tags, each exactly; a missing caption has none."""
    has = [np.zeros(0, np.bool_)]
    for chunk in texts.chunks:
        mask = np.ones(len(chunk), np.bool_)
        at, tags = _tags(chunk)
        for tag in wanted:
            mask &= np.bincount(at[pc.equal(tags, tag).to_numpy(False)], minlength=len(chunk)) > 0
        has.append(mask)
    return np.concatenate(has)


def are_tags(texts: pa.ChunkedArray) -> bool:
    """Whether a column holds comma-separated tags and not sentences, by its first captions."""
    part = next(_parts(texts), None)
    if part is None:
        return False
    _, tags = _tags(part)
    words = pc.sum(pc.list_value_length(pc.utf8_split_whitespace(tags))).as_py() or 0
    return bool(2 * len(part) <= len(tags) and words <= TAG_WORDS * len(tags))


def _parts(texts: pa.ChunkedArray) -> Iterator[pa.Array]:
    """Pieces of the captions that exist, none of them large or empty."""
    for chunk in texts.drop_null().chunks:
        for start in range(0, len(chunk), AT_ONCE):
            yield chunk.slice(start, AT_ONCE)


def _tags(texts: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    """For each tag of an array of captions: which caption it is of, and the tag."""
    pieces = pc.split_pattern(pc.replace_substring(texts, "\n", ","), ",")
    at = pc.list_parent_indices(pieces).to_numpy().astype(np.int64)
    tags = pc.utf8_trim_whitespace(pc.list_flatten(pieces))
    held = pc.not_equal(tags, "")
    return at[held.to_numpy(False)], tags.filter(held)
