from itertools import pairwise

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.survey import are_tags, word_counts

TEXTS = st.lists(
    st.one_of(
        st.none(),
        st.lists(st.sampled_from(["a", " b", "c d", "naïve ", "", "solo,a", "b\na"])).map(",".join),
    )
)


def column(texts: list[str | None], pieces: int) -> pa.ChunkedArray:
    """The texts in so many chunks, as a large table holds them."""
    cuts = [len(texts) * i // pieces for i in range(pieces + 1)]
    parts = [texts[start:stop] for start, stop in pairwise(cuts)]
    return pa.chunked_array(parts, pa.string())


@given(TEXTS)
def test_words_are_counted_line_by_line(texts: list[str | None]) -> None:
    lines = [line for text in texts for line in (text or "").split("\n") if line]
    counted = word_counts(column(texts, 2)).tolist()
    assert counted == [max(1, len(line.split())) for line in lines]


def test_tags_are_told_from_sentences() -> None:
    tags = ["1girl, solo, long hair", "dog, solo, outdoors, no humans"]
    sentences = ["A dog on a hill.", "Two people, both in coats, walk through the old town."]
    assert are_tags(pa.chunked_array([tags]))
    assert not are_tags(pa.chunked_array([sentences]))
    assert not are_tags(pa.chunked_array([[None]], pa.string()))
