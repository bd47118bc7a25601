import json
from collections import Counter
from pathlib import Path

import pytest

from tests.support import printed, train
from xlsd_cache.dataset.selection import select
from xlsd_cache.store.reader import LatentStore
from xlsd_train.commands import tags
from xlsd_train.data.selection import filter_by_tags

Out = pytest.CaptureFixture[str]


def told(capsys: Out, *args: object) -> dict[str, object]:
    capsys.readouterr()
    assert train("tags", *args, "--json") == 0
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return value


def test_counts_match_a_count_of_every_caption(store: Path, capsys: Out) -> None:
    with LatentStore.open(store) as ours:
        texts = ours.samples["txt"].to_pylist()
    gone = {"wide", "night"}
    for options, kept in (
        ((), texts),
        (("--require-tags", "solo"), [text for text in texts if "solo" in text]),
        (("--forbid-tags", "wide,night"), [t for t in texts if not gone & set(t.split(", "))]),
    ):
        value = told(capsys, store, "--most", 0, *options)
        assert value["images"] == 8
        assert value["selected"] == len(kept)
        counts = Counter(tag for text in kept for tag in text.split(", "))
        assert value["tags"] == {"txt": dict(counts)}
        assert value["different"] == {"txt": len(counts)}
        assert sum(value["buckets"].values()) == len(kept)  # type: ignore[attr-defined]


def test_large_indexes_are_counted_in_parts(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LatentStore.open(store) as ours:
        selection = select(ours, filter_by_tags(ours, ["txt"], ["solo"], []).mask)
        expected = tags.tag_counts(ours, "txt", selection)
        for size in (1, 2, 7, 29):
            monkeypatch.setattr(tags, "AT_ONCE", size)
            assert tags.tag_counts(ours, "txt", selection) == expected
        every = select(ours, filter_by_tags(ours, ["txt"], [], ["no"]).mask)
        counts = sorted(ours.tags("txt").counts().items(), key=lambda item: (-item[1], item[0]))
        assert tags.tag_counts(ours, "txt", every) == dict(counts)


def test_the_table_is_for_people(store: Path, capsys: Out) -> None:
    given = ("--require-tags", "solo", "--forbid-tags", "wide,typo", "--most", 2)
    assert train("tags", store, *given) == 0
    assert printed(capsys) == (
        "3 of 8 images\n"
        "buckets: 128x128 3\n"
        "--forbid-tags: no image has the tag 'typo'\n"
        "\n"
        "11 tags in txt, the most frequent 2:\n"
        "  3  100.0%  solo\n"
        "  2   66.7%  woman\n"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--require-tags", "sol"), "exactly the tag 'sol'"),
        (("--require-tags", "cat,rocket"), "leave none of the 8 samples"),
        (("--require-tags", "cat", "--forbid-tags", "cat"), "both contain 'cat'"),
        (("--caption", "title"), "no caption column 'title' (it has txt)"),
        (("--most", "-1"), "--most -1"),
    ],
)
def test_mistakes_are_one_sentence(
    store: Path, capsys: Out, options: tuple[str, ...], says: str
) -> None:
    assert train("tags", store, *options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
