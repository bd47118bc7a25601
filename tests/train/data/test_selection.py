from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support import cache, write_images
from tests.support.sessions import Open
from xlsd_cache.dataset.selection import Selection, select
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore
from xlsd_train.data.selection import filter_by_tags, held_out_mask, spaced


def tagged_selection(
    store: LatentStore, columns: Sequence[str], require: Sequence[str], forbid: Sequence[str]
) -> Selection:
    return select(store, filter_by_tags(store, columns, require, forbid).mask)


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
                    tagged_selection(ours, ["txt"], require, forbid)
                continue
            selection = tagged_selection(ours, ["txt"], require, forbid)
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
                tagged_selection(ours, ["txt"], [part], [])
        tagged = filter_by_tags(ours, ["txt"], [], ["sol", "wide"])
        assert tagged.unknown == ("sol",)
        assert tagged.mask.sum() == 5


def test_a_tag_in_any_of_the_columns_counts(photos: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "l"
    build = ("--out", out, "--vae", vae, "--resolution", 128, "--captions", "txt,title")
    assert cache("build", photos, *build) == 0
    with LatentStore.open(out) as ours:
        titles = ours.samples["title"].to_pylist()
        selection = tagged_selection(ours, ["txt", "title"], ["solo"], ["eileen"])
        rows = selection.rows(ours, np.arange(len(selection))).tolist()
        expected = sorted(row for row in by_hand(ours, ("solo",), ()) if titles[row] != "eileen")
        assert rows == expected
        assert len(rows) == 3


def test_a_run_draws_every_selected_sample_as_often_and_no_other(open_run: Open) -> None:
    """Also over buckets of different sizes and batches that straddle epochs."""
    source = open_run(forbid_tags="astronaut,spoon", batch=2).source
    texts, used, epochs = source.dataset.store.samples["txt"], Counter[int](), 7
    assert len(source.dataset.selection) == 6
    for number in range(source.sampler.order.batches(epochs)):
        slot = source.sampler.order.slot(number)
        ordinals = source.dataset.selection.ordinals(slot.bucket, slot.ordinals)
        used.update(source.dataset.store.sample_index(slot.bucket, ordinals).tolist())
    assert len(used) == 6
    assert set(used.values()) <= {epochs - 1, epochs, epochs + 1}
    assert not [row for row in used if {"astronaut", "spoon"} & set(texts[row].as_py().split(", "))]


def test_latents_and_captions_of_a_batch_are_the_selected_samples_own(open_run: Open) -> None:
    source = open_run(require_tags="solo", batch=3).source
    for number in range(8):
        slot = source.sampler.order.slot(number)
        batch = source.make(slot)
        ordinals = source.dataset.selection.ordinals(slot.bucket, slot.ordinals)
        rows = source.dataset.store.buckets[slot.bucket][ordinals]
        assert np.array_equal(batch.latents.numpy(), source.dataset.store.read(slot.bucket, rows))
        index = source.dataset.store.sample_index(slot.bucket, ordinals)
        texts = [source.dataset.store.samples["txt"][int(i)].as_py() for i in index]
        assert all("solo" in text for text in texts)
        assert np.array_equal(batch.input_ids, source.captions.tokenize(texts))


class Rows:
    """The parts of a store that `held_out` looks at."""

    def __init__(self, hashes: list[str], crcs: list[int]) -> None:
        self.samples = pa.table({"content_hash": hashes, "crc32c": pa.array(crcs, pa.uint32())})

    def __len__(self) -> int:
        return len(self.samples)


def test_the_fraction_of_hashes_below_it_is_held_out() -> None:
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32).hex() for _ in range(20000)]
    crcs = rng.integers(0, 2**32, 20000).tolist()
    for rows in (Rows(hashes, crcs), Rows([""] * 20000, crcs)):
        small, large = (held_out_mask(rows, x) for x in (0.01, 0.1))  # type: ignore[arg-type]
        assert abs(small.mean() - 0.01) < 0.004
        assert abs(large.mean() - 0.1) < 0.01
        assert not (small & ~large).any()  # who is held out stays so when more is
        assert not held_out_mask(rows, 0.0).any()  # type: ignore[arg-type]
    exact = np.array([int(h[:16], 16) < int(0.1 * 2**64) for h in hashes])
    assert np.array_equal(held_out_mask(Rows(hashes, crcs), 0.1), exact)  # type: ignore[arg-type]


