import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xlsd_cache.store.tag_index
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.tag_index import Tags

TEXTS = st.lists(st.none() | st.text("ab ,\n\r\t\u00e9\u3000", max_size=12), max_size=12)


def plainly(texts: list[str | None]) -> dict[str, list[int]]:
    """Tag -> samples, as one would write it down."""
    found: dict[str, list[int]] = {}
    for sample, text in enumerate(texts):
        tags = {tag.strip() for tag in re.split("[,\r\n]", text or "")} - {""}
        for tag in tags:
            found.setdefault(tag, []).append(sample)
    return found


def chunked(texts: list[str | None], cut: int) -> pa.ChunkedArray:
    return pa.chunked_array([texts[:cut], texts[cut:]], pa.string())


def as_dict(tags: Tags) -> dict[str, list[int]]:
    return {name: tags.samples(name).tolist() for name in tags.names.to_pylist()}


@given(TEXTS, st.integers(0, 12), st.integers(1, 5))
def test_every_tag_has_exactly_the_samples_that_say_it(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], cut: int, part: int
) -> None:
    root = tmp_path_factory.mktemp("t")
    (root / "staging").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xlsd_cache.store.tag_index, "PART", part)
        tags = Tags(root, "txt", chunked(texts, cut), "f")
    expected = plainly(texts)
    assert as_dict(tags) == expected
    assert tags.names.to_pylist() == sorted(expected)
    assert tags.counts() == {name: len(samples) for name, samples in expected.items()}
    ranked = list(tags.counts().items())
    assert ranked == sorted(ranked, key=lambda pair: (-pair[1], pair[0]))
    assert list(tags.counts(2).items()) == ranked[:2]
    for absent in ("", "a, b", "nothing", "\U0010ffff"):
        assert tags.samples(absent).tolist() == []


def test_the_index_is_made_once_and_anew_for_another_log(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    first = Tags(tmp_path, "json:a/b", pa.chunked_array([["woman, solo", "cat"]]), "one")
    assert list(tmp_path.glob("*.arrow")) == [tmp_path / "tags.json%3Aa%2Fb.arrow"]
    # What it is made of is not looked at again while the log is the same.
    again = Tags(tmp_path, "json:a/b", pa.chunked_array([["other", "more"]]), "one")
    assert as_dict(again) == as_dict(first) == {"cat": [1], "solo": [0], "woman": [0]}
    other = Tags(tmp_path, "json:a/b", pa.chunked_array([["other"]]), "two")
    assert as_dict(other) == {"other": [0]}
    assert as_dict(first) == as_dict(again)  # what was mapped stays
    assert not list((tmp_path / "staging").iterdir())


@pytest.mark.parametrize("damage", ["cut", "empty", "not ours"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage: str) -> None:
    (tmp_path / "staging").mkdir()
    texts = pa.chunked_array([["woman, solo", "cat"]])
    expected = as_dict(Tags(tmp_path, "txt", texts, "f"))
    path = tmp_path / "tags.txt.arrow"
    path.write_bytes({"cut": path.read_bytes()[:-9], "empty": b"", "not ours": b"ARROW1"}[damage])
    assert as_dict(Tags(tmp_path, "txt", texts, "f")) == expected
    assert as_dict(Tags(tmp_path, "txt", pa.chunked_array([["of", "another"]]), "f")) == expected


def test_a_store_that_cannot_be_written_is_still_asked(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "copy")
    shutil.rmtree(copy / "staging")
    for path in copy.glob("tags.*"):  # another test has asked the store that they share
        path.unlink()
    with LatentStore.open(copy) as ours:
        texts = ours.samples["txt"].to_pylist()
        assert as_dict(ours.tags("txt")) == plainly(texts)
    assert not list(copy.glob("tags.*"))


def test_a_store_is_asked_by_tag(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "copy")
    with LatentStore.open(copy) as ours:
        samples = ours.samples.select(["key", "txt"]).to_pylist()
        tags = [{tag.strip() for tag in row["txt"].split(",")} for row in samples]
        for tag in sorted(set.union(*tags)):
            mask = ours.tagged("txt", tag)
            assert mask.tolist() == [tag in those for those in tags]
            assert not ours.tagged("txt", tag[:-1]).any() or tag[:-1] in set.union(*tags)
        both = ours.tagged("txt", "solo") & ~ours.tagged("txt", "woman")
        assert both.tolist() == ["solo" in those and "woman" not in those for those in tags]
        assert np.flatnonzero(both).size > 0
        with pytest.raises(UserError, match=r"no caption column 'moon'.*it has txt"):
            ours.tagged("moon", "woman")
