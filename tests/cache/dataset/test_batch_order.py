from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.dataset.batch_order import BatchOrder, Share

BUCKETS = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 60), min_size=1).filter(
    lambda buckets: any(buckets.values())
)

WEIGHTS = [Fraction(1), Fraction(3), Fraction(1, 4), Fraction("2.5")]


def used(schedule: BatchOrder, batches: int) -> Counter[tuple[str, int]]:
    counts: Counter[tuple[str, int]] = Counter()
    for number in range(batches):
        slot = schedule.slot(number)
        counts.update((slot.bucket, ordinal) for ordinal in slot.ordinals.tolist())
    return counts


@given(BUCKETS, st.integers(1, 16), st.integers(1, 6), st.integers(0, 99))
def test_over_k_epochs_every_sample_is_used_k_times_give_or_take_one(
    buckets: dict[str, int], batch: int, epochs: int, seed: int
) -> None:
    schedule = BatchOrder(buckets, batch, seed)
    counts = used(schedule, schedule.batches(epochs))
    for bucket, samples in buckets.items():
        for ordinal in range(samples):
            assert abs(counts[bucket, ordinal] - epochs) <= 1
    assert sum(counts.values()) == schedule.images(epochs)


@given(BUCKETS, st.integers(1, 16), st.integers(0, 99))
def test_at_any_moment_every_bucket_is_within_one_batch_of_its_share(
    buckets: dict[str, int], batch: int, seed: int
) -> None:
    schedule = BatchOrder(buckets, batch, seed)
    seen: Counter[str] = Counter()
    for number in range(3 * schedule.batches(1)):
        slot = schedule.slot(number)
        seen[slot.bucket] += len(slot.ordinals)
        for bucket, samples in buckets.items():
            assert abs(seen[bucket] - slot.epoch * samples) <= min(batch, samples)


@given(BUCKETS, st.integers(1, 16), st.integers(0, 99), st.integers(0, 400))
def test_any_batch_can_be_made_alone(
    buckets: dict[str, int], batch: int, seed: int, number: int
) -> None:
    one_by_one = BatchOrder(buckets, batch, seed)
    for earlier in range(number + 1):
        there = one_by_one.slot(earlier)
    at_once = BatchOrder(buckets, batch, seed).slot(number)
    assert at_once.bucket == there.bucket
    assert np.array_equal(at_once.ordinals, there.ordinals)
    assert at_once.images_before == there.images_before
    assert at_once.epoch == there.epoch


@given(BUCKETS, st.integers(1, 16), st.integers(0, 99))
def test_batches_are_of_one_bucket_full_and_counted(
    buckets: dict[str, int], batch: int, seed: int
) -> None:
    schedule, images = BatchOrder(buckets, batch, seed), 0
    for number in range(schedule.batches(2)):
        slot = schedule.slot(number)
        assert len(slot.ordinals) == min(batch, buckets[slot.bucket])
        assert slot.images_before == images
        images += len(slot.ordinals)
    assert {name for name, _ in schedule.small_buckets(batch)} == {
        name for name, count in buckets.items() if 0 < count < batch
    }


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(WEIGHTS)), min_size=1, max_size=3)
    .filter(lambda shares: any(samples for samples, _ in shares)),
    st.integers(1, 12), st.integers(0, 99),
)  # fmt: skip
def test_stores_are_mixed_by_weight_at_any_moment(
    given: list[tuple[int, Fraction]], batch: int, seed: int
) -> None:
    """Each is within one sample of its share of the bucket's stream, in the stream's order."""
    shares = [Share(*each) for each in given]
    schedule = BatchOrder({"a": shares}, batch, seed)
    ends = np.cumsum([0, *(share.samples for share in shares)])
    total = sum(share.uses for share in shares)
    stream = np.concatenate(
        [schedule.slot(number).ordinals for number in range(schedule.batches(4))]
    )
    for share, first in zip(shares, ends, strict=False):
        mine = (stream >= first) & (stream < first + share.samples)
        expected = np.arange(1, len(stream) + 1) * share.uses / total
        assert np.all(np.abs(np.cumsum(mine) - expected) <= len(shares))
        own = stream[mine] - first
        for k in range(len(own) // max(share.samples, 1)):  # each once before any is used again
            turn = own[k * share.samples : (k + 1) * share.samples]
            assert sorted(turn) == list(range(share.samples))


def test_one_store_of_weight_one_has_the_order_of_a_number() -> None:
    plain, shared = BatchOrder({"a": 50}, 8, 3), BatchOrder({"a": [Share(50, Fraction(1))]}, 8, 3)
    for number in range(20):
        assert np.array_equal(plain.slot(number).ordinals, shared.slot(number).ordinals)


def test_seeds_and_epochs_give_other_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        schedule = BatchOrder({"a": 64}, 64, seed)
        return [int(ordinal) for ordinal in schedule.slot(epoch).ordinals]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_million_images_in_forty_buckets() -> None:
    schedule = BatchOrder({str(i): 25_000 + i for i in range(40)}, 32, 0)
    slot = schedule.slot(5 * 31_000)
    assert len(slot.ordinals) == 32
    assert 4.5 < slot.epoch < 5.5


def test_the_articles_three_epochs() -> None:
    """30,000 images at batch 32: 937.5 batches an epoch, 2,812.5 in three."""
    schedule = BatchOrder({"512x512": 30_000}, 32, 0)
    assert schedule.batches_an_epoch == 937.5
    assert schedule.batches(3) in (2812, 2813)


def test_a_batch_across_two_rounds_ends_one_and_begins_the_next() -> None:
    schedule = BatchOrder({"a": 10}, 4, 0)
    stream = np.concatenate([schedule.slot(number).ordinals for number in range(5)])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))


def test_who_uses_a_batch_cannot_change_the_next_ones() -> None:
    slot = BatchOrder({"a": 10}, 4, 0).slot(0)
    with pytest.raises(ValueError, match="read-only"):
        slot.ordinals[0] = 7