def test_an_image_stays_on_its_side_however_the_store_grows(vae: Path, tmp_path: Path) -> None:
    images, data = tmp_path / "images", tmp_path / "latents"
    write_images(images, [f"{i}.png" for i in range(12)])
    build = ("build", images, "--out", data, "--vae", vae, "--resolution", 64)
    sides: dict[str, bool] = {}
    for _ in range(2):
        assert cache(*build) == 0
        with LatentStore.open(data) as store:
            mask = held_out_mask(store, 0.4)
            told = dict(zip(store.samples["key"].to_pylist(), mask.tolist(), strict=True))
        assert sides.items() <= told.items()
        assert 0 < mask.sum() < len(mask)
        sides = told
        write_images(images, [f"new/{i}.png" for i in range(8)], first_seed=50)
    assert len(sides) == 20


def test_selected_samples_are_those_of_the_mask(store: Path) -> None:
    with LatentStore.open(store) as ours:
        mask = np.arange(len(ours)) % 3 != 1
        selection = select(ours, mask)
        assert len(selection) == mask.sum()
        assert selection.of == len(ours)
        rows = [
            ours.sample_index(name, selection.ordinals(name, np.arange(size)))
            for name, size in selection.sizes.items()
        ]
        assert sorted(np.concatenate(rows).tolist()) == np.flatnonzero(mask).tolist()
        everything = select(ours, np.ones(len(ours), np.bool_))
        assert everything.sizes == {name: len(rows) for name, rows in ours.buckets.items()}
        assert not len(select(ours, np.zeros(len(ours), np.bool_)))


@pytest.mark.parametrize("count", [0, 1, 3, 7, 99])
def test_a_part_is_spread_evenly(count: int) -> None:
    mask = np.arange(100) % 5 == 0
    some = spaced(mask, count)
    assert some.sum() == min(count, 20)
    assert not (some & ~mask).any()
    if count == 3:
        assert np.flatnonzero(some).tolist() == [0, 30, 65]


def test_no_held_out_image_is_ever_in_a_batch(open_run: Open) -> None:
    session = open_run(validation_fraction=0.4, batch=2)
    source = session.source
    mask = held_out_mask(source.dataset.store, 0.4)
    assert 0 < mask.sum() < len(mask)
    seen = set()
    for number in range(40):
        slot = session.batch_order.slot(number)
        ordinals = source.dataset.selection.ordinals(slot.bucket, slot.ordinals)
        batch = source.make(slot)
        rows = source.dataset.store.buckets[slot.bucket][ordinals]
        assert np.array_equal(batch.latents.numpy(), source.dataset.store.read(slot.bucket, rows))
        seen |= set(source.dataset.store.sample_index(slot.bucket, ordinals).tolist())
    assert seen == set(np.flatnonzero(~mask).tolist())


def test_tags_and_what_is_held_out_select_together(open_run: Open) -> None:
    session = open_run(
        validation_fraction=0.4, forbid_tags="astronaut", batch=2, validate_every=5,
        validation_images=2,
    )  # fmt: skip
    source = session.source
    held = held_out_mask(source.dataset.store, 0.4)
    tagged = filter_by_tags(source.dataset.store, ["txt"], [], ["astronaut"]).mask
    rows = source.dataset.selection.rows(
        source.dataset.store, np.arange(len(source.dataset.selection))
    )
    assert rows.tolist() == np.flatnonzero(tagged & ~held).tolist()
    assert session.validator is not None
    for selection in session.validator.sets.values():
        assert tagged[selection.rows(source.dataset.store, np.arange(len(selection)))].all()
