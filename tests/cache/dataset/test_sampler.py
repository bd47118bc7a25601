from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xlsd_cache import BucketBatchSampler, LatentDataset, LatentStore
from xlsd_cache.dataset.batch_order import BatchOrder


@pytest.fixture
def dataset(store: Path) -> LatentDataset:
    return LatentDataset(LatentStore.open(store))


def epochs(sampler: BucketBatchSampler, count: int) -> list[list[int]]:
    return [batch for _ in range(count) for batch in sampler]


def test_every_image_is_used_once_an_epoch_and_batches_hold_one_bucket(
    dataset: LatentDataset,
) -> None:
    batches = epochs(BucketBatchSampler(dataset, 3), 6)
    used = Counter(index for batch in batches for index in batch)
    assert used.keys() == set(range(len(dataset)))
    assert set(used.values()) <= {5, 6, 7}
    for batch in batches:
        shapes = {tuple(sample["latents"].shape) for sample in dataset.__getitems__(batch)}
        assert len(shapes) == 1


def test_an_iteration_is_an_epoch_of_as_many_batches_as_its_length_says(
    dataset: LatentDataset,
) -> None:
    sampler = BucketBatchSampler(dataset, 3, seed=5)
    order = BatchOrder(dataset.selection.sizes, 3, 5)
    for epoch in range(4):
        assert sampler.start == order.batches(epoch)
        length = len(sampler)
        assert length == len(list(sampler)) == order.batches(epoch + 1) - order.batches(epoch)


@given(st.integers(0, 25), st.integers(1, 4), st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_resumed_sampler_goes_on_with_the_same_batches(
    dataset: LatentDataset, start: int, batch: int, seed: int
) -> None:
    whole = epochs(BucketBatchSampler(dataset, batch, seed), 12)
    rest = epochs(BucketBatchSampler(dataset, batch, seed, start=start), 4)
    assert rest[:6] == whole[start : start + 6]


def test_leaving_an_iteration_begins_it_again(dataset: LatentDataset) -> None:
    sampler = BucketBatchSampler(dataset, 2)
    first = next(iter(sampler))
    assert next(iter(sampler)) == first


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_each_batch(dataset: LatentDataset, world_size: int) -> None:
    whole = epochs(BucketBatchSampler(dataset, 3), 3)
    parts = [
        epochs(BucketBatchSampler(dataset, 3, rank=rank, world_size=world_size), 3)
        for rank in range(world_size)
    ]
    assert [list(chain(*of)) for of in zip(*parts, strict=True)] == whole
    assert {len(part) for part in parts[0]} == {3 // world_size}


def test_more_processes_than_a_bucket_has_samples_is_refused(store: Path) -> None:
    with LatentStore.open(store) as ours:
        few = np.zeros(len(ours), np.bool_)
        few[:2] = True
        sampler = BucketBatchSampler(LatentDataset(ours, selection=few), 4, rank=0, world_size=3)
        with pytest.raises(ValueError, match="has 2 samples, fewer than the 3 processes"):
            list(sampler)


def test_nothing_selected_gives_no_batches(dataset: LatentDataset) -> None:
    empty = LatentDataset(dataset.store, selection=np.zeros(len(dataset), np.bool_))
    assert len(BucketBatchSampler(empty, 2)) == 0
    assert list(BucketBatchSampler(empty, 2)) == []


@pytest.mark.parametrize(
    ("size", "more"), [(0, {}), (2, {"start": -1}), (2, {"rank": 2, "world_size": 2})]
)
def test_what_cannot_be_is_refused(dataset: LatentDataset, size: int, more: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        BucketBatchSampler(dataset, size, **more)
