import pytest

from xlsd_cache.schema import SAMPLES
from xlsd_cache.vocabulary import RESERVED, Bucket


def test_every_own_column_of_a_sample_is_reserved() -> None:
    assert set(SAMPLES.names) == RESERVED


def test_a_buckets_name_and_size() -> None:
    bucket = Bucket.parse("512x768")
    assert (bucket.width, bucket.height, bucket.name) == (512, 768, "512x768")
    assert bucket.latent_size == (96, 64)


@pytest.mark.parametrize("name", ["", "512", "512x", "0x64", "64x064", "64x64x64", "../64x64",
                                  " 64x64", "٦٤x64", "99999x99999", "100000x1"])  # fmt: skip
def test_what_is_no_size_is_no_bucket(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a bucket"):
        Bucket.parse(name)


def test_the_store_is_opened_from_its_room() -> None:
    import xlsd_cache.store
    from xlsd_cache.store.reader import LatentStore

    assert xlsd_cache.store.LatentStore is LatentStore
    with pytest.raises(AttributeError, match="no attribute 'Store'"):
        xlsd_cache.store.Store  # noqa: B018
