import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.sessions import Open
from xlsd_cache.dataset.sampler import BucketBatchSampler
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore
from xlsd_train.data.loader import Batch, BatchSource, Loader
from xlsd_train.data.noise import Noising, noise, timesteps

CPU = torch.device("cpu")


@pytest.fixture
def source(open_run: Open) -> BatchSource:
    return open_run().source


def same(a: Batch, b: Batch) -> bool:
    names = ("latents", "noise", "timesteps", "input_ids")
    return a.number == b.number and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def test_a_batch_is_what_the_store_and_the_draws_say(source: BatchSource, store: Path) -> None:
    for number in range(6):
        slot = source.sampler.order.slot(number)
        batch = source.make(slot)
        positions = slot.images_before + np.arange(len(slot.ordinals))
        with LatentStore.open(store) as ours:
            rows = ours.buckets[slot.bucket][slot.ordinals]
            assert np.array_equal(batch.latents.numpy(), ours.read(slot.bucket, rows))
            index = ours.sample_index(slot.bucket, slot.ordinals)
            texts = [ours.samples["txt"][int(i)].as_py() for i in index]
        assert torch.equal(batch.input_ids, source.captions.tokenize(texts))
        assert torch.equal(batch.noise, noise(0, positions, batch.latents.shape[1:]))
        assert torch.equal(batch.timesteps, timesteps(0, positions, 1000))
        assert (batch.images, batch.images_before) == (len(positions), slot.images_before)


def part_of(source: BatchSource, rank: int, processes: int) -> BucketBatchSampler:
    size = source.sampler.batch_size
    return BucketBatchSampler(source.dataset, size, rank=rank, world_size=processes)


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("stratified", [False, True])
def test_processes_cut_the_same_batch(
    source: BatchSource, processes: int, stratified: bool
) -> None:
    noising = Noising(1, 1000, stratified, offset=0.1)
    source = replace(source, noising=noising)
    for number in range(4):
        slot = source.sampler.order.slot(number)
        whole = source.make(slot)
        parts = [
            replace(source, sampler=part_of(source, rank, processes)).make(slot)
            for rank in range(processes)
        ]
        for name in ("latents", "noise", "timesteps", "input_ids"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))
        assert {part.images for part in parts} == {whole.images}


def test_the_loader_gives_the_batches_in_order_from_anywhere(source: BatchSource) -> None:
    expected = [source.make(source.sampler.order.slot(number)) for number in range(9)]
    for first in (0, 4, 8):
        loader = Loader(source, first, 9, CPU)
        got = list(loader)
        assert len(got) == 9 - first
        assert all(same(a, b) for a, b in zip(got, expected[first:], strict=True))
        loader.close()


def test_a_loader_closed_early_ends_its_thread(source: BatchSource) -> None:
    loader = Loader(source, 0, 10**6, CPU)
    next(iter(loader))
    loader.close()
    assert "loader" not in {thread.name for thread in threading.enumerate()}


def test_what_goes_wrong_in_the_thread_reaches_the_loop(
    source: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise UserError("cannot read images/x.jpg")

    monkeypatch.setattr(source.dataset.store, "read", damaged)
    with pytest.raises(UserError, match="cannot read"):
        list(Loader(source, 0, 3, CPU))


def test_half_precision_latents_stay_as_stored(
    photos: Path, vae: Path, tmp_path: Path, open_run: Open
) -> None:
    from tests.support import cache

    out = tmp_path / "half"
    args = ("--out", out, "--vae", vae, "--resolution", 128, "--store-dtype", "float16")
    assert cache("build", photos, *args) == 0
    session = open_run(data=out)
    batch = session.source.make(session.batch_order.slot(0))
    assert batch.latents.dtype == torch.float16
    assert torch.isfinite(session.take_step.loss(batch)).all()


def test_stratified_timesteps_spread_over_each_batch(open_run: Open) -> None:
    source = open_run(timesteps="stratified").source
    for number in range(5):
        batch = source.make(source.sampler.order.slot(number))
        strata = batch.timesteps * batch.images // 1000
        assert sorted(strata.tolist()) == list(range(batch.images))
