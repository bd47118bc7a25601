import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.errors import UserError
from xlsd_cache.images.buckets import Buckets, Placement
from xlsd_cache.outcomes import Rejected
from xlsd_cache.vocabulary import Bucket

SIDES = st.integers(1, 5000)


def aspect(resolution: int = 512, max_ratio: float = 4.0, upscale: bool = True) -> Buckets:
    return Buckets.make("aspect", resolution, max_ratio, upscale)


def test_aspect_buckets_are_the_largest_in_steps_of_64_with_at_most_the_resolutions_area() -> None:
    sizes = {(bucket.width, bucket.height) for bucket in aspect().sizes}
    assert {(512, 512), (576, 448), (448, 576), (640, 384), (768, 320), (1024, 256)} <= sizes
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert width * height <= 512**2 < max((width + 64) * height, width * (height + 64))
        assert max(width, height) <= 4 * min(width, height)
        assert (height, width) in sizes


@given(SIDES, SIDES)
def test_every_image_gets_a_bucket_or_a_reason(width: int, height: int) -> None:
    placed = aspect(upscale=False).place(width, height)
    ratio = max(width, height) / min(width, height)
    if isinstance(placed, Rejected):
        assert placed.reason in {"too_elongated", "too_small"}
        assert (placed.reason == "too_elongated") == (ratio > 4)
        assert f"{width}x{height}" in placed.detail
    else:
        assert width >= placed.bucket.width
        assert height >= placed.bucket.height


@given(SIDES, SIDES)
def test_the_crop_is_centred_fills_the_bucket_and_wastes_nothing(width: int, height: int) -> None:
    placed = aspect(max_ratio=5000).place(width, height)
    assert isinstance(placed, Placement)
    left, top, right, bottom = placed.crop
    assert left >= 0
    assert top >= 0
    assert left + right == pytest.approx(width)
    assert top + bottom == pytest.approx(height)
    shape = placed.bucket.width / placed.bucket.height
    assert (right - left) / (bottom - top) == pytest.approx(shape)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


@given(SIDES, SIDES)
def test_no_other_bucket_is_nearer_in_ratio(width: int, height: int) -> None:
    buckets = aspect(max_ratio=5000)
    placed = buckets.place(width, height)
    assert isinstance(placed, Placement)

    def distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width / bucket.height) - math.log(width / height))

    assert distance(placed.bucket) <= min(map(distance, buckets.sizes)) + 1e-12


def test_a_crop_by_hand() -> None:
    # 600x400 into 512x512: scaled by 1.28 it covers 768x512, of which 128 go on each side.
    placed = Buckets.make("square", 512, 4.0, upscale=True).place(600, 400)
    assert isinstance(placed, Placement)
    assert placed.crop == (100.0, 0.0, 500.0, 400.0)


def test_explicit_sizes() -> None:
    buckets = Buckets.make("512x768, 768x512", 512, 4.0, upscale=False)
    assert [bucket.name for bucket in buckets.sizes] == ["512x768", "768x512"]


@pytest.mark.parametrize("spec", ["tall", "512", "512x", "0x512", "500x512", "512x512,"])
def test_unusable_sizes_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="--buckets"):
        Buckets.make(spec, 512, 4.0, upscale=False)


def test_an_unusable_resolution_is_refused() -> None:
    with pytest.raises(UserError, match="--resolution 500"):
        Buckets.make("aspect", 500, 4.0, upscale=False)
