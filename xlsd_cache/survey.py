"""What captions are like, vectorised: how long, and whether they are tags or sentences."""

from collections.abc import Iterator

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


def are_tags(texts: pa.ChunkedArray) -> bool:
    """Whether a column holds comma-separated tags and not sentences, by its first captions."""
    part = next(_parts(texts), None)
    if part is None:
        return False
    pieces = pc.split_pattern(pc.replace_substring(part, "\n", ","), ",")
    tags = pc.utf8_trim_whitespace(pc.list_flatten(pieces))
    tags = tags.filter(pc.not_equal(tags, ""))
    words = pc.sum(pc.list_value_length(pc.utf8_split_whitespace(tags))).as_py() or 0
    return bool(2 * len(part) <= len(tags) and words <= TAG_WORDS * len(tags))


def _parts(texts: pa.ChunkedArray) -> Iterator[pa.Array]:
    """Pieces of the captions that exist, none of them large or empty."""
    for chunk in texts.drop_null().chunks:
        for start in range(0, len(chunk), AT_ONCE):
            yield chunk.slice(start, AT_ONCE)
