import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import cache, files, metrics, printed, train, write_images
from tests.support.vaes import tiny
from xlsd_cache.dataset.batch_order import BatchOrder
from xlsd_cache.dataset.selection import select
from xlsd_cache.errors import UserError
from xlsd_cache.integrity.statistics import moments
from xlsd_cache.store.reader import LatentStore
from xlsd_train.data.mixture import Mixture, open_mixture
from xlsd_train.data.selection import filter_by_tags, held_out_mask

Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def other(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of twelve other pictures, in float16, captioned in two columns; one shared tag."""
    folder = tmp_path_factory.mktemp("other")
    write_images(folder / "images", [f"{i}.png" for i in range(9)], width=160, height=160)
    write_images(folder / "images", [f"wide{i}.png" for i in range(3)], 9, width=256, height=128)
    for path in (folder / "images").glob("*.png"):
        path.with_suffix(".txt").write_text(f"woman, picture {path.stem}")
        path.with_suffix(".title").write_text(f"title {path.stem}")
    given = ("--vae", vae, "--resolution", 128, "--store-dtype", "float16")
    captions = ("--captions", "txt,title")
    assert cache("build", folder / "images", "--out", folder / "latents", *given, *captions) == 0
    return folder / "latents"


def test_it_reads_what_its_stores_read(store: Path, other: Path) -> None:
    with open_mixture([f"{store}:3", str(other)]) as mixed:
        ours, theirs = (part.store for part in mixed.parts)
        assert len(mixed) == len(ours) + len(theirs) == 20
        assert set(mixed.buckets) == {*ours.buckets, *theirs.buckets}
        assert mixed.caption_columns == ("txt", "title")
        assert (ours.identity.dtype, theirs.identity.dtype) == ("float32", "float16")
        assert mixed.identity.dtype == "float32"
        for bucket, rows in mixed.buckets.items():
            found = mixed.read(bucket, rows[::-1])
            keys = mixed.samples["key"].take(mixed.sample_index(bucket, rows[::-1])).to_pylist()
            expected: dict[str, Any] = {}
            for part in (ours, theirs):
                there = part.buckets.get(bucket, np.empty(0, np.int64))
                if not len(there):
                    continue
                names = part.samples["key"].take(part.sample_index(bucket, np.arange(len(there))))
                latents = part.read(bucket, there).astype(np.float32)
                expected |= dict(zip(names.to_pylist(), latents, strict=True))
            assert set(keys) == set(expected)
            assert all(np.array_equal(x, expected[key]) for key, x in zip(keys, found, strict=True))
            mixed.will_need(bucket, rows)
        titles = dict(
            zip(*(mixed.samples[name].to_pylist() for name in ("key", "title")), strict=True)
        )
        assert sum(title is not None for title in titles.values()) == 12


def test_one_store_alone_reads_as_itself(store: Path) -> None:
    with open_mixture([str(store)]) as mixed, LatentStore.open(store) as alone:
        assert mixed.samples.equals(alone.samples)
        assert mixed.identity == alone.identity
        for bucket, rows in alone.buckets.items():
            at = np.arange(len(rows))
            assert np.array_equal(mixed.sample_index(bucket, at), alone.sample_index(bucket, at))
            assert np.array_equal(mixed.read(bucket, at), alone.read(bucket, rows))
        assert np.array_equal(mixed.tagged("txt", "solo"), alone.tagged("txt", "solo"))
        assert mixed.moments() == moments(alone)


def test_selection_goes_through_all_stores(store: Path, other: Path) -> None:
    with open_mixture([str(store), f"{other}:0.5"]) as mixed:
        mask = filter_by_tags(mixed, ["txt"], ["woman"], []).mask
        texts = mixed.samples["txt"].to_pylist()
        assert mask.tolist() == ["woman" in (text or "").split(", ") for text in texts]
        chosen = select(mixed, mask)
        in_ours = filter_by_tags(mixed.parts[0].store, ["txt"], ["woman"], []).mask.sum()
        assert mixed.counts(mask) == [in_ours, 12]
        shares = mixed.shares(chosen.chosen)
        assert {name: sum(x.samples for x in of) for name, of in shares.items()} == chosen.sizes
        # a column that one store lacks: none of its samples has a tag there
        assert mixed.tagged("title", "title 3").sum() == 1
        with pytest.raises(UserError, match="no caption column 'nothing'"):
            mixed.tagged("nothing", "woman")
        # an image is on the same side of the split in every store
        held = {part.store.root: held_out_mask(part.store, 0.4).sum() for part in mixed.parts}
        assert held_out_mask(mixed, 0.4).sum() == sum(held.values())


def test_statistics_count_each_store_as_often_as_it_is_used(store: Path, other: Path) -> None:
    with open_mixture([f"{store}:3", str(other)]) as mixed:
        ours, theirs = (
            np.concatenate(
                [
                    x.read(name, rows).astype(np.float64).transpose(1, 0, 2, 3).reshape(4, -1)
                    for name, rows in x.buckets.items()
                ],
                axis=1,
            )
            for x in (part.store for part in mixed.parts)
        )
        found = mixed.moments()
    # 8 images three times and 12 once; within a store every latent's values count alike
    values = np.concatenate([ours, theirs], axis=1)
    weight = np.repeat([24 / ours.shape[1], 12 / theirs.shape[1]], [ours.shape[1], theirs.shape[1]])
    mean = np.average(values, axis=1, weights=weight)
    spread = np.average((values - mean[:, None]) ** 2, axis=1, weights=weight) ** 0.5
    assert np.allclose(found.mean, mean, rtol=1e-9)
    assert np.allclose(found.std, spread, rtol=1e-9)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["{store}:0"], "'0' is no weight above 0 and up to 1000000; give e.g. {store}:2"),
        (["{store}:twice"], "'twice' is no weight above 0"),
        (["{store}:nan"], "'nan' is no weight above 0"),
        (["{store}:1e999999999"], "'1e999999999' is no weight above 0"),
        (["{store}", "{store}/../latents:2"], "has {store} twice"),
        (["nowhere"], "no latent store in nowhere"),
        (["{store}", "{foreign}"], "their latents must not mix"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    store: Path, photos: Path, tmp_path: Path, capsys: Out, given: list[str], told: str
) -> None:
    foreign = tmp_path / "foreign"
    if "{foreign}" in given:
        tiny(tmp_path / "vae")
        build = ("--out", foreign, "--vae", tmp_path / "vae", "--resolution", 128)
        assert cache("build", photos, *build) == 0
        capsys.readouterr()
    names = {"store": store, "foreign": foreign}
    data = [x.format(**names) for x in given]
    assert train("--phase", "unet", "--batch", 2, "--data", *data) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told.format(**names) in line


def test_a_folder_whose_name_ends_like_a_weight_is_that_folder(store: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(store, tmp_path / "photos:2"))
    with open_mixture([str(folder)]) as mixed:
        assert mixed.parts[0].weight == 1
    with open_mixture([f"{folder}:0.25"]) as mixed:
        assert float(mixed.parts[0].weight) == 0.25


def test_an_epoch_uses_each_image_as_often_as_its_stores_weight_says(
    store: Path, other: Path
) -> None:
    with open_mixture([f"{store}:3", str(other)]) as mixed:
        uses = _uses(mixed, 4)
    for bucket, counts in uses.items():
        for ordinal, count in counts.items():
            expected = 12 if ordinal < mixed.shares(None)[bucket][0].samples else 4
            assert abs(count - expected) <= 2, (bucket, ordinal, count)


def _uses(mixed: Mixture, epochs: int) -> dict[str, Counter[int]]:
    schedule = BatchOrder(mixed.shares(None), 2, seed=0)
    found: dict[str, Counter[int]] = {name: Counter() for name in schedule.names}
    for number in range(schedule.batches(epochs)):
        slot = schedule.slot(number)
        found[slot.bucket].update(slot.ordinals.tolist())
    return found


def test_a_run_on_two_stores_says_what_it_uses_and_resumes_as_the_stores_were(
    store: Path, other: Path, model: Path, tmp_path: Path, capsys: Out
) -> None:
    moved = Path(shutil.copytree(other, tmp_path / "moved"))
    common = [
        "--phase", "te", "--batch", 4, "--model", model, "--steps", 6, "--sample-every", 0,
        "--lr", 1e-3, "--warmup", 0, "--threads", 1, "--caption", "txt", "--normalize-latents",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*common, "--data", f"{store}:2", other, "--out", whole) == 0
    said = printed(capsys)
    assert f"data       {store.absolute()}: 8 images, generation 0" in said
    assert "each is used 2 times per epoch: 57.1% of the epoch" in said
    record = json.loads((whole / "config.json").read_text())
    assert [x["weight"] for x in record["stores"]] == [2, 1]
    assert [x["selected"] for x in record["stores"]] == [8, 12]
    first = ("--data", f"{store}:2", other, "--out", parts)
    assert train(*common, *first, "--stop-after", 3) == 0
    assert train(*common, "--data", f"{store}:2", moved, "--out", parts) == 0  # it has moved
    last = "checkpoints/step-00000006/*"
    assert files(parts, last) == files(whole, last)
    assert metrics(parts) == metrics(whole)
    capsys.readouterr()
    for data in ([f"{store}:3", other], [store], [other, f"{store}:2"]):
        assert train(*common, "--data", *data, "--out", parts) == 1
        assert "was started with stores" in capsys.readouterr().err
