from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from tests.train.conftest import Open
from xlsd_cache import UserError
from xlsd_cache.store import LatentStore
from xlsd_train.selection import select


def by_hand(store: LatentStore, require: tuple[str, ...], forbid: tuple[str, ...]) -> set[int]:
    """Rows of `store.samples`, by looking at every caption."""
    tags = [set(text.split(", ")) for text in store.samples["txt"].to_pylist()]
    return {
        row for row, has in enumerate(tags) if has >= set(require) and not has & set(forbid)
    }  # fmt: skip


def test_a_selection_is_what_looking_at_every_caption_gives(store: Path) -> None:
    with LatentStore.open(store) as ours:
        names = ["solo", "wide", "cat", "woman", "cup"]
        options = [(), *((name,) for name in names), *combinations(names, 2)]
        found = 0
        for require, forbid in product(options, options):
            expected = by_hand(ours, require, forbid)
            if not expected:
                with pytest.raises(UserError, match="leave none of the 8 samples"):
                    select(ours, ["txt"], require, forbid)
                continue
            selection = select(ours, ["txt"], require, forbid)
            rows = selection.rows(ours, np.arange(len(selection)))
            assert rows.tolist() == sorted(expected)
            assert 0 not in selection.sizes.values()
            found += len(expected) < 8
        assert found > 50


def test_tags_are_matched_whole(store: Path) -> None:
    with LatentStore.open(store) as ours:
        for part in ("sol", "table", "Solo", "solo, portrait"):
            with pytest.raises(
                UserError, match=f"exactly the tag '{part}' in txt; `xlsd-train tags"
            ):
                select(ours, ["txt"], [part], [])
        selection = select(ours, ["txt"], [], ["sol", "wide"])
        assert selection.unknown == ("sol",)
        assert len(selection) == 5


def test_a_tag_in_any_of_the_columns_counts(photos: Path, vae: Path, tmp_path: Path) -> None:
    from tests.support import cache

    out = tmp_path / "l"
    build = ("--out", out, "--vae", vae, "--resolution", 128, "--captions", "txt,title")
    assert cache("build", photos, *build) == 0
    with LatentStore.open(out) as ours:
        titles = ours.samples["title"].to_pylist()
        selection = select(ours, ["txt", "title"], ["solo"], ["eileen"])
        rows = selection.rows(ours, np.arange(len(selection))).tolist()
        expected = sorted(row for row in by_hand(ours, ("solo",), ()) if titles[row] != "eileen")
        assert rows == expected
        assert len(rows) == 3


def test_a_run_draws_every_selected_sample_as_often_and_no_other(open_run: Open) -> None:
    """Also over buckets of different sizes and batches that straddle epochs."""
    source = open_run(forbid_tags="astronaut,spoon", batch=2).source
    texts, used, epochs = source.store.samples["txt"], Counter[int](), 7
    assert len(source.selection) == 6
    for number in range(source.schedule.batches(epochs)):
        slot = source.schedule.slot(number)
        ordinals, _, rows = source._part(slot)
        assert np.array_equal(source.store.buckets[slot.bucket][ordinals], rows)
        used.update(source.store.sample_index(slot.bucket, ordinals).tolist())
    assert len(used) == 6
    assert set(used.values()) <= {epochs - 1, epochs, epochs + 1}
    assert not [row for row in used if {"astronaut", "spoon"} & set(texts[row].as_py().split(", "))]


def test_latents_and_captions_of_a_batch_are_the_selected_samples_own(open_run: Open) -> None:
    source = open_run(require_tags="solo", batch=3).source
    for number in range(8):
        slot = source.schedule.slot(number)
        batch = source.make(slot)
        rows = source._part(slot)[2]
        assert np.array_equal(batch.latents.numpy(), source.store.read(slot.bucket, rows))
        index = source.store.sample_index(slot.bucket, source._part(slot)[0])
        texts = [source.store.samples["txt"][int(i)].as_py() for i in index]
        assert all("solo" in text for text in texts)
        assert np.array_equal(batch.input_ids, source.captions.tokenize(texts))
