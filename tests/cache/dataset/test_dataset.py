import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from xlsd_cache import BucketBatchSampler, LatentDataset, LatentStore, UserError

COUNT = 8


@pytest.fixture
def ours(store: Path) -> Iterator[LatentStore]:
    with LatentStore.open(store) as ours:
        yield ours


def test_samples_are_the_stores_scaled_captioned_and_in_its_order(ours: LatentStore) -> None:
    dataset, row = LatentDataset(ours, "txt"), 0
    assert len(dataset) == len(ours) == COUNT
    for bucket, rows in ours.buckets.items():
        for raw in ours.read(bucket, rows):
            sample = dataset[row]
            scaled = torch.from_numpy(raw).float() - ours.identity.shift_factor
            assert torch.equal(sample["latents"], scaled * ours.identity.scaling_factor)
            assert sample["caption"] == ours.samples["txt"][row].as_py() != ""
            assert sample["key"] == ours.samples["key"][row].as_py()
            row += 1


def test_raw_samples_keep_the_stores_bits_and_dtype(ours: LatentStore) -> None:
    dataset = LatentDataset(ours, scaled=False)
    raw = np.concatenate([ours.read(name, rows).ravel() for name, rows in ours.buckets.items()])
    given_ = np.concatenate([dataset[i]["latents"].numpy().ravel() for i in range(len(dataset))])
    assert given_.dtype == ours.identity.dtype
    assert given_.tobytes() == raw.tobytes()


@given(st.lists(st.integers(-COUNT, COUNT - 1), max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_whole_batch_is_what_its_samples_are_one_by_one(
    ours: LatentStore, indices: list[int]
) -> None:
    dataset = LatentDataset(ours)
    for index, sample in zip(indices, dataset.__getitems__(indices), strict=True):
        alone = dataset[index]
        assert torch.equal(sample["latents"], alone["latents"])
        assert (sample["caption"], sample["key"]) == (alone["caption"], alone["key"])


def test_beyond_the_last_sample_is_an_index_error_so_iteration_ends(ours: LatentStore) -> None:
    dataset = LatentDataset(ours)
    assert len([dataset[index] for index in range(-COUNT, COUNT)]) == 2 * COUNT
    for index in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError, match="8 samples"):
            dataset[index]


def test_a_mask_selects(ours: LatentStore) -> None:
    mask = np.arange(COUNT) % 3 == 1
    some, every = LatentDataset(ours, selection=mask), LatentDataset(ours)
    keys = [every[index]["key"] for index in np.flatnonzero(mask).tolist()]
    assert [some[index]["key"] for index in range(len(some))] == keys
    assert len(LatentDataset(ours, selection=np.zeros(COUNT, np.bool_))) == 0


def test_a_wrong_caption_names_those_there_are_by_argument(ours: LatentStore) -> None:
    with pytest.raises(UserError, match="no caption column 'title' \\(it has txt\\)"):
        LatentDataset(ours, "title")


def test_a_pickled_dataset_reads_the_same(ours: LatentStore) -> None:
    dataset = LatentDataset(ours, "txt", selection=np.arange(COUNT) != 2)
    again = pickle.loads(pickle.dumps(dataset))
    assert len(again) == COUNT - 1
    assert torch.equal(again[3]["latents"], dataset[3]["latents"])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_give_the_same_batches(ours: LatentStore, start: str) -> None:
    dataset = LatentDataset(ours, "txt")
    dataset[0]  # a shard is open as the workers begin
    here = list(DataLoader(dataset, batch_sampler=BucketBatchSampler(dataset, 3)))
    there = DataLoader(
        dataset,
        batch_sampler=BucketBatchSampler(dataset, 3),
        num_workers=2,
        multiprocessing_context=start,
    )
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one["latents"], other["latents"])
        assert (one["caption"], one["key"]) == (other["caption"], other["key"])
