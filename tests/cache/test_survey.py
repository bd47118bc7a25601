from collections import Counter
from itertools import pairwise

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.survey import are_tags, has_tags, tag_counts, word_counts

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


def tags_of(text: str | None) -> set[str]:
    return {tag.strip() for tag in (text or "").replace("\n", ",").split(",")} - {""}


@given(TEXTS, st.integers(1, 3))
def test_tags_are_counted_as_sets_would(texts: list[str | None], pieces: int) -> None:
    expected = Counter(tag for text in texts for tag in tags_of(text))
    counted = tag_counts(column(texts, pieces), 99)
    assert dict(counted) == expected
    assert counted == sorted(counted, key=lambda pair: (-pair[1], pair[0]))
    assert tag_counts(column(texts, pieces), 2) == counted[:2]


@given(TEXTS, st.integers(1, 3), st.lists(st.sampled_from(["a", "b", "c d", "so"]), max_size=2))
def test_all_tags_must_be_there_exactly(
    texts: list[str | None], pieces: int, wanted: list[str]
) -> None:
    mask = has_tags(column(texts, pieces), wanted)
    assert mask.tolist() == [set(wanted) <= tags_of(text) for text in texts]


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
