import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.errors import UserError
from xlsd_train.data.caption_edits import CaptionEdits, require_and_forbid, tag_list

WORDS = st.integers(0, 2**64 - 1)
# Few different tags, so that they repeat; some are parts of others, one is a face.
TAG = st.sampled_from(["cat", "cat ears", "long_hair", "hair", "^_^", "1girl", "猫", "a b_c"])
TEXT = st.lists(TAG | st.sampled_from(["", "  ", " hair "]), max_size=12).map(",".join)


def once(text: str) -> list[str]:
    """What a person would write down as the tags of a caption."""
    return list(dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip()))


@given(TEXT, WORDS, WORDS)
def test_tags_are_trimmed_and_kept_once_in_their_order(text: str, order: int, dropped: int) -> None:
    assert CaptionEdits().apply(text, order, dropped) == ", ".join(once(text))


@given(TEXT, st.frozensets(TAG), WORDS)
def test_dropped_tags_are_exactly_those_named(text: str, drop: frozenset[str], word: int) -> None:
    assert CaptionEdits(drop=drop).apply(text, word, word) == ", ".join(
        tag for tag in once(text) if tag not in drop
    )


@given(TEXT, st.integers(0, 3), WORDS, WORDS)
def test_shuffling_moves_all_but_the_first_and_loses_none(
    text: str, keep: int, order: int, dropped: int
) -> None:
    got = once(CaptionEdits(shuffle=True, keep_first=keep).apply(text, order, dropped))
    assert got[:keep] == once(text)[:keep]
    assert sorted(got) == sorted(once(text))


@given(TEXT, st.integers(0, 3), st.floats(0, 1, exclude_min=True), WORDS, WORDS)
def test_dropout_takes_none_of_the_first_and_keeps_the_order(
    text: str, keep: int, rate: float, order: int, dropped: int
) -> None:
    tags = once(text)
    got = once(CaptionEdits(dropout=rate, keep_first=keep).apply(text, order, dropped))
    assert got[:keep] == tags[:keep]
    assert got == [tag for tag in tags if tag in got]
    if rate == 1:
        assert got == tags[:keep]


@given(TEXT, st.integers(1, 12), WORDS, WORDS)
def test_the_limit_comes_after_shuffling(text: str, most: int, order: int, dropped: int) -> None:
    whole = once(CaptionEdits(shuffle=True).apply(text, order, dropped))
    assert once(CaptionEdits(shuffle=True, most=most).apply(text, order, dropped)) == whole[:most]


def test_every_order_is_as_likely_as_any_other_and_every_tag_left_out_as_often_as_said() -> None:
    shuffled = [CaptionEdits(shuffle=True).apply("a, b, c", word, 0) for word in range(6000)]
    assert len(set(shuffled)) == 6
    assert all(850 < shuffled.count(order) < 1150 for order in set(shuffled))
    thinned = [CaptionEdits(dropout=0.3).apply("a, b, c", 0, word) for word in range(3000)]
    for tag in "abc":
        assert 2000 < sum(tag in text for text in thinned) < 2200
    both = sum("a" not in text and "b" not in text for text in thinned)
    assert 220 < both < 320  # 0.3 * 0.3: independently


def test_underscores_of_tags_become_spaces_and_those_of_faces_stay() -> None:
    assert (
        CaptionEdits(spaces=True).apply("long_hair, ^_^, >_<, a_b_c", 0, 0)
        == "long hair, ^_^, >_<, a b c"
    )
    assert CaptionEdits(spaces=True).apply("long_hair, long hair", 0, 0) == "long hair"
    exact = CaptionEdits(spaces=True, drop=frozenset({"long_hair"}))
    assert exact.apply("long_hair, long_hair_ribbon", 0, 0) == "long hair ribbon"


def test_sentences_end_at_full_stops_before_white_space() -> None:
    text = "A cat, asleep. It weighs 3.5 kg! Is it old? Perhaps... Nobody knows."
    parts = CaptionEdits(sentences=True)
    assert parts.split(text) == [
        "A cat, asleep", "It weighs 3.5 kg! Is it old? Perhaps..", "Nobody knows"
    ]  # fmt: skip
    assert parts.apply(text, 0, 0) == text
    assert parts.apply("No stop", 0, 0) == "No stop."
    assert parts.apply("Well!", 0, 0) == "Well!"


@given(st.lists(st.from_regex(r"[A-Z][a-z, ]*[a-z]", fullmatch=True), unique=True), WORDS)
def test_shuffled_sentences_are_the_same_sentences(sentences: list[str], order: int) -> None:
    text = " ".join(f"{sentence}." for sentence in sentences)
    got = CaptionEdits(sentences=True, shuffle=True).apply(text, order, 0)
    assert sorted(CaptionEdits(sentences=True).split(got)) == sorted(sentences)


def test_what_is_random_is_left_out_of_the_plain_parts() -> None:
    parts = CaptionEdits(shuffle=True, dropout=0.9, keep_first=1, most=3, drop=frozenset({"b"}))
    assert parts.deterministic.apply("a, b, c, d, e", 7, 7) == "a, c, d"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dropout": 1.5}, "--tag-dropout 1.5"),
        ({"dropout": float("nan")}, "--tag-dropout nan"),
        ({"keep_first": 2}, "--keep-first 2 has no effect"),
        ({"keep_first": 3, "shuffle": True, "most": 3}, "no room for other tags in --max-tags 3"),
    ],
)
def test_what_has_no_effect_is_refused(fields: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        CaptionEdits(**fields)  # type: ignore[arg-type]


def test_lists_of_tags_are_read_as_they_are_written() -> None:
    assert tag_list("--drop-tags", " woman , solo,woman,") == ("woman", "solo")
    assert tag_list("--drop-tags", None) == ()
    with pytest.raises(UserError, match="--drop-tags ' ,' has no tags"):
        tag_list("--drop-tags", " ,")
    with pytest.raises(UserError, match="both contain 'solo'"):
        require_and_forbid("woman,solo", "solo")
