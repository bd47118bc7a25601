from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.integrity import statistics as module
from xlsd_cache.integrity.statistics import are_tags, moments, word_counts
from xlsd_cache.store.reader import LatentStore

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


def test_moments_are_those_of_all_latents(store: Path) -> None:
    with LatentStore.open(store) as ours:
        parts = [ours.read(name, rows) for name, rows in ours.buckets.items()]
        found = moments(ours)
    values = np.concatenate([part.swapaxes(0, 1).reshape(4, -1) for part in parts], axis=1)
    assert found.samples == sum(len(part) for part in parts)
    assert found.mean == pytest.approx(values.mean(axis=1, dtype=np.float64), rel=1e-6)
    assert found.std == pytest.approx(values.std(axis=1, dtype=np.float64), rel=1e-6)


def test_of_many_samples_an_even_part_is_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURED", 4)
    with LatentStore.open(store) as ours:
        assert moments(ours).samples == sum(
            len(range(0, len(rows), len(ours) // 4)) for rows in ours.buckets.values()
        )
        assert moments(ours) == moments(ours)
